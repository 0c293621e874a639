"""Times prediction, ours beside torchvision's maskrcnn_resnet50_fpn.

    python benchmarks/inference.py [--batch 1] [--canvas 800 1088] [--dtype bfloat16]

Same weights and images, 1000 proposals, 100 detections, 28 x 28 masks. torchvision is the faster of
its default and its channels-last form, and does not paste its masks into the image
(benchmarks/ops.py times that). Needs no data set; without torch, ours is timed alone. The last line
is JSON, as in benchmarks/train_step.py.
"""

from __future__ import annotations

import argparse
import functools
import json
from typing import Any

import sides
import workload


def ours(arguments: argparse.Namespace) -> sides.Side:
    import jax

    from mrcnn_jax.models.mask_rcnn import MaskRCNN

    config, variables, batch = workload.network(arguments)
    variables, batch = jax.device_put((variables, batch))
    facts: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "matrix_tflops": workload.matrix_tflops(arguments.dtype),
    }
    program, numbers = workload.compiled(MaskRCNN(config).apply, variables, batch)
    facts |= numbers

    def run() -> None:
        found = jax.device_get(program(variables, batch).detections)
        facts["detections"] = found.valid.sum(axis=1).tolist()

    return sides.Side({"predict": run}, facts)


def torchvision(arguments: argparse.Namespace, *, channels_last: bool) -> sides.Side:
    import torch

    model, images, _ = workload.peer(arguments, channels_last=channels_last)
    model.eval()
    model.transform.postprocess = lambda result, *_: result  # which pastes
    facts: dict[str, Any] = {}

    def run() -> None:
        with (
            torch.no_grad(),
            torch.autocast(
                images[0].device.type, torch.bfloat16, enabled=arguments.dtype == "bfloat16"
            ),
        ):
            found = model([image / 255 for image in images])
        facts["detections"] = [len(image["masks"].cpu()) for image in found]

    return sides.Side({"predict": run}, facts)


SIDES = {
    sides.OURS: ours,
    "torchvision": functools.partial(torchvision, channels_last=False),
    "torchvision_channels_last": functools.partial(torchvision, channels_last=True),
}


def main() -> None:
    parser = sides.parser(__doc__, rounds=5)
    workload.add_options(parser, batch=1, objects=8)
    arguments = parser.parse_args()
    times = sides.compare(SIDES, arguments)
    result = sides.machine(arguments, ["batch", "canvas", "dtype"])
    facts = {name: t.facts for name, t in times.items()}
    if sides.OURS in times:
        row = sides.ratios(times, "predict")
        rate = facts[sides.OURS]["gflop"] / 1e3 / row["ours_seconds"]
        result |= row | {
            "tflops": round(rate, 3),
            "share_of_matrix_rate": round(rate / facts[sides.OURS]["matrix_tflops"], 3),
        }
    print(json.dumps(result | {"facts": facts}))


if __name__ == "__main__":
    main()
