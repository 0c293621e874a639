"""The report's experiments, each one change of the same recipe, as one job that can be stopped
anywhere and goes on; then one table.

    python -m mrcnn_jax.commands.experiments --workdir runs/report [--recipe report_cpu] [--only roi_op ...]
    [--seeds N]

Each stage of each variant is a run of its own in WORKDIR/seed<n>/<variant>/<stage>, which begins
with the parameters of the stage before it (as --init-from does); a stage that variants have in
common is trained once. The last run of each variant is evaluated. WORKDIR/table.md and table.json
hold all variants that are done.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import tyro

from mrcnn_jax import cli
from mrcnn_jax.config import tables
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import load_config_file, resolve_paths
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import Config, Loss, StageConfig

if TYPE_CHECKING:
    from mrcnn_jax.output import whole_file
from mrcnn_jax.runs.checkpoints import Meta


@dataclass(frozen=True)
class Arguments:
    workdir: Path
    """The job's folder. The same command goes on where it was stopped."""
    recipe: str | None = None
    """The name of a file of configs/, or a config file; by default report_cpu on a CPU and coco300,
    the report's own, elsewhere."""
    only: tuple[str, ...] = ()
    """These experiments (and the baseline): backbone, roi_op, mask_loss, anchor_ratios,
    mask_activation, training; baseline: it alone."""
    seeds: int | None = None
    """How many seeds, from the recipe's own on; by default 1 on a CPU and 3 elsewhere."""
    data_root: str | None = None
    """Folder of the data set, where it is not that of the recipe."""

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in EXPERIMENTS:
                raise ConfigError(f"--only: {name}: no such experiment ({', '.join(EXPERIMENTS)})")
        if self.seeds is not None and self.seeds < 1:
            raise ConfigError(f"--seeds: {self.seeds}: must be at least 1")


# -- what is compared ------------------------------------------------------------------------------


def _unchanged(config: Config) -> Config:
    return config


def _model(part: str, **values: Any) -> Callable[[Config], Config]:
    """Other values in `config.model.<part>`."""

    def change(config: Config) -> Config:
        return replace(
            config,
            model=replace(config.model, **{part: replace(getattr(config.model, part), **values)}),
        )

    return change


def _staged(config: Config, backbone: Literal["fpn", "c4"]) -> tuple[StageConfig, ...]:
    """The three stages of `config` as `tables.staged` has them for a backbone."""
    rpn, box, mask = config.stages
    return tables.staged(
        pretrained="resnet/.*" in rpn.frozen,
        backbone=backbone,
        epochs=(rpn.epochs, box.epochs, mask.epochs),
        optimizers=(rpn.optimizer, box.optimizer, mask.optimizer),
    )


def _c4(config: Config) -> Config:
    return replace(config, model=tables.c4(config.model), stages=_staged(config, "c4"))


def _joint(config: Config) -> Config:
    """One stage that trains what the three train together, as long as the longest of them, by the
    first one's optimiser."""
    stages = config.stages
    train = tuple(group for stage in stages for group in stage.train)
    frozen = tuple(
        pattern for pattern in stages[0].frozen if all(pattern in stage.frozen for stage in stages)
    )
    epochs = max(stage.epochs for stage in stages)
    return replace(
        config, stages=tables.joint(train, frozen, epochs=epochs, optimizer=stages[0].optimizer)
    )


@dataclass(frozen=True)
class Variant:
    experiment: str
    name: str
    change: Callable[[Config], Config]

    @property
    def title(self) -> str:
        return f"{self.experiment} {self.name}".strip()


BASELINE = Variant("baseline", "", _unchanged)
"""FPN, RoIAlign, cross-entropy on sigmoid masks, three anchor ratios, three stages: the other side
of every experiment."""

VARIANTS = (
    BASELINE,
    Variant("backbone", "c4", _c4),
    Variant("roi_op", "pool", _model("roi", op="pool")),
    Variant("roi_op", "warp", _model("roi", op="warp")),
    Variant("mask_loss", "focal", _model("mask_head", loss="focal", focal_gamma=2.0)),
    # Alpha .25, the default, is for few positives; a mask fills half of its box and more.
    Variant(
        "mask_loss",
        "focal-even",
        _model("mask_head", loss="focal", focal_gamma=2.0, focal_alpha=0.5),
    ),
    Variant("anchor_ratios", "one", _model("rpn", ratios=(1.0,))),
    Variant("mask_activation", "softmax", _model("mask_head", loss="softmax")),
    Variant("training", "joint", _joint),
)
EXPERIMENTS = tuple(dict.fromkeys(variant.experiment for variant in VARIANTS))


def load_recipe(name: str, data_root: str | None = None) -> Config:
    """The baseline, with absolute file names; ConfigError if there is no such recipe, or the
    variants cannot be made from it."""
    try:
        recipe = load_config_file(name)
    except ConfigError as error:
        raise ConfigError(f"--recipe: {error}") from None
    if len(recipe.stages) != 3 or recipe.stages != _staged(recipe, "fpn"):
        raise ConfigError(
            f"--recipe: {name}: its stages must be those that tables.staged makes for an FPN"
        )
    for variant in VARIANTS:
        if variant is not BASELINE and variant.change(recipe) == recipe:
            raise ConfigError(
                f"--recipe: {name}: is the variant {variant.title}; it must be the baseline"
            )
    if data_root is not None:
        recipe = replace(recipe, data=replace(recipe.data, root=data_root))
    return resolve_paths(recipe)


# -- the plan --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageRun:
    """One stage of one variant or of several: a run's folder and its config, which has this stage
    alone."""

    title: str
    folder: Path
    config: Config

    @property
    def stage(self) -> StageConfig:
        return self.config.stages[0]


@dataclass(frozen=True)
class Chain:
    """A variant with one seed: its runs in the order of its stages. Each starts from the one
    before, and the last one is evaluated."""

    variant: Variant
    runs: tuple[StageRun, ...]


_LATER_PARTS: dict[Loss, set[str]] = {
    "rpn": {"roi", "box_head", "mask_head"},
    "box": {"mask_head"},
    "mask": set(),
}
"""Parts of `config.model` that a loss does not reach."""


def _what_counts(config: Config) -> Config:
    """`config`, of one stage, without the parts of the model that none of its losses reaches: where
    it is the same, training is.

    `init_from` is part of it, so the stages before are the same too.
    """
    unread = set.intersection(*(_LATER_PARTS[loss] for loss in config.stages[0].losses))
    default = ModelConfig()
    return replace(
        config, model=replace(config.model, **{part: getattr(default, part) for part in unread})
    )


def plan(recipe: Config, workdir: Path, *, seeds: int) -> list[list[Chain]]:
    """The chains of every seed, in the order of VARIANTS. Equal stages are one `StageRun`, that of
    the first variant that has it."""
    recipe = replace(
        recipe,
        data=replace(recipe.data, cache=recipe.data.cache or str(workdir.resolve() / "data")),
    )
    trained: dict[Config, StageRun] = {}
    result = []
    for number in range(seeds):
        chains = []
        for variant in VARIANTS:
            config = variant.change(replace(recipe, seed=recipe.seed + number))
            runs: list[StageRun] = []
            for stage in config.stages:
                own = replace(config, stages=(stage,))
                if runs:
                    own = replace(
                        own, init_from=str(runs[-1].folder.resolve()), init_without_classes=False
                    )
                title = f"{variant.title}, seed {own.seed}" if seeds > 1 else variant.title
                folder = workdir / f"seed{own.seed}" / variant.title.replace(" ", "-") / stage.name
                runs.append(trained.setdefault(_what_counts(own), StageRun(title, folder, own)))
            chains.append(Chain(variant, tuple(runs)))
        result.append(chains)
    return result


# -- the job ---------------------------------------------------------------------------------------


@dataclass
class _Record:
    """What the job knows of a run beside what is in the run's own files. It is written to
    <run>/experiment.json."""

    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    evaluated: str | None = None
    """SHA-256 of the manifest of the checkpoint that eval/ is of."""
    date: str | None = None
    """Of the evaluation."""

    @classmethod
    def of(cls, run: StageRun) -> _Record:
        path = run.folder / "experiment.json"
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def save(self, run: StageRun) -> None:
        with whole_file(run.folder / "experiment.json") as part:
            part.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


@dataclass(frozen=True)
class _Piece:
    """A run to train, or to evaluate."""

    run: StageRun
    evaluation: bool = False

    def __str__(self) -> str:
        stage = self.run.stage
        what = (
            "evaluation"
            if self.evaluation
            else f"stage {stage.name}, {stage.epochs} epoch{'s' * (stage.epochs > 1)}"
        )
        return f"{self.run.title}: {what}"


class _Job:
    """Pieces of work, and what of them is done: on the disk, so that a job that is started again
    knows it too."""

    def __init__(self, chains: Sequence[Chain]) -> None:
        """ConfigError if the folder of a run of `chains` holds a run of another config."""
        from mrcnn_jax.training.open import refuse_another_config

        self._ends: dict[StageRun, Meta | None] = {}
        for run in dict.fromkeys(run for chain in chains for run in chain.runs):
            refuse_another_config(run.config, run.folder)
            self._ends[run] = _end(run)

    def end(self, run: StageRun) -> Meta | None:
        """The checkpoint that completes the run, None if it is not complete."""
        return self._ends[run]

    def done(self, piece: _Piece) -> bool:
        end = self.end(piece.run)
        if end is None or not piece.evaluation:
            return end is not None
        return (
            _Record.of(piece.run).evaluated == _fingerprint(piece.run, end)
            and (piece.run.folder / "eval" / "metrics.json").exists()
        )

    def work(self, piece: _Piece) -> None:
        from mrcnn_jax.commands.evaluate import evaluate_run
        from mrcnn_jax.training.loop import train

        run = piece.run
        with _timed(piece):
            if piece.evaluation:
                evaluate_run(run.folder)
            else:
                train(run.config, run.folder)
        self._ends[run] = end = _end(run)
        if piece.evaluation and end is not None:
            replace(
                _Record.of(run), evaluated=_fingerprint(run, end), date=date.today().isoformat()
            ).save(run)

    def seconds_left(self, pieces: Sequence[_Piece]) -> float | None:
        """What `pieces` will take, by those that are done; None as long as there is none of some
        kind.

        An epoch with several losses is taken for as many epochs with one.
        """
        known: dict[str, list[float]] = {}
        for run, end in self._ends.items():
            record = _Record.of(run)
            if end is not None and len(run.stage.losses) == 1:
                known.setdefault(run.stage.losses[0], []).append(
                    record.training_seconds / run.stage.epochs
                )
            if record.evaluated is not None:
                known.setdefault("evaluation", []).append(record.evaluation_seconds)
        kinds = [
            kind
            for p in pieces
            for kind in (
                ("evaluation",) if p.evaluation else p.run.stage.losses * p.run.stage.epochs
            )
        ]
        return (
            sum(statistics.mean(known[kind]) for kind in kinds)
            if known.keys() >= set(kinds)
            else None
        )


def _end(run: StageRun) -> Meta | None:
    from mrcnn_jax.runs.checkpoints import Checkpoints

    meta = Checkpoints(run.folder, keep=1).latest()
    return meta if meta is not None and meta.stage_complete else None


def _fingerprint(run: StageRun, meta: Meta) -> str:
    """Of a checkpoint: its manifest holds the sums of all of its files."""
    return hashlib.sha256(
        (run.folder / "checkpoints" / meta.name / "manifest.json").read_bytes()
    ).hexdigest()


@contextmanager
def _timed(piece: _Piece) -> Iterator[None]:
    """Adds the seconds of a piece, also of one that is stopped, to its run's record, and lets go of
    what it held."""
    import jax

    started = time.perf_counter()
    try:
        yield
    finally:
        seconds, record = time.perf_counter() - started, _Record.of(piece.run)
        if piece.evaluation:
            record.evaluation_seconds += seconds
        else:
            record.training_seconds += seconds
        if piece.run.folder.is_dir():
            record.save(piece.run)
        jax.clear_caches()  # the programs of this piece, which no other one runs
        gc.collect()


def run(arguments: Arguments) -> None:
    """Does what is not done of the job, and writes its table.

    Raises:
        ConfigError: a user's mistake.
        Stopped, TrainingError: as of `training.loop.train`; the same arguments go on.
    """
    import jax  # late, as what needs it below: a typo should not wait for it

    on_cpu = jax.default_backend() == "cpu"
    recipe = load_recipe(
        arguments.recipe or ("report_cpu" if on_cpu else "coco300"), arguments.data_root
    )
    by_seed = plan(recipe, arguments.workdir, seeds=arguments.seeds or (1 if on_cpu else 3))
    all_chains = [chain for chains in by_seed for chain in chains]
    job = _Job(all_chains)
    wanted = [
        chain
        for chain in all_chains
        if chain.variant is BASELINE or chain.variant.experiment in (arguments.only or EXPERIMENTS)
    ]
    pieces = list(
        dict.fromkeys(
            p
            for chain in wanted
            for p in (*(_Piece(run) for run in chain.runs), _Piece(chain.runs[-1], evaluation=True))
        )
    )
    print(f"{len(pieces)} pieces of work, {sum(job.done(piece) for piece in pieces)} of them done")
    for number, piece in enumerate(pieces, start=1):
        if job.done(piece):
            continue
        seconds = job.seconds_left([p for p in pieces if not job.done(p)])
        left = "" if seconds is None else f"; about {seconds / 60:.0f} min left in all"
        print(f"\n[{number} of {len(pieces)}] {piece}{left}", flush=True)
        job.work(piece)
    write_table(recipe, by_seed, job, arguments)


# -- the table -------------------------------------------------------------------------------------


def write_table(
    recipe: Config, by_seed: Sequence[Sequence[Chain]], job: _Job, arguments: Arguments
) -> None:
    """Writes table.json and table.md, and prints the latter: a row for each variant that is done
    with every seed."""
    limit = recipe.model.rpn.proposals
    columns = {
        **{
            f"recall@{limit}": f"recall at {limit}",
            **{f"recall@{limit}/{size}": size for size in ("small", "medium", "large")},
        },
        **{
            "bbox/AP": "box AP",
            "bbox/AP50": "box AP50",
            "segm/AP": "mask AP",
            "segm/AP50": "mask AP50",
            "segm/AP75": "mask AP75",
        },
    }
    rows = []
    shown: dict[StageRun, None] = {}
    for chains in zip(*by_seed, strict=True):  # a variant with every seed
        lasts = [chain.runs[-1] for chain in chains]
        if not all(job.done(_Piece(last, evaluation=True)) for last in lasts):
            continue
        shown |= dict.fromkeys(run for chain in chains for run in chain.runs)
        metrics = [
            json.loads((last.folder / "eval" / "metrics.json").read_text()) for last in lasts
        ]
        stages = zip(*(chain.runs for chain in chains), strict=True)
        variant = chains[0].variant
        rows.append(
            {
                "variant": variant.title,
                "runs": [str(last.folder) for last in lasts],
                "metrics": {name: [found.get(name) for found in metrics] for name in columns},
                "seconds_per_epoch": {
                    runs[0].stage.name: [_seconds_per_epoch(run, job) for run in runs]
                    for runs in stages
                },
                "parameters": _parameters(lasts[0].config),
                "command": _command(arguments, variant),
            }
        )
    records = [_Record.of(run) for run in shown]
    ends = [end for run in shown if (end := job.end(run)) is not None]
    table = {
        "recipe": recipe.name,
        "seeds": [recipe.seed + number for number in range(len(by_seed))],
        "rows": rows,
        "training_seconds": round(sum(record.training_seconds for record in records), 1),
        "evaluation_seconds": round(sum(record.evaluation_seconds for record in records), 1),
        "device": "; ".join(dict.fromkeys(_device(end) for end in ends)),
        "jax": ", ".join(sorted({str(end.environment["jax"]) for end in ends})),
        "date": max(record.date for record in records if record.date is not None),
    }
    (arguments.workdir / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    text = _markdown(table, columns)
    (arguments.workdir / "table.md").write_text(text)
    print(f"\n{text}\ntable: {arguments.workdir / 'table.md'}, {arguments.workdir / 'table.json'}")


def _seconds_per_epoch(run: StageRun, job: _Job) -> float:
    end = job.end(run)
    assert end is not None
    rows = [json.loads(line) for line in (run.folder / "timing.jsonl").read_text().splitlines()]
    return round(seconds_per_epoch(rows, steps=end.stage_step // run.stage.epochs), 3)


def seconds_per_epoch(rows: Sequence[dict[str, Any]], *, steps: int) -> float:
    """The median over the rows of timing.jsonl that are whole epochs of `steps` steps; without any,
    over what a stop left of them."""
    whole = [row for row in rows if row["steps"] == steps] or rows
    return statistics.median(row["seconds"] / row["steps"] for row in whole) * steps


def _parameters(config: Config) -> int:
    import jax

    from mrcnn_jax.models.mask_rcnn import MaskRCNN, example_batch

    network = MaskRCNN(config.model)
    shapes = jax.eval_shape(
        lambda batch: network.init(jax.random.key(0), batch), example_batch(config.data.canvases[0])
    )
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def _command(arguments: Arguments, variant: Variant) -> str:
    given = {
        "--recipe": arguments.recipe,
        "--seeds": arguments.seeds,
        "--data-root": arguments.data_root,
    }
    options = [
        text for name, value in given.items() if value is not None for text in (name, str(value))
    ]
    words = [
        "python",
        "-m",
        "mrcnn_jax.experiments",
        "--workdir",
        str(arguments.workdir),
        *options,
        "--only",
        variant.experiment,
    ]
    return shlex.join(words)


def _device(meta: Meta) -> str:
    found = meta.environment
    cpu = f"{found['cores']} cores of {found['processor']}"
    return cpu if found["platform"] == "cpu" else f"{found['devices']} x {found['device']}"


def _markdown(table: dict[str, Any], columns: dict[str, str]) -> str:
    seeds, rows = table["seeds"], table["rows"]
    stages = " / ".join(rows[0]["seconds_per_epoch"])
    head = ["variant", *columns.values(), f"s an epoch ({stages})", "parameters", "command"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        seconds = " / ".join(
            spread(values, "{:.1f}".format) for values in row["seconds_per_epoch"].values()
        )
        metrics = [spread(row["metrics"][name], _share) for name in columns]
        lines.append(
            [row["variant"], *metrics, seconds, f"{row['parameters']:,}", f"`{row['command']}`"]
        )
    training, evaluation = table["training_seconds"] / 60, table["evaluation_seconds"] / 60
    several = (
        f"seeds {', '.join(map(str, seeds))}: mean ± standard deviation"
        if len(seeds) > 1
        else f"seed {seeds[0]}"
    )
    notes = [
        f"Recipe {table['recipe']}, {several}. {table['device']}, jax {table['jax']}, {table['date']}.",
        f"{training + evaluation:.1f} minutes in all: training {training:.1f} (compilation, validation, checkpoints and curves included),"
        f" evaluation and its pictures {evaluation:.1f}; each stage that variants share counts once. Seconds an epoch: the median over the"
        " epochs of a stage, compilation included, validation not.",
    ]
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", *notes]) + "\n"


def spread(values: Sequence[float | None], show: Callable[[float], str]) -> str:
    """Mean ± standard deviation; "-" where COCO's figure is not defined."""
    known = [value for value in values if value is not None and value >= 0]
    if len(known) < len(values):
        return "-"
    mean = show(statistics.mean(known))
    return f"{mean} ± {show(statistics.stdev(known))}" if len(known) > 1 else mean


def _share(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


# -- the command -----------------------------------------------------------------------------------


def stop_when_asked(workdir: Path) -> None:
    """From now on SIGTERM raises Stopped, where it does not reach a training, which saves its state
    first; so does the first Ctrl-C."""
    from mrcnn_jax.training.loop import Stopped

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(f"stopped by signal {number}: what is done is kept in {workdir}")

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, interrupt)


def main() -> None:
    arguments = tyro.cli(
        Arguments, prog="python -m mrcnn_jax.commands.experiments", description=__doc__
    )
    from mrcnn_jax.training.loop import Stopped, TrainingError

    stop_when_asked(arguments.workdir)
    try:
        run(arguments)
    except Stopped as stopped:
        print(f"{stopped} (the same command goes on)")
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
