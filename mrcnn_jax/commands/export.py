"""Export a run to one file that predicts with jax and NumPy alone.

    mrcnn export --workdir runs/a --out model.jaxexport [--checkpoint best] [--weights ema]

The file is an uncompressed zip of meta.json, the weights, one program per canvas as `jax.export`
serializes it (StableHLO for CPU, CUDA and TPU), the package mrcnn_exported, which loads and runs it
(docs/api.md), flatbuffers, which jax needs to read programs but does not install, and the model
card, README.md. An existing file is replaced once the new one is complete.
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
from typing import TYPE_CHECKING, Any

from mrcnn_jax.commands.arguments import WithCard
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.output import whole_file

if TYPE_CHECKING:
    from jax.export import Exported

    from mrcnn_jax.runs.run import Run


@dataclass(frozen=True, kw_only=True)
class Arguments(WithCard):
    out: Path
    """The new file."""


PLATFORMS = ("cpu", "cuda", "tpu")
OTHER_FORMATS = {".onnx", ".pt", ".pth", ".torchscript", ".engine", ".tflite", ".safetensors"}


def run(arguments: Arguments) -> None:
    """Writes the file; ConfigError if there is no such checkpoint, or `out` cannot be written."""
    from mrcnn_jax.commands.model_card import model_card
    from mrcnn_jax.runs.run import load_run, make_folder

    out = arguments.out
    if out.suffix.lower() in OTHER_FORMATS:
        raise ConfigError(
            f"{out}: what is written is a program for jax, not {out.suffix.lower()} (name it "
            f"{out.stem}.jaxexport)"
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

    from mrcnn_jax.inference import exported
    from mrcnn_jax.pixels import geometry
    from mrcnn_jax.runs.checkpoints import flatten
    from mrcnn_jax.structures import DEPTH_STRIDE

    data, weights = run.config.data, flatten(run.variables)
    meta = {
        "format": 1,
        "platforms": PLATFORMS,
        "categories": run.meta.categories,  # of labels 1, 2, ...
        "short_side": data.short_side,
        "long_side": data.long_side,
        "canvases": data.canvases,
        "shrink": data.shrink,
        "paste": run.config.model.mask_head.paste,
        "depth_stride": DEPTH_STRIDE,
        "weights": list(weights),  # in the order of the programs' arguments
        "checkpoint": run.meta.name,
        "jax": jax.__version__,
    }
    yield "meta.json", json.dumps(meta, indent=1)
    yield "README.md", card
    package, text = "from mrcnn_jax.pixels.geometry import", Path(exported.__file__).read_text()
    assert package in text
    yield (
        "mrcnn_exported/__init__.py",
        text.replace(package, "from mrcnn_exported.geometry import"),
    )
    yield "mrcnn_exported/geometry.py", Path(geometry.__file__).read_text()
    for source in sorted(Path(flatbuffers.__file__).parent.glob("*.py")):
        yield f"flatbuffers/{source.name}", source.read_text()
    for name, weight in weights.items():
        file = io.BytesIO()
        np.save(file, np.asarray(weight), allow_pickle=False)
        yield f"weights/{name}.npy", file.getvalue()
    for height, width in data.canvases:
        yield f"programs/{height}x{width}", bytes(program(run, (height, width)).serialize())


def program(run: Run, canvas: tuple[int, int]) -> Exported:
    """The network for images on one canvas [H, W].

    Its arguments are the weights, uint8 [H, W, 3] and int32 (height, width) of the image on the
    canvas; it returns the fields of the detections, in pixels of the canvas, and depth if the
    network has a head for it.
    """
    import jax
    import jax.numpy as jnp

    from mrcnn_jax.models.mask_rcnn import MaskRCNN, example_batch

    network = MaskRCNN(run.config.model)
    weights, structure = jax.tree.flatten(run.variables)

    def predict(weights: list[jax.Array], image: jax.Array, size: jax.Array) -> dict[str, Any]:
        batch = example_batch(canvas).replace(images=image[None], image_sizes=size[None])
        prediction: Any = network.apply(jax.tree.unflatten(structure, weights), batch)
        fields = {
            name: getattr(prediction.detections, name)
            for name in ("boxes", "labels", "scores", "valid", "masks")
        } | ({} if prediction.depth is None else {"depth": prediction.depth})
        return {name: field[0] for name, field in fields.items()}

    shapes = (
        [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in weights],
        jax.ShapeDtypeStruct((*canvas, 3), jnp.uint8),
    )
    with names_of_sources():
        return jax.export.export(jax.jit(predict), platforms=PLATFORMS)(
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
