"""`--minutes`: the length of a training that ends in a given time, from the speed of its parts."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import jax

from mrcnn_jax.choices.choose import VALIDATION, WARMUP
from mrcnn_jax.choices.speed import Speed
from mrcnn_jax.choices.table import Chosen, Row
from mrcnn_jax.config.errors import ConfigError, require
from mrcnn_jax.config.schema import Config

# Of the time, and seconds at least: starting Python, curves, and steps slower than the first ones.
RESERVE, LEAST_RESERVE = 0.05, 5.0
FEWEST = 20  # steps
MOST = 4  # times the steps that are chosen without a limit
CHECKING = 0.05  # of a training, at most: validation before its end
LATE = 1.1  # times the minutes asked


def refuse_several_processes() -> None:
    """Raises ConfigError if this is one process of several, each of which would measure."""
    count = jax.process_count()
    require(
        count == 1,
        f"--minutes: measures in a single process, and this run has {count}: give "
        "--stages.0.epochs instead",
    )


def late(minutes: float, seconds: float) -> str | None:
    """A line for users if a training took over a tenth longer than asked."""
    if seconds <= LATE * 60 * minutes:
        return None
    return f"--minutes {minutes:g}: it took {seconds / 60:.1f} minutes"


@dataclass(frozen=True)
class Fit:
    """A training that ends in the time given."""

    config: Config
    why: str
    """Of its epochs."""
    spent: str
    """What the time goes to, in a line."""

    def table(self, chosen: Chosen, given: Collection[str]) -> list[str]:
        """The choices in lines, as of `Chosen.table`, of which this gives the epochs a reason."""

        def fitting(row: Row) -> Row:
            if "--minutes" in row.options:
                return replace(row, why=self.why, options=("--minutes",))
            if row.what == VALIDATION:
                return replace(row, why=f"of losses; {CHECKING:.0%} of the time at most")
            return row

        rows = tuple(map(fitting, chosen.rows))
        others = [option for option in given if option != "--minutes"]
        return replace(chosen, rows=rows).table(self.config, others)


def fitted(
    config: Config,
    speed: Speed,
    *,
    minutes: float,
    used: float,
    steps_per_epoch: int,
    given: Collection[str] = (),
) -> Fit:
    """Fits the epochs of a config with one stage into a time, and what follows from them.

    Args:
        config: with the epochs that are chosen without a limit.
        speed: of its parts.
        minutes: all that there is, with what was used before.
        used: seconds.
        steps_per_epoch: of the run.
        given: dotted names of the fields that stay as they are.

    Raises:
        ConfigError: under `FEWEST` steps fit; says how many minutes would do.
    """
    (stage,) = config.stages
    most = MOST * max(1, round(stage.epochs * steps_per_epoch))
    # The end of a stage, and of an epoch that is evaluated, is saved before validation and after;
    # that of another one before, if it took long.
    ending = speed.validation + speed.evaluation + 2 * speed.saving
    checking = "validation, evaluation" if speed.evaluation else "validation"
    fixed = used + speed.compiling + speed.loading + ending
    reserve = max(RESERVE * 60 * minutes, LEAST_RESERVE)
    left = 60 * minutes - reserve - fixed
    epochs = max(min(left / speed.step, most), FEWEST) / steps_per_epoch  # at most
    every = config.validate_every_epochs
    if "validate_every_epochs" not in given:
        cheap = speed.validation / (CHECKING * speed.step * steps_per_epoch)
        every = math.ceil(min(max(epochs / 10, cheap), epochs))
    between = sum(
        seconds / epochs_between
        for seconds, epochs_between in (
            (speed.validation + speed.saving, every),
            (
                speed.evaluation + 2 * speed.saving,
                config.evaluate_every_epochs * config.evaluates(stage),
            ),
        )
        if 0 < epochs_between < epochs
    )
    each = speed.step + (speed.loading + between) / steps_per_epoch
    each += speed.saving / config.save_every_steps
    fit = math.floor(left / each)
    if fit < FEWEST:
        needed = fixed + FEWEST * each
        needed = max(needed / (1 - RESERVE), needed + LEAST_RESERVE)
        raise ConfigError(
            f"--minutes {minutes:g}: too short: {FEWEST} steps of {each:.3g} s and {fixed:.0f} s "
            f"for all else ({ending:.0f} s of them for {checking} and saving at the end) need "
            f"--minutes {math.ceil(LATE * needed / 60)}"
        )
    steps = min(fit, most)
    optimizer = stage.optimizer
    if "stages.0.optimizer.warmup_steps" not in given:
        updates = math.ceil(steps / optimizer.accumulate_steps)
        optimizer = replace(optimizer, warmup_steps=min(WARMUP, updates // 10))
    stage = replace(stage, epochs=round(steps / steps_per_epoch, 6), optimizer=optimizer)
    why = f"{minutes:g} minute{'s' * (minutes != 1)}: {fit} steps fit, {speed.step:.3g} s each"
    if fit > most:
        why += f"; at most {MOST} times the usual {most // MOST}"
    compiling = ""
    if round(speed.compiling):
        compiling = f", {speed.compiling:.0f} s are for compiling evaluation"
    spent = (
        f"--minutes {minutes:g}: {speed.step:.3g} s a step, {steps} steps; {used:.0f} s were used"
        f"{compiling}, {ending:.0f} s are for {checking} and saving at the end, {reserve:.0f} s "
        "stay in reserve"
    )
    usual = most // MOST
    if steps < usual:
        spent += f"; the {usual} steps that are usual need about --minutes "
        spent += f"{math.ceil((fixed + usual * each) / (1 - RESERVE) / 60)}"
    return Fit(replace(config, stages=(stage,), validate_every_epochs=every), why, spent)
