"""One run at a time writes to a workdir, all its processes have the same settings, and what is removed is noticed."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bucket_server import serve
from quick_xla import QUICK

from navil_jax.errors import UserError
from navil_jax.train.__main__ import main
from navil_jax.train.lock import FILE, WorkdirLock
from navil_jax.train.trainer import Checkpoints

ROOT = Path(__file__).parents[1]
RECIPE = Path(__file__).parent / "toy_recipe.py"
HOLD = "import sys, time; from navil_jax.train.lock import WorkdirLock; lock = WorkdirLock(sys.argv[1]).__enter__()"


@pytest.fixture
def bucket(monkeypatch):
    pytest.importorskip("gcsfs")
    with serve() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def holder(folder) -> subprocess.Popen:
    """Another process that has the lock."""
    code = f"{HOLD}; print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.slow
def test_a_second_run_is_refused_until_the_first_has_ended_or_was_killed(tmp_path):
    with holder(tmp_path) as process:
        try:
            with pytest.raises(UserError, match=rf"another run writes there \(process {process.pid} on"):
                WorkdirLock(tmp_path).__enter__()
        finally:
            process.kill()
    for _ in range(2):
        with WorkdirLock(tmp_path) as lock:
            lock.check()


def test_a_workdir_removed_or_exchanged_is_noticed(tmp_path):
    for change in (shutil.rmtree, lambda folder: (folder / FILE).rename(folder / "other")):
        folder = tmp_path / "run"
        with WorkdirLock(folder) as lock:
            lock.check()
            change(folder)
            with pytest.raises(UserError, match="was removed or put elsewhere while the run writes to it"):
                lock.check()


@pytest.mark.slow
def test_in_a_bucket_a_run_that_lives_keeps_its_workdir_and_a_dead_one_does_not(bucket):
    folder, quick = "gs://bucket/run", 0.2
    with WorkdirLock(folder, quick), pytest.raises(UserError, match="another run writes there"):
        WorkdirLock(folder, quick).__enter__()
    assert not bucket.objects
    bucket.put(f"bucket/run/{FILE}", b'{"host": "elsewhere", "pid": 1, "run": "0", "renewed": 5}')
    with WorkdirLock(folder, quick) as lock:
        lock.check()


def test_in_a_bucket_a_lock_that_cannot_be_renewed_is_tried_again(bucket, monkeypatch, capsys):
    dumps = json.dumps

    def fail_once(value, **options):
        if isinstance(value, dict) and value.get("renewed") == 1:
            raise ConnectionResetError("down")
        return dumps(value, **options)

    monkeypatch.setattr(json, "dumps", fail_once)
    with WorkdirLock("gs://bucket/run", 0.05):
        until = time.monotonic() + 30
        while b'"renewed": 3' not in bucket.objects["bucket/run/.lock"] and time.monotonic() < until:
            time.sleep(0.02)
        assert time.monotonic() < until
    assert "gs://bucket/run/.lock: cannot be renewed (down); it is tried again" in capsys.readouterr().out


def test_an_error_of_a_run_without_its_workdir_says_so(tmp_path):
    with pytest.raises(UserError, match="was removed or put elsewhere"), WorkdirLock(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run")
        raise ValueError("NOT_FOUND: of a library")
    with pytest.raises(ValueError, match="of the run"), WorkdirLock(tmp_path / "other"):
        raise ValueError("of the run")


def test_a_checkpoint_removed_while_the_run_goes_on_is_noticed(tmp_path, capsys, monkeypatch):
    saves = []
    save = Checkpoints.save

    def saved(self, step, *arguments):
        save(self, step, *arguments)
        saves.append(step)
        if len(saves) == 1:
            self.wait()
            shutil.rmtree(self.folder / str(step))

    monkeypatch.setattr(Checkpoints, "save", saved)
    flags = ["--config", str(RECIPE), f"--config.workdir={tmp_path}", "--config.steps=6", "--config.checkpoint_every=2"]
    assert main(flags) == 2
    assert f"{tmp_path}/checkpoints/2: was removed while the run goes on" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("config.optimizer.peak_learning_rate", "config.optimizer.peak_learning_rate is 0.002 and not 0.001"),
        ("config.steps", "config.steps is 0.002"),
    ],
)
def test_processes_with_different_settings_all_say_so(key, said, tmp_path):
    values = {"config.steps": ("8", "9")}.get(key, ("0.001", "0.002"))
    said = said.replace("0.002", values[1]) if key == "config.steps" else said
    command = [sys.executable, "-m", "navil_jax.train", "--config", str(RECIPE), f"--config.workdir={tmp_path}/run"]
    shell = " ".join([*command, f"--{key}=$(test $JAX_PROCESS_ID = 0 && echo {values[0]} || echo {values[1]})"])
    started = [sys.executable, str(ROOT / "launch" / "local.py"), "--processes=2", "--devices=1", "--", "sh", "-c"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICK}
    done = subprocess.run(
        [*started, f"exec {shell}"], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert output.count(f"process 1 was started with other settings than process 0: {said}") == 2
    assert "Traceback" not in output
