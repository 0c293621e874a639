"""torchvision's side of benchmarks/equal_minutes.py: its own recipe on images that it reads itself.

The recipe is that of torchvision's references/detection/train.py for maskrcnn_resnet50_fpn, scaled
to batches of two. Epochs are replaced by shares of a budget of process time, since that is what
ends the training.
"""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peer_training import results_of, write_evaluation
from pycocotools import mask as coco_mask

from mrcnn_jax.cli import Failure
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import Config, DataConfig
from mrcnn_jax.data.records import CocoDataset, ImageRecord
from mrcnn_jax.pixels.decode import decode_image

BATCH = 2
RATE = 0.02 * BATCH / 16
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4
WARMUP, FIRST = 1000, 1e-3  # steps at most, and the factor on the rate of the first of them
MILESTONES = (16 / 26, 22 / 26)  # epochs of the reference, as shares
FLIP = 0.5
ASPECT_GROUPS = 3  # for each factor of two
THREADS = 2


@dataclass(frozen=True)
class Example:
    """An image and its objects, without crowds, in pixels of the file."""

    image: np.ndarray
    """uint8 [H, W, 3]"""
    boxes: np.ndarray
    """float32 [N, 4]: (x1, y1, x2, y2)"""
    labels: np.ndarray
    """int64 [N], from 1"""
    masks: np.ndarray
    """uint8 [N, H, W]"""


def learning_rate(step: int, share: float, epoch_steps: int) -> float:
    """Returns the rate of a step.

    Args:
        step: steps before it.
        share: of the budget that is spent, in [0, 1).
        epoch_steps: steps in an epoch; the warm-up ends one step before its end.
    """
    warmup = min(WARMUP, epoch_steps - 1)
    factor = FIRST + (1 - FIRST) * step / warmup if step < warmup else 1.0
    return RATE * factor * 0.1 ** sum(share >= milestone for milestone in MILESTONES)


def aspect_groups(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Returns the number of each (height, width)'s group of aspect ratios, as the reference's."""
    bins = sorted(2 ** np.linspace(-1, 1, 2 * ASPECT_GROUPS + 1))
    return [bisect_right(bins, width / height) for height, width in sizes]


def epoch_batches(groups: Sequence[int], rng: np.random.Generator) -> list[list[int]]:
    """Returns the batches of an epoch, each of one group, as the reference's GroupedBatchSampler.

    There are as many as fit into the number of images. Where groups do not divide by BATCH, some
    images come twice and some not at all.
    """
    batches: list[list[int]] = []
    waiting: dict[int, list[int]] = defaultdict(list)
    seen: dict[int, list[int]] = defaultdict(list)
    for index in rng.permutation(len(groups)).tolist():
        group = groups[index]
        waiting[group].append(index)
        seen[group].append(index)
        if len(waiting[group]) == BATCH:
            batches.append(waiting.pop(group))
    for group in sorted(waiting, key=lambda group: -len(waiting[group])):
        if len(batches) == len(groups) // BATCH:
            break
        repeated = seen[group] * BATCH
        batches.append([*waiting[group], *repeated][:BATCH])
    return batches


def endless_batches(groups: Sequence[int], seed: int) -> Iterator[list[int]]:
    """Yields the batches of one epoch after the other."""
    rng = np.random.default_rng(seed)
    while True:
        yield from epoch_batches(groups, rng)


def trained_images(dataset: CocoDataset) -> list[ImageRecord]:
    """Returns the images with objects other than crowds.

    Raises:
        ConfigError: an object has no mask, without which torchvision does not train.
    """
    for image in dataset.images:
        for record in image.objects:
            if record.rle is None:
                raise ConfigError(
                    f"{dataset.annotations_path}: annotation {record.annotation_id}: has no mask, "
                    "which torchvision needs"
                )
    return [i for i in dataset.images if i.objects]


def read_example(image: ImageRecord, folder: Path, data: DataConfig) -> Example:
    """Reads an image file and decodes the masks of its objects."""
    encoded = (folder / image.file_name).read_bytes()
    objects = image.objects
    masks = coco_mask.decode([record.rle for record in objects])
    return Example(
        decode_image(encoded, upright=image.upright, max_pixels=data.max_pixels),
        np.array([record.box for record in objects], np.float32),
        np.array([record.label for record in objects], np.int64),
        np.ascontiguousarray(masks.transpose(2, 0, 1)),
    )


def mirrored(example: Example) -> Example:
    """Returns the example flipped, left to right."""
    boxes, width = example.boxes, example.image.shape[1]
    boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    image, masks = (
        np.ascontiguousarray(pixels)
        for pixels in (example.image[:, ::-1], example.masks[:, :, ::-1])
    )
    return Example(image, boxes, example.labels, masks)


# -- with torch ------------------------------------------------------------------------------------


def build(weights: Path, *, classes: int, data: DataConfig) -> Any:
    """Returns maskrcnn_resnet50_fpn as its constructor makes it of ImageNet weights.

    Its heads are random, its batch norms and the layers before layer2 frozen. It resizes images to
    our sides. Everything else is its default.

    Args:
        weights: a file with a ResNet-50 under torchvision's names.
        classes: without the background.
        data: gives the sides.

    Raises:
        ConfigError: the file has other tensors.
    """
    import torch
    from torchvision.models import resnet50
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.ops import FrozenBatchNorm2d

    from mrcnn_jax.weights.tensors import read_tensors

    body, tensors = resnet50(norm_layer=FrozenBatchNorm2d), read_tensors(weights).tensors
    needed = {
        name: tuple(tensor.shape)
        for name, tensor in body.state_dict().items()
        if not name.startswith("fc.")
    }
    wrong = [name for name in needed if np.shape(tensors.get(name)) != needed[name]]
    if wrong:
        raise ConfigError(f"{weights}: is not torchvision's ResNet-50: {wrong[0]} differs")
    body.load_state_dict(
        {name: torch.from_numpy(np.array(tensors[name], np.float32)) for name in needed},
        strict=False,
    )
    model = MaskRCNN(
        _resnet_fpn_extractor(body, 3),
        num_classes=classes + 1,
        min_size=data.short_side,
        max_size=data.long_side,
    )
    # On a CPU the faster form; the numbers are the same.
    model.to(memory_format=torch.channels_last)
    model.backbone.register_forward_pre_hook(
        lambda _, inputs: inputs[0].contiguous(memory_format=torch.channels_last)
    )
    return model


def image_tensor(pixels: np.ndarray) -> Any:
    """Returns a uint8 [H, W, 3] image as torchvision takes it: float32 [3, H, W] in [0, 1]."""
    import torch

    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255


def as_tensors(example: Example) -> tuple[Any, dict[str, Any]]:
    """Returns torchvision's (image, target)."""
    import torch

    return image_tensor(example.image), {
        name: torch.from_numpy(getattr(example, name)) for name in ("boxes", "labels", "masks")
    }


def run(
    config: Config, folder: Path, *, weights: Path, seed: int, budget: float, cache: Path
) -> dict[str, Any]:
    """Trains until this process has used `budget` seconds of process time, then evaluates.

    Args:
        config: of our run: its images and sides.
        folder: of this run, made if need be; gets losses.jsonl and what `write_evaluation` writes.
        weights: of the ResNet.
        seed: of heads, order and flips.
        budget: seconds of all threads, counted from the start of the process.
        cache: where our run keeps its checked validation images.

    Returns:
        "steps", and, up to the end of training, "process_seconds" of the process and "seconds" by
        the clock from this call on.
    """
    from mrcnn_jax.data.reading import read_coco

    started, data = time.perf_counter(), config.data
    train_set, val_set = (
        read_coco(
            Path(getattr(data, f"{name}_annotations")), Path(getattr(data, f"{name}_images")), data
        )
        for name in ("train", "val")
    )
    folder.mkdir(parents=True, exist_ok=True)
    model, steps = train(train_set, data, folder, weights=weights, seed=seed, budget=budget)
    done = {
        "steps": steps,
        "process_seconds": time.process_time(),
        "seconds": time.perf_counter() - started,
    }
    evaluate(model, train_set, val_set, data, folder, cache)
    return done


def train(
    dataset: CocoDataset, data: DataConfig, folder: Path, *, weights: Path, seed: int, budget: float
) -> tuple[Any, int]:
    """Trains until the budget of process time is spent; the model, and the number of steps."""
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(seed)
    images = trained_images(dataset)
    model = build(weights, classes=len(dataset.categories), data=data).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    batches = endless_batches(aspect_groups([(i.height, i.width) for i in images]), seed)
    flips = np.random.default_rng((seed, 1))

    def read() -> list[tuple[Any, dict[str, Any]]]:
        examples = [read_example(images[i], dataset.images_dir, data) for i in next(batches)]
        return [as_tensors(mirrored(e) if flips.random() < FLIP else e) for e in examples]

    step, started = 0, time.process_time()
    with ThreadPoolExecutor(1) as reader, (folder / "losses.jsonl").open("w") as log:
        ahead = reader.submit(read)
        while (now := time.process_time()) < budget:
            share = (now - started) / (budget - started)
            rate = learning_rate(step, share, max(1, len(images) // BATCH))
            loaded, ahead = ahead.result(), reader.submit(read)
            losses = model(*map(list, zip(*loaded, strict=True)))
            total = sum(losses.values())
            if not math.isfinite(total.item()):
                raise Failure(f"{folder}: torchvision's loss is not finite at step {step + 1}")
            optimizer.zero_grad()
            total.backward()
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            step += 1
            row = {"step": step, "learning_rate": rate, "share": round(share, 4)}
            row |= {name: round(value.item(), 5) for name, value in losses.items()}
            log.write(json.dumps(row) + "\n")
            log.flush()
    return model, step


def evaluate(
    model: Any,
    train_set: CocoDataset,
    val_set: CocoDataset,
    data: DataConfig,
    folder: Path,
    cache: Path,
) -> None:
    """Evaluates on the images that our evaluation takes, one at a time."""
    import torch

    from mrcnn_jax.data.loader import open_split

    categories = [(category.id, category.name) for category in train_set.categories]
    val_set = val_set.matched_to(categories, "the training images")
    split = open_split("val", val_set, cache=cache, data=data)
    model.eval()
    results: list[dict[str, Any]] = []
    for image in split.dataset.images:
        encoded = (split.dataset.images_dir / image.file_name).read_bytes()
        pixels = decode_image(encoded, upright=image.upright, max_pixels=data.max_pixels)
        with torch.no_grad():
            (found,) = model([image_tensor(pixels)])
        arrays = {name: values.numpy() for name, values in found.items()}
        arrays["masks"] = arrays["masks"][:, 0] > 0.5
        results += results_of(image.id, [number for number, _ in categories], **arrays)
    write_evaluation(folder, split.dataset.to_coco(), results)
