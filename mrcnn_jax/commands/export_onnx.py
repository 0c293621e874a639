"""Export a run to a folder of ONNX programs, which ONNX Runtime and NumPy run.

    mrcnn export --workdir runs/a --out model_onnx --format onnx

The folder holds one HxW.onnx per canvas, whose metadata has all that is needed to use it alone,
meta.json (the same, with the files' SHA-256), the package mrcnn_exported, which loads and runs them
(docs/api.md), and the model card, README.md. jax2onnx converts; each program is then run on a
picture, and nothing is written unless it detects there what the run does.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrcnn_jax.commands.export_contents import metadata, package, prediction
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.output import part_folder

if TYPE_CHECKING:
    import numpy as np

    from mrcnn_jax.runs.run import Run

# What `pip install` needs, as in requirements-onnx.txt; jax2onnx asks for an older Orbax than runs
# are written with, and for packages that only its examples use.
PACKAGES = {"onnx": "'onnx>=1.20'", "onnx_ir": "'onnx-ir>=1'", "onnxruntime": "'onnxruntime>=1.24'"}
CONVERTER = "--no-deps 'jax2onnx>=0.17.1'"
METADATA = "mrcnn_jax"  # the key in an ONNX file's metadata
# How far the converted program may be from the run's: pixels, probabilities, metres.
TOLERANCES = {"boxes": 1e-2, "scores": 1e-4, "masks": 1e-3, "depth": 1e-2, "labels": 0, "valid": 0}
TOLERANCES |= {"mask_scores": 1e-4}


def refuse_missing_packages() -> None:
    """Raises ConfigError, with the commands that help, unless jax2onnx and others are installed."""
    missing = {name for name in (*PACKAGES, "jax2onnx") if not _is_installed(name)}
    commands = []
    if missing - {"jax2onnx"}:
        needed = [package for name, package in PACKAGES.items() if name in missing]
        commands.append(f"pip install {' '.join(needed)}")
    if "jax2onnx" in missing:
        commands.append(f"pip install {CONVERTER}")
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise ConfigError(
            f"--format onnx: {', '.join(sorted(missing))} {are} not installed "
            f"({'; '.join(commands)})"
        )
    for name in PACKAGES:
        _imported(name)


def _is_installed(name: str) -> bool:
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None  # not a folder of that name here


def _imported(name: str) -> Any:
    """A package; ConfigError if something that it needs is missing or of another version."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ConfigError(f"--format onnx: {name} does not import: {_one_line(error)}") from error


def write_folder(out: Path, run: Run, card: str) -> int:
    """Writes the folder, completely or not at all.

    Returns:
        Bytes of its programs.

    Raises:
        ConfigError: jax2onnx cannot convert the network, or does it wrongly, or ONNX Runtime does
            not run the program.
        OSError: the folder cannot be written.
    """
    with part_folder(out) as part:
        folder = part / "model"
        (folder / "mrcnn_exported").mkdir(parents=True)
        write_programs(run, folder)
        for name, text in (*package(), ("README.md", card)):
            (folder / name).write_text(text, encoding="utf-8")
        folder.replace(out)
    return sum(path.stat().st_size for path in out.glob("*.onnx"))


def write_programs(run: Run, folder: Path) -> None:
    """Writes an ONNX file per canvas and meta.json; raises as `write_folder`."""
    import jax
    import onnx

    cpu = _cpu()
    meta = metadata(run) | {
        "versions": {name: installed.version(name) for name in ("jax", "jax2onnx", "onnx")}
    }
    # ONNX Runtime has no bfloat16 on a CPU. The parameters are float32 anyway.
    model = replace(run.network, compute_dtype="float32")
    digests = {}
    for canvas in run.config.data.canvases:
        predict = prediction(model, canvas)
        name = f"{canvas[0]}x{canvas[1]}.onnx"
        program = converted(functools.partial(predict, run.variables), canvas, name)
        onnx.helper.set_model_props(program, {METADATA: json.dumps(meta | {"canvas": canvas})})
        content = program.SerializeToString()
        with jax.default_device(cpu):
            # Weights are arguments: the compiler would take minutes to fold constants.
            detect = functools.partial(jax.jit(predict), run.variables)
            refuse_other_detections(content, detect, picture(canvas), name)
        (folder / name).write_bytes(content)
        digests[name] = hashlib.sha256(content).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta | {"programs": digests}, indent=1))


def _cpu() -> Any:
    """The device to compare on, where ONNX Runtime is too; ConfigError if jax is kept from it."""
    import jax

    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        raise ConfigError(
            "--format onnx: programs are compared on the CPU, which $JAX_PLATFORMS leaves out (add "
            ",cpu)"
        ) from None


def converted(function: Callable[..., dict[str, Any]], canvas: tuple[int, int], name: str) -> Any:
    """Converts a function of `image` and `size`, as of `prediction`, to ONNX.

    Returns:
        An onnx.ModelProto: `image` and `size` to the fields of the function's dict.

    Raises:
        ConfigError: it cannot be converted; with jax2onnx's message.
    """
    import jax
    import jax.numpy as jnp
    from jax.extend.core import jaxpr_as_fun

    from mrcnn_jax.ops.platforms import for_onnx

    fields: list[str] = []

    def flat(image: Any, size: Any) -> list[Any]:
        found = function(image, size)
        fields[:] = found
        return list(found.values())

    inputs = [
        jax.ShapeDtypeStruct((*canvas, 3), jnp.uint8),
        jax.ShapeDtypeStruct((2,), jnp.int32),
    ]
    with for_onnx():
        # jax2onnx replaces functions of jax.numpy while it traces, which our code does not survive;
        # what is traced already has none of them.
        traced = jax.make_jaxpr(flat)(*inputs)
    with quiet():
        to_onnx = _imported("jax2onnx").to_onnx
        try:
            return to_onnx(
                jaxpr_as_fun(traced),
                inputs,
                model_name=name,
                input_names=["image", "size"],
                output_names=fields,
            )
        except Exception as error:  # whatever a converter raises of a network it does not know
            raise ConfigError(
                f"--format onnx: jax2onnx {installed.version('jax2onnx')} cannot convert this "
                f"network: {_one_line(error)}"
            ) from error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def refuse_other_detections(
    content: bytes, function: Callable[..., dict[str, Any]], image: np.ndarray, name: str
) -> None:
    """Raises ConfigError unless the program runs and detects in an image what the function does."""
    import numpy as np

    from mrcnn_jax.inference.exported import onnx_program

    size = np.array(image.shape[:2], np.int32)
    try:
        theirs = onnx_program(content)(image, size)
    except Exception as error:  # of ONNX Runtime: older than the program, or without an operation
        raise ConfigError(
            f"--format onnx: {name}: ONNX Runtime does not run what jax2onnx made of this network: "
            f"{_one_line(error)}"
        ) from error
    ours = {field: np.asarray(values) for field, values in function(image, size).items()}
    objects = ours["valid"]
    for field in sorted(ours, key=lambda field: field != "valid"):
        pair = [values[field].astype(np.float64) for values in (ours, theirs)]
        # Rows without an object: a CPU leaves the heads out there. (Depths may be a whole map.)
        if field != "valid" and len(pair[0]) == len(objects):
            pair = [values[objects] for values in pair]
        difference = np.abs(pair[0] - pair[1])
        if not difference.max(initial=0) <= TOLERANCES[field]:
            raise ConfigError(
                f"--format onnx: {name}: the converted program's {field} differ from the run's by "
                f"{difference.max():.3g} on a generated picture: nothing is written"
            )


def picture(canvas: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3]: rectangles of random colours, large and small, one over the other."""
    import numpy as np

    random = np.random.default_rng(0)
    image = np.full((*canvas, 3), 128, np.uint8)
    for _ in range(30):
        top, left = (int(random.integers(0, side)) for side in canvas)
        height, width = (int(random.integers(side // 16, side // 2)) for side in canvas)
        image[top : top + height, left : left + width] = random.integers(0, 256, 3)
    return image


@contextmanager
def quiet() -> Iterator[None]:
    """Leaves out logged lines: jax2onnx tells of each package that its examples lack."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
