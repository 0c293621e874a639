"""Draw the curves of training as PNG files: losses, recall and AP, a file for each stage."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mrcnn_jax.figures.panels import Panel, stage_panels
from mrcnn_jax.output import write_file
from mrcnn_jax.runs.metrics import Row


def curves(rows: Sequence[Row], out_dir: Path) -> list[Path]:
    """Draw a figure for each stage, with the panels of `stage_panels`.

    Args:
        rows: a run's metrics, as `runs.metrics.read_metrics` returns them.
        out_dir: folder of the figures, created if need be.

    Returns:
        `curves_<stage>.png` for each stage, in the order of the rows.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for stage, panels in stage_panels(rows).items():
        columns = min(len(panels), 2)
        lines = -(-len(panels) // columns)
        figure = Figure(figsize=(9, 0.7 + 3.2 * lines), dpi=100, layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for axis, panel in zip(axes, panels, strict=False):
            (_draw_loss if panel.quantity == "loss" else _draw_shares)(axis, panel)
            axis.set_title(panel.title, fontsize=11)
            axis.set_xlabel("step")
            axis.set_ylabel(panel.quantity)
            axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            if axis.lines:
                axis.legend(frameon=False, fontsize=9)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        figure.suptitle(f"stage {stage}", fontsize=14)
        paths.append(out_dir / f"curves_{stage}.png")
        picture = io.BytesIO()
        FigureCanvasAgg(figure).print_png(picture)
        write_file(paths[-1], picture.getvalue())
    return paths


def _draw_loss(axis: Axes, panel: Panel) -> None:
    none = np.zeros(0), np.zeros(0)
    steps, values = panel.curves.get("training", none)
    val = panel.curves.get("validation", none)
    finite = np.isfinite(values)  # a diverged loss leaves a gap
    if finite.any():
        smooth = _smoothed(np.where(finite, values, np.nan))
        axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
        axis.plot(steps, smooth, color="tab:blue", linewidth=1.8, label="training (smoothed)")
        # The first losses can be many times the rest: they may leave the picture, not flatten it.
        top = max(
            np.nanpercentile(values[finite], 98),
            np.nanmax(smooth[len(smooth) // 10 :]),
            *val[1][np.isfinite(val[1])],
        )
        axis.set_ylim(0, 1.1 * top if top > 0 else 1.0)
    if val[0].size:
        axis.plot(
            *val, color="tab:orange", linewidth=1.8, marker="o", markersize=4, label="validation"
        )


def _draw_shares(axis: Axes, panel: Panel) -> None:
    for label, line in panel.curves.items():
        width = 2.2 if label == "all" else 1.2
        axis.plot(*line, linewidth=width, marker="o", markersize=4, label=label)
    values = np.concatenate([values for _, values in panel.curves.values()])
    # A marker at 1 is seen whole; an error, unlike a share, may be above it.
    axis.set_ylim(0, 1.02 * values[np.isfinite(values)].max(initial=1.0))


def _smoothed(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Average over a window of a twentieth of the run around each point; NaN is not counted."""
    half, known = len(values) // 40, ~np.isnan(values)

    def windows(numbers: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        sums = np.cumsum(np.pad(numbers, (half + 1, half)), dtype=np.float64)
        return sums[2 * half + 1 :] - sums[: -2 * half - 1]

    with np.errstate(invalid="ignore"):  # 0 / 0 where no number is known
        return windows(np.where(known, values, 0.0)) / np.round(windows(known.astype(float)))
