"""Copy a run to hand it on: no optimiser state, no local paths, and a model card.

    mrcnn share --workdir runs/a --out shared/a [--weights-licence "CC BY-NC 4.0"]

The new folder is a run's folder: eval, predict and `train --weights` take it. README.md in it is
the model card.
"""

from __future__ import annotations

from dataclasses import replace

from mrcnn_jax.commands.arguments import ToHandOn as Arguments
from mrcnn_jax.config.files import config_hash


def run(arguments: Arguments) -> None:
    """Writes the folder; ConfigError if there is no such run, or `out` is taken."""
    from mrcnn_jax.commands.model_card import model_card, without_folders, without_paths
    from mrcnn_jax.runs.run import load_run, refuse_taken, write_run

    out = arguments.out
    refuse_taken(out)
    source = load_run(arguments.workdir, arguments.checkpoint, arguments.weights)
    config = without_paths(source.config)
    # The weights that are copied are all there is: none is averaged beside them.
    config = replace(config, stages=tuple(replace(stage, ema_decay=0.0) for stage in config.stages))
    card = model_card(source, arguments.workdir, weights_licence=arguments.weights_licence)
    environment = {
        name: without_folders(value) if isinstance(value, str) else value  # of XLA's flags
        for name, value in source.meta.environment.items()
    }
    meta = replace(source.meta, config_hash=config_hash(config), environment=environment)
    write_run(out, config, source.variables, meta, {"README.md": card})
    print(f"{out}: the run without its optimiser state; model card: {out / 'README.md'}")
