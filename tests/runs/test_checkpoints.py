"""Checkpoints: bit for bit through the disk, and nothing but whole ones."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrcnn_jax import __version__
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import Config, OptimizerConfig, ParamGroup, StageConfig
from mrcnn_jax.runs import manifest
from mrcnn_jax.runs.checkpoints import Checkpoints
from mrcnn_jax.runs.environment import environment
from mrcnn_jax.runs.meta import Meta
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.training import stages
from mrcnn_jax.training.optimizer import apply_gradients, make_optimizer

STAGE = StageConfig(
    name="rpn",
    losses=("rpn",),
    train=(ParamGroup("rpn/.*"), ParamGroup("fpn/.*", 0.1)),
    frozen=("resnet/.*",),
    optimizer=OptimizerConfig(weight_decay=0.1, clip_norm=1.0, schedule="cosine", warmup_steps=1),
)
KEY = np.array([0xFFFFFFFF, 0x80000001], np.uint32)


def train(steps: int = 3) -> TrainState:
    """A state after real updates, with values whose bits are easily lost: -0.0, NaN payloads,
    subnormals, bfloat16."""
    odd = np.array([0x80000000, 0x7FC00001, 0x00000001, 0xFF800000], np.uint32).view(np.float32)
    params = {
        "resnet": {"conv1": {"kernel": jnp.asarray(odd), "zero": jnp.full(3, -0.0)}},
        "fpn": {"kernel": jnp.linspace(0.0, 1.0, 7)},
        "rpn": {"conv": {"kernel": jnp.ones((2, 3)), "half": jnp.full(3, -0.0, jnp.bfloat16)}},
    }
    optimizer = make_optimizer(STAGE, params, total_steps=10)
    labels = stages.labels(STAGE, params)
    opt_state = optimizer.init(params)
    for step in range(steps):
        grads = jax.tree.map(
            lambda leaf, step=step: (leaf * 0.3 + step).astype(leaf.dtype),
            stages.split(params, labels)[0],
        )
        params, opt_state = apply_gradients(optimizer, opt_state, params, grads, labels)
    batch_stats = {"rpn": {"bn": {"mean": jnp.full(3, 0.1), "var": jnp.full(3, -0.0)}}}
    return TrainState(
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        step=jnp.int32(steps),
        key=jnp.asarray(KEY),
    )


STATE = train()


def meta(
    step: int,
    stage: str = "rpn",
    *,
    complete: bool = False,
    index: int = 0,
    ap: float | None = None,
) -> Meta:
    categories = ((1, "cell"), (7, "crown"))
    return Meta(step, stage, index, step, complete, categories, "0123456789abcdef", ap=ap)


def names(run: Checkpoints) -> list[str]:
    return sorted(path.name for path in run.folder.iterdir())


def assert_same_bits(a: Any, b: Any) -> None:
    assert str(jax.tree.structure(a)) == str(jax.tree.structure(b))
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True
    ):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


@pytest.fixture
def run(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "run", keep=2)


def test_a_state_comes_back_bit_for_bit(run: Checkpoints) -> None:
    saved = meta(3, ap=0.1 + 0.2)
    run.save(STATE, saved)
    reopened = Checkpoints(run.folder.parent, keep=2)
    found = reopened.latest()
    assert found == saved
    template = jax.eval_shape(lambda: train(0))
    restored = reopened.restore(template, found)
    assert_same_bits(restored, STATE)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    assert np.array_equal(jax.random.key_data(jax.random.wrap_key_data(restored.key)), KEY)


def test_evaluation_restores_from_the_folder_alone(run: Checkpoints) -> None:
    run.save(STATE, meta(3))
    (weights,) = run.restore_weights(meta(3)).values()
    assert_same_bits(weights, {"params": STATE.params, "batch_stats": STATE.batch_stats})


def test_the_moving_average_stands_in_for_what_it_is_of(run: Checkpoints) -> None:
    ema = {"rpn": {"conv": {"kernel": jnp.full((2, 3), 0.1)}}, "fpn": {"kernel": jnp.full(7, -0.0)}}
    state = STATE.replace(ema=ema)
    run.save(state, meta(3))
    assert_same_bits(run.restore(state, meta(3)), state)
    raw, average = run.restore_weights(meta(3)).values()
    assert_same_bits(raw, {"params": STATE.params, "batch_stats": STATE.batch_stats})
    expected = {
        **STATE.params,
        "fpn": ema["fpn"],
        "rpn": {"conv": {**STATE.params["rpn"]["conv"], **ema["rpn"]["conv"]}},
    }
    assert_same_bits(average, {"params": expected, "batch_stats": STATE.batch_stats})


def test_no_batch_statistics(run: Checkpoints) -> None:
    run.save(STATE.replace(batch_stats={}), meta(3))
    assert run.restore_weights(meta(3))["raw"]["batch_stats"] == {}
    assert_same_bits(
        run.restore(STATE.replace(batch_stats={}), meta(3)), STATE.replace(batch_stats={})
    )


def test_a_restored_state_may_be_donated(run: Checkpoints) -> None:
    run.save(STATE, meta(3))
    first, second = run.restore(STATE, meta(3)), run.restore(STATE, meta(3))
    changed = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)(
        first
    )
    jax.block_until_ready(changed)
    assert_same_bits(second, STATE)


def test_a_run_without_checkpoints(run: Checkpoints) -> None:
    assert run.latest() is None
    with pytest.raises(ConfigError, match="00000003-rpn"):
        run.restore(STATE, meta(3))


def test_no_temporary_thing_is_left(run: Checkpoints) -> None:
    run.save(STATE, meta(3))
    assert names(run) == ["00000003-rpn"]
    folder = run.folder / "00000003-rpn"
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "meta.json",
        "model",
        "training",
    ]
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(listed) == {
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()
    } - {"manifest.json"}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("harm", [_truncate, _flip, _append, Path.unlink])
def test_harm_to_any_file_is_found_and_the_previous_checkpoint_taken(
    run: Checkpoints, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], None]
) -> None:
    run.save(STATE, meta(3), Config())
    run.save(STATE, meta(4), Config())
    newest = run.folder / "00000004-rpn"
    whole = run.folder.parent / "whole"
    shutil.copytree(newest, whole)
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    assert len(files) > 10
    assert {"config.json", "manifest.json", "meta.json"} < {str(file) for file in files}
    for file in files:
        harm(newest / file)
        caplog.clear()
        found = run.latest()
        assert found is not None, file
        assert found.step == 3, file
        (record,) = caplog.records
        assert "\n" not in record.getMessage()
        # A changed hash in the manifest looks like a changed file: there the message can only
        # name the checkpoint for sure.
        assert str(newest if file.name == "manifest.json" else newest / file) in record.getMessage()
        with pytest.raises(ConfigError, match="00000004-rpn"):
            run.restore(STATE, meta(4))
        with pytest.raises(ConfigError, match="00000004-rpn"):
            run.restore_weights(meta(4))
        shutil.rmtree(newest)
        shutil.copytree(whole, newest)
    assert run.latest() == meta(4)


def test_none_intact_is_an_error(run: Checkpoints) -> None:
    for step in (3, 4):
        run.save(STATE, meta(step))
    _flip(run.folder / meta(3).name / "meta.json")
    _truncate(run.folder / meta(4).name / "model" / "_METADATA")
    with pytest.raises(ConfigError, match="none of the 2 checkpoints is intact"):
        run.latest()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["data", "meta", "flush", "manifest", "rename"])
def test_a_save_killed_at_any_moment_leaves_the_previous_one(
    run: Checkpoints, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    run.save(STATE, meta(3))

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "data":
            patch.setattr(run._arrays, "save", die)
        elif moment == "meta":
            patch.setattr(Path, "write_text", die)
        elif moment == "flush":
            patch.setattr(manifest, "flush", die)
        else:  # of the manifest, which replaces nothing, and of the folder
            patch.setattr(Path, "replace" if moment == "manifest" else "rename", die)
        with pytest.raises(Killed):
            run.save(STATE, meta(4))
    assert len(names(run)) == 2, "the test killed nothing"
    assert run.latest() == meta(3)
    assert_same_bits(run.restore(STATE, meta(3)), STATE)
    run.save(STATE, meta(4))  # the resumed run comes by again, and cleans up
    assert names(run) == ["00000003-rpn", "00000004-rpn"]
    assert run.latest() == meta(4)


@pytest.mark.parametrize("content", [None, "", '{"files": {}}', "[]"])
def test_a_folder_without_a_manifest_is_never_removed_and_no_training_goes_on_beside_it(
    run: Checkpoints, caplog: pytest.LogCaptureFixture, content: str | None
) -> None:
    """Manifests are written last: a copy that was cut short, or leaves out *.json, lacks them."""
    run.save(STATE, meta(3))
    copied = run.folder / "00000009-rpn"
    shutil.copytree(run.folder / "00000003-rpn", copied)
    (copied / "manifest.json").unlink()
    if content is not None:
        (copied / "manifest.json").write_text(content)
    (run.folder / "notes").mkdir()
    assert run.latest() == meta(3)
    assert str(copied) in caplog.text
    with pytest.raises(ConfigError, match=r"00000009-rpn.*copy all of it again, or move it out"):
        run.refuse_incomplete()
    run.save(STATE, meta(4))
    assert names(run) == ["00000003-rpn", "00000004-rpn", "00000009-rpn", "notes"]
    with pytest.raises(ConfigError, match="00000009-rpn"):  # nor saved over
        run.save(STATE, meta(9))
    assert (copied / "model" / "_METADATA").exists()
    shutil.rmtree(run.folder / "00000003-rpn")
    shutil.rmtree(run.folder / "00000004-rpn")
    with pytest.raises(ConfigError, match=r"none of the 1 checkpoints is intact: .*manifest\.json"):
        run.latest()
    shutil.rmtree(copied)
    run.refuse_incomplete()


def test_the_config_is_the_one_that_was_saved(run: Checkpoints) -> None:
    run.save(STATE, meta(3), Config(seed=7))
    assert run.config(meta(3)) == Config(seed=7)
    run.save(STATE, meta(4))
    assert run.config(meta(4)) is None


def test_a_log_may_grow_but_not_change(run: Checkpoints) -> None:
    log = run.folder.parent / "metrics.jsonl"
    log.parent.mkdir()
    log.write_text("one\n")
    run.save(STATE, meta(3))
    log.write_text("one\ntwo\n")
    run.refuse_damaged_log(meta(3), log.name)
    run.save(STATE, meta(4))
    log.write_text("one\ntwp\n")
    run.refuse_damaged_log(meta(3), log.name)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: damaged: .* checkpoint 00000004-rpn"):
        run.refuse_damaged_log(meta(4), log.name)


def change_meta(run: Checkpoints, **fields: Any) -> dict[str, Any]:
    """Changes the meta.json of step 3, and the manifest with it; returns what it was."""
    folder = run.folder / meta(3).name
    content = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(content | fields))
    (folder / manifest.NAME).unlink()
    manifest.write(folder)
    return content


def test_what_is_no_meta_is_damaged(run: Checkpoints) -> None:
    """Also with a manifest that says so: the folder may be a stranger's."""
    run.save(STATE, meta(3))
    change_meta(run, step="3")
    with pytest.raises(ConfigError, match="none of the 1 checkpoints is intact"):
        run.latest()


def test_a_field_more_is_of_another_version(run: Checkpoints) -> None:
    """Neither damaged nor removed by the next save."""
    run.save(STATE, meta(3))
    assert change_meta(run, a=1)["environment"]["mrcnn_jax"] == __version__
    this = re.escape(f"(written by another version of mrcnn_jax? this is {__version__})")
    line = rf"meta\.json: 'a': unknown field {this}$"
    for action in (run.latest, run.best, lambda: run.save(STATE, meta(4))):
        with pytest.raises(ConfigError, match=line):
            action()
    assert (run.folder / meta(3).name).exists()


def test_retention_keeps_the_last_of_every_stage_and_the_newest_between(run: Checkpoints) -> None:
    def save(
        step: int, stage: str, index: int, *, complete: bool = False, validated: bool = True
    ) -> list[str]:
        saved = meta(step, stage, index=index, complete=complete)
        run.save(STATE, dataclasses.replace(saved, validated=validated))
        return [f"{int(name.split('-')[0])}-{name.split('-')[1]}" for name in names(run)]

    assert save(1, "rpn", 0) == ["1-rpn"]
    assert save(2, "rpn", 0) == ["1-rpn", "2-rpn"]
    assert save(3, "rpn", 0) == ["2-rpn", "3-rpn"]
    assert save(4, "rpn", 0, complete=True) == ["2-rpn", "3-rpn", "4-rpn"]
    assert save(5, "box", 1) == ["3-rpn", "4-rpn", "5-box"]
    assert save(6, "box", 1) == ["4-rpn", "5-box", "6-box"]
    assert save(7, "box", 1, complete=True) == ["4-rpn", "5-box", "6-box", "7-box"]
    assert save(8, "mask", 2) == ["4-rpn", "6-box", "7-box", "8-mask"]
    # One that is saved before its validation is one more, until it is saved after that.
    assert save(9, "mask", 2, validated=False) == ["4-rpn", "6-box", "7-box", "8-mask", "9-mask"]
    assert run.latest().validated is False
    assert save(9, "mask", 2) == ["4-rpn", "7-box", "8-mask", "9-mask"]
    latest = run.latest()
    assert latest is not None
    assert latest.name == "00000009-mask"


def test_a_kill_while_a_checkpoint_is_replaced_loses_nothing(
    run: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its two renames: the first one is put back, and can be replaced then."""
    run.save(STATE, meta(3))
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if Path(target).name == meta(3).name:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            run.save(STATE, meta(3, complete=True))
    assert names(run) == [f".{meta(3).name}", f".{meta(3).name}.replaced"]
    assert run.is_replacing()
    run.refuse_incomplete()
    assert not run.is_replacing()
    assert run.latest() == meta(3)
    run.save(STATE, meta(3, complete=True))
    assert run.latest() == meta(3, complete=True)
    assert names(run) == [meta(3).name]


def test_the_best_ap_is_never_let_go(run: Checkpoints, caplog: pytest.LogCaptureFixture) -> None:
    def save(step: int, ap: float | None, *, complete: bool = False) -> list[int]:
        run.save(STATE, dataclasses.replace(meta(step, complete=complete), ap=ap))
        return [int(name.split("-")[0]) for name in names(run)]

    assert run.best() is None
    assert save(1, 0.1) == [1]
    assert save(2, 0.3) == [1, 2]
    assert save(3, 0.3) == [2, 3]
    assert save(4, None) == [3, 4]  # the last of equals
    assert save(5, 0.2) == [3, 4, 5]
    assert save(6, 0.1, complete=True) == [3, 4, 5, 6]
    best = Checkpoints(run.folder.parent, keep=2).best()
    assert best is not None
    assert (best.step, best.ap) == (3, 0.3)
    harmed = run.folder / best.name / "model" / "_METADATA"
    _flip(harmed)
    second = run.best()
    assert second is not None
    assert second.step == 5
    assert [record.getMessage() for record in caplog.records] == [
        f"{harmed}: damaged: not the bytes that were saved (SHA-256 differs): skipped"
    ]
    assert save(3, 0.4) == [3]  # gone back to: what follows is of a future that was given up
    assert save(4, -1.0) == [3, 4]


def test_the_best_is_of_the_validation_images_of_today(run: Checkpoints) -> None:
    """An AP on the images that there were before would stay the best for ever."""

    def save(step: int, ap: float | None, **annotations: str) -> list[int]:
        run.save(STATE, dataclasses.replace(meta(step), ap=ap, annotations=annotations))
        return [int(name.split("-")[0]) for name in names(run)]

    assert save(1, 0.9) == [1]  # of an earlier version, which did not know on which
    assert save(2, 0.4, val="easy") == [1, 2]
    best = run.best()
    assert best is not None
    assert best.step == 1
    assert save(3, 0.3, val="hard", train="more") == [1, 2, 3]
    assert save(4, 0.2, val="hard", train="more") == [1, 3, 4]
    assert save(5, None, val="other") == [1, 4, 5]  # not measured yet
    assert save(1, 0.1, val="easy") == [1]
    assert save(2, 0.4, val="easy") == [1, 2]
    assert save(3, 0.3, val="hard") == [2, 3]
    assert save(4, 0.2, val="hard") == [2, 3, 4]
    assert save(5, 0.1, val="hard") == [2, 3, 4, 5]  # the best by today's, and by any
    for expected in (3, 4, 5, 2):
        best = run.best()
        assert best is not None
        assert best.step == expected
        (run.folder / best.name / "model" / "_METADATA").write_bytes(b"harmed")


def test_a_stage_that_starts_where_the_last_one_ended_is_the_newer(run: Checkpoints) -> None:
    run.save(STATE, meta(4, "rpn", complete=True))
    run.save(STATE, meta(4, "box", index=1))  # sorts before "rpn" by name
    assert run.latest() == meta(4, "box", index=1)


def test_the_same_step_again_replaces_it(run: Checkpoints) -> None:
    run.save(STATE, meta(3))
    later = STATE.replace(step=jnp.int32(9))
    run.save(later, meta(3, complete=True))
    assert names(run) == ["00000003-rpn"]
    assert run.latest() == meta(3, complete=True)
    assert_same_bits(run.restore(STATE, meta(3)), later)


def test_a_future_that_was_given_up_does_not_crowd_out_the_present(run: Checkpoints) -> None:
    """The newest is damaged, the run goes on from an older one and saves at other steps: those are
    the newest then."""
    for step in (10, 20, 30):
        run.save(STATE, meta(step))
    _flip(run.folder / "00000030-rpn" / "training" / "manifest.ocdbt")
    assert run.latest() == meta(20)
    run.save(STATE, meta(25))
    assert names(run) == ["00000020-rpn", "00000025-rpn"]
    assert run.latest() == meta(25)


def test_another_model_is_refused(run: Checkpoints) -> None:
    run.save(STATE, meta(3))
    params = STATE.params | {"fpn": {"kernel": jnp.ones(8)}}
    with pytest.raises(ConfigError, match=r"00000003-rpn: does not fit this model .*: 1 differing"):
        run.restore(STATE.replace(params=params), meta(3))


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # of orbax's threads, after they failed
@pytest.mark.parametrize("limit", [100, 20_000])
def test_a_save_that_the_system_refuses_leaves_nothing_but_the_previous_one(
    run: Checkpoints, limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    """No file may grow beyond `limit` bytes, as on a full disk: in the first arrays, and in what is
    written for the largest one."""
    large = STATE.replace(
        params=STATE.params | {"large": jax.random.normal(jax.random.key(0), (10_000,))}
    )
    run.save(large, meta(3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            run.save(large, meta(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (caught.value.errno, caught.value.filename) == (
        errno.EFBIG,
        str(run.folder / "00000004-rpn"),
    )
    assert not caplog.records
    assert names(run) == ["00000003-rpn"]
    assert_same_bits(run.restore(large, meta(3)), large)
    run.save(large, meta(4))
    assert run.latest() == meta(4)


ELSEWHERE = """
import sys
from pathlib import Path
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from mrcnn_jax.runs.checkpoints import Checkpoints
sys.path.insert(0, sys.argv[2])
from test_checkpoints import STATE, meta

assert jax.device_count() == 4
run = Checkpoints(Path(sys.argv[1]), keep=2)
state = run.restore(STATE, run.latest())
mesh = jax.make_mesh((4,), ("data",))

def spread(leaf):  # over all devices: in quarters where that is possible, else a copy on each
    parts = PartitionSpec("data") if leaf.shape and leaf.shape[0] % 4 == 0 else PartitionSpec()
    return jax.device_put(leaf, NamedSharding(mesh, parts))

state = jax.tree.map(spread, state)
assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(state))
run.save(state, meta(4))
"""


def test_another_number_of_devices_restores_the_same_bits(
    run: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    """Saved on one device, restored and spread over four in another process, saved there, restored
    on one."""
    assert jax.device_count() == 1
    run.save(STATE, meta(3))
    four_devices = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", ELSEWHERE, str(run.folder.parent), str(Path(__file__).parent)]
    done = subprocess.run(
        command,
        env=four_devices,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert " -> '--xla_force_host_platform_device_count=4'" in done.stderr
    found = run.latest()
    assert found is not None
    assert found.step == 4
    assert_same_bits(run.restore(STATE, found), STATE)


def test_another_environment_is_warned_of_in_one_line(
    run: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    run.save(STATE, meta(3))
    run.restore(STATE, meta(3))
    assert not caplog.records
    elsewhere = dataclasses.replace(
        meta(4), environment=environment() | {"cores": 64, "jaxlib": "0.0.1"}
    )
    run.save(STATE, elsewhere)
    found = run.latest()
    assert found is not None
    with caplog.at_level(logging.WARNING):
        assert_same_bits(run.restore(STATE, found), STATE)
    (record,) = caplog.records
    assert "cores 64 -> " in record.getMessage()
    assert "jaxlib '0.0.1' -> " in record.getMessage()
    assert "platform" not in record.getMessage()
    assert "\n" not in record.getMessage()
