"""Export a run to one file that predicts with jax and NumPy alone.

    python -m mrcnn_jax.commands.export --workdir runs/a --out model.jaxexport [--checkpoint best] [--weights
    ema] [--weights-licence "CC BY-NC 4.0"]

The file is a zip (stored, not compressed): meta.json, the weights, a program a canvas as
`jax.export` serializes it (StableHLO for CPU, CUDA and TPU), mrcnn_exported.py, which loads and
runs it (docs/api.md), flatbuffers, which jax reads programs with and does not bring itself, and the
model card, README.md. A file that is there already is replaced, when the new one is whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.output import whole_file

if TYPE_CHECKING:
    from jax.export import Exported

    from mrcnn_jax.runs.run import Run

PLATFORMS = ("cpu", "cuda", "tpu")


@dataclass(frozen=True)
class Arguments:
    workdir: Path
    """The run's folder."""
    out: Path
    """The file that is written."""
    checkpoint: Literal["newest", "best"] = "newest"
    """best: the one of the highest mask AP, of a run with --evaluate-every-epochs."""
    weights: Literal["raw", "ema"] = "raw"
    """ema: their moving average, of a run with ema_decay."""
    weights_licence: str | None = None
    """Of the weights that the run started from, for the card; without it the card says that it is
    not stated."""


def export_run(arguments: Arguments) -> None:
    """ConfigError if there is no such checkpoint, or `out` cannot be written."""
    import json
    import zipfile

    import flatbuffers
    import jax
    import numpy as np

    from mrcnn_jax.commands.model_card import model_card
    from mrcnn_jax.inference import exported
    from mrcnn_jax.pixels import geometry
    from mrcnn_jax.runs.checkpoints import flatten
    from mrcnn_jax.runs.run import load_run, make_folder

    out = arguments.out
    run = load_run(arguments.workdir, arguments.checkpoint, arguments.weights)
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder")
    make_folder(out.parent)
    data, weights = run.config.data, flatten(run.variables)
    meta = {
        "format": 1,
        "platforms": PLATFORMS,
        "categories": run.meta.categories,  # of labels 1, 2, ...
        "short_side": data.short_side,
        "long_side": data.long_side,
        "canvases": data.canvases,
        "paste": run.config.model.mask_head.paste,
        "weights": list(weights),  # in the order of the programs' arguments
        "checkpoint": run.meta.name,
        "jax": jax.__version__,
    }
    try:
        with whole_file(out) as part, zipfile.ZipFile(part, "w") as archive:

            def add(name: str, content: bytes | str) -> None:
                archive.writestr(
                    zipfile.ZipInfo(name), content
                )  # without the time: the same run gives the same bytes

            add("meta.json", json.dumps(meta, indent=1))
            add(
                "README.md",
                model_card(run, arguments.workdir, weights_licence=arguments.weights_licence),
            )
            source_text = Path(exported.__file__).read_text()
            package = "from mrcnn_jax.pixels.geometry import"
            assert package in source_text
            add(
                "mrcnn_exported/__init__.py",
                source_text.replace(package, "from mrcnn_exported.geometry import"),
            )
            add("mrcnn_exported/geometry.py", Path(geometry.__file__).read_text())
            for source in sorted(Path(flatbuffers.__file__).parent.glob("*.py")):
                add(f"flatbuffers/{source.name}", source.read_text())
            for name, weight in weights.items():
                with archive.open(
                    zipfile.ZipInfo(f"weights/{name}.npy"), "w", force_zip64=True
                ) as file:
                    np.lib.format.write_array(file, np.asarray(weight), allow_pickle=False)
            for height, width in data.canvases:
                add(f"programs/{height}x{width}", bytes(program(run, (height, width)).serialize()))
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror or error}") from None
    print(
        f"{out}: checkpoint {run.meta.name}, {len(data.canvases)} programs, {out.stat().st_size / 1e6:.1f} MB"
    )
    print(f"model card: unzip -p {out} README.md")


def program(run: Run, canvas: tuple[int, int]) -> Exported:
    """(weights, uint8 [H, W, 3], int32 (height, width) of the image on it) -> the fields of its
    detections, in pixels of the canvas."""
    import jax
    import jax.numpy as jnp

    from mrcnn_jax.models.mask_rcnn import MaskRCNN, example_batch

    network = MaskRCNN(run.config.model)
    weights, structure = jax.tree.flatten(run.variables)

    def predict(weights: list[jax.Array], image: jax.Array, size: jax.Array) -> dict[str, Any]:
        batch = example_batch(canvas).replace(images=image[None], image_sizes=size[None])
        prediction: Any = network.apply(jax.tree.unflatten(structure, weights), batch)
        return {
            name: getattr(prediction.detections, name)[0]
            for name in ("boxes", "labels", "scores", "valid", "masks")
        }

    shapes = (
        [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in weights],
        jax.ShapeDtypeStruct((*canvas, 3), jnp.uint8),
    )
    return jax.export.export(jax.jit(predict), platforms=PLATFORMS)(
        *shapes, jax.ShapeDtypeStruct((2,), jnp.int32)
    )


def main() -> None:
    export_run(tyro.cli(Arguments, prog=cli.program(), description=__doc__))


if __name__ == "__main__":
    cli.run(main)
