"""Workload of both sides of a benchmark: torchvision's V1 with seeded weights, generated images."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hlo
import numpy as np
import state_dicts
from parity import seeded

CLASSES = 91  # with the background
SEED = 7


def tensors() -> dict[str, np.ndarray]:
    """Returns the state dict of maskrcnn_resnet50_fpn."""
    return seeded.seeded_tensors(state_dicts.recorded("maskrcnn_resnet50_fpn", divisor=1), SEED)


def scenes(arguments: argparse.Namespace) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Makes `batch` images that fill the canvas, with `objects` ellipses each."""
    size = tuple(arguments.canvas)
    return [
        seeded.seeded_scene(size, arguments.objects, CLASSES, seed)
        for seed in range(arguments.batch)
    ]


def add_options(parser: argparse.ArgumentParser, *, batch: int, objects: int | None = None) -> None:
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument(
        "--canvas", type=int, nargs=2, default=[800, 1088], metavar=("HEIGHT", "WIDTH")
    )
    parser.add_argument("--objects", type=int, default=objects, help="in each image")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="compute dtype; torchvision uses AMP",
    )


# -- ours ------------------------------------------------------------------------------------------


def network(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Returns (config, variables, batch) of our network."""
    from parity.ours import batch_of, model_config, variables_of, with_ground_truth

    config = model_config("v1")
    images = scenes(arguments)
    batch = batch_of([image for image, _ in images], tuple(arguments.canvas))
    if arguments.objects:
        batch = with_ground_truth(batch, [truth for _, truth in images])
    return (
        replace(config, compute_dtype=arguments.dtype),
        variables_of("v1", config, tensors()),
        batch,
    )


def compiled(
    function: Callable[..., Any], *arguments: Any, **options: Any
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Compiles `function` for these arguments.

    Returns:
        The program, and the seconds that it took without and with the persistent cache, and GFLOPs.
    """
    import jax

    from mrcnn_jax.runtime import compile_options

    seconds = []
    for _ in range(2):
        jax.clear_caches()
        started = time.perf_counter()
        lowered = jax.jit(function, **compile_options(**options)).lower(*arguments)
        program = lowered.compile()
        seconds.append(round(time.perf_counter() - started, 2))
    cost = lowered.cost_analysis()  # None on a GPU
    flops = cost["flops"] if cost else hlo.flops(hlo.parse(program.as_text()))
    return program, {
        "compile_seconds": seconds[0],
        "compile_seconds_cached": seconds[1],
        "gflop": round(flops / 1e9, 1),
    }


def matrix_tflops(dtype: str) -> float:
    """Returns the TFLOP/s of a large matrix product on this device, the best of ten."""
    import jax
    import jax.numpy as jnp

    size = 4096 if jax.default_backend() == "cpu" else 16384
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)  # ones would be faster
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return round(2e-12 * size**3 / min(seconds), 3)


# -- torchvision -----------------------------------------------------------------------------------


def peer(
    arguments: argparse.Namespace, *, channels_last: bool, **constants: Any
) -> tuple[Any, list[Any], list[dict[str, Any]]]:
    """Returns torchvision's (model, images, targets), on the GPU if there is one."""
    import torch
    from parity import peers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = peers.build("v1", classes=CLASSES, **constants)
    peers.load(model, tensors())
    model.transform.min_size = (min(arguments.canvas),)  # so that no image is resized
    model.to(device)
    if channels_last:
        model.to(memory_format=torch.channels_last)
        model.backbone.register_forward_pre_hook(
            lambda _, inputs: inputs[0].contiguous(memory_format=torch.channels_last)
        )
    images, targets = [], []
    for pixels, truth in scenes(arguments):
        images.append(torch.from_numpy(pixels).permute(2, 0, 1).to(device))
        targets.append(
            {name: torch.from_numpy(values).to(device) for name, values in truth.items()}
        )
    return model, images, targets


def finish() -> None:
    """Waits for the GPU's queue, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
