"""The network is compiled once per canvas, and batches of one hold their image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import mrcnn_jax
from mrcnn_jax.commands.export_contents import metadata
from mrcnn_jax.config.heads import DepthHeadConfig
from mrcnn_jax.config.optional_heads import with_depth
from mrcnn_jax.inference.predictor import Predictor, batch_of, batch_of_one
from mrcnn_jax.structures import Instances


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


@pytest.mark.parametrize("kind", ["dense", "roi"])
def test_masks_of_a_random_head_are_left_out_and_what_is_read_through_them(
    kind: str, model: mrcnn_jax.Model
) -> None:
    """A run of an earlier version, which may have begun with a trained one, keeps both."""
    found = Instances(
        boxes=np.array([[8, 8, 40, 40]], np.float32),
        valid=np.array([True]),
        labels=np.array([1], np.int32),
        scores=np.array([0.9], np.float32),
        masks=np.ones((1, 28, 28), np.float32),
    )
    cells = np.full((32, 32) if kind == "dense" else (1, 28, 28), 3, np.float32)
    config, meta = model.run.config, replace(model.run.meta, stage_index=1)
    deep = replace(config, model=replace(config.model, depth_head=DepthHeadConfig(kind)))
    run = replace(model.run, config=deep, meta=meta)
    began_with = ("depth_head",)
    for loaded, kept in ((None, True), (began_with, False), ((*began_with, "mask_head"), True)):
        one = replace(run, meta=replace(meta, loaded=loaded))
        assert one.has_masks == metadata(one)["masks"] == kept
        assert ("left out" in (one.untrained_line or "")) == (not kept)
        assert one.network.depth_head.kind == (kind if kept or kind == "dense" else "none")
        depth = None if one.network.depth_head.kind == "none" else cells
        seen = Predictor(one).in_image(found, np.ones(2, np.float32), (128, 128), depth=depth)
        assert (seen.masks is not None) == (seen.depths is not None) == kept
        assert (seen.depth_map is not None) == (kept or kind == "dense")
    imported = replace(run, config=replace(deep, stages=()))
    assert imported.has_masks
    # Depth of boxes is learnt within masks: data without any leave it random.
    table = with_depth(deep.stages, epochs=1)
    for masks in (True, False):
        meta = replace(meta, loaded=("mask_head",), has_masks=masks, stage_index=3, stage_step=1)
        learnt = replace(run, config=replace(deep, stages=table), meta=meta)
        assert learnt.has_masks
        assert ("depth" in learnt.trained) == (masks or kind == "dense")
