"""What a joint training step costs as the work grows: with the batch, the canvas, proposals,
objects an image and classes.

    python benchmarks/scaling.py [--plot scaling.png] [--axes batch classes] [--dtype bfloat16]
    python benchmarks/scaling.py --full ...       # ResNet-50-FPN with torchvision's constants at
    800 x 1344, for a GPU python benchmarks/scaling.py --memory         # compiles that step only:
    what it would need, with and without rematerialisation

Without --full the network is a narrow ResNet-10-FPN on small canvases. Along one axis all else
stays as it is. Of each axis: seconds a step, and the least-squares line through them (milliseconds
that stay, and those for each further unit), programs compiled, and the bytes each needs. However
many objects images have, one program serves them. Needs no data set.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import sides  # noqa: F401  finds the package and the tests' seeded scenes
from parity.ours import batch_of, with_ground_truth
from parity.seeded import seeded_scene

from mrcnn_jax.config.model import ModelConfig, ResNetConfig
from mrcnn_jax.config.schema import ParamGroup
from mrcnn_jax.config.tables import TORCHVISION, joint
from mrcnn_jax.models.mask_rcnn import MaskRCNN, example_batch
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.runtime import compile_options
from mrcnn_jax.structures import Batch
from mrcnn_jax.training.memory import GIB, program_bytes
from mrcnn_jax.training.optimizer import make_optimizer
from mrcnn_jax.training.step import make_train_step

OBJECTS = 100  # rows of ground truth an image, however many of them exist


@dataclass(frozen=True)
class Work:
    """One step's work; along an axis one of these changes."""

    batch: int
    canvas: tuple[int, int]
    proposals: int
    objects: int
    classes: int


AXES = ("batch", "area", "proposals", "objects", "classes")
SMALL = Work(batch=2, canvas=(192, 256), proposals=250, objects=10, classes=3)
FULL = Work(batch=2, canvas=(800, 1344), proposals=2000, objects=10, classes=80)


def works(axis: str, full: bool) -> list[tuple[int, Work]]:
    """(unit, work) along an axis; areas in pixels."""
    base = FULL if full else SMALL
    if axis == "area":
        canvases = [
            (height // 32 * 32, width // 32 * 32)
            for height, width in ((400, 672), (576, 960), (800, 1344), (1120, 1888))
        ]
        small = [(96, 128), (192, 256), (288, 384), (384, 512)]
        return [
            (height * width, replace(base, canvas=(height, width)))
            for height, width in (canvases if full else small)
        ]
    values = {
        "batch": (1, 2, 4, 8, 16, 32),
        "proposals": (250, 500, 1000, 2000) if full else (125, 250, 500, 1000),
        "objects": (1, 10, 30, 100),
        "classes": (3, 30, 300, 1203),
    }
    return [(value, replace(base, **{axis: value})) for value in values[axis]]


def model_config(work: Work, arguments: argparse.Namespace) -> ModelConfig:
    rpn = replace(
        TORCHVISION.rpn,
        pre_nms=work.proposals,
        train_pre_nms=None,
        proposals=work.proposals,
        train_proposals=None,
    )
    config = replace(TORCHVISION, num_classes=work.classes, compute_dtype=arguments.dtype, rpn=rpn)
    if arguments.full or arguments.memory:
        return config
    return replace(
        config,
        fpn_channels=32,
        resnet=ResNetConfig(depth=10, width=16),
        rpn=replace(rpn, scales=(8, 16, 32, 64, 128)),
        box_head=replace(config.box_head, hidden=128, samples=64),
        mask_head=replace(config.mask_head, channels=32, samples=16),
        roi=replace(config.roi, canonical_size=56.0),
    )


def scenes(work: Work) -> Batch:
    """Two images of ellipses, again and again; the first `work.objects` of each exist."""
    pictures = [seeded_scene(work.canvas, OBJECTS, work.classes + 1, seed) for seed in range(2)]
    two = with_ground_truth(
        batch_of([image for image, _ in pictures], work.canvas), [truth for _, truth in pictures]
    )
    exists = np.broadcast_to(np.arange(OBJECTS) < work.objects, (2, OBJECTS))
    two = two.replace(ground_truth=two.ground_truth.replace(valid=exists, has_mask=exists))
    import jax

    rows = np.arange(work.batch) % 2
    return jax.tree.map(lambda leaf: leaf[rows], two).replace(
        indices=np.arange(work.batch, dtype=np.int32)
    )


class Step:
    """The joint step of a network with torchvision's trainable layers, and how often it was
    traced."""

    def __init__(self, config: ModelConfig) -> None:
        import jax

        self.traces = 0
        model = MaskRCNN(config)
        self.shapes = jax.eval_shape(
            lambda batch: model.init(jax.random.key(0), batch), example_batch((64, 64))
        )
        heads = (ParamGroup(f"{head}/.*") for head in ("fpn", "rpn", "box_head", "mask_head"))
        frozen = ("resnet/(stem|layer1)/.*", "resnet/layer[234]/.*/(scale|bias)")
        (stage,) = joint((ParamGroup("resnet/layer[234]/.*/kernel"), *heads), frozen, epochs=1)
        self.optimizer = make_optimizer(stage, self.shapes["params"], total_steps=1000)
        step = make_train_step(model, stage, self.shapes["params"], self.optimizer)

        def counted(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
            self.traces += 1
            return step(state, batch)

        self.jitted = jax.jit(counted, **compile_options(donate_argnums=0))

    def first_state(self) -> TrainState:
        """Small random weights: what they are does not change what a step costs."""
        import jax

        random = np.random.default_rng(0)
        params = jax.tree.map(
            lambda leaf: random.normal(0, 0.02, leaf.shape).astype(leaf.dtype),
            self.shapes["params"],
        )
        batch_stats = jax.tree.map(
            lambda leaf: np.ones(leaf.shape, leaf.dtype), self.shapes["batch_stats"]
        )
        return self.state_of(params, batch_stats)

    def state_of(self, params: Any, batch_stats: Any) -> TrainState:
        import jax

        key = jax.random.key_data(jax.random.key(0))
        return jax.tree.map(
            jax.numpy.array,
            TrainState(params, batch_stats, self.optimizer.init(params), jax.numpy.int32(0), key),
        )


def measure(axis: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and bytes of a step along an axis, and the programs compiled for it."""
    import jax

    rows = []
    compiled = 0
    step, program, compile_seconds, last = None, None, 0.0, None
    for unit, work in works(axis, arguments.full):
        batch = jax.device_put(scenes(work))
        shapes = (work.classes, work.proposals, work.batch, work.canvas)
        if step is None or shapes != last:
            step = Step(model_config(work, arguments))
            state = step.first_state()
            started = time.perf_counter()
            program = step.jitted.lower(state, batch).compile()
            compile_seconds = time.perf_counter() - started
            compiled += step.traces
        last = shapes
        seconds = []
        for _ in range(1 + arguments.rounds):
            started = time.perf_counter()
            state, metrics = program(state, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - started)
        assert all(np.isfinite(value) for value in jax.device_get(metrics).values())
        row = {
            "unit": unit,
            "seconds": round(median(seconds[1:]), 4),
            "mib": round(program_bytes(program) / 2**20, 1),
        }
        rows.append(row | {"compile_seconds": round(compile_seconds, 1)})
        print(
            f"{axis:10} {unit:>9,}  {row['seconds']:8.4f} s  {row['mib']:9.1f} MiB  compiled in {compile_seconds:5.1f} s",
            flush=True,
        )
    units, times = np.array([[row["unit"], row["seconds"]] for row in rows]).T
    slope, fixed = np.polyfit(
        units, times, 1, w=1 / times
    )  # relative errors count: the largest would decide alone
    growth = rows[-1]["seconds"] / rows[0]["seconds"], rows[-1]["unit"] / rows[0]["unit"]
    print(
        f"{axis:10} {fixed * 1e3:.1f} ms + {slope * 1e3:.3g} ms each; {growth[0]:.2f} x the time for {growth[1]:.0f} x the work;"
        f" {compiled} programs compiled\n"
    )
    return {
        "rows": rows,
        "fixed_ms": round(fixed * 1e3, 2),
        "ms_each": float(f"{slope * 1e3:.3g}"),
        "programs": compiled,
    }


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    size = (3.2 * len(results), 3)
    figure, panels = pyplot.subplots(
        1, len(results), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for panel, (axis, result) in zip(panels[0], results.items(), strict=True):
        units = np.array([row["unit"] for row in result["rows"]])
        panel.loglog(
            units, [row["seconds"] * 1e3 for row in result["rows"]], "o-", label="measured"
        )
        panel.loglog(
            units, result["fixed_ms"] + result["ms_each"] * units, "--", color="grey", label="line"
        )
        panel.set(
            xlabel="canvas area (pixels)" if axis == "area" else axis,
            title=f"{result['programs']} programs",
        )
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panel.grid(True, which="both", alpha=0.3)
    panels[0][0].set_ylabel("ms a step")
    panels[0][0].legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What the full step needs, from its compiled program; nothing is run."""
    import jax

    rows = []
    for batch, dtype, remat in arguments.programs:
        work = replace(FULL, batch=batch)
        config = replace(model_config(work, arguments), compute_dtype=dtype, remat=remat)
        step = Step(config)
        state = jax.eval_shape(step.state_of, step.shapes["params"], step.shapes["batch_stats"])
        shapes = jax.eval_shape(lambda: scenes(replace(SMALL, batch=1, objects=1)))
        example = jax.tree.map(
            lambda leaf, batch=batch: jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype),
            shapes,
        )
        example = example.replace(images=jax.ShapeDtypeStruct((batch, *work.canvas, 3), np.uint8))
        started = time.perf_counter()
        program = step.jitted.lower(state, example).compile()
        row = {
            "batch": batch,
            "dtype": dtype,
            "remat": remat,
            "gib": round(program_bytes(program) / GIB, 2),
        }
        rows.append(row | {"compile_seconds": round(time.perf_counter() - started, 1)})
        print(
            f"batch {batch:2}  {dtype:8}  remat {remat!s:5}  {row['gib']:6.2f} GiB  compiled in {rows[-1]['compile_seconds']:.1f} s",
            flush=True,
        )
    return rows


def program(text: str) -> tuple[int, str, bool]:
    """ "16,bfloat16" or "16,bfloat16,remat"."""
    batch, dtype, *rest = text.split(",")
    if dtype not in ("float32", "bfloat16") or rest not in ([], ["remat"]):
        raise argparse.ArgumentTypeError(f"{text}: BATCH,DTYPE or BATCH,DTYPE,remat")
    return int(batch), dtype, bool(rest)


PROGRAMS = [
    program(f"{batch},{dtype}{remat}")
    for batch, dtype in ((2, "float32"), (2, "bfloat16"), (16, "bfloat16"))
    for remat in ("", ",remat")
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES)
    parser.add_argument("--rounds", type=int, default=3, help="steps timed after the first")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--full", action="store_true", help="ResNet-50-FPN at 800 x 1344")
    parser.add_argument("--plot", type=Path, help="a PNG to draw")
    parser.add_argument(
        "--memory", action="store_true", help="compile the full step only, and say what it needs"
    )
    parser.add_argument(
        "--programs",
        type=program,
        nargs="+",
        default=PROGRAMS,
        help="of --memory: BATCH,DTYPE[,remat]",
    )
    arguments = parser.parse_args()
    import jax

    where = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    if arguments.memory:
        print(json.dumps(where | {"canvas": FULL.canvas, "memory": memory(arguments)}))
        return
    results = {axis: measure(axis, arguments) for axis in arguments.axes}
    if arguments.plot is not None:
        plot(results, arguments.plot)
    print(json.dumps(where | {"dtype": arguments.dtype, "full": arguments.full} | results))


if __name__ == "__main__":
    main()
