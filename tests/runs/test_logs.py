"""What a checkpoint says of the logs of its run."""

from __future__ import annotations

from pathlib import Path

import pytest

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.runs import logs


def test_any_flipped_bit_of_what_was_there_is_found(tmp_path: Path) -> None:
    log, checkpoint = tmp_path / logs.TIMING, tmp_path / "checkpoint"
    checkpoint.mkdir()
    log.write_bytes(b'{"seconds": 1.5}\n')
    logs.record(tmp_path, checkpoint)
    whole = log.read_bytes() + b"a row after it\n"
    log.write_bytes(whole)
    logs.refuse_damaged(log, checkpoint)
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        log.write_bytes(flipped)
        if place < whole.index(b"a row"):
            with pytest.raises(ConfigError, match=r"timing\.jsonl: damaged: its first 17 bytes"):
                logs.refuse_damaged(log, checkpoint)
        else:
            logs.refuse_damaged(log, checkpoint)
    log.write_bytes(whole[:9])
    with pytest.raises(ConfigError, match="damaged"):
        logs.refuse_damaged(log, checkpoint)


def test_what_was_not_there_is_not_missed(tmp_path: Path) -> None:
    """A run may be copied without its logs, and older versions recorded nothing."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    logs.record(tmp_path, checkpoint)
    assert list(checkpoint.iterdir()) == []
    (tmp_path / logs.METRICS).write_text("a row\n")
    logs.refuse_damaged(tmp_path / logs.METRICS, checkpoint)
    logs.record(tmp_path, checkpoint)
    (tmp_path / logs.COMMANDS).write_text("first written after the checkpoint\n")
    logs.refuse_damaged(tmp_path / logs.COMMANDS, checkpoint)
    (tmp_path / logs.METRICS).unlink()
    logs.refuse_damaged(tmp_path / logs.METRICS, checkpoint)
