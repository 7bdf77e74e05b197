"""Goodput of a run that is injured three times: `python -m benchmarks.goodput`.

Trains the toy recipe of the tests on this machine. It is killed (`kill -9`), preempted (SIGTERM) and killed while it
writes a checkpoint, and the same command is run again each time. Prints, for each injury, what was lost and how long it
was until the run stood where it had stood, and then the run's own goodput table.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from navil_jax.config.ranges import Count, read_as
from navil_jax.console import markdown_table
from navil_jax.errors import UserError, report_user_errors
from navil_jax.train.goodput import goodput_table, read_attempts

ROOT = Path(__file__).parents[1]
EVERY = 50  # steps between two checkpoints
FLAGS = {"checkpoint_every": EVERY, "log_every": 10, "eval_every": 0, "writers": ""}
LIMIT_SECONDS = 1800.0  # for what is waited for


class Life:
    """The run's process from a start to its end."""

    def __init__(self, workdir: Path, steps: int) -> None:
        flags = [f"--config.{key}={value}" for key, value in (FLAGS | {"workdir": workdir, "steps": steps}).items()]
        command = [sys.executable, "-m", "navil_jax.train", "--config", ROOT / "tests" / "toy_recipe.py", *flags]
        self._workdir = workdir
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by `end`
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=self._log, stderr=subprocess.STDOUT
        )

    @property
    def step(self) -> int:
        """The newest step in its log."""
        log = self._workdir / "metrics.jsonl"
        found = re.findall(r'"step": (\d+)', log.read_text()[-2000:]) if log.exists() else []
        return int(found[-1]) if found else 0

    @property
    def writes(self) -> bool:
        """Whether a checkpoint is half written."""
        return any("tmp" in path.name for path in (self._workdir / "checkpoints").glob("*"))

    def until(self, step: int, saves: bool = False) -> float:
        """Waits for a step, and for a checkpoint to be half written if `saves`; gives `time.monotonic()`.

        Raises:
          UserError: the process ends before, or it takes too long.
        """
        until = time.monotonic() + LIMIT_SECONDS
        while self.step < step or (saves and not self.writes):
            if self._process.poll() is not None or time.monotonic() > until:
                self._process.kill()
                raise UserError(f"the run ended too early or stands still:\n{self.end()[1][-2000:]}")
            time.sleep(0.002)
        return time.monotonic()

    def hit(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Status and output, when it has ended."""
        status = self._process.wait()
        with self._log:
            self._log.seek(0)
            return status, self._log.read()


INJURIES = (  # what, signal, only while a checkpoint is written
    ("kill -9", signal.SIGKILL, False),
    ("SIGTERM", signal.SIGTERM, False),
    ("kill -9 while it saves", signal.SIGKILL, True),
)


def injured(workdir: Path, steps: int) -> list[dict[str, str]]:
    """Makes the run; gives a row for each injury."""
    rows = []
    life = Life(workdir, steps)
    for number, (name, hit, saves) in enumerate(INJURIES, 1):
        began = life.until(number * steps // (len(INJURIES) + 1), saves)
        life.hit(hit)
        life.end()
        ended, stood = time.monotonic(), life.step
        life = Life(workdir, steps)
        again = life.until(stood + 1)
        row = {"injury": name, "after step": str(stood), "until it had ended": f"{ended - began:.1f} s"}
        rows.append(row | {"from there to the next new step": f"{again - ended:.1f} s"})
    status, output = life.end()
    if status:
        raise UserError(f"the run ended with status {status}:\n{output[-2000:]}")
    for row, attempt in zip(rows, read_attempts(workdir)[1:], strict=True):
        row["goes on after step"] = str(attempt.first)
    return rows


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = f"of the run (default: 2000), at least {8 * EVERY}"
    parser.add_argument("--steps", type=read_as(Count), default=2000, help=text)
    options = parser.parse_args(argv)
    if options.steps < 8 * EVERY:
        raise UserError(f"--steps: {options.steps} has no room for three injuries; take at least {8 * EVERY}")
    with tempfile.TemporaryDirectory() as folder:
        rows = injured(Path(folder), options.steps)
        print(markdown_table(rows), goodput_table(read_attempts(folder)), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
