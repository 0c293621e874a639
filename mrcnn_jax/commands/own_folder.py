"""Train on a folder of images and annotations; the config is chosen for them.

    mrcnn train my/ [--workdir runs/my] [--weights FILE] [--minutes 15 | --stages.0.epochs 30 ...]

The folder comes first. How it keeps its annotations is recognised (docs/your_own_data.md), and what
was chosen is printed, each with its reason and its option. The same command again resumes, and
chooses nothing again. Below are the fields of the config, of a new run as they are in
configs/finetune.py, with one box for all classes: before anything is chosen.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mrcnn_jax import cli
from mrcnn_jax.commands.arguments import (
    FromWeights,
    fields_given,
    has_checkpoint,
    longer,
    next_workdir,
)
from mrcnn_jax.config.errors import ConfigError, require
from mrcnn_jax.config.files import (
    PATHS,
    differences,
    load_config_file,
    load_config_json,
    values_of,
)
from mrcnn_jax.config.optional_heads import following_heads
from mrcnn_jax.config.schema import Config

if TYPE_CHECKING:
    from mrcnn_jax.choices.folder import Opening
    from mrcnn_jax.choices.table import Chosen
    from mrcnn_jax.training.open import OpenRun
    from mrcnn_jax.training.programs import Prepared


@dataclass(frozen=True)
class _Sides:
    """Fields of `DataConfig` that have to fit each other; None: to be chosen."""

    short_side: int | None = None
    long_side: int | None = None
    canvases: tuple[tuple[int, int], ...] | None = None

    def given(self) -> dict[str, Any]:
        """Those given, by dotted name."""
        values = {f"data.{one.name}": getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class _Own(FromWeights):
    workdir: Path | None = None
    init_from: str | None = None
    minutes: float | None = None
    data: _Sides = _Sides()


@dataclass(frozen=True, kw_only=True)
class _Folder:
    workdir: Path
    """The run's folder; by default runs/ and the folder's name."""
    minutes: Annotated[float | None, tyro.conf.arg(metavar="M")] = None
    """Of a new run: choose the length of training so that the command ends after M minutes. Epochs
    and the rest of the schedule follow, once, from the speed of the first steps."""


@dataclass(frozen=True, kw_only=True)
class _Options(FromWeights, _Folder):
    fields: Annotated[Config, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class _OfRun:
    """The options that a run from the weights of another one replaces."""

    workdir: Path | None = None
    weights: str | None = None
    download: bool = False
    init_from: str | None = None


@dataclass(frozen=True)
class Request:
    """A command line with a folder."""

    folder: Path
    workdir: Path
    begun: bool
    """The run has a config; nothing is chosen again."""
    config: Config
    """Its config, or else one that holds what was given and no choice yet."""
    values: Mapping[str, Any]
    """The fields of it that were given, by dotted name, but `init_from`."""
    init_from: str | None
    weights: str | None
    download: bool
    minutes: float | None
    words: tuple[str, ...]
    """All options."""
    given: tuple[str, ...]
    """The names of all options."""
    program: str
    asked: float
    """When, by `time.monotonic`."""


def parse(argv: Sequence[str], program: str) -> Request:
    """The request; `argv` begins with the folder.

    Raises:
        ConfigError: no such folder, or a run on another one; a config besides.
    """
    asked = time.monotonic()
    folder, words = Path(argv[0]), argv[1:]
    program = f"{program} {argv[0]}"
    plain = [word for word in words if word not in ("-h", "--help")]
    given = tuple(w.partition("=")[0].replace("_", "-") for w in plain if w.startswith("--"))
    if "--config" in given:
        raise ConfigError(
            f"--config: a config is chosen for {folder}: give either the folder or --config"
        )
    if not folder.is_dir():
        hint = " (a file: name its folder)" if folder.is_file() else ""
        hint = f" (a config goes with --config {folder})" if folder.suffix == ".py" else hint
        raise ConfigError(f"{folder}: no such folder{hint}")
    own, others = tyro.cli(_Own, args=plain, prog=program, return_unknown_args=True)
    workdir = own.workdir or Path("runs", folder.resolve().name)
    if workdir.resolve() == folder.resolve():
        raise ConfigError(f"--workdir: {workdir} is the folder of the data: name another one")
    own.refuse_contradiction(fields_given(plain))
    _refuse_minutes(own.minutes, fields_given(plain))
    begun = (workdir / "config.json").exists()
    if begun:
        from mrcnn_jax.datasets.prepare import refuse_other_folder

        config = load_config_file(workdir / "config.json")  # without the processes that began it
        refuse_other_folder(config, folder, workdir)
        others = plain
    else:
        _refuse_files(fields_given(plain))
        # Has the fields that a chosen one has; some options need weights to start from.
        start = own.weights or own.init_from
        config = replace(load_config_file("finetune"), init_from=start)
        # A cascade needs one box for all classes, which what is chosen has where it may be given.
        cascade = (0.6, 0.7) if {"box2", "box3"} & set(plain) else ()
        box_head = replace(config.model.box_head, class_agnostic=True, cascade=cascade)
        config = replace(config, model=replace(config.model, box_head=box_head))
    config = tyro.cli(
        tyro.conf.AvoidSubcommands[_Options],
        default=_Options(workdir=workdir, fields=config),
        args=["--help"] if len(plain) < len(words) else others,
        prog=program,
        description=__doc__,
    ).fields
    values = values_of(config, fields_given(others)) | own.data.given()
    return Request(
        folder=folder,
        workdir=workdir,
        begun=begun,
        config=following_heads(config) if begun else config,
        values=values,
        init_from=own.init_from,
        weights=own.weights,
        download=own.download,
        minutes=own.minutes,
        words=tuple(plain),
        given=given,
        program=program,
        asked=asked,
    )


def _refuse_minutes(minutes: float | None, given: frozenset[str]) -> None:
    """Raises ConfigError if --minutes is no time, or goes with what it sets.

    Args:
        minutes: None: not given.
        given: options, as of `fields_given`.
    """
    if minutes is None:
        return
    require(0 < minutes < math.inf, "--minutes: must be positive and finite")
    require("stages.0.epochs" not in given, "--minutes: not with --stages.0.epochs, which it sets")


def _refuse_files(given: frozenset[str]) -> None:
    """Raises ConfigError if a field names files of the data set, which the folder holds."""
    for name in ("root", "folder", *(name for name in PATHS if not name.endswith("_depth"))):
        require(
            f"data.{name}" not in given,
            f"data.{name}: the folder says which files: leave it out, or take a config (--config)",
        )


def run(request: Request) -> None:
    """Chooses a config unless the run has one, tells what was chosen, and trains.

    Raises:
        ConfigError, cli.Failure, cli.Stopped: as of `training.loop.train`.
    """
    from mrcnn_jax import parallel
    from mrcnn_jax.datasets.prepare import DATASET, is_changed
    from mrcnn_jax.training.loop import train
    from mrcnn_jax.training.resume import AnotherConfig

    parallel.join(request.config.distributed)
    if request.begun:
        _refuse_other_weights(request)
        print(f"{request.workdir}: a run on {request.folder}: nothing is chosen again")
        if parallel.is_first() and is_changed(request.folder, request.workdir):
            print(
                f"{request.folder}: has changed since {request.workdir / DATASET} was made of it, "
                f"which this run keeps; to train on what is there now: {_anew(request)}"
            )
        if request.minutes is not None:
            print("--minutes: the run keeps the epochs that it began with")
        try:
            train(request.config, request.workdir)
        except AnotherConfig as error:
            raise ConfigError(f"{error}; {_ways_on(request)}") from None
    else:
        _train_new(request)


def _ways_on(request: Request) -> str:
    """What to type where options do not fit the run in the folder."""
    if not has_checkpoint(request.workdir):
        begun = cli.command("train", request.folder, "--workdir", request.workdir)
        return (
            f"as it was begun: {begun}; nothing is trained there yet: to choose again, remove "
            f"{request.workdir}"
        )
    from mrcnn_jax.weights.choice import fixed_by_runs

    begun = cli.command("train", "--resume", request.workdir)
    saved = load_config_json(request.workdir / "config.json")
    more = longer(saved, request.config, request.workdir)
    changed = {line.partition(":")[0] for line in differences(saved, request.config)}
    if not changed & fixed_by_runs():  # else its weights do not fit
        more += f"; a new run from its weights: {_anew(request)}"
    return f"as it was begun: {begun}{more}"


def _anew(request: Request) -> str:
    """The command of a new run, from the weights of the one in the folder if it has any."""
    options = tyro.cli(_OfRun, args=request.words, return_unknown_args=True)[1]
    start: tuple[object, ...] = ("--workdir", next_workdir(request.workdir))
    if has_checkpoint(request.workdir):
        start = ("--weights", request.workdir, *start)
    return cli.command("train", request.folder, *start, *options)


def _train_new(request: Request) -> None:
    from mrcnn_jax.choices.minutes import late, refuse_several_processes
    from mrcnn_jax.training.loop import train

    minutes, settle = request.minutes, None
    if minutes is not None:
        refuse_several_processes()
    opening = chosen_config(request)
    if minutes is not None:
        rows = [stage.name for stage in opening.config.stages]
        require(
            len(rows) == 1,
            f"--minutes: fits the epochs of one stage, but there are {len(rows)} "
            f"({', '.join(rows)}): leave out --minutes, or --stages.0.losses",
        )
        cached = opening.config.cache_features
        require(
            cached == "off",
            "--minutes: steps are measured without features that are kept: leave out --minutes, "
            f"or --cache-features {cached}",
        )
        settle = functools.partial(_settled, request, opening.chosen)
    train(opening.config, request.workdir, opening.weights, opening.data_sets, settle)
    line = None if minutes is None else late(minutes, time.monotonic() - request.asked)
    if line is not None:
        print(line)


def _settled(request: Request, chosen: Chosen, run: OpenRun) -> tuple[Config, Prepared]:
    """The config of a run that ends in the minutes asked, and its programs; prints the choices."""
    from mrcnn_jax.choices.minutes import fitted
    from mrcnn_jax.choices.speed import measure

    assert request.minutes is not None
    canvases = len({plan.canvas for plan in run.train_split.plans})
    programs = f"{canvases} training program{'s' * (canvases != 1)}"
    print(f"--minutes: compiling {programs} and measuring the speed", flush=True)
    speed, prepared = measure(run)
    fit = fitted(
        run.config,
        speed,
        minutes=request.minutes,
        used=time.monotonic() - request.asked,
        steps_per_epoch=run.steps_per_epoch,
        given=fields_given(request.given),
    )
    print("\n".join((fit.spent, *fit.table(chosen, request.given))))
    return fit.config, prepared


def _refuse_other_weights(request: Request) -> None:
    """Raises ConfigError if a run did not begin from the weights that are named."""
    from mrcnn_jax import parallel
    from mrcnn_jax.weights.published import locate

    if request.weights is None:
        return
    began = request.config.init_from
    try:
        path = locate(request.weights, download=False)
    except ConfigError:
        if has_checkpoint(request.workdir):
            return  # they are not needed any more
        if not request.download:
            raise
        path = parallel.in_turn(lambda: locate(str(request.weights), download=True))
    if str(path.resolve()) != began:
        raise ConfigError(
            f"--weights: {request.workdir} holds a run that began from {began or 'random weights'} "
            "(choose another --workdir)"
        )


def chosen_config(request: Request) -> Opening:
    """Chooses a config, and prints the choices unless --minutes leaves some of them open.

    Raises:
        ConfigError: a user's mistake.
    """
    from mrcnn_jax.choices.folder import config_for

    opening = config_for(
        request.folder,
        request.workdir,
        request.values,
        init_from=request.init_from,
        weights=request.weights,
        download=request.download,
    )
    if request.minutes is None:
        print("\n".join(opening.chosen.table(opening.config, request.given)))
    return opening
