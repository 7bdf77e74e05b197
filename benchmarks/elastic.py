"""A run that is taken away and goes on elsewhere, beside one that is not: `python -m benchmarks.elastic`.

Trains the toy recipe of the tests as 4 processes of this machine, then 2, 8 and 1, with a mesh of another shape each
time: one of the four gets SIGTERM (a preemption), one of the two is killed (a host is lost), one of the eight gets
SIGTERM. Another run, of one process, is left alone. Prints a table of the five and how far the two runs agree.
"""

import argparse
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from navil_jax.config.ranges import Count, read_as
from navil_jax.console import markdown_table
from navil_jax.errors import UserError, report_user_errors

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "tests" / "toy_recipe.py"
TRAIN = Path(__file__).with_name("elastic_train.py")
QUICK = "--xla_backend_optimization_level=0"  # programs this small compile longer than they run
LIMIT_SECONDS = 900.0  # of one life
Rows = list[list[list[int]]]  # of a global batch: (source, sample) of each segment of each row


@dataclasses.dataclass(frozen=True)
class Leg:
    """One life of the run's processes; `signal` hits the last one before its step `hit_after` in this life."""

    processes: int
    mesh: str
    signal: int = 0
    ended: str = "has its length"


LEGS = (
    Leg(4, "fsdp=4", signal.SIGTERM, "SIGTERM to one"),
    Leg(2, "data=2,fsdp=1", signal.SIGKILL, "kill -9 of one"),
    Leg(8, "data=2,fsdp=4", signal.SIGTERM, "SIGTERM to one"),
    Leg(1, "fsdp=1"),
)
FLAGS = {
    "data.rows": 8,
    "data.streams": 8,
    "checkpoint_every": 4,
    "eval_every": 0,
    "model.remat": "none",
    "optimizer.peak_learning_rate": 1e-3,
    "writers": "",
}


def train(workdir: Path, processes: int, devices: int, given: Sequence[str], hit: str = "") -> tuple[int, str]:
    """Status and output of a run on processes of this machine; each notes its rows in `<workdir>/rows/<life>`.

    Args:
      hit: "PROCESS SIGNAL STEP", as `elastic_train.py` takes it.
    """
    rows = workdir / "rows" / str(len(list((workdir / "rows").glob("*"))))
    rows.mkdir(parents=True)
    command = [sys.executable, str(ROOT / "launch" / "local.py"), f"--processes={processes}", f"--devices={devices}"]
    command += ["--", sys.executable, str(TRAIN), str(rows), hit, *given]
    environment = {"XLA_FLAGS": QUICK} | os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    return done.returncode, done.stdout + done.stderr


def rows_by_step(workdir: Path) -> dict[int, Rows]:
    """Step -> the rows of its global batch, each a list of samples.

    Raises:
      UserError: a step that was taken again has other rows.
    """
    found: dict[int, Rows] = {}
    for life in (workdir / "rows").iterdir():
        notes = [list(map(json.loads, path.read_text().splitlines())) for path in sorted(life.iterdir())]
        for lines in zip(*notes, strict=False):  # one that was killed has noted less
            (step,) = {line["step"] for line in lines}
            rows = [row for line in lines for row in line["rows"]]
            if found.setdefault(step, rows) != rows:
                raise UserError(f"{workdir}: step {step} was taken twice, with other rows")
    return dict(sorted(found.items()))


def losses(workdir: Path) -> list[float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def live(workdir: Path, leg: Leg, hit_at: int, given: Sequence[str]) -> dict[str, str]:
    """A life of the run, as a row of the table."""
    flags = [*given, *(f"--config.mesh.{axis}" for axis in leg.mesh.split(","))]
    hit = f"{leg.processes - 1} {int(leg.signal)} {hit_at}" if leg.signal else ""
    began = time.monotonic()
    status, output = train(workdir, leg.processes, 1, [f"--config.workdir={workdir}", *flags], hit)
    if status != (128 + leg.signal if leg.signal else 0):
        raise UserError(f"{leg.processes} processes ended with status {status}:\n{output[-2000:]}")
    first = re.search(r"going on after step (\d+)", output)
    last = max(rows_by_step(workdir))
    print(f"{leg.processes} processes: to step {last}", file=sys.stderr, flush=True)
    return {
        "processes": str(leg.processes),
        "mesh": leg.mesh,
        "goes on after step": first[1] if first else "0",
        "last step": str(last),
        "ended": leg.ended,
        "seconds": f"{time.monotonic() - began:.0f}",
    }


def compared(disturbed: Path, undisturbed: Path) -> list[str]:
    """What two runs have in common."""
    rows, expected = rows_by_step(disturbed), rows_by_step(undisturbed)
    of_rows = "equal" if rows == expected else "DIFFERENT"
    counts = Counter(tuple(sample) for step in rows.values() for row in step for sample in row)
    ours, theirs = losses(disturbed), losses(undisturbed)
    if len(ours) != len(theirs):
        raise UserError(f"losses of {len(ours)} and {len(theirs)} steps")
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    return [
        f"steps: {len(rows)} and {len(expected)}, each with a loss: {len(ours)} and {len(theirs)}",
        f"rows and sample ids of every step: {of_rows} ({sum(counts.values()):,} samples in them)",
        f"largest difference of a loss: {worst:.1e} of it; the last ones are {ours[-1]:.6f} and {theirs[-1]:.6f}",
    ]


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "between two of the four (default: 10); must be more than a checkpoint's 4"
    parser.add_argument("--steps", type=read_as(Count), default=10, help=text)
    options = parser.parse_args(argv)
    steps = len(LEGS) * options.steps
    changes = FLAGS | {"steps": steps}
    given = ["--config", str(RECIPE), *(f"--config.{key}={value}" for key, value in changes.items())]
    with tempfile.TemporaryDirectory() as folder:
        disturbed, undisturbed = (Path(folder) / name for name in ("disturbed", "undisturbed"))
        rows = [live(disturbed, leg, (number + 1) * options.steps, given) for number, leg in enumerate(LEGS)]
        rows.append(live(undisturbed, Leg(1, "fsdp=1"), 0, given))
        print(markdown_table(rows), *compared(disturbed, undisturbed), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
