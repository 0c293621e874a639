"""Mask R-CNN in JAX: train, evaluate and use instance segmentation models on COCO-format data.

`mrcnn COMMAND --help` explains a command. Without installation, `python -m mrcnn_jax` is `mrcnn`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import operator
import sys
from collections.abc import Sequence
from dataclasses import make_dataclass
from typing import Annotated, Any

import tyro

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.output import printable_streams

COMMANDS = {
    "train": "Train a network stage by stage, or resume where training stopped.",
    "eval": "Evaluate a run: COCO AP, proposal recall, pictures and a report.",
    "predict": "Detect and segment objects in image files.",
    "check": "Check a COCO-format data set, its images included.",
    "convert": "Convert an annotation tool's export to COCO, COCO to YOLO, or images to tiles.",
    "import": "Import weights of torchvision, detectron2, mmdetection or timm as a run.",
    "export": "Export a run to one file that needs only jax and NumPy, or to ONNX.",
    "share": "Copy a run without optimiser state and local paths, with a model card.",
    "figures": "Draw a report's figures from the folders of runs.",
    "experiments": "Train and evaluate every variant of a recipe, and tabulate them.",
    "replay": "Repeat a training step whose loss or gradient was not finite.",
    "generate": "Generate a data set: shapes, bins with depth, or coco300 from COCO 2017.",
}
"""Subcommand -> its line in the list; the module of commands/ has its name."""
_MODULES = {"import": "import_weights"}  # a keyword cannot name a module


def main() -> None:
    """Runs `mrcnn COMMAND ...`."""
    cli.run(lambda: _dispatch(*sys.argv[1:]))


def script(name: str) -> None:
    """Runs a script of a checkout, such as `python train.py ...`, as the command of its name."""
    cli.run(lambda: _run(name, sys.argv[1:], cli.program()))


def _dispatch(name: str = "--help", *argv: str) -> None:
    if name in COMMANDS:
        _run(name, argv, f"{cli.program()} {name}")
    elif name.startswith("-"):
        listed: Any = functools.reduce(
            operator.or_,
            (
                Annotated[make_dataclass(name, ()), tyro.conf.subcommand(name, description=line)]
                for name, line in COMMANDS.items()
            ),
        )
        tyro.cli(listed, args=[name], prog=cli.program(), description=__doc__)
    else:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(COMMANDS)}"
        raise ConfigError(f"{name}: no such command ({hint})")


def _run(name: str, argv: Sequence[str], program: str) -> None:
    """Parses a command's arguments, then runs it.

    Its module has `Arguments`, for tyro, or `parse(argv, program)`, which returns them, and
    `run(arguments)`, which imports what takes long: --help and typos are answered before.
    """
    module: Any = importlib.import_module(f"mrcnn_jax.commands.{_MODULES.get(name, name)}")
    if hasattr(module, "parse"):
        arguments = module.parse(argv, program)
    else:
        arguments = tyro.cli(module.Arguments, args=argv, prog=program, description=module.__doc__)
    with printable_streams():  # not before: tyro writes its help in colours
        module.run(arguments)


if __name__ == "__main__":
    main()
