"""What a user has decided before a config is chosen, by the names of the config's fields."""

from __future__ import annotations

from dataclasses import dataclass

from mrcnn_jax.config.schema import DataConfig


@dataclass(frozen=True)
class DataWishes:
    """Of the data; None: to be chosen."""

    short_side: int | None = None
    long_side: int | None = None
    canvases: tuple[tuple[int, int], ...] | None = None
    batch_size: int | None = None
    max_pixels: int = DataConfig().max_pixels


@dataclass(frozen=True)
class StageWishes:
    """Of a stage; None: to be chosen."""

    epochs: float | None = None


@dataclass(frozen=True)
class Wishes:
    """The fields that others follow; whatever else is given simply replaces a choice."""

    data: DataWishes = DataWishes()
    stages: tuple[StageWishes, ...] = (StageWishes(),)
    init_from: str | None = None
    minutes: float | None = None
    """In which the training shall end."""
