"""Mix: what a run draws from each source: epochs, tokens of each kind, what repeats and what is never seen."""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from navil_jax.config import Config
from navil_jax.config.ranges import Count, read_as
from navil_jax.console import say, table, waiting
from navil_jax.data.inspect.checkup import SIZES, Checkup
from navil_jax.data.inspect.summary import PACKED, drawn_by, usable
from navil_jax.data.inspect.token_map import row_budgets
from navil_jax.data.mixture import Epoch
from navil_jax.data.run import OpenRun
from navil_jax.data.sources import for_source
from navil_jax.errors import UserError

ABOUT = """Shows what a run draws from each source: epochs, tokens of each kind, what repeats and what is never seen.

  python -m navil_jax.data mix --config configs/demo.py
  python -m navil_jax.data mix --config configs/demo.py --samples 1000 --json

How often a source is drawn is counted in the order of the run itself (weights, weight_points, temperature, repeat).
Where weights change by weight_points, a second table has the shares between one change and the next.
Tokens are measured on some samples of each source, evenly spread, and multiplied. A run has steps x batch_samples
samples; where batch_samples is 0, a step is taken to have as many as fill its rows, as measured.

Exit status: 0 good, 2 bad input (one line says what)."""
KINDS = ("visual_tokens", "text_tokens", "learnt_tokens", "patches")
COLUMNS = (
    "source",
    "samples",
    "drawn",
    "share",
    "epochs",
    "visual tokens",
    "text tokens",
    "trained tokens",
    "never seen",
)


@dataclasses.dataclass(frozen=True)
class Share:
    """What a run draws from one source.

    Attributes:
      samples: that it has.
      drawn: how often the run draws one.
      epochs: drawn / samples.
      never_seen: samples that the run does not reach, on average where the last epoch is cut off.
      read, usable: samples that were looked at to count tokens, and those of them that a run can use.
      tokens: of the samples drawn that can be used, by `KINDS`, as those that were looked at have them on average.
    """

    name: str
    samples: int
    drawn: int
    epochs: float
    never_seen: int
    read: int
    usable: int
    tokens: dict[str, int]


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--samples", type=read_as(Count), default=200, metavar="N", help="of each source that are read (default: 200)")
    add("--json", action="store_true", help="prints one JSON object")


def run(opened: OpenRun, options: argparse.Namespace) -> int:
    """Prints the shares of the sources."""
    config = opened.config
    with waiting(f"reading up to {options.samples:,} samples of each source"):
        tables = [_measured(opened, number, options.samples) for number in range(len(opened.sources))]
    samples = config.steps * (config.batch_samples or _samples_of_step(config, opened, tables))
    found = shares(config, [len(source) for source in opened.sources], tables, samples)
    stretches = schedule(config, [len(source) for source in opened.sources])
    if options.json:
        print(json.dumps(_values(config, found, stretches), indent=2))
        return 0
    say(table(COLUMNS, [_row(share, samples) for share in found]))
    if stretches:
        say(f"\n{_schedule_table(config, stretches)}\n")
    about = "" if config.batch_samples else "about "
    say(f"{config.steps:,} steps, {about}{samples:,} samples")
    say("\n".join(_notes(config, found)))
    return 0


def shares(config: Config, sizes: Sequence[int], tables: Sequence[np.ndarray], samples: int) -> list[Share]:
    """What each source, of these sizes, gives to a run of so many samples.

    Args:
      tables: [n] `checkup.NOTE` of some samples of each source.
    """
    found, drawn = [], drawn_by(config, sizes, samples).tolist()
    for entry, size, times, notes in zip(config.data.sources, sizes, drawn, tables, strict=True):
        good = notes[usable(notes)]
        used, budgets = times * len(good) / max(1, len(notes)), row_budgets(config)  # larger images get smaller
        means = {k: np.minimum(good[k], budgets.get(k, math.inf)).mean() if len(good) else 0.0 for k in KINDS}
        tokens = {kind: round(used * float(mean)) for kind, mean in means.items()}
        unseen = _never_seen(size, entry.repeat, times)
        found.append(Share(entry.name, size, times, times / size, unseen, len(notes), len(good), tokens))
    return found


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Steps of a run in which weights stay as they are.

    Attributes:
      step: the first of them.
      drawn: samples from each source.
    """

    step: int
    drawn: tuple[int, ...]

    @property
    def samples(self) -> int:
        return sum(self.drawn)


def schedule(config: Config, sizes: Sequence[int]) -> list[Stretch]:
    """The stretches of a run by `weight_points`, with what is drawn in each; none where weights never change.

    Args:
      sizes: samples of each source.
    """
    points = {point.step for entry in config.data.sources for point in entry.weight_points}
    starts = [0, *sorted(step for step in points if 0 < step < config.steps)]
    if len(starts) == 1:
        return []
    later = [drawn_by(config, sizes, step * config.batch_samples) for step in (*starts[1:], config.steps)]
    before = [np.zeros(len(sizes), np.int64), *later]
    return [Stretch(step, tuple(drawn.tolist())) for step, drawn in zip(starts, np.diff(before, axis=0), strict=True)]


def _schedule_table(config: Config, stretches: Sequence[Stretch]) -> str:
    """Shares of the sources, a column for each stretch."""
    ends = [*(stretch.step for stretch in stretches[1:]), config.steps]
    head = ("share", *(f"steps {s.step:,} to {end - 1:,}" for s, end in zip(stretches, ends, strict=True)))
    rows = [
        (entry.name, *(f"{stretch.drawn[number] / stretch.samples:.1%}" for stretch in stretches))
        for number, entry in enumerate(config.data.sources)
    ]
    return table(head, [*rows, ("samples drawn", *(f"{stretch.samples:,}" for stretch in stretches))])


def _never_seen(size: int, repeat: float, drawn: int) -> int:
    """Samples of a source that are not among the first so many of its stream; an average in a cut-off epoch."""
    epoch = len(Epoch(size, repeat))
    more, less = epoch % size, epoch // size  # so many samples stand less + 1 times in an epoch, the others less times

    def unseen(times: int) -> float:
        """The share of what stands so many times in an epoch that is not drawn."""
        return math.prod(max(0, epoch - drawn - place) / max(1, epoch - place) for place in range(times))

    return round(more * unseen(less + 1) + (size - more) * unseen(less))


def _measured(opened: OpenRun, number: int, samples: int) -> np.ndarray:
    config, source = opened.config, opened.sources[number]
    name = config.data.sources[number].name
    checkup = Checkup(source, name, for_source(config, number), opened.tokenizer, row_budgets(config))
    places = np.linspace(0, len(source) - 1, min(samples, len(source))).round().astype(int)
    return checkup(places.tolist()).table


def _samples_of_step(config: Config, opened: OpenRun, tables: Sequence[np.ndarray]) -> int:
    """As many as fill the rows of a step, by the mean sizes of what is drawn."""
    weights = drawn_by(config, [len(source) for source in opened.sources], 0)
    goods = [notes[usable(notes)] for notes in tables]
    means = np.array([[good[kind].mean() if len(good) else 0 for kind in SIZES] for good in goods])
    mean = (means * (weights / weights.sum())[:, None]).sum(axis=0)
    budgets = np.array([config.data.visual_slots, config.data.text_slots, config.data.patch_slots])
    fullest = float((mean / budgets).max())
    if not fullest:
        raise UserError("config.data.sources: none of the samples that were read can be used; the doctor says why")
    return max(1, round(config.data.rows * PACKED / fullest))


def _row(share: Share, samples: int) -> tuple[str, ...]:
    tokens = (f"{share.tokens[kind]:,}" for kind in KINDS[:3])
    return (
        share.name,
        f"{share.samples:,}",
        f"{share.drawn:,}",
        f"{share.drawn / samples:.1%}",
        f"{share.epochs:.3g}",
        *tokens,
        f"{share.never_seen:,}",
    )


def _notes(config: Config, found: Sequence[Share]) -> list[str]:
    visual, text = (sum(share.tokens[kind] for share in found) for kind in KINDS[:2])
    read = sum(share.read for share in found)
    lines = [
        f"{visual / max(1, visual + text):.1%} of {visual + text:,} tokens are visual (measured on {read:,} samples)"
    ]
    lines += [f"{s.name}: each sample is drawn {s.epochs:.3g} times" for s in found if s.epochs > 1]
    lines += [f"{s.name}: {s.never_seen:,} of {s.samples:,} samples are never seen" for s in found if s.never_seen]
    lines += [
        f"{s.name}: {s.read - s.usable:,} of {s.read:,} samples read cannot be used" for s in found if s.usable < s.read
    ]
    for entry in config.data.sources:
        if entry.weight_points:
            points = ", ".join(f"{point.weight:g} from step {point.step:,}" for point in entry.weight_points)
            lines.append(f"{entry.name}: weight {entry.weight:g}, {points}")
    return lines


def _values(config: Config, found: Sequence[Share], stretches: Sequence[Stretch]) -> dict[str, Any]:
    return {
        "steps": config.steps,
        "samples": sum(share.drawn for share in found),
        "samples_are_estimated": not config.batch_samples,
        "sources": [dataclasses.asdict(share) for share in found],
        "tokens": {kind: sum(share.tokens[kind] for share in found) for kind in KINDS},
        "schedule": [dataclasses.asdict(stretch) for stretch in stretches],
    }
