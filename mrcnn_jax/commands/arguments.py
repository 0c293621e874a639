"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


def fields_given(words: Iterable[str]) -> frozenset[str]:
    """Dotted names of the fields among the options of a command line.

    --model.roi.no-aligned is of the same field as --model.roi.aligned.
    """
    names = (word[2:].partition("=")[0] for word in words if word.startswith("--"))
    return frozenset(re.sub(r"(^|\.)no_", r"\1", name.replace("-", "_")) for name in names)


@dataclass(frozen=True, kw_only=True)
class OfCheckpoint:
    workdir: Path
    """The run's folder."""
    checkpoint: Literal["newest", "best"] = "newest"
    """best: the one with the highest mask AP, of a run with --evaluate-every-epochs."""


@dataclass(frozen=True, kw_only=True)
class OfWeights(OfCheckpoint):
    weights: Literal["raw", "ema"] = "raw"
    """ema: their moving average, of a run with ema_decay."""


@dataclass(frozen=True, kw_only=True)
class ToHandOn(OfWeights):
    out: Path
    """The new file or folder."""
    weights_licence: str | None = None
    """Licence of the weights that the run started from, for the model card; by default the card
    says that it is not stated."""
