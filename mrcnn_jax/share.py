"""Make a run ready to be handed on: parameters without the optimiser's state, no local paths, and a model card.

    python -m mrcnn_jax.share --workdir runs/a --out shared/a [--weights-licence "CC BY-NC 4.0"]

The new folder is that of a run: eval.py, predict.py and --init-from take it. README.md in it is the model card.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from mrcnn_jax import cli
from mrcnn_jax.config import config_hash


@dataclass(frozen=True)
class Arguments:
    workdir: Path
    """The run's folder."""
    out: Path
    """The new folder."""
    weights_licence: str | None = None
    """Of the weights that the run started from, for the card; without it the card says that it is not stated."""


def share(arguments: Arguments) -> None:
    """ConfigError if there is no such run, or `out` is taken."""
    from mrcnn_jax.evaluation.model_card import model_card, without_paths
    from mrcnn_jax.evaluation.predict import load_run
    from mrcnn_jax.training.checkpoints import refuse_taken, write_run

    refuse_taken(arguments.out)
    run = load_run(arguments.workdir)
    config = without_paths(run.config)
    texts = {"README.md": model_card(run, arguments.workdir, weights_licence=arguments.weights_licence)}
    metrics = arguments.workdir / "eval" / "metrics.json"
    if metrics.exists() and json.loads(metrics.read_text()).get("checkpoint") == run.meta.name:
        texts["eval/metrics.json"] = metrics.read_text()
    write_run(arguments.out, config, run.variables, replace(run.meta, config_hash=config_hash(config)), texts)
    print(f"{arguments.out}: the run without its optimiser's state; model card: {arguments.out / 'README.md'}")


def main() -> None:
    share(tyro.cli(Arguments, prog=cli.program(), description=__doc__))


if __name__ == "__main__":
    cli.run(main)
