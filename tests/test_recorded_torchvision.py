"""torchvision's own numbers, recorded (parity/record.py): the whole of V1 and V2, forward and
backward, on a machine without torch."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from parity import recorded, seeded
from parity.compare import GRADIENT, PROBABILITY, RELATIVE, Found, pair, sketch
from parity.ours import (
    batch_of,
    everything,
    handed_over,
    losses_and_gradients,
    model_config,
    padded,
    variables_of,
    with_ground_truth,
)

from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.structures import Batch, Instances

CANVAS = recorded.SIZES[0]


@pytest.fixture(scope="module", params=["v1", "v2"])
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def numbers(version: str) -> dict[str, np.ndarray]:
    with np.load(recorded.file(version)) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def config(version: str) -> ModelConfig:
    config = model_config(version, depth=recorded.DEPTH, classes=recorded.CLASSES)
    rpn = replace(config.rpn, proposals=recorded.PROPOSALS["test"])
    return replace(
        config, rpn=rpn, box_head=replace(config.box_head, detections=recorded.DETECTIONS)
    )


@pytest.fixture(scope="module")
def batch() -> Batch:
    images, truth = recorded.scenes()
    return with_ground_truth(batch_of(images, CANVAS), truth)


def test_forward(
    version: str, numbers: dict[str, np.ndarray], config: ModelConfig, batch: Batch
) -> None:
    variables = variables_of(
        version, config, seeded.seeded_tensors(recorded.shapes(numbers), recorded.SEED)
    )
    images = range(len(recorded.SIZES))
    proposals, detections = (
        Instances(boxes=boxes, valid=valid)
        for boxes, valid in (
            padded([numbers[f"proposals/{b}"] for b in images], config.rpn.proposals),
            padded([numbers[f"boxes/{b}"] for b in images], config.box_head.detections),
        )
    )
    ours = everything(config, variables, batch, proposals, detections)
    stages = {
        **ours.maps,
        **ours.pyramid,
        "rpn_logits": ours.rpn.logits,
        "rpn_deltas": ours.rpn.deltas,
        "class_logits": ours.boxes.logits[proposals.valid],
        "box_deltas": ours.boxes.deltas[proposals.valid],
        "mask_logits": ours.masks[detections.valid],
    }
    for name, values in stages.items():
        difference = np.abs(recorded.samples(values) - numbers[f"stage/{name}"]).max()
        assert difference <= RELATIVE * numbers[f"largest/{name}"], name

    for b in images:
        own, theirs = (
            ours.prediction.proposals.boxes[b][ours.prediction.proposals.valid[b]],
            numbers[f"proposals/{b}"],
        )
        pairs = pair(
            *(Found(boxes, np.zeros(len(boxes)), np.zeros(len(boxes))) for boxes in (own, theirs))
        )
        assert len(pairs.ours) >= 0.99 * len(theirs) == 0.99 * config.rpn.proposals
        found = jax.tree.map(
            lambda rows, b=b: rows[b][ours.prediction.detections.valid[b]],
            ours.prediction.detections,
        )
        theirs = Found(numbers[f"boxes/{b}"], numbers[f"scores/{b}"], numbers[f"labels/{b}"])
        pairs = pair(Found(found.boxes, found.scores, found.labels), theirs)
        assert len(theirs.boxes) >= 15
        assert len(pairs.ours_alone) == len(pairs.theirs_alone) == 0
        partner = pairs.ours[np.argsort(pairs.theirs)][: recorded.MASKS]
        assert (
            np.abs(found.masks[partner] - recorded.probabilities(numbers[f"masks/{b}"])).max()
            <= PROBABILITY
        )


def test_losses_and_gradients(
    version: str, numbers: dict[str, np.ndarray], config: ModelConfig, batch: Batch
) -> None:
    variables = variables_of(
        version, config, recorded.training_tensors(recorded.shapes(numbers), numbers["settled"])
    )
    boxes, labels, deltas, targets = (
        [numbers[f"{name}/{b}"] for b in range(len(recorded.SIZES))]
        for name in ("sample_boxes", "sample_labels", "sample_deltas", "mask_targets")
    )
    samples = handed_over(
        boxes, labels, deltas, [recorded.probabilities(target) for target in targets]
    )
    losses, gradients = losses_and_gradients(config, variables, batch, *samples)
    for name, loss in zip(numbers["loss_names"], numbers["losses"], strict=True):
        assert abs(losses[name] - loss) <= RELATIVE * loss, name
    ours = flatten_dict(gradients, sep="/")
    recorded_gradients = zip(
        numbers["gradient_paths"],
        numbers["gradient_norms"],
        numbers["gradient_sketches"],
        strict=True,
    )
    for path, norm, theirs in recorded_gradients:
        assert np.linalg.norm(sketch(path, ours.pop(path)) - theirs) <= GRADIENT * norm, path
    # What is left torchvision does not train.
    assert all(
        version == "v1" and path.startswith("resnet/") and path.endswith(("scale", "bias"))
        for path in ours
    )
