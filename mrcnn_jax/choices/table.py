"""What was chosen for a data set, as a table with reasons."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from mrcnn_jax.config.schema import Config
from mrcnn_jax.output import text_table


@dataclass(frozen=True)
class Row:
    """A choice: what it is, its value in a config, why, and the options that change it."""

    what: str
    value: Callable[[Config], str]
    why: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chosen:
    """A config, and the reasons for it."""

    config: Config
    rows: tuple[Row, ...]

    def table(self, config: Config, given: Collection[str] = ()) -> list[str]:
        """The choices in lines.

        Args:
            config: the chosen one, with what was given in place of choices.
            given: options on the command line.
        """
        rows = [("chosen", "value", "why", "changed by")]
        for row in self.rows:
            why = "given" if set(row.options) & set(given) else row.why
            rows.append((row.what, row.value(config), why, " ".join(row.options)))
        return text_table(rows, left=4)
