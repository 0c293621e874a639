"""The network is compiled once per canvas, and batches of one hold their image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

import mrcnn_jax
from mrcnn_jax.inference.predictor import batch_of, batch_of_one


def test_sizes_share_one_program_a_canvas(model: mrcnn_jax.Model) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3)).astype(np.uint8)
    model.predict(noise)
    before = model._predictor._apply._cache_size()
    for height, width in ((200, 300), (31, 30), (128, 128), (1, 77)):
        assert model.predict(noise[:height, :width]).masks.shape[1:] == (height, width)
    assert model._predictor._apply._cache_size() == before
    for height, width in ((200, 300), (31, 30), (128, 128), (1, 77)):
        model.predict(noise[:height, :width], tile=64, overlap=8)
    assert model._predictor._apply._cache_size() <= before + 1


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


def test_parts_have_the_scale_of_the_image_they_are_like(model: mrcnn_jax.Model) -> None:
    """A part of half the height has half the height on the canvas; the rest is not valid."""
    parts = [np.full((200, 200, 3), 77, np.uint8), np.full((100, 200, 3), 55, np.uint8)]
    batch = batch_of(parts, model.run.config.data, like=(200, 200), rows=3)
    assert batch.image_sizes[:2].tolist() == [[128, 128], [64, 128]]
    assert batch.original_sizes[:2].tolist() == [[200, 200], [100, 200]]
    np.testing.assert_allclose(batch.scales[:2], 0.64)
    assert batch.valid.tolist() == [True, True, False]
    assert (batch.images[1, :64] == 55).all()
    assert not batch.images[1, 64:].any()
    assert not batch.images[2].any()
