"""Options of a run: data, stages, devices and, in `Config`, all of them together.

Frozen, typed, validated dataclasses; a field's docstring is its help. A config file (configs/*.py)
defines `get_config() -> Config`, and any field can be overridden on the command line.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, field
from typing import Literal

from mrcnn_jax.config.errors import (
    ConfigError,
    require,
    require_at_least,
    require_positive,
    require_weight,
)
from mrcnn_jax.config.model import ModelConfig

RUNTIME = {"runtime": True}  # metadata of the fields that may differ when a run is resumed


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of training images, drawn anew each time one is used; by default none."""

    flip: float = 0.0
    """Probability that an image is mirrored, left to right."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Range of a uniform factor on the image's scale (see data.short_side). An image that outgrows
    its canvas is cropped at random. (0.1, 2.0) is large-scale jitter (Ghiasi et al. 2021)."""
    brightness: float = 0.0
    """Colours are multiplied by a uniform factor in 1 - x..1 + x."""
    contrast: float = 0.0
    """The same for their distance from the mean grey of the image."""
    saturation: float = 0.0
    """The same for their distance from the grey of the pixel."""
    hue: float = 0.0
    """Hues are turned by a uniform angle in -x..x, as a share of the colour circle."""
    copy_paste: float = 0.0
    """Probability that objects of another training image are pasted in (Ghiasi et al. 2021). That
    image is flipped and scaled independently; each object with a mask is taken with chance 0.5."""
    depth_follows_scale: bool = False
    """Divide metres by the factor that `scale` drew: an object that looks twice as large counts as
    half as far away, as one camera would see it. Off: depth maps keep their metres."""

    def __post_init__(self) -> None:
        for name in ("flip", "brightness", "contrast", "saturation", "hue", "copy_paste"):
            most = 0.5 if name == "hue" else 1.0
            require(
                0 <= getattr(self, name) <= most, f"data.augment.{name}: must be in 0..{most:g}"
            )
        require(
            0 < self.scale[0] <= self.scale[1] <= 4,
            "data.augment.scale: must be (low, high) with 0 < low <= high <= 4",
        )


Shrink = Literal["area", "bilinear"]


@dataclass(frozen=True)
class DataConfig:
    """The data set, and how its images are put on canvases of a few fixed sizes."""

    folder: str = ""
    """Name of the data set's folder under $MRCNN_DATA; used if `root` is not given."""
    root: str | None = field(default=None, metadata=RUNTIME)
    """Folder of the data set: relative names of its files and folders are relative to it."""
    train_annotations: str = "annotations/instances_train.json"
    """COCO file of the training images."""
    train_images: str = "images"
    """Folder of the training images."""
    val_annotations: str = "annotations/instances_val.json"
    """COCO file of the validation images."""
    val_images: str = "images"
    """Folder of the validation images."""
    train_depth: str | None = None
    """Folder with the depth maps of the training images: the image's name with .png or .npy for its
    suffix. None: each image's "depth_file" in the COCO file names its map, relative to the folder
    of the images. Maps are read for a network with a depth head (model.depth_head)."""
    val_depth: str | None = None
    """The same for the validation images."""
    depth_scale: float = 1000.0
    """Value of a depth map's 16-bit PNG for a metre: 1000 for millimetres, 8000 for SUN RGB-D, 256
    for KITTI. Files .npy hold metres."""
    depth_range: tuple[float, float] = (0.02, 100.0)
    """Least and largest depth in metres; what is nearer or farther is unknown, like 0, negative
    values, NaN and infinity."""
    cache: str | None = field(default=None, metadata=RUNTIME)
    """Folder for the prepared data sets; None: <workdir>/data."""
    short_side: int = 800
    """An image is resized until its short side is this, or its long side is `long_side`, whichever
    comes first (pixels)."""
    long_side: int = 1088
    """Most pixels of the long side after resizing."""
    shrink: Shrink = "area"
    """How images are made smaller. area: a pixel is the mean of those that it replaces; bilinear:
    it is interpolated between the four nearest, and the others are not looked at (aliasing), as
    torchvision's detectors are trained. Images are made larger bilinearly with either."""
    canvases: tuple[tuple[int, int], ...] = ((800, 1088), (1088, 800))
    """(height, width) of the canvases, multiples of 32. An image goes onto the smallest that holds
    it; each is compiled for once. Where `train` is given other sides, but no canvases, it chooses
    them: lying and upright, sides rounded up."""
    max_objects: int = 100
    """Most ground-truth boxes per image; further ones are left out, counted and reported."""
    max_ignored: int = 20
    """Most crowd regions per image."""
    mask_crop: int = 112
    """Resolution of ground-truth masks: each is stored as mask_crop x mask_crop cells of its
    box."""
    keep_empty: bool = True
    """Train on images without objects as well (they are negatives)."""
    repeat_threshold: float = 0.0
    """Show images of rare classes more often (Gupta et al. 2019; 0.001 for LVIS): max(1, sqrt(
    threshold / share)) times per epoch, where share is that of the images with the rarest class in
    it. 0: each once."""
    augment: AugmentConfig = AugmentConfig()
    class_names: tuple[str, ...] = field(default=(), metadata=RUNTIME)
    """Names that the annotation files must have for labels 1, 2, ... (categories in order of their
    id); empty: any."""
    max_pixels: int = field(default=100_000_000, metadata=RUNTIME)
    """A data set with an image of more pixels is refused before that image is decoded."""
    batch_size: int = 2
    """Images per training step, over all devices."""
    eval_batch_size: int = field(default=2, metadata=RUNTIME)
    """Images per step in validation and evaluation. Validation losses are means over batches, which
    another size shifts a little; AP does not change."""
    threads: int = field(default=2, metadata=RUNTIME)
    """Threads that decode images if there are no worker processes."""
    workers: int = field(default=0, metadata=RUNTIME)
    """Processes that decode images; on few cores threads are faster."""

    def __post_init__(self) -> None:
        require(
            0 < self.short_side <= self.long_side, "data.short_side: must be in 1..data.long_side"
        )
        require(len(self.canvases) > 0, "data.canvases: at least one canvas is needed")
        for height, width in self.canvases:
            require(
                height > 0 and width > 0 and height % 32 == 0 and width % 32 == 0,
                f"data.canvases: {height} x {width}: sides must be positive multiples of 32",
            )
        for need in ((self.short_side, self.long_side), (self.long_side, self.short_side)):
            require(
                any(h >= need[0] and w >= need[1] for h, w in self.canvases),
                f"data.canvases: none holds an image of {need[0]} x {need[1]}"
                " (data.short_side, data.long_side)",
            )
        require_at_least(1, self, "data.", "max_objects", "max_ignored", "mask_crop")
        require_at_least(1, self, "data.", "batch_size", "eval_batch_size", "threads")
        require_at_least(0, self, "data.", "workers")
        require(0 <= self.repeat_threshold <= 1, "data.repeat_threshold: must be in 0..1")
        require_positive(self, "data.", "depth_scale")
        require(
            0 < self.depth_range[0] < self.depth_range[1] < math.inf,
            "data.depth_range: must be (least, largest) metres with 0 < least < largest",
        )
        # pycocotools counts fifths of a pixel in 32 bits.
        require(1 <= self.max_pixels <= 200_000_000, "data.max_pixels: must be in 1..200000000")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser of a stage."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 1e-3
    """Peak learning rate."""
    batch_size: int = field(default=2, metadata=RUNTIME)
    """Images per update that `learning_rate` is meant for. If data.batch_size * accumulate_steps
    differs, a hint is printed; nothing is scaled."""
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float = 0.0
    """adam, sgd: L2 penalty, added to the gradient, as in the paper; adamw: decoupled, learning
    rate * weight_decay * parameter is subtracted (Loshchilov & Hutter 2019). Trained parameters
    only."""
    decay_vectors: bool = True
    """Decay one-dimensional parameters as well: biases and the scales of norms."""
    clip_norm: float | None = None
    """Gradients are clipped to this global norm over the trained parameters; None: not at all."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """Learning rate over the updates of the stage, after the warm-up. cosine: half a cosine, down
    to 0; step: multiplied by `step_factor` at each of `milestones`."""
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)
    """step: shares of the stage's updates, warm-up included (these are detectron2's 1x: 60k and 80k
    of 90k)."""
    step_factor: float = 0.1
    """step: factor on the learning rate at each milestone."""
    warmup_steps: int = 0
    """Length of a linear warm-up, in updates; never more than a tenth of the stage's."""
    accumulate_steps: int = 1
    """Average the gradients of this many steps for one update: equivalent to a batch that many
    times larger, where losses are means over equally many rows. The last update of a stage takes
    the steps that are left; if one of them is skipped (skip_non_finite), that update is dropped.
    Clipping comes afterwards; batch statistics are those of each step."""

    def __post_init__(self) -> None:
        require_positive(self, "optimizer.", "learning_rate", "clip_norm")
        require(0 <= self.momentum < 1, "optimizer.momentum: must be in [0, 1)")
        require(
            all(a < b for a, b in itertools.pairwise((0.0, *self.milestones, 1.0))),
            f"optimizer.milestones: {self.milestones}: must rise, between 0 and 1",
        )
        require(0 < self.step_factor < 1, "optimizer.step_factor: must be in (0, 1)")
        require_at_least(0, self, "optimizer.", "weight_decay", "warmup_steps")
        require_at_least(1, self, "optimizer.", "batch_size", "accumulate_steps")


@dataclass(frozen=True)
class ParamGroup:
    """Parameters to train, at a learning rate of their own."""

    pattern: str
    """Regular expression that the whole path of a parameter matches, "rpn/conv1/kernel"."""
    lr_scale: float = 1.0
    """Factor on the learning rate."""

    def __post_init__(self) -> None:
        require_weight(self, f"stages: {self.pattern}: ", "lr_scale")


Loss = Literal["rpn", "box", "box2", "box3", "mask", "mask_iou", "depth"]
BOX_LOSSES: tuple[Loss, ...] = ("box", "box2", "box3")
"""Those of the box head, and of the further heads of a cascade."""


@dataclass(frozen=True)
class StageConfig:
    """A row of the stage table. `train` and `frozen` together match each parameter exactly once."""

    name: str
    """Name of the stage, of a-z, 0-9 and _."""
    losses: tuple[Loss, ...]
    """Losses that are added up: rpn, box, mask, mask_iou, depth; box2 and box3 of a cascade's
    further heads."""
    train: tuple[ParamGroup, ...]
    """Parameters that are trained."""
    frozen: tuple[str, ...] = ()
    """Patterns of the parameters that stay as they are."""
    optimizer: OptimizerConfig = OptimizerConfig()
    epochs: float = 20
    """Passes over the training images; the last one may be a part."""
    ema_decay: float = 0.0
    """Keep a moving average of the trained parameters (average = decay * average + (1 - decay) *
    parameter after every update; after the n-th, with n / (n + 9) in place of a larger decay) and
    evaluate it beside them, with their batch statistics. It does not affect training: the next
    stage starts from the parameters themselves. 0: off."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """Of all parameters, trained ones first."""
        return (*(group.pattern for group in self.train), *self.frozen)

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[a-z0-9_]+", self.name) is not None,
            f"stages: name {self.name!r}: use a-z, 0-9, _",
        )
        where = f"stages.{self.name}"
        require(len(self.losses) > 0, f"{where}.losses: at least one loss is needed")
        require(len(self.train) > 0, f"{where}.train: at least one parameter group is needed")
        require_positive(self, f"{where}.", "epochs")
        if float(self.epochs).is_integer():  # written and hashed as 20, not 20.0
            object.__setattr__(self, "epochs", int(self.epochs))
        require(0 <= self.ema_decay < 1, f"{where}.ema_decay: must be in [0, 1)")
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{where}: pattern {pattern!r}: {error}") from None


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run find each other. A single process needs none of this."""

    coordinator: str | None = field(default=None, metadata=RUNTIME)
    """host:port of process 0, the same for all; auto: take all three from SLURM, Open MPI,
    Kubernetes or the TPU pod."""
    processes: int | None = field(default=None, metadata=RUNTIME)
    """Number of processes."""
    index: int | None = field(default=None, metadata=RUNTIME)
    """Number of this process, from 0."""

    def __post_init__(self) -> None:
        known = {None, "auto"}
        require(
            self.coordinator in known or re.fullmatch(r".+:\d+", str(self.coordinator)) is not None,
            f"distributed.coordinator: {self.coordinator!r}: must be host:port or auto",
        )
        for name in ("processes", "index"):
            require(
                (getattr(self, name) is None) == (self.coordinator in known),
                f"distributed.{name}: goes with distributed.coordinator host:port",
            )
        require_at_least(1, self, "distributed.", "processes")
        if self.processes is not None and self.index is not None:
            require(
                0 <= self.index < self.processes,
                "distributed.index: must be in 0..distributed.processes - 1",
            )


@dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    name: str = "unnamed"
    """Name of the config, shown in reports."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    stages: tuple[StageConfig, ...] = ()
    """The stage table: one row after the other is trained."""
    init_from: str | None = None
    """Weights to start from: a run's folder or a weights file. Relative names are looked up in the
    working directory, then in $MRCNN_DATA. `train --weights` sets it, and the fields that go with
    the weights."""
    init_without_classes: bool = False
    """Leave the class-specific outputs of `init_from` out: its classes are others."""
    seed: int = 0
    """Seed of the random weights, the order of the images, augmentation and sampling."""
    save_every_steps: int = field(default=500, metadata=RUNTIME)
    """Steps between two checkpoints."""
    keep_checkpoints: int = field(default=2, metadata=RUNTIME)
    """Number of newest checkpoints to keep, besides each stage's last one and the one of the best
    AP."""
    validate_every_epochs: int = field(default=1, metadata=RUNTIME)
    """Epochs between two computations of the losses on the validation images."""
    evaluate_every_epochs: int = field(default=0, metadata=RUNTIME)
    """Epochs between two evaluations of COCO AP (and depth) on the validation images, each with a
    checkpoint, in stages that train masks, their IoU or depth, or, where none does, boxes; 0:
    never. Of the weights themselves, also where a moving average is kept."""
    cache_features: Literal["off", "float32", "float16"] = "off"
    """Keep the features and proposals of frozen modules in the data cache, as numbers of this type,
    instead of computing them in every epoch; for images that are not augmented."""
    feature_cache_gib: float = field(default=16.0, metadata=RUNTIME)
    """Most GiB of a data set's features to keep; those of other weights are deleted first."""
    deterministic: bool = field(default=False, metadata=RUNTIME)
    """GPU: ask the compiler (xla_gpu_deterministic_ops) for programs that give the same bits each
    time, do not choose kernels by timing, and sum RoIAlign's gradient in integers. The cost is not
    measured yet. CPU runs are bit-equal without it."""
    skip_non_finite: int = field(default=0, metadata=RUNTIME)
    """Steps per stage that may be skipped because their loss or gradient is not finite, before the
    run stops."""
    shard_parameters: bool = field(default=False, metadata=RUNTIME)
    """Spread parameters and optimiser state over the devices instead of copying them to each: less
    memory, more communication."""
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = field(
        default=("tensorboard",), metadata=RUNTIME
    )
    """Where the numbers of metrics.jsonl are shown as well: TensorBoard (files in the run's
    folder), Weights & Biases, MLflow."""
    profile: bool = field(default=False, metadata=RUNTIME)
    """Write a trace of a few steps of each stage to <workdir>/profile, for TensorBoard's profiler
    or ui.perfetto.dev."""
    distributed: DistributedConfig = DistributedConfig()

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        require(
            len(set(names)) == len(names), f"stages: two have the same name: {', '.join(names)}"
        )
        require(len(set(self.loggers)) == len(self.loggers), "loggers: one is named twice")
        require(
            self.init_from is not None or not self.init_without_classes,
            "init_without_classes: needs init_from",
        )
        for stage in self.stages:
            require(
                "depth" not in stage.losses or self.model.depth_head.kind != "none",
                f"stages.{stage.name}.losses: depth needs model.depth_head.kind dense or roi",
            )
            for heads, loss in enumerate(BOX_LOSSES):
                require(
                    loss not in stage.losses or len(self.model.box_head.cascade) >= heads,
                    f"stages.{stage.name}.losses: {loss} needs model.box_head.cascade with "
                    f"{heads} further head{'s' * (heads > 1)}",
                )
            require(
                "mask_iou" not in stage.losses or self.model.mask_iou_head.enabled,
                f"stages.{stage.name}.losses: mask_iou needs model.mask_iou_head.enabled",
            )
        head = self.model.depth_head.kind
        require(
            self.data.augment.copy_paste == 0 or head == "none",
            f"data.augment.copy_paste: must be 0 with model.depth_head.kind {head}: the depth of "
            "pasted objects is not that of the scene",
        )
        require_at_least(1, self, "", "save_every_steps", "keep_checkpoints")
        require_at_least(1, self, "", "validate_every_epochs")
        require(self.feature_cache_gib > 0, "feature_cache_gib: must be positive")
        require_at_least(0, self, "", "skip_non_finite", "evaluate_every_epochs")
        require(0 <= self.seed < 2**32, "seed: must be in 0..2**32 - 1 (JAX takes 32 bits of it)")

    def evaluates(self, stage: StageConfig, *, has_masks: bool = True) -> bool:
        """Whether AP and depth are measured in a stage of this table: it trains masks, their IoU or
        depth; where no stage does, or not without masks in the data, boxes."""
        final = {"mask", "mask_iou", "depth"} if has_masks else {"depth"}
        if all(final.isdisjoint(row.losses) for row in self.stages):
            final = set(BOX_LOSSES)
        return not final.isdisjoint(stage.losses)
