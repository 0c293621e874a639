"""The machine and libraries of a run: with others it does not repeat bit for bit."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jaxlib

from mrcnn_jax.config.errors import VERSION


def environment() -> dict[str, str | int]:
    """Collect everything besides the config on which bit-for-bit repetition depends.

    Also this package's version: which one wrote a run.
    """
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processor": _processor(),
        "cpus": os.cpu_count() or 0,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 0,
        "mrcnn_jax": VERSION,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def changes(saved: Mapping[str, str | int]) -> list[str]:
    """Differences of a saved environment from the present one, as "cores 64 -> 2".

    Not of this package's version: most of them train the same.
    """
    before = {"devices": 1} | dict(saved)  # versions that used one device did not write this
    return [
        f"{name} {before.get(name)!r} -> {now!r}"
        for name, now in environment().items()
        if before.get(name) != now and name != "mrcnn_jax"
    ]


def _processor() -> str:
    """The CPU's name: XLA compiles for the instructions that this one has."""
    try:
        names = re.search(
            r"^model name\s*:\s*(.+)$",
            Path("/proc/cpuinfo").read_text(errors="replace"),
            re.MULTILINE,
        )
    except OSError:
        names = None
    return names.group(1) if names else platform.processor() or platform.machine()
