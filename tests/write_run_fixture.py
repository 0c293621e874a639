"""A small run of this version, kept so that later versions are tested to load it.

    python -m tests.write_run_fixture      # in the repository's root: writes tests/fixtures/run_v1/
    anew

Only when runs of the kept kind are given up on purpose: a later format gets a folder of its own
beside it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mrcnn_jax.config.schema import Config, OptimizerConfig
from mrcnn_jax.inference.predictor import Predictor, batch_of_one
from mrcnn_jax.runs.arrays import flatten
from mrcnn_jax.runs.checkpoints import Checkpoints
from mrcnn_jax.runs.metrics import read_metrics
from mrcnn_jax.runs.run import load_run
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.training.optimizer import make_optimizer

FOLDER = Path(__file__).parent / "fixtures" / "run_v1"
EXPECTED = "expected.json"
EPOCHS = 4
STEPS = 6 * EPOCHS  # of each stage
LIMIT = 300_000  # bytes


def get_config() -> Config:
    from tests import tiny

    config = tiny.get_config()
    model = config.model
    model = replace(
        model,
        fpn_channels=8,
        resnet=replace(model.resnet, width=2),
        box_head=replace(model.box_head, hidden=8, pool_size=3),
        mask_head=replace(model.mask_head, channels=4, pool_size=4),
    )
    adam = OptimizerConfig(name="adam", learning_rate=5e-3, clip_norm=10.0, weight_decay=1e-4)
    stages = tuple(replace(stage, epochs=EPOCHS, optimizer=adam) for stage in config.stages)
    return replace(config, name="run_v1", model=model, stages=stages, validate_every_epochs=EPOCHS)


def seen(run: Path) -> dict[str, Any]:
    """The predictions of the newest checkpoint on an image of stripes: sorted, since scores of so
    small a network are close together."""
    restored = load_run(run)
    y, x = np.mgrid[:96, :120]
    image = np.stack([(x * 5 + y) % 256, (y * 3) % 256, (x * y // 16) % 256], axis=2).astype(
        np.uint8
    )
    prediction = Predictor(restored)(batch_of_one(image, restored.config.data))
    found = prediction.detections
    return {
        "proposal_scores": np.sort(
            prediction.proposals.scores[prediction.proposals.valid]
        ).tolist(),
        "scores": np.sort(found.scores[found.valid]).tolist(),
        "boxes": np.sort(found.boxes[found.valid], axis=0).tolist(),
        "mask_means": np.sort(found.masks[found.valid].mean(axis=(1, 2))).tolist(),
    }


def digest(run: Path) -> str:
    """SHA-256 of all that training goes on from, restored in full from the run's newest
    checkpoint."""
    checkpoints = Checkpoints(run, keep=1)
    meta = checkpoints.latest()
    assert meta is not None
    variables = checkpoints.restore_weights(meta)["raw"]
    params, batch_stats = variables["params"], variables["batch_stats"]
    opt_state = make_optimizer(
        load_run(run).config.stages[meta.stage_index], params, total_steps=STEPS
    ).init(params)
    state = checkpoints.restore(
        TrainState(params, batch_stats, opt_state, jnp.int32(0), jnp.zeros(2, jnp.uint32)), meta
    )
    total = hashlib.sha256()
    for path, leaf in sorted(flatten(state).items()):
        array = np.asarray(leaf)
        total.update(f"{path} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return total.hexdigest()


def main() -> None:
    from mrcnn_jax.training.loop import train
    from tests import tiny

    with tempfile.TemporaryDirectory() as temporary:
        data, run = Path(temporary) / "data", Path(temporary) / "run"
        tiny.write_data(data)
        config = get_config()
        train(replace(config, data=replace(config.data, root=str(data))), run)
        shutil.rmtree(FOLDER, ignore_errors=True)
        FOLDER.mkdir(parents=True)
        for name in ("config.json", "metrics.jsonl"):
            shutil.copy(run / name, FOLDER)
        newest = max((run / "checkpoints").iterdir())  # one is enough, and small
        shutil.copytree(newest, FOLDER / "checkpoints" / newest.name)
    rows = read_metrics(FOLDER)
    expected = {"sha256": digest(FOLDER), "rows": len(rows), "last": rows[-1], "seen": seen(FOLDER)}
    (FOLDER / EXPECTED).write_text(json.dumps(expected, indent=1) + "\n")
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(f"{FOLDER}: {size:,} bytes")
    assert size < LIMIT


if __name__ == "__main__":
    main()
