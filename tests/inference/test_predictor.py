"""The network is compiled once per canvas, and batches of one hold their image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

import mrcnn_jax
from mrcnn_jax.inference.predictor import batch_of_one


def test_sizes_share_one_program_a_canvas(model: mrcnn_jax.Model) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3)).astype(np.uint8)
    for height, width in ((200, 300), (31, 30), (128, 128), (1, 77)):
        assert model.predict(noise[:height, :width]).masks.shape[1:] == (height, width)
    assert model._predictor._apply._cache_size() == 1


def test_a_batch_of_one_is_its_image_scaled_to_the_canvas(model: mrcnn_jax.Model) -> None:
    image = np.full((200, 300, 3), 77, np.uint8)
    batch = batch_of_one(image, model.run.config.data)
    height, width = batch.image_sizes[0]
    assert (batch.images[0, :height, :width] == 77).all()
    assert batch.images.sum() == 77 * 3 * height * width
    assert batch.original_sizes.tolist() == [[200, 300]]
    np.testing.assert_allclose(batch.scales[0], [height / 200, width / 300])
    assert batch.valid.tolist() == [True]
    assert not batch.ground_truth.valid.any()


def test_a_batch_of_one_shrinks_as_the_config_says(model: mrcnn_jax.Model) -> None:
    image = np.random.default_rng(0).integers(0, 256, (384, 384, 3)).astype(np.uint8)
    data = replace(model.run.config.data, shrink="bilinear")
    np.testing.assert_array_equal(batch_of_one(image, data).images[0], image[1::3, 1::3])
