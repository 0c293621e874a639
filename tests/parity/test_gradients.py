"""torchvision's five losses, and the gradient of their sum for every parameter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from parity import real, seeded
from parity.compare import GRADIENT, RELATIVE, Measured
from parity.ours import (
    batch_of,
    gradients_of,
    handed_over,
    losses_and_gradients,
    model_config,
    variables_of,
    with_ground_truth,
)

pytest.importorskip("torchvision")
from parity import peers  # imports torch

from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.models.mask_rcnn import MaskRCNN, Variables
from mrcnn_jax.structures import Batch
from mrcnn_jax.training.step import stage_losses

SHORT_SIDE = 256
PROPOSALS = 200
# All anchors and all proposals are samples, so that nothing is left to chance.
EVERYTHING = {
    "rpn_batch_size_per_image": 10**6,
    "box_batch_size_per_image": 10**6,
    "rpn_post_nms_top_n_train": PROPOSALS,
}


@dataclass
class Case:
    version: str
    model: peers.MaskRCNN
    images: list[np.ndarray]
    truth: list[peers.Target]
    config: ModelConfig
    variables: Variables
    batch: Batch
    theirs: peers.Training

    def by_our_paths(self, theirs: peers.Training) -> dict[str, np.ndarray]:
        return gradients_of(self.version, self.config, theirs.gradients, peers.shapes(self.model))

    def ours(self) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Losses and gradients, on the peer's samples."""
        samples = handed_over(
            self.theirs.boxes, self.theirs.labels, self.theirs.deltas, self.theirs.mask_targets
        )
        losses, gradients = losses_and_gradients(self.config, self.variables, self.batch, *samples)
        return losses, flatten_dict(gradients, sep="/")


def prepare(version: str, data_folder: Path, *, imagenet: bool) -> Case:
    """Both networks with the same weights: ImageNet's in the ResNet, or seeded and settled ones."""
    scenes = [
        real.scene(data_folder, number, SHORT_SIDE) for number in (real.IMAGES[0], real.IMAGES[2])
    ]
    images, truth = ([scene[i] for scene in scenes] for i in (0, 1))
    model = peers.build(version, **EVERYTHING)
    config = model_config(version)
    if imagenet:
        tensors = seeded.seeded_tensors(peers.shapes(model), seed=0)
        peers.load(
            model,
            tensors
            | seeded.unfolded_norms(real.resnet50(data_folder), config.resnet.norm_epsilon, seed=0),
        )
    else:
        peers.load(
            model, seeded.seeded_tensors(peers.shapes(model), seed=0, gains=seeded.TRAINING_GAINS)
        )
        peers.settle_gates(model, images, truth, seed=0)
    theirs = peers.train(model, images, truth)
    canvas = tuple(-(-max(image.shape[axis] for image in images) // 32) * 32 for axis in (0, 1))
    batch = with_ground_truth(batch_of(images, canvas), truth)
    return Case(
        version,
        model,
        images,
        truth,
        config,
        variables_of(version, config, peers.tensors(model)),
        batch,
        theirs,
    )


@pytest.fixture(scope="module", params=["v1", "v2"])
def case(request: pytest.FixtureRequest, data_folder: Path) -> Case:
    return prepare(request.param, data_folder, imagenet=False)


def test_losses_and_gradients(case: Case, measured: Measured) -> None:
    ours, gradients = case.ours()
    assert ours.keys() == case.theirs.losses.keys()
    for name, loss in case.theirs.losses.items():
        measured(f"loss {name}", case.version, abs(ours[name] - loss) / loss, RELATIVE)
    theirs = case.by_our_paths(case.theirs)
    # All parameters have one, but for the norms of V1's ResNet, which are no parameters there.
    without = {path for path in gradients if path not in theirs}
    assert without == {
        path
        for path in gradients
        if case.version == "v1" and path.startswith("resnet/") and not path.endswith("kernel")
    }
    for path, gradient in theirs.items():
        top = path.split("/")[0]
        measured(f"gradient, {top}", case.version, _distance(gradients[path], gradient), GRADIENT)


def test_own_samples(case: Case, measured: Measured) -> None:
    """Ours from end to end: proposals, labels and targets too.

    Mask targets differ on purpose: binary here, soft there."""
    count = PROPOSALS + case.batch.ground_truth.valid.shape[1]
    config = replace(
        case.config,
        rpn=replace(
            case.config.rpn, samples=10**5, positive_fraction=1.0, train_proposals=PROPOSALS
        ),
        box_head=replace(case.config.box_head, samples=count, positive_fraction=1.0),
    )

    def losses(model: MaskRCNN, batch: Batch) -> dict[str, jax.Array]:
        return stage_losses(model, batch, jax.random.key(0), ("rpn", "box", "mask"), ())[0]

    ours = jax.jit(nn.apply(losses, MaskRCNN(config)))(case.variables, case.batch)
    for name, loss in case.theirs.losses.items():
        bound = 0.05 if name == "mask" else RELATIVE
        measured(
            f"loss {name}, own samples", case.version, abs(float(ours[name]) - loss) / loss, bound
        )


def test_imagenet_weights(data_folder: Path, measured: Measured) -> None:
    """Where gates depend on rounding, our gradient is as near to float64's as torch's is."""
    version = "v2"  # the deeper one
    case = prepare(version, data_folder, imagenet=True)
    ours, gradients = case.ours()
    for name, loss in case.theirs.losses.items():
        measured(f"loss {name}, ImageNet weights", version, abs(ours[name] - loss) / loss, RELATIVE)
    case.model.double()
    exact = case.by_our_paths(peers.train(case.model, case.images, case.truth))
    theirs = case.by_our_paths(case.theirs)
    our_distance = [_distance(gradients[path], gradient) for path, gradient in exact.items()]
    their_distance = [_distance(theirs[path], gradient) for path, gradient in exact.items()]
    measured("gradient, torch from float64", version, max(their_distance), 0.05)
    measured("gradient, ours from float64", version, max(our_distance), 2 * max(their_distance))
    measured(
        "its median over all tensors",
        version,
        float(np.median(our_distance)),
        2 * float(np.median(their_distance)),
    )


def _distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
