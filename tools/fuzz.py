"""Fuzzes the data pipeline: child processes read, check and load mutated files and images.

    python tools/fuzz.py [--annotations 10000] [--images 5000] [--seed 0] [--limit 10]

A case may be usable, refused by a ConfigError, or (an image) dropped by a ValueError of
`decode_image`. Failures are a crash of the process, more than `--limit` seconds, any other
exception, and an array of another form than promised: they are listed, and the exit status is 1.
Case i is a pure function of (seed, i): `annotation_case` and `image_case` give its bytes again.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import multiprocessing
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package need not be installed

from mrcnn_jax.commands.data_summary import summary, summary_lines
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.builder import make_record
from mrcnn_jax.data.images import check_split
from mrcnn_jax.data.loader import Split, load, plan_once
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.pixels.decode import decode_image
from mrcnn_jax.pixels.transforms import resize_plan

Kind = Literal["annotations", "images"]

HEIGHT, WIDTH = 48, 64  # of every image
DATA = DataConfig(
    short_side=64,
    long_side=64,
    canvases=((64, 64),),
    max_objects=4,
    max_ignored=1,
    mask_crop=14,
    threads=1,
)
MEMORY = 4 << 30  # bytes that a case may take beyond what its process has at its start
START = 300.0  # seconds that a process may take to start


# -- what is mutated -------------------------------------------------------------------------------


def base_annotations() -> dict[str, Any]:
    """Three images and every kind of segmentation."""
    square = [10, 10, 30, 10, 30, 30, 10, 30]
    runs = [10 * HEIGHT, 20 * HEIGHT, 34 * HEIGHT]
    compressed = "Zn0d0l000000000AYO5g0KYO5g0KYO5g0KYO5g0KYO5g0:000000000000000000fS1"
    objects: list[tuple[list[int], Any]] = [
        ([10, 10, 30, 31], [[10.5, 10.25, 40.0, 12.0, 25.0, 40.75]]),
        ([10, 10, 40, 20], [square, [40, 20, 50, 20, 50, 30]]),
        ([10, 10, 20, 20], square),
        ([10, 0, 20, HEIGHT], {"size": [HEIGHT, WIDTH], "counts": runs}),
        ([20, 10, 20, 20], {"size": [HEIGHT, WIDTH], "counts": compressed}),
        ([10, 10, 30, 30], None),
        ([10, 10, 30, 30], []),
    ]
    return {
        "info": {"year": 2026},
        "images": [
            {"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH}
            for i, name in enumerate(("a.png", "a b/ü.png", "c.jpg"), 7)
        ],
        "annotations": [
            {
                "id": number,
                "image_id": 7 + number % 3,
                "category_id": (3, 90)[number % 2],
                "bbox": bbox,
                "area": 900,
                "iscrowd": int(number == 3),
                "segmentation": segmentation,
            }
            for number, (bbox, segmentation) in enumerate(objects)
        ],
        "categories": [{"id": 90, "name": "b"}, {"id": 3, "name": "a"}],
    }


@functools.cache
def base_images() -> tuple[bytes, ...]:
    """A picture as PNG and JPEG files of several kinds."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(
        (WIDTH, HEIGHT), Image.Resampling.BICUBIC
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(rng.integers(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16))
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (picture, "JPEG", {}),
        (picture, "JPEG", {"progressive": True}),
        (picture, "JPEG", {"exif": exif, "restart_marker_blocks": 2}),
        (picture.convert("L"), "JPEG", {}),
        (picture.convert("CMYK"), "JPEG", {}),
        (picture, "PNG", {"exif": exif}),
        (picture.convert("P"), "PNG", {"transparency": 3}),
        (picture.convert("RGBA"), "PNG", {}),
        (picture.convert("1"), "PNG", {}),
        (deep, "PNG", {}),
    ]
    return tuple(_encoded(image, form, **options) for image, form, options in kinds)


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


# -- mutations -------------------------------------------------------------------------------------


def annotation_case(seed: int, index: int) -> bytes:
    """A mutated annotation file: in three of four cases its values, otherwise its bytes."""
    rng = np.random.default_rng((seed, 0, index))
    content = base_annotations()
    if rng.random() < 0.75:
        for _ in range(rng.integers(1, 5)):
            _mutate_value(rng, content)
        return json.dumps(content).encode("utf-8", "surrogatepass")
    return _mutated_bytes(rng, json.dumps(content).encode())


def image_case(seed: int, index: int) -> bytes:
    """A mutated PNG or JPEG file; half of the PNGs get valid checksums, to reach what is behind."""
    rng = np.random.default_rng((seed, 1, index))
    bases = base_images()
    encoded = _mutated_bytes(rng, bases[rng.integers(len(bases))])
    return _with_checksums(encoded) if rng.random() < 0.5 else encoded


def _nasty(rng: np.random.Generator) -> Any:
    """A value that code may stumble over."""
    far = float(10.0 ** rng.uniform(2, 12))
    garbage = "".join(map(chr, rng.integers(48, 112, rng.integers(1, 40)).tolist()))
    deep: list[Any] = []
    for _ in range(50):
        deep = [deep]
    # fmt: off
    values: tuple[Any, ...] = (
        None, True, False, "", "12", " 7 ", 12.0, 7.5, -1, 0, 1, 2**31, 2**32 + 7, 2**63, 10**400,
        1e308, 1e-300, float("nan"), float("inf"), -float("inf"), [], {}, [[]], [None], "\ud800",
        "\0", "x" * 5000, "../a.png", "/a.png", "..\\a.png", deep, [far] * 6,
        [[far, 0, far, far, 0, far]], [[-far, -far, far, far, far, -far]], [0.2, 0.3, 0.1, 0.4],
        [far] * 4, [[0, 0, WIDTH, HEIGHT] * 500], [[1, 1, 9, 1, 9, 9]] * 300, [[5, 5]] * 8,
        list(range(8)), [1, 2, 3, 4], int(far), -far,
        {"size": [HEIGHT, WIDTH], "counts": garbage},
        {"size": [HEIGHT, WIDTH], "counts": f"b'{garbage}'"},
        {"size": [HEIGHT, WIDTH], "counts": rng.integers(-2, 2000, 9).tolist()},
        {"size": [HEIGHT, WIDTH], "counts": [0] * 1000 + [HEIGHT * WIDTH]},
        {"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]},
        {"size": [2**31, 2**31], "counts": garbage},
    )
    # fmt: on
    return values[rng.integers(len(values))]


def _mutate_value(rng: np.random.Generator, content: dict[str, Any]) -> None:
    """Replaces, removes, doubles, moves or changes one value anywhere in the file."""
    slots: list[tuple[Any, Any]] = []  # (container, key)
    left: list[Any] = [content]
    while left:
        node = left.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        slots += [(node, key) for key in keys]
        left += [node[key] for key in keys if isinstance(node[key], dict | list)]
    if not slots:
        return
    node, key = slots[rng.integers(len(slots))]
    other, place = slots[rng.integers(len(slots))]
    value = node[key]
    match rng.integers(7):
        case 0:
            del node[key]
        case 1 if isinstance(node, list):
            node.insert(key, copy.deepcopy(value))
        case 2:
            other[place] = copy.deepcopy(value)
        case 3 if type(value) in (int, float) and abs(value) < 1e300:
            changes = (-value, value + 0.5, str(value), float(value), value * 1000, value / 64)
            node[key] = changes[rng.integers(len(changes))]
        case 4:
            node[key] = [value]
        case _:
            node[key] = _nasty(rng)


def _mutated_bytes(rng: np.random.Generator, encoded: bytes) -> bytes:
    """One to four changes, more of them near the start, where headers are."""
    data = bytearray(encoded)
    for _ in range(rng.integers(1, 5)):
        if not data:
            break
        at = int(len(data) * rng.random() ** rng.integers(1, 5))
        span = int(rng.integers(1, 40))
        match rng.integers(8):
            case 0 | 1:
                data[at] ^= 1 << rng.integers(8)
            case 2:
                data[at] = rng.integers(256)
            case 3:
                del data[at : at + span]
            case 4:
                data[at:at] = rng.bytes(span)
            case 5:
                data[at:at] = data[at : at + span]
            case 6:
                extreme = (0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)[rng.integers(6)]
                data[at : at + 4] = struct.pack(">I", extreme)
            case 7 if rng.random() < 0.3:
                del data[at:]
    return bytes(data)


def _with_checksums(encoded: bytes) -> bytes:
    """A PNG with the right checksum for each chunk whose length still fits; other files as is."""
    data, at = bytearray(encoded), 8
    while data[:4] == b"\x89PNG" and at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


# -- a case, in a child process --------------------------------------------------------------------


class _Records:
    """The records of a data set, made from its folder instead of an ArrayRecord file."""

    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.dataset.images[index]
        record = make_record(image, (self.dataset.images_dir / image.file_name).read_bytes())
        names = ("annotation_id", "label", "box", "iscrowd", "counts")
        objects = {name: [each[name] for each in record["objects"]] for name in names}
        return {**record, "file_name": record["file_name"].encode(), "objects": objects}


def _read(annotations: Path, images: Path, cache: Path) -> str:
    """The whole pipeline, from two files to batches."""
    try:
        dataset = read_coco(annotations, images, DATA, lost_images=True)
        dataset, _ = check_split(dataset, cache=cache, data=DATA, keep_empty=True)
    except ConfigError as error:
        if "\n" in str(error):
            raise ValueError(f"not one line: {error}") from None
        return "refused"
    found = summary(dataset, DATA)
    json.dumps(found)
    "\n".join(summary_lines(dataset, found)).encode()
    plans = tuple(resize_plan(image.height, image.width, DATA) for image in dataset.images)
    split = Split("train", dataset, _Records(dataset), plans)
    for batch in load(split, plan_once(split, 2), DATA):
        truth = batch.ground_truth
        for boxes, valid in ((truth.boxes, truth.valid), (batch.ignore.boxes, batch.ignore.valid)):
            inside = np.isfinite(boxes).all() and (boxes >= 0).all() and (boxes <= 64).all()
            if not inside or (boxes[valid][:, 2:] <= boxes[valid][:, :2]).any():
                raise ValueError(f"boxes {boxes[valid].tolist()}")
    dropped = any(reason.outcome == "dropped" for reason, _ in dataset.report.findings)
    return "usable in part" if dropped else "usable"


def _annotation_outcome(case: bytes, folder: Path) -> str:
    path = folder / "mutated.json"
    path.write_bytes(case)
    return _read(path, folder / "images", folder / "cache")


def _image_outcome(case: bytes, folder: Path) -> str:
    (folder / "mutated" / "image").write_bytes(case)
    through_check = _read(folder / "one.json", folder / "mutated", folder / "cache")
    try:
        pixels = decode_image(case, upright=True, max_pixels=DATA.max_pixels)
    except ValueError:
        if through_check != "refused":
            raise
        return "dropped"
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"{pixels.dtype} {pixels.shape}")
    return through_check


def _prepare(folder: Path) -> None:
    (folder / "images" / "a b").mkdir(parents=True)
    (folder / "mutated").mkdir()
    jpeg, *_, png = base_images()
    for image in base_annotations()["images"]:
        (folder / "images" / image["file_name"]).write_bytes(
            jpeg if image["file_name"].endswith("jpg") else png
        )
    content = base_annotations()
    content["images"] = [{**content["images"][0], "file_name": "image"}]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 7]
    (folder / "one.json").write_text(json.dumps(content))


def serve(
    connection: Connection,
    seed: int,
    outcomes: dict[Kind, Callable[[bytes, Path], str]] | None = None,
) -> None:
    """A child process: answers the number of a case with its outcome, until it is sent None.

    Args:
        connection: to the parent.
        seed: of the cases.
        outcomes: functions of a case's bytes and a prepared folder; by default, the pipeline.
    """
    warnings.simplefilter("ignore")
    makers: dict[Kind, Callable[[int, int], bytes]] = {
        "annotations": annotation_case,
        "images": image_case,
    }
    outcomes = outcomes or {"annotations": _annotation_outcome, "images": _image_outcome}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(
            resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY)
        )
        connection.send("ready")
        while (case := connection.recv()) is not None:
            kind, index = case
            try:
                connection.send(outcomes[kind](makers[kind](seed, index), folder))
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                connection.send(f"error: {type(error).__name__}: {error} ({where})")
            shutil.rmtree(folder / "cache", ignore_errors=True)


# -- the parent ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    outcomes: dict[str, int]  # how often a case ended well, by "kind: outcome"
    failures: list[str]  # one line for each crash, hang and unexpected error


def run(
    cases: Sequence[tuple[Kind, int]],
    *,
    seed: int,
    limit: float,
    processes: int,
    target: Callable[..., None] = serve,
) -> Result:
    """Runs cases in child processes.

    Args:
        cases: kind and number of each.
        seed: of the cases.
        limit: seconds that a case may take.
        processes: how many run at once.
        target: what a child process runs.
    """
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    with tqdm(total=len(cases), unit="case", disable=None, leave=False) as bar:

        def work(own: Sequence[tuple[Kind, int]]) -> None:
            child = None
            for kind, index in own:
                if child is None:
                    child = _Child(seed, target)
                outcome = child.outcome(kind, index, limit)
                if outcome.startswith(("crash", "hang", "error")):
                    failures.append(f"{kind} {index}: {outcome}")
                else:
                    outcomes[f"{kind}: {outcome}"] += 1
                if outcome.startswith(("crash", "hang")):
                    child.kill()
                    child = None
                bar.update()
            if child is not None:
                child.end()

        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(work, [cases[i::processes] for i in range(processes)]))
    return Result(dict(sorted(outcomes.items())), sorted(failures))


class _Child:
    def __init__(self, seed: int, target: Callable[..., None]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, seed), daemon=True)
        self.process.start()
        theirs.close()
        if not self.connection.poll(START):
            raise RuntimeError(f"a child process did not start in {START} s")
        self.connection.recv()

    def outcome(self, kind: Kind, index: int, limit: float) -> str:
        try:
            self.connection.send((kind, index))
            found = self.connection.poll(limit)
            return self.connection.recv() if found else f"hang: over {limit} s"
        except (EOFError, OSError):
            self.process.join()
            return f"crash: exit status {self.process.exitcode}"

    def end(self) -> None:
        self.connection.send(None)
        self.process.join()
        self.connection.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


@dataclass(frozen=True)
class Arguments:
    annotations: int = 10_000
    """Number of mutated annotation files."""
    images: int = 5_000
    """Number of mutated PNG and JPEG files."""
    seed: int = 0
    """Seed of the cases."""
    limit: float = 10.0
    """Seconds that a case may take."""
    processes: int = 2
    """How many child processes run at once."""


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python tools/fuzz.py", description=__doc__)
    cases: list[tuple[Kind, int]] = [("annotations", i) for i in range(arguments.annotations)]
    cases += [("images", i) for i in range(arguments.images)]
    start = time.perf_counter()
    result = run(cases, seed=arguments.seed, limit=arguments.limit, processes=arguments.processes)
    print("\n".join(result.failures), file=sys.stderr, end="\n" if result.failures else "")
    found = {"seed": arguments.seed, **result.outcomes, "failures": len(result.failures)}
    print(json.dumps(found | {"seconds": round(time.perf_counter() - start, 1)}))
    sys.exit(1 if result.failures else 0)


if __name__ == "__main__":
    main()
