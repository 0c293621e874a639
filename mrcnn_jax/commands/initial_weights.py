"""`--weights`: from what a user names to the config that fits it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from mrcnn_jax import parallel
from mrcnn_jax.config.files import load_config_json
from mrcnn_jax.config.schema import Config
from mrcnn_jax.runs import hub
from mrcnn_jax.weights.choice import Choice, choose, chosen_before
from mrcnn_jax.weights.origin import open_origin
from mrcnn_jax.weights.published import locate


def with_weights(
    config: Config, workdir: Path, weights: str, given: Collection[str], *, download: bool
) -> tuple[Config, Choice | None]:
    """Finds and reads the weights to start from, and prints what they fix.

    Args:
        config: of the run.
        workdir: the run's folder.
        weights: as of `published.locate`.
        given: dotted names of the fields that the user gave.
        download: fetch published weights that are not in the cache, and of a new run a model of
            the Hub.

    Returns:
        The config with the fields that the weights fix, and the choice; None if the run made it
        when it began.

    Raises:
        ConfigError: the weights cannot be used, or an option contradicts them.
    """
    begun = (workdir / "config.json").exists()
    # A model of the Hub may have changed since the run began from it.
    fetch = download and not (begun and weights.startswith(hub.SCHEME))
    path = parallel.in_turn(lambda: locate(weights, download=fetch))
    config = replace(config, init_from=str(path))
    if begun:
        return chosen_before(config, load_config_json(workdir / "config.json"), given), None
    choice = choose(path, open_origin(path))
    if "init_without_classes" in given and not config.init_without_classes:
        choice = replace(choice, classes=0)  # the user knows that they are the same
    return choice.applied(config, given), choice
