"""Panels hold the losses, recalls and APs that were measured, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np

from mrcnn_jax.figures.panels import Panel, stage_panels


def _row(stage: str, step: int, split: str, **values: float) -> dict[str, Any]:
    return {"stage": stage, "step": step, "epoch": 1, "split": split, **values}


def _points(panel: Panel) -> dict[str, list[list[float]]]:
    return {label: np.stack(curve, axis=1).tolist() for label, curve in panel.curves.items()}


def test_panels_are_those_that_were_measured() -> None:
    recall: dict[str, float] = {"recall@50": 0.5, "recall@50/small": 0.25}
    rows = [
        _row("rpn", 2, "train", **{"loss/total": 3.0, "loss/rpn_box": 1.0, "learning_rate": 0.1}),
        _row("rpn", 2, "val", **recall),
        _row("idle", 2, "train", learning_rate=0.1),
        _row("box", 1, "val", **{"loss/total": 2.0, "segm/AP": 0.2, "segm/AP50": 0.3}),
    ]
    panels = stage_panels(rows)
    assert {stage: [(p.title, p.quantity) for p in found] for stage, found in panels.items()} == {
        "rpn": [
            ("total loss", "loss"),
            ("rpn box loss", "loss"),
            ("recall@50 of the proposals (validation, IoU .5)", "recall"),
        ],
        "box": [
            ("total loss", "loss"),
            ("average precision (validation, IoU .50:.95)", "AP"),
        ],
    }
    assert [_points(panel) for panel in panels["rpn"]] == [
        {"training": [[2, 3.0]]},
        {"training": [[2, 1.0]]},
        {"all": [[2, 0.5]], "small": [[2, 0.25]]},
    ]
    assert [_points(panel) for panel in panels["box"]] == [
        {"validation": [[1, 2.0]]},
        {"masks": [[1, 0.2]]},
    ]


def test_steps_are_in_order_and_the_last_row_of_a_step_counts() -> None:
    rows = [
        _row("rpn", step, "train", **{"loss/total": float(10 + i)})
        for i, step in enumerate((1, 3, 2, 3))
    ]
    assert _points(stage_panels(rows)["rpn"][0]) == {"training": [[1, 10], [2, 12], [3, 13]]}
