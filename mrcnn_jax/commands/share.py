"""Make a run ready to be handed on: parameters without the optimiser's state, no local paths, and a
model card.

    python -m mrcnn_jax.commands.share --workdir runs/a --out shared/a [--weights-licence "CC BY-NC 4.0"]

The new folder is that of a run: eval.py, predict.py and --init-from take it. README.md in it is the
model card.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from mrcnn_jax import cli
from mrcnn_jax.config.files import config_hash


@dataclass(frozen=True)
class Arguments:
    workdir: Path
    """The run's folder."""
    out: Path
    """The new folder."""
    checkpoint: Literal["newest", "best"] = "newest"
    """best: the one of the highest mask AP, of a run with --evaluate-every-epochs."""
    weights: Literal["raw", "ema"] = "raw"
    """ema: their moving average, of a run with ema_decay."""
    weights_licence: str | None = None
    """Of the weights that the run started from, for the card; without it the card says that it is
    not stated."""


def share(arguments: Arguments) -> None:
    """ConfigError if there is no such run, or `out` is taken."""
    from mrcnn_jax.commands.model_card import model_card, without_paths
    from mrcnn_jax.runs.run import load_run, refuse_taken, write_run

    refuse_taken(arguments.out)
    run = load_run(arguments.workdir, arguments.checkpoint, arguments.weights)
    config = without_paths(run.config)
    config = replace(
        config, stages=tuple(replace(stage, ema_decay=0.0) for stage in config.stages)
    )  # its weights are all that there is
    card = model_card(run, arguments.workdir, weights_licence=arguments.weights_licence)
    write_run(
        arguments.out,
        config,
        run.variables,
        replace(run.meta, config_hash=config_hash(config)),
        {"README.md": card},
    )
    print(
        f"{arguments.out}: the run without its optimiser's state; model card: {arguments.out / 'README.md'}"
    )


def main() -> None:
    share(tyro.cli(Arguments, prog=cli.program(), description=__doc__))


if __name__ == "__main__":
    cli.run(main)
