"""Records torchvision's numbers for tests/test_recorded_torchvision.py.

PYTHONPATH=tests python tests/parity/record.py      # needs torch and torchvision
"""

from __future__ import annotations

import numpy as np
from parity import peers, recorded, seeded
from parity.compare import sketch
from parity.ours import gradients_of, model_config


def forward(version: str) -> dict[str, np.ndarray]:
    model = peers.build(
        version,
        depth=recorded.DEPTH,
        classes=recorded.CLASSES,
        rpn_post_nms_top_n_test=recorded.PROPOSALS["test"],
        box_detections_per_img=recorded.DETECTIONS,
    )
    shapes = peers.shapes(model)
    peers.load(model, seeded.seeded_tensors(shapes, recorded.SEED))
    record = peers.forward(model, recorded.scenes()[0])
    numbers = {
        "names": np.array(list(shapes)),
        "shapes": np.array([" ".join(map(str, shape)) for shape in shapes.values()]),
    }
    heads = ("rpn_logits", "rpn_deltas", "class_logits", "box_deltas", "mask_logits")
    for name, values in {
        **record.maps,
        **record.pyramid,
        **{head: getattr(record, head) for head in heads},
    }.items():
        numbers[f"stage/{name}"] = recorded.samples(values)
        numbers[f"largest/{name}"] = np.abs(values).max()
    for b in range(len(recorded.SIZES)):
        numbers[f"proposals/{b}"] = record.proposals[b]
        numbers[f"boxes/{b}"] = record.boxes[b]
        numbers[f"labels/{b}"] = record.labels[b].astype(np.int32)
        numbers[f"scores/{b}"] = record.scores[b]
        numbers[f"masks/{b}"] = recorded.quantised(record.masks[b][: recorded.MASKS])
        scores, classes = record.scores[b], len(np.unique(record.labels[b]))
        print(
            f"{version}: {len(scores)} detections, {classes} classes,"
            f" scores {scores.min():.3f} to {scores.max():.3f}"
        )
    return numbers


def backward(version: str) -> dict[str, np.ndarray]:
    model = peers.build(
        version,
        depth=recorded.DEPTH,
        classes=recorded.CLASSES,
        rpn_post_nms_top_n_train=recorded.PROPOSALS["train"],
        rpn_batch_size_per_image=10**6,
        box_batch_size_per_image=10**6,
    )
    shapes = peers.shapes(model)
    images, truth = recorded.scenes()
    peers.load(model, recorded.training_tensors(shapes))
    peers.settle_gates(model, images, truth, seed=0)
    state = peers.tensors(model)
    settled = np.concatenate([state[name] for name in recorded.settled_names(shapes)]).astype(
        np.float16
    )
    peers.load(model, recorded.training_tensors(shapes, settled))
    record = peers.train(model, images, truth)
    numbers = {
        "settled": settled,
        "loss_names": np.array(list(record.losses)),
        "losses": np.array(list(record.losses.values()), np.float32),
    }
    for b in range(len(images)):
        numbers[f"sample_boxes/{b}"] = record.boxes[b]
        numbers[f"sample_labels/{b}"] = record.labels[b].astype(np.int32)
        numbers[f"sample_deltas/{b}"] = record.deltas[b]
        numbers[f"mask_targets/{b}"] = recorded.quantised(record.mask_targets[b])
    config = model_config(version, depth=recorded.DEPTH, classes=recorded.CLASSES)
    gradients = gradients_of(version, config, record.gradients, shapes)
    numbers["gradient_paths"] = np.array(list(gradients))
    numbers["gradient_norms"] = np.array(
        [np.linalg.norm(gradient) for gradient in gradients.values()], np.float32
    )
    numbers["gradient_sketches"] = np.array(
        [sketch(path, gradient) for path, gradient in gradients.items()], np.float32
    )
    print(version, record.losses, "foreground", [len(targets) for targets in record.mask_targets])
    return numbers


if __name__ == "__main__":
    for version in ("v1", "v2"):
        path = recorded.file(version)
        np.savez_compressed(path, **forward(version), **backward(version))
        print(f"{path}: {path.stat().st_size} bytes")
