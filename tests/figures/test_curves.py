"""Figures are PNG files that hold what they should: pages are read back, curves are read off the
axes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.figures import curves as figures
from mrcnn_jax.figures.comparison import detections_figure, proposals_figure
from mrcnn_jax.figures.curves import curves
from mrcnn_jax.figures.draw import MISSED, RECALLED
from mrcnn_jax.figures.png_pages import PAGE_WIDTH

SIZES = ((60, 90), (200, 120), (600, 2000), (64, 64), (48, 60))


def _images() -> list[np.ndarray]:
    return [np.full((*size, 3), 90, np.uint8) for size in SIZES]


def _read(path: Path) -> np.ndarray:
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = cv2.imread(str(path))
    assert image is not None
    return image[..., ::-1]


def test_detections_are_drawn_in_pages_beside_the_ground_truth(tmp_path: Path) -> None:
    result: dict[str, Any] = {"bbox": [10, 20, 30, 25], "category_id": 2}
    found = (
        [{**result, "score": 0.4}],
        [{**result, "score": 0.8}],
        [],
        [],
        [{**result, "score": 0.8}],
    )
    paths = detections_figure(
        _images(), [[result]] + [[]] * 4, {"run": found}, {2: "tree"}, tmp_path / "figures", rows=3
    )
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "figures/detections_1.png",
        "figures/detections_2.png",
    ]
    first, second = (_read(path) for path in paths)
    assert first.shape[1] == PAGE_WIDTH
    # Row 1 is 392 px high below its title. The truth is drawn left; the detection under the score
    # is not drawn right.
    left, right = first[40:420, 20:580], first[40:420, 620:1180]
    assert len(np.unique(left.reshape(-1, 3), axis=0)) > 2
    assert len(np.unique(right.reshape(-1, 3), axis=0)) == 1
    assert second.shape[0] == (588 + 36) + (470 + 36)


def test_proposals_show_what_they_reach(tmp_path: Path) -> None:
    truth = np.array([[5.0, 5, 25, 25], [30, 30, 44, 44]])
    boxes = np.array([[5.0, 5, 25, 24], [0, 0, 9, 9]])
    none = np.zeros((0, 4))
    found = [(boxes, np.array([0.9, 0.2]))] + [(none, np.zeros(0))] * 4
    paths = proposals_figure(_images(), {"run": found}, [truth] + [none] * 4, tmp_path)
    assert [path.name for path in paths] == ["proposals_1.png"]
    page = _read(paths[0])
    assert page.shape[1] == PAGE_WIDTH
    # Image 1 is 588 px wide, 6 px from the left and, below the colours and its title, 62 px from
    # the top.
    scale = 588 / 90
    assert tuple(page[62 + round(scale * 15), 6 + round(scale * 5)]) == RECALLED
    assert tuple(page[62 + round(scale * 37), 6 + round(scale * 30)]) == MISSED


def test_runs_stand_side_by_side_on_the_same_image(tmp_path: Path, titles: list[str]) -> None:
    """Run 1 reaches object 1, run 2 object 2."""
    truth = np.array([[5.0, 5, 25, 25], [30, 30, 44, 44]])
    columns = {name: [(truth[[i]], np.ones(1))] for i, name in enumerate(("one", "two"))}
    rng = np.random.default_rng(0)
    (path,) = proposals_figure(
        [rng.integers(0, 256, (60, 90, 3)).astype(np.uint8)], columns, [truth], tmp_path
    )
    page = _read(path)
    assert page.shape[1] == PAGE_WIDTH
    left, right = page[62:454, 6:594], page[62:454, 606:1194]
    differ = (left != right).any(axis=-1)
    scale, edges = 588 / 90, np.zeros_like(differ)
    for x1, y1, x2, y2 in np.round(truth * scale).astype(int):
        edges[y1 - 3 : y2 + 3, x1 - 3 : x2 + 3] = True
        edges[y1 + 3 : y2 - 3, x1 + 3 : x2 - 3] = False
    assert not differ[~edges].any()
    assert differ[edges].any()
    assert (
        tuple(left[round(scale * 15), round(scale * 5)])
        == RECALLED
        == tuple(right[round(scale * 37), round(scale * 30)])
    )
    assert (
        tuple(right[round(scale * 15), round(scale * 5)])
        == MISSED
        == tuple(left[round(scale * 37), round(scale * 30)])
    )
    assert titles == [
        "one: 1 proposals, 1 of 2 objects reached",
        "two: 1 proposals, 1 of 2 objects reached",
    ]


def _write(path: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


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

    monkeypatch.setattr(figures, "Figure", keep)
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
    paths = curves(
        _write(tmp_path / "metrics.jsonl", _rows(), tail='{"stage": "box", "st'),
        tmp_path / "out" / "figures",
    )
    assert [path.name for path in paths] == ["curves_rpn.png", "curves_box.png"]
    assert all(_read(path).shape[1] == 900 for path in paths)
    rpn, box = (_lines(figure) for figure in drawn)
    assert list(rpn) == ["total loss", "rpn box loss", "proposals: recall@50 (validation, IoU 0.5)"]
    assert list(box) == [
        "total loss",
        "box box loss",
        "average precision (validation, IoU .50:.95)",
    ]
    precisions = box["average precision (validation, IoU .50:.95)"]
    assert precisions.keys() == {"boxes", "masks"}
    np.testing.assert_allclose(precisions["boxes"], [[49, 0.098], [99, 0.198]])
    np.testing.assert_allclose(rpn["total loss"]["validation"], [[49, 3.51], [99, 3.01]])
    np.testing.assert_allclose(
        rpn["proposals: recall@50 (validation, IoU 0.5)"]["all"], [[49, 0.49], [99, 0.99]]
    )
    training = rpn["total loss"]["training (smoothed)"]
    np.testing.assert_allclose(
        training[5:-5, 1], 3.0 - training[5:-5, 0] / 100
    )  # the mean of a line is the line
    for figure in drawn:
        for axis in figure.axes:
            assert not axis.axison or (axis.get_xlabel() == "step" and axis.get_ylabel())


def test_a_repeated_step_counts_once_and_the_last_time(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [
        {"stage": "rpn", "step": step, "split": "train", "loss/total": value}
        for step, value in ((0, 1.0), (1, 9.0), (1, 2.0), (2, 3.0))
    ]
    curves(_write(tmp_path / "metrics.jsonl", rows), tmp_path)
    np.testing.assert_array_equal(
        _lines(drawn[0])["total loss"]["training (smoothed)"], [[0, 1], [1, 2], [2, 3]]
    )


def test_losses_that_are_no_numbers_leave_gaps(tmp_path: Path, drawn: list[Figure]) -> None:
    values = [1.0, float("nan"), 3.0, float("inf"), None, 2.0]
    rows = [
        {"stage": "rpn", "step": step, "split": "train", "loss/total": value}
        for step, value in enumerate(values)
    ]
    rows += [{"stage": "box", "step": 0, "split": "train", "loss/total": float("nan")}]
    assert len(curves(_write(tmp_path / "metrics.jsonl", rows), tmp_path)) == 2
    assert drawn[0].axes[0].get_ylim() == pytest.approx((0, 3.3), rel=0.02)


def test_runs_without_losses_have_no_curves(tmp_path: Path) -> None:
    assert curves(_write(tmp_path / "metrics.jsonl", []), tmp_path) == []
    assert (
        curves(
            _write(
                tmp_path / "metrics.jsonl",
                [{"stage": "rpn", "step": 0, "split": "train", "learning_rate": 1.0}],
            ),
            tmp_path,
        )
        == []
    )


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.jsonl: no such file"):
        curves(tmp_path / "nothing.jsonl", tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "rpn"\n{"stage": "rpn", "step": 0, "split": "train"}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: line 1: not JSON"):
        curves(path, tmp_path)
