"""What `mrcnn train FOLDER` chooses, without training."""

from __future__ import annotations

from mrcnn_jax.commands import own_folder, train
from mrcnn_jax.config.schema import Config


def chosen(*words: object) -> Config:
    """The config that `mrcnn train WORDS` chooses."""
    request = train.parse([str(word) for word in words], "mrcnn train")
    assert isinstance(request, own_folder.Request)
    return own_folder.chosen_config(request)[0]
