"""Videos are read frame by frame, and mistakes are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mrcnn_jax
from mrcnn_jax.config.errors import ConfigError
from tests.inference.frames import read, write_video


def test_a_video_is_predicted_frame_by_frame(
    model: mrcnn_jax.Model, folder: Path, tmp_path: Path
) -> None:
    """Its frames are those that were written, in RGB, but for the compression."""
    image = read(folder / "0.png")
    frames = [np.roll(image, 9 * number, axis=1) for number in range(3)]
    frames[0][:40, :40] = (250, 20, 20)
    write_video(tmp_path / "a.avi", frames)
    back = list(mrcnn_jax.video_frames(tmp_path / "a.avi"))
    assert len(back) == 3
    for ours, theirs in zip(back, frames, strict=True):
        assert np.abs(ours.astype(int) - theirs).mean() < 12
    assert np.abs(back[0][5:35, 5:35].mean((0, 1)) - (250, 20, 20)).max() < 12
    found = list(model.predict(mrcnn_jax.video_frames(tmp_path / "a.avi")))
    for detections, frame in zip(found, back, strict=True):
        np.testing.assert_array_equal(detections.boxes, model.predict(frame).boxes)


def test_videos_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "b.avi").write_text("no video")
    with pytest.raises(ConfigError, match=r"b\.avi: not a video that OpenCV can read$"):
        mrcnn_jax.video_frames(tmp_path / "b.avi")
    with pytest.raises(ConfigError, match=r"c\.avi: no such file$"):
        mrcnn_jax.video_frames(tmp_path / "c.avi")
