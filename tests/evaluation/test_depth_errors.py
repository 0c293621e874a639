"""Figures of depth against plain loops, by hand, and by what must leave them alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

import numpy as np
import pytest

from mrcnn_jax.evaluation.depth_errors import (
    NAMES,
    DepthErrors,
    depth_figures,
    object_depth,
    object_figures,
    table,
)

POISON = (np.nan, np.inf, -np.inf, 0.0, -1.0, 1e38)
PREFIXES = ("", "pooled/", "scaled/", "scaled_pooled/")


def _images(count: int = 4, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """(predicted, true) of several sizes, both with holes."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        true = rng.uniform(0.3, 9, (6 + i, 11)).astype(np.float32)
        predicted = (true * rng.lognormal(0.1, 0.3, true.shape)).astype(np.float32)
        predicted[rng.random(true.shape) < 0.1] = np.nan
        true[rng.random(true.shape) < 0.2] = 0
        found.append((predicted, true))
    return found


def _loop(pairs: Iterable[tuple[float, float]]) -> dict[str, float]:
    """The figures in Python's own numbers."""
    sums: dict[str, list[float]] = {name: [] for name in NAMES}
    logs = []
    for p, t in pairs:
        d = math.log(p / t)
        logs.append(d)
        sums["AbsRel"].append(abs(p - t) / t)
        sums["SqRel"].append((p - t) ** 2 / t)
        sums["RMSE"].append((p - t) ** 2)
        sums["RMSElog"].append(d * d)
        sums["log10"].append(abs(math.log10(p) - math.log10(t)))
        for power in (1, 2, 3):
            sums[f"delta{power}"].append(max(p / t, t / p) < 1.25**power)
    figures = {name: statistics.fmean(values) for name, values in sums.items() if values}
    for name in ("RMSE", "RMSElog"):
        figures[name] = math.sqrt(figures[name])
    return figures | {"SILog": 100 * statistics.pstdev(logs)}


def _known_pairs(predicted: np.ndarray, true: np.ndarray) -> list[tuple[float, float]]:
    both = zip(predicted.ravel().tolist(), true.ravel().tolist(), strict=True)
    return [(p, t) for p, t in both if p > 0 and t > 0 and math.isfinite(p)]


def _scaled(pairs: list[tuple[float, float]]) -> list[tuple[float, float]]:
    factor = statistics.median(t for _, t in pairs) / statistics.median(p for p, _ in pairs)
    return [(p * factor, t) for p, t in pairs]


def _streamed(images: Iterable[tuple[np.ndarray, np.ndarray]]) -> DepthErrors:
    errors = DepthErrors()
    for predicted, true in images:
        errors.add(predicted, true)
    return errors


def test_figures_by_hand() -> None:
    true, predicted = np.array([[2.0, 4.0, 1.0, 0.0]]), np.array([[1.0, 4.0, 1.25, 5.0]])
    found = depth_figures(predicted, true)
    ln2, ln5 = math.log(2), math.log(1.25)
    mean = (ln5 - ln2) / 3
    assert found == pytest.approx(
        {
            "AbsRel": (0.5 + 0 + 0.25) / 3,
            "SqRel": (0.5 + 0 + 0.0625) / 3,
            "RMSE": math.sqrt((1 + 0.0625) / 3),
            "RMSElog": math.sqrt((ln2**2 + ln5**2) / 3),
            "log10": (math.log10(2) + math.log10(1.25)) / 3,
            "SILog": 100 * math.sqrt((ln2**2 + ln5**2) / 3 - mean**2),
            "delta1": 1 / 3,  # 1.25 itself is not below 1.25
            "delta2": 2 / 3,
            "delta3": 2 / 3,
        }
    )
    assert list(found) == list(NAMES)
    # One factor on all depths is free, where rounding makes the variance less than 0, too.
    three = np.array([[1.0, 2.0, 3.0]])
    assert depth_figures(2 * three, three)["SILog"] == pytest.approx(0, abs=1e-4)


def test_the_table_has_metres_and_percent() -> None:
    """Rows of what was measured alone."""
    figures = dict(zip(NAMES, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.5, 0.25, 0.125), strict=True))
    metrics = {f"depth/{name}": value for name, value in figures.items()}
    metrics |= {f"depth/true_masks/{name}": 2 * value for name, value in figures.items()}
    header, mean, objects = (line.split() for line in table(metrics).splitlines())
    assert header == ["depth", *NAMES]
    metres = ["0.100", "0.200", "0.300", "0.400", "0.500", "0.600"]
    assert mean == ["mean", "over", "images", *metres, "50.0", "25.0", "12.5"]
    assert objects[:4] == ["objects,", "true", "masks", "0.200"]
    assert objects[-1] == "25.0"
    assert table({}) == ""


def test_figures_of_maps_in_plain_loops() -> None:
    images = _images()
    pairs = [_known_pairs(*image) for image in images]
    scaled = [_scaled(image) for image in pairs]
    found = _streamed(images).figures("maps")
    for prefix, listed in (("", pairs), ("scaled/", scaled)):
        each = [_loop(image) for image in listed]
        for name in NAMES:
            mean = statistics.fmean(figures[name] for figures in each)
            assert found[f"maps/{prefix}{name}"] == pytest.approx(mean), (prefix, name)
    for prefix, listed in (("pooled/", pairs), ("scaled_pooled/", scaled)):
        for name, value in _loop(pair for image in listed for pair in image).items():
            assert found[f"maps/{prefix}{name}"] == pytest.approx(value), (prefix, name)
    known = sum(int((true > 0).sum()) for _, true in images)
    assert found["maps/covered"] == pytest.approx(sum(map(len, pairs)) / known)
    assert found["maps/images"] == 4
    assert len(found) == 4 * len(NAMES) + 2


def test_scaled_figures_of_one_image_are_those_of_the_loop() -> None:
    predicted, true = _images(1)[0]
    found = depth_figures(predicted, true, scaled=True)
    assert found == pytest.approx(_loop(_scaled(_known_pairs(predicted, true))))


def test_pooled_is_one_image_of_all_pixels() -> None:
    images = _images()
    whole = tuple(np.concatenate([x.ravel() for x in each]) for each in zip(*images, strict=True))
    found = _streamed(images).figures()
    for name, value in depth_figures(*whole).items():
        assert found[f"depth/pooled/{name}"] == pytest.approx(value)


def test_parts_of_several_processes_are_merged() -> None:
    images = _images()
    parts = _streamed(images[:1]), _streamed([]), _streamed(images[1:])
    for part in parts[1:]:
        parts[0].merge(part.packed())
    assert parts[0].figures() == pytest.approx(_streamed(images).figures())


def test_a_perfect_prediction() -> None:
    found = _streamed((true, true) for _, true in _images()).figures()
    for prefix in PREFIXES:
        for name in NAMES:
            value = found[f"depth/{prefix}{name}"]
            # A variance from sums is exact to the rounding, and its root to that root.
            assert value == pytest.approx(float(name.startswith("delta")), abs=1e-5)
    assert found["depth/covered"] == 1


def test_one_factor_is_free_where_figures_are_scaled() -> None:
    found = _streamed((true * np.float32(1.5), true) for _, true in _images()).figures()
    assert found["depth/AbsRel"] == pytest.approx(0.5)
    assert found["depth/delta1"] == 0
    assert found["depth/delta2"] == 1
    for prefix in ("scaled/", "scaled_pooled/"):
        assert found[f"depth/{prefix}AbsRel"] == pytest.approx(0, abs=1e-6)
        assert found[f"depth/{prefix}delta1"] == 1
    for prefix in PREFIXES:
        assert found[f"depth/{prefix}SILog"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("value", POISON)
def test_unknown_pixels_may_hold_anything(value: float) -> None:
    images = _images()
    poisoned = []
    for predicted, true in images:
        other = predicted.copy()
        other[true == 0] = value
        nowhere = true.copy()
        if not 0 < value < np.inf:
            other[np.isnan(predicted)] = value
            nowhere[true == 0] = value
        poisoned.append((other, nowhere))
    assert _streamed(poisoned).figures() == _streamed(images).figures()


def test_images_without_a_known_pixel_are_left_out() -> None:
    images = _images()
    nothing = np.full((3, 4), np.nan), np.zeros((3, 4))
    blank = np.ones((3, 4)), np.zeros((3, 4))
    assert _streamed([nothing, blank]).figures() == {}
    assert _streamed([*images, nothing, blank]).figures() == _streamed(images).figures()
    missed = np.full((3, 4), np.nan), np.ones((3, 4))
    assert _streamed([missed]).figures() == {"depth/images": 0, "depth/covered": 0}
    found = _streamed([*images, missed]).figures()
    assert found["depth/images"] == 4
    assert found["depth/covered"] < _streamed(images).figures()["depth/covered"]


def test_maps_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        DepthErrors().add(np.ones((2, 3)), np.ones((3, 2)))


def test_objects_weigh_the_same() -> None:
    predicted = np.array([1.0, 2.2, np.nan, 3.0, 0.0])
    true = np.array([1.0, 2.0, 1.0, 0.0, 4.0])
    found = object_figures(predicted, true, "depth/objects")
    assert found.pop("depth/objects/count") == 2
    assert found == pytest.approx(
        {f"depth/objects/{k}": v for k, v in _loop([(1.0, 1.0), (2.2, 2.0)]).items()}, abs=1e-9
    )
    assert object_figures(predicted[2:], true[2:], "x") == {}
    assert object_figures(np.zeros(0), np.zeros(0), "x") == {}


def test_an_object_has_the_median_of_what_is_known_under_its_mask() -> None:
    metres = np.array([[1.0, 9.0, np.nan], [0.0, 2.0, np.inf], [-3.0, 4.0, 8.0]])
    mask = np.ones((3, 3), bool)
    mask[0, 1] = False
    assert object_depth(metres, mask) == 3.0  # of 1, 2, 4, 8
    mask[0, 0] = False
    assert object_depth(metres, mask) == 4.0
    assert math.isnan(object_depth(metres, np.zeros((3, 3), bool)))
    assert math.isnan(object_depth(np.zeros((3, 3)), mask))
