"""Figures of depth, over pixels and over objects.

Of predicted metres p and true metres t, over the places where both are known, with d = ln p - ln t:

- AbsRel: mean of |p - t| / t; SqRel: mean of (p - t)^2 / t, in metres;
- RMSE: root of the mean of (p - t)^2, in metres; RMSElog: the same of d; log10: mean of
  |log10 p - log10 t|;
- SILog: 100 * sqrt(mean of d^2 - (mean of d)^2), as KITTI has it: one factor on all depths is free;
- delta1, delta2, delta3: share with max(p / t, t / p) below 1.25, 1.25^2, 1.25^3.

Each is given as the mean over images, and "pooled" over all pixels together, where an image weighs
as much as it has known pixels (that root is not the mean of the roots). "Scaled" multiplies an
image's prediction by median(t) / median(p) first: what is left is the error of the shape alone.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from mrcnn_jax.output import text_table

NAMES = ("AbsRel", "SqRel", "RMSE", "RMSElog", "log10", "SILog", "delta1", "delta2", "delta3")
DELTA = 1.25


class DepthErrors:
    """Adds up errors of depth maps, one image after another, without keeping their pixels."""

    def __init__(self) -> None:
        # Images with figures; pixels of known depth; those of them with a prediction.
        self._counts = np.zeros(3)
        # As predicted, and scaled: sums over images of their figures, and over all pixels.
        self._means, self._sums = np.zeros((2, len(NAMES))), np.zeros((2, len(NAMES) + 1))

    def add(self, predicted: Float[np.ndarray, "*n"], true: Float[np.ndarray, "h w"]) -> None:
        """Add an image.

        Args:
            predicted: metres; NaN where nothing was predicted. What is not finite or not positive
                counts as that.
            true: metres; 0 where unknown. What is not finite or not positive counts as that.
        """
        pairs = _pairs(predicted, true)
        count = pairs[0].size
        self._counts += count > 0, known(true).sum(), count
        if count:
            sums = np.stack([_sums(*pairs, scaled=scaled) for scaled in (False, True)])
            self._sums += sums
            self._means += [list(_figures(row).values()) for row in sums]

    def packed(self) -> list[Float[np.ndarray, "*n"]]:
        """The sums so far, for the `merge` of another process."""
        return [self._counts, self._means, self._sums]

    def merge(self, packed: list[Float[np.ndarray, "*n"]]) -> None:
        """Add the images of another, which has `packed` its sums."""
        for own, other in zip(self.packed(), packed, strict=True):
            own += other

    def figures(self, prefix: str = "depth") -> dict[str, float]:
        """Compute the figures of all images so far.

        Args:
            prefix: of their names.

        Returns:
            `<prefix>/<name>` for NAMES, means over images; `<prefix>/pooled/<name>`,
            `<prefix>/scaled/<name>` and `<prefix>/scaled_pooled/<name>`; `<prefix>/images`, the
            images that have a pixel to compare, on which all these rest; and `<prefix>/covered`,
            the share of all pixels of known depth that have a prediction. Without any such pixel
            the last two alone, and without a pixel of known depth nothing.
        """
        images, all_known, covered = self._counts.tolist()
        if not all_known:
            return {}
        found = {f"{prefix}/images": images, f"{prefix}/covered": covered / all_known}
        if not images:
            return found
        for row, (mean, pooled) in enumerate((("", "pooled/"), ("scaled/", "scaled_pooled/"))):
            means = zip(NAMES, (self._means[row] / images).tolist(), strict=True)
            found |= {f"{prefix}/{mean}{name}": value for name, value in means}
            over_all = _figures(self._sums[row]).items()
            found |= {f"{prefix}/{pooled}{name}": value for name, value in over_all}
        return found


def depth_figures(
    predicted: Float[np.ndarray, "*n"], true: Float[np.ndarray, "*n"], *, scaled: bool = False
) -> dict[str, float]:
    """Compute the figures of one image, or of any places together.

    Args:
        predicted, true: metres, as in `DepthErrors.add`.
        scaled: multiply the prediction by median(true) / median(predicted).

    Returns:
        A value for each of NAMES; nothing if both are known nowhere.
    """
    pairs = _pairs(predicted, true)
    return _figures(_sums(*pairs, scaled=scaled)) if pairs[0].size else {}


def object_figures(
    predicted: Float[np.ndarray, " n"], true: Float[np.ndarray, " n"], prefix: str
) -> dict[str, float]:
    """Compute the figures of objects, each of which weighs the same.

    Args:
        predicted, true: metres of each object (`object_depth`); those where one is NaN or 0 are
            left out.
        prefix: "depth/objects" for matched detections under their own masks, "depth/true_masks" for
            the predicted map under the ground truth's: what differs is due to the masks.

    Returns:
        `<prefix>/<name>` for NAMES, and `<prefix>/count`, the objects that count; nothing without
        any.
    """
    found = depth_figures(predicted, true)
    if found:
        found["count"] = float(_pairs(predicted, true)[0].size)
    return {f"{prefix}/{name}": value for name, value in found.items()}


def table(metrics: dict[str, float]) -> str:
    """Format the figures of depth as aligned lines; "" without any.

    Errors in metres are SqRel and RMSE; delta1..3 are in percent.
    """
    kinds = {
        "mean over images": "depth/",
        "all pixels": "depth/pooled/",
        "medians made equal": "depth/scaled/",
        "objects": "depth/objects/",
        "objects, true masks": "depth/true_masks/",
    }
    rows = [["depth", *NAMES]]
    for title, prefix in kinds.items():
        if f"{prefix}AbsRel" in metrics:
            values = [metrics[prefix + name] for name in NAMES]
            shares = [f"{100 * value:.1f}" for value in values[6:]]
            rows.append([title, *(f"{value:.3f}" for value in values[:6]), *shares])
    return "\n".join(text_table(rows)) if len(rows) > 1 else ""


def object_depth(metres: Float[np.ndarray, "*n"], mask: Bool[np.ndarray, "h w"]) -> float:
    """The median of the known depths under a mask; of an even number, the mean of the middle two.

    Args:
        metres: depth of each pixel; what is not finite or not positive is unknown.
        mask: the object's pixels.

    Returns:
        Metres; NaN if no depth under the mask is known.
    """
    under = metres[mask]
    under = under[known(under)]
    return float(np.median(under)) if under.size else float("nan")


def known(metres: Float[np.ndarray, "*n"]) -> Bool[np.ndarray, "*n"]:
    """Where there is a depth: a finite one over 0."""
    return np.isfinite(metres) & (metres > 0)


def _pairs(
    predicted: Float[np.ndarray, "*n"], true: Float[np.ndarray, "*n"]
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Predicted and true metres where both are known."""
    if predicted.shape != true.shape:
        raise ValueError(f"predicted depth is {predicted.shape}, true depth {true.shape}")
    both = known(predicted) & known(true)
    return predicted[both].astype(np.float64), true[both].astype(np.float64)


def _sums(
    predicted: Float[np.ndarray, " k"], true: Float[np.ndarray, " k"], *, scaled: bool
) -> Float[np.ndarray, "*n"]:
    """Sums over known places that `_figures` needs: those of several images add up."""
    if scaled:
        predicted = predicted * (np.median(true) / np.median(predicted))
    difference, logs = predicted - true, np.log(predicted) - np.log(true)
    ratio = np.maximum(predicted / true, true / predicted)
    terms = (
        np.abs(difference) / true,
        difference**2 / true,
        difference**2,
        logs**2,
        np.abs(logs),
        logs,
        *(ratio < DELTA**power for power in (1, 2, 3)),
    )
    return np.array([true.size, *(term.sum() for term in terms)], np.float64)


def _figures(sums: Float[np.ndarray, "*n"]) -> dict[str, float]:
    """NAMES -> values, of the sums over at least one place."""
    absolute, squared, square, logs2, abs_logs, logs, *shares = (sums[1:] / sums[0]).tolist()
    spread = max(logs2 - logs**2, 0.0)  # rounding may bring it below 0
    roots = np.sqrt([square, logs2, spread]).tolist()
    values = (
        absolute,
        squared,
        roots[0],
        roots[1],
        abs_logs / np.log(10),
        100 * roots[2],
        *shares,
    )
    return dict(zip(NAMES, map(float, values), strict=True))
