"""Photographs that shrink to a third: torchvision's own resizing beside `data.shrink`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from parity import real, seeded
from parity.compare import Measured, iou

pytest.importorskip("torchvision")
import torch
from parity import peers
from torchvision.models.detection import MaskRCNN

from mrcnn_jax.config.files import with_fields
from mrcnn_jax.config.schema import Shrink
from mrcnn_jax.inference.predictor import Predictor
from mrcnn_jax.pixels.transforms import resize_image
from mrcnn_jax.runs.run import load_run
from mrcnn_jax.weights.importer import import_weights

IMAGES = (7574, 109313)  # 480 x 640 and 640 x 480
SHORT, LONG = 160, 224
GREY = 0.8  # of 255: rounding, after arithmetic in fixed point
# Of random weights, which make much of a grey level.
SCORE, PARTNERS = 0.05, 0.7


@pytest.mark.parametrize("height", [160, 200, 320])
def test_pixels(height: int, data_folder: Path, measured: Measured) -> None:
    """By 3, whose centres are pixels, and between pixels."""
    for number in IMAGES:
        image = real.image(data_folder, number, 480)
        size = image.shape[0] * height // 480, image.shape[1] * height // 480
        theirs = torch.nn.functional.interpolate(
            torch.from_numpy(image).permute(2, 0, 1)[None].double(), size, mode="bilinear"
        )[0].permute(1, 2, 0)
        ours = resize_image(image, size, "bilinear")
        distance = float(np.abs(ours - theirs.numpy()).max())
        measured("shrunk pixels (grey levels)", f"to {height}", distance, GREY)
        assert np.abs(resize_image(image, size, "area") - theirs.numpy()).max() > 30


def landscape(data_folder: Path, number: int) -> np.ndarray:
    """A photograph that lies on the canvas of 160 x 224, turned if need be."""
    image = real.image(data_folder, number, 480)
    if image.shape[0] > image.shape[1]:
        image = np.ascontiguousarray(image.transpose(1, 0, 2))
    return image


@pytest.fixture(scope="module")
def networks(
    data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[MaskRCNN, Predictor]:
    """torchvision's, and the run that its state dict is imported as, of its size of images."""
    model = peers.build("v1")
    tensors = seeded.seeded_tensors(peers.shapes(model), seed=0)
    peers.load(model, tensors | seeded.unfolded_norms(real.resnet50(data_folder), 0.0, seed=0))
    folder = tmp_path_factory.mktemp("shrinking")
    torch.save(model.state_dict(), folder / "weights.pth")
    import_weights(folder / "weights.pth", folder / "run")
    model.transform.min_size, model.transform.max_size = (SHORT,), LONG
    run = load_run(folder / "run")
    data = replace(
        run.config.data,
        short_side=SHORT,
        long_side=LONG,
        canvases=((SHORT, LONG), (LONG, SHORT)),
    )
    return model, Predictor(replace(run, config=replace(run.config, data=data)))


@pytest.mark.parametrize("shrink", ["bilinear", "area"])
def test_detections(
    shrink: Shrink,
    networks: tuple[MaskRCNN, Predictor],
    data_folder: Path,
    measured: Measured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As imported, they are torchvision's but for the rounding of pixels; by means they are not."""
    model, predictor = networks
    if shrink == "area":
        changed = with_fields(predictor.run.config, {"data.shrink": shrink})
        monkeypatch.setattr(predictor, "run", replace(predictor.run, config=changed))
    assert predictor.run.config.data.shrink == shrink
    for number in IMAGES:
        image = landscape(data_folder, number)
        with torch.no_grad():
            (theirs,) = model([torch.from_numpy(image).permute(2, 0, 1) / 255])
        ours = predictor.detections(image)
        assert len(ours.scores) == len(theirs["scores"]) == 100
        overlap = iou(theirs["boxes"].numpy(), ours.boxes)
        overlap[theirs["labels"].numpy()[:, None] != ours.labels] = 0
        partner, found = overlap.argmax(1), overlap.max(1)
        apart = np.abs(theirs["scores"].numpy() - ours.scores[partner])[found > 0.5].mean()
        alone = float(1 - (found > 0.9).mean())
        if shrink == "bilinear":
            measured("shrunk: mean distance of scores", "v1 160", float(apart), SCORE)
            measured("shrunk: no partner of IoU .9", "v1 160", alone, 1 - PARTNERS)
        else:
            assert apart > 4 * SCORE
            assert alone > 0.95


@pytest.mark.parametrize("number", IMAGES)
def test_a_third_is_torchvisions(
    number: int,
    networks: tuple[MaskRCNN, Predictor],
    data_folder: Path,
    measured: Measured,
) -> None:
    """480 x 639: the centre of each pixel is that of a pixel of the file, so nothing is rounded,
    and the detections agree from the file on."""
    model, predictor = networks
    image = np.ascontiguousarray(landscape(data_folder, number)[:, :639])
    with torch.no_grad():
        (theirs,) = model([torch.from_numpy(image).permute(2, 0, 1) / 255])
    ours = predictor.detections(image)
    assert len(ours.labels) == 100
    np.testing.assert_array_equal(ours.labels, theirs["labels"])
    distance = float(np.abs(ours.scores - theirs["scores"].numpy()).max())
    measured("shrunk by 3: scores", "v1 160", distance, 1e-4)
    distance = float(np.abs(ours.boxes - theirs["boxes"].numpy()).max())
    measured("shrunk by 3: boxes (px of the file)", "v1 160", distance, 0.03)


def test_the_rest_is_rounding(
    networks: tuple[MaskRCNN, Predictor], data_folder: Path, measured: Measured
) -> None:
    """torchvision's network on the pixels that we shrank sees what ours sees."""
    model, predictor = networks
    for number in IMAGES:
        image = landscape(data_folder, number)
        height, width = size = image.shape[0] // 3, image.shape[1] // 3
        small = resize_image(image, size, predictor.run.config.data.shrink)
        with torch.no_grad():
            (theirs,) = model([torch.from_numpy(small).permute(2, 0, 1) / 255])
        scale = np.array([image.shape[1] / width, image.shape[0] / height] * 2)
        ours = predictor.detections(image)
        np.testing.assert_array_equal(ours.labels, theirs["labels"])
        distance = float(np.abs(ours.scores - theirs["scores"].numpy()).max())
        measured("shrunk: scores on the same pixels", "v1 160", distance, 1e-4)
        distance = float(np.abs(ours.boxes / scale - theirs["boxes"].numpy()).max())
        measured("shrunk: boxes on the same pixels (px)", "v1 160", distance, 0.01)
