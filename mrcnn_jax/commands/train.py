"""Train Mask R-CNN stage by stage, or go on with a training.

    mrcnn train --config shapes --workdir runs/a [--stages.0.epochs 2 ...]
    mrcnn train my/ [--workdir runs/my] [--minutes 15]
    mrcnn train --resume runs/a [--epochs 30]

`my/` is a folder of images and annotations, for which a config is chosen (docs/your_own_data.md).
A run that was stopped goes on from its newest complete checkpoint. Ctrl-C saves at the end of the
step; a second one leaves at once. Every field of the config is an option: `--config FILE --help`
lists them. `--weights` takes weights to start from and sets the fields that go with them
(docs/weights.md). On several hosts, or in several processes, start each with the same command and
its own `--distributed.*` (docs/scaling.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from mrcnn_jax import cli
from mrcnn_jax.commands import own_folder
from mrcnn_jax.commands.arguments import (
    FromWeights,
    fields_given,
    has_checkpoint,
    longer,
    next_workdir,
    with_heads,
)
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import (
    differences,
    load_config_file,
    load_config_json,
    resolve_paths,
)
from mrcnn_jax.config.schema import Config
from mrcnn_jax.config.tables import canvases_for, extended


@dataclass(frozen=True, kw_only=True)
class _Run:
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Of a new run: a config file, the name of one in configs/, or the config.json of a run."""
    workdir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Of a new run: its folder, made if it does not exist."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """The folder of a run to go on with, by its own config.json; instead of --config and
    --workdir."""


@dataclass(frozen=True, kw_only=True)
class _Options(FromWeights, _Run):
    epochs: Annotated[float | None, tyro.conf.arg(metavar="N")] = None
    """With --resume: train the last stage of a finished run on, to so many epochs in all. Those
    that are added are a stage of their own, whose learning rate begins anew."""


@dataclass(frozen=True, kw_only=True)
class _AllOptions(_Options):
    fields: Annotated[Config, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class _Sides:
    short_side: int | None = None
    long_side: int | None = None


@dataclass(frozen=True)
class _Data:
    data: _Sides = _Sides()


@dataclass(frozen=True)
class _Start:
    """The options that another start makes void."""

    init_from: str | None = None
    init_without_classes: bool = False


@dataclass(frozen=True)
class Arguments:
    config: Config
    workdir: Path
    resumed: bool
    """`workdir` has to hold a run."""
    epochs: float | None
    weights: str | None
    download: bool
    notes: tuple[str, ...]
    """What was chosen for the user, a line each."""
    file: str
    """What `config` began as, before the options that are fields of it."""
    options: tuple[str, ...]

    @property
    def given(self) -> frozenset[str]:
        """Dotted names of the fields among the options."""
        return fields_given(self.options)


def parse(argv: Sequence[str], program: str) -> Arguments | own_folder.Request:
    """The arguments; the options are the fields of the config that `--config` or `--resume` names.

    A folder, which comes first, makes them a request of `own_folder`.

    Raises:
        ConfigError: options that are missing or do not go together; a config that cannot be read.
    """
    if argv and not argv[0].startswith("-"):
        return own_folder.parse(argv, program)
    words = [word for word in argv if word not in ("-h", "--help")]
    given, fields = tyro.cli(_Options, args=words, prog=program, return_unknown_args=True)
    if given.resume is not None:
        file = _config_of_run(given)
    elif given.epochs is not None:
        raise ConfigError("--epochs: goes with --resume; of a new run: --stages.0.epochs N")
    elif given.config is not None:
        file = given.config
    else:
        if len(words) < len(argv):
            tyro.cli(_Options, args=["--help"], prog=program, description=__doc__)  # exits
        for word in fields:
            if Path(word).is_dir():
                raise ConfigError(f"{word}: a folder of data comes first: {program} {word} ...")
        raise ConfigError(
            f"a folder of data, --resume, or --config and --workdir are missing ({program} --help)"
        )
    given.refuse_contradiction(fields_given(fields))
    if "minutes" in fields_given(fields):
        raise ConfigError(
            f"--minutes: goes with a folder of data: {program} my/ --minutes M (of a config the "
            "length is --stages.0.epochs; a run that goes on keeps its own)"
        )
    config, notes = _with_canvases(load_config_file(file), fields)
    if given.weights is not None:
        config = replace(config, init_from=given.weights)  # other fields may need one
    config = tyro.cli(
        tyro.conf.AvoidSubcommands[_AllOptions],
        default=_AllOptions(fields=config, **dataclasses.asdict(given)),
        args=argv,
        prog=program,
        description=__doc__,
    ).fields
    config, more = with_heads(config)
    workdir = given.resume or given.workdir
    if workdir is None:
        raise ConfigError(f"--workdir DIR, the run's folder, is missing ({program} --help)")
    resumed = given.resume is not None
    return Arguments(
        config=config,
        workdir=workdir,
        resumed=resumed,
        epochs=given.epochs,
        weights=given.weights,
        download=given.download,
        notes=(*notes, *more),
        file=file,
        options=tuple(fields),
    )


def _config_of_run(given: _Options) -> str:
    assert given.resume is not None
    for name in ("config", "workdir"):
        if getattr(given, name) is not None:
            raise ConfigError(f"--resume: names the run's config and folder: leave out --{name}")
    if given.weights is not None:
        raise ConfigError("--resume: the run has weights: leave out --weights")
    file = given.resume / "config.json"
    if not file.is_file():
        raise ConfigError(f"--resume: {given.resume}: no config.json there (is this a run?)")
    return str(file)


def run(arguments: Arguments | own_folder.Request) -> None:
    """Trains, or goes on, in this process or in several.

    Raises:
        ConfigError, cli.Failure: as of `training.loop.train`.
        cli.Stopped: by a signal; the line says how to go on.
    """
    with contextlib.ExitStack() as stack:
        if cli.takes_ctrl_c() and arguments.config.distributed.coordinator is None:
            line = "interrupted: nothing is lost"
            hears = cli.hear([signal.SIGINT], lambda *_: None, lambda n: cli.leave(n, line))
            stack.enter_context(hears)  # until steps are done, from when on the loop does
        if isinstance(arguments, own_folder.Request):
            _going_on_by(arguments.workdir, lambda: own_folder.run(arguments))
        else:
            _train(arguments)


def _going_on_by(workdir: Path, train: Callable[[], object]) -> None:
    """Trains, and says at the end how to go on.

    Raises:
        cli.Stopped: by a signal; the line says it too.
    """
    again = cli.command("train", "--resume", workdir)
    try:
        train()
    except cli.Stopped as stopped:
        raise cli.Stopped(f"{stopped}; to go on: {again}", stopped.number) from None
    print(f"to train the last stage longer: {again} --epochs N")


def _train(arguments: Arguments) -> None:
    from mrcnn_jax import parallel
    from mrcnn_jax.commands.initial_weights import with_weights
    from mrcnn_jax.training.loop import train
    from mrcnn_jax.training.resume import AnotherConfig

    config, workdir = arguments.config, arguments.workdir
    parallel.join(config.distributed)
    again = cli.command("train", "--resume", workdir)
    if arguments.resumed:
        config = _going_on(config, workdir, arguments.epochs, again)
    for note in arguments.notes:
        print(note)
    choice = None
    if arguments.weights is not None:
        config, choice = with_weights(
            config, workdir, arguments.weights, arguments.given, download=arguments.download
        )
    try:
        _going_on_by(workdir, lambda: train(config, workdir, choice))
    except AnotherConfig as error:
        raise ConfigError(f"{error}{_way_out(arguments, again)}") from None


def _going_on(config: Config, workdir: Path, epochs: float | None, again: str) -> Config:
    """The config of a run to go on with; ConfigError if there is nothing to go on from."""
    from mrcnn_jax.runs.checkpoints import Checkpoints
    from mrcnn_jax.runs.hub_folder import is_hub_folder

    checkpoints = Checkpoints(workdir, keep=1)
    meta = checkpoints.latest()
    if meta is None and epochs is None and checkpoints.is_replacing():
        return config  # opening the run, which keeps others out, puts it back
    if meta is None and is_hub_folder(workdir):
        raise ConfigError(
            f"--resume: {workdir}: a shared model; to train from it: --config FILE --workdir DIR "
            f"--weights {shlex.quote(str(workdir))}"
        )
    if meta is None:
        begin = cli.command("train", "--config", workdir / "config.json", "--workdir", workdir)
        raise ConfigError(f"--resume: {workdir}: no checkpoint there yet; to begin: {begin}")
    if not config.stages:
        raise ConfigError(
            f"--resume: {workdir}: imported weights; to train from them: --config FILE --workdir "
            f"DIR --weights {shlex.quote(str(workdir))}"
        )
    if epochs is None:
        return config
    if not meta.stage_complete or meta.stage_index + 1 < len(config.stages):
        raise ConfigError(
            f"--epochs: {workdir} is not finished (stage {meta.stage}, step {meta.stage_step}); "
            f"first: {again}"
        )
    return extended(config, epochs)


def _with_canvases(config: Config, words: Sequence[str]) -> tuple[Config, tuple[str, ...]]:
    """The config with canvases for the sides among the options, and a line about them.

    They stay as they are if they are an option too, or if the sides are those of the config.
    """
    sides = tyro.cli(_Data, args=words, return_unknown_args=True)[0].data
    data = config.data
    short, long = sides.short_side or data.short_side, sides.long_side or data.long_side
    names = {word.partition("=")[0].replace("_", "-") for word in words}
    if "--data.canvases" in names or (short, long) == (data.short_side, data.long_side):
        return config, ()
    canvases = canvases_for(short, long)
    listed = ", ".join(f"{height} x {width}" for height, width in canvases)
    note = f"canvases {listed}, chosen for images of {short} x {long} (--data.canvases)"
    data = replace(data, short_side=short, long_side=long, canvases=canvases)
    return replace(config, data=data), (note,)


def _way_out(arguments: Arguments, again: str) -> str:
    """What to type where the folder holds a run of another config; "" if it has no weights yet."""
    config, workdir = arguments.config, arguments.workdir
    saved = workdir / "config.json"
    if saved.exists() and not differences(
        resolve_paths(config, needs_start=False), load_config_json(saved)
    ):
        return f"; it has more stages by now: {again}"
    if not has_checkpoint(workdir):
        return ""
    options = tyro.cli(_Start, args=arguments.options, return_unknown_args=True)[1]
    if config.init_without_classes:  # of the weights that this run began with
        options = ["--no-init-without-classes", *options]
    start = ("--config", arguments.file, "--init-from", workdir)
    new = cli.command("train", *start, "--workdir", next_workdir(workdir), *options)
    more = longer(load_config_json(saved), config, workdir) if saved.exists() else ""
    return f"{more}; from its weights: {new}"
