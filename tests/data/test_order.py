"""Plans of epochs: complete, pure, and repeated as often as is asked."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from mrcnn_jax.data.order import PlannedBatch, own_rows, plan_epoch, repeat_factors
from mrcnn_jax.data.records import Category, CocoDataset, ImageRecord, ObjectRecord
from mrcnn_jax.data.report import Report


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.integers(1, 7),
    st.integers(0, 2**31),
    st.booleans(),
)
@settings(deadline=None)
def test_plans_are_pure_and_complete(
    canvases: list[int], size: int, seed: int, shuffle: bool
) -> None:
    plans = [
        plan_epoch(canvases, size, seed=seed, epoch=epoch, shuffle=shuffle) for epoch in (0, 1, 0)
    ]
    assert plans[0] == plans[2]
    assert len(plans[0]) == len(plans[1]) == sum(-(-n // size) for n in Counter(canvases).values())
    for plan in plans:
        assert sorted(i for batch in plan for i in batch.indices if i >= 0) == list(
            range(len(canvases))
        )
        for batch in plan:
            assert len(batch.indices) == size
            assert batch.indices[0] >= 0
            assert all(i == -1 or canvases[i] == batch.canvas for i in batch.indices)
    if not shuffle:
        assert plans[0] == plans[1]


def test_epochs_and_seeds_differ_and_canvases_are_mixed() -> None:
    canvases = [0, 1] * 50
    plans = [
        plan_epoch(canvases, 2, seed=seed, epoch=epoch, shuffle=True)
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert plans[0] != plans[1]
    assert plans[0] != plans[2]
    order = [batch.canvas for batch in plans[0]]
    assert sum(a != b for a, b in itertools.pairwise(order)) > 10


def labelled(*images: tuple[int, ...], crowds: tuple[int, ...] = ()) -> CocoDataset:
    """Images with objects of these labels, or with crowds if their number is in `crowds`."""
    records = [
        ImageRecord(
            i,
            f"{i}",
            10,
            10,
            tuple(
                ObjectRecord(0, label, (0, 0, 9, 9), None, i in crowds, 81.0) for label in labels
            ),
        )
        for i, labels in enumerate(images)
    ]
    return CocoDataset(
        (Category(1, "a"), Category(2, "b")),
        tuple(records),
        Report(),
        Path("a"),
        Path("b"),
        len(records),
    )


def test_an_image_is_repeated_by_its_rarest_class() -> None:
    """Of eight images, five have class 1 and two class 2 (the crowd does not count); the threshold
    lies between their shares."""
    dataset = labelled((1,), (1, 1), (1, 2), (1,), (2,), (), (1,), (2,), crowds=(7,))
    rare = (0.5 / (2 / 8)) ** 0.5
    assert np.allclose(repeat_factors(dataset, 0.5), [1, 1, rare, 1, rare, 1, 1, 1], rtol=1e-12)
    assert np.allclose(repeat_factors(dataset, 1.0)[:3], [1.6**0.5, 1.6**0.5, 2], rtol=1e-12)
    assert (repeat_factors(dataset, 0.0) == 1).all()


def test_repeats_are_as_often_as_their_factors_in_epochs_of_one_length() -> None:
    rng = np.random.default_rng(0)
    canvases = rng.integers(0, 2, 40)
    factors = np.where(rng.random(40) < 0.5, 1.0, 1 + 2 * rng.random(40))
    epochs = 500
    counts = np.zeros((epochs, 40))
    lengths = set()
    for epoch in range(epochs):
        plan = plan_epoch(canvases.tolist(), 4, seed=1, epoch=epoch, shuffle=True, repeats=factors)
        lengths.add(len(plan))
        assert all(canvases[i] == batch.canvas for batch in plan for i in batch.indices if i >= 0)
        images = [i for batch in plan for i in batch.indices if i >= 0]
        np.add.at(counts[epoch], images, 1)
        keys = [key for batch in plan for key in batch.keys if key]
        assert len(set(keys)) == len(keys) == len(images)
    assert len(lengths) == 1
    assert plan == plan_epoch(
        canvases.tolist(), 4, seed=1, epoch=epochs - 1, shuffle=True, repeats=factors
    )
    whole = np.floor(factors)
    assert ((counts == whole) | (counts == whole + 1)).all()
    assert (counts[:, factors == 1] == 1).all()
    for canvas in (0, 1):
        chance = np.where(canvases == canvas, factors - whole, 0)
        total = counts[0, canvases == canvas].sum()
        assert total == round(factors[canvases == canvas].sum())
        chance *= round(chance.sum()) / chance.sum()
        spread = 5 * np.sqrt(chance * (1 - chance) / epochs)  # five standard deviations
        assert (np.abs(counts.mean(0) - whole - chance) <= spread + 1e-9)[canvases == canvas].all()
    alone = [
        plan_epoch(canvases.tolist(), 4, seed=1, epoch=0, shuffle=True, repeats=r)
        for r in (None, np.ones(40))
    ]
    assert alone[0] == alone[1]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_rows_of_all_processes_are_the_batch(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh: Any = AbstractMesh((4,), ("data",))
    keys = (*((i,) for i in (0, 1, 2, 4, 6, 7)), (), ())
    plan = [PlannedBatch(1, (5, 3, 8)), PlannedBatch(0, (0, 1, 2, 4, 6, 7, -1, -1), keys)]
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    shares = []
    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        shares.append(own_rows(plan, mesh))
    for number, (planned, rows) in enumerate(zip(plan, (4, 8), strict=True)):
        parts = [share[number] for share in shares]
        assert {part.canvas for part in parts} == {planned.canvas}
        assert {len(part.indices) for part in parts} == {rows // processes}
        together = sum((part.indices for part in parts), ())
        assert together == planned.indices + (-1,) * (rows - len(planned.indices))
        assert sum((part.keys for part in parts), ()) == planned.keys
