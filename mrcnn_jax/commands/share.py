"""Copy a run to hand it on: no optimiser state, no local paths, and a model card.

    mrcnn share --workdir runs/a --out shared/a [--weights-licence "CC BY-NC 4.0"]
    mrcnn share --workdir runs/a --to hf://org/name [--licence Apache-2.0]

With --out the new folder is a run's folder, and with --to it is in the Hugging Face Hub's layout
(`runs.hub_folder`), here or on the Hub: eval, predict and `train --weights` take both. README.md in
it is the model card.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mrcnn_jax.commands.arguments import WithCard
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import config_hash

if TYPE_CHECKING:
    from mrcnn_jax.runs.run import Run


@dataclass(frozen=True, kw_only=True)
class Arguments(WithCard):
    out: Path | None = None
    """The new folder, a run's."""
    to: str | None = None
    """A new folder in the Hugging Face Hub's layout, or hf://org/name: a model on the Hub, which is
    made, private, if it is not there."""
    licence: str | None = None
    """Licence of the model itself, for the Hub; by default the card says unknown."""


def run(arguments: Arguments) -> None:
    """Writes the folder or uploads it.

    Raises:
        ConfigError: there is no such run, the place is taken, or the Hub cannot be used.
        cli.Failure: the upload failed.
    """
    from mrcnn_jax.commands.model_card import model_card
    from mrcnn_jax.runs import hub
    from mrcnn_jax.runs.hub_folder import front_matter, write_hub_folder
    from mrcnn_jax.runs.run import load_run, refuse_taken, write_run

    out, to = arguments.out, arguments.to
    if (out is None) == (to is None):
        raise ConfigError("share: needs --out or --to, one of them")
    if arguments.licence is not None and to is None:
        raise ConfigError("--licence: goes with --to")
    on_hub = to is not None and to.startswith(hub.SCHEME)
    if not on_hub and Path(out or str(to)).parts[:1] == ("hf:",):
        raise ConfigError(f"{out or to}: to a model on the Hub goes --to hf://org/name")
    if on_hub:
        hub.refuse_unusable(str(to))
    else:
        refuse_taken(Path(out or str(to)))
    source = load_run(arguments.workdir, arguments.checkpoint, arguments.weights)
    if (line := source.untrained_line) is not None:
        print(line)
    card = model_card(source, arguments.workdir, weights_licence=arguments.weights_licence)
    shared = _to_hand_on(source)
    if out is not None:
        write_run(out, shared.config, shared.variables, shared.meta, {"README.md": card})
        print(f"{out}: the run without its optimiser state; model card: {out / 'README.md'}")
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made, "model") if on_hub else Path(str(to))
        card = front_matter(arguments.licence) + card
        write_hub_folder(folder, shared.config, shared.variables, shared.meta, card)
        place = hub.upload(str(to), folder) if on_hub else str(to)
    print(
        f"{place}: model.safetensors, config.json and the model card, README.md"
        + ("; a new model is private until you change that on its page" if on_hub else "")
    )


def _to_hand_on(source: Run) -> Run:
    """A run without paths of this machine."""
    from mrcnn_jax.commands.model_card import without_folders, without_paths

    config = without_paths(source.config)
    # The weights that are copied are all there is: none is averaged beside them.
    config = replace(config, stages=tuple(replace(stage, ema_decay=0.0) for stage in config.stages))
    environment = {
        name: without_folders(value) if isinstance(value, str) else value  # of XLA's flags
        for name, value in source.meta.environment.items()
    }
    meta = replace(source.meta, config_hash=config_hash(config), environment=environment)
    return replace(source, config=config, meta=meta)
