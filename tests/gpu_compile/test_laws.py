"""Programs compiled for an H100 that is not there, held to what makes them fast and exact.

`make gpu-compile` installs XLA's CUDA plugin outside of the environment, and tells where.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mrcnn_jax.config.files import load_config_file
from mrcnn_jax.models.rpn import pyramid_anchors

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "tests" / "gpu_compile" / "small.py"


def compiled(*options: str) -> dict[str, Any]:
    """The facts of the one program that benchmarks/gpu_compile.py compiles for `small.py`."""
    plugin = os.environ.get("MRCNN_CUDA_PLUGIN")
    if not plugin:
        pytest.skip("$MRCNN_CUDA_PLUGIN is not set: see `make gpu-compile`")
    command = [sys.executable, "benchmarks/gpu_compile.py", "--config", str(SMALL), *options]
    environment = os.environ | {"PYTHONPATH": plugin}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    facts: dict[str, Any] = json.loads(line)
    return facts


def holds(facts: dict[str, Any], *, relus: int) -> None:
    """What holds for every program.

    Args:
        facts: of the program.
        relus: convolutions that have a ReLU: it is theirs, bias and residual sum included.
    """
    assert facts["relus_apart"] == []
    assert facts["convolutions"]["forward"]["Relu"] == relus
    assert facts["convolutions"]["float32"] == 0
    assert facts["float32_products_in_tf32"] == []
    assert facts["host_loops"] == 0
    assert facts["device_loops"] > 0  # the search does find loops
    assert facts["cas_loops"] in (0, None)
    config = load_config_file(SMALL)
    anchors = pyramid_anchors(config.model.rpn, (256, 320), config.model.strides)
    assert 0 < facts["largest_sort"] <= sum(map(len, anchors))


# Of ResNet-50: the stem, three in each of 16 blocks. Of the RPN: one on each of five levels. Of the
# mask head: two, and the transposed one.
RESNET, RPN, MASK = 49, 5, 3


def test_a_joint_step() -> None:
    holds(compiled("--stages", "joint"), relus=RESNET + RPN + MASK)


# xdist hands these out by twos, in this order: a joint step and a smaller program each.
def test_prediction() -> None:
    facts = compiled("--stages", "--predict", "1")
    holds(facts, relus=RESNET + RPN + MASK)
    assert facts["convolutions"]["backward"] == 0


def test_a_deterministic_step() -> None:
    """Without a sort of what RoIAlign sums: only what the sampling sorts anyway."""
    facts = compiled("--stages", "joint", "--deterministic")
    holds(facts, relus=RESNET + RPN + MASK)
    assert facts["sorted_mb"] < 4


def test_a_stage_on_frozen_features() -> None:
    """No backward pass but that of the box head's products."""
    facts = compiled("--stages", "box")
    holds(facts, relus=RESNET + RPN)
    assert facts["convolutions"]["backward"] == 0
