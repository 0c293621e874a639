"""What would fail late is refused before anything is compiled; and runs start from other weights.
(In a folder that holds a run: test_resume.py.)"""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from whole_runs import KINDS, ROOT, arrays

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import (
    load_config_file,
    resolve_paths,
)
from mrcnn_jax.config.heads import MaskHeadConfig
from mrcnn_jax.config.schema import Config, ParamGroup
from mrcnn_jax.config.tables import joint
from mrcnn_jax.data.order import PlannedBatch, plan_epoch
from mrcnn_jax.models.mask_rcnn import MaskRCNN, Variables, example_batch
from mrcnn_jax.training import loop
from mrcnn_jax.training import open as opening
from mrcnn_jax.training.initial import initial_variables
from mrcnn_jax.training.open import Progress, open_run
from mrcnn_jax.training.programs import Prepared, Programs

# -- what is refused -------------------------------------------------------------------------------


def test_a_logger_that_is_not_installed_is_refused_first(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = replace(tiny_config, loggers=("tensorboard", "wandb"))
    with pytest.raises(ConfigError, match=r"^loggers: wandb is not installed \(pip install .*\)$"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def without_mask_head(config: Config) -> Config:
    """A mistake in the last stage's table."""
    last = config.stages[2]
    return replace(
        config,
        stages=(
            *config.stages[:2],
            replace(last, frozen=tuple(p for p in last.frozen if p != "rpn/.*")),
        ),
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda config: replace(config, stages=()), "stages: the config has none"),
        (
            lambda config: replace(config, model=replace(config.model, num_classes=80)),
            r"model\.num_classes: 80, but .* has 3: disc",
        ),
        (without_mask_head, r"stages\.mask: parameter rpn/.* matches no pattern"),
    ],
)
def test_a_config_that_cannot_be_trained_takes_no_folder(
    wrong: Any, message: str, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every refusal comes before compiling, and the folder stays free for the corrected config."""
    monkeypatch.setattr(loop, "initialise", lambda *_, **__: pytest.fail("something was compiled"))
    with pytest.raises(ConfigError, match=message) as error:
        loop.train(wrong(tiny_config), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()


# -- starting from other weights -------------------------------------------------------------------


def shapes(config: Config) -> Variables:
    model = MaskRCNN(config.model)
    return jax.eval_shape(
        lambda batch: model.init(jax.random.key(0), batch), example_batch(config.data.canvases[0])
    )


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(opening.fcntl, "flock", flock)
    with opening._locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    line = f"{tmp_path}/run: No locks available: no lock keeps a second run out of this folder\n"
    assert capsys.readouterr().out == line


def test_a_run_starts_from_another(
    tiny_run: Path, mask_config: Config, tmp_path: Path, stop_at: Any
) -> None:
    """Trains the last stage only, on top of a whole run: what that stage freezes is the source's to
    the bit."""
    stop_at(1)
    with pytest.raises(cli.Stopped):
        loop.train(mask_config, tmp_path / "run")
    source = arrays(tiny_run / "checkpoints" / "00000024-mask")
    begun = arrays(tmp_path / "run" / "checkpoints" / "00000001-mask")
    paths = [path for path in source if path.startswith(KINDS)]
    different = [path for path in paths if source[path].tobytes() != begun[path].tobytes()]
    assert different
    assert all(path.startswith("params/mask_head/") for path in different)
    meta = json.loads(
        (tmp_path / "run" / "checkpoints" / "00000001-mask" / "meta.json").read_text()
    )
    assert meta["loaded"] == ["box_head", "fpn", "mask_head", "resnet", "rpn"]
    # One small step away, not somewhere else.
    assert all(np.abs(source[path] - begun[path]).max() < 0.1 for path in different)


def test_what_is_random_is_known_later_too(
    tiny_config: Config, tmp_path: Path, stop_at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that was stopped in its first stage: where a row is added to it that needs more, and
    where another run begins with its weights."""
    stop_at(1)
    rpn, _, mask = tiny_config.stages
    begun = tmp_path / "run"
    with pytest.raises(cli.Stopped):
        loop.train(replace(tiny_config, stages=(rpn,)), begun)
    with pytest.raises(
        ConfigError, match=r"^stages\.mask: frozen at random initialisation: box_head \("
    ):
        loop.train(replace(tiny_config, stages=(rpn, mask)), begun)
    capsys.readouterr()
    with pytest.raises(
        ConfigError, match=r"^stages\.mask: frozen at random initialisation: box_head \("
    ):
        loop.train(replace(tiny_config, init_from=str(begun), stages=(mask,)), tmp_path / "other")
    line = f"{begun}: not trained there, so in part random: box_head, mask_head\n"
    assert line in capsys.readouterr().out


def test_data_of_other_versions_are_told(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is a copy of all images. In a shared cache they may be those of other runs."""
    data = shutil.copytree(str(tiny_config.data.root), tmp_path / "data")
    run, shared = tmp_path / "run", tmp_path / "shared"
    for cache in (None, str(shared)):
        own = replace(tiny_config.data, root=str(data), cache=cache)
        config = replace(tiny_config, data=own)
        with open_run(config, run):
            pass
        told = capsys.readouterr().out
        assert "other versions" not in told
        path = tiny.annotations(data, "val")
        path.write_text(path.read_text() + "\n")
        earlier = set((run / "data" if cache is None else shared).iterdir())
        with open_run(config, run) as opened:
            earlier -= {opened.train_split.folder, opened.val_split.folder}
        told = capsys.readouterr().out
        (folder,) = earlier
        if cache is None:
            assert f"{run / 'data'}: also has 1 of other versions of these data, " in told
            assert f" MiB: {folder.name} (may be deleted" in told
        else:
            assert "other versions" not in told
        assert folder.exists()


def test_a_partial_load_is_listed(
    tiny_run: Path, tiny_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into a network with a convolution more in its mask head and without batch norm in its RPN."""
    model = tiny_config.model
    model = replace(
        model,
        mask_head=MaskHeadConfig(channels=8, convs=2),
        rpn=replace(model.rpn, batch_norm=False),
    )
    config = replace(tiny_config, init_from=str(tiny_run), model=model)
    wanted = set(flatten_dict(shapes(config), sep="/"))
    loaded = flatten_dict(initial_variables(shapes(config), config)[0], sep="/")
    source = {
        path: leaf
        for path, leaf in arrays(tiny_run / "checkpoints" / "00000024-mask").items()
        if path.startswith(KINDS)
    }
    random, unused = sorted(wanted - set(source)), sorted(set(source) - wanted)
    assert {"params/mask_head/conv2/kernel", "params/mask_head/conv2/bias"} <= set(random)
    assert {
        path for path in unused if not path.startswith(tuple(f"{kind}/rpn/" for kind in KINDS))
    } == set()
    assert set(loaded) == wanted & set(source)
    assert all(np.array_equal(leaf, source[path]) for path, leaf in loaded.items())
    counts = f"{len(loaded)} of {len(wanted)} tensors loaded"
    assert (
        capsys.readouterr().out
        == f"{tiny_run}: {counts}; random: {', '.join(random)}; not used: {', '.join(unused)}\n"
    )


def test_other_shapes_are_refused(tiny_run: Path, tiny_config: Config, tmp_path: Path) -> None:
    config = replace(tiny_config, init_from=str(tiny_run))
    config = replace(
        config, model=replace(config.model, mask_head=MaskHeadConfig(channels=4, convs=1))
    )
    with pytest.raises(
        ConfigError,
        match=r"init_from: .*: 5 shapes differ: params/mask_head/conv1/bias \(8,\) -> \(4,\), "
        r".* and 2 more",
    ) as error:
        loop.train(config, tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_run_is_refused(tiny_config: Config, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = replace(tiny_config, init_from=str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"empty: holds no checkpoint$"):
        initial_variables(shapes(config), config)


def test_the_resnet_comes_from_a_weights_file(
    data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = resolve_paths(load_config_file(ROOT / "configs" / "coco300_cpu.py"))
    wanted = flatten_dict(shapes(config), sep="/")
    loaded = flatten_dict(initial_variables(shapes(config), config)[0], sep="/")
    assert set(loaded) == {path for path in wanted if path.split("/")[1] == "resnet"}
    assert all(leaf.shape == wanted[path].shape for path, leaf in loaded.items())
    assert "box_head, fpn, mask_head, rpn: random" in capsys.readouterr().out
    with np.load(data_folder / "weights" / "pqf_resnet50_large.npz") as file:
        assert np.array_equal(
            loaded["params/resnet/stem/kernel"], file["conv1.weight"].transpose(2, 3, 1, 0)
        )
        assert np.array_equal(
            loaded["batch_stats/resnet/layer4/block2/conv3/var"], file["layer4.2.bn3.running_var"]
        )


def test_a_stage_may_end_within_an_epoch(tiny_config: Config, tmp_path: Path) -> None:
    """Its last epoch is the first part of a whole one; the next stage begins another epoch."""
    rpn, box, mask = tiny_config.stages
    stages = (replace(rpn, epochs=1.5), replace(box, epochs=0.01), mask)
    with open_run(replace(tiny_config, stages=stages), tmp_path / "run") as run:
        assert [run.total_steps(i) for i in range(3)] == [9, 1, 6]
        assert [run.epochs_begun(i) for i in range(3)] == [2, 1, 1]
        assert [run.epoch_of(step) for step in (1, 6, 7, 9)] == [1, 1, 2, 2]
        canvases = [plan.canvas for plan in run.train_split.plans]

        def epoch(number: int) -> list[PlannedBatch]:
            return plan_epoch(canvases, 2, seed=0, epoch=number, shuffle=True, repeats=run.repeats)

        assert [run.plan(0, 0), run.plan(0, 1)] == [epoch(0), epoch(1)[:3]]
        assert [run.plan(1, 0), run.plan(2, 0)] == [epoch(2)[:1], epoch(3)]
        assert [run.is_last(Progress(0, step)) for step in (6, 8, 9)] == [False, False, True]
        assert run.steps_done(Progress(2, 4)) == 9 + 1 + 4


def test_what_would_fail_or_lie_late_is_refused_early(tiny_config: Config, tmp_path: Path) -> None:
    rpn, box, mask = tiny_config.stages
    assert tiny_config.model.rpn.batch_norm
    outputs = tuple(replace(group, pattern="rpn/(logits|deltas)/.*") for group in rpn.train[:1])
    others = ("(resnet|fpn|box_head|mask_head)/.*", "rpn/(?!logits|deltas).*")
    partly = replace(rpn, train=outputs, frozen=others)
    joined = joint((ParamGroup(".*"),), epochs=1)[0]
    for losses, line in ((("box", "mask"), "rpn without its"), (("rpn", "mask"), "box_head with")):
        stages = (replace(joined, losses=losses),)
        with pytest.raises(ConfigError, match=rf"^stages\.joint: trains {line}"):
            loop.train(replace(tiny_config, stages=stages), tmp_path / "lossless")
    taught = (replace(joined, losses=("rpn",)), mask)  # no box loss has reached the box head
    with pytest.raises(ConfigError, match=r"^stages\.mask: frozen at random initialisation: box_h"):
        loop.train(replace(tiny_config, stages=taught), tmp_path / "untaught")
    with pytest.raises(
        ConfigError, match=r"^stages\.rpn: rpn has live batch norm and is trained in"
    ):
        loop.train(replace(tiny_config, stages=(partly, box, mask)), tmp_path / "partly")
    steps = replace(mask.optimizer, schedule="step", milestones=(0.05,), warmup_steps=1000)
    late = replace(mask, epochs=20, optimizer=steps)
    with pytest.raises(
        ConfigError,
        match=r"stages.mask.optimizer.milestones: 0.05 is update 6, within the warm-up of 12",
    ):
        loop.train(replace(tiny_config, stages=(rpn, box, late)), tmp_path / "late")
    # Also where the epochs are set after opening, as by --minutes: the folder is not taken.
    prepared = Prepared({"params": {}}, Programs(step=None, validate=None))
    with pytest.raises(ConfigError, match=r"0.05 is update 6, within the warm-up of 12"):
        loop.train(
            tiny_config,
            tmp_path / "settled",
            settle=lambda run: (replace(run.config, stages=(rpn, box, late)), prepared),
        )
    assert not (tmp_path / "settled" / "config.json").exists()
    with pytest.raises(
        ConfigError, match=r"stages.mask: frozen at random initialisation: box_head "
    ):
        loop.train(replace(tiny_config, stages=(rpn, mask)), tmp_path / "random")
    part = replace(
        rpn,
        train=(ParamGroup("resnet/layer.*"), *rpn.train[1:]),
        frozen=("resnet/stem/.*", *rpn.frozen),
    )
    with pytest.raises(
        ConfigError, match=r"stages.rpn: resnet has live batch norm and is trained in part"
    ):
        loop.train(replace(tiny_config, stages=(part, box, mask)), tmp_path / "part")
    assert not (tmp_path / "late" / "config.json").exists()


def test_processes_have_to_agree_on_what_decides_their_batches(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {}
    monkeypatch.setattr(opening.parallel, "refuse_differing", values.update)
    with open_run(tiny_config, tmp_path / "run"):
        assert values["data.eval_batch_size"] == tiny_config.data.eval_batch_size
        assert {"the config", "save_every_steps", "validate_every_epochs"} <= values.keys()
