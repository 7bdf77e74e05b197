"""Faults of the world while a run goes on: each ends in a line within a stated time, and the restart is exact."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from quick_xla import QUICK

from navil_jax.train.__main__ import main
from navil_jax.train.metrics import read_log

ROOT = Path(__file__).parents[1]
RECIPE, FAULT = (ROOT / "tests" / name for name in ("toy_recipe.py", "fault_train.py"))
FLAGS = ("--config.steps=12", "--config.checkpoint_every=2", "--config.log_every=1", "--config.eval_every=0")
FLAGS += ("--config.data.streams=2", "--config.keep_checkpoints=9")  # so two processes can go on with a run of one
SPOILT = ("Traceback", "fault of navil_jax", "Check failure", "Fatal Python")


def start(workdir: Path, program: list[str], processes: int = 1) -> tuple[int, str, float]:
    """Status, output and seconds of the training command, or of a program in its place."""
    command = [sys.executable, *program, "--config", str(RECIPE), f"--config.workdir={workdir}", *FLAGS]
    if processes > 1:
        launcher = [sys.executable, str(ROOT / "launch" / "local.py"), f"--processes={processes}", "--devices=1", "--"]
        command = [*launcher, *command]
    environment = os.environ | {"XLA_FLAGS": QUICK, "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


def hit(workdir: Path, fault: str, processes: int = 1) -> tuple[int, str, float]:
    """A run that is hit by a fault of `fault_train.FAULTS`: "PROCESS NAME STEP"."""
    return start(workdir, [str(FAULT), fault], processes)


def go_on(workdir: Path) -> str:
    status, output, _ = start(workdir, ["-m", "navil_jax.train"])
    assert status == 0, output
    return output


def losses(workdir: Path) -> list[float]:
    return [line["loss"] for line in read_log(workdir / "metrics.jsonl") if "loss" in line]


def check_equal(workdir: Path, other: Path) -> None:
    """Losses, parameters, optimizer state and place in the data after the last step, bit for bit."""
    assert losses(workdir) == losses(other)
    folders = [path / "checkpoints" / "12" for path in (workdir, other)]
    with ocp.StandardCheckpointer() as reader:
        for item in ("params", "optimizer"):
            jax.tree.map(np.testing.assert_array_equal, *(reader.restore(folder / item) for folder in folders))
    states = [[path.read_text() for path in sorted((folder / "iterator").glob("*.json"))] for folder in folders]
    assert states[0] == states[1]
    assert states[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    go_on(workdir)
    assert len(losses(workdir)) == 12
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["storage-hangs", "storage-hangs-behind"])
def test_storage_that_hangs_ends_the_run_with_a_line(fault: str, undisturbed: Path, tmp_path: Path) -> None:
    status, output, _ = hit(tmp_path, f"0 {fault} 6")
    assert status == 1, output
    last = output.splitlines()[-1]
    assert re.fullmatch(r"error: .*/checkpoints/\d+: is not written after 4 s, the storage hangs; check it .*", last)
    assert not any(word in output for word in SPOILT)
    go_on(tmp_path)
    check_equal(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    status, output, _ = hit(tmp_path, "0 clock-jumps 5")
    assert status == 0, output
    check_equal(tmp_path, undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], capture_output=True, check=False
        )
        mounted = done.returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no right to mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2])
def test_a_full_disk_ends_the_run_with_a_line(processes: int, small_disk: Path, tmp_path: Path) -> None:
    workdir = small_disk / "run"
    status, output, _ = hit(workdir, f"{processes - 1} disk-full 6", processes)
    assert status in (1, 2), output
    assert re.search(
        r"error: .*No space left on device; make space and run the same command again$", output, re.MULTILINE
    )
    assert "error: " in output.splitlines()[-1]
    assert not any(word in output for word in SPOILT)
    (workdir / "filler").unlink()
    assert "going on after step" in go_on(workdir) or processes > 1
    assert len(losses(workdir)) == 12


def spoil(folder: Path) -> None:
    """Flips bytes in the middle of the largest file."""
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(byte ^ 255 for byte in content[middle : middle + 64])
    path.write_bytes(content)


def remove_states(folder: Path) -> None:
    shutil.rmtree(folder / "iterator")


def cut_record(folder: Path) -> None:
    path = folder / "record" / "metadata"
    path.write_bytes(path.read_bytes()[:100])


def copied(run: Path, workdir: Path, *steps: int) -> Path:
    for step in steps:
        shutil.copytree(run / "checkpoints" / str(step), workdir / "checkpoints" / str(step))
    shutil.copy(run / "metrics.jsonl", workdir)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda f: spoil(f / "optimizer"), remove_states, cut_record])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(damage, undisturbed: Path, tmp_path: Path) -> None:
    copied(undisturbed, tmp_path, 4, 6, 8)
    damage(tmp_path / "checkpoints" / "8")
    spoil(tmp_path / "checkpoints" / "6" / "params")
    output = go_on(tmp_path)
    warnings = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert warnings[0].endswith("the run goes on from step 4, which is whole")
    assert "going on after step 4 of" in output
    assert (tmp_path / "checkpoints" / "6.damaged").is_dir()
    check_equal(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_damaged_checkpoint_stops_the_run_if_asked_or_if_it_is_the_only_one(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config", str(RECIPE), f"--config.workdir={tmp_path}", *FLAGS]
    copied(undisturbed, tmp_path, 4, 6)
    spoil(tmp_path / "checkpoints" / "6" / "params")
    assert main([*flags, "--config.checkpoint_damage=stop"]) == 2
    assert "delete this folder to use step 4, which is whole" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    assert main(flags) == 2
    assert "copy it again or start anew, as there is no older one that is whole" in capsys.readouterr().err
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["6"]
    other = ["--config", str(RECIPE), f"--config.workdir={tmp_path}/other", f"--config.init_from={tmp_path}", *FLAGS]
    copied(undisturbed, tmp_path, 4)
    assert main(other) == 2  # another run's folder is not touched
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]


@pytest.mark.slow
def test_of_two_processes_a_damaged_checkpoint_is_set_aside_for_the_next_start(
    undisturbed: Path, tmp_path: Path
) -> None:
    copied(undisturbed, tmp_path, 10, 12)
    spoil(tmp_path / "checkpoints" / "12" / "params")
    status, output, seconds = start(tmp_path, ["-m", "navil_jax.train"], 2)
    assert status == 1, output  # what keeps the run starts the same command again
    assert "12.damaged from here on" in output
    assert not any(word in output for word in SPOILT)
    assert seconds < 120
    assert "going on after step 10 of" in go_on(tmp_path)
    check_equal(tmp_path, undisturbed)
