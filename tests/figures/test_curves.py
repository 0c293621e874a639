"""Curves are read off the axes of the figures that are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from mrcnn_jax.figures import curves as module
from mrcnn_jax.figures.curves import curves
from tests.figures.pages import read_page

RECALL = "recall@50 of the proposals (validation, IoU .5)"


def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for stage in ("rpn", "box"):
        for step in range(0, 100, 2):
            train = {
                "loss/total": 3.0 - step / 100,
                f"loss/{stage}_box": 1.0,
                "learning_rate": 0.1,
                "images_per_second": 3.0,
            }
            rows.append(
                {"stage": stage, "step": step, "epoch": step / 50, "split": "train", **train}
            )
        for step in (49, 99):
            val = {"loss/total": 4.0 - step / 100, f"loss/{stage}_box": 2.0} | (
                {"recall@50": step / 100}
                if stage == "rpn"
                else {"segm/AP": 0.2, "bbox/AP": step / 500, "bbox/AP50": 0.5}
            )
            rows.append({"stage": stage, "step": step, "epoch": step / 50, "split": "val", **val})
    return rows


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are made, in order."""
    made: list[Figure] = []

    def keep(*args: Any, **kwargs: Any) -> Figure:
        made.append(Figure(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(module, "Figure", keep)
    return made


def _lines(figure: Figure) -> dict[str, dict[str, np.ndarray]]:
    """Title of a panel -> label of a curve -> its points."""
    return {
        axis.get_title(): {
            str(line.get_label()): np.asarray(line.get_xydata()) for line in axis.lines
        }
        for axis in figure.axes
        if axis.axison
    }


def test_curves_hold_every_loss_of_every_stage(tmp_path: Path, drawn: list[Figure]) -> None:
    paths = curves(_rows(), tmp_path / "out" / "figures")
    assert [path.name for path in paths] == ["curves_rpn.png", "curves_box.png"]
    assert all(read_page(path).shape[1] == 900 for path in paths)
    rpn, box = (_lines(figure) for figure in drawn)
    assert list(rpn) == ["total loss", "rpn box loss", RECALL]
    assert list(box) == [
        "total loss",
        "box box loss",
        "average precision (validation, IoU .50:.95)",
    ]
    precisions = box["average precision (validation, IoU .50:.95)"]
    assert precisions.keys() == {"boxes", "masks"}
    np.testing.assert_allclose(precisions["boxes"], [[49, 0.098], [99, 0.198]])
    np.testing.assert_allclose(rpn["total loss"]["validation"], [[49, 3.51], [99, 3.01]])
    np.testing.assert_allclose(rpn[RECALL]["all"], [[49, 0.49], [99, 0.99]])
    training = rpn["total loss"]["training (smoothed)"]
    np.testing.assert_allclose(
        training[5:-5, 1], 3.0 - training[5:-5, 0] / 100
    )  # the mean of a line is the line
    for figure in drawn:
        for axis in figure.axes:
            assert not axis.axison or (axis.get_xlabel() == "step" and axis.get_ylabel())


def test_losses_that_are_no_numbers_leave_gaps(tmp_path: Path, drawn: list[Figure]) -> None:
    values = [1.0, float("nan"), 3.0, float("inf"), 2.0]
    rows = [
        {"stage": "rpn", "step": step, "split": "train", "loss/total": value}
        for step, value in enumerate(values)
    ]
    rows += [{"stage": "box", "step": 0, "split": "train", "loss/total": float("nan")}]
    assert len(curves(rows, tmp_path)) == 2
    assert drawn[0].axes[0].get_ylim() == pytest.approx((0, 3.3), rel=0.02)


def test_an_error_above_one_stays_in_the_picture(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [
        {"stage": "depth", "step": step, "split": "val", "depth/AbsRel": value, "depth/delta1": 0.5}
        for step, value in enumerate((1.8, 0.4))
    ]
    curves(rows, tmp_path)
    assert drawn[0].axes[0].get_ylim()[1] > 1.8
    curves([rows[0] | {"depth/AbsRel": float("nan"), "depth/delta1": float("nan")}], tmp_path)
    assert drawn[1].axes[0].get_ylim()[1] == pytest.approx(1.02)


def test_smoothing_is_the_mean_of_a_window() -> None:
    values = np.random.default_rng(0).normal(size=203)
    values[[3, 50, 51]] = np.nan
    half = len(values) // 40
    expected = [np.nanmean(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]
    np.testing.assert_allclose(module._smoothed(values), expected)
    assert np.isnan(module._smoothed(np.full(3, np.nan))).all()


def test_runs_without_losses_have_no_curves(tmp_path: Path) -> None:
    assert curves([], tmp_path) == []
    rows = [{"stage": "rpn", "step": 1, "split": "train", "learning_rate": 1.0}]
    assert curves(rows, tmp_path) == []
