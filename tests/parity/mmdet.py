"""A Mask R-CNN written from mmdetection's published definition, with its names of tensors.

Only its ResNet is torchvision's. Results are NumPy in our conventions, as those of `peers`: labels
from 1 on, the background's class logit first, RGB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from parity import seeded
from parity.peers import Forward
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.ops import batched_nms, roi_align

STRIDES = (4, 8, 16, 32, 64)
STYLES = {"mmdet": "pytorch", "caffe": "caffe"}  # by the names of cases
PIXELS = {  # 0..255: mean, standard deviation
    "pytorch": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),  # RGB
    "caffe": ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0)),  # BGR
}
SMALLEST_RATIO = 16 / 1000  # of sides, in either direction


def _conv(into: int, out: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(into, out, size, padding=size // 2)


def _convs(*channels: int, size: int) -> nn.ModuleList:
    """Convolutions to 256 channels, with the names of mmcv's ConvModule."""
    return nn.ModuleList(nn.ModuleDict({"conv": _conv(into, 256, size)}) for into in channels)


class MaskRCNN(nn.Module):
    def __init__(self, style: str, classes: int = 80) -> None:
        super().__init__()
        self.style, self.classes = style, classes
        self.backbone = resnet50()
        del self.backbone.fc
        if style == "caffe":  # strides in the first 1x1 convolution
            for layer in (self.backbone.layer2, self.backbone.layer3, self.backbone.layer4):
                layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
        self.neck = nn.ModuleDict(
            {
                "lateral_convs": _convs(256, 512, 1024, 2048, size=1),
                "fpn_convs": _convs(*[256] * 4, size=3),
            }
        )
        self.rpn_head = nn.ModuleDict(
            {
                "rpn_conv": _conv(256, 256, 3),
                "rpn_cls": _conv(256, 3, 1),
                "rpn_reg": _conv(256, 12, 1),
            }
        )
        fcs = nn.ModuleList([nn.Linear(256 * 7 * 7, 1024), nn.Linear(1024, 1024)])
        box = {"shared_fcs": fcs, "fc_cls": nn.Linear(1024, classes + 1)}
        box["fc_reg"] = nn.Linear(1024, 4 * classes)
        mask = {"convs": _convs(*[256] * 4, size=3), "upsample": nn.ConvTranspose2d(256, 256, 2, 2)}
        mask["conv_logits"] = _conv(256, classes, 1)
        self.roi_head = nn.ModuleDict(
            {"bbox_head": nn.ModuleDict(box), "mask_head": nn.ModuleDict(mask)}
        )

    def canvas(self, images: Sequence[np.ndarray]) -> Tensor:
        """Normalised images, then padded by zeros to multiples of 32."""
        mean, std = (torch.tensor(values)[:, None, None] for values in PIXELS[self.style])
        height, width = (
            -(-max(image.shape[axis] for image in images) // 32) * 32 for axis in (0, 1)
        )
        canvas = torch.zeros(len(images), 3, height, width)
        for place, image in zip(canvas, images, strict=True):
            pixels = image[..., ::-1].copy() if self.style == "caffe" else image
            normal = (torch.from_numpy(pixels).permute(2, 0, 1).float() - mean) / std
            place[:, : image.shape[0], : image.shape[1]] = normal
        return canvas

    def maps(self, x: Tensor) -> list[Tensor]:
        body = self.backbone
        x, maps = body.maxpool(body.relu(body.bn1(body.conv1(x)))), []
        for layer in (body.layer1, body.layer2, body.layer3, body.layer4):
            x = layer(x)
            maps.append(x)
        return maps

    def pyramid(self, maps: list[Tensor]) -> list[Tensor]:
        levels = [
            lateral["conv"](level)
            for lateral, level in zip(self.neck["lateral_convs"], maps, strict=True)
        ]
        for i in (3, 2, 1):
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], levels[i - 1].shape[2:])
        levels = [
            output["conv"](level)
            for output, level in zip(self.neck["fpn_convs"], levels, strict=True)
        ]
        return [*levels, F.max_pool2d(levels[-1], 1, stride=2)]

    def rpn(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, A] and deltas [B, A, 4] of a level, by row, column and ratio."""
        x = F.relu(self.rpn_head["rpn_conv"](level))
        logits = self.rpn_head["rpn_cls"](x).permute(0, 2, 3, 1)
        deltas = self.rpn_head["rpn_reg"](x).permute(0, 2, 3, 1)
        return logits.reshape(len(x), -1), deltas.reshape(len(x), -1, 4)

    def box_head(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [R, K + 1], the background's last, and deltas [R, K, 4]."""
        head, x = self.roi_head["bbox_head"], features.flatten(1)
        for layer in head["shared_fcs"]:
            x = F.relu(layer(x))
        return head["fc_cls"](x), head["fc_reg"](x).reshape(len(x), -1, 4)

    def mask_head(self, x: Tensor) -> Tensor:
        head = self.roi_head["mask_head"]
        for layer in head["convs"]:
            x = F.relu(layer["conv"](x))
        return head["conv_logits"](F.relu(head["upsample"](x)))


def anchors(level: Tensor, stride: int) -> Tensor:
    """Centred at i * stride, of area (8 * stride)^2 and height / width .5, 1, 2."""
    boxes = []
    for y in range(level.shape[2]):
        for x in range(level.shape[3]):
            for ratio in (0.5, 1.0, 2.0):
                height = 8 * stride * ratio**0.5
                width = 8 * stride / ratio**0.5
                centre = (x * stride, y * stride)
                boxes.append([centre[0] - width / 2, centre[1] - height / 2])
                boxes[-1] += [centre[0] + width / 2, centre[1] + height / 2]
    return torch.tensor(boxes)


def decode(deltas: Tensor, boxes: Tensor, deviations: tuple[float, ...], size: tuple) -> Tensor:
    """Boxes clipped to an image of size (height, width)."""
    dx, dy, dw, dh = (deltas * torch.tensor(deviations)).unbind(-1)
    most = abs(np.log(SMALLEST_RATIO))
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    x = (boxes[..., 0] + boxes[..., 2]) / 2 + dx * width
    y = (boxes[..., 1] + boxes[..., 3]) / 2 + dy * height
    width, height = width * dw.clamp(-most, most).exp(), height * dh.clamp(-most, most).exp()
    corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    limits = (size[1], size[0], size[1], size[0])
    clipped = [c.clamp(0, limit) for c, limit in zip(corners, limits, strict=True)]
    return torch.stack(clipped, -1)


def roi_features(levels: list[Tensor], boxes: Tensor, size: int, most: int) -> Tensor:
    """RoIAlign of an image's boxes, aligned and adaptive, each from its level.

    mmdetection sets no limit to the samples of a bin; `most` is ours, along an axis.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    level = torch.floor(torch.log2(sides.prod(1).sqrt() / 56 + 1e-6)).clamp(0, 3).long()
    out = torch.zeros(len(boxes), 256, size, size)
    for i in range(4):
        here = level == i
        scale = 1 / STRIDES[i]
        place = (levels[i], [boxes[here]], size, scale)
        out[here] = roi_align(*place, sampling_ratio=0, aligned=True)
    for row in torch.nonzero((sides / torch.tensor(STRIDES)[level][:, None] / size > most).any(1)):
        i = int(level[row])
        out[row] = _limited(levels[i][0], boxes[row][0] / STRIDES[i] - 0.5, size, most)
    return out


def _limited(image: Tensor, box: Tensor, size: int, most: int) -> Tensor:
    """The same of one box, in cells, with at most `most` samples of a bin along an axis."""
    axes = []
    for axis, cells in ((1, image.shape[1]), (0, image.shape[2])):  # y, x
        start, extent = float(box[axis]), float(box[axis + 2] - box[axis])
        samples = min(max(int(np.ceil(extent / size)), 1), most)
        at = start + (torch.arange(size * samples) + 0.5) * extent / (size * samples)
        inside = ((at >= -1) & (at <= cells)).float()
        at = at.clamp(0, cells - 1)
        low = at.floor().long()
        high = (low + 1).clamp(max=cells - 1)
        weights = torch.zeros(len(at), cells)
        rows = torch.arange(len(at))
        weights.index_put_((rows, low), inside * (1 - (at - low)), accumulate=True)
        weights.index_put_((rows, high), inside * (at - low), accumulate=True)
        axes.append(weights.reshape(size, samples, cells).mean(1))
    return torch.einsum("py,cyx,qx->cpq", axes[0], image, axes[1])


def paste(mask: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """Probabilities [height, width] by the mask's bilinear values at the centres of pixels."""
    x = (torch.arange(size[1]) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
    y = (torch.arange(size[0]) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
    grid = torch.stack([x[None].expand(size), y[:, None].expand(size)], -1)
    return F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]


@torch.no_grad()
def forward(model: MaskRCNN, images: Sequence[np.ndarray], most: int) -> Forward:
    """Runs uint8 RGB images; `most` as of `roi_features`."""
    model.eval()
    sizes = [image.shape[:2] for image in images]
    canvas = model.canvas(images)
    maps = model.maps(canvas)
    pyramid = model.pyramid(maps)
    of_levels = [model.rpn(level) for level in pyramid]
    grids = [anchors(*pair) for pair in zip(pyramid, STRIDES, strict=True)]
    found: dict[str, list] = {name: [] for name in Forward.__annotations__}
    for b, size in enumerate(sizes):
        levels = [level[b : b + 1] for level in pyramid]
        boxes, scores = _proposals([(x[b], y[b]) for x, y in of_levels], grids, size)
        features = roi_features(levels, boxes, 7, most)
        logits, deltas = model.box_head(features)
        kept, labels, kept_scores = _detections(logits, deltas, boxes, size)
        mask_features = roi_features(levels, kept, 14, most)
        mask_logits = model.mask_head(mask_features)
        masks = mask_logits.sigmoid()[torch.arange(len(kept)), labels]
        pasted = [paste(mask, box, size) for mask, box in zip(masks, kept, strict=True)]
        found["proposals"].append(boxes.numpy())
        found["proposal_scores"].append(scores.numpy())
        found["box_features"].append(_nhwc(features))
        found["class_logits"].append(np.roll(logits.numpy(), 1, axis=1))
        found["box_deltas"].append(deltas.numpy())
        found["boxes"].append(kept.numpy())
        found["labels"].append(labels.numpy() + 1)
        found["scores"].append(kept_scores.numpy())
        found["mask_features"].append(_nhwc(mask_features))
        found["mask_logits"].append(_nhwc(mask_logits))
        found["masks"].append(masks.numpy())
        found["pasted"].append(np.stack([image.numpy() for image in pasted]))
    rows = ("box_features", "class_logits", "box_deltas", "mask_features", "mask_logits")
    pixels = _nhwc(canvas)
    return Forward(
        **{
            **found,
            **{name: np.concatenate(found[name]) for name in rows},
            "canvas": pixels[..., ::-1] if model.style == "caffe" else pixels,
            "anchors": torch.cat(grids).numpy(),
            "maps": {f"c{i}": _nhwc(level) for i, level in enumerate(maps, 2)},
            "pyramid": {f"p{i}": _nhwc(level) for i, level in enumerate(pyramid, 2)},
            "rpn_logits": torch.cat([logits for logits, _ in of_levels], 1).numpy(),
            "rpn_deltas": torch.cat([deltas for _, deltas in of_levels], 1).numpy(),
        }
    )


def _proposals(
    of_levels: list[tuple[Tensor, Tensor]], grids: list[Tensor], size: tuple
) -> tuple[Tensor, Tensor]:
    """The best 1000 of an image after NMS in each level, of 1000 candidates of each."""
    boxes, scores, levels = [], [], []
    for i, ((logits, deltas), grid) in enumerate(zip(of_levels, grids, strict=True)):
        score, best = logits.sigmoid().sort(descending=True)
        score, best = score[:1000], best[:1000]
        decoded = decode(deltas[best], grid[best], (1.0, 1.0, 1.0, 1.0), size)
        exists = (decoded[:, 2:] - decoded[:, :2] > 0).all(1)
        boxes.append(decoded[exists])
        scores.append(score[exists])
        levels.append(torch.full_like(scores[-1], i))
    box, score = torch.cat(boxes), torch.cat(scores)
    keep = batched_nms(box, score, torch.cat(levels), 0.7)[:1000]
    return box[keep], score[keep]


def _detections(
    logits: Tensor, deltas: Tensor, proposals: Tensor, size: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, labels from 0 on and scores of an image: the best 100 after NMS in each class."""
    decoded = decode(deltas, proposals[:, None], (0.1, 0.1, 0.2, 0.2), size)
    scores = logits.softmax(1)[:, :-1]
    row, label = torch.nonzero(scores > 0.05, as_tuple=True)
    boxes, scores = decoded[row, label], scores[row, label]
    keep = batched_nms(boxes, scores, label, 0.5)[:100]
    return boxes[keep], label[keep], scores[keep]


def _nhwc(x: Tensor) -> np.ndarray:
    return x.permute(0, 2, 3, 1).contiguous().numpy()


_TORCHVISION = {
    "neck.lateral_convs.{}.conv": "backbone.fpn.inner_blocks.{}.0",
    "neck.fpn_convs.{}.conv": "backbone.fpn.layer_blocks.{}.0",
    "rpn_head.rpn_conv": "rpn.head.conv.0.0",
    "rpn_head.rpn_cls": "rpn.head.cls_logits",
    "rpn_head.rpn_reg": "rpn.head.bbox_pred",
    "roi_head.bbox_head.shared_fcs.0": "roi_heads.box_head.fc6",
    "roi_head.bbox_head.shared_fcs.1": "roi_heads.box_head.fc7",
    "roi_head.bbox_head.fc_cls": "roi_heads.box_predictor.cls_score",
    "roi_head.bbox_head.fc_reg": "roi_heads.box_predictor.bbox_pred",
    "roi_head.mask_head.convs.{}.conv": "roi_heads.mask_head.{}.0",
    "roi_head.mask_head.upsample": "roi_heads.mask_predictor.conv5_mask",
    "roi_head.mask_head.conv_logits": "roi_heads.mask_predictor.mask_fcn_logits",
}


def tensors(model: MaskRCNN, resnet: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Seeded as torchvision's layers of the same place are, with its ResNet ("backbone.body.")."""
    made: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        layer, kind = name.rsplit(".", 1)
        if layer.startswith("backbone."):
            theirs = name.replace("backbone.", "backbone.body.")
            made[name] = resnet[theirs] if theirs in resnet else tensor.numpy()
            continue
        number = next((part for part in layer.split(".") if part.isdigit()), "")
        place = _TORCHVISION.get(layer) or _TORCHVISION[layer.replace(f".{number}.", ".{}.")]
        theirs = f"{place.format(number)}.{kind}"
        made[name] = seeded.seeded_tensors({theirs: tuple(tensor.shape)}, seed=0)[theirs]
    bias = "roi_head.bbox_head.fc_cls.bias"
    made[bias] = np.roll(made[bias], -1)  # the background's, which is higher
    if model.style == "caffe":  # its pixels are as many times as large, and BGR
        stem = "backbone.conv1.weight"
        made[stem] = np.ascontiguousarray(made[stem][:, ::-1] / np.float32(57.6))
    return made
