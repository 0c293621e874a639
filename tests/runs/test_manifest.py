"""Harm to a manifest is found, whichever bit it is."""

from __future__ import annotations

from pathlib import Path

from mrcnn_jax.runs import manifest


def test_any_flipped_bit_of_the_manifest_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "00000003-rpn"
    (folder / "model" / "d").mkdir(parents=True)
    for name in ("meta.json", "model/_METADATA", "model/d/0"):
        (folder / name).write_text(name)
    assert manifest.damage(folder) == f"{folder}: no such checkpoint (it has no manifest.json)"
    manifest.write(folder)
    assert manifest.damage(folder) is None
    path = folder / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(bytes(flipped))
        around = content[max(0, position - 20) : position + 20]
        assert manifest.damage(folder) is not None, (position, around)
    for length in range(len(content) - 3, len(content)):
        path.write_bytes(content[:length])
        assert manifest.damage(folder) is not None


def test_a_removed_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "00000003-rpn"
    folder.mkdir()
    manifest.write(folder)
    assert manifest.exists(folder)
    manifest.remove(folder)
    assert list(tmp_path.iterdir()) == []
