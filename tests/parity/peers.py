"""torchvision's Mask R-CNNs, and the results of their stages as NumPy in our conventions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models import resnet18, resnet50
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn_v2, roi_heads
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, RPNHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import FrozenBatchNorm2d

Target = dict[
    str, np.ndarray
]  # of one image: boxes float32 [N, 4], labels int64 [N], masks uint8 [N, H, W]


def build(version: str, *, depth: int = 50, classes: int = 91, **constants: Any) -> MaskRCNN:
    """Builds torchvision's "v1" or "v2" as published, with every layer trainable.

    `constants` go to its constructor; `classes` has the background among them. Only "v2" of depth
    50 has a constructor in torchvision for this; the other ones are put together from its parts, as
    that does it.
    """
    constants |= {
        "min_size": 1,
        "max_size": 100_000,
    }  # set for each batch (`_skip_resize` is for training only)
    if (version, depth) == ("v2", 50):
        return maskrcnn_resnet50_fpn_v2(
            weights=None, weights_backbone=None, num_classes=classes, **constants
        ).eval()
    body = {18: resnet18, 50: resnet50}[depth]
    if version == "v1":
        backbone = _resnet_fpn_extractor(body(norm_layer=FrozenBatchNorm2d), 5)
        model = MaskRCNN(backbone, num_classes=classes, **constants).eval()
        overwrite_eps(model, 0.0)
        return model
    norm: dict[str, Any] = {"norm_layer": nn.BatchNorm2d}
    heads = {
        "rpn_head": RPNHead(256, 3, conv_depth=2),
        "box_head": FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], **norm),
        "mask_head": MaskRCNNHeads(256, [256] * 4, 1, **norm),
    }
    return MaskRCNN(
        _resnet_fpn_extractor(body(**norm), 5, **norm), num_classes=classes, **heads, **constants
    ).eval()


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of its state dict."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def load(model: nn.Module, tensors: Mapping[str, np.ndarray]) -> None:
    model.load_state_dict(
        {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
    )


def tensors(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


@dataclass
class Forward:
    """Results of each stage for B images: lists by image, or R rows of all images in order."""

    canvas: np.ndarray  # [B, H, W, 3], normalised
    anchors: np.ndarray  # [A, 4]
    maps: dict[str, np.ndarray]  # "c2".."c5"
    pyramid: dict[str, np.ndarray]  # "p2".."p6"
    rpn_logits: np.ndarray  # [B, A]
    rpn_deltas: np.ndarray  # [B, A, 4]
    proposals: list[np.ndarray]  # [P, 4]
    proposal_scores: list[np.ndarray]  # [P]
    box_features: np.ndarray  # [R, 7, 7, C]
    class_logits: np.ndarray  # [R, K + 1]
    box_deltas: np.ndarray  # [R, K, 4]
    boxes: list[np.ndarray]  # [N, 4]
    labels: list[np.ndarray]  # [N]
    scores: list[np.ndarray]  # [N]
    mask_features: np.ndarray  # [R, 14, 14, C]
    mask_logits: np.ndarray  # [R, 28, 28, K]
    masks: list[np.ndarray]  # [N, 28, 28]
    pasted: list[np.ndarray]  # [N, height, width]


def forward(model: MaskRCNN, images: Sequence[np.ndarray]) -> Forward:
    """Runs uint8 RGB images of one short side, which are not resampled, in evaluation mode."""
    _fit_transform(model, images)
    heads = model.roi_heads
    modules = {
        "transform": model.transform,
        "body": model.backbone.body,
        "fpn": model.backbone,
        "rpn": model.rpn.head,
        "anchors": model.rpn.anchor_generator,
        "box_features": heads.box_roi_pool,
        "box": heads.box_predictor,
        "mask_features": heads.mask_roi_pool,
        "mask": heads.mask_predictor,
        "detections": heads,
    }
    seen: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        # Of the detections a copy: their masks are replaced by pasted ones.
        return lambda module, inputs, output: seen.__setitem__(
            name, copy.deepcopy(output) if module is heads else output
        )

    def filter_proposals(*arguments: Any) -> Any:
        seen["proposals"] = type(model.rpn).filter_proposals(model.rpn, *arguments)
        return seen["proposals"]

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    model.rpn.filter_proposals = filter_proposals
    try:
        with torch.no_grad():
            results = model([_pixels(image) for image in images])
    finally:
        del model.rpn.filter_proposals
        for handle in handles:
            handle.remove()

    batch = len(images)
    logits, deltas = concat_box_prediction_layers(*seen["rpn"])
    class_logits, box_deltas = seen["box"]
    detections = seen["detections"][0]
    return Forward(
        canvas=_nhwc(seen["transform"][0].tensors),
        anchors=seen["anchors"][0].numpy(),
        maps={f"c{i + 2}": _nhwc(seen["body"][str(i)]) for i in range(4)},
        pyramid={f"p{i + 2}": _nhwc(level) for i, level in enumerate(seen["fpn"].values())},
        rpn_logits=logits.reshape(batch, -1).numpy(),
        rpn_deltas=deltas.reshape(batch, -1, 4).numpy(),
        proposals=[boxes.numpy() for boxes in seen["proposals"][0]],
        proposal_scores=[scores.numpy() for scores in seen["proposals"][1]],
        box_features=_nhwc(seen["box_features"]),
        class_logits=class_logits.numpy(),
        box_deltas=box_deltas.reshape(len(box_deltas), -1, 4)[:, 1:].numpy(),
        boxes=[found["boxes"].numpy() for found in detections],
        labels=[found["labels"].numpy() for found in detections],
        scores=[found["scores"].numpy() for found in detections],
        mask_features=_nhwc(seen["mask_features"]),
        mask_logits=_nhwc(seen["mask"])[..., 1:],
        masks=[found["masks"][:, 0].numpy() for found in detections],
        pasted=[result["masks"][:, 0].numpy() for result in results],
    )


@dataclass
class Training:
    """The losses of a batch, what they were computed on, and the gradient of their sum."""

    losses: dict[str, float]  # by our names
    gradients: dict[str, np.ndarray]  # by torchvision's names
    boxes: list[np.ndarray]  # that the box head was trained on, an image: [S, 4]
    labels: list[np.ndarray]  # [S]
    deltas: list[np.ndarray]  # [S, 4]
    mask_targets: list[np.ndarray]  # of the foreground among them: [F, 28, 28]


LOSSES = {
    "loss_objectness": "rpn_objectness",
    "loss_rpn_box_reg": "rpn_box",
    "loss_classifier": "box_class",
    "loss_box_reg": "box_box",
    "loss_mask": "mask",
}


def train(model: MaskRCNN, images: Sequence[np.ndarray], targets: Sequence[Target]) -> Training:
    """Runs a backward pass on running statistics; not random if everything is sampled."""
    seen: dict[str, Any] = {}

    def select_training_samples(*arguments: Any) -> Any:
        seen["samples"] = type(model.roi_heads).select_training_samples(model.roi_heads, *arguments)
        return seen["samples"]

    model.zero_grad()
    model.roi_heads.select_training_samples = select_training_samples
    try:
        losses = _training_losses(model, images, targets)
    finally:
        del model.roi_heads.select_training_samples
    sum(losses.values()).backward()

    boxes, matched, labels, deltas = seen["samples"]
    mask_targets = []
    for target, image_boxes, index, label in zip(targets, boxes, matched, labels, strict=True):
        rows = label > 0
        masks = torch.from_numpy(target["masks"])  # soft: not thresholded again
        mask_targets.append(
            roi_heads.project_masks_on_boxes(masks, image_boxes[rows], index[rows], 28).numpy()
        )
    return Training(
        losses={LOSSES[name]: value.item() for name, value in losses.items()},
        gradients={
            name: parameter.grad.numpy()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        },
        boxes=[image.numpy() for image in boxes],
        labels=[image.numpy() for image in labels],
        deltas=[image.numpy() for image in deltas],
        mask_targets=mask_targets,
    )


def _training_losses(
    model: MaskRCNN, images: Sequence[np.ndarray], targets: Sequence[Target]
) -> dict[str, torch.Tensor]:
    """In training mode and the parameters' dtype, but with the running statistics of batch norm."""
    _fit_transform(model, images)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    dtype = model.rpn.head.cls_logits.weight.dtype
    given = [
        {"boxes": torch.from_numpy(target["boxes"]).to(dtype)}
        | {name: torch.from_numpy(target[name]) for name in ("labels", "masks")}
        for target in targets
    ]
    try:
        return model([_pixels(image).to(dtype) for image in images], given)
    finally:
        model.eval()


def _fit_transform(model: MaskRCNN, images: Sequence[np.ndarray]) -> None:
    """Makes the network's own resizing leave these images, all of one short side, as they are."""
    (short,) = {min(image.shape[:2]) for image in images}
    model.transform.min_size = (short,)


@torch.no_grad()
def settle_gates(
    model: MaskRCNN, images: Sequence[np.ndarray], targets: Sequence[Target], seed: int
) -> None:
    """Sets statistics and biases so that ReLU inputs keep their distance from 0 on this batch.

    Two float32 programs never agree on the sign of a number within rounding of 0. With weights as
    they come, some 1e-6 of the gates of each layer differ, and gradients of ResNet-50 by up to
    7e-3; those of torch with and without oneDNN by up to 4e-3. Here each channel is open or closed
    nearly everywhere: its mean lies 3 to 5 standard deviations from 0.
    """
    random = np.random.default_rng(seed)

    def distance(channels: int, always_open: bool) -> torch.Tensor:
        sign = 1.0 if always_open else random.choice([-1.0, 1.0], channels)
        return torch.from_numpy((sign * random.uniform(3.0, 5.0, channels)).astype(np.float32))

    def moments(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = y.transpose(0, 1).flatten(1)
        return y.mean(1), y.var(1)

    def norm(name: str) -> Callable[..., None]:
        # A residual block's sum is kept open, and nothing follows the norms of the pyramid.
        into_sum = (
            name.rsplit(".", 1)[-1]
            == ("bn3" if hasattr(model.backbone.body.layer1[0], "conv3") else "bn2")
            or "downsample" in name
        )

        def set_statistics(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            mean, variance = moments(inputs[0])
            module.running_mean.copy_(mean)
            module.running_var.copy_(variance)
            if not name.startswith("backbone.fpn"):
                module.bias.copy_(distance(len(mean), into_sum) * module.weight)

        return set_statistics

    def layer(gated: bool) -> Callable[..., torch.Tensor]:
        def set_bias(
            module: nn.Module, inputs: tuple[torch.Tensor], y: torch.Tensor
        ) -> torch.Tensor:
            mean, variance = moments(y)
            change = (distance(len(mean), False) * variance.sqrt() if gated else 0.0) - mean
            module.bias += change
            return y + change.reshape(1, -1, *[1] * (y.ndim - 2))

        return set_bias

    def rpn(module: nn.Module, inputs: tuple[list[torch.Tensor]]) -> None:
        levels = list(inputs[0])
        for block in module.conv:
            outputs = [block[0](level) for level in levels]
            mean, variance = moments(torch.cat([output.flatten(2) for output in outputs], dim=2))
            block[0].bias += distance(len(mean), False) * variance.sqrt() - mean
            levels = [block(level) for level in levels]

    handles = [model.rpn.head.register_forward_pre_hook(rpn)]
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            handles.append(module.register_forward_pre_hook(norm(name)))
        elif getattr(module, "bias", None) is not None and not name.startswith("rpn"):
            gated = name.startswith("roi_heads") and (
                "predictor" not in name or "conv5_mask" in name
            )
            handles.append(module.register_forward_hook(layer(gated)))
    try:
        _training_losses(model, images, targets)
    finally:
        for handle in handles:
            handle.remove()


def _pixels(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1) / 255


def _nhwc(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.numpy().transpose(0, 2, 3, 1))
