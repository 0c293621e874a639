"""Evaluate a run: COCO AP, proposal recall, depth errors and pictures, from its folder alone.

    mrcnn eval --workdir runs/a [--checkpoint best] [--split train --limit 50]
    mrcnn eval --workdir runs/a --annotations x.json --images dir/

Writes eval/metrics.json, eval/detections.json (COCO results), eval/report.html, which shows it all
on one page, and figures/; of other images than the run's own validation images, or a part of them,
into a folder of another name. If the checkpoint holds a moving average of its weights, eval_ema/
has the same of it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mrcnn_jax import cli
from mrcnn_jax.commands.arguments import OfCheckpoint, with_batch
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import to_dict
from mrcnn_jax.config.schema import DistributedConfig
from mrcnn_jax.output import write_file

DATA = "evaluated_annotations.txt"  # the annotation file of --annotations that results are of

if TYPE_CHECKING:
    from mrcnn_jax.data.loader import Split
    from mrcnn_jax.inference.evaluate import Evaluation
    from mrcnn_jax.inference.predictor import Predictor
    from mrcnn_jax.runs.meta import Meta
    from mrcnn_jax.runs.metrics import Row
    from mrcnn_jax.runs.run import Run


@dataclass(frozen=True, kw_only=True)
class Arguments(OfCheckpoint):
    split: Literal["val", "train"] = "val"
    """Which of the run's own images."""
    limit: int | None = None
    """Evaluate only the first images."""
    annotations: Path | None = None
    """An annotation file to evaluate on instead of the run's own; goes with --images."""
    images: Path | None = None
    """The image folder of --annotations."""
    eval_batch_size: int | None = None
    """Images at once on a device, in place of the run's data.eval_batch_size: fewer need less
    memory, and give the same results."""
    score: float = 0.5
    """Minimum score of the detections that count in precision, recall, F1 and confusion matrix."""
    figures: int = 8
    """How many images are drawn."""
    report_images: int = 60
    """How many images report.html shows: half of them the worst, half the best."""
    boundary: bool = False
    """Also boundary AP, which compares the outlines of masks (Cheng et al. 2021). Slow on many
    images."""
    out: Path | None = None
    """The folder of the results; by default <workdir>/eval, eval_train for the training images,
    eval_on_<name> for --annotations <name>.json, with _best appended for --checkpoint best and
    _first<limit> for --limit. For the moving average _ema is appended."""
    distributed: DistributedConfig = DistributedConfig()

    def __post_init__(self) -> None:
        for name, value, least in (
            ("limit", self.limit, 1),
            ("eval-batch-size", self.eval_batch_size, 1),
            ("figures", self.figures, 0),
            ("report-images", self.report_images, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(f"--{name}: {value}: must be at least {least}")
        if self.split == "train" and self.annotations is not None:
            raise ConfigError("--split: of the run's own images: not with --annotations")
        if not 0 <= self.score <= 1:
            raise ConfigError(f"--score: {self.score}: must be in 0..1")

    @property
    def whole(self) -> bool:
        """Whether all of the run's own validation images are evaluated."""
        return self.split == "val" and self.annotations is None and self.limit is None

    @property
    def is_own(self) -> bool:
        """Whether this is the run's own evaluation: of its newest checkpoint, and `whole`."""
        return self.whole and self.checkpoint == "newest"

    @property
    def results(self) -> Path:
        """The folder of the results. Only those of the run's own evaluation are in eval/, which the
        model card quotes."""
        if self.out is not None:
            return self.out
        name = "eval" if self.split == "val" else "eval_train"
        if self.annotations is not None:
            name = f"eval_on_{self.annotations.stem}"
        if self.checkpoint == "best":
            name += "_best"
        return self.workdir / (name if self.limit is None else f"{name}_first{self.limit}")


def run(arguments: Arguments) -> dict[str, float]:
    """Evaluates a checkpoint, and the moving average of its weights if it holds one.

    Of several processes each calls this with the same arguments; the first one writes.

    Returns:
        The metrics of the weights themselves; {} in all processes but the first.

    Raises:
        ConfigError: no such checkpoint or data, or a category that the run was not trained on.
    """
    from mrcnn_jax import parallel
    from mrcnn_jax.data.caps import caps
    from mrcnn_jax.inference.evaluate import evaluate
    from mrcnn_jax.inference.out_of_memory import explaining_out_of_memory
    from mrcnn_jax.inference.predictor import Predictor
    from mrcnn_jax.runs.run import load_weights, make_folder, open_data

    parallel.join(arguments.distributed)
    workdir, annotations = arguments.workdir, arguments.annotations
    runs = {
        name: with_batch(run, arguments.eval_batch_size)
        for name, run in load_weights(workdir, arguments.checkpoint).items()
    }
    meta = runs["raw"].meta
    rows = read_rows(workdir, meta)
    split = open_data(runs["raw"], workdir, arguments.split, annotations, arguments.images)
    dataset = split.dataset
    if len(dataset.categories) < len(meta.categories):
        print(
            f"{dataset.annotations_path} has {len(dataset.categories)} of the run's "
            f"{len(meta.categories)} categories: detections of the others do not count"
        )
    print("\n".join(dataset.report.lines()))
    config = runs["raw"].config
    for cap in caps(dataset, config.data, config.model):
        if cap.field in ("model.rpn.proposals", "model.box_head.detections"):  # not of training
            print(cap.line())
    folders = {name: of_weights(arguments.results, name) for name in runs}

    def begin() -> None:
        for folder in folders.values():
            _refuse_other_results(folder, annotations)
        make_folder(*folders.values())
        if annotations is not None:
            for folder in folders.values():
                write_file(folder / DATA, os.fsencode(annotations.resolve()) + b"\n")

    parallel.in_turn(lambda: begin() if parallel.is_first() else None)
    predictor = Predictor(runs["raw"], parallel.data_mesh())
    metrics: dict[str, float] = {}
    for name, version in runs.items():
        incomplete = ""
        if not meta.stage_complete:
            again = cli.command("train", "--resume", workdir)
            incomplete = f" (its stage is not complete; to go on: {again})"
        print(f"{workdir}: checkpoint {version.title}{incomplete}")
        if (line := version.untrained_line) is not None:
            print(line)
        predictor.load(version.variables)
        with explaining_out_of_memory(config.data.eval_batch_size):
            found = evaluate(
                predictor,
                split,
                limit=arguments.limit,
                boundary=arguments.boundary,
                score=arguments.score,
            )
        if found is None:
            continue
        _write(found, version, predictor, split, folders[name], rows, arguments)
        metrics = metrics or found.metrics
    return metrics


def _write(
    found: Evaluation,
    run: Run,
    predictor: Predictor,
    split: Split,
    folder: Path,
    rows: list[Row],
    arguments: Arguments,
) -> None:
    """Prints the evaluation of one kind of weights, and writes its files, pictures and page."""
    from mrcnn_jax.evaluation import at_score, depth_errors
    from mrcnn_jax.evaluation.average_precision import limit_line, table

    found.save(folder, run.meta.name if arguments.whole else None)
    print(
        f"{len(found.ground_truth['images'])} images, "
        f"{len(found.ground_truth['annotations'])} annotations, {len(found.results)} detections"
        f"\n{table(found.metrics)}\n{limit_line(found.matches)}\n"
        f"{at_score.table(found.at_score, found.metrics)}"
    )
    if missing := at_score.missing_line(found.at_score):
        print(missing)
    if confusions := at_score.matrix(found.at_score):
        print(confusions)
    if depth := depth_errors.table(found.metrics):
        print(depth)
    # The run's own figures are those of its own evaluation.
    own = run.weights == "raw" and arguments.out is None and arguments.is_own
    figures = (arguments.workdir if own else folder) / "figures"
    pages = draw(found, run, split, figures, rows, arguments)
    if "depth/AbsRel" in found.metrics:
        pages += draw_depth(predictor, run, split, figures, arguments)
    write_report(found, run, split, folder / "report.html", rows, arguments)
    print(
        f"results: {folder / 'metrics.json'}, {folder / 'detections.json'}\n"
        f"pictures: {', '.join(map(str, pages))}\npage: {folder / 'report.html'}"
    )


def of_weights(folder: Path, weights: str) -> Path:
    """The folder of the results of the weights themselves, or beside it that of their average."""
    if weights == "raw":
        return folder
    whole = Path(os.path.abspath(folder))  # "." has no name
    return whole.with_name(f"{whole.name}_ema")


def _refuse_other_results(folder: Path, annotations: Path | None) -> None:
    """Raises ConfigError if a folder holds what would be lost: predictions, or the evaluation on
    another file, or on the run's own images where `annotations` are others."""
    if (folder / "images.json").exists():
        raise ConfigError(f"{folder}: holds predictions of images (choose another --out)")
    try:
        other = os.fsdecode((folder / DATA).read_bytes()).removesuffix("\n")
    except OSError:  # of the run's own images, or none yet
        if annotations is None or not (folder / "metrics.json").exists():
            return
        other = "the run's own images"
    if annotations is None or other != str(annotations.resolve()):
        raise ConfigError(f"{folder}: holds the evaluation on {other} (choose another --out)")


def draw(
    found: Evaluation,
    run: Run,
    split: Split,
    folder: Path,
    rows: list[Row],
    arguments: Arguments,
) -> list[Path]:
    """Pages with detections and proposals on images from all over the split, and the run's curves.

    Images without objects show little: they are drawn only if there are no others.
    """
    from mrcnn_jax.figures import views
    from mrcnn_jax.figures.comparison import detections_figure, proposals_figure
    from mrcnn_jax.figures.curves import curves
    from mrcnn_jax.figures.draw import spread

    images, indices = split.dataset.images, sorted(found.proposals)
    chosen = spread([i for i in indices if images[i].objects] or indices, arguments.figures)
    pixels = views.read_images(split, chosen, run.config.data)
    truth = views.annotations_of(split, chosen)
    results = [[r for r in found.results if r["image_id"] == images[i].id] for i in chosen]
    proposals = [found.proposals[i] for i in chosen]
    pages = detections_figure(pixels, truth, {"detections": results}, run.class_names, folder)
    pages += proposals_figure(pixels, {"RPN": proposals}, views.truth_boxes(split, chosen), folder)
    return pages + curves(rows, folder)


def draw_depth(
    predictor: Predictor, run: Run, split: Split, folder: Path, arguments: Arguments
) -> list[Path]:
    """Pages with predicted and true depth of images from all over the split that have it."""
    from mrcnn_jax.data.loader import depth_of
    from mrcnn_jax.figures import views
    from mrcnn_jax.figures.depth_maps import DepthExample, depth_figure
    from mrcnn_jax.figures.draw import spread
    from mrcnn_jax.inference.predictor import Predictor

    alone = predictor if predictor.mesh is None else Predictor(run)
    images, data = split.dataset.images, run.config.data
    known = [i for i, image in enumerate(images[: arguments.limit]) if image.depth_file]
    with_objects = [i for i in known if images[i].objects]
    chosen = spread(with_objects or known, -(-arguments.figures // 2))
    pictures, truths = views.read_images(split, chosen, data), views.annotations_of(split, chosen)
    examples = []
    for i, pixels, truth in zip(chosen, pictures, truths, strict=True):
        true = depth_of(split, i, data)
        found = alone.detections(pixels)
        assert true is not None
        assert found.depth_map is not None
        examples.append(
            DepthExample(
                images[i].file_name,
                pixels,
                true,
                found.depth_map,
                truth,
                found.to_coco(images[i].id),
            )
        )
    return depth_figure(examples, run.class_names, folder)


def write_report(
    found: Evaluation,
    run: Run,
    split: Split,
    path: Path,
    rows: list[Row],
    arguments: Arguments,
) -> None:
    """One page for a browser with the evaluation, the training curves and the config."""
    from mrcnn_jax.figures.page import render
    from mrcnn_jax.figures.page.contents import report_data
    from mrcnn_jax.figures.views import read_images

    index = {image.id: i for i, image in enumerate(split.dataset.images)}
    data = report_data(
        found.matches,
        found.metrics,
        found.at_score,
        lambda image_id: read_images(split, [index[image_id]], run.config.data)[0],
        heading={
            "run": str(arguments.workdir),
            "checkpoint": run.title,
            "data": str(split.dataset.annotations_path),
        },
        config=to_dict(run.config),
        rows=rows,
        images=arguments.report_images,
    )
    write_file(path, render(data))


def read_rows(workdir: Path, meta: Meta) -> list[Row]:
    """The run's metrics; [] of imported weights, which have none.

    Raises:
        ConfigError: they are damaged, or not those that a checkpoint knows.
    """
    from mrcnn_jax.runs.checkpoints import Checkpoints
    from mrcnn_jax.runs.logs import METRICS
    from mrcnn_jax.runs.metrics import read_metrics

    if not (workdir / METRICS).exists():
        return []
    Checkpoints(workdir, keep=1).refuse_damaged_log(meta, METRICS)
    return read_metrics(workdir)
