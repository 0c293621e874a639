"""The documentation is true: links, commands, options, named places and the printed example."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib
import io
import itertools
import json
import re
import shlex
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro
from PIL import Image

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import load_config_file
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.reading import read_coco

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
)
NOTEBOOK = "docs/tutorial.ipynb"
SCRIPTS = ("train", "eval", "predict")  # at the top level, beside the subcommands of their names
# What a reader replaces, by an example of it.
PLACEHOLDERS = {"FORMAT": "labelme", "N": "1", "...": ""}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:[A-Z]+=\S+ )*(?:[./\w]*/)?(python|mrcnn|make|pip) ")


def text_of(page: str) -> str:
    if page != NOTEBOOK:
        return (ROOT / page).read_text()
    cells = json.loads((ROOT / page).read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def python_of(page: str) -> list[str]:
    """The Python of a page, block by block."""
    if page == NOTEBOOK:
        cells = json.loads((ROOT / page).read_text())["cells"]
        return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    found = FENCE.findall(text_of(page))
    return [textwrap.dedent(code) for _, language, code in found if language == "python"]


def prose_of(page: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", text_of(page))


def spans_of(page: str) -> list[str]:
    """The code spans of a page."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose_of(page))]


def commands_of(text: str) -> Iterator[str]:
    """The command lines in indented blocks and code spans of a text."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    for line in (*lines, *("    " + span for span in re.findall(r"`([^`\n]+)`", text))):
        if line.startswith("    "):
            for part in re.split(r"(?:;|&&|\|) (?=(?:[^\"]*\"[^\"]*\")*[^\"]*$)", line):
                part = re.sub(r"(^| )# .*", "", part).strip().removeprefix("do ")
                if COMMAND.match(part + " "):
                    yield part


def sources() -> dict[str, str]:
    """Every text that shows commands, by its file: pages, configs and help texts."""
    texts = {page: text_of(page) for page in (*PAGES, NOTEBOOK)}
    for path in (*ROOT.glob("configs/*.py"), *ROOT.glob("mrcnn_jax/commands/*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        texts[path.relative_to(ROOT).as_posix()] = doc
    return texts


# -- options ---------------------------------------------------------------------------------------


def options(value: Any, prefix: str = "--") -> dict[str, Any]:
    """Option -> type of every field of a config, as `train` takes them."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        name, inner = f"{prefix}{field.name.replace('_', '-')}", getattr(value, field.name)
        rows = enumerate(inner) if isinstance(inner, tuple) else ()
        inside = {f"{name}.{i}": row for i, row in rows if dataclasses.is_dataclass(row)}
        if dataclasses.is_dataclass(inner):
            inside = {name: inner}
        for path, part in inside.items():
            found |= options(part, f"{path}.")
        if not inside:
            found[name] = hints[field.name]
            if isinstance(inner, bool):
                prefix_, _, last = name.rpartition(".")
                found[f"{prefix_}.no-{last}" if prefix_ else f"--no-{last[2:]}"] = bool
    return found


@functools.cache
def config_options(config: str) -> dict[str, Any]:
    return options(load_config_file(ROOT / config if (ROOT / config).exists() else config))


def wrong_overrides(words: list[str], known: dict[str, Any]) -> str:
    for word, value in zip(words, [*words, ""][1:], strict=True):
        if word.startswith("--"):
            if word not in known:
                return f"no option {word}"
            choices = typing.get_args(known[word])
            if typing.get_origin(known[word]) is typing.Literal and value not in choices:
                return f"{word}: {value} is none of {choices}"
    return ""


def module_of(name: str) -> Any:
    """The module of a subcommand; None if there is no such subcommand."""
    main = importlib.import_module("mrcnn_jax.__main__")
    if name not in main.COMMANDS:
        return None
    return importlib.import_module(f"mrcnn_jax.commands.{main._MODULES.get(name, name)}")


def wrong_subcommand(name: str, words: list[str]) -> str:
    module = module_of(name)
    if module is None:
        return f"no subcommand {name}"
    if name == "train" and words and not words[0].startswith("-"):  # a folder
        own = {"--workdir": Path, "--weights": str, "--download": bool, "--minutes": float}
        return wrong_overrides(words[1:], config_options("finetune") | own)
    if name == "train" and words and "--help" not in words:
        given = dict(itertools.pairwise(words))
        needed = {"--resume"} if "--resume" in words else {"--config", "--workdir"}
        if not needed <= set(words):
            return f"without {' or '.join(needed)}"
        config = given.get("--config", "tests/tiny.py")
        if config == "FILE":  # any
            config = "tests/tiny.py"
        try:
            known = config_options(config)
        except ConfigError as error:
            return str(error)
        others = {"--weights": str, "--download": bool}
        others |= {"--epochs": float} if "--resume" in words else {}
        return wrong_overrides(words, known | dict.fromkeys(needed, Path) | others)
    if "--help" in words or not any(word.startswith("--") for word in words):
        return ""  # not a call, but the command's name
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            tyro.cli(module.Arguments, args=words)
    except (SystemExit, ConfigError) as error:
        return f"{error} {' '.join(output.getvalue().split())}"
    return ""


@functools.cache
def script_options(path: Path) -> frozenset[str]:
    """The options that a benchmark or tool adds by itself or by a module beside it."""
    text = path.read_text()
    names = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', text))
    names |= {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+): ", text, re.M)}
    for module in re.findall(r"^import (\w+)$", text, re.M):
        beside = path.with_name(f"{module}.py")
        names |= script_options(beside) if beside.exists() else set()
    return frozenset(names)


def wrong(command: str) -> str:
    """The fault of a command line; empty if there is none."""
    words = [word.split("|")[0] for word in shlex.split(re.sub(r"[\[\]]", " ", command))]
    words = [PLACEHOLDERS.get(word, word) for word in words]
    words = [word for word in words if word and not re.fullmatch(r"[A-Z]+=.*", word)]
    program, rest = Path(words[0]).name, words[1:]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        missing = [word for word in rest if "=" not in word and word not in targets]
        return f"no target {missing}" if missing else ""
    if program == "pip":
        files = re.findall(r"-[rc] (\S+)", command)
        missing = [file for file in files if not (ROOT / file).exists()]
        return f"no file {missing}" if missing else ""
    if program == "mrcnn" or rest[:2] == ["-m", "mrcnn_jax"]:
        name, *rest = (rest if program == "mrcnn" else rest[2:]) or ["--help"]
        return "" if name == "--help" else wrong_subcommand(name, rest)
    if not rest or rest[0] == "-c" or rest[:2] == ["-m", "pytest"]:
        return ""
    name = f"{rest[1].replace('.', '/')}.py" if rest[0] == "-m" else rest[0]
    rest = rest[2:] if rest[0] == "-m" else rest[1:]
    if not (ROOT / name).exists():
        return f"no file {name}"
    if name.removesuffix(".py") in SCRIPTS:
        return wrong_subcommand(name.removesuffix(".py"), rest)
    unknown = [word for word in rest if word.startswith("--")]
    unknown = [word for word in unknown if word not in script_options(ROOT / name)]
    return f"no option {unknown}" if unknown else ""


@pytest.mark.parametrize("source", sources())
def test_commands_can_be_typed(source: str) -> None:
    text = sources()[source]
    for name, value in re.findall(r'^ +(\w+)="(.*)"$', text, re.MULTILINE):
        text = text.replace(f"${name} ", f"{value} ")
    found = {command: wrong(command) for command in commands_of(FENCE.sub("", text))}
    assert {command: why for command, why in found.items() if why} == {}


def test_commands_are_found() -> None:
    texts = sources()
    assert len(list(commands_of(texts["README.md"]))) >= 8
    assert sum(len(list(commands_of(text))) for text in texts.values()) >= 80


@pytest.mark.parametrize(
    "command",
    [
        "make demos",
        "pip install -r requirement.txt",
        "python trains.py",
        "python train.py --config configs/shapes.py --workdir a --data.rot b",
        "python train.py --config configs/shape.py --workdir a",
        "python train.py --config configs/shapes.py --workdir a --model.roi.op aline",
        "python train.py --config configs/shapes.py --workdir a --stages.3.epochs 1",
        "python train.py --config configs/shapes.py --workdir a --epochs 1",
        "python train.py --resume a --workdir a",
        "python train.py my/ --workdir a --stages.0.epohcs 3",
        "python eval.py --workdir a --boundry",
        "python predict.py a.jpg --workdir a --weights emma",
        "python -m mrcnn_jax chek --annotations a --images b",
        "python -m mrcnn_jax generate shape --out a",
        "mrcnn figures proposal runs/a --out b",
        "mrcnn convert labelme a --split 0.1",
        "python -m mrcnn_jax.data.check",
        "python benchmarks/ops.py --boxs 3",
    ],
)
def test_a_typo_is_found(command: str) -> None:
    [found] = commands_of(f"    {command}")
    assert wrong(found)


@pytest.mark.parametrize("page", PAGES)
def test_options_in_the_text_exist(page: str) -> None:
    known = set(config_options("configs/coco300.py")) | {"--help", "--config", "--workdir"}
    for path in (ROOT / "mrcnn_jax").rglob("*.py"):
        if {"commands", "convert"} & set(path.parts):
            known |= script_options(path)
    known |= {option for path in ROOT.glob("benchmarks/*.py") for option in script_options(path)}
    spans = [span for span in spans_of(page) if span.startswith("--")]
    used = {word for span in spans for word in span.split() if word.startswith("--")}
    assert used - known - {"--json", "--distributed.*"} == set()


# -- places ----------------------------------------------------------------------------------------


def defines(path: Path, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", path.read_text()) is not None


def module_file(dotted: str) -> Path | None:
    path = ROOT / dotted.replace(".", "/")
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.exists()), None)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_places_that_a_page_names_exist(page: str) -> None:
    """Files, `file.py`, `name` in it, `stages.name` of training/, and mrcnn_jax.module.name."""
    text, new = prose_of(page), "\n".join(python_of(page))
    folders = ("mrcnn_jax", "tests", "configs", "benchmarks", "tools", "docs", ".ci", ".github")
    for span in spans_of(page):
        if span.split("/")[0] in folders and "/" in span and " " not in span:
            assert list(ROOT.glob(span)), f"{page}: no {span}"
        if re.fullmatch(r"mrcnn_jax(\.\w+)+", span):
            module, _, name = span.rpartition(".")
            file = module_file(span) or module_file(module)
            assert file is not None, f"{page}: no {span}"
            assert module_file(span) or defines(file, name), f"{page}: no {span}"
    named = re.findall(r"`((?:mrcnn_jax|tests)/[\w/]+\.py)`,\s+`([\w.]+)`", text)
    for module, name in re.findall(r"`(stages|step|optimizer)\.(\w+)`", text):
        named.append((f"mrcnn_jax/training/{module}.py", name))
    for path, name in named:
        last = name.split(".")[-1]
        assert defines(ROOT / path, last) or last in new, f"{page}: {path}, {name}"


@pytest.mark.parametrize("page", [*PAGES, NOTEBOOK])
def test_imports_in_python_exist(page: str) -> None:
    text = "\n".join(python_of(page))
    for module, names in re.findall(r"^from (mrcnn_jax[\w.]*) import (.*)$", text, re.MULTILINE):
        file = module_file(module)
        if file is None:  # the page makes it
            assert f"`{module.replace('.', '/')}.py`" in text_of(page), f"{page}: no {module}"
            continue
        for name in re.findall(r"\w+", names):
            own = re.search(rf"^\s*(class|def) {name}\b", text, re.MULTILINE)
            assert own or module_file(f"{module}.{name}") or defines(file, name), (
                f"{page}: {module} has no {name}"
            )


def test_the_table_of_rooms_names_modules() -> None:
    """All of them, but of commands, which has one of each name, and of the page."""
    rooms = re.findall(
        r"^\| .*?`mrcnn_jax/(\w+)/` \| (.*) \|$", text_of("docs/architecture.md"), re.M
    )
    folders = {path.parent.name for path in (ROOT / "mrcnn_jax").glob("*/__init__.py")}
    assert {name for name, _ in rooms} == folders
    for name, role in rooms:
        for module in re.findall(r"`([a-z_0-9]+)/?`", role):
            assert module_file(f"mrcnn_jax.{name}.{module}"), f"{name} has no {module}"
        modules = {path.stem for path in (ROOT / "mrcnn_jax" / name).glob("[!_]*.py")}
        if name != "commands":
            assert modules - set(re.findall(r"`([a-z_0-9]+)/?`", role)) == set()


# -- links -----------------------------------------------------------------------------------------


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, NOTEBOOK])
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if link.startswith("http"):
            continue
        target, _, anchor = link.partition("#")
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), f"{page}: {link}"
        if anchor:
            name = file.resolve().relative_to(ROOT).as_posix()
            assert anchor in anchors(name), f"{page}: {link}"


def test_every_page_is_in_the_index() -> None:
    index = set(re.findall(r"\]\(([\w.]+)\)", text_of("docs/README.md")))
    assert {path.name for path in ROOT.glob("docs/*.md")} | {"tutorial.ipynb"} == index | {
        "README.md"
    }
    assert {f"docs/{name}" for name in index} - set(PAGES) == {NOTEBOOK}


def test_every_picture_is_shown() -> None:
    shown = {
        ((ROOT / page).parent / link).resolve()
        for page in PAGES
        for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text_of(page))
    }
    assert {path for end in ("jpg", "png") for path in ROOT.glob(f"docs/**/*.{end}")} <= shown


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").split()) <= 1000


def test_the_example_of_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    """With nothing to repair, and as well without what the page says is not needed."""
    (block,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    Image.new("RGB", (640, 480)).save(tmp_path / "a.jpg")
    whole = json.loads(block)
    short = json.loads(block)
    for side in ("width", "height"):
        del short["images"][0][side]
    for field in ("iscrowd", "area", "bbox"):
        del short["annotations"][0][field]
    for number, content in enumerate((whole, short)):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(content))
        dataset = read_coco(path, tmp_path, DataConfig())
        (record,) = dataset.images[0].objects
        assert (record.box, record.area) == ((10.0, 20.0, 210.0, 120.0), 20000.0)
        assert len(dataset.report.lines()) == 1 or number  # only what is kept


def test_the_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    code = python_of("docs/architecture.md")[-1]
    exec(compile(code, "architecture.md", "exec"), {})
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == expected
    assert len(expected) == 2


def test_constraints_name_every_requirement() -> None:
    """With a version that the requirement allows."""
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    for file in ("requirements.txt", "requirements-dev.txt", "requirements-docs.txt"):
        for line in (ROOT / file).read_text().splitlines():
            if line and not line.startswith("#"):
                need = Requirement(line)
                name = need.name.lower().replace("_", "-")
                assert name in pinned, f"constraints.txt: {name} is missing"
                assert need.specifier.contains(pinned[name]), f"constraints.txt: {line}"
