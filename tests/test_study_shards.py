"""Shards of a study in one folder: each run once, what they share once, whoever comes first and whatever dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from navil_jax.study.__main__ import main
from navil_jax.study.results import read_results

ROOT = Path(__file__).parents[1]
STUDY = f"""
import dataclasses, runpy
from navil_jax.study.grid import grid

def get_study():
    study = runpy.run_path({str(ROOT / "configs" / "study" / "tiny.py")!r})["get_study"]()
    return dataclasses.replace(study, runs=grid(["s"], [(1, 16), (2, 16), (3, 16)]))
"""
SHARED = ["tokenizer", "language-s"]
RUNS = [f"s-{depth}x16-fa-init-s0" for depth in (1, 2, 3)]

pytestmark = pytest.mark.slow


@pytest.fixture
def study(tmp_path: Path) -> Path:
    file = tmp_path / "study.py"
    file.write_text(STUDY)
    return file


def start(study: Path, shard: str) -> subprocess.Popen:
    """One shard, with a stand-in for the trainer."""
    command = [sys.executable, ROOT / "tests" / "study_stand_in.py", "run", "--config", study, "--shard", shard]
    settings = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, "--out", study.parent / "out"],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def made(study: Path) -> list[str]:
    file = study.parent / "out" / "made.txt"
    return file.read_text().splitlines() if file.exists() else []


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_one_after_the_other(study: Path, capsys: pytest.CaptureFixture):
    end(start(study, "0/2"))
    assert made(study) == [*SHARED, RUNS[0], RUNS[2]]
    end(start(study, "1/2"))
    assert made(study) == [*SHARED, RUNS[0], RUNS[2], RUNS[1]]
    out = study.parent / "out"
    assert main(["run", "--config", str(study), "--shard", "0/2", "--out", str(out)]) == 0
    assert "2 runs, 2 finished" in capsys.readouterr().out
    results = sorted(out.glob("results-*.jsonl"))
    assert [file.name for file in results] == ["results-0-of-2.jsonl", "results-1-of-2.jsonl"]
    assert [sorted({row.run for row in read_results(file)}) for file in results] == [[RUNS[0], RUNS[2]], [RUNS[1]]]
    assert main(["fit", *map(str, results)]) == 0
    said = capsys.readouterr().out
    assert all(f"encoder ({depth} x 16)" in said for depth in (1, 2, 3))


def test_at_the_same_time(study: Path):
    shards = [start(study, "0/2"), start(study, "1/2")]
    outputs = [end(shard) for shard in shards]
    assert made(study)[:2] == SHARED
    assert sorted(made(study)[2:]) == RUNS, outputs


def test_what_another_shard_makes_is_waited_for_even_if_that_one_is_killed(study: Path):
    hold = study.parent / "out" / "hold"
    hold.parent.mkdir()
    hold.touch()
    first = start(study, "0/2")
    wait_for(lambda: made(study) == SHARED)
    second = start(study, "1/2")
    wait_for(lambda: "waiting: another process makes the text" in second.stdout.readline())
    second.send_signal(signal.SIGTERM)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 130, output
    first.kill()  # but not the training that it started
    first.stdout.close()
    first.wait()
    third = start(study, "1/2")
    wait_for(lambda: "waiting: another process makes the text" in third.stdout.readline())
    hold.unlink()
    end(third)
    assert made(study) == [*SHARED, RUNS[1]]
