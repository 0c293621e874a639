"""Detect and segment objects in images, folders of images and videos with a trained run.

    mrcnn predict image.jpg folder/ clip.mp4 --workdir runs/a --out out/ [--checkpoint best]
    [--weights ema] [--tile 1024 --overlap 128]

Writes out/detections.json (COCO results, with file names, and with a depth head the distance of
each object), out/images.json (COCO's list of the images and frames, with what was drawn of each)
and one overlay per image or frame, with --format also annotations to correct. Prints what was
converted to 8-bit RGB or passed over. A file that cannot be read is named, and the exit status is
2; the others are done. A call that is ended early (Ctrl-C, SIGTERM, a full disk) keeps what was
done, but for the annotations; earlier results of as many images in the same folder stay instead.
One that is killed keeps it only in a folder without earlier results.
What an earlier call drew into the same folder is removed at the end. With --tile, large images are
looked at tile by tile (docs/evaluation.md); a TIFF is then read by windows, whatever its size.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from mrcnn_jax import cli
from mrcnn_jax.commands.arguments import OfWeights, with_batch
from mrcnn_jax.config.errors import ConfigError

if TYPE_CHECKING:
    from mrcnn_jax.data.report import Report
    from mrcnn_jax.inference.drawn import JSONList
    from mrcnn_jax.inference.predicted_annotations import Annotations
    from mrcnn_jax.inference.results import TileCounts
    from mrcnn_jax.inference.tiles import Tiling
    from mrcnn_jax.runs.run import Run

DETECTIONS = "detections.json"


@dataclass(frozen=True, kw_only=True)
class Arguments(OfWeights):
    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Images, folders of images, and videos."""
    out: Path = Path("predictions")
    """The folder of the results."""
    min_score: float = 0.5
    """Lowest score of the detections drawn and annotated (detections.json has them all); of mask
    scores, where a mask-IoU head gives them."""
    format: Literal["labelme", "yolo", "coco"] | None = None
    """Also write those drawn as annotations to correct and train on, into a folder of this name in
    the folder of the results."""
    depth_maps: bool = False
    """Also write the depth of every pixel, if the run has a depth head: 16-bit PNG in millimetres,
    0 where it is unknown or over 65.534 m."""
    overlays: bool = True
    """Draw what was found into a picture of each image and frame."""
    tile: int | None = None
    """Look at each image in tiles of so many pixels' side, and merge what is found in them."""
    overlap: int | None = None
    """Pixels that neighbouring tiles share at least: objects up to this size are seen whole. By
    default an eighth of --tile."""
    eval_batch_size: int | None = None
    """With --tile, tiles at once, in place of the run's data.eval_batch_size: fewer need less
    memory."""


def run(arguments: Arguments) -> None:
    """Predicts and writes; image ids count images and frames from 1.

    Raises:
        ConfigError: no such run, file or image folder, options that do not go together, or `out`
            cannot be made or holds results of somebody else.
        OSError: a result cannot be written; has its name.
        SystemExit: status 2, after the other files are done, if some could not be read.
        BaseException: whatever else ends it early; the lists then have what was done, or are those
            of an earlier call.
    """
    from mrcnn_jax.data.report import Report
    from mrcnn_jax.inference import api
    from mrcnn_jax.inference.drawn import LIST, JSONList, growing_files, images_listed
    from mrcnn_jax.inference.inputs import image_files
    from mrcnn_jax.inference.predicted_annotations import open_annotations
    from mrcnn_jax.runs.run import make_folder

    report, out = Report(), arguments.out
    if not 0 <= arguments.min_score <= 1:
        raise ConfigError(f"--min-score: {arguments.min_score}: must be in 0..1")
    tiling = _tiling(arguments)
    earlier, before = _listed(out), images_listed(out)
    files = image_files(arguments.paths, report)
    workdir, checkpoint = arguments.workdir, arguments.checkpoint
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "checkpoint .* random")  # a line says so below
        model = api.load(workdir, checkpoint=checkpoint, weights=arguments.weights)
    if arguments.eval_batch_size is not None:
        model = api.Model(with_batch(model.run, arguments.eval_batch_size))
    if (line := model.run.untrained_line) is not None:
        print(line)
    if arguments.depth_maps and model.run.network.depth_head.kind == "none":
        raise ConfigError(f"--depth-maps: {workdir}: the run has no trained depth head")
    if (line := _threshold_line(arguments.min_score, model.run)) is not None:
        print(line)
    make_folder(out)
    made: AbstractContextManager[Annotations | None] = nullcontext()
    if arguments.format is not None:
        made = open_annotations(arguments.format, out, files, model.class_names, report)
    stopped: BaseException | None = None
    with made as annotations:
        # The annotations get their name last: they are not replaced. No detections without a list.
        with (
            growing_files(out / LIST, out / DETECTIONS) as (images_part, found_part),
            images_part.open("wb", buffering=0) as images,
            found_part.open("wb", buffering=0) as found,
        ):
            lists = JSONList(found), JSONList(images)
            results = _Results(arguments, files, tiling, model, report, *lists, annotations)
            try:
                with cli.sigterm_interrupts():
                    failed = results.add_files(files)
            except BaseException as error:
                if before >= results.images.count:  # the earlier results are more complete
                    if before:
                        print(results.take_back(earlier))
                    raise
                stopped = error
            results.detections.end()
            results.images.end()
            told = None if annotations is None or stopped is not None else annotations.end()
        if stopped is not None:
            results.tell(earlier, "ended early, but kept: ")
            raise stopped
    results.tell(earlier)
    if told is not None:
        print(told)
    if failed:
        sys.exit(2)


def _threshold_line(min_score: float, run: Run) -> str | None:
    """For people, if the network finds nothing with the lowest of the scores that are asked for."""
    lowest = run.config.model.box_head.score_threshold
    if min_score >= lowest or run.network.mask_iou_head.enabled:  # mask scores may be lower
        return None
    of_run = f"model.box_head.score_threshold = {lowest:g}"
    return f"--min-score {min_score:g}: nothing below the run's {of_run} is found"


def _tiling(arguments: Arguments) -> Tiling | None:
    """ConfigError if there are no such tiles."""
    from mrcnn_jax.inference.tiles import Tiling

    if arguments.tile is None:
        for name in ("overlap", "eval_batch_size"):
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')}: needs --tile")
        return None
    if arguments.eval_batch_size is not None and arguments.eval_batch_size < 1:
        raise ConfigError(f"--eval-batch-size: {arguments.eval_batch_size}: must be at least 1")
    if arguments.depth_maps:
        raise ConfigError("--depth-maps: not with --tile")
    return Tiling.of(arguments.tile, arguments.overlap)


class _Results:
    """What is written of each picture."""

    def __init__(
        self,
        arguments: Arguments,
        files: Iterable[Path],
        tiling: Tiling | None,
        model: Any,
        report: Report,
        detections: JSONList,
        images: JSONList,
        annotations: Annotations | None,
    ) -> None:
        self._arguments, self._model, self._report = arguments, model, report
        self._tiling, self._annotations = tiling, annotations
        self._inputs: set[Path | str] = {file.resolve() for file in files}
        self.detections, self.images = detections, images
        self.number = 0
        """Of the last picture: its image id."""
        self.full = 0
        """Pictures, or tiles, with as many objects as the network finds."""
        self.tiles: list[TileCounts] = []
        """Of each picture that was looked at in tiles."""
        self.notes: list[str] = []
        """Lines about videos."""
        self.beyond = 0
        """Pixels that are too far for a depth map's file."""
        self.written: set[str] = set()
        """Names in `out`."""
        self.new: set[str] = set()
        """Those that were not there before."""

    def add_files(self, files: Sequence[Path]) -> int:
        """Adds the pictures of all files; returns how many files could not be read."""
        from tqdm import tqdm

        from mrcnn_jax.commands.predict_pictures import pictures
        from mrcnn_jax.inference.out_of_memory import explaining_out_of_memory

        data, failed = self._model.run.config.data, 0
        at_once = 1 if self._tiling is None else data.eval_batch_size
        with tqdm(files, unit="file", leave=False, disable=None) as bar:
            for file in bar:
                before = self.number
                try:
                    found = pictures(file, self._tiling, data, self._report, self.notes.append)
                    for frame, picture in found:
                        with explaining_out_of_memory(at_once):
                            self.add(file, frame, picture)
                    if self.number == before:
                        raise ConfigError(f"{file}: a video without a frame that can be decoded")
                except ConfigError as error:
                    tqdm.write(f"error: {error}", file=sys.stderr)
                    self.number = max(self.number, before + 1)
                    failed += 1
        return failed

    def tell(self, earlier: set[str], start: str = "") -> None:
        """Removes the pictures of an earlier call, and prints what was done.

        Args:
            earlier: their names.
            start: of the line that says where the results are.
        """
        from mrcnn_jax.data.caps import found_limit
        from mrcnn_jax.inference.drawn import remove_earlier
        from mrcnn_jax.inference.tiles import tiles_line

        out, min_score = self._arguments.out, self._arguments.min_score
        remove_earlier(out, earlier, self._inputs | self.written, self._report)
        for line in self._report.lines()[1:] + self.notes:
            print(line)
        if self.beyond:
            print(f"--depth-maps: {self.beyond} pixels over 65.534 m, written as 0")
        if self.full:
            limit = self._model.run.config.model.box_head.detections
            what = "images" if self._tiling is None else "tiles"
            print(found_limit(limit, self.full, min_score, what))
        if self._tiling is not None:
            print(tiles_line(self._tiling, self.tiles))
        print(
            f"{start}{self.images.count} images, {self.detections.count} detections: "
            f"{out / DETECTIONS}" + (f", overlays in {out}" if self._arguments.overlays else "")
        )

    def take_back(self, earlier: set[str]) -> str:
        """Removes the new pictures; returns a line for people.

        Args:
            earlier: names of the pictures of an earlier call.
        """
        from mrcnn_jax.inference.drawn import take_back

        return take_back(self._arguments.out, self.written & earlier, self.new - earlier)

    def add(self, file: Path, frame: int | None, picture: Any) -> None:
        """Detects the objects in a picture (for tiles, a windowed image), and writes them."""
        from mrcnn_jax.commands.predict_pictures import see
        from mrcnn_jax.data.report import Reason
        from mrcnn_jax.evaluation.average_precision import mask_score
        from mrcnn_jax.figures.draw import draw_instances
        from mrcnn_jax.inference.drawn import LIST, picture_name
        from mrcnn_jax.inference.results import reduced
        from mrcnn_jax.output import named
        from mrcnn_jax.pixels.encode import write_depth, write_image

        out, min_score = self._arguments.out, self._arguments.min_score
        self.number += 1
        name = picture_name(self.number, file, frame, self._report)
        names = {
            suffix: f"{name}{suffix}.png"
            for suffix, wanted in (
                ("", self._arguments.overlays),
                ("_depth", self._arguments.depth_maps),
            )
            if wanted
        }
        for drawn_name in names.values():
            if (path := out / drawn_name).resolve() in self._inputs:
                raise ConfigError(f"{file}: its picture would replace {path} (another --out)")
        seen, image, step = see(self._model, picture, self._tiling)
        source = {"file_name": str(file)} | ({} if frame is None else {"frame": frame})
        found = seen.to_coco(self.number)
        with named(out / DETECTIONS):
            self.detections.add(*(source | result for result in found))
        drawn = [result for result in found if mask_score(result) >= min_score]
        if self._tiling is None:
            # The network keeps the best by class, whatever their masks.
            counted = sum(result["score"] >= min_score for result in found)
            self.full += counted == self._model.run.config.model.box_head.detections
            height, width = image.shape[:2]
        else:
            self.full += sum(score >= min_score for score in seen.tiles.full)
            self.tiles.append(seen.tiles)
            height, width = seen.size
        # Listed before they are drawn: whatever comes between, no later call takes them for images.
        size = {"height": height, "width": width}
        entry = {"id": self.number, **source, **size, "pictures": [*names.values()]}
        try:
            with named(out / LIST):
                self.images.add(entry)
        except BaseException:
            self.detections.leave_out(len(found))
            raise
        self.new.update(one for one in names.values() if not (out / one).exists())
        self.written.update(names.values())
        if "" in names:
            if step > 1:
                drawn = [reduced(result, step) for result in drawn]
                self._report.add(Reason.REDUCED, names[""], step=step)
            overlay = draw_instances(image, drawn, self._model.class_names, min_score=0)
            write_image(out / names[""], overlay)
        if self._annotations is not None:
            pixels = None
            if frame is not None:
                pixels = picture if self._tiling is None else picture.image
            self._annotations.add(name, file, pixels, seen.at_least(min_score))
        if "_depth" in names:
            self.beyond += write_depth(out / names["_depth"], seen.depth_map)


def _listed(out: Path) -> set[str]:
    """The names of what an earlier call drew into `out`, by its list; empty if there is none.

    Raises:
        ConfigError: there is another file of that name, or detections without the list, as `eval`
            writes them, which would be replaced.
    """
    from mrcnn_jax.inference.drawn import LIST, drawn_in

    if not (out / LIST).exists() and (out / DETECTIONS).exists():
        raise ConfigError(f"{out / DETECTIONS}: not written by predict (choose another --out)")
    try:
        return drawn_in(out)
    except ValueError as error:
        raise ConfigError(f"{error} (choose another --out)") from None
