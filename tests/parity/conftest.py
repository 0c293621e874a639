"""torchvision beside us: collected by `make parity` alone, never by a plain `pytest`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from parity.compare import Measured

ROWS = pytest.StashKey[dict[str, dict[str, tuple[float, float]]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = {}


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    named = any(
        Path(argument.split("::")[0]).resolve().is_relative_to(Path(__file__).parent)
        for argument in config.args
    )
    return None if named else True


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> Measured:
    """See `Measured`."""

    def note(what: str, where: str, value: float, bound: float) -> None:
        row = pytestconfig.stash[ROWS].setdefault(what, {})
        row[where] = max(value, row.get(where, (0.0, bound))[0]), bound
        assert value <= bound, f"{what}, {where}: {value:.2g} > {bound:.0e}"

    return note


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of xdist hands its rows over."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["rows"] = {
            what: {where: tuple(map(float, cell)) for where, cell in row.items()}
            for what, row in session.config.stash[ROWS].items()
        }


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """To the process that prints them."""
    for what, row in getattr(node, "workeroutput", {}).get("rows", {}).items():
        merged = node.config.stash[ROWS].setdefault(what, {})
        for where, (value, bound) in row.items():
            merged[where] = max(value, merged.get(where, (0.0, bound))[0]), bound


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    columns = sorted(
        {where for row in rows.values() for where in row},
        key=lambda where: (where[:2], len(where), where),
    )
    terminalreporter.section("largest differences")
    terminalreporter.write_line(
        f"{'':40}{'bound':>9}" + "".join(f"{where:>11}" for where in columns)
    )
    for what, row in rows.items():
        bound = next(iter(row.values()))[1]
        values = "".join(
            f"{row[where][0]:11.1e}" if where in row else f"{'':11}" for where in columns
        )
        terminalreporter.write_line(f"{what:40}{bound:9.0e}{values}")
