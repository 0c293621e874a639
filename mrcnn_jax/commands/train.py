"""Train Mask R-CNN stage by stage.

    python train.py --config configs/shapes.py --workdir runs/a [--stages.0.epochs 2 ...]
    [--init-from PATH]

The same command again resumes from the newest complete checkpoint. On several hosts, or in several
processes, each is started with the same command and its own `--distributed.*`; what they share is
in README.md. `--config FILE --help` lists every option of that config.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Annotated

import tyro

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import load_config_file
from mrcnn_jax.config.schema import Config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="a config file, or the name of one of configs/")
    parser.add_argument("--workdir", help="the run's folder; made if it is not there")
    known, overrides = parser.parse_known_args()
    if known.config is None:
        if not {"-h", "--help"} & set(overrides):
            raise ConfigError("--config: which config file? (see --help)")
        parser.print_help()
        sys.exit(0)
    default = load_config_file(known.config)
    try:
        config = tyro.cli(
            Annotated[Config, tyro.conf.AvoidSubcommands],
            default=default,
            args=overrides,
            prog=cli.program(),
            description=__doc__,
        )
    except ConfigError as error:
        raise ConfigError(f"command line: {error}") from None
    if known.workdir is None:
        raise ConfigError("--workdir: where the run's folder shall be")
    # Late: importing jax and tensorflow-datasets takes seconds, and a typo should not wait for
    # them.
    from mrcnn_jax import parallel
    from mrcnn_jax.training.loop import Stopped, TrainingError, train

    parallel.join(config.distributed)
    try:
        train(config, Path(known.workdir))
    except Stopped as stopped:
        print(stopped)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def command() -> None:
    cli.run(main)


if __name__ == "__main__":
    command()
