"""Times a joint training step, ours beside torchvision's maskrcnn_resnet50_fpn.

    python benchmarks/train_step.py [--load full|typical] [--batch 2] [--canvas 800 1088] [--stages]

Both have the same weights, images, layers and numbers of samples. res3 to res5 and all heads are
trained (SGD with momentum); there are up to 2000 proposals and 512 RoIs per image. Under full load
128 of them have masks: there are 64 objects, and an IoU of 0.3 with one is enough for foreground,
so that random proposals yield as many. Under typical load there are 8 objects and the usual 0.5;
`mask_rois` says how many masks torchvision then computes. --stages also times our three stages of
`config.tables.staged` with the report's constants. torchvision is the faster of its default and its
channels-last form; its masks are full-sized, ours are crops. Needs no data set; without torch, ours
is timed alone.

The last line is JSON: medians in seconds, `ratio` (above 1: ours is faster), compile seconds
without and with the persistent cache, peak memory of each process, and our FLOP rate beside that of
a large matrix product.
"""

from __future__ import annotations

import argparse
import functools
import json
from dataclasses import replace
from statistics import median
from typing import Any

import sides
import workload

# --load: objects in each image, IoU of foreground
LOADS = {"full": (64, 0.3), "typical": (8, 0.5)}
LEARNING_RATE = 1e-9  # keeps the seeded weights, which would soon diverge at a real rate


def ours(arguments: argparse.Namespace) -> sides.Side:
    import jax

    from mrcnn_jax.config.model import ModelConfig
    from mrcnn_jax.config.schema import ParamGroup
    from mrcnn_jax.config.tables import joint, staged
    from mrcnn_jax.models.mask_rcnn import MaskRCNN
    from mrcnn_jax.runs.state import TrainState
    from mrcnn_jax.training.optimizer import make_optimizer
    from mrcnn_jax.training.step import make_train_step

    config, variables, batch = workload.network(arguments)
    foreground = LOADS[arguments.load][1]
    config = replace(config, box_head=replace(config.box_head, foreground_iou=foreground))
    heads = tuple(ParamGroup(f"{head}/.*") for head in ("fpn", "rpn", "box_head", "mask_head"))
    frozen = ("resnet/(stem|layer1)/.*", "resnet/layer[234]/.*/(scale|bias)")
    plans = {
        "joint": (
            config,
            variables,
            joint((ParamGroup("resnet/layer[234]/.*/kernel"), *heads), frozen, epochs=1)[0],
        )
    }
    if arguments.stages:
        from mrcnn_jax.models.initialise import initialise
        from mrcnn_jax.models.mask_rcnn import example_batch

        report = ModelConfig(num_classes=config.num_classes, compute_dtype=arguments.dtype)
        start = initialise(MaskRCNN(report), example_batch((64, 64)), seed=0)
        plans |= {stage.name: (report, start, stage) for stage in staged(pretrained=True)}
    batch = jax.device_put(batch)
    facts: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "matrix_tflops": functools.partial(workload.matrix_tflops, arguments.dtype),
    }
    runs = {}
    for name, (model_config, start, stage) in plans.items():
        params, batch_stats = start["params"], start.get("batch_stats", {})
        optimizer = make_optimizer(
            replace(stage, optimizer=replace(stage.optimizer, learning_rate=LEARNING_RATE)),
            params,
            total_steps=1000,
        )
        key = jax.random.key_data(jax.random.key(0))
        state = TrainState(params, batch_stats, optimizer.init(params), jax.numpy.int32(0), key)
        state = jax.tree.map(jax.numpy.array, state)
        step = make_train_step(MaskRCNN(model_config), stage, params, optimizer)
        program, facts[name] = workload.compiled(step, state, batch, donate_argnums=0)
        runs[name] = _runner(program, state, batch, facts[name])
    return sides.Side(runs, facts)


def _runner(program: Any, state: Any, batch: Any, facts: dict[str, Any]) -> Any:
    """Returns a function that makes a step from the state that the last one left."""
    import jax

    def run() -> None:
        nonlocal state
        state, metrics = program(state, batch)
        facts["losses"] = {
            name: round(float(value), 4) for name, value in jax.device_get(metrics).items()
        }

    return run


def torchvision(arguments: argparse.Namespace, *, channels_last: bool) -> sides.Side:
    import torch

    foreground = LOADS[arguments.load][1]
    constants = {"box_fg_iou_thresh": foreground, "box_bg_iou_thresh": foreground}
    model, images, targets = workload.peer(arguments, channels_last=channels_last, **constants)
    model.train()
    for name, parameter in model.backbone.body.named_parameters():
        parameter.requires_grad_(not name.startswith(("conv1", "layer1")))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
    facts: dict[str, Any] = {}
    rows: list[int] = []
    model.roi_heads.mask_head.register_forward_pre_hook(
        lambda _, inputs: rows.append(len(inputs[0]))
    )

    def run() -> None:
        with torch.autocast(
            images[0].device.type, torch.bfloat16, enabled=arguments.dtype == "bfloat16"
        ):
            losses = model([image / 255 for image in images], targets)
            total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        facts["losses"] = {name: round(value.item(), 4) for name, value in losses.items()}
        facts["mask_rois"] = rows[-1]
        workload.finish()

    return sides.Side({"joint": run}, facts)


SIDES = {
    sides.OURS: ours,
    "torchvision": functools.partial(torchvision, channels_last=False),
    "torchvision_channels_last": functools.partial(torchvision, channels_last=True),
}


def main() -> None:
    parser = sides.parser(__doc__, rounds=3)
    workload.add_options(parser, batch=2)
    parser.add_argument("--load", choices=tuple(LOADS), default="full")
    parser.add_argument(
        "--stages", action="store_true", help="time the steps of the report's three stages too"
    )
    arguments = parser.parse_args()
    arguments.objects = arguments.objects or LOADS[arguments.load][0]
    times = sides.compare(SIDES, arguments)
    result = sides.machine(arguments, ["load", "batch", "canvas", "objects", "dtype"])
    facts = {name: t.facts for name, t in times.items()}
    if sides.OURS in times:
        joint = sides.ratios(times, "joint")
        rate = facts[sides.OURS]["joint"]["gflop"] / 1e3 / joint["ours_seconds"]
        result |= joint | {
            "tflops": round(rate, 3),
            "share_of_matrix_rate": round(rate / facts[sides.OURS]["matrix_tflops"], 3),
        }
        seconds = {
            run: median(values)
            for run, values in times[sides.OURS].seconds.items()
            if run != "joint"
        }
        result["stages"] = {
            run: {"seconds": round(s, 4), "joint_over_it": round(joint["ours_seconds"] / s, 2)}
            for run, s in seconds.items()
        }
    print(json.dumps(result | {"facts": facts}))


if __name__ == "__main__":
    main()
