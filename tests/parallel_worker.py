"""Jobs that tests/test_parallel.py runs in other processes: `python parallel_worker.py JOBS
[INDEX]`, with a JSON list of jobs.

A job trains a config in a folder, evaluates the run there, or tells by which operations its devices
exchange numbers. With INDEX this process is one of two, on the port that is in $PORT.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from mrcnn_jax import parallel
from mrcnn_jax.commands import eval as evaluation
from mrcnn_jax.config.files import from_dict
from mrcnn_jax.config.schema import DistributedConfig, ParamGroup
from mrcnn_jax.config.tables import joint
from mrcnn_jax.data.loader import load, open_split, plan_once
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.models.mask_rcnn import MaskRCNN
from mrcnn_jax.runs.run import load_run
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.training.loop import train
from mrcnn_jax.training.optimizer import make_optimizer
from mrcnn_jax.training.step import make_train_step


def collectives(workdir: Path) -> None:
    """Prints the kinds of operations between devices in a compiled step of the run's whole network:
    all losses, all parameters trained."""
    run = load_run(workdir)
    (stage,), mesh = joint((ParamGroup(".*"),), epochs=1), parallel.data_mesh()
    model = MaskRCNN(run.config.model)
    assert mesh is not None
    params = run.variables["params"]
    optimizer = make_optimizer(stage, params, total_steps=20)
    state = TrainState(
        params,
        run.variables["batch_stats"],
        optimizer.init(params),
        jnp.int32(0),
        jax.random.key_data(jax.random.key(0)),
    )
    data = run.config.data
    dataset = read_coco(Path(data.train_annotations), Path(data.train_images), data)
    split = open_split("train", dataset, cache=Path(str(data.cache)), data=data)
    batch = next(load(split, plan_once(split, mesh.size), data))
    step = jax.jit(
        make_train_step(model, stage, params, optimizer, mesh),
        in_shardings=(parallel.replicated(mesh), parallel.by_rows(mesh)),
        out_shardings=parallel.replicated(mesh),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    text = step.lower(state, batch).compile().as_text()
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
    found = [kind for kind in kinds if re.search(rf" {kind}(-start)?\(", text)]
    print(f"collectives: {json.dumps(found)}", flush=True)


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
