"""The notebook runs, cell by cell, with fewer images and channels; it has the outputs of a run."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

SMALLER = {  # what the notebook says, and what is run here
    "count, epochs = 2000, 8": "count, epochs = 64, 6",
    "fpn_channels=32": "fpn_channels=16",
    "width=16": "width=8",
    "hidden=128": "hidden=64",
}
NOTEBOOK = Path(__file__).parent.parent / "docs" / "tutorial.ipynb"


@pytest.mark.slow
def test_the_tutorial_trains_and_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.syspath_prepend(".")  # sys.path is as before afterwards
    pictures: list[np.ndarray] = []

    def show() -> None:
        plt.gcf().canvas.draw()
        pictures.append(np.asarray(plt.gcf().canvas.buffer_rgba()))  # type: ignore[attr-defined]
        plt.close()

    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "show", show)
    names: dict[str, Any] = {}
    used: set[str] = set()
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    for cell in cells:
        source = "".join(cell["source"])
        for text in [text for text in SMALLER if text in source]:
            source = source.replace(text, SMALLER[text])
            used.add(text)
        exec(compile(source, f"{NOTEBOOK.name}: {cell['id']}", "exec"), names)
    assert used == SMALLER.keys()
    kept = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in kept) == 2
    assert not any(output["output_type"] == "error" for output in kept)
    losses = names["losses"]
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:8])
    assert [detections.path for detections in names["found"]] == names["images"]
    assert max(len(detections.scores) for detections in names["found"]) > 0
    assert len(pictures) == 2
    assert all(picture.std() > 0 for picture in pictures)
