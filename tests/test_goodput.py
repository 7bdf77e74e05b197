"""Goodput: every second of a run's wall time is in one part of it, steps that are taken again count as lost."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quick_xla import QUICK

from navil_jax.train import goodput
from navil_jax.train.goodput import PARTS, PHASES, Attempt, Goodput, divide, goodput_table, read_attempts
from navil_jax.train.metrics import read_log

RECIPE, KILL = (Path(__file__).parent / name for name in ("toy_recipe.py", "kill_at_step.py"))


def attempt(began: float, first: int, last: int, **seconds: float) -> Attempt:
    return Attempt(began, first, last, dict.fromkeys(PHASES, 0.0) | seconds)


def test_steps_that_a_later_attempt_takes_again_are_lost() -> None:
    first = attempt(1000, 0, 10, start=5, steps=20, data_wait=2, checkpoint=1)
    second = attempt(1038, 6, 8, start=4, steps=4, evaluation=3)
    assert divide([first]) == dict.fromkeys(PARTS, 0) | {"productive": 20, "start": 5, "data_wait": 2, "checkpoint": 1}
    spent = divide([first, second])
    assert spent["productive"] == 12 + 4
    assert spent["lost"] == 8
    assert (spent["start"], spent["restart"], spent["down"]) == (5, 4, 10)
    third = attempt(1060, 0, 12, start=1, steps=12)  # begins anew: all before is lost
    spent = divide([first, second, third])
    assert (spent["productive"], spent["lost"], spent["down"]) == (12, 24, 10 + 11)
    assert sum(spent.values()) == 1060 + 13 - 1000


def test_a_damaged_line_is_left_out(tmp_path: Path) -> None:
    whole = '{"began": 1.0, "first": 0, "last": 2, "seconds": {"steps": 3.0}}'
    broken = ("\0", "[1]", '{"began": 1}', whole.replace("2", '"x"'), whole.replace("3.0", "null"), whole[:30])
    (tmp_path / goodput.FILE).write_text("\n".join((*broken[:3], whole, *broken[3:])))
    assert read_attempts(tmp_path) == [Attempt(1.0, 0, 2, {"steps": 3.0})]


def test_a_clock_that_is_set_back_makes_no_negative_time() -> None:
    assert divide([attempt(5000, 0, 4, steps=4), attempt(1400, 4, 6, steps=2)])["down"] == 0


@given(
    lives=st.lists(
        st.tuples(st.integers(0, 50), st.integers(1, 50), st.floats(0, 1e4), st.floats(0, 1e4), st.floats(0, 1e4)),
        min_size=1,
        max_size=6,
    )
)
def test_the_parts_are_the_wall_time(lives: list[tuple[int, int, float, float, float]]) -> None:
    attempts, clock, at = [], 100.0, 0
    for back, steps, started, stepped, gap in lives:
        at = max(0, at - back)
        attempts.append(attempt(clock, at, at + steps, start=started, steps=stepped))
        clock += started + stepped + gap
        at += steps
    spent = divide(attempts)
    assert min(spent.values()) >= 0
    assert sum(spent.values()) == pytest.approx(clock - lives[-1][-1] - 100, abs=1e-6)


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 50.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + 1e9


def test_phases_are_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(goodput, "time", clock)
    run = Goodput(tmp_path, 3, 40.0)
    with run.phase("data_wait"):
        clock.now += 2
    run.write()
    assert not (tmp_path / goodput.FILE).exists()  # no step was taken
    run.taken(4)  # 12 s of start-up
    clock.now += 10
    with run.phase("data_wait"):
        clock.now += 3
    with run.phase("checkpoint"):
        clock.now += 1
    run.compiled(4)
    run.taken(5)
    shares = run.write()
    assert shares["productive"] == pytest.approx(6 / 26)
    (kept,) = read_attempts(tmp_path)
    assert kept == attempt(1e9 + 40, 3, 5, start=16, steps=6, data_wait=3, checkpoint=1)
    again = Goodput(tmp_path, 4, clock.now)
    again.taken(6)
    again.write()
    assert [(life.first, life.last) for life in read_attempts(tmp_path)] == [(3, 5), (4, 6)]
    assert Goodput(None, 0, clock.now).write() == dict.fromkeys(PARTS, 0.0)


def test_the_table_says_what_is_what() -> None:
    text = goodput_table([attempt(0, 0, 10, start=100, steps=200), attempt(400, 5, 10, start=50, steps=50)])
    lines = dict(re.findall(r"^ *\S.*? +([\d.]+%) +(.*)$", text, re.MULTILINE)[i][::-1] for i in range(9))
    assert lines["steps that count"] == "30.0%"
    assert lines["steps taken again after a restart"] == "20.0%"
    assert lines["between two attempts, or failing to start"] == "20.0%"
    assert lines["wall time, with 1 restart"] == "100.0%"
    assert "0:08:20" in text


@pytest.mark.slow
def test_a_run_that_is_killed_and_goes_on_knows_its_goodput(tmp_path: Path) -> None:
    flags = ["--config", str(RECIPE), f"--config.workdir={tmp_path}", "--config.log_every=1"]
    flags += ["--config.steps=8", "--config.checkpoint_every=2"]

    def run(fatal: int) -> tuple[int, str]:
        command = [sys.executable, str(KILL), str(fatal), *flags]
        settings = os.environ | {"XLA_FLAGS": QUICK, "PYTHONPATH": str(RECIPE.parents[1])}
        done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    assert run(8)[0] == -signal.SIGKILL
    (first,) = read_attempts(tmp_path)
    assert (first.first, first.last) == (0, 7)
    status, output = run(0)
    assert status == 0, output
    (resumed,) = map(int, re.findall(r"going on after step ([46]) of", output))  # evaluations leave time to write these
    attempts = read_attempts(tmp_path)
    assert [(life.first, life.last) for life in attempts] == [(0, 7), (resumed, 8)]
    spent = divide(attempts)
    assert spent["lost"] == pytest.approx(first.seconds["steps"] * (7 - resumed) / 7)
    assert all(spent[part] > 0 for part in PARTS)
    assert "wall time, with 1 restart" in output
    shares = [line for line in read_log(tmp_path / "timings.jsonl") if "goodput/productive" in line]
    assert [line["step"] for line in shares][-1] == 8
    assert shares[-1]["goodput/lost"] > 0 == shares[0]["goodput/lost"]
    assert len((tmp_path / goodput.FILE).read_text()) < 1000
