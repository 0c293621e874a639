"""Shared by the tests of whole runs: what they leave behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from mrcnn_jax.config.schema import Config
from mrcnn_jax.runs.checkpoints import Checkpoints
from mrcnn_jax.runs.meta import Meta

ROOT = Path(__file__).parents[2]
KINDS = ("params", "batch_stats")
ENDS = {
    "00000012-rpn",
    "00000018-box",
    "00000024-mask",
}  # the checkpoints that end the tiny run's stages


def arrays(checkpoint: Path) -> dict[str, np.ndarray]:
    """Everything in a checkpoint, as it lies on the disk: parameters, batch statistics, optimiser
    state, step and key."""
    reader = ocp.PyTreeCheckpointer()
    return {
        path: np.asarray(leaf)
        for item in ("model", "training")
        for path, leaf in reader.restore(checkpoint / item).items()
    }


def assert_same_bits(run: Path, reference: Path) -> None:
    """All that two runs leave behind, but the times."""
    assert (run / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
    for name in ENDS:
        ours, theirs = arrays(run / "checkpoints" / name), arrays(reference / "checkpoints" / name)
        assert ours.keys() == theirs.keys()
        kinds = {path.split("/")[0] for path in ours}
        assert kinds == {"params", "batch_stats", "opt_state", "step", "skipped", "key"}
        different = [
            path
            for path in ours
            if (ours[path].dtype, ours[path].tobytes())
            != (theirs[path].dtype, theirs[path].tobytes())
        ]
        assert different == []
        meta, other = (
            json.loads((folder / "checkpoints" / name / "meta.json").read_text())
            for folder in (run, reference)
        )
        assert meta == other


def latest(run: Path) -> Meta:
    meta = Checkpoints(run, keep=1).latest()
    assert meta is not None
    return meta


def script(config: Config) -> list[str]:
    """train.py with the config and the data of the tiny run."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(ROOT / "tests" / "tiny.py")]
    return [*command, "--data.root", str(config.data.root), "--data.cache", str(config.data.cache)]
