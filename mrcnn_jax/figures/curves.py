"""The curves of training: every loss, recall and AP of each stage, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mrcnn_jax.runs.metrics import Curve, curve, read_rows


def curves(metrics_jsonl: Path, out_dir: Path) -> list[Path]:
    """One figure a stage: every loss in training and validation, and the recall of the proposals
    and the AP where they were measured.

    Args:
        metrics_jsonl: one JSON object a line with stage, step (from 0 within the stage), split
            ("train" or "val"), `loss/<name>`, `recall@<number>[/<size>]`, `bbox/AP` and `segm/AP`;
            other keys are not read. Of rows that repeat a step (a run that was resumed) the last
            one counts. A last line cut short by a crash is passed over.
        out_dir: folder of the figures; made if need be.

    Returns:
        `curves_<stage>.png` for each stage, in the order of the file.

    Raises:
        ConfigError: there is no such file, or a line before the last is not JSON.
    """
    rows = read_rows(metrics_jsonl)
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        train, val = (
            {row["step"]: row for row in rows if row["stage"] == stage and row["split"] == split}
            for split in ("train", "val")
        )
        names = list(
            dict.fromkeys(name for row in (*train.values(), *val.values()) for name in row)
        )
        losses = [name for name in names if name.startswith("loss/")]
        recalls = [name for name in names if name.startswith("recall@")]
        precisions = [name for name in names if name in ("bbox/AP", "segm/AP")]
        panels = len(losses) + bool(recalls) + bool(precisions)
        if not panels:
            continue
        columns = min(panels, 2)
        lines = -(-panels // columns)
        figure = Figure(figsize=(9, 0.7 + 3.2 * lines), dpi=100, layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for axis, name in zip(axes, losses, strict=False):
            _draw_loss(axis, name, curve(train, name), curve(val, name))
        if recalls:
            _draw_shares(
                axes[len(losses)],
                {name.partition("/")[2] or "all": curve(val, name) for name in recalls},
            )
            _finish(
                axes[len(losses)],
                f"proposals: {recalls[0].partition('/')[0]} (validation, IoU 0.5)",
                "recall",
            )
        if precisions:
            axis = axes[panels - 1]
            _draw_shares(
                axis,
                {
                    {"bbox/AP": "boxes", "segm/AP": "masks"}[name]: curve(val, name)
                    for name in precisions
                },
            )
            _finish(axis, "average precision (validation, IoU .50:.95)", "AP")
        for axis in axes[panels:]:
            axis.set_axis_off()
        figure.suptitle(f"stage {stage}", fontsize=14)
        paths.append(out_dir / f"curves_{stage}.png")
        FigureCanvasAgg(figure).print_png(paths[-1])
    return paths


def _draw_loss(axis: Axes, name: str, train: Curve, val: Curve) -> None:
    steps, values = train
    finite = np.isfinite(values)  # a diverged loss leaves a gap
    if finite.any():
        smooth = _smoothed(np.where(finite, values, np.nan))
        axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
        axis.plot(steps, smooth, color="tab:blue", linewidth=1.8, label="training (smoothed)")
        # The first steps' losses can be many times those of the rest: let them leave the picture
        # rather than flatten it.
        top = max(
            [
                np.nanpercentile(values[finite], 98),
                np.nanmax(smooth[len(smooth) // 10 :]),
                *val[1][np.isfinite(val[1])],
            ]
        )
        axis.set_ylim(0, 1.1 * top if top > 0 else 1.0)
    if val[0].size:
        axis.plot(
            *val, color="tab:orange", linewidth=1.8, marker="o", markersize=4, label="validation"
        )
    _finish(axis, name.removeprefix("loss/").replace("_", " ") + " loss", "loss")


def _draw_shares(axis: Axes, lines: Mapping[str, Curve]) -> None:
    for label, line in lines.items():
        axis.plot(
            *line, linewidth=2.2 if label == "all" else 1.2, marker="o", markersize=4, label=label
        )
    axis.set_ylim(0, 1.02)  # a marker at 1 is seen whole


def _finish(axis: Axes, title: str, label: str) -> None:
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("step")
    axis.set_ylabel(label)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.lines:
        axis.legend(frameon=False, fontsize=9)


def _smoothed(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Mean over a window of a twentieth of the run around each point, of what the window holds (NaN
    is not counted)."""
    half = len(values) // 40
    padded = np.pad(values, half, constant_values=np.nan)
    return np.array([_mean(padded[i : i + 2 * half + 1]) for i in range(len(values))])


def _mean(values: Float[np.ndarray, " n"]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
