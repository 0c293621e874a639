"""Every preset as text, so that an unintended change of an option or of a parameter shows as a
diff.

    python -m tests.golden      # in the repository's root: writes tests/golden/ anew, after a
    change that is meant

A preset is a file of configs/, a ModelConfig of mrcnn_jax/tables.py, or configs/shapes.py with the
IoU loss, which no file has. NAME.config.json holds all
of its fields, NAME.parameters.txt a line for each parameter: path, shape and the stages that train
it; and one for each running statistic.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict

from mrcnn_jax.commands.variants import VARIANTS
from mrcnn_jax.config import tables
from mrcnn_jax.config.files import load_config_file, to_dict
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.optional_heads import following_heads
from mrcnn_jax.config.schema import Config, StageConfig
from mrcnn_jax.models.initialise import variable_shapes
from mrcnn_jax.training.stages import FROZEN, labels

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "golden"


def presets() -> dict[str, Config | ModelConfig]:
    configs = {
        path.stem: load_config_file(path) for path in sorted((ROOT / "configs").glob("*.py"))
    }
    (giou,) = (variant for variant in VARIANTS if variant.name == "giou")
    configs["variants.giou"] = giou.change(configs["shapes"])
    return configs | {
        f"tables.{name}": value
        for name, value in vars(tables).items()
        if isinstance(value, ModelConfig)
    }


def texts(preset: Config | ModelConfig) -> dict[str, str]:
    """The text of each of the preset's files, by the end of their name."""
    return {
        "config.json": json.dumps(to_dict(preset), indent=2) + "\n",
        "parameters.txt": _parameters(preset),
    }


def _parameters(preset: Config | ModelConfig) -> str:
    stages: tuple[StageConfig, ...] = ()
    model = preset
    if isinstance(preset, Config):
        model, stages = preset.model, following_heads(preset).stages  # as training does
    variables = variable_shapes(model)
    kinds = {
        stage.name: flatten_dict(labels(stage, variables["params"]), sep="/") for stage in stages
    }
    rows = []
    for path, leaf in sorted(flatten_dict(variables["params"], sep="/").items()):
        trained = ", ".join(name for name, kind in kinds.items() if kind[path] != FROZEN)
        rows.append(
            (path, _shape(leaf), f"trained in {trained}" if trained else "frozen" if stages else "")
        )
    rows += [
        (path, _shape(leaf), "statistic")
        for path, leaf in sorted(flatten_dict(variables.get("batch_stats", {}), sep="/").items())
    ]
    return "".join(f"{path:<40}{shape:<24}{kind}".rstrip() + "\n" for path, shape, kind in rows)


def _shape(leaf: jax.ShapeDtypeStruct) -> str:
    return f"{leaf.dtype} {'x'.join(map(str, leaf.shape))}"


def _write() -> None:
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.iterdir():
        old.unlink()
    for name, preset in presets().items():
        for end, text in texts(preset).items():
            (FOLDER / f"{name}.{end}").write_text(text)


if __name__ == "__main__":
    _write()
