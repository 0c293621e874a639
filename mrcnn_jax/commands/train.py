"""Train Mask R-CNN stage by stage.

    mrcnn train --config configs/shapes.py --workdir runs/a [--stages.0.epochs 2 ...]
    mrcnn train my/ [--workdir runs/my]

`my/` is a folder of images and annotations, for which a config is chosen (docs/your_own_data.md).
The same command again resumes from the newest complete checkpoint. Every field of the config is an
option: `--config FILE --help` lists them. On several hosts, or in several processes, start each
with the same command and its own `--distributed.*` (docs/scaling.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mrcnn_jax.commands import own_folder
from mrcnn_jax.config.files import load_config_file
from mrcnn_jax.config.schema import Config


@dataclass(frozen=True)
class _Folder:
    config: str
    """A config file, or the name of one in configs/."""
    workdir: Path
    """The run's folder, made if it does not exist."""


@dataclass(frozen=True)
class Arguments(_Folder):
    fields: Annotated[Config, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class _File:
    config: str | None = None


def parse(argv: Sequence[str], program: str) -> Arguments | own_folder.Request:
    """The arguments; the options are the fields of the config that `--config` names.

    A folder, which comes first, makes them a request of `own_folder`.
    """
    if argv and not argv[0].startswith("-"):
        return own_folder.parse(argv, program)
    words = [word for word in argv if word not in ("-h", "--help")]
    file = tyro.cli(_File, args=words, prog=program, return_unknown_args=True)[0].config
    if file is None:
        tyro.cli(_Folder, args=argv, prog=program, description=__doc__)  # exits
    assert file is not None
    return tyro.cli(
        tyro.conf.AvoidSubcommands[Arguments],
        default=Arguments(file, tyro.MISSING, load_config_file(file)),
        args=argv,
        prog=program,
        description=__doc__,
    )


def run(arguments: Arguments | own_folder.Request) -> None:
    """Trains, or resumes, in this process or in several."""
    if isinstance(arguments, own_folder.Request):
        own_folder.run(arguments)
        return
    from mrcnn_jax import parallel
    from mrcnn_jax.training.loop import train

    parallel.join(arguments.fields.distributed)
    train(arguments.fields, arguments.workdir)
