"""Choose the panels that show a run's training, one or more for each stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from mrcnn_jax.runs.metrics import Row

Curve = tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]  # steps and values


class Panel(NamedTuple):
    """Curves that share a pair of axes."""

    title: str
    quantity: Literal["loss", "recall", "AP", "depth"]
    curves: dict[str, Curve]  # by label; none is empty


def stage_panels(rows: Sequence[Row]) -> dict[str, list[Panel]]:
    """Choose a panel for each loss, one for the recall of the proposals, for AP and for depth.

    Args:
        rows: those of `runs.metrics.read_metrics`. Keys other than `loss/<name>`,
            `recall@<limit>[/<size>]`, `bbox/AP`, `segm/AP`, `depth/AbsRel` and `depth/delta1` are
            not shown. Where rows of one split repeat a step, the last one counts.

    Returns:
        Stage -> panels, in the order of the rows, for the stages that have any.
    """
    found = {}
    for stage in dict.fromkeys(row["stage"] for row in rows):
        train, val = (
            {row["step"]: row for row in rows if (row["stage"], row["split"]) == (stage, split)}
            for split in ("train", "val")
        )
        names = list(
            dict.fromkeys(name for row in (*train.values(), *val.values()) for name in row)
        )
        panels = [
            _panel(
                name.removeprefix("loss/").replace("_", " ") + " loss",
                "loss",
                (("training", train, name), ("validation", val, name)),
            )
            for name in names
            if name.startswith("loss/")
        ]
        recalls = [name for name in names if name.startswith("recall@")]
        if recalls:
            panels.append(
                _panel(
                    f"{recalls[0].partition('/')[0]} of the proposals (validation, IoU .5)",
                    "recall",
                    ((name.partition("/")[2] or "all", val, name) for name in recalls),
                )
            )
        panels.append(
            _panel(
                "average precision (validation, IoU .50:.95)",
                "AP",
                (("boxes", val, "bbox/AP"), ("masks", val, "segm/AP")),
            )
        )
        panels.append(
            _panel(
                "depth of pixels (validation)",
                "depth",
                (
                    ("mean relative error", val, "depth/AbsRel"),
                    ("share within 25 %", val, "depth/delta1"),
                ),
            )
        )
        shown = [panel for panel in panels if panel.curves]
        if shown:
            found[stage] = shown
    return found


def _panel(
    title: str,
    quantity: Literal["loss", "recall", "AP", "depth"],
    lines: Iterable[tuple[str, Mapping[int, Row], str]],
) -> Panel:
    """A panel of (label, rows by step, name of the value), without the lines that have no point."""
    curves = {}
    for label, rows, name in lines:
        points = sorted((step, row[name]) for step, row in rows.items() if name in row)
        if points:
            steps, values = np.array(points, np.float64).T
            curves[label] = (steps, values)
    return Panel(title, quantity, curves)
