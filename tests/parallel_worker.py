"""What tests/test_parallel.py runs in processes of its own: `python parallel_worker.py JOBS [INDEX]`, with a JSON list of jobs.

A job trains a config in a folder, or evaluates the run there. With INDEX this process is one of two, on the port that is in $PORT.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from mrcnn_jax import parallel
from mrcnn_jax.config import DistributedConfig, from_dict
from mrcnn_jax.evaluation.run import evaluate_run
from mrcnn_jax.training.loop import train


def main() -> None:
    if len(sys.argv) > 2:
        parallel.join(DistributedConfig(coordinator=f"127.0.0.1:{os.environ['PORT']}", processes=2, index=int(sys.argv[2])))
    for job in json.loads(Path(sys.argv[1]).read_text()):
        workdir = Path(job["workdir"])
        print(f"== {workdir.name}", flush=True)
        if "config" in job:
            train(from_dict(job["config"]), workdir)
        else:
            evaluate_run(workdir, figures=0, out=Path(job["out"]))


if __name__ == "__main__":
    main()
