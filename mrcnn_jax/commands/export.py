"""Export a run to one file that predicts with jax and NumPy alone, or to ONNX.

    mrcnn export --workdir runs/a --out model.jaxexport [--checkpoint best] [--weights ema]
    mrcnn export --workdir runs/a --out model_onnx --format onnx

The file is an uncompressed zip of meta.json, the weights, one program per canvas as `jax.export`
serializes it (StableHLO for CPU, CUDA and TPU), the package mrcnn_exported, which loads and runs it
(docs/api.md), flatbuffers, which jax needs to read programs but does not install, and the model
card, README.md. An existing file is replaced once the new one is complete. ONNX is a new folder
(`commands.export_onnx`).
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mrcnn_jax.commands.arguments import WithCard
from mrcnn_jax.commands.export_contents import metadata, package, prediction
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.output import whole_file

if TYPE_CHECKING:
    from jax.export import Exported

    from mrcnn_jax.runs.run import Run


@dataclass(frozen=True, kw_only=True)
class Arguments(WithCard):
    out: Path
    """The new file, or for ONNX the new folder."""
    format: Literal["jax", "onnx"] = "jax"
    """jax: a file for jax and NumPy; onnx: a folder for ONNX Runtime and NumPy, which needs
    jax2onnx to be written."""


PLATFORMS = ("cpu", "cuda", "tpu")
OTHER_FORMATS = {".onnx", ".pt", ".pth", ".torchscript", ".engine", ".tflite", ".safetensors"}


def run(arguments: Arguments) -> None:
    """Writes the file or folder.

    Raises:
        ConfigError: there is no such checkpoint, `out` cannot be written, or for ONNX a package is
            missing or the converted program does not detect what the run does.
    """
    from mrcnn_jax.commands import export_onnx
    from mrcnn_jax.commands.model_card import model_card
    from mrcnn_jax.runs.run import load_run, make_folder, refuse_taken

    out, onnx = arguments.out, arguments.format == "onnx"
    refuse_name_of_other_format(out, onnx=onnx)
    if onnx:
        export_onnx.refuse_missing_packages()
        refuse_taken(out)
    source = load_run(arguments.workdir, arguments.checkpoint, arguments.weights)
    if (line := source.untrained_line) is not None:
        print(line)
    if out.is_dir() and not onnx:
        raise ConfigError(f"{out}: is a folder")
    make_folder(out.parent)
    card = model_card(source, arguments.workdir, weights_licence=arguments.weights_licence)
    try:
        if onnx:
            size = export_onnx.write_folder(out, source, card)
        else:
            with whole_file(out) as part:
                write(part, contents(source, card))
            size = out.stat().st_size
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror or error}") from None
    print(
        f"{out}: checkpoint {source.meta.name}, {len(source.config.data.canvases)} programs, "
        f"{size / 1e6:.1f} MB\nmodel card: "
        + (str(out / "README.md") if onnx else f"unzip -p {out} README.md")
    )


def refuse_name_of_other_format(out: Path, *, onnx: bool) -> None:
    """Raises ConfigError if the name is of a format that is not written."""
    suffix = out.suffix.lower()
    if suffix not in OTHER_FORMATS:
        return
    if onnx:
        raise ConfigError(f"{out}: what is written is a folder (name it {out.stem}_onnx)")
    name = f"name it {out.stem}.jaxexport"
    if suffix == ".onnx":
        name = f"--format onnx --out {out.stem}_onnx writes a folder of such programs"
    raise ConfigError(f"{out}: what is written is a program for jax, not {suffix} ({name})")


def write(path: Path, files: Iterable[tuple[str, bytes | str]]) -> None:
    """Writes the zip, whose comment is the digest that `inference.exported.checked` looks at."""
    from mrcnn_jax.inference.exported import DIGEST

    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files:
            # A ZipInfo has no time: the same run gives the same bytes.
            archive.writestr(zipfile.ZipInfo(name), content)
        archive.comment = b"0" * DIGEST
    with path.open("r+b") as file:
        digest, left = hashlib.sha256(), path.stat().st_size - DIGEST
        while left:
            digest.update(block := file.read(min(left, 1 << 20)))
            left -= len(block)
        file.write(digest.hexdigest().encode())


def contents(run: Run, card: str) -> Iterator[tuple[str, bytes | str]]:
    """(name, content) of the files in the zip."""
    import flatbuffers
    import jax
    import numpy as np

    from mrcnn_jax.runs.arrays import flatten

    weights = flatten(run.variables)
    meta = metadata(run) | {
        "platforms": PLATFORMS,
        "weights": list(weights),  # in the order of the programs' arguments
        "jax": jax.__version__,
    }
    yield "meta.json", json.dumps(meta, indent=1)
    yield "README.md", card
    yield from package()
    for source in sorted(Path(flatbuffers.__file__).parent.glob("*.py")):
        yield f"flatbuffers/{source.name}", source.read_text()
    for name, weight in weights.items():
        file = io.BytesIO()
        np.save(file, np.asarray(weight), allow_pickle=False)
        yield f"weights/{name}.npy", file.getvalue()
    for height, width in run.config.data.canvases:
        yield f"programs/{height}x{width}", bytes(program(run, (height, width)).serialize())


def program(run: Run, canvas: tuple[int, int]) -> Exported:
    """The network for images on one canvas [H, W], as `prediction` has its arguments."""
    import jax
    import jax.numpy as jnp

    weights, structure = jax.tree.flatten(run.variables)
    predict = prediction(run.network, canvas)

    def of_list(weights: list[jax.Array], image: jax.Array, size: jax.Array) -> dict[str, Any]:
        return predict(jax.tree.unflatten(structure, weights), image, size)

    shapes = (
        [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in weights],
        jax.ShapeDtypeStruct((*canvas, 3), jnp.uint8),
    )
    with names_of_sources():
        return jax.export.export(jax.jit(of_list), platforms=PLATFORMS)(
            *shapes, jax.ShapeDtypeStruct((2,), jnp.int32)
        )


@contextmanager
def names_of_sources() -> Iterator[None]:
    """Programs that are lowered meanwhile name the files of their source without the folders."""
    import jax

    option = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, option)
    jax.config.update(option, ".*/")
    try:
        yield
    finally:
        jax.config.update(option, before)
