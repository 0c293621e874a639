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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mrcnn_jax.commands.arguments import WithCard
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.output import whole_file

if TYPE_CHECKING:
    import jax
    from jax.export import Exported

    from mrcnn_jax.config.model import ModelConfig
    from mrcnn_jax.models.mask_rcnn import Variables
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
    from mrcnn_jax.commands.model_card import model_card
    from mrcnn_jax.runs.run import load_run, make_folder

    out = arguments.out
    if arguments.format == "onnx":
        from mrcnn_jax.commands import export_onnx

        export_onnx.run(arguments)
        return
    if out.suffix.lower() in OTHER_FORMATS:
        hint = f"name it {out.stem}.jaxexport"
        if out.suffix.lower() == ".onnx":
            hint += f", or add --format onnx with a folder, --out {out.stem}"
        raise ConfigError(
            f"{out}: what is written is a program for jax, not {out.suffix.lower()} ({hint})"
        )
    source = load_run(arguments.workdir, arguments.checkpoint, arguments.weights)
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder")
    make_folder(out.parent)
    card = model_card(source, arguments.workdir, weights_licence=arguments.weights_licence)
    try:
        with whole_file(out) as part:
            write(part, contents(source, card))
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror or error}") from None
    print(
        f"{out}: checkpoint {source.meta.name}, {len(source.config.data.canvases)} programs, "
        f"{out.stat().st_size / 1e6:.1f} MB\nmodel card: unzip -p {out} README.md"
    )


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

    from mrcnn_jax.runs.checkpoints import flatten

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


def metadata(run: Run) -> dict[str, Any]:
    """What of a run `inference.exported` has to know, whatever the programs are made for."""
    from mrcnn_jax.structures import DEPTH_STRIDE

    data = run.config.data
    return {
        "format": 1,
        "categories": run.meta.categories,  # of labels 1, 2, ...
        "short_side": data.short_side,
        "long_side": data.long_side,
        "canvases": data.canvases,
        "shrink": data.shrink,
        "paste": run.config.model.mask_head.paste,
        "depth_stride": DEPTH_STRIDE,
        "checkpoint": run.meta.name,
    }


def package() -> Iterator[tuple[str, str]]:
    """(name, content) of the files of the package mrcnn_exported."""
    from mrcnn_jax.inference import exported
    from mrcnn_jax.pixels import geometry

    imported, text = "from mrcnn_jax.pixels.geometry import", Path(exported.__file__).read_text()
    assert imported in text
    yield (
        "mrcnn_exported/__init__.py",
        text.replace(imported, "from mrcnn_exported.geometry import"),
    )
    yield "mrcnn_exported/geometry.py", Path(geometry.__file__).read_text()


def program(run: Run, canvas: tuple[int, int]) -> Exported:
    """The network for images on one canvas [H, W], as `prediction` has its arguments."""
    import jax
    import jax.numpy as jnp

    weights, structure = jax.tree.flatten(run.variables)
    predict = prediction(run.config.model, canvas)

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


def prediction(model: ModelConfig, canvas: tuple[int, int]) -> Callable[..., dict[str, Any]]:
    """The network as a function of an image on one canvas [H, W].

    Its arguments are the variables, uint8 [H, W, 3] and int32 (height, width) of the image on the
    canvas; it returns the fields of the detections, in pixels of the canvas, and depth if the
    network has a head for it.
    """
    from mrcnn_jax.models.mask_rcnn import MaskRCNN, example_batch

    network = MaskRCNN(model)

    def predict(variables: Variables, image: jax.Array, size: jax.Array) -> dict[str, Any]:
        batch = example_batch(canvas).replace(images=image[None], image_sizes=size[None])
        prediction: Any = network.apply(variables, batch)
        fields = {
            name: getattr(prediction.detections, name)
            for name in ("boxes", "labels", "scores", "valid", "masks")
        } | ({} if prediction.depth is None else {"depth": prediction.depth})
        return {name: field[0] for name, field in fields.items()}

    return predict


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
