"""Train and evaluate every variant of a recipe, and put them into one table.

    mrcnn experiments --workdir runs/report [--recipe report_cpu] [--only roi_op ...] [--seeds N]

Each variant changes one thing in the recipe. The job can be stopped anywhere; the same command
resumes it. Each stage of each variant is a run in WORKDIR/seed<n>/<variant>/<stage>, started from
the parameters of the stage before it (as by --init-from); a stage that variants have in common is
trained once. The last run of each variant is evaluated. WORKDIR/table.md and table.json hold all
variants that are done.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mrcnn_jax import cli
from mrcnn_jax.commands.variants import BASELINE, EXPERIMENTS, load_recipe, plan
from mrcnn_jax.config.errors import ConfigError


@dataclass(frozen=True)
class Arguments:
    workdir: Path
    """The job's folder."""
    recipe: str | None = None
    """A config file, or the name of one in configs/; by default report_cpu on a CPU, and coco300,
    the report's own, elsewhere."""
    only: tuple[str, ...] = ()
    """Only these experiments (and the baseline): backbone, roi_op, mask_loss, anchor_ratios,
    mask_activation, training, box_loss, boxes, mask_classes, mask_scoring; baseline: it alone."""
    seeds: int | None = None
    """How many seeds, from the recipe's own on; by default 1 on a CPU and 3 elsewhere."""
    data_root: str | None = None
    """The data set's folder, where it is not that of the recipe."""

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in EXPERIMENTS:
                raise ConfigError(f"--only: {name}: no such experiment ({', '.join(EXPERIMENTS)})")
        if self.seeds is not None and self.seeds < 1:
            raise ConfigError(f"--seeds: {self.seeds}: must be at least 1")

    def command(self, experiment: str) -> str:
        """The command that trains one experiment of this job."""
        words: list[object] = ["--workdir", self.workdir]
        for name in ("recipe", "seeds", "data_root"):
            if (value := getattr(self, name)) is not None:
                words += [f"--{name.replace('_', '-')}", value]
        return cli.command("experiments", *words, "--only", experiment)


def run(arguments: Arguments) -> None:
    """Does what is not done of the job, until it is done or stopped by a signal."""
    stop_when_asked(arguments.workdir)
    try:
        work(arguments)
    except cli.Stopped as stopped:
        line = f"{stopped} (the same command resumes)"
        raise cli.Stopped(line, stopped.number) from None


def work(arguments: Arguments) -> None:
    """Does what is not done of the job, and writes its table.

    Raises:
        ConfigError: a user's mistake.
        Stopped, Failure: as of `training.loop.train`; the same arguments resume the job.
    """
    import jax

    from mrcnn_jax.commands.experiment_job import Job, Piece
    from mrcnn_jax.commands.experiment_table import write_table
    from mrcnn_jax.runs.run import make_folder

    on_cpu = jax.default_backend() == "cpu"
    recipe = load_recipe(
        arguments.recipe or ("report_cpu" if on_cpu else "coco300"), arguments.data_root
    )
    make_folder(arguments.workdir)
    by_seed = plan(recipe, arguments.workdir, seeds=arguments.seeds or (1 if on_cpu else 3))
    all_chains = [chain for chains in by_seed for chain in chains]
    job = Job(all_chains)
    wanted = (BASELINE.experiment, *(arguments.only or EXPERIMENTS))
    pieces: dict[Piece, None] = {}
    for chain in all_chains:
        if chain.variant.experiment in wanted:
            pieces |= dict.fromkeys(map(Piece, chain.runs))
            pieces[Piece(chain.runs[-1], evaluation=True)] = None
    print(f"{len(pieces)} pieces of work, {sum(map(job.done, pieces))} of them done")
    for number, piece in enumerate(pieces, start=1):
        if job.done(piece):
            continue
        seconds = job.seconds_left([piece for piece in pieces if not job.done(piece)])
        left = "" if seconds is None else f"; about {seconds / 60:.0f} min left in all"
        print(f"\n[{number} of {len(pieces)}] {piece}{left}", flush=True)
        job.work(piece)
    write_table(recipe, by_seed, job, arguments.workdir, arguments.command)


def stop_when_asked(workdir: Path) -> None:
    """From now on SIGTERM and the first Ctrl-C raise Stopped; in the background of a script, where
    Ctrl-C is ignored, it stays so.

    Training, which saves its state first, handles both itself.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        name = signal.Signals(number).name
        raise cli.Stopped(f"stopped by {name}: what is done is kept in {workdir}", number)

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, stop)
