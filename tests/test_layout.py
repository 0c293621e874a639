"""The structure of the package: data flows one way, rooms stay small, tests mirror modules.

python tests/test_layout.py      # prints every room with its floor, size and imports
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mrcnn_jax"
# Top to bottom. A module imports from its own room and from the floors below, at any place of the
# file, also under TYPE_CHECKING.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("commands",),
    ("choices",),
    ("training",),
    ("figures",),
    ("inference", "weights"),
    ("runs",),
    ("datasets", "models"),
    ("convert",),
    ("data", "evaluation", "ops"),
    ("pixels",),
    ("parallel",),
    ("runtime", "structures", "cli"),
    ("config",),
    ("output",),
)
LARGEST = 0.12  # share of the package's lines that a room may hold
# tests/ mirrors the package: mrcnn_jax/<room>/<module>.py has tests/<room>/test_<module>.py, unless
# another file covers it: module -> (that file, why).
SCRIPTS = "test_scripts.py"
JOBS = "commands/test_experiments.py"
SHARED = "one of many that use it: "
ELSEWHERE = {
    "mrcnn_jax": ("inference/test_api.py", "the API that it names"),
    "mrcnn_jax.__main__": (SCRIPTS, "called as users call it"),
    "mrcnn_jax.choices.data": ("choices/test_choose.py", "parts of what is chosen"),
    "mrcnn_jax.choices.devices": ("commands/test_own_folder.py", "the batch that follows them"),
    "mrcnn_jax.choices.folder": ("commands/test_own_folder.py", "from the command line"),
    "mrcnn_jax.commands.arguments": ("commands/test_eval.py", SHARED + "options of several"),
    "mrcnn_jax.commands.data_summary": ("commands/test_check.py", "what `check` prints"),
    "mrcnn_jax.commands.experiment_job": (JOBS, "a job that is stopped and resumed"),
    "mrcnn_jax.commands.experiment_table": (JOBS, "the table of that job"),
    "mrcnn_jax.commands.export": ("inference/test_exported.py", "the file that it writes"),
    "mrcnn_jax.commands.export_contents": ("inference/test_exported.py", "parts of that file"),
    "mrcnn_jax.commands.generate": (SCRIPTS, "its options; the data sets have their own"),
    "mrcnn_jax.commands.model_card": ("commands/test_share.py", "the card of a shared run"),
    "mrcnn_jax.commands.predict_pictures": ("commands/test_predict.py", "tiles, large images"),
    "mrcnn_jax.commands.replay": (SCRIPTS, "its options; training/test_replay.py has the rest"),
    "mrcnn_jax.convert.objects": ("convert/test_write.py", "objects of several shapes"),
    "mrcnn_jax.data.usual_mistakes": ("data/test_formats.py", "a file with each of them"),
    "mrcnn_jax.convert.lists": ("convert/test_write.py", "--only and --categories"),
    "mrcnn_jax.config.errors": ("config/test_schema.py", SHARED + "an exception class"),
    "mrcnn_jax.convert.tile_data": ("convert/test_cut_tiles.py", "a dataclass: the options"),
    "mrcnn_jax.evaluation.coco_categories": ("weights/test_importer.py", "constants"),
    "mrcnn_jax.figures.page": ("figures/page/test_page.py", "a package of one module"),
    "mrcnn_jax.inference.evaluate": ("commands/test_eval.py", "figures and files of `eval`"),
    "mrcnn_jax.runs.state": ("runs/test_checkpoints.py", SHARED + "a dataclass"),
    "mrcnn_jax.structures": ("data/test_loader.py", SHARED + "dataclasses"),
    "mrcnn_jax.weights.family": ("weights/test_families.py", "rules that its families share"),
    "mrcnn_jax.weights.network": ("weights/test_importer.py", "files of all families"),
    "mrcnn_jax.weights.origin": ("training/test_initial.py", "runs that start from both kinds"),
}

# Public functions that no module of the package uses, each with who does.
USED_OUTSIDE = {
    "mrcnn_jax.__main__.script": "train.py, eval.py and predict.py",
    "mrcnn_jax.cli.pass_on": "the process that guards standard error, by `python -c`",
    "mrcnn_jax.inference.exported.load": "whoever runs an export, which this file is copied into",
}


def room(module: str) -> str:
    """The room of mrcnn_jax.<room>[.<module>...]; the package's own __init__ is "mrcnn_jax"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, names: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module of the package) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield node.lineno, full if full in names else node.module
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "relative"
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def edges() -> list[tuple[str, str, str]]:
    """(importing module, imported module, place) inside the package."""
    known = modules()
    return [
        (name, target, f"{path.relative_to(ROOT)}:{line}")
        for name, path in known.items()
        for line, target in imports(path, set(known))
        if target.split(".")[0] in ("mrcnn_jax", "relative")
    ]


def floor_of() -> dict[str, int]:
    """Room -> its floor, 0 at the bottom."""
    return {name: floor for floor, rooms in enumerate(reversed(FLOORS)) for name in rooms}


def test_every_room_has_a_floor() -> None:
    rooms = {room(name) for name in modules()} - {"mrcnn_jax"}
    assert rooms == set(floor_of())


def test_imports_run_down_the_floors() -> None:
    floors = floor_of()
    found = edges()
    assert len(found) > 300
    wrong = [
        f"{place}: {source} imports {target}"
        for source, target, place in found
        if source != "mrcnn_jax"  # whose names are loaded late, by its users
        and room(source) != room(target)
        and floors[room(source)] <= floors.get(room(target), 99)
    ]
    assert wrong == []


def test_no_module_imports_itself_by_a_detour() -> None:
    below: dict[str, set[str]] = {}
    for source, target, _ in edges():
        below.setdefault(source, set()).add(target)
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert state.get(name) != 1, " -> ".join((*trail, name))
        if name in state:
            return
        state[name] = 1
        for target in sorted(below.get(name, set()) - {name}):
            visit(target, (*trail, name))
        state[name] = 2

    for name in sorted(set(below) - {"mrcnn_jax"}):
        visit(name, ())


def test_nothing_imports_a_script_a_test_or_a_benchmark() -> None:
    outside = {path.stem for path in ROOT.glob("*.py")} | {"tests", "benchmarks", "tools"}
    assert {"train", "eval", "predict"} <= outside
    known = modules()
    for name, path in known.items():
        assert not outside & {target.split(".")[0] for _, target in imports(path, set(known))}, name


def used_names(name: str, path: Path, known: set[str]) -> Iterator[str]:
    """`module.function` of all that a module names: its own, but for a function in itself, what it
    imports from others, and attributes of modules that it imports."""
    tree = ast.parse(path.read_text())
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                aliases[alias.asname or alias.name] = full
                if full not in known:
                    yield full
    for statement in tree.body:
        own = statement.name if isinstance(statement, ast.FunctionDef) else None
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id != own:
                yield f"{name}.{node.id}"
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                yield f"{aliases.get(node.value.id)}.{node.attr}"


def test_every_public_function_is_used_in_the_package() -> None:
    """Or by whom `USED_OUTSIDE` says: what tests alone call is a second way to do something."""
    known = modules()
    used = {found for name, path in known.items() for found in used_names(name, path, set(known))}
    public = {
        f"{name}.{statement.name}"
        for name, path in known.items()
        for statement in ast.parse(path.read_text()).body
        if isinstance(statement, ast.FunctionDef)
        and not statement.name.startswith("_")
        # `__main__` calls these of each command
        and not (room(name) == "commands" and statement.name in ("parse", "run"))
    }
    assert len(public) > 500
    assert sorted(public - used) == sorted(USED_OUTSIDE)


def lines_by_room() -> Counter[str]:
    lines: Counter[str] = Counter()
    for name, path in modules().items():
        lines[room(name)] += path.read_text().count("\n")
    return lines


def test_no_room_is_too_large() -> None:
    lines = lines_by_room()
    total = sum(lines.values())
    shares = {name: round(count / total, 3) for name, count in lines.items()}
    assert {name: share for name, share in shares.items() if share > LARGEST} == {}


def test_no_two_modules_have_one_name() -> None:
    """But a command, which is named by its subcommand."""
    named = Counter(
        path.stem
        for name, path in modules().items()
        if path.stem != "__init__" and room(name) != "commands"
    )
    assert [name for name, times in named.items() if times > 1] == []


def namesake(path: Path) -> Path:
    """The test file of a module."""
    inside = path.relative_to(PACKAGE)
    return ROOT / "tests" / inside.parent / f"test_{inside.stem}.py"


def test_every_module_has_its_tests() -> None:
    code = {
        name: path
        for name, path in modules().items()
        if path.name != "__init__.py" or "def " in path.read_text()
    }
    without = {name for name, path in code.items() if not namesake(path).is_file()}
    assert sorted(without) == sorted(ELSEWHERE)


def test_what_is_covered_elsewhere_is_used_there() -> None:
    """The test file imports the module, or what imports it, or calls the command."""
    known = modules()
    users: dict[str, set[str]] = {}
    for source, target, _ in edges():
        users.setdefault(target, {target}).add(source)
    for name, (test, _) in ELSEWHERE.items():
        path, stem = ROOT / "tests" / test, name.rpartition(".")[2]
        used = {target for _, target in imports(path, set(known))}
        command = stem.removesuffix("_weights")
        called = room(name) == "commands" and any(
            f'"{word}"' in path.read_text() for word in (command, f"{command}.py")
        )
        assert called or used & (users.get(name, set()) | {name}), f"{test} does not use {name}"


def main() -> None:
    lines, floors = lines_by_room(), floor_of()
    total = sum(lines.values())
    uses: dict[str, set[str]] = {}
    for source, target, _ in edges():
        if room(source) != room(target):
            uses.setdefault(room(source), set()).add(room(target))
    for name in sorted(floors, key=lambda name: -floors[name]):
        below = sorted(uses.get(name, ()), key=lambda other: -floors[other])
        share = f"{lines[name]:6,} lines {lines[name] / total:5.1%}"
        print(f"{floors[name]:2} {name:11} {share}  imports {', '.join(below) or '-'}")
    print(f"{total:,} lines in {len(modules())} modules")


if __name__ == "__main__":
    main()
