"""Jobs that tests/test_parallel.py runs in other processes: `python parallel_worker.py JOBS
[INDEX]`, with a JSON list of jobs.

A job trains a config in a folder, evaluates the run there, tells by which operations its devices
exchange numbers, or how far a depth head's step on them is from that of one. With INDEX this
process is one of two, on the port that is in $PORT.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mrcnn_jax import parallel
from mrcnn_jax.commands import eval as evaluation
from mrcnn_jax.config.files import from_dict
from mrcnn_jax.config.heads import DepthHeadConfig
from mrcnn_jax.config.optional_heads import with_depth
from mrcnn_jax.config.schema import DistributedConfig, ParamGroup, StageConfig
from mrcnn_jax.config.tables import joint
from mrcnn_jax.data.loader import load, open_split, plan_once
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.models.initialise import initialise
from mrcnn_jax.models.mask_rcnn import MaskRCNN, Variables, example_batch
from mrcnn_jax.runs.run import load_run
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.structures import DEPTH_STRIDE, Batch
from mrcnn_jax.training.loop import train
from mrcnn_jax.training.optimizer import make_optimizer
from mrcnn_jax.training.step import make_train_step


def compiled_step(
    model: MaskRCNN, stage: StageConfig, variables: Variables, batch: Batch, mesh: Mesh | None
) -> tuple[jax.stages.Compiled, TrainState]:
    """A training step and its first state; without `mesh`, on one device."""
    params = variables["params"]
    optimizer = make_optimizer(stage, params, total_steps=20)
    statistics, key = variables.get("batch_stats", {}), jax.random.key_data(jax.random.key(0))
    state = TrainState(params, statistics, optimizer.init(params), jnp.int32(0), key)
    spread: dict[str, Any] = {}
    if mesh is not None:
        everywhere = parallel.replicated(mesh)
        spread = {
            "in_shardings": (everywhere, parallel.by_rows(mesh)),
            "out_shardings": everywhere,
        }
    step = make_train_step(model.clone(mesh=mesh), stage, params, optimizer)
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(step, **spread, compiler_options=options).lower(state, batch).compile(), state


def exchanges(step: jax.stages.Compiled) -> list[str]:
    """The kinds of operations between devices in a compiled step."""
    text = step.as_text()
    kinds = (
        "all-reduce",
        "all-gather",
        "all-to-all",
        "collective-permute",
        "collective-broadcast",
        "reduce-scatter",
        "send",
        "recv",
    )
    return [kind for kind in kinds if re.search(rf" {kind}(-start)?\(", str(text))]


def collectives(workdir: Path) -> None:
    """Prints what devices exchange in a step of the run's whole network, all losses, all parameters
    trained; and for a depth head of each kind the same of its stage, and how far its loss is from
    the loss of one device, relatively."""
    run, mesh = load_run(workdir), parallel.data_mesh()
    assert mesh is not None
    data = run.config.data
    dataset = read_coco(Path(data.train_annotations), Path(data.train_images), data)
    split = open_split("train", dataset, cache=Path(str(data.cache)), data=data)
    batch = next(load(split, plan_once(split, mesh.size), data))
    (stage,) = joint((ParamGroup(".*"),), epochs=1)
    step, _ = compiled_step(MaskRCNN(run.config.model), stage, run.variables, batch, mesh)
    print(f"collectives: {json.dumps(exchanges(step))}", flush=True)

    height, width = (side // DEPTH_STRIDE for side in batch.images.shape[1:3])
    metres = np.random.default_rng(0).uniform(-1, 3, (mesh.size, height, width))
    batch = batch.replace(depth=np.maximum(metres, 0).astype(np.float32))
    for kind in ("dense", "roi"):
        model = MaskRCNN(replace(run.config.model, depth_head=DepthHeadConfig(kind, channels=32)))
        variables = initialise(model, example_batch(batch.images.shape[1:3]), seed=0)
        stage = with_depth(run.config.stages)[-1]
        step, state = compiled_step(model, stage, variables, batch, mesh)
        alone, _ = compiled_step(model, stage, variables, batch, None)
        ours, expected = (float(each(state, batch)[1]["loss/depth"]) for each in (step, alone))
        found = {"exchanges": exchanges(step), "error": abs(ours / expected - 1)}
        print(f"depth {kind}: {json.dumps(found)}", flush=True)


def main() -> None:
    if len(sys.argv) > 2:
        parallel.join(
            DistributedConfig(
                coordinator=f"127.0.0.1:{os.environ['PORT']}", processes=2, index=int(sys.argv[2])
            )
        )
    for job in json.loads(Path(sys.argv[1]).read_text()):
        workdir = Path(job["workdir"])
        print(f"== {workdir.name}", flush=True)
        if "config" in job:
            train(from_dict(job["config"]), workdir)
        elif "collectives" in job:
            collectives(workdir)
        else:
            evaluation.run(evaluation.Arguments(workdir=workdir, figures=0, out=Path(job["out"])))


if __name__ == "__main__":
    main()
