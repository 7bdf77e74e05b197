"""The training command: an interrupted run ends bit for bit as one that was not, and bad runs save nothing."""

import gc
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from quick_xla import QUICK

from navil_jax.paths import RunFiles
from navil_jax.train.__main__ import main
from navil_jax.train.checkpoint import Checkpoints
from navil_jax.train.metrics import read_log

RECIPE, KILL = (Path(__file__).parent / name for name in ("toy_recipe.py", "kill_at_step.py"))
RESUME = ("--config.steps=40", "--config.checkpoint_every=7", "--config.eval_every=10", "--config.eval_samples=4")


def train(workdir, *flags):
    """Runs the command in this process, on all its devices."""
    return main(["--config", str(RECIPE), f"--config.workdir={workdir}", *flags])


def start(workdir, *flags, fatal=0):
    """Starts the command in a process of its own, on one device; it dies before step `fatal`."""
    program = [str(KILL), str(fatal)] if fatal else ["-m", "navil_jax.train"]
    command = [sys.executable, *program, "--config", str(RECIPE), f"--config.workdir={workdir}", *flags]
    settings = {"XLA_FLAGS": QUICK, "PYTHONPATH": str(RECIPE.parents[1])}
    return subprocess.Popen(
        command, env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    """Exit status and output."""
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def signal_after(process, workdir, lines, number):
    """Sends a signal as soon as the log has so many lines."""
    path = workdir / "metrics.jsonl"
    while process.poll() is None and (not path.exists() or len(path.read_text().split("\n")) <= lines):
        time.sleep(0.005)
    process.send_signal(number)


def saved(workdir):
    """Arrays of the newest checkpoint by name, and its iterator state."""
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        step = checkpoints.latest_step
    folder = workdir / "checkpoints" / str(step)
    with ocp.StandardCheckpointer() as checkpointer:
        tree = {item: checkpointer.restore(folder / item) for item in ("params", "optimizer")}
    state = json.loads((folder / "iterator" / "stream_0-of-1.json").read_text())
    arrays = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    return step, arrays, state


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of eight steps in this process."""
    workdir = tmp_path_factory.mktemp("finished")
    assert train(workdir) == 0
    return workdir


@pytest.mark.slow
def test_interrupted_run_ends_as_one_that_was_not(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    status, output = finish(start(whole, *RESUME))
    assert status == 0, output

    killed = start(parts, *RESUME, fatal=4)
    assert finish(killed)[0] == -signal.SIGKILL
    killed = start(parts, *RESUME)
    signal_after(killed, parts, 20, signal.SIGKILL)
    status, output = finish(killed)
    assert status == -signal.SIGKILL
    stopped = start(parts, *RESUME)
    signal_after(stopped, parts, 28, signal.SIGTERM)
    status, output = finish(stopped)
    assert status == 128 + signal.SIGTERM, output
    assert re.search(r"going on after step (7|14|21) of", output), output
    assert re.search(
        r"stopped after step \d+ of 40, saved \d+\.\d s after the signal; the same command goes on", output
    )
    status, output = finish(start(parts, *RESUME))
    assert status == 0, output

    assert (parts / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert (parts / "evaluation.md").read_text() == (whole / "evaluation.md").read_text()
    (step, arrays, state), (whole_step, whole_arrays, whole_state) = saved(parts), saved(whole)
    assert step == whole_step == 40
    assert state == whole_state
    assert set(arrays) == set(whole_arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, whole_arrays[name], err_msg=name)


@pytest.mark.slow
def test_one_device_trains_like_four(tmp_path, finished):
    status, output = finish(start(tmp_path))
    assert status == 0, output
    alone, together = (
        [line["loss"] for line in read_log(path / "metrics.jsonl") if "loss" in line] for path in (tmp_path, finished)
    )
    np.testing.assert_allclose(alone, together, rtol=1e-3)


@pytest.mark.slow
def test_a_finished_run_leaves_everything(finished):
    lines = read_log(finished / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    evaluations = [line for line in lines if "eval/colors/accuracy" in line]
    assert [line["step"] for line in evaluations] == [3, 6, 8]
    assert lines[-2]["loss"] < 0.6 * lines[0]["loss"]
    counted = [(line["step"], line["samples/colors/good"]) for line in lines if "samples/colors/good" in line]
    assert [step for step, _ in counted] == [2, 4, 6, 8]
    assert all(before[1] < after[1] for before, after in itertools.pairwise(counted))
    assert any({"seconds_per_step", "data_wait"} <= set(line) for line in read_log(finished / "timings.jsonl"))
    assert {"evaluation.md", "loss.png", "answers.png", "tokenizer"} <= {path.name for path in finished.iterdir()}
    assert re.search(
        r"\| colors \| color \| 12 \| \d+\.\d% \| 25\.0% \| 25\.0% \|", (finished / "evaluation.md").read_text()
    )
    with Checkpoints(finished / "checkpoints") as checkpoints:
        assert checkpoints.latest_step == 8
        assert checkpoints.record().metrics["loss"] == lines[-2]["loss"]


@pytest.mark.slow
def test_running_a_finished_run_again_changes_nothing(finished, capsys):
    before = (finished / "metrics.jsonl").read_text(), saved(finished)
    assert train(finished) == 0
    assert "going on after step 8" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_text() == before[0]
    after = saved(finished)
    jax.tree.map(np.testing.assert_array_equal, after, before[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.model.decoder.depth=1", "holds a run with another config: model.decoder.depth was 2 and is 1"),
        ("--config.data.seed=5", "data.seed was 0 and is 5"),
        ("--config.steps=4", "config.steps: 4, but"),
    ],
)
def test_another_config_does_not_touch_the_run(finished, capsys, flag, message):
    before = (finished / "metrics.jsonl").read_text()
    assert train(finished, flag) == 2
    assert message in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_text() == before
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["6", "8"]


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_data_unless_asked(tmp_path, capsys, monkeypatch):
    flags = ["--config.steps=2", "--config.eval_every=0"]
    monkeypatch.setattr("navil_jax.train.trainer.fingerprints", lambda _: {"data.sources.0.fingerprint": "0a"})
    assert train(tmp_path, *flags) == 0
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.record().fingerprints == {"data.sources.0.fingerprint": "0a"}
    assert train(tmp_path, *flags) == 0
    monkeypatch.setattr("navil_jax.train.trainer.fingerprints", lambda _: {"data.sources.0.fingerprint": "0b"})
    capsys.readouterr()
    assert train(tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert "holds a run with another config: data.sources.0.fingerprint was 0a and is 0b" in error
    assert error.count("\n") == 1
    assert train(tmp_path, *flags, "--config.resume_with=data.sources") == 0
    assert "data.sources.0.fingerprint was 0a and is 0b" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_does_not_go_on_with_files_that_have_changed(tmp_path, capsys):
    data, records = tmp_path / "data.jsonl", [f'{{"caption": "word {number}"}}\n' for number in range(40)]
    flags = ["--config.steps=2", "--config.eval_every=0", "--config.data.sources.0.kind=llava"]
    flags += [f"--config.data.sources.0.path={data}"]
    data.write_text("".join(records))
    assert train(tmp_path / "run", *flags) == 0
    data.touch()
    assert train(tmp_path / "run", *flags) == 0
    for changed in (records[:-1], [record.replace("word 7", "wort 7") for record in records]):
        data.write_text("".join(changed))
        capsys.readouterr()
        assert train(tmp_path / "run", *flags) == 2
        assert "data.sources.0.fingerprint was 40 samples (" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_does_not_go_on_with_held_out_files_that_have_changed(tmp_path, capsys):
    data, records = tmp_path / "data.jsonl", [f'{{"caption": "word {number}"}}\n' for number in range(40)]
    held_out = tmp_path / "test.jsonl"
    flags = ["--config.steps=2", "--config.eval_every=0", "--config.data.sources.0.kind=llava"]
    flags += [f"--config.data.sources.0.path={data}", f"--config.data.sources.0.held_out={held_out}"]
    for path in (data, held_out):
        path.write_text("".join(records))
    assert train(tmp_path / "run", *flags) == 0
    gc.collect()  # ends those of evaluations
    deadline = time.monotonic() + 10
    while any("grain" in thread.name for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [thread.name for thread in threading.enumerate() if "grain" in thread.name]
    held_out.write_text("".join(records[:-1]))
    capsys.readouterr()
    assert train(tmp_path / "run", *flags) == 2
    assert "data.sources.0.held_out.fingerprint was 40 samples (" in capsys.readouterr().err
    assert train(tmp_path / "run", *flags, "--config.resume_with=data.sources.0.held_out.fingerprint") == 0


def test_a_warmup_that_is_longer_than_the_run_is_refused_before_anything_is_read(tmp_path, capsys):
    for schedule, wanted in (("constant", "at most"), ("cosine", "below")):
        flags = ["--config.optimizer.warmup_steps=1000", f"--config.optimizer.schedule={schedule}"]
        assert train(tmp_path / "run", *flags) == 2
        assert f"config.optimizer.warmup_steps: 1000 must be {wanted} steps = 8" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_transform_with_a_fault_is_named_in_one_line(tmp_path, capsys):
    for name in ("os:system", "builtins:len", "builtins:print"):
        assert train(tmp_path / "run", f"--config.data.sources.0.transforms={name}") == 2
        error = capsys.readouterr().err
        assert re.search(
            rf"error: source colors, sample \d+ \(.*\): transform {name} (raised TypeError|gave NoneType)", error
        )
        assert error.count("\n") == 1


@pytest.mark.slow
def test_held_out_samples_that_cannot_be_used_are_said_before_the_first_step(tmp_path, capsys):
    for name, caption in (("train", '"a word"'), ("test", "null")):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"caption": {caption}}}\n' * 20)
    flags = ["--config.data.sources.0.kind=llava", f"--config.data.sources.0.path={tmp_path}/train.jsonl"]
    flags.append(f"--config.data.sources.0.held_out={tmp_path}/test.jsonl")
    assert train(tmp_path / "run", *flags) == 2
    said = capsys.readouterr()
    assert "config.data.sources.0: held-out samples of colors: none of 20 can be used" in said.err
    assert "step 1" not in said.out


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    assert train(tmp_path, "--config.optimizer.peak_learning_rate=1e36", "--config.checkpoint_every=2") == 2
    message = capsys.readouterr().err
    found = re.match(
        r"error: step (\d+): (loss|gradient_norm) is (nan|inf); samples of its batch: colors/\d+, ", message
    )
    assert found, message
    step = int(found[1])
    file = json.loads((tmp_path / f"not_finite_step_{step}_process_0.json").read_text())
    assert file["step"] == step
    assert all(name.startswith("colors/") for name in file["samples"])
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step is None or checkpoints.latest_step < step
    assert all(np.isfinite(line["loss"]) for line in read_log(tmp_path / "metrics.jsonl") if "loss" in line)


@pytest.mark.slow
def test_next_stage_starts_with_the_parameters_of_the_last(tmp_path, finished, capsys):
    flags = [f"--config.init_from={finished}", "--config.steps=1", "--config.eval_every=0"]
    flags += ["--config.optimizer.warmup_steps=1"]
    assert train(tmp_path, *flags, "--config.optimizer.trainable=**/bias,**/scale,vision/**/ls*") == 0
    assert f"parameters of step 8 of {finished}" in capsys.readouterr().out
    (_, before, _), (_, after, _) = saved(finished), saved(tmp_path)
    frozen = [name for name in after if name.endswith("['kernel']") and name.startswith("['params']")]
    assert frozen
    for name in frozen:
        np.testing.assert_array_equal(after[name], before[name])
    assert not any(name.endswith("['kernel']") for name in after if name.startswith("['optimizer']"))
    assert train(tmp_path / "other", *flags, "--config.model.decoder.rope_theta=5") == 2
    assert "holds another model: model.decoder.rope_theta was 1000000.0 and is 5.0" in capsys.readouterr().err


def test_missing_workdir_and_rows_that_do_not_divide(tmp_path, capsys):
    assert main(["--config", str(RECIPE)]) == 2
    assert "config.workdir: no folder for the run is given" in capsys.readouterr().err
    assert train("memory://bucket/run") == 2
    assert "memory://bucket/run: runs are kept in local folders or at gs://" in capsys.readouterr().err
    assert train(tmp_path, "--config.data.rows=3") == 2
    assert "config.data.rows: 3 rows do not divide by the 4 devices" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_after_a_notice_the_checkpoint_comes_before_all_else(tmp_path, monkeypatch):
    """A spot host is gone some 15 s later: the log is sent to the bucket when the checkpoint is written."""
    order, save, upload, wait = [], Checkpoints.save, RunFiles.upload, Checkpoints.wait

    def noted(name, call, then=lambda: None):
        def wrapper(self, *arguments, **named):
            order.append(name)
            result = call(self, *arguments, **named)
            then()
            return result

        return wrapper

    def notice():
        if order.count("save") == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "save", noted("save", save, notice))
    monkeypatch.setattr(Checkpoints, "wait", noted("wait", wait))
    monkeypatch.setattr(RunFiles, "upload", noted("upload", upload))
    assert train(tmp_path, "--config.checkpoint_every=2", "--config.steps=8") == 128 + signal.SIGTERM
    assert order[:2] == ["upload", "save"]  # of step 2, without a notice
    stopped = order[2:]
    assert "upload" not in stopped[: stopped.index("save")]
    assert [name for name, _ in itertools.groupby(stopped[stopped.index("save") :])] == ["save", "wait", "upload"]
