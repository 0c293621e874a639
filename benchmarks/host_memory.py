"""Checks that training does not leak host memory: its resident size after each of many epochs.

    python benchmarks/host_memory.py [--epochs 40] [--images 100]

Trains a tiny network in a process of its own, with validation, curves and a checkpoint every epoch,
and reads the resident size of the process (Linux, without mapped files) at the end of each epoch
after ten. Prints one JSON line: the sizes in MiB, and `percent_in_10_epochs`, the rise of a
straight line through them in ten epochs, in percent of their mean. Exit status 0 if that is under
1.

The size is a sawtooth, since the allocator returns memory only every ten epochs or so: hence the
line through many, and MALLOC_ARENA_MAX=1, without which glibc spreads free memory over an arena per
loader thread.

This file is also the config of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package need not be installed

from mrcnn_jax.config.files import load_config_file  # noqa: E402
from mrcnn_jax.config.schema import Config  # noqa: E402
from mrcnn_jax.datasets.shapes import write_shapes  # noqa: E402

WARM_UP = 10


def get_config() -> Config:
    config = load_config_file(ROOT / "tests" / "tiny.py")
    return replace(config, name="host_memory", stages=config.stages[:1])


def resident_mib(process: int) -> float:
    """Returns the resident size of a process without mapped files, which the system pages out."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--images", type=int, default=100)
    arguments = parser.parse_args()
    sizes: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_shapes(folder / "data", train=arguments.images, val=20)
        options = {
            "--config": __file__,
            "--data.root": folder / "data",
            "--workdir": folder / "run",
            "--stages.0.epochs": WARM_UP + arguments.epochs + 1,
            "--save-every-steps": -(-arguments.images // get_config().data.batch_size),
        }
        command = [sys.executable, str(ROOT / "train.py")]
        command += [str(word) for option in options.items() for word in option]
        timing = folder / "run" / "timing.jsonl"
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, env={**os.environ, "MALLOC_ARENA_MAX": "1"}
        )
        while process.poll() is None and len(sizes) < WARM_UP + arguments.epochs:
            if timing.exists() and timing.read_text().count("\n") > len(sizes):
                sizes.append(resident_mib(process.pid))
                print(f"epoch {len(sizes)}: {sizes[-1]:.1f} MiB", file=sys.stderr, flush=True)
            time.sleep(0.005)
        process.kill()
        process.wait()
    sizes = sizes[WARM_UP:]
    if len(sizes) < arguments.epochs:
        sys.exit("error: the run ended too soon")
    slope = float(np.polyfit(np.arange(len(sizes)), sizes, 1)[0])
    percent = 100 * 10 * slope / float(np.mean(sizes))
    result = {
        "epochs": len(sizes),
        "resident_mib": [round(size, 1) for size in sizes],
        "percent_in_10_epochs": round(percent, 3),
    }
    print(json.dumps(result))
    sys.exit(0 if percent < 1 else 1)


if __name__ == "__main__":
    main()
