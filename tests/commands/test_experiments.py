"""The report's experiments: the plan by hand, and a job whose table is what its runs left behind,
however often it was stopped."""

from __future__ import annotations

import functools
import json
import os
import signal
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import orbax.checkpoint as ocp
import pytest
import tiny

from mrcnn_jax import cli
from mrcnn_jax.commands import eval as evaluation
from mrcnn_jax.commands import experiments
from mrcnn_jax.commands.experiment_job import Record
from mrcnn_jax.commands.experiment_table import by_stage, seconds_per_epoch, spread
from mrcnn_jax.commands.experiments import Arguments
from mrcnn_jax.commands.variants import VARIANTS, Chain, StageRun, load_recipe, plan
from mrcnn_jax.config import tables
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import differences, load_config_file
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import Config
from mrcnn_jax.figures import comparison
from mrcnn_jax.models.mask_rcnn import MaskRCNN, example_batch
from mrcnn_jax.structures import Params
from mrcnn_jax.training import loop, watch
from mrcnn_jax.training.stages import labels, split

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "tiny.py"
WORKDIR = Path("job")
# Every variant's chain, by hand: which folder each of its stages is trained in.
CHAINS = {
    "baseline": ("baseline/rpn", "baseline/box", "baseline/mask"),
    "backbone c4": ("backbone-c4/rpn", "backbone-c4/box", "backbone-c4/mask"),
    "roi_op pool": ("baseline/rpn", "roi_op-pool/box", "roi_op-pool/mask"),
    "roi_op warp": ("baseline/rpn", "roi_op-warp/box", "roi_op-warp/mask"),
    "mask_loss focal": ("baseline/rpn", "baseline/box", "mask_loss-focal/mask"),
    "mask_loss focal-even": ("baseline/rpn", "baseline/box", "mask_loss-focal-even/mask"),
    "anchor_ratios one": (
        "anchor_ratios-one/rpn",
        "anchor_ratios-one/box",
        "anchor_ratios-one/mask",
    ),
    "mask_activation softmax": ("baseline/rpn", "baseline/box", "mask_activation-softmax/mask"),
    "training joint": ("training-joint/joint",),
    "box_loss giou": ("baseline/rpn", "box_loss-giou/box", "box_loss-giou/mask"),
    "boxes class-agnostic": (
        "baseline/rpn",
        "boxes-class-agnostic/box",
        "boxes-class-agnostic/mask",
    ),
    "boxes cascade": (
        "baseline/rpn",
        "boxes-class-agnostic/box",
        "boxes-cascade/box2",
        "boxes-cascade/box3",
        "boxes-cascade/mask",
    ),
    "mask_classes agnostic": ("baseline/rpn", "baseline/box", "mask_classes-agnostic/mask"),
    "mask_scoring iou": (
        "baseline/rpn",
        "baseline/box",
        "baseline/mask",
        "mask_scoring-iou/mask_iou",
    ),
}
# What the last run of a variant has otherwise than the baseline's, beside where it starts.
CHANGES = {
    "backbone c4": {
        "model.backbone: 'fpn' -> 'c4'",
        "model.rpn.channels: None -> 16",
        "model.box_head.fcs: 2 -> 0",
        "model.box_head.pool_size: 7 -> 14",
        "model.mask_head.convs: 1 -> 0",
        "model.mask_head.deconv_kernel: 3 -> 2",
    },
    "roi_op pool": {"model.roi.op: 'align' -> 'pool'"},
    "roi_op warp": {"model.roi.op: 'align' -> 'warp'"},
    "mask_loss focal": {"model.mask_head.loss: 'bce' -> 'focal'"},
    "mask_loss focal-even": {
        "model.mask_head.loss: 'bce' -> 'focal'",
        "model.mask_head.focal_alpha: 0.25 -> 0.5",
    },
    "anchor_ratios one": {"model.rpn.ratios: (0.5, 1.0, 2.0) -> (1.0,)"},
    "mask_activation softmax": {"model.mask_head.loss: 'bce' -> 'softmax'"},
    "training joint": set(),
    "box_loss giou": {"model.box_head.box_loss: 'smooth_l1' -> 'giou'"},
    "boxes class-agnostic": {"model.box_head.class_agnostic: False -> True"},
    "boxes cascade": {
        "model.box_head.class_agnostic: False -> True",
        "model.box_head.cascade: () -> (0.6, 0.7)",
    },
    "mask_classes agnostic": {"model.mask_head.class_agnostic: False -> True"},
    "mask_scoring iou": {"model.mask_iou_head.enabled: False -> True"},
}
PRETRAINED = replace(
    tiny.get_config(),
    model=replace(
        tiny.get_config().model, resnet=replace(tiny.get_config().model.resnet, norm="frozen")
    ),
    stages=tables.staged(pretrained=True, epochs=(2, 3, 1)),
    init_from="resnet10.npz",
)


def chains(recipe: Config, *, seed: int = 0, seeds: int = 1) -> dict[str, Chain]:
    return {chain.variant.title: chain for chain in plan(recipe, WORKDIR, seeds=seeds)[seed]}


@functools.cache
def parameter_shapes(model: ModelConfig) -> Params:
    return jax.eval_shape(
        lambda batch: MaskRCNN(model).init(jax.random.key(0), batch), example_batch((64, 64))
    )["params"]


def trained_modules(run: StageRun) -> set[str]:
    """Top-level modules that the run's stage trains, each of them in full."""
    shapes = parameter_shapes(run.config.model)
    trained, frozen = split(shapes, labels(run.stage, shapes))
    assert not trained.keys() & frozen.keys()
    return set(trained)


# -- the plan --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_shared_stages_are_one_run(seed: int) -> None:
    found = chains(tiny.get_config(), seed=seed, seeds=2)
    assert {
        title: tuple(str(run.folder) for run in chain.runs) for title, chain in found.items()
    } == {
        title: tuple(f"job/seed{seed}/{folder}" for folder in folders)
        for title, folders in CHAINS.items()
    }
    runs = {run for chain in found.values() for run in chain.runs}
    assert len(runs) == len({run.folder for run in runs}) == 26
    assert {run.config.seed for run in runs} == {seed}


def test_each_stage_starts_from_the_one_before() -> None:
    recipe = replace(PRETRAINED, init_from="another_run", init_without_classes=True)
    for chain in chains(recipe).values():
        sources = [
            ("another_run", True),
            *((str(run.folder.resolve()), False) for run in chain.runs[:-1]),
        ]
        assert [
            (run.config.init_from, run.config.init_without_classes) for run in chain.runs
        ] == sources
        assert all(len(run.config.stages) == 1 for run in chain.runs)


def test_what_a_variant_changes_reaches_its_runs() -> None:
    found = chains(tiny.get_config())
    baseline = found["baseline"].runs[-1].config
    assert baseline.model == tiny.get_config().model
    assert {title for title in found if title != "baseline"} == CHANGES.keys()
    for title, expected in CHANGES.items():
        changed = differences(baseline, found[title].runs[-1].config)
        assert {
            line for line in changed if not line.startswith(("init_from:", "stages."))
        } == expected


@pytest.mark.parametrize("recipe", [tiny.get_config(), PRETRAINED], ids=["random", "pretrained"])
def test_what_each_stage_trains(recipe: Config) -> None:
    """The ResNet with the RPN unless it is imported, res5 with the box head, and all that together
    in one stage."""
    resnet = {"resnet"} if recipe.init_from is None else set()
    found = chains(recipe)
    assert [trained_modules(run) for run in found["baseline"].runs] == [
        {"fpn", "rpn"} | resnet,
        {"box_head"},
        {"mask_head"},
    ]
    assert [trained_modules(run) for run in found["backbone c4"].runs] == [
        {"rpn"} | resnet,
        {"res5", "box_head"},
        {"mask_head"},
    ]
    assert [trained_modules(run) for run in found["boxes cascade"].runs[1:]] == [
        {"box_head"},
        {"box_head2"},
        {"box_head3"},
        {"mask_head"},
    ]
    scored = found["mask_scoring iou"].runs
    assert scored[:3] == found["baseline"].runs
    assert trained_modules(scored[3]) == {"mask_iou_head"}
    assert scored[3].stage.epochs == scored[2].stage.epochs
    (joint,) = found["training joint"].runs
    assert trained_modules(joint) == {"fpn", "rpn", "box_head", "mask_head"} | resnet
    assert joint.stage.losses == ("rpn", "box", "mask")
    assert joint.stage.epochs == (2 if recipe.init_from is None else 3)
    for chain in (found["baseline"], found["backbone c4"]):
        assert [(run.stage.epochs, run.stage.optimizer) for run in chain.runs] == [
            (s.epochs, s.optimizer) for s in recipe.stages
        ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "model=replace(c.model, roi=replace(c.model.roi, op='warp'))",
            "is the variant roi_op warp; it must be the baseline",
        ),
        ("stages=c.stages[:2]", "its stages must be those that tables.staged makes for an FPN"),
        (
            "stages=tables.staged(pretrained=False, backbone='c4')",
            "its stages must be those that tables.staged makes for an FPN",
        ),
    ],
    ids=["a variant", "two stages", "c4"],
)
def test_a_recipe_that_is_no_baseline_is_refused(change: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.py"
    path.write_text(
        "from dataclasses import replace\nimport tiny\nfrom mrcnn_jax.config import tables\n"
        f"def get_config():\n    c = tiny.get_config()\n    return replace(c, {change})\n"
    )
    with pytest.raises(ConfigError) as error:
        load_recipe(str(path))
    assert str(error.value) == f"--recipe: {path}: {message}"


def test_mistakes() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^--recipe: report_cup: .*no recipe of configs/: bins, .*coco300, .*report_cpu, ",
    ):
        load_recipe("report_cup")
    with pytest.raises(
        ConfigError, match=r"^--only: roi: no such experiment \(baseline, backbone, roi_op, "
    ):
        Arguments(Path("job"), only=("mask_loss", "roi"))
    with pytest.raises(ConfigError, match=r"^--seeds: 0: must be at least 1$"):
        Arguments(Path("job"), seeds=0)


@pytest.mark.parametrize("name", ["report_cpu", "coco300", "shapes"])
def test_recipes_of_this_repository(name: str, tmp_path: Path) -> None:
    """Every variant can be made of them, and C4 trains the ResNet in stage 1 if they do."""
    found = chains(load_config_file(ROOT / "configs" / f"{name}.py"))
    assert len({run for chain in found.values() for run in chain.runs}) == 26
    trains = [
        "resnet/.*" in {group.pattern for group in found[title].runs[0].stage.train}
        for title in ("baseline", "backbone c4")
    ]
    assert trains == [name == "shapes"] * 2


# -- the job ---------------------------------------------------------------------------------------


def arguments(workdir: Path, data: Path, *only: str) -> Arguments:
    return Arguments(workdir, recipe=str(TINY), only=only, data_root=str(data))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\0" * 9,
        "[" * 100_000,
        "[]",
        '{"training_seconds": "1"}',
        '{"training_seconds": NaN}',
        '{"date": 3}',
        '{"dat\xe9": "2026"}',
        '{"training_seconds": ' + "1" * 400 + "}",
    ],
    ids=lambda text: ascii(text[:30]),
)
def test_notes_that_are_damaged(content: str, tmp_path: Path) -> None:
    run: Any = SimpleNamespace(folder=tmp_path)
    notes = Record(training_seconds=2, date="2026-11-28")
    notes.save(run)
    assert Record.of(run) == notes
    (tmp_path / "experiment.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/experiment\.json: [^\n]*$"):
        Record.of(run)


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "experiment.json").read_text())


def arrays(run: Path) -> dict[str, bytes]:
    """Parameters, statistics and optimiser state of a run's last checkpoint, as they lie on the
    disk."""
    checkpoint = max((run / "checkpoints").iterdir())
    reader = ocp.PyTreeCheckpointer()
    return {
        path: leaf.tobytes()
        for item in ("model", "training")
        for path, leaf in reader.restore(checkpoint / item).items()
    }


@pytest.fixture(scope="module")
def job(tiny_data: Path, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that was stopped twice: by SIGTERM between the RPN's epochs, and in an
    evaluation that had its figures. Its programs are those of the tiny run."""
    workdir = tmp_path_factory.mktemp("experiments") / "job"
    baseline = workdir / "seed0" / "baseline"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "curves", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(cli.Stopped, match="stage rpn, step 6 is saved in"):
            experiments.work(arguments(workdir, tiny_data, "mask_activation"))
    before = record(baseline / "rpn")["training_seconds"]

    def stop(*_: Any) -> None:
        raise cli.Stopped("stopped by SIGTERM", signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "proposals_figure", stop)
        with pytest.raises(cli.Stopped):
            experiments.work(arguments(workdir, tiny_data, "mask_activation"))
    assert 0 < before < record(baseline / "rpn")["training_seconds"]
    before = record(baseline / "mask")["evaluation_seconds"]
    (baseline / "mask" / "eval" / "metrics.json").write_text("{}")  # a stop could have cut it short

    experiments.work(arguments(workdir, tiny_data, "mask_activation"))
    assert 0 < before < record(baseline / "mask")["evaluation_seconds"]
    return workdir


def test_shared_stages_are_trained_once(job: Path) -> None:
    rows = {
        str(path.parent.relative_to(job)): path.read_text().splitlines()
        for path in job.glob("seed*/*/*/timing.jsonl")
    }
    assert {run: [json.loads(line)["epoch"] for line in lines] for run, lines in rows.items()} == {
        "seed0/baseline/box": [1],
        "seed0/baseline/mask": [1],
        "seed0/baseline/rpn": [1, 2],
        "seed0/mask_activation-softmax/mask": [1],
    }


def test_the_table_is_what_the_runs_left(job: Path, tiny_data: Path) -> None:
    """Its figures against eval/metrics.json, the times against timing.jsonl, the parameters against
    the checkpoints' arrays."""
    table = json.loads((job / "table.json").read_text())
    lines = (job / "table.md").read_text().splitlines()
    cells = {
        line.split(" | ")[0].removeprefix("| "): line.removeprefix("| ").split(" | ")[1:]
        for line in lines[2:4]
    }
    assert (
        list(cells)
        == [row["variant"] for row in table["rows"]]
        == ["baseline", "mask_activation softmax"]
    )
    names = ["recall@16", "recall@16/small", "recall@16/medium", "recall@16/large"]
    names += ["bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50", "segm/AP75"]
    for row, folder in zip(table["rows"], ("baseline", "mask_activation-softmax"), strict=True):
        run = job / "seed0" / folder / "mask"
        metrics = json.loads((run / "eval" / "metrics.json").read_text())
        assert row["runs"] == [str(run)]
        assert row["metrics"] == {name: [metrics.get(name)] for name in names}
        shown = cells[row["variant"]]
        assert [cell == "-" for cell in shown[:9]] == [metrics.get(name, -1) < 0 for name in names]
        assert [float(cell) for cell in shown[:9] if cell != "-"] == [
            pytest.approx(metrics[name], abs=5.1e-4) for name in names if metrics.get(name, -1) >= 0
        ]

        chain = {"rpn": job / "seed0/baseline/rpn", "box": job / "seed0/baseline/box", "mask": run}
        for stage, path in chain.items():
            rows = [json.loads(line) for line in (path / "timing.jsonl").read_text().splitlines()]
            assert row["seconds_per_epoch"][stage] == [
                pytest.approx(statistics.median(r["seconds"] for r in rows), abs=2e-3)
            ]
        (checkpoint,) = (run / "checkpoints").iterdir()
        leaves = ocp.PyTreeCheckpointer().restore(checkpoint / "model")
        assert row["parameters"] == sum(
            leaf.size for path, leaf in leaves.items() if path.startswith("params/")
        )
        assert shown[10] == f"{row['parameters']:,}"
        experiment = row["variant"].split()[0]
        assert row["command"] == (
            f"python -m mrcnn_jax experiments --workdir {job} --recipe {TINY} "
            f"--data-root {tiny_data} --only {experiment}"
        )
    timed = [
        json.loads(line)["seconds"]
        for path in job.glob("seed0/*/*/timing.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert sum(timed) < table["training_seconds"]
    records = [record(path) for path in job.glob("seed0/*/*")]
    for kind in ("training_seconds", "evaluation_seconds"):
        assert table[kind] == pytest.approx(sum(found[kind] for found in records), abs=0.1)


def test_a_finished_job_writes_the_same_table(
    job: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when fewer experiments are asked for."""
    tables = {path.name: path.read_bytes() for path in job.glob("table.*")}
    before = sorted((path, path.stat().st_mtime_ns) for path in (job / "seed0").rglob("*"))
    for path in job.glob("table.*"):
        path.unlink()
    experiments.work(arguments(job, tiny_data, "mask_activation"))
    output = capsys.readouterr().out
    assert output.startswith("6 pieces of work, 6 of them done\n")
    assert (job / "table.md").read_text() in output
    experiments.work(arguments(job, tiny_data, "baseline"))
    assert {path.name: path.read_bytes() for path in job.glob("table.*")} == tables
    assert sorted((path, path.stat().st_mtime_ns) for path in (job / "seed0").rglob("*")) == before


def test_another_recipe_in_the_same_folder_is_refused(
    job: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Before anything is trained, also of a variant that is not begun."""
    path = tmp_path / "recipe.py"
    path.write_text(TINY.read_text().replace("epochs=(2, 1, 1)", "epochs=(2, 1, 2)"))
    with pytest.raises(
        ConfigError, match=r"baseline/mask: holds a run of another config: stages.0.epochs: 1 -> 2 "
    ):
        experiments.work(replace(arguments(job, tiny_data, "training"), recipe=str(path)))
    assert not (job / "seed0" / "training-joint").exists()


@pytest.mark.parametrize(
    ("stage", "variant"),
    [("rpn", "roi_op pool"), ("box", "mask_activation softmax"), ("mask", "baseline")],
    ids=["rpn", "box", "mask"],
)
def test_shared_and_stopped_runs_have_the_bits_of_others(
    stage: str, variant: str, job: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Each stage of the baseline, trained without a stop by the whole config of a variant that
    shares it."""
    recipe = load_recipe(str(TINY), str(tiny_data))
    (shared,) = (run for run in plan(recipe, job, seeds=1)[0][0].runs if run.stage.name == stage)
    model = {variant.title: variant for variant in VARIANTS}[variant].change(recipe).model
    loop.train(replace(shared.config, model=model), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (
        shared.folder / "metrics.jsonl"
    ).read_bytes()
    assert arrays(tmp_path / "run") == arrays(shared.folder)
    if stage == "mask":
        evaluation.run(evaluation.Arguments(workdir=tmp_path / "run", figures=0))
        for name in ("metrics.json", "detections.json"):
            assert (tmp_path / "run" / "eval" / name).read_bytes() == (
                shared.folder / "eval" / name
            ).read_bytes()


def test_seconds_of_epochs_that_were_cut() -> None:
    """Whole epochs count; where there are none, what there is stands for its share of the steps."""
    cut, whole = (
        {"steps": 2, "seconds": 9.0},
        [{"steps": 6, "seconds": seconds} for seconds in (3.0, 5.0, 4.0)],
    )
    assert seconds_per_epoch([cut, *whole], steps=6) == 4.0
    assert seconds_per_epoch([cut], steps=6) == 27.0


def test_stages_that_are_not_those_of_the_head_are_named() -> None:
    head = ("rpn", "box", "mask")
    seconds = {"rpn": [1.0], "box": [2.0, 4.0], "mask": [3.0]}
    assert by_stage(seconds, head) == "1.0 / 3.0 ± 1.4 / 3.0"
    assert by_stage({"rpn": [1.0], "box2": [2.0]}, head) == "rpn 1.0 / box2 2.0"


def test_signals_stop_the_job() -> None:
    """SIGTERM and the first Ctrl-C say so in one line; the second Ctrl-C is Python's own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started the tests
        experiments.stop_when_asked(WORKDIR)
        for number in handlers:
            line = f"stopped by {number.name}: what is done is kept in job"
            with pytest.raises(cli.Stopped, match=line) as stopped:
                signal.raise_signal(number)
            assert stopped.value.number == number
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_ctrl_c_in_the_background_of_a_script_stays_ignored() -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        experiments.stop_when_asked(WORKDIR)
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_several_seeds_are_a_mean_and_a_standard_deviation() -> None:
    assert spread([0.1, 0.2, 0.6], "{:.3f}".format) == "0.300 ± 0.265"
    assert spread([0.25], "{:.3f}".format) == "0.250"
    assert spread([-1.0, -1.0], "{:.3f}".format) == spread([None], "{:.3f}".format) == "-"
