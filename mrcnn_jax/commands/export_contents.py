"""What an export holds in either format: the network as a function, its metadata, its package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

    from mrcnn_jax.config.model import ModelConfig
    from mrcnn_jax.models.mask_rcnn import Variables
    from mrcnn_jax.runs.run import Run


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
        "masks": run.has_masks,
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


def prediction(model: ModelConfig, canvas: tuple[int, int]) -> Callable[..., dict[str, Any]]:
    """The network as a function of an image on one canvas [H, W].

    Its arguments are the variables, uint8 [H, W, 3] and int32 (height, width) of the image on the
    canvas; it returns the fields of the detections, in pixels of the canvas, and mask scores and
    depth if the network has heads for them.
    """
    from mrcnn_jax.models.mask_rcnn import MaskRCNN, example_batch

    network = MaskRCNN(model)

    def predict(variables: Variables, image: jax.Array, size: jax.Array) -> dict[str, Any]:
        batch = example_batch(canvas).replace(images=image[None], image_sizes=size[None])
        prediction: Any = network.apply(variables, batch)
        fields = {
            name: getattr(prediction.detections, name)
            for name in ("boxes", "labels", "scores", "valid", "masks", "mask_scores")
        } | {"depth": prediction.depth}
        return {name: field[0] for name, field in fields.items() if field is not None}

    return predict
