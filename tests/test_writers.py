"""Writers: scalars reach TensorBoard, Weights & Biases, both or nobody."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy_recipe
from quick_xla import QUICK

from navil_jax.config import Config
from navil_jax.config.flags import apply_overrides
from navil_jax.errors import UserError
from navil_jax.train.metrics import MetricsLog
from navil_jax.train.writers import make_writers

# In the place of the package: notes what it is told.
STAND_IN = """
import json
class errors:
    class Error(Exception): pass
class Run:
    def __init__(self, **settings):
        self.file = open(settings["dir"] / "told.jsonl", "a")
        self.tell(id=settings["id"], steps=settings["config"]["steps"], resume=settings["resume"])
    def tell(self, **values):
        self.file.write(json.dumps(values) + "\\n")
    def define_metric(self, name, step_metric): self.tell(metric=step_metric)
    def log(self, values): self.tell(**values)
    def finish(self): self.file.close()
init = Run
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


def config(workdir: Path, writers: str) -> Config:
    return apply_overrides(toy_recipe.get_config(), {"workdir": str(workdir), "writers": writers})


def test_weights_and_biases_is_told_everything_and_knows_the_run_again(tmp_path: Path, stand_in: None) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for step in (0, 3):
        settings = config(run, "tensorboard,wandb")
        log = MetricsLog(run, step, make_writers(settings, run, step))
        log.write(step + 1, {"loss": 2.5})
        log.write_times(step + 1, {"goodput/productive": 0.5})
        log.close()
    told = [json.loads(line) for line in (run / "told.jsonl").read_text().splitlines()]
    assert told[1:4] == [{"metric": "step"}, {"step": 1, "loss": 2.5}, {"step": 1, "goodput/productive": 0.5}]
    assert told[0] == told[4]
    assert len(told[0]["id"]) == 12
    assert list((run / "tensorboard").glob("events*"))


def test_a_run_may_have_no_writer(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, make_writers(config(tmp_path, ""), tmp_path, 0))
    log.write(1, {"loss": 2.5})
    log.close()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "timings.jsonl"}


def test_a_writer_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^config\.writers: wandb is not installed; pip install wandb, or"):
        make_writers(config(tmp_path, "wandb"), tmp_path, 0)
    with pytest.raises(UserError, match=r"^config\.writers: no .'tensorbord'.; there are tensorboard, wandb$"):
        config(tmp_path, "tensorbord")


@pytest.mark.slow
def test_the_package_itself_takes_a_run_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb.sdk")
    command = [sys.executable, "-m", "navil_jax.train", "--config", str(Path(toy_recipe.__file__))]
    command += [f"--config.workdir={tmp_path}", "--config.writers=wandb", "--config.eval_every=0"]
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "XLA_FLAGS": QUICK}
    settings["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"gradient_norm" in file.read_bytes()
