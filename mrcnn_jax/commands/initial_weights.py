"""`--weights`: from what a user names to the config that fits it."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from mrcnn_jax import parallel
from mrcnn_jax.commands.arguments import has_checkpoint
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import load_config_json
from mrcnn_jax.config.schema import Config
from mrcnn_jax.runs import hub
from mrcnn_jax.weights.choice import Choice, choose, chosen_before
from mrcnn_jax.weights.origin import open_origin
from mrcnn_jax.weights.published import PUBLISHED, locate


def with_weights(
    config: Config, workdir: Path, weights: str, given: Collection[str], *, download: bool
) -> tuple[Config, Choice | None]:
    """Finds and reads the weights to start from, and prints what they fix.

    Args:
        config: of the run.
        workdir: the run's folder.
        weights: as of `published.locate`.
        given: dotted names of the fields that the user gave.
        download: fetch what is not in the cache, unless a run with checkpoints needs it no more;
            of a new run also a newer model of the Hub.

    Returns:
        The config with the fields that the weights fix, and the choice; None if the run made it
        when it began.

    Raises:
        ConfigError: the weights cannot be used, or an option contradicts them.
    """
    if (workdir / "config.json").exists():
        saved = load_config_json(workdir / "config.json")
        began = parallel.in_turn(lambda: _of_begun(saved, workdir, weights, download=download))
        return chosen_before(replace(config, init_from=began), saved, given), None
    path = parallel.in_turn(lambda: locate(weights, download=download))
    config = replace(config, init_from=str(path))
    choice = choose(path, open_origin(path))
    if "init_without_classes" in given and not config.init_without_classes:
        choice = replace(choice, classes=0)  # the user knows that they are the same
    return choice.applied(config, given), choice


def _of_begun(saved: Config, workdir: Path, weights: str, *, download: bool) -> str:
    """`init_from` of a run that has begun: as saved, if its weights are gone and not needed."""
    needed = not (has_checkpoint(workdir) and _is_named(saved.init_from, weights))
    # A model of the Hub may have changed since the run began from it: first that of the cache.
    first = download and needed and not weights.startswith(hub.SCHEME)
    try:
        return str(locate(weights, download=first))
    except ConfigError:
        if needed and first == download:
            raise
    if needed:
        return str(locate(weights, download=True))
    print(f"--weights: {weights}: not there; the run goes on without, begun from {saved.init_from}")
    return str(saved.init_from)


def _is_named(began: str | None, weights: str) -> bool:
    """Whether `weights` name what a run began with, which need not be there any more."""
    if began is None:
        return False
    if weights in PUBLISHED:
        return Path(began).name == PUBLISHED[weights].file
    if weights.startswith(hub.SCHEME):
        repository, _ = hub.parse(weights)
        return f"models--{repository.replace('/', '--')}" in Path(began).parts  # of the Hub's cache
    folders = ("", os.environ.get("MRCNN_DATA", ""))
    return began in (weights, *(str(Path(folder, weights).resolve()) for folder in folders))
