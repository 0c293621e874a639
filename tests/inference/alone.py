"""An export in a process of its own, which sees what the run sees without its packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import tiny

import mrcnn_jax

PREDICT = """
import sys

artefact, images, out, *without = sys.argv[1:]
sys.path.append(artefact)
try:
    import mrcnn_jax
    sys.exit("mrcnn_jax can be imported")
except ImportError:
    pass

import numpy as np
from mrcnn_exported import load

model = load(artefact)
found = {}
for name, image in np.load(images).items():
    seen = model.predict(image, min_score=0.05)
    found |= {f"{name}/{field}": value for field, value in seen.items()}
foreign = {name.split(".")[0] for name in sys.modules} & set(without)
sys.exit(f"imports {foreign}") if foreign else np.savez(out, **found)
"""


def assert_sees_the_same(
    artefact: Path, run: Path, data: Path, folder: Path, without: tuple[str, ...]
) -> str:
    """On images of the canvas's size, enlarged to it with padding, and shrunk to it.

    Args:
        artefact: the export, of `run`.
        run: its folder.
        data: the data set of tests/tiny.py.
        folder: an empty one.
        without: packages that the export may not import.

    Returns:
        What the process said of errors.
    """
    names = [image["file_name"] for image in tiny.read(data, "val")["images"][:3]]
    pixels = [cv2.imread(str(data / "images" / name))[..., ::-1] for name in names]
    images = {"a": pixels[0], "b": pixels[1][:90, :100], "c": cv2.resize(pixels[2], (301, 222))}
    np.savez(folder / "images.npz", **images)
    (folder / "empty").mkdir()
    arguments = [artefact, folder / "images.npz", folder / "found.npz", *without]
    done = subprocess.run(
        [sys.executable, "-I", "-c", PREDICT, *map(str, arguments)],
        cwd=folder / "empty",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    model = mrcnn_jax.load(run)
    with np.load(folder / "found.npz") as found:
        for name, image in images.items():
            live = model.predict(image, min_score=0.05)
            assert len(live.scores) > 3
            for field in ("labels", "category_ids", "class_names"):
                np.testing.assert_array_equal(found[f"{name}/{field}"], getattr(live, field))
            np.testing.assert_allclose(found[f"{name}/scores"], live.scores, atol=1e-5)
            np.testing.assert_allclose(found[f"{name}/boxes"], live.boxes, rtol=1e-5, atol=1e-3)
            masks = found[f"{name}/masks"]
            assert (masks.dtype, masks.shape) == (bool, live.masks.shape)
            assert (masks != live.masks).mean() < 1e-4
    return done.stderr
