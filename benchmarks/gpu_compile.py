"""Compiles the programs of a run for an NVIDIA GPU that need not be there, and says what they do.

    make gpu-compile                       # the programs of the tests, held to their laws
    PYTHONPATH=$(ls -d .venv/gpu-*) .venv/bin/python benchmarks/gpu_compile.py [--gpu h100]
        [--top 15] [--config configs/torchvision_coco.py --batch 2 16 --predict 1 16]
        [--canvas 800 1344]

Without --config: the joint step of torchvision_coco (batch 2 and 16) and its prediction (batch 1
and 16), 800 x 1344, and the three stages of coco300. Prints a JSON line a program, and to standard
error the costliest kernels and the lines of Python that they come from.

`ms` is the sum over kernels of the slower of moving `gb` at 85 % of the memory's bandwidth and of
multiplying at the rate of a good kernel, at least 1.5 us each: an optimistic guess to compare forms
of a program by, and no measurement. Host waits are not in it: `loops` counts while loops whose end
the host has to read. Nothing here knows cuDNN's algorithms or the tiles of products, which are
chosen on a device, nor how fast they are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hlo

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the package need not be installed


@dataclass(frozen=True)
class GPU:
    """What the compiler asks about a device, and the rates of the estimate."""

    name: str
    capability: str
    cores: int
    shared: int  # bytes of shared memory of a core, of which a block gets all but 1 KiB
    cache: int  # bytes of L2
    memory: int  # bytes
    bandwidth: float  # bytes a second
    clock: float  # GHz
    fpus: int  # of a core
    matrix: float  # bfloat16 operations a second that a good kernel reaches


NINE = "major: 9 feature_extension: ACCELERATED_FEATURES"
HOPPER = {"cores": 132, "shared": 233472, "cache": 52428800, "clock": 1.98, "fpus": 128}
GPUS = {
    "h100": GPU(
        "NVIDIA H100 80GB HBM3", NINE, memory=84942979072, bandwidth=3.352e12, matrix=7e14, **HOPPER
    ),
    "h200": GPU("NVIDIA H200", NINE, memory=151397597184, bandwidth=4.8e12, matrix=7e14, **HOPPER),
    "a100": GPU(
        "NVIDIA A100-SXM4-80GB",
        "major: 8",
        cores=108,
        shared=167936,
        cache=41943040,
        memory=85100068864,
        bandwidth=2.039e12,
        clock=1.41,
        fpus=64,
        matrix=2.2e14,
    ),
}
REACHED = 0.85  # share of the bandwidth that kernels reach


def target(gpu: GPU) -> str:
    """The device as XLA reads it: a GpuTargetConfigProto in text form."""
    numbers = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "fpus_per_core": gpu.fpus,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": gpu.shared,
        "shared_memory_per_block_optin": gpu.shared - 1024,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "core_count": gpu.cores,
        "clock_rate_ghz": gpu.clock,
        "memory_bandwidth": int(gpu.bandwidth),
        "l2_cache_size": gpu.cache,
        "device_memory_size": gpu.memory,
    }
    kinds = ("driver", "runtime", "compile_time_toolkit")
    versions = {f"{kind}_version": "13.0.0" for kind in kinds} | {"dnn_version": "9.12.0"}
    info = " ".join([f"{k}: {v}" for k, v in numbers.items()])
    info += "".join(f' {k}: "{v}"' for k, v in versions.items())
    info += f" cuda_compute_capability {{ {gpu.capability} }}"
    info += f' name: "{gpu.name}" device_vendor: "NVIDIA Corporation"'
    return (
        f'gpu_device_info {{ {info} }} platform_name: "CUDA"'
        f' dnn_version_info {{ major: 9 minor: 12 }} device_description_str: "{gpu.name}"'
    )


# -- programs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A function to compile, and what it is called with."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donate: bool
    facts: dict[str, Any]


def programs(arguments: argparse.Namespace, path: str) -> Iterator[Program]:
    """The steps of a config's stages and its prediction."""
    import jax
    import numpy as np

    from mrcnn_jax.config.files import load_config_file
    from mrcnn_jax.models.mask_rcnn import MaskRCNN, example_batch
    from mrcnn_jax.runs.state import TrainState
    from mrcnn_jax.structures import blank_batch
    from mrcnn_jax.training.guard import guarded
    from mrcnn_jax.training.optimizer import make_optimizer
    from mrcnn_jax.training.step import make_train_step

    config = load_config_file(Path(path))
    data, canvas = config.data, tuple(arguments.canvas or config.data.canvases[0])
    model_config = replace(config.model, compute_dtype=arguments.dtype, remat=arguments.remat)
    model = MaskRCNN(model_config, deterministic=arguments.deterministic)
    variables = jax.eval_shape(lambda b: model.init(jax.random.key(0), b), example_batch((64, 64)))
    params, statistics = variables["params"], variables.get("batch_stats", {})
    facts = {"canvas": canvas, "dtype": arguments.dtype}
    for stage in config.stages:
        if arguments.stages is not None and stage.name not in arguments.stages:
            continue
        optimizer = make_optimizer(stage, params, total_steps=10**6)
        step = guarded(make_train_step(model, stage, params, optimizer), 0)
        key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        state = TrainState(
            params, statistics, jax.eval_shape(optimizer.init, params), np.int32(0), key
        )
        for size in arguments.batch:
            batch = blank_batch(
                size,
                canvas,
                objects=data.max_objects,
                ignored=data.max_ignored,
                mask_crop=data.mask_crop,
                depth="depth" in stage.losses,
            )
            name = f"{config.name}-{stage.name}-b{size}"
            yield Program(name, step, (state, batch), True, facts | {"batch": size})
    for size in arguments.predict:
        name = f"{config.name}-predict-b{size}"
        batch = blank_batch(size, canvas)
        yield Program(name, model.apply, (variables, batch), False, facts | {"batch": size})


# -- what a program does ---------------------------------------------------------------------------


def convolutions(module: hlo.Module) -> dict[str, Any]:
    """cuDNN's calls: what is fused into the forward ones, and which are not in bfloat16."""
    calls = [i for i in module.instructions() if i.target.startswith("__cudnn$conv")]
    forward = [i for i in calls if "Forward" in i.target]
    modes = Counter(i.attribute(r'"activation_mode":"k(\w+)"') for i in forward)
    return {
        "forward": dict(modes),
        "backward": len(calls) - len(forward),
        "backward_of_trunk": sum(
            "Backward" in i.target and bool(re.search(r"/(resnet|fpn)/", i.path)) for i in calls
        ),
        "float32": sum(i.shapes[0].dtype == "f32" and "Filter" not in i.target for i in calls),
    }


def relus_apart(module: hlo.Module) -> list[str]:
    """Kernels that apply ReLU to the output of a convolution, which could have done it."""
    found = []
    for computation in module.computations.values():
        for each in computation.values():
            if each.op != "fusion":
                continue
            inside = module.computations[each.calls]
            fresh = {
                place
                for place, name in enumerate(each.operands)
                if _is_convolution(name, computation)
            }
            if fresh and any(
                part.op == "maximum"
                and module.source(part).endswith(" relu")
                and _reads(part, inside, fresh)
                for part in inside.values()
            ):
                found.append(each.path)
    return found


def _is_convolution(name: str, computation: hlo.Computation) -> bool:
    each = computation.get(name.split("#")[0])
    while each is not None and each.op in ("get-tuple-element", "bitcast"):
        each = computation.get(each.operands[0].split("#")[0])
    return each is not None and "__cudnn$conv" in each.target and "Forward" in each.target


def _reads(part: hlo.Instruction, inside: hlo.Computation, parameters: set[int]) -> bool:
    """Whether an instruction of a fusion reads one of its parameters, cell by cell."""
    if part.op == "parameter":
        return part.parameter in parameters
    if part.op in ("reduce", "gather", "dot", "reduce-window", "concatenate"):
        return False
    return any(_reads(inside[name.split("#")[0]], inside, parameters) for name in part.operands)


def loose_products(module: hlo.Module) -> list[str]:
    """Products of float32 that a GPU computes in TF32, 10 bits of mantissa."""
    found = []
    for name, computation in module.computations.items():
        for each in computation.values():
            product = each.op == "dot" or "matmul" in each.target or "gemm" in each.target
            if not product or hlo.arrays(each.operands[0], computation)[0].dtype != "f32":
                continue
            exact = re.search(r"operand_precision=\{highest,\s*highest\}", each.attributes)
            exact = exact or re.search(
                r'"operand_precision":\["HIGHEST",\s*"HIGHEST"\]', each.attributes
            )
            if not exact:
                found.append(each.path or name)
    return found


def thunks(folder: Path) -> dict[str, int]:
    """From XLA's dump: command buffers, and loops and launches inside of them and outside.

    A loop outside makes the host wait for its condition at every turn.
    """
    files = sorted(folder.glob("*thunk_sequence_after_thunk_passes.txt"))
    files = files or sorted(folder.glob("*thunk_sequence.txt"))
    counts: Counter[str] = Counter(
        command_buffers=0, host_loops=0, device_loops=0, launches=0, host_launches=0
    )
    above: list[tuple[int, str]] = []
    for line in files[-1].read_text().splitlines() if files else []:
        match = re.match(r"(\s*)\d+: k(\w+)", line)
        if match is None:
            continue
        indent, kind = len(match[1]), match[2]
        while above and above[-1][0] >= indent:
            above.pop()
        inside = any(name == "CommandBuffer" for _, name in above)
        if kind == "CommandBuffer":
            counts["command_buffers"] += 1
        elif kind in ("While", "Conditional"):
            counts["device_loops" if inside else "host_loops"] += kind == "While"
        else:
            counts["launches" if inside else "host_launches"] += 1
        above.append((indent, kind))
    return dict(counts)


def compare_and_swap(folder: Path) -> int | None:
    """How many atomic sums are loops of compare-and-swap; None where XLA dumps no machine code."""
    files = list(folder.glob("*.ptx"))
    loops = sum(len(re.findall(r"\batom\.[\w.]*\bcas\b", file.read_text())) for file in files)
    return loops if files else None


def facts_of(module: hlo.Module, gpu: GPU) -> dict[str, Any]:
    found = hlo.kernels(module)
    bandwidth = gpu.bandwidth * REACHED
    sorts = [i for i in module.instructions() if i.op == "sort"]
    copies = [i for i in module.instructions() if i.op == "copy" and i.bytes > 1 << 20]
    return {
        "gb": round(sum(k.bytes * k.times for k in found) / 1e9, 2),
        "tflop": round(sum(k.flops * k.times for k in found) / 1e12, 3),
        "ms": round(1e3 * sum(k.seconds(bandwidth, gpu.matrix) for k in found), 2),
        "kernels": sum(k.times for k in found),
        "convolutions": convolutions(module),
        "relus_apart": relus_apart(module),
        "float32_products_in_tf32": loose_products(module),
        "sorts": len(sorts),
        "largest_sort": max((max(i.shapes[0].sides) for i in sorts), default=0),
        "sorted_mb": round(sum(i.bytes for i in sorts) / 1e6, 1),
        "large_copies": len(copies),
        "copied_mb": round(sum(i.bytes for i in copies) / 1e6, 1),
    }


def costliest(module: hlo.Module, gpu: GPU, count: int) -> Iterator[str]:
    """A line for each of the kernels that take longest, those of one name and shape together."""
    bandwidth = gpu.bandwidth * REACHED
    together: dict[tuple[Any, ...], list[hlo.Kernel]] = {}
    for kernel in hlo.kernels(module):
        part = _telling(kernel.instruction, module)
        key = (kernel.kind, module.source(part), part.path, kernel.instruction.shapes[:1])
        together.setdefault(key, []).append(kernel)
    rows = [
        (sum(k.seconds(bandwidth, gpu.matrix) for k in group), key, group)
        for key, group in together.items()
    ]
    for seconds, (kind, source, path, shapes), group in sorted(rows, key=lambda row: -row[0])[
        :count
    ]:
        moved = sum(k.bytes * k.times for k in group) / 1e6
        flops = sum(k.flops * k.times for k in group) / 1e9
        times = sum(k.times for k in group)
        shape = f"{shapes[0].dtype}{list(shapes[0].sides)}" if shapes else ""
        name = "/".join(path.split("/")[-5:])
        yield (
            f"{1e3 * seconds:7.3f} ms x{times:<4} {moved:8.1f} MB {flops:8.1f} GFLOP"
            f"  {kind:32} {shape:28} {source:40} {name}"
        )


def _telling(each: hlo.Instruction, module: hlo.Module) -> hlo.Instruction:
    """The instruction that says most about a fusion: itself, or one inside with a source."""
    if module.source(each) or each.op != "fusion":
        return each
    return next((part for part, _ in hlo.fused(each, module) if module.source(part)), each)


# -- the command -----------------------------------------------------------------------------------


def report(
    program: Program, gpu: GPU, sharding: Any, options: Any, folder: Path, save: Path | None
) -> hlo.Module:
    """Compiles a program and prints its line.

    Args:
        program: what is compiled.
        gpu: for what.
        sharding: that device.
        options: of the compiler.
        folder: of XLA's dumps.
        save: folder for the compiled program; None: nowhere.
    """
    import jax

    def there(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shutil.rmtree(folder)
    folder.mkdir()
    jitted = jax.jit(program.function, donate_argnums=(0,) if program.donate else ())
    began = time.perf_counter()
    lowered = jitted.trace(*jax.tree.map(there, program.arguments)).lower()
    middle = time.perf_counter()
    compiled = lowered.compile(options)
    seconds = {"lower_s": middle - began, "compile_s": time.perf_counter() - middle}
    sizes = compiled.memory_analysis()
    kinds = ("argument", "output", "alias", "temp")
    gib = {kind: getattr(sizes, f"{kind}_size_in_bytes") / 2**30 for kind in kinds}
    gib["peak"] = gib["argument"] + gib["output"] - gib["alias"] + gib["temp"]
    text = compiled.as_text()
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
        (save / f"{program.name}.hlo").write_text(text)
    module = hlo.parse(text)
    line = {"program": program.name, "gpu": gpu.name, **program.facts}
    line |= {name: round(value, 1) for name, value in seconds.items()}
    line |= {"gib": {kind: round(value, 3) for kind, value in gib.items()}}
    line |= facts_of(module, gpu) | thunks(folder) | {"cas_loops": compare_and_swap(folder)}
    print(json.dumps(line), flush=True)
    return module


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--config", help="a config file; by default the three programs named above")
    made.add_argument("--gpu", nargs="+", choices=list(GPUS), default=["h100"])
    made.add_argument("--batch", type=int, nargs="*", default=[2], help="of training")
    made.add_argument("--predict", type=int, nargs="*", default=[], help="batches of prediction")
    made.add_argument("--stages", nargs="*", help="names of stages, by default all")
    made.add_argument("--canvas", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    made.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    made.add_argument("--remat", action="store_true")
    made.add_argument("--deterministic", action="store_true")
    made.add_argument("--top", type=int, default=0, help="costliest kernels to list")
    made.add_argument("--save", type=Path, help="folder for the compiled programs as text")
    return made


def main() -> None:
    arguments = parser().parse_args()
    wanted = [arguments]
    if arguments.config is None:
        coco = {"config": "configs/torchvision_coco.py", "canvas": [800, 1344]}
        coco |= {"batch": [2, 16], "predict": [1, 16]}
        stages = {"config": "configs/coco300.py", "canvas": [800, 1088], "batch": [2]}
        wanted = [argparse.Namespace(**(vars(arguments) | own)) for own in (coco, stages)]
    with tempfile.TemporaryDirectory() as name:
        # "cpu" is where arrays live here; it also skips the plugin's search for a driver.
        os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1"}
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={name}"
        import jax
        from jax.experimental import topologies

        from mrcnn_jax.runtime import compiler_options

        options = compiler_options("gpu", deterministic=arguments.deterministic)
        for key in arguments.gpu:
            gpu = GPUS[key]
            try:
                described = topologies.get_topology_desc(
                    platform="cuda", topology_name=key, target_config=target(gpu), topology="1x1x1"
                )
            except Exception as error:  # what is raised without the plugin differs by version
                reason = str(error).splitlines()[0]
                sys.exit(f"error: no CUDA plugin ({reason}): see `make gpu-compile`")
            sharding = jax.sharding.SingleDeviceSharding(described.devices[0])
            for one in wanted:
                for program in programs(one, one.config):
                    module = report(program, gpu, sharding, options, Path(name), arguments.save)
                    for line in costliest(module, gpu, arguments.top):
                        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
