"""Box and mask AP of joint training, ours beside torchvision's maskrcnn_resnet50_fpn: same data,
weights, canvases, order and steps.

    export MRCNN_DATA=...        # holds coco300/ and weights/
    python benchmarks/accuracy_vs_torchvision.py [--steps 600] [--seeds 0 1 2] [--side ours]
    [--workdir DIR]

coco300 at its own size (short side 300, long side at most 480), batches of 2, no augmentation. An
ImageNet ResNet-50 with frozen batch norm, res3 to res5 trainable; FPN and heads begin at our random
weights on both sides, drawn from the seed. SGD 0.005 behind a linear warm-up, a tenth of it in the
last quarter, momentum 0.9, weight decay 1e-4. torchvision is fed our loader's canvases and boxes,
in our order, and both are judged by our evaluation.

Each side trains in a process of its own, one after the other; the same command again goes on where
it was stopped. Losses stand side by side as they come, means over the last 50 steps. The last line
is JSON: figures by seed and their mean, `difference` (ours less torchvision's), and the `spread`
(standard deviation) over the seeds of each side. Without torch, ours is trained alone.

--steps is rounded to whole epochs; where it is less than one, only as many of the first images are
trained on. --samples: RoIs an image of the box head, of which a quarter may be foreground, and
train the mask head (torchvision: 512).

What differs on purpose (see also docs/differences.md):
- which anchors and proposals are drawn: each side has its own random numbers. With --all-samples
every anchor and every one of 100
  proposals is taken, and nothing else is left to chance: losses then agree step by step, but for
  what follows;
- mask targets: torchvision's are averages of the full mask, made from the segmentation and resized
as it does; ours are 0 or 1, from crops;
- crowds: torchvision does not know of them (its recipe leaves them out); ours takes no negatives in
them. With --without-crowds neither
  knows of them;
- its detections are pasted by its own code.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [
    str(ROOT),
    str(ROOT / "tests"),
]  # the package need not be installed; the peer is shared with the tests

from mrcnn_jax import cli  # noqa: E402
from mrcnn_jax.config.errors import ConfigError  # noqa: E402
from mrcnn_jax.config.files import load_config_file, resolve_paths  # noqa: E402
from mrcnn_jax.config.schema import Config, DataConfig, OptimizerConfig  # noqa: E402

SIDES = ("torchvision", "ours")
CLASSES = 3
STAGE = "joint"
WARMUP = 50  # steps
# of the steps; without it, figures swing from one step to the next by as much as the sides differ
DECAY_AT = 0.75
ALL_PROPOSALS = 100  # where all of them are samples
SAVE_EVERY = 50  # steps
LOSSES = ("rpn_objectness", "rpn_box", "box_class", "box_box", "mask")
FIGURES = ("bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP", "segm/AP50", "segm/AP75")


# -- what both sides share -------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What both sides do; written once a --workdir, and not to be changed afterwards."""

    asked: dict[str, Any]
    """The options that it was made from."""
    annotations: str
    epochs: int
    steps: int
    """Of all epochs."""
    rates: list[float]
    """The learning rate of each step."""


def whole_epochs(canvases: Sequence[int], batch_size: int, steps: int) -> tuple[int, int, int]:
    """(epochs, images, steps): `steps` rounded to whole epochs, or, below one epoch, to the first
    images that make as many."""
    from mrcnn_jax.data.loader import plan_epoch

    def length(images: int) -> int:
        return len(plan_epoch(canvases[:images], batch_size, seed=0, epoch=0, shuffle=False))

    images = len(canvases)
    epochs = max(1, round(steps / length(images)))
    while images > 1 and epochs == 1 and length(images) > steps:
        images -= 1
    return epochs, images, epochs * length(images)


def subset(
    content: Mapping[str, Any], image_ids: Collection[int], *, crowds: bool
) -> dict[str, Any]:
    """Of a COCO file, these images and their annotations, with or without crowds."""
    return dict(content) | {
        "images": [image for image in content["images"] if image["id"] in image_ids],
        "annotations": [
            a
            for a in content["annotations"]
            if a["image_id"] in image_ids and (crowds or not a.get("iscrowd"))
        ],
    }


def run_config(
    arguments: argparse.Namespace, *, annotations: str | None, epochs: int, steps: int
) -> Config:
    """Our run: torchvision's constants and trained parameters, on coco300."""
    config = load_config_file(ROOT / "configs" / "torchvision_coco.py")
    data = DataConfig(
        folder="coco300",
        short_side=300,
        long_side=480,
        canvases=((320, 480), (480, 320)),
        max_objects=32,  # the most that an image has is 24
        keep_empty=False,
        cache=str(arguments.workdir.absolute() / "data"),
    )
    if annotations is not None:
        data = replace(data, train_annotations=annotations)
    rpn, box_head, mask_head = config.model.rpn, config.model.box_head, config.model.mask_head
    box_head = replace(box_head, samples=arguments.samples)
    mask_head = replace(mask_head, samples=arguments.samples // 4)
    if arguments.all_samples:
        count = ALL_PROPOSALS + data.max_objects
        rpn = replace(rpn, samples=10**5, positive_fraction=1.0, train_proposals=ALL_PROPOSALS)
        box_head = replace(box_head, samples=count, positive_fraction=1.0)
        mask_head = replace(mask_head, samples=count)
    optimizer = OptimizerConfig(
        name="sgd",
        learning_rate=0.005,
        momentum=0.9,
        weight_decay=1e-4,
        schedule="step",
        milestones=(DECAY_AT,),
        warmup_steps=min(WARMUP, steps // 2),
    )
    return resolve_paths(
        replace(
            config,
            name="accuracy_vs_torchvision",
            data=data,
            model=replace(
                config.model, num_classes=CLASSES, rpn=rpn, box_head=box_head, mask_head=mask_head
            ),
            stages=tuple(
                replace(stage, epochs=epochs, optimizer=optimizer) for stage in config.stages
            ),
            init_from="weights/pqf_resnet50_large.npz",
            seed=arguments.seed,
            save_every_steps=SAVE_EVERY,
            validate_every_epochs=epochs,
        )
    )


def planned_config(arguments: argparse.Namespace) -> tuple[Plan, Config]:
    plan = Plan(**json.loads((arguments.workdir / "plan.json").read_text()))
    return plan, run_config(
        arguments, annotations=plan.annotations, epochs=plan.epochs, steps=plan.steps
    )


def folder_of(arguments: argparse.Namespace, seed: int, side: str) -> Path:
    return Path(arguments.workdir) / f"seed{seed}" / side


def initial_weights(arguments: argparse.Namespace) -> Path:
    return Path(arguments.workdir) / f"seed{arguments.seed}" / "initial.npz"


def splits(config: Config) -> tuple[Any, Any]:
    """(training, validation) images, as a run opens them."""
    from mrcnn_jax.data.loader import open_split
    from mrcnn_jax.data.reading import read_coco

    data = config.data
    assert data.cache is not None
    return tuple(  # type: ignore[return-value]
        open_split(
            name,
            read_coco(
                Path(getattr(data, f"{name}_annotations")),
                Path(getattr(data, f"{name}_images")),
                data,
            ),
            cache=Path(data.cache),
            data=data,
        )
        for name in ("train", "val")
    )


# -- ours ------------------------------------------------------------------------------------------


def prepare(arguments: argparse.Namespace) -> None:
    """Writes what the sides share: the plan, and a seed's initial weights by our paths."""
    import jax
    from flax.traverse_util import flatten_dict

    from mrcnn_jax.models.initialise import initialise
    from mrcnn_jax.models.mask_rcnn import MaskRCNN, example_batch
    from mrcnn_jax.training.initial import initial_variables
    from mrcnn_jax.training.optimizer import learning_rate

    if not (arguments.workdir / "plan.json").exists():
        config = run_config(arguments, annotations=None, epochs=1, steps=arguments.steps)
        split, _ = splits(config)
        epochs, images, steps = whole_epochs(
            [plan.canvas for plan in split.plans], config.data.batch_size, arguments.steps
        )
        annotations = Path(config.data.train_annotations)
        if images < len(split.plans) or arguments.without_crowds:
            kept = {image.id for image in split.dataset.images[:images]}
            content = subset(
                json.loads(annotations.read_text()), kept, crowds=not arguments.without_crowds
            )
            annotations = arguments.workdir.absolute() / "train.json"
            annotations.write_text(json.dumps(content))
        (stage,) = run_config(
            arguments, annotations=str(annotations), epochs=epochs, steps=steps
        ).stages
        rates = [float(learning_rate(stage, step, steps)) for step in range(steps)]
        write(
            arguments.workdir / "plan.json",
            Plan(asked(arguments), str(annotations), epochs, steps, rates).__dict__,
        )
    _, config = planned_config(arguments)
    model = MaskRCNN(config.model)
    variables = initialise(model, example_batch(config.data.canvases[0]), seed=config.seed)
    variables = flatten_dict(variables, sep="/") | flatten_dict(
        initial_variables(variables, config), sep="/"
    )
    path = initial_weights(arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name("part.npz")
    np.savez(part, **jax.device_get(variables))
    part.replace(path)


def ours(arguments: argparse.Namespace) -> None:
    from mrcnn_jax.commands.evaluate import evaluate_run
    from mrcnn_jax.training.loop import Stopped, train

    _, config = planned_config(arguments)
    folder = folder_of(arguments, arguments.seed, "ours")
    try:
        train(config, folder)
    except Stopped as stopped:
        sys.exit(str(stopped))
    evaluate_run(folder)


# -- torchvision -----------------------------------------------------------------------------------


def to_torchvision(
    variables: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """A state dict of `shapes` from our variables by path ("params/rpn/conv1/kernel"): the
    importer's map, backwards.

    What that leaves out, deltas and masks of the background, is 0; nothing reads it.
    """
    from mrcnn_jax.weights.families import MASKRCNN
    from mrcnn_jax.weights.mapping import assign

    assigned = assign(shapes, MASKRCNN.rules, MASKRCNN.left_out, "torchvision")
    assert assigned.keys() == variables.keys()
    tensors = {}
    for path, (name, layouts) in assigned.items():
        places = np.arange(np.prod(shapes[name], dtype=int)).reshape(shapes[name])
        for layout in layouts:
            places = layout(places)
        tensor = np.zeros(shapes[name], np.float32)
        tensor.reshape(-1)[places] = variables[path]
        tensors[name] = tensor
    return tensors


def results_of(
    image_id: int,
    category_ids: Sequence[int],
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    masks: np.ndarray,
) -> list[dict[str, Any]]:
    """COCO results of an image's detections: boxes [N, 4] (x1, y1, x2, y2) in its pixels, labels
    1..K, masks bool [N, height, width]."""
    from mrcnn_jax.pixels.rle import segmentation_rle

    results = []
    for (x1, y1, x2, y2), label, score, mask in zip(
        boxes.tolist(), labels.tolist(), scores.tolist(), masks, strict=True
    ):
        rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        results.append(
            {
                "image_id": image_id,
                "category_id": category_ids[label - 1],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
                "segmentation": segmentation_rle(rle, mask.shape),
            }
        )
    return results


def full_masks(record: Mapping[str, Any], size: tuple[int, int]) -> list[np.ndarray]:
    """uint8 masks of an image's objects, crowds left out, from a record of our data source; `size`
    (height, width) of the file."""
    objects = record["objects"]
    counts = [
        counts
        for counts, crowd in zip(objects["counts"], objects["iscrowd"], strict=True)
        if not crowd
    ]
    return [coco_mask.decode({"size": list(size), "counts": each}) for each in counts]


class Peer:
    """torchvision's network, fed with our batches."""

    def __init__(self, arguments: argparse.Namespace, config: Config) -> None:
        import torch
        from parity import peers
        from torchvision.models.detection._utils import overwrite_eps

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        constants: dict[str, Any] = {"box_batch_size_per_image": arguments.samples}
        if arguments.all_samples:
            constants = dict.fromkeys(
                ("rpn_batch_size_per_image", "box_batch_size_per_image"), 10**6
            )
            constants["rpn_post_nms_top_n_train"] = ALL_PROPOSALS
        self.model = peers.build("v1", classes=CLASSES + 1, **constants)
        overwrite_eps(self.model, config.model.resnet.norm_epsilon)
        with np.load(initial_weights(arguments)) as initial:
            peers.load(self.model, to_torchvision(dict(initial), peers.shapes(self.model)))
        for name, parameter in self.model.backbone.body.named_parameters():
            parameter.requires_grad_(not name.startswith(("conv1", "layer1")))
        self.model.to(self.device, memory_format=torch.channels_last)  # its faster form
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = config.stages[0].optimizer
        self.optimizer = torch.optim.SGD(
            trained, lr=0.0, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay
        )
        self.loss_names = peers.LOSSES

    def images(self, batch: Any) -> Any:
        """The valid images of a batch as torchvision's own transform leaves them, but on our
        canvas."""
        from torchvision.models.detection.image_list import ImageList

        torch = self.torch
        sizes = [tuple(size) for size in batch.image_sizes[batch.valid].tolist()]
        canvases = torch.zeros(len(sizes), 3, *batch.images.shape[1:3])
        for canvas, pixels, (height, width) in zip(
            canvases, batch.images[batch.valid], sizes, strict=True
        ):
            image = torch.from_numpy(pixels[:height, :width]).permute(2, 0, 1) / 255
            canvas[:, :height, :width] = self.model.transform.normalize(image)
        return ImageList(canvases.to(self.device, memory_format=torch.channels_last), sizes)

    def targets(self, batch: Any, source: Any) -> list[dict[str, Any]]:
        """Boxes and labels of the batch; masks from the segmentations, resized to the nearest pixel
        as its transform does."""
        torch, truth, found = self.torch, batch.ground_truth, []
        for row in np.flatnonzero(batch.valid):
            rows = truth.valid[row]
            masks = torch.zeros(int(rows.sum()), *batch.images.shape[1:3], dtype=torch.uint8)
            height, width = batch.image_sizes[row]
            full = full_masks(
                source[int(batch.indices[row])], tuple(batch.original_sizes[row].tolist())
            )
            for place, mask in zip(masks, full, strict=True):
                resized = torch.nn.functional.interpolate(
                    torch.from_numpy(mask)[None, None].float(), size=(int(height), int(width))
                )
                place[:height, :width] = resized[0, 0].byte()
            target = {
                "boxes": truth.boxes[row][rows],
                "labels": truth.labels[row][rows].astype(np.int64),
            }
            found.append(
                {name: torch.from_numpy(values).to(self.device) for name, values in target.items()}
                | {"masks": masks.to(self.device)}
            )
        return found

    def train_step(
        self, images: Any, targets: list[dict[str, Any]], *, rate: float, seed: int
    ) -> dict[str, float]:
        """The losses before the update. The random numbers of a step are those of its seed, so that
        a run can go on anywhere."""
        self.torch.manual_seed(seed)
        self.model.train()
        features = self.model.backbone(images.tensors)
        proposals, losses = self.model.rpn(images, features, targets)
        losses |= self.model.roi_heads(features, proposals, images.image_sizes, targets)[1]
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return {self.loss_names[name]: value.item() for name, value in losses.items()}

    def detect(
        self, images: Any, original_sizes: Sequence[tuple[int, int]]
    ) -> tuple[list[dict[str, np.ndarray]], list[np.ndarray]]:
        """(detections, proposals) of each image, in pixels of its file; masks are pasted by
        torchvision, as probabilities."""
        from torchvision.models.detection.transform import resize_boxes

        self.model.eval()
        with self.torch.no_grad():
            features = self.model.backbone(images.tensors)
            proposals, _ = self.model.rpn(images, features)
            found, _ = self.model.roi_heads(features, proposals, images.image_sizes)
            found = self.model.transform.postprocess(found, images.image_sizes, original_sizes)
        sizes = zip(proposals, images.image_sizes, original_sizes, strict=True)
        detections = [
            {name: values.cpu().numpy() for name, values in image.items()} for image in found
        ]
        return detections, [
            resize_boxes(boxes, resized, original).cpu().numpy()
            for boxes, resized, original in sizes
        ]

    def save(self, path: Path, step: int) -> None:
        part = path.with_name(f"{path.name}.part")
        with part.open("wb") as file:
            self.torch.save(
                {
                    "step": step,
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                },
                file,
            )
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    def restore(self, path: Path) -> int:
        """The number of steps done."""
        if not path.exists():
            return 0
        saved = self.torch.load(path, map_location=self.device)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        return int(saved["step"])


def remaining(epochs: Sequence[Sequence[Any]], step: int) -> list[tuple[int, Sequence[Any]]]:
    """Of batches by epoch, what is left after `step` of them: (epoch, counted from 1, and its
    batches)."""
    starts = [sum(map(len, epochs[:i])) for i in range(len(epochs))]
    left = [
        (i + 1, batches[max(0, step - start) :])
        for i, (batches, start) in enumerate(zip(epochs, starts, strict=True))
    ]
    return [(epoch, batches) for epoch, batches in left if batches]


def torchvision(arguments: argparse.Namespace) -> None:
    from mrcnn_jax.data.loader import load, plan_epoch
    from mrcnn_jax.runs.metrics import MetricsLog

    plan, config = planned_config(arguments)
    data, folder = config.data, folder_of(arguments, arguments.seed, "torchvision")
    split, val_split = splits(config)
    peer = Peer(arguments, config)
    step = peer.restore(folder / "checkpoint.pt")
    canvases = [image.canvas for image in split.plans]
    epochs = [
        plan_epoch(canvases, data.batch_size, seed=config.seed, epoch=epoch, shuffle=True)
        for epoch in range(plan.epochs)
    ]
    with MetricsLog(folder) as log:
        log.truncate([STAGE], 0, step)
        for epoch, rest in remaining(epochs, step):
            started = time.perf_counter()
            for batch in load(split, rest, data):
                losses = peer.train_step(
                    peer.images(batch),
                    peer.targets(batch, split.source),
                    rate=plan.rates[step],
                    seed=plan.steps * config.seed + step,
                )
                step += 1
                values = {f"loss/{name}": value for name, value in losses.items()}
                values |= {
                    "loss/total": sum(losses.values()),
                    "learning_rate": plan.rates[step - 1],
                }
                log.write(stage=STAGE, step=step, epoch=epoch, split="train", values=values)
                if step % SAVE_EVERY == 0 or step == plan.steps:
                    log.sync()
                    peer.save(folder / "checkpoint.pt", step)
            with (folder / "timing.jsonl").open("a") as file:
                file.write(
                    json.dumps(
                        {
                            "epoch": epoch,
                            "steps": len(rest),
                            "seconds": time.perf_counter() - started,
                        }
                    )
                    + "\n"
                )
    judge(peer, config, val_split, folder)


def judge(peer: Peer, config: Config, split: Any, folder: Path) -> None:
    """Writes eval/metrics.json and eval/detections.json as our evaluation of a run does."""
    from mrcnn_jax.data.loader import load, plan_once
    from mrcnn_jax.evaluation.average_precision import evaluate, table
    from mrcnn_jax.evaluation.proposals import proposal_recall

    category_ids = [category.id for category in split.dataset.categories]
    results: list[dict[str, Any]] = []
    proposals, truths = [], []
    for batch in load(split, plan_once(split, config.data.eval_batch_size), config.data):
        sizes = [tuple(size) for size in batch.original_sizes[batch.valid].tolist()]
        detections, boxes = peer.detect(peer.images(batch), sizes)
        records = [split.dataset.images[index] for index in batch.indices[batch.valid]]
        for record, found in zip(records, detections, strict=True):
            found["masks"] = found["masks"][:, 0] > 0.5
            results += results_of(record.id, category_ids, **found)
        proposals += boxes
        truths += [
            np.array([o.box for o in record.objects if not o.iscrowd]).reshape(-1, 4)
            for record in records
        ]
    metrics = evaluate(split.dataset.to_coco(), results)
    metrics |= proposal_recall(proposals, truths, limit=config.model.rpn.proposals)
    print(table(metrics))
    (folder / "eval").mkdir(exist_ok=True)
    (folder / "eval" / "detections.json").write_text(json.dumps(results))
    write(folder / "eval" / "metrics.json", metrics)


# -- both ------------------------------------------------------------------------------------------


def asked(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        name: getattr(arguments, name)
        for name in ("steps", "samples", "all_samples", "without_crowds")
    }


def write(path: Path, content: Any) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content))
    part.replace(path)


def window_means(rows: Sequence[Mapping[str, Any]], size: int) -> dict[int, dict[str, float]]:
    """Means of the training losses over the first step and over each whole window of `size` steps,
    by its last step."""
    losses = [row for row in rows if row["split"] == "train"]
    windows = [
        losses[:1],
        *(losses[end - size : end] for end in range(size, len(losses) + 1, size)),
    ]
    return {
        window[-1]["step"]: {name: fmean(row[f"loss/{name}"] for row in window) for name in LOSSES}
        for window in windows
        if window
    }


def loss_lines(means: Mapping[str, Mapping[int, Mapping[str, float]]], step: int) -> list[str]:
    """The losses of each side that has come to a step."""
    return [
        f"step {step:5} {side:12}"
        + "  ".join(f"{name} {value:.4f}" for name, value in at[step].items())
        for side, at in means.items()
        if step in at
    ]


def seconds_a_step(folder: Path) -> float | None:
    """The median over its epochs; that in which programs were compiled is slower."""
    path = folder / "timing.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    seconds = [row["seconds"] / row["steps"] for row in rows if row["steps"]]
    return round(median(seconds), 3) if seconds else None


def run_child(arguments: argparse.Namespace, seed: int, child: str) -> None:
    """One process; while a side trains, its losses are printed beside those of the other one."""
    from mrcnn_jax.runs.metrics import read_metrics

    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(arguments.workdir.absolute() / "cache")
    }
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, *sys.argv, "--child", child, "--seed", str(seed)]
    process = subprocess.Popen(command, stdout=sys.stderr, env=environment)
    shown: set[int] = set()
    running = True
    try:
        while running:
            try:
                process.wait(timeout=5)
                running = False
            except subprocess.TimeoutExpired:
                pass
            means = {
                side: window_means(read_metrics(folder_of(arguments, seed, side)), arguments.every)
                for side in SIDES
            }
            for step in sorted(means.get(child, {}).keys() - shown):
                shown.add(step)
                print("\n".join(loss_lines(means, step)), file=sys.stderr, flush=True)
    finally:
        process.terminate()
        process.wait()
    if process.returncode:
        sys.exit(process.returncode)


def summary(figures: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict[str, Any]:
    """Of figures by side, seed and name: by seed and their mean, the difference of the sides on
    each seed, the spread over seeds."""
    result: dict[str, Any] = {}
    for name in FIGURES:
        row: dict[str, Any] = {
            side: [round(values[name], 5) for values in by_seed.values()]
            for side, by_seed in figures.items()
        }
        row |= {f"{side}_mean": round(fmean(row[side]), 5) for side in figures}
        row |= {
            f"{side}_spread": round(stdev(row[side]), 5) for side in figures if len(row[side]) > 1
        }
        if len(figures) == 2:
            row["difference"] = [
                round(a - b, 5) for a, b in zip(row["ours"], row["torchvision"], strict=True)
            ]
        result[name] = row
    return result


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--side", choices=[*SIDES, "both"], default="both")
    made.add_argument("--steps", type=int, default=600)
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--samples", type=int, default=128, help="RoIs an image of the box head")
    made.add_argument("--all-samples", action="store_true", help="leave nothing to chance")
    made.add_argument(
        "--without-crowds", action="store_true", help="leave crowds out of the training images"
    )
    made.add_argument("--every", type=int, default=50, help="steps between two lines of losses")
    made.add_argument("--workdir", type=Path, default=Path("runs/accuracy_vs_torchvision"))
    made.add_argument(
        "--child", choices=["prepare", *SIDES], help=argparse.SUPPRESS
    )  # in a process of its own
    made.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return made


def main() -> None:
    arguments = parser().parse_args()
    if arguments.child:
        {"prepare": prepare, "ours": ours, "torchvision": torchvision}[arguments.child](arguments)
        return
    for name in ("steps", "samples", "every"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name}: must be at least 1")
    sides = list(SIDES) if arguments.side == "both" else [arguments.side]
    if "torchvision" in sides and importlib.util.find_spec("torchvision") is None:
        if arguments.side != "both":
            raise ConfigError("--side torchvision: torchvision is not installed here")
        print("torchvision is not installed here: ours alone", file=sys.stderr)
        sides.remove("torchvision")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without its child
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    path = arguments.workdir / "plan.json"
    if path.exists() and json.loads(path.read_text())["asked"] != asked(arguments):
        raise ConfigError(
            f"{path}: was made with other options: {json.loads(path.read_text())['asked']} (choose another --workdir)"
        )

    figures: dict[str, dict[int, dict[str, float]]] = {side: {} for side in sides}
    for seed in arguments.seeds:
        arguments.seed = seed
        if not initial_weights(arguments).exists():
            run_child(arguments, seed, "prepare")
        for side in sides:
            metrics = folder_of(arguments, seed, side) / "eval" / "metrics.json"
            if not metrics.exists():
                run_child(arguments, seed, side)
            figures[side][seed] = json.loads(metrics.read_text())
    report(arguments, figures)


def report(
    arguments: argparse.Namespace, figures: Mapping[str, Mapping[int, Mapping[str, float]]]
) -> None:
    """The losses, the table and the line of JSON."""
    from mrcnn_jax.runs.metrics import read_metrics

    plan = json.loads((arguments.workdir / "plan.json").read_text())
    losses: dict[str, dict[str, Any]] = {}
    for seed in arguments.seeds:
        means = {
            side: window_means(read_metrics(folder_of(arguments, seed, side)), arguments.every)
            for side in figures
        }
        print(f"\nseed {seed}")
        for step in sorted(set().union(*means.values())):
            print("\n".join(loss_lines(means, step)))
        losses[f"seed{seed}"] = {
            side: {
                str(step): {name: round(value, 4) for name, value in at[step].items()}
                for step in (min(at), max(at))
            }
            for side, at in means.items()
        }
    print(
        f"\n{'seed':>4} {'side':12}"
        + "".join(f"{name:>11}" for name in FIGURES)
        + f"{'s a step':>11}"
    )
    seconds: dict[str, list[float | None]] = {side: [] for side in figures}
    for seed in arguments.seeds:
        for side, by_seed in figures.items():
            seconds[side].append(seconds_a_step(folder_of(arguments, seed, side)))
            values = "".join(f"{100 * by_seed[seed][name]:11.2f}" for name in FIGURES)
            print(f"{seed:4} {side:12}{values}{seconds[side][-1] or float('nan'):11.2f}")
    result = asked(arguments) | {
        "steps": plan["steps"],
        "epochs": plan["epochs"],
        "seeds": arguments.seeds,
    }
    result |= summary(figures) | {
        "seconds_a_step": seconds,
        "losses": losses,
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
