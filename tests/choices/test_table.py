"""The table of what was chosen."""

from __future__ import annotations

from mrcnn_jax.choices.table import Chosen, Row
from mrcnn_jax.config.schema import Config, DataConfig


def test_the_table_has_the_values_of_the_config_and_tells_what_was_given() -> None:
    rows = (
        Row("most objects", lambda c: f"{c.data.max_objects}", "counted", ("--data.max-objects",)),
        Row("seed", lambda c: f"{c.seed}", "always"),
    )
    chosen = Chosen(Config(), rows)
    lines = chosen.table(chosen.config)
    assert [line.split() for line in lines] == [
        ["chosen", "value", "why", "changed", "by"],
        ["most", "objects", "100", "counted", "--data.max-objects"],
        ["seed", "0", "always"],
    ]
    other = Config(data=DataConfig(max_objects=99), seed=3)
    _, objects, seed = chosen.table(other, ["--data.max-objects", "--seed"])
    assert objects.split() == ["most", "objects", "99", "given", "--data.max-objects"]
    assert seed.split() == ["seed", "3", "always"]
