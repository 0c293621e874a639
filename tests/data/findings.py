"""The findings of a checked data set, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any, TypeAlias

from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.data.report import Reason

Read: TypeAlias = Callable[..., CocoDataset]  # the fixture `read_mixed`
ALWAYS = frozenset({Reason.CATEGORY_IDS, Reason.RUN_LIST})  # those of `mixed_content` itself


def found(
    dataset: CocoDataset, *, but: Set[Reason] = ALWAYS
) -> dict[Reason, tuple[int, list[Any]]]:
    """Reason -> (count, first ids), without the reasons `but`."""
    return {
        reason: (f.count, f.first_ids)
        for (reason, _), f in dataset.report.findings.items()
        if reason not in but
    }
