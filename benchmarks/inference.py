"""Times prediction, ours beside torchvision's maskrcnn_resnet50_fpn and what is made of it.

    python benchmarks/inference.py [--batch 1] [--canvas 800 1088] [--dtype bfloat16]

Same weights and images, 1000 proposals, 100 detections, 28 x 28 masks. torchvision is the faster of
its default and its channels-last form, and does not paste its masks into the image
(benchmarks/ops.py times that). Where they are installed, OpenVINO and ONNX Runtime compute the same
network, converted from torchvision's, at batch 1 in float32; conversion takes minutes. Needs no
data set; without torch, ours is timed alone. The last line is JSON, as in benchmarks/train_step.py,
with `ratios` to each of the others, and the score and box of each side's best detection.
"""

from __future__ import annotations

import argparse
import functools
import json
from statistics import median
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
        "matrix_tflops": functools.partial(workload.matrix_tflops, arguments.dtype),
    }
    program, numbers = workload.compiled(MaskRCNN(config).apply, variables, batch)
    facts |= numbers

    def run() -> None:
        found = jax.device_get(program(variables, batch).detections)
        facts["detections"] = found.valid.sum(axis=1).tolist()
        facts["best"] = _best(found.boxes[0], found.scores[0])

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
        facts["best"] = _best(found[0]["boxes"].cpu(), found[0]["scores"].cpu())

    return sides.Side({"predict": run}, facts)


def _best(boxes: Any, scores: Any) -> list[float]:
    """Returns score and box (pixels) of the first detection."""
    return [round(float(number), 4) for number in (scores[0], *boxes[0])]


def _exportable(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Returns torchvision's network with tensors in and out, and its image."""
    import torch

    if arguments.batch > 1 or arguments.dtype != "float32":
        raise ImportError("converted networks are timed at batch 1 in float32")
    model, images, _ = workload.peer(arguments, channels_last=False)
    model.eval()
    model.transform.postprocess = lambda result, *_: result

    class Tensors(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
            (found,) = self.model([image])
            return tuple(found[name] for name in ("boxes", "labels", "scores", "masks"))

    return Tensors(), images[0] / 255


def openvino(arguments: argparse.Namespace, *, hint: str) -> sides.Side:
    import openvino

    network, image = _exportable(arguments)
    converted = openvino.convert_model(network, example_input=(image,))
    # Its default for CPUs with bfloat16 or float16 units is not float32.
    options = {"PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": "f32"}
    program = openvino.compile_model(converted, "CPU", options)
    facts: dict[str, Any] = {}

    def run() -> None:
        boxes, _, scores, masks = program([image.numpy()]).values()
        facts["detections"] = [len(masks)]
        facts["best"] = _best(boxes, scores)

    return sides.Side({"predict": run}, facts)


def onnxruntime(arguments: argparse.Namespace) -> sides.Side:
    import io

    import onnxruntime
    import torch

    network, image = _exportable(arguments)
    file = io.BytesIO()
    torch.onnx.export(network, (image,), file, opset_version=17, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    facts: dict[str, Any] = {}

    def run() -> None:
        boxes, _, scores, masks = session.run(None, {name: image.numpy()})
        facts["detections"] = [len(masks)]
        facts["best"] = _best(boxes, scores)

    return sides.Side({"predict": run}, facts)


SIDES = {
    sides.OURS: ours,
    "torchvision": functools.partial(torchvision, channels_last=False),
    "torchvision_channels_last": functools.partial(torchvision, channels_last=True),
    "openvino": functools.partial(openvino, hint="LATENCY"),
    "openvino_throughput": functools.partial(openvino, hint="THROUGHPUT"),
    "onnxruntime": onnxruntime,
}


def main() -> None:
    parser = sides.parser(__doc__, rounds=5)
    workload.add_options(parser, batch=1, objects=8)
    arguments = parser.parse_args()
    times = sides.compare(SIDES, arguments)
    result = sides.machine(arguments, ["batch", "canvas", "dtype"])
    facts = {name: t.facts for name, t in times.items()}
    if sides.OURS in times:
        seconds = median(times[sides.OURS].seconds["predict"])
        rate = facts[sides.OURS]["gflop"] / 1e3 / seconds
        result |= {
            "tflops": round(rate, 3),
            "share_of_matrix_rate": round(rate / facts[sides.OURS]["matrix_tflops"], 3),
            "ratios": {
                peer: sides.ratios(
                    {name: t for name, t in times.items() if name.startswith((sides.OURS, peer))},
                    "predict",
                )
                for peer in dict.fromkeys(
                    name.split("_")[0] for name in times if name != sides.OURS
                )
            },
        }
    print(json.dumps(result | {"facts": facts}))


if __name__ == "__main__":
    main()
