"""Checkpoints: when a run saves, which ones stay, and what a save costs its steps."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_recipe
from hypothesis import given
from hypothesis import strategies as st
from quick_xla import QUICK

from navil_jax.config import Config, validate
from navil_jax.config.continuing import check_continues
from navil_jax.config.plain import from_json, to_json
from navil_jax.errors import UserError
from navil_jax.train import saving as saving_module
from navil_jax.train.checkpoint import Checkpoints, Record
from navil_jax.train.keep import Keep
from navil_jax.train.metrics import read_log
from navil_jax.train.saving import Saving, keep

ROOT = Path(__file__).parents[1]
RECORD = Record(Config(), {"tokenizer.model": b"x"}, {})


def save(folder: Path, kept: Keep, values: dict[int, float | None], metric: str = "loss") -> list[int]:
    """Steps that are there after a save for each step of `values`, with its metric."""
    with Checkpoints(folder, kept) as checkpoints:
        for step, value in values.items():
            checkpoints.save(step, {"a": np.ones(2)}, RECORD, metrics=None if value is None else {metric: value})
            checkpoints.wait()
    return sorted(int(entry.name) for entry in folder.iterdir())


def test_the_newest_every_nth_and_the_best_stay(tmp_path: Path) -> None:
    values = dict(zip(range(1, 9), (5.0, 1.0, 2.0, 6.0, None, 3.0, 4.0, 2.5), strict=True))
    assert save(tmp_path / "a", Keep(2), values) == [7, 8]
    assert save(tmp_path / "b", Keep(1, every=3), values) == [3, 6, 8]
    assert save(tmp_path / "c", Keep(1, best=2, metric="loss"), values) == [2, 3, 8]
    assert save(tmp_path / "d", Keep(1, best=1, metric="loss", mode="max"), values) == [4, 8]
    assert save(tmp_path / "e", Keep(1, every=4, best=1, metric="loss"), values) == [2, 4, 8]


def test_what_is_best_is_known_after_a_restart(tmp_path: Path) -> None:
    best = Keep(1, best=1, metric="loss")
    assert save(tmp_path, Keep(3), {1: None}) == [1]  # of a run before there was such a setting
    assert save(tmp_path, best, {2: 1.0, 3: 2.0}) == [2, 3]
    assert save(tmp_path, best, {4: 3.0, 5: None}) == [2, 5]
    assert save(tmp_path, best, {6: 0.5, 7: 3.0}) == [6, 7]
    other = dataclasses.replace(best, metric="accuracy", mode="max")
    assert save(tmp_path, other, {8: 0.1, 9: 0.0}, "accuracy") == [8, 9]


class Slow:
    """Checkpoints whose writes end when a test says so."""

    def __init__(self) -> None:
        self.is_saving = False

    @property
    def completed(self) -> float:
        return time.monotonic()

    def wait(self) -> None:
        assert not self.is_saving


def test_a_save_does_not_wait_for_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving_module, "PATIENCE_SECONDS", 0.1)
    checkpoints, said = Slow(), []
    saving = Saving(Config(checkpoint_every=10), checkpoints, said.append)
    assert [step for step in range(1, 25) if saving.due(step)] == [10, 20]
    saving.began(20, 0.5, [np.zeros(2**18, np.float32)])
    checkpoints.is_saving = True
    began = time.monotonic()
    assert not any(saving.due(step) for step in range(25, 42))
    assert 0.1 <= time.monotonic() - began < 0.5  # once, and no more at the steps after it
    assert said == ["step 30: the checkpoint before is still being written, so this one comes later"]
    assert saving.finished() is None
    checkpoints.is_saving = False
    assert saving.due(42)
    cost = saving.finished()
    assert cost is not None
    assert (cost.step, cost.blocked, cost.gib) == (20, 0.5, 2**-10)
    assert cost.background > 0.1
    assert saving.finished() is None
    assert not saving.due(43)


def test_a_save_is_due_after_minutes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    saving = Saving(Config(checkpoint_every=1000, checkpoint_minutes=2, log_every=5), Slow())
    due = []
    for step in range(1, 61):
        now[0] += 10
        if saving.due(step):
            due.append(step)
            saving.began(step, 0.0, [])
    assert due == [15, 30, 45, 60]  # 12 steps of 10 s each, looked at every 5


@given(every=st.integers(1, 50), kept=st.integers(0, 200))
def test_steps_that_stay_for_good_are_steps_that_are_saved(every: int, kept: int) -> None:
    config = dataclasses.replace(toy_recipe.get_config(), checkpoint_every=every, keep_checkpoints_every=kept)
    wrong = ""
    try:
        validate(config)
    except UserError as error:
        wrong = str(error)
    assert bool(wrong) == bool(kept % every)
    assert not wrong or wrong.startswith(f"config.keep_checkpoints_every: {kept} is not a multiple of checkpoint_every")


def test_a_best_metric_and_how_many_belong_together() -> None:
    for changes in ({"keep_best_checkpoints": 1}, {"best_metric": "loss"}):
        with pytest.raises(UserError, match=r"^config\.best_metric: "):
            validate(dataclasses.replace(toy_recipe.get_config(), **changes))


def test_a_metric_that_nobody_measures_is_named() -> None:
    config = Config(keep_best_checkpoints=1, best_metric="eval/web/los")
    saving = Saving(config, Slow())
    assert saving.metric(3, None, {"loss": 1.0}) is None
    with pytest.raises(UserError, match=r"^config\.best_metric: nothing is called 'eval/web/los'; there are eval/"):
        saving.metric(3, {"eval/web/loss": 1.0}, {"loss": 2.0})
    saving = Saving(dataclasses.replace(config, best_metric="loss"), Slow())
    assert saving.metric(3, None, {"loss": 1.5}) == {"loss": 1.5}


def test_a_run_from_before_these_settings_goes_on(tmp_path: Path) -> None:
    text = to_json(toy_recipe.get_config())
    names = ("checkpoint_minutes", "keep_checkpoints_every", "keep_best_checkpoints", "best_metric", "best_mode")
    older = json.dumps({key: value for key, value in json.loads(text).items() if key not in names})
    config = dataclasses.replace(from_json(older), keep_best_checkpoints=1, best_metric="loss", checkpoint_minutes=1.0)
    assert check_continues(from_json(older), config, tmp_path) == {}
    assert keep(from_json(older)) == Keep(2)


@pytest.mark.slow
def test_a_run_keeps_what_it_is_told_to_and_says_what_it_cost(tmp_path: Path) -> None:
    settings = {"workdir": tmp_path, "steps": 12, "checkpoint_every": 2, "eval_every": 4, "keep_checkpoints": 1}
    settings |= {"keep_checkpoints_every": 6, "keep_best_checkpoints": 1, "best_metric": "eval/colors/accuracy"}
    settings |= {"best_mode": "max", "checkpoint_minutes": 1e-4, "log_every": 1}
    command = [sys.executable, "-m", "navil_jax.train", "--config", str(ROOT / "tests" / "toy_recipe.py")]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    command = [sys.executable, str(ROOT / "launch" / "local.py"), "--processes=2", "--devices=1", "--", *command]
    environment = os.environ | {"XLA_FLAGS": QUICK, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    costs = {line["step"]: line for line in read_log(tmp_path / "timings.jsonl") if "checkpoint/gib" in line}
    assert output.count("s in the background") == len(costs) >= 3
    assert 12 in costs
    (state,) = {line["checkpoint/gib"] for line in costs.values()}
    assert 2**30 * state > 3 * 4 * 60_000  # parameters and two moments, float32
    assert all(line["checkpoint/blocked_seconds"] > 0 for line in costs.values())
    accuracies = {
        line["step"]: line["eval/colors/accuracy"]
        for line in read_log(tmp_path / "metrics.jsonl")
        if "eval/colors/accuracy" in line and line["step"] in costs and line["step"] < 12
    }
    left = {int(entry.name) for entry in (tmp_path / "checkpoints").iterdir()}
    best = {step for step, value in accuracies.items() if value == max(accuracies.values())}
    assert left <= {12} | best | {step for step in costs if step % 6 == 0}
    assert {12} | {step for step in costs if step % 6 == 0} <= left
    assert not best or best & left


def test_state_is_measured_whole() -> None:
    saving = Saving(Config(), Slow())
    saving.began(1, 0.0, {"a": jax.numpy.zeros((4, 2**18)), "b": [jax.numpy.zeros(2**20, "bfloat16")]})
    cost = saving.finished()
    assert cost is not None
    assert cost.gib == 6 / 1024
    assert str(cost).startswith("checkpoint of step 1: 6.0 MiB, steps waited 0.00 s, then 0.0 s in the background")
