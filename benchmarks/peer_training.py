"""torchvision's side of benchmarks/accuracy_vs_torchvision.py, trained on our batches."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import joint_run
import numpy as np
from pycocotools import mask as coco_mask

from mrcnn_jax.config.schema import Config
from mrcnn_jax.output import whole_file


class Peer:
    """torchvision's network and optimiser, fed with our batches."""

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
            constants["rpn_post_nms_top_n_train"] = joint_run.ALL_PROPOSALS
        self.model = peers.build("v1", classes=joint_run.CLASSES + 1, **constants)
        overwrite_eps(self.model, config.model.resnet.norm_epsilon)
        with np.load(joint_run.initial_weights(arguments)) as initial:
            peers.load(self.model, to_torchvision(dict(initial), peers.shapes(self.model)))
        for name, parameter in self.model.backbone.body.named_parameters():
            parameter.requires_grad_(not name.startswith(("conv1", "layer1")))
        self.model.to(self.device, memory_format=torch.channels_last)  # the faster form
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = config.stages[0].optimizer
        self.optimizer = torch.optim.SGD(
            trained, lr=0.0, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay
        )
        self.loss_names = peers.LOSSES

    def images(self, batch: Any) -> Any:
        """Returns valid images as torchvision's own transform makes them, on our canvas."""
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
        """Returns each image's boxes and labels, and its masks from the segmentations.

        Masks are resized to the nearest pixel, as torchvision's transform does.
        """
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
        """Makes a step and returns the losses before it.

        Its random numbers come from `seed` alone, so that a run can resume anywhere.
        """
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
        """Returns detections and proposals of each image, in pixels of its file.

        Masks are probabilities, pasted by torchvision.
        """
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
        """Writes a checkpoint after `step` steps."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        with whole_file(path) as part, part.open("wb") as file:
            self.torch.save({"step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())

    def restore(self, path: Path) -> int:
        """Loads a checkpoint, if there is one, and returns the number of steps done."""
        if not path.exists():
            return 0
        saved = self.torch.load(path, map_location=self.device)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        return int(saved["step"])


def to_torchvision(
    variables: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Turns our variables into torchvision's state dict: the importer's map, backwards.

    Deltas and masks of the background, which the map leaves out, are 0; nothing reads them.

    Args:
        variables: our variables by path ("params/rpn/conv1/kernel").
        shapes: shapes of the state dict.
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


def full_masks(record: Mapping[str, Any], size: tuple[int, int]) -> list[np.ndarray]:
    """Returns uint8 masks of an image's objects, without crowds.

    Args:
        record: a record of our data source.
        size: (height, width) of the image file.
    """
    objects = record["objects"]
    return [
        coco_mask.decode({"size": list(size), "counts": counts})
        for counts, crowd in zip(objects["counts"], objects["iscrowd"], strict=True)
        if not crowd
    ]


def results_of(
    image_id: int,
    category_ids: Sequence[int],
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    masks: np.ndarray,
) -> list[dict[str, Any]]:
    """Returns an image's detections as COCO results.

    Args:
        image_id: COCO id of the image.
        category_ids: COCO ids of labels 1..K.
        boxes: [N, 4] (x1, y1, x2, y2) in pixels of the image.
        labels: [N] in 1..K.
        scores: [N] probabilities.
        masks: bool [N, height, width].
    """
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


def remaining(epochs: Sequence[Sequence[Any]], step: int) -> list[tuple[int, Sequence[Any]]]:
    """Returns (epoch, batches) left after `step` batches; epochs count from 1."""
    starts = [sum(map(len, epochs[:i])) for i in range(len(epochs))]
    left = [
        (i + 1, batches[max(0, step - start) :])
        for i, (batches, start) in enumerate(zip(epochs, starts, strict=True))
    ]
    return [(epoch, batches) for epoch, batches in left if batches]


def train(arguments: argparse.Namespace) -> None:
    """Trains torchvision's side, from its checkpoint if there is one, and evaluates it."""
    from mrcnn_jax.data.loader import load
    from mrcnn_jax.data.order import plan_epoch
    from mrcnn_jax.runs.metrics import MetricsLog

    plan, config = joint_run.planned_config(arguments)
    data = config.data
    folder = joint_run.folder_of(arguments, arguments.seed, "torchvision")
    split, val_split = joint_run.splits(config)
    peer = Peer(arguments, config)
    step = peer.restore(folder / "checkpoint.pt")
    canvases = [image.canvas for image in split.plans]
    epochs = [
        plan_epoch(canvases, data.batch_size, seed=config.seed, epoch=epoch, shuffle=True)
        for epoch in range(plan.epochs)
    ]
    with MetricsLog(folder) as log:
        log.truncate([joint_run.STAGE], 0, step)
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
                log.write(
                    stage=joint_run.STAGE, step=step, epoch=epoch, split="train", values=values
                )
                if step % joint_run.SAVE_EVERY == 0 or step == plan.steps:
                    log.sync()
                    peer.save(folder / "checkpoint.pt", step)
            seconds = time.perf_counter() - started
            with (folder / "timing.jsonl").open("a") as file:
                row = {"epoch": epoch, "steps": len(rest), "seconds": seconds}
                file.write(json.dumps(row) + "\n")
    evaluate_peer(peer, config, val_split, folder)


def evaluate_peer(peer: Peer, config: Config, split: Any, folder: Path) -> None:
    """Writes eval/metrics.json and eval/detections.json, as the evaluation of our runs does."""
    from mrcnn_jax.data.loader import load, plan_once
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
        truths += [np.array([o.box for o in record.objects]).reshape(-1, 4) for record in records]
    recall = proposal_recall(proposals, truths, limit=config.model.rpn.proposals)
    write_evaluation(folder, split.dataset.to_coco(), results, recall)


def write_evaluation(
    folder: Path,
    ground_truth: dict[str, Any],
    results: Sequence[dict[str, Any]],
    recall: Mapping[str, float] | None = None,
) -> None:
    """Rates COCO results as the evaluation of our runs does, and writes eval/ as it does.

    Args:
        folder: of the run.
        ground_truth: a parsed COCO file.
        results: COCO results.
        recall: further metrics.
    """
    from mrcnn_jax.evaluation.average_precision import coco_figures, match_results, table

    metrics = coco_figures(match_results(ground_truth, results)) | dict(recall or {})
    print(table(metrics))
    (folder / "eval").mkdir(exist_ok=True)
    (folder / "eval" / "detections.json").write_text(json.dumps(results))
    with whole_file(folder / "eval" / "metrics.json") as part:
        part.write_text(json.dumps(metrics))
