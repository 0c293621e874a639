"""Every stage of torchvision's V1 and V2, and of a network written from mmdetection's definition,
on photographs, alone and from image to masks."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from parity import real, seeded
from parity.compare import (
    BOX,
    PROBABILITY,
    RELATIVE,
    SCORE,
    Found,
    Measured,
    Pairs,
    Rule,
    Side,
    pair,
    relative_error,
    without_reason,
)
from parity.ours import Stages, batch_of, model_config, padded, variables_of

pytest.importorskip("torchvision")
from parity import mmdet, peers  # import torch

from mrcnn_jax.models.box_head import BoxOutput
from mrcnn_jax.models.mask_head import mask_probabilities
from mrcnn_jax.models.rpn import RPNOutput, pyramid_anchors
from mrcnn_jax.ops import boxes as box_ops
from mrcnn_jax.pixels.geometry import paste
from mrcnn_jax.structures import Batch, Instances

SMALLEST = 320
# 800 is torchvision's own.
CASES = (
    *(("v1", SMALLEST), ("v2", SMALLEST), ("v2", 800)),
    *(("mmdet", SMALLEST), ("caffe", SMALLEST)),
)
LONE_SHARE = 0.01


class Ours(NamedTuple):
    """From the image on, with our own numbers only."""

    rpn: RPNOutput
    proposals: Instances
    boxes: BoxOutput
    detections: Instances


@dataclass
class Case:
    """One batch through both networks."""

    name: str
    stages: Stages
    batch: Batch
    theirs: peers.Forward

    @functools.cached_property
    def maps(self) -> dict[str, np.ndarray]:
        """Of our ResNet."""
        return self.stages("maps", self.batch)

    @functools.cached_property
    def ours(self) -> Ours:
        stages, batch = self.stages, self.batch
        pyramid = stages("pyramid", self.maps)
        rpn = stages("rpn", pyramid, batch)
        proposals = stages("proposals", rpn, batch)
        boxes = stages("boxes", pyramid, proposals)
        found = stages("detections", boxes, proposals, batch)
        masks = mask_probabilities(
            stages("masks", pyramid, found), found.labels, stages.config.mask_head
        )
        return Ours(rpn, proposals, boxes, found.replace(masks=np.asarray(masks)))

    def proposals(self) -> Instances:
        boxes, valid = padded(self.theirs.proposals, self.stages.config.rpn.proposals)
        return Instances(boxes=boxes, valid=valid)

    def box_output(self) -> BoxOutput:
        """Of the peer, for its proposals."""
        valid = self.proposals().valid
        logits, deltas = (
            np.zeros((*valid.shape, *rows.shape[1:]), np.float32)
            for rows in (self.theirs.class_logits, self.theirs.box_deltas)
        )
        logits[valid], deltas[valid] = self.theirs.class_logits, self.theirs.box_deltas
        return BoxOutput(logits=logits, deltas=deltas)

    def detections(self) -> Instances:
        boxes, valid = padded(self.theirs.boxes, self.stages.config.box_head.detections)
        return Instances(boxes=boxes, valid=valid)


@functools.lru_cache(maxsize=1)  # the cases of a version follow one another
def network(version: str, data_folder: Path) -> tuple[peers.MaskRCNN | mmdet.MaskRCNN, Stages]:
    if version in mmdet.STYLES:
        other = mmdet.MaskRCNN(mmdet.STYLES[version])
        config = model_config(version, classes=81)
        resnet = seeded.unfolded_norms(real.resnet50(data_folder), 1e-5, seed=0)
        tensors = mmdet.tensors(other, resnet)
        peers.load(other, tensors)
        return other, Stages(config, variables_of(version, config, tensors))
    model = peers.build(version)
    config = model_config(version)
    tensors = seeded.seeded_tensors(peers.shapes(model), seed=0)
    tensors |= seeded.unfolded_norms(real.resnet50(data_folder), config.resnet.norm_epsilon, seed=0)
    peers.load(model, tensors)
    return model, Stages(config, variables_of(version, config, tensors))


@pytest.fixture(scope="module", params=CASES, ids="{0[0]}-{0[1]}".format)
def case(request: pytest.FixtureRequest, data_folder: Path) -> Case:
    version, short_side = request.param
    model, stages = network(version, data_folder)
    numbers = real.IMAGES if short_side == SMALLEST else real.IMAGES[:1]
    images = [real.image(data_folder, number, short_side) for number in numbers]
    if isinstance(model, mmdet.MaskRCNN):
        theirs = mmdet.forward(model, images, most=stages.config.roi.max_sampling_ratio)
    else:
        theirs = peers.forward(model, images)
    return Case(
        f"{version} {short_side}", stages, batch_of(images, theirs.canvas.shape[1:3]), theirs
    )


def test_the_comparison_is_worth_something(case: Case) -> None:
    """Many detections of many classes, sizes and scores, with masks neither empty nor full."""
    theirs = case.theirs
    for boxes, labels, scores, masks in zip(
        theirs.boxes, theirs.labels, theirs.scores, theirs.masks, strict=True
    ):
        assert len(boxes) >= 50
        assert len(np.unique(labels)) >= 15
        sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1))
        assert np.quantile(sides, 0.9) > 2 * np.quantile(sides, 0.1)
        assert scores.max() > 0.75
        assert scores.max() - scores.min() > 0.4
        assert 0.25 < np.median((masks > 0.5).mean((1, 2))) < 0.75
    if case.name == f"v1 {SMALLEST}":
        # The canvas's width is no multiple of 64, and the anchors of P6 not 64 pixels apart.
        assert theirs.canvas.shape[2] // theirs.pyramid["p6"].shape[2] != 64


def test_canvas(case: Case, measured: Measured) -> None:
    difference = np.abs(case.stages("canvas", case.batch) - case.theirs.canvas).max()
    scale = 1 / 255 if case.name.startswith("caffe") else 1.0  # whose pixels are 0..255
    measured("canvas (absolute)", case.name, float(difference * scale), 1e-6)
    anchors = np.concatenate(
        pyramid_anchors(
            case.stages.config.rpn, case.theirs.canvas.shape[1:3], case.stages.config.strides
        )
    )
    rounded = case.name.startswith(("mmdet", "caffe"))  # sides that are no whole pixels
    np.testing.assert_allclose(anchors, case.theirs.anchors, rtol=1e-6 * rounded, atol=0)


def test_backbone(case: Case, measured: Measured) -> None:
    for name, level in case.maps.items():
        measured(name.upper(), case.name, relative_error(level, case.theirs.maps[name]), RELATIVE)
    for name, level in case.stages("pyramid", case.theirs.maps).items():
        measured(
            name.upper(), case.name, relative_error(level, case.theirs.pyramid[name]), RELATIVE
        )


def test_rpn(case: Case, measured: Measured) -> None:
    output = case.stages("rpn", case.theirs.pyramid, case.batch)
    measured(
        "RPN logits", case.name, relative_error(output.logits, case.theirs.rpn_logits), RELATIVE
    )
    measured(
        "RPN deltas", case.name, relative_error(output.deltas, case.theirs.rpn_deltas), RELATIVE
    )


def test_box_head(case: Case, measured: Measured) -> None:
    proposals = case.proposals()
    features = case.stages("features", case.theirs.pyramid, proposals, 7)[proposals.valid]
    measured(
        "RoI features of boxes",
        case.name,
        relative_error(features, case.theirs.box_features),
        RELATIVE,
    )
    output = case.stages("boxes", case.theirs.pyramid, proposals)
    measured(
        "class logits",
        case.name,
        relative_error(output.logits[proposals.valid], case.theirs.class_logits),
        RELATIVE,
    )
    measured(
        "box deltas",
        case.name,
        relative_error(output.deltas[proposals.valid], case.theirs.box_deltas),
        RELATIVE,
    )


def test_mask_head(case: Case, measured: Measured) -> None:
    found = case.detections()
    features = case.stages("features", case.theirs.pyramid, found, 14)[found.valid]
    measured(
        "RoI features of masks",
        case.name,
        relative_error(features, case.theirs.mask_features),
        RELATIVE,
    )
    logits = case.stages("masks", case.theirs.pyramid, found)[found.valid]
    measured("mask logits", case.name, relative_error(logits, case.theirs.mask_logits), RELATIVE)


def test_choices(case: Case, measured: Measured) -> None:
    """Proposals and detections made of the peer's logits and deltas."""
    theirs = case.theirs
    rpn = RPNOutput(logits=theirs.rpn_logits, deltas=theirs.rpn_deltas)
    _compare_proposals(
        case, rpn, case.stages("proposals", rpn, case.batch), "proposals (px)", measured
    )
    found = case.stages("detections", case.box_output(), case.proposals(), case.batch)
    for b, peer in enumerate(_their_detections(case)):
        ours = _image(found, b)
        pairs = pair(ours, peer)
        assert len(pairs.ours_alone) == len(pairs.theirs_alone) == 0
        measured("detections (px)", case.name, _furthest(ours.boxes, peer.boxes, pairs), BOX)


def test_from_image_to_masks(case: Case, measured: Measured) -> None:
    theirs, (rpn, proposals, output, found) = case.theirs, case.ours
    lone_proposals = _compare_proposals(
        case, rpn, proposals, "proposals (px), end to end", measured
    )
    rule = _detection_rule(case)
    lone = 0
    for b, peer in enumerate(_their_detections(case)):
        ours = _image(found, b)
        pairs = pair(ours, peer)
        lone += len(pairs.ours_alone) + len(pairs.theirs_alone)
        measured(
            "detections (px), end to end", case.name, _furthest(ours.boxes, peer.boxes, pairs), BOX
        )
        measured("scores, end to end", case.name, _furthest(ours.scores, peer.scores, pairs), SCORE)
        masks = found.masks[b][found.valid[b]]
        measured(
            "masks 28 x 28, end to end",
            case.name,
            _furthest(masks, theirs.masks[b], pairs),
            PROBABILITY,
        )
        for i, j in zip(pairs.ours, pairs.theirs, strict=True):
            _compare_pasted(
                case, masks[i], ours.boxes[i], peer.boxes[j], theirs.pasted[b][j], measured
            )
        sides = (
            _candidates(case, ours, output, proposals, b, lone_proposals[b].ours_alone),
            _candidates(
                case, peer, case.box_output(), case.proposals(), b, lone_proposals[b].theirs_alone
            ),
        )
        for side, rows in zip(sides, (pairs.ours_alone, pairs.theirs_alone), strict=True):
            for row in rows:
                kept = side.kept
                print(
                    f"{case.name}, image {b}: no partner for {kept.labels[row]},"
                    f" {kept.scores[row]:.6f}, {kept.boxes[row]}"
                )
        lines = without_reason(*sides, pairs, rule)
        assert not lines, "\n".join(lines)
    measured(
        "detections without a partner", case.name, lone / sum(map(len, theirs.boxes)), LONE_SHARE
    )


def test_the_stages_are_the_network(case: Case) -> None:
    """One compiled call gives what the stages gave one after the other."""
    if case.name != f"mmdet {SMALLEST}":
        pytest.skip("once: caffe is mmdet's network; torchvision's: test_recorded_torchvision")
    prediction = case.stages("all", case.batch)
    found, valid = case.ours.detections, case.ours.detections.valid
    np.testing.assert_array_equal(prediction.detections.valid, valid)
    np.testing.assert_array_equal(prediction.detections.labels[valid], found.labels[valid])
    np.testing.assert_allclose(prediction.detections.boxes[valid], found.boxes[valid], atol=1e-3)
    np.testing.assert_allclose(prediction.detections.scores[valid], found.scores[valid], atol=1e-5)
    np.testing.assert_allclose(prediction.detections.masks[valid], found.masks[valid], atol=1e-4)


def _image(found: Instances, b: int) -> Found:
    rows = found.valid[b]
    labels = np.zeros(rows.sum(), int) if found.labels is None else found.labels[b][rows]
    return Found(found.boxes[b][rows], found.scores[b][rows], labels)


def _their_detections(case: Case) -> list[Found]:
    theirs = case.theirs
    return [Found(*rows) for rows in zip(theirs.boxes, theirs.scores, theirs.labels, strict=True)]


def _furthest(ours: np.ndarray, theirs: np.ndarray, pairs: Pairs) -> float:
    return float(np.abs(ours[pairs.ours] - theirs[pairs.theirs]).max())


def _compare_proposals(
    case: Case, rpn: RPNOutput, proposals: Instances, what: str, measured: Measured
) -> list[Pairs]:
    """The partners among the proposals of each image; every lone one lies near a cut."""
    config, theirs = case.stages.config.rpn, case.theirs
    anchors = pyramid_anchors(config, theirs.canvas.shape[1:3], case.stages.config.strides)
    ends = np.cumsum([len(level) for level in anchors])[:-1]
    found = []

    def side(
        kept: Found, logits: np.ndarray, deltas: np.ndarray, b: int
    ) -> tuple[Side, np.ndarray]:
        """Candidates of all levels, and the score that the first one left out has, a level."""
        decoded = np.asarray(
            box_ops.clip(
                box_ops.decode(deltas, theirs.anchors, weights=config.box_weights),
                case.batch.image_sizes[b],
            )
        )
        levels, floors = [], []
        for number, (boxes, level) in enumerate(
            zip(np.split(decoded, ends), np.split(logits, ends), strict=True)
        ):
            best = np.argsort(-level)[: config.pre_nms]
            levels.append(
                Found(boxes[best], 1 / (1 + np.exp(-level[best])), np.full(len(best), number))
            )
            floors.append(levels[-1].scores[-1] if len(level) > config.pre_nms else -1.0)
        candidates = Found(
            *(
                np.concatenate(parts)
                for parts in zip(*((c.boxes, c.scores, c.labels) for c in levels), strict=True)
            )
        )
        # A proposal does not say of which level it is.
        nearest = np.abs(kept.boxes[:, None] - candidates.boxes[None]).max(-1).argmin(1)
        return Side(
            Found(kept.boxes, kept.scores, candidates.labels[nearest]), candidates
        ), np.array(floors)

    for b, (boxes, scores) in enumerate(zip(theirs.proposals, theirs.proposal_scores, strict=True)):
        ours, peer = _image(proposals, b), Found(boxes, scores, np.zeros(len(boxes), int))
        pairs = pair(ours, peer)
        measured(what, case.name, _furthest(ours.boxes, peer.boxes, pairs), BOX)
        if len(pairs.ours_alone) + len(pairs.theirs_alone):
            own, floors = side(ours, rpn.logits[b], rpn.deltas[b], b)
            other, _ = side(peer, theirs.rpn_logits[b], theirs.rpn_deltas[b], b)
            lines = without_reason(
                own, other, pairs, Rule(config.nms_iou, floors, config.proposals)
            )
            assert not lines, "\n".join(lines)
        found.append(pairs)
    lone = sum(len(pairs.ours_alone) + len(pairs.theirs_alone) for pairs in found)
    measured(
        what.replace("(px)", "without a partner"),
        case.name,
        lone / sum(map(len, theirs.proposals)),
        LONE_SHARE,
    )
    return found


def _detection_rule(case: Case) -> Rule:
    config = case.stages.config
    return Rule(
        config.box_head.nms_iou,
        np.full(config.num_classes + 1, config.box_head.score_threshold),
        config.box_head.detections,
    )


def _candidates(
    case: Case,
    kept: Found,
    output: BoxOutput,
    proposals: Instances,
    b: int,
    lone_proposals: np.ndarray,
) -> Side:
    """The candidates of one network's NMS of detections."""
    config = case.stages.config.box_head
    logits = output.logits[b].astype(float)
    scores = np.exp(logits - logits.max(1, keepdims=True))
    scores = (scores / scores.sum(1, keepdims=True))[:, 1:]
    proposal, label = np.nonzero(
        (scores > config.score_threshold - SCORE) & proposals.valid[b][:, None]
    )
    deltas, anchors = output.deltas[b][proposal, label], proposals.boxes[b][proposal]
    boxes = np.asarray(
        box_ops.clip(
            box_ops.decode(deltas, anchors, weights=config.box_weights), case.batch.image_sizes[b]
        )
    )
    return Side(
        kept, Found(boxes, scores[proposal, label], label + 1), np.isin(proposal, lone_proposals)
    )


def _compare_pasted(
    case: Case,
    mask: np.ndarray,
    box: np.ndarray,
    their_box: np.ndarray,
    pasted: np.ndarray,
    measured: Measured,
) -> None:
    """Pastes a mask; where cutting the box depends on rounding, into their box.

    mmdetection's masks fade out around the box, where they are under one half: there the objects
    are compared alone.
    """
    how = case.stages.config.mask_head.paste
    ours, theirs = (_with_border(sides, len(mask)) for sides in (box, their_box))
    if how == "exact":
        box = ours = theirs = their_box
    cut = np.trunc(ours) != np.trunc(theirs)
    if cut.any():
        box = their_box
        measured(
            "boxes cut otherwise: px from the cut",
            case.name,
            float(np.abs(theirs - np.round(theirs))[cut].max()),
            BOX,
        )
    probabilities, (y, x) = paste(mask, box, pasted.shape, how)
    placed = np.zeros_like(pasted)
    inside = np.s_[y : y + probabilities.shape[0], x : x + probabilities.shape[1]]
    placed[inside] = probabilities
    compared = inside if how == "exact" else np.s_[:]
    measured(
        "masks in the image, end to end",
        case.name,
        float(np.abs(placed - pasted)[compared].max(initial=0.0)),
        PROBABILITY,
    )
    differ = (placed > 0.5) != (pasted > 0.5)
    measured(
        "|p - 0.5| of pixels that differ",
        case.name,
        float(np.abs(pasted[differ] - 0.5).max(initial=0.0)),
        PROBABILITY,
    )


def _with_border(box: np.ndarray, cells: int) -> np.ndarray:
    """The box of a mask with a further cell around it."""
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * (cells + 2) / cells
    return np.concatenate([centre - half, centre + half])
