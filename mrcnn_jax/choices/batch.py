"""The batch of a config that is chosen, as many images as memory and the data set allow, and its
epochs.

What a step needs is estimated, not compiled, from figures of docs/speed.md and benchmarks/LOG.md at
800 x 1344 pixels (bytes that XLA reports). The shares that are left for what it does not report
(cuDNN's workspaces, fragments) are wide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mrcnn_jax.choices.devices import Device, Devices
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import DataConfig, OptimizerConfig
from mrcnn_jax.training.memory import GIB

LARGEST = 8  # images: at the rate of 0.02 that torchvision and detectron2 have for 16
USUAL = 16
LEAST_UPDATES = 50  # of an epoch, for a batch larger than the recipe's
SHARE = 0.8  # of the memory, for a step by its estimate

VIEWS: dict[Device, int] = {"cpu": 3000, "gpu": 6000}  # images shown, over all epochs
RANDOM_VIEWS = 15_000  # with random weights, on any device: the network is small, and learns slowly
EPOCHS: dict[Device, tuple[int, int]] = {"cpu": (4, 60), "gpu": (12, 60)}  # least and most
MOST_VIEWS: dict[Device, int] = {"cpu": 20_000, "gpu": 90_000}  # of large data sets, fewer epochs
FEW_IMAGES_UPDATES = 600  # more epochs are allowed up to so many

# ResNet-50-FPN in float32: bytes per image and pixel of the canvas. Of a GPU, 10.2 GiB at batch 16
# less 1.72 at batch 2 in bfloat16, twice (2.98 and 19.6 GiB in float32 agree); of a CPU, 4.9 GiB at
# batch 2 less what an image does not add.
PER_PIXEL: dict[Device, int] = {"gpu": 1210, "cpu": 2200}
# Of those, what the maps of ResNet-50 take, in float32: its blocks keep the outputs of their
# convolutions, 3 (64 + 64 + 256) channels at a 16th of the pixels and so on.
OF_RESNET = 4 * (20 + 72 + 48 + 36 + 9)
# Maps that a block of a ConvNeXt keeps, each as wide as the block: its input, the depthwise
# convolution's output, the norm's two, the four-fold layer before and after GELU, and its output.
OF_BLOCK = 4 * 13
# A ConvNeXt's block has 8 channels^2 weights. What training keeps of each (itself, its gradient,
# AdamW's two moments), where there are more than in a ConvNeXt-T, which FIXED has room for.
PER_WEIGHT, COUNTED = 16, 26_000_000
# Bytes whatever the batch: weights, gradients and momentum; of a CPU also the process around it.
FIXED: dict[Device, float] = {"gpu": 0.5 * GIB, "cpu": 1.4 * GIB}
# ResNet-101 keeps 17 blocks of res4 more: 1024 + 2 * 256 channels at a 256th of the pixels each.
DEEPER = 4 * 17 * (1024 + 2 * 256) / 256
# The IoU of anchors and objects, 215 MB at batch 2 and 100 objects: a byte a pixel and object.
OBJECTS = 100


@dataclass(frozen=True)
class ChosenBatch:
    """Images per step, over all devices."""

    size: int
    why: str


def choose_batch(
    optimizer: OptimizerConfig,
    source: str,
    devices: Devices,
    data: DataConfig,
    model: ModelConfig,
    images: int,
) -> ChosenBatch:
    """Chooses a batch.

    It is the recipe's, but not more images than there are, or fewer where these do not fit into
    four fifths of the memory: half as many until they do. On a GPU with SGD, whose rate follows the
    batch, it is doubled up to 8 images as long as it fits and an epoch keeps 50 updates. It is
    always a multiple of the number of devices.

    Args:
        optimizer: the recipe's; its `batch_size` is the recipe's batch.
        source: the recipe's name.
        devices: what trains.
        data: canvases and most objects of an image.
        model: the network.
        images: of an epoch, repetitions counted.
    """
    device, step, memory = devices.kind, devices.count, devices.memory
    usual = min(optimizer.batch_size, images)
    recipe = size = math.ceil(usual / step) * step
    why = f"as in {source}" if usual == optimizer.batch_size else f"all {images} images at once"
    if recipe != usual:
        why += f", made a multiple of the {step} devices"
    if memory is None:
        return ChosenBatch(size, f"{why}; the memory is not known")
    image, fixed = image_bytes(device, data, model), fixed_bytes(device, model)

    def needs(batch: int) -> float:
        return fixed + batch // step * image

    room = SHARE * memory

    def too_much(batch: int) -> str:
        needed, there = needs(batch) / GIB, memory / GIB
        return f"{batch} need about {needed:.1f} GiB, over {SHARE:.0%} of {there:.1f}"

    while needs(size) > room and size > step:
        size = max(step, size // 2 // step * step)
    if size < recipe:
        return ChosenBatch(size, too_much(recipe))
    if device == "cpu":
        return ChosenBatch(size, f"{why}; more would be no faster on a CPU")
    if optimizer.name != "sgd":
        return ChosenBatch(size, why)
    while 2 * size <= LARGEST:
        if needs(2 * size) > room:
            return ChosenBatch(size, too_much(2 * size))
        updates = math.ceil(images / (2 * size))
        if updates < LEAST_UPDATES:
            why = f"{2 * size} would leave {updates} updates an epoch, under {LEAST_UPDATES}"
            return ChosenBatch(size, why)
        size *= 2
    return ChosenBatch(size, f"the most; needs about {needs(size) / GIB:.1f} GiB")


def choose_epochs(
    device: Device, images: int, updates: float, *, pretrained: bool
) -> tuple[float, str]:
    """Chooses how often the training images are shown, and says why.

    Args:
        device: what trains.
        images: of an epoch, repetitions counted.
        updates: of an epoch.
        pretrained: whether training begins with weights that are not random.
    """
    least, most = EPOCHS[device]
    most = max(most, math.ceil(FEW_IMAGES_UPDATES / updates))
    views = VIEWS[device] if pretrained else RANDOM_VIEWS
    epochs = min(max(round(views / images), least), most)
    limit = MOST_VIEWS[device] / images
    if epochs <= limit:
        why = f"{views} images shown would be {views / images:.4g}; {least} to {most} are allowed"
        return epochs, why
    why = f"at most {MOST_VIEWS[device]} images shown"
    return math.floor(limit) if limit >= 1 else round(limit, 4), why


def rate_for(optimizer: OptimizerConfig, batch: int) -> tuple[float, str]:
    """SGD's learning rate for a batch, and why.

    It is the recipe's in proportion to the batch, but only up to 8 images: larger batches were not
    trained here, and torchvision and detectron2 have half as much for an image. So it stays until
    their 16, and from there on follows the batch as theirs does.

    Args:
        optimizer: the recipe's, with its rate for its own batch.
        batch: images per step.
    """
    rate = optimizer.learning_rate * batch / optimizer.batch_size
    if batch <= LARGEST:
        return rate, "the rate for this batch"
    most = optimizer.learning_rate * LARGEST / optimizer.batch_size
    why = f"the rate of {LARGEST} images up to {USUAL}, above in proportion (not tried here)"
    return max(most, most * batch / USUAL), why


def fixed_bytes(device: Device, model: ModelConfig) -> float:
    """Estimates the bytes of a training step that do not depend on the batch.

    `FIXED` counts one box head.
    """
    weights = 0
    if model.trunk == "convnext":
        sizes = zip(model.convnext.blocks, model.convnext.channels, strict=True)
        weights = sum(8 * n * width**2 for n, width in sizes)
    further = len(model.box_head.cascade) * _head_weights(model)
    return FIXED[device] + PER_WEIGHT * (max(0, weights - COUNTED) + further)


def _head_weights(model: ModelConfig) -> int:
    """The kernels of a further box head."""
    head, wide = model.box_head, model.fpn_channels
    weights = 0
    for _ in range(head.convs):
        weights += 9 * wide * head.conv_channels
        wide = head.conv_channels
    wide *= head.pool_size**2
    for _ in range(head.fcs):
        weights += wide * head.hidden
        wide = head.hidden
    return weights + wide * (1 + model.num_classes + 4)


def _of_further_heads(model: ModelConfig) -> int:
    """Bytes of what the further box heads of a cascade keep of an image, in float32: the features
    of each sample after each layer, and their gradient."""
    head = model.box_head
    maps = head.pool_size**2 * (model.fpn_channels + head.convs * head.conv_channels)
    return len(head.cascade) * head.samples * 2 * 4 * (maps + head.fcs * head.hidden)


def image_bytes(device: Device, data: DataConfig, model: ModelConfig) -> float:
    """Estimates the bytes that one more image adds to a training step.

    A narrow network's maps are all taken to be as wide, in proportion, as the wider of its ResNet
    and its FPN. The maps of a ConvNeXt's blocks are counted in place of those of a ResNet-50.
    """
    if model.trunk == "convnext":
        sizes = zip(model.convnext.blocks, model.convnext.channels, strict=True)
        per_pixel = model.fpn_channels / 256 * (PER_PIXEL[device] - OF_RESNET)
        per_pixel += OF_BLOCK * sum(n * width / 16 / 4**i for i, (n, width) in enumerate(sizes))
    else:
        wide = max(model.fpn_channels / 256, model.resnet.width / 64)
        per_pixel = wide * (PER_PIXEL[device] + DEEPER * (model.resnet.depth > 50))
    of_heads: float = _of_further_heads(model)
    if device == "gpu" and model.compute_dtype == "bfloat16":
        per_pixel, of_heads = per_pixel / 2, of_heads / 2
    per_pixel += max(0, data.max_objects - OBJECTS)
    return per_pixel * max(height * width for height, width in data.canvases) + of_heads
