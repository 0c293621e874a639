"""The logs of a run, files that only grow. A checkpoint records what they held when it was saved:
nothing else would tell a flipped bit in a loss from the loss."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.runs.manifest import flush

FILE = "logs.json"  # in a checkpoint's folder
METRICS, TIMING, COMMANDS = "metrics.jsonl", "timing.jsonl", "commands.txt"


def record(workdir: Path, checkpoint: Path) -> None:
    """Writes size and SHA-256 of the logs of a run into the folder of a checkpoint.

    When this returns, the logs are on the disk: they must be as safe as what is said of them.
    """
    found = {}
    for name in (METRICS, TIMING, COMMANDS):
        if (workdir / name).is_file():
            flush(workdir / name)
            content = (workdir / name).read_bytes()
            found[name] = [len(content), _sha256(content)]
    if found:
        (checkpoint / FILE).write_text(json.dumps(found))


def refuse_damaged(path: Path, checkpoint: Path) -> None:
    """Raises ConfigError if a log does not begin with what it held when a checkpoint was saved.

    Args:
        path: the log; nothing is wrong if there is none (it was not copied, for instance).
        checkpoint: folder of an intact checkpoint. Those of older versions recorded nothing.
    """
    if not path.exists() or not (checkpoint / FILE).exists():
        return
    size, digest = json.loads((checkpoint / FILE).read_bytes()).get(path.name, (0, _sha256(b"")))
    try:
        with path.open("rb") as file:
            content = file.read(size)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if len(content) < size or _sha256(content) != digest:
        raise ConfigError(
            f"{path}: damaged: its first {size} bytes are not those of the time of checkpoint "
            f"{checkpoint.name} (move the file away to go on without it)"
        )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
