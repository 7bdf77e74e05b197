"""Watches a run in the terminal: `python -m navil_jax.train watch DIR`."""

import argparse
import math
import sys
import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from navil_jax.config.ranges import Positive, read_as
from navil_jax.console import is_terminal, render
from navil_jax.errors import Parser
from navil_jax.paths import given_path
from navil_jax.train.goodput import PARTS, duration, shares
from navil_jax.train.overview import STALE_MINUTES, Overview, Reader, age

ABOUT = """Shows a run that goes on, has ended or has died, from its workdir: loss, speed, time left, alarms.

  python -m navil_jax.train watch runs/demo
  python -m navil_jax.train watch gs://bucket/navil --once

On a terminal the view is renewed until Ctrl-C; elsewhere, and with --once, it is printed once. Nothing is written. A
bucket gets the logs with every checkpoint, so what is shown of it is as old as that.

Exit status: 0 good, 1 with --once if there is an alarm, 2 bad input (one line says what), 130 after Ctrl-C."""
BLOCKS = "▁▂▃▄▅▆▇█"
CURVE = 60  # characters of the loss curve


def watch(argv: Sequence[str]) -> int:
    """The command."""
    parser = Parser(prog="python -m navil_jax.train watch", description=ABOUT)
    parser.add_argument("folder", type=given_path, metavar="DIR", help="workdir of the run, local or gs://")
    parser.add_argument("--every", type=read_as(Positive), default=5.0, metavar="SECONDS", help="between two looks")
    text = "without a step for so long there is an alarm"
    parser.add_argument("--minutes", type=read_as(Positive), default=STALE_MINUTES, help=f"{text} (default: 10)")
    parser.add_argument("--once", action="store_true", help="print it and end")
    options = parser.parse_args(list(argv))
    reader = Reader(options.folder)
    if options.once or not is_terminal(sys.stdout):
        return _once(reader, options)
    with Live(view(reader.read(), time.time(), options.minutes), console=Console(), auto_refresh=False) as live:
        while True:
            time.sleep(options.every)
            live.update(view(reader.read(), time.time(), options.minutes), refresh=True)


def _once(reader: Reader, options: argparse.Namespace) -> int:
    run, now = reader.read(), time.time()
    print(render(view(run, now, options.minutes), None if sys.stdout.isatty() else 120))
    return int(bool(options.once and run.alarms(now, options.minutes)))


def view(run: Overview, now: float, minutes: float = STALE_MINUTES) -> RenderableType:
    """What is shown of a run."""
    grid = Table.grid(padding=(0, 2))
    for name, value in facts(run, now):
        grid.add_row(Text(name, "bold"), Text(value))
    alarms = [Text(f"ALARM  {text}", "bold red") for text in run.alarms(now, minutes)]
    title = Text(f"{run.folder}: {state(run, now, minutes)}")
    return Panel(Group(grid, *alarms), title=title, title_align="left")


def state(run: Overview, now: float, minutes: float) -> str:
    """What the run does, in words."""
    if run.finished:
        return "has its length"
    if run.lives is False:
        return "ended before its length"
    if run.seen is None:
        return "no step yet"
    return "running" if run.lives or now - run.seen <= 60 * minutes else "silent"


def facts(run: Overview, now: float, drawn: bool = False) -> list[tuple[str, str]]:
    """Name and value of what is known; `drawn`: without what a page draws, the loss's curve and evaluations."""
    losses = [loss for _, loss in run.losses()]
    seen = f", last sign {age(now - run.seen)}" if run.seen is not None else ""
    found = [("step", f"{run.step:,} of {f'{run.steps:,}' if run.steps else 'an unknown number'}{seen}")]
    if losses:
        found.append(("loss", f"{losses[-1]:.4f}" + ("" if drawn else f"  {curve(losses)}")))
    for name, value in () if drawn else sorted(_evaluations(run).items()):
        found.append((name, f"{value:.4f}"))
    speed = run.last("tokens_per_second")
    if speed is not None:
        mfu, memory = run.last("mfu"), run.last("peak_memory_gib")
        more = f", MFU {mfu:.1%}" if mfu else ""
        more += f", peak memory {memory:.1f} GiB" if memory else ""
        found.append(("speed", f"{speed:,.0f} tokens/s, {run.last('seconds_per_step'):.3g} s a step{more}"))
        found.append(("data wait", f"{run.last('data_wait'):.1%}"))
    if run.eta is not None and not run.finished:
        found.append(("time left", duration(run.eta)))
    for source, counts in run.samples().items():
        found.append((f"samples of {source}", ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items()))))
    if run.checkpoints:
        cost = run.last("checkpoint/blocked_seconds")
        more = f", steps waited {cost:.2f} s for the last save" if cost is not None else ""
        found.append(("checkpoints", f"{', '.join(map(str, run.checkpoints[-5:]))}{more}"))
    else:
        found.append(("checkpoints", "none"))
    if run.attempts:
        of_whole = shares(run.attempts)
        worst = sorted(((share, part) for part, share in of_whole.items() if part != "productive"), reverse=True)
        rest = ", ".join(f"{PARTS[part]} {share:.0%}" for share, part in worst[:2] if share >= 0.005)
        found.append(("goodput", f"{of_whole['productive']:.1%}, {len(run.attempts) - 1} restarts; {rest}"))
    if run.about:
        where = f"{run.about['devices']} {run.about['device_kind']} of {run.about['processes']} processes"
        found.append(("devices", where))
    found += [("note", note) for note in run.notes]
    return found


def _evaluations(run: Overview) -> dict[str, float]:
    newest: dict[str, float] = {}
    for line in run.metrics:
        newest |= {name: value for name, value in line.items() if name.startswith("eval/")}
    return newest


def curve(values: Sequence[float], width: int = CURVE) -> str:
    """Means of equal stretches of the values as blocks, the highest is full; values that are not finite are left out.

    Example: [4, 2, 1] -> "█▃▁"
    """
    values = [value for value in values if math.isfinite(value)]
    count = min(width, len(values))
    means = []
    for number in range(count):
        stretch = values[number * len(values) // count : (number + 1) * len(values) // count]
        means.append(sum(stretch) / len(stretch))
    low, high = min(means, default=0.0), max(means, default=0.0)
    return "".join(BLOCKS[round((mean - low) / ((high - low) or 1) * (len(BLOCKS) - 1))] for mean in means)
