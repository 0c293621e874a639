"""Train Mask R-CNN stage by stage.

    mrcnn train --config configs/shapes.py --workdir runs/a [--stages.0.epochs 2 ...]

The same command again resumes from the newest complete checkpoint. Every field of the config is an
option: `--config FILE --help` lists them. `--weights` takes weights to start from and sets the
fields that go with them (docs/weights.md). On several hosts, or in several processes, start each
with the same command and its own `--distributed.*` (docs/scaling.md).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import load_config_file, load_config_json
from mrcnn_jax.config.schema import Config

if TYPE_CHECKING:
    from mrcnn_jax.weights.choice import Choice


@dataclass(frozen=True, kw_only=True)
class _Folder:
    config: str
    """A config file, or the name of one in configs/."""
    workdir: Path
    """The run's folder, made if it does not exist."""
    weights: str | None = None
    """Weights to start from, whose depth, batch norm and other constants the config then gets: a
    run's folder, a file of torchvision's, detectron2's or timm's, or the name of published ones,
    such as torchvision-coco-v1."""
    download: bool = False
    """Fetch the published weights that --weights names, unless that was done before."""


@dataclass(frozen=True, kw_only=True)
class Arguments(_Folder):
    fields: Annotated[Config, tyro.conf.arg(name="")]
    given: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Dotted names of the fields that are options of the command line."""


@dataclass(frozen=True)
class _File:
    config: str | None = None
    weights: str | None = None


def parse(argv: Sequence[str], program: str) -> Arguments:
    """The arguments; the options are the fields of the config that `--config` names."""
    words = [word for word in argv if word not in ("-h", "--help")]
    start = tyro.cli(_File, args=words, prog=program, return_unknown_args=True)[0]
    if start.config is None:
        tyro.cli(_Folder, args=argv, prog=program, description=__doc__)  # exits
    assert start.config is not None
    fields = load_config_file(start.config)
    if start.weights is not None:
        fields = replace(fields, init_from=start.weights)  # options may need one
    arguments = tyro.cli(
        tyro.conf.AvoidSubcommands[Arguments],
        default=Arguments(config=start.config, workdir=tyro.MISSING, fields=fields),
        args=argv,
        prog=program,
        description=__doc__,
    )
    options = [word[2:].partition("=")[0] for word in argv if word.startswith("--")]
    names = (re.sub(r"(^|\.)no_", r"\1", option.replace("-", "_")) for option in options)
    return replace(arguments, given=tuple(names))


def run(arguments: Arguments) -> None:
    """Trains, or resumes, in this process or in several."""
    from mrcnn_jax import parallel
    from mrcnn_jax.training.loop import train

    parallel.join(arguments.fields.distributed)
    train(*with_weights(arguments))


def with_weights(arguments: Arguments) -> tuple[Config, Path, Choice | None]:
    """Finds and reads the weights of --weights, and prints what they fix.

    Returns:
        The config with these fields, the run's folder, and the choice; None if there is none, or
        the run made it when it began.

    Raises:
        ConfigError: the weights cannot be used, or an option contradicts them.
    """
    from mrcnn_jax import parallel
    from mrcnn_jax.weights.choice import choose, chosen_before
    from mrcnn_jax.weights.published import locate

    config, workdir, weights = arguments.fields, arguments.workdir, arguments.weights
    if weights is None:
        if arguments.download:
            raise ConfigError("--download: needs --weights with the name of published ones")
        return config, workdir, None
    if "init_from" in arguments.given:
        raise ConfigError("--weights: not with --init-from, which it sets")
    path = parallel.in_turn(lambda: locate(weights, download=arguments.download))
    config = replace(config, init_from=str(path))
    if (workdir / "config.json").exists():
        saved = load_config_json(workdir / "config.json")
        return chosen_before(config, saved, arguments.given), workdir, None
    choice = choose(path)
    return choice.applied(config, arguments.given), workdir, choice
