"""Which rows a failed step is computed on again; the rest of it is in test_loop.py."""

from __future__ import annotations

import numpy as np

from mrcnn_jax.models.mask_rcnn import example_batch
from mrcnn_jax.training.replay import FailedStep, rows_of


def test_an_image_that_is_repeated_in_a_batch_is_one_of_two_rows() -> None:
    """Rows are images number 7, 3, 7 again and one that fills the batch up."""
    indices, valid = np.array([7, 3, 7, 0], np.int32), np.array([True, True, True, False])
    failed = FailedStep(0, 2, ("loss/total",), {70: [1, 2], 30: []})
    rows = rows_of(failed, example_batch((64, 64)).replace(indices=indices, valid=valid))
    assert {name: chosen.tolist() for name, chosen in rows.items()} == {
        "all images": [True, True, True, True],
        "image 70 (annotations 1, 2) alone": [True, False, True, False],
        "image 30 (no annotations) alone": [False, True, False, False],
    }
