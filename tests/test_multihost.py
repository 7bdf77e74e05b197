"""Two processes with devices of their own, on every mesh axis, train as one device does; their run is on a bucket."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from bucket_server import serve
from quick_xla import QUICK

from navil_jax.config import MeshConfig
from navil_jax.config.flags import load_config
from navil_jax.data.pipeline import make_dataset
from navil_jax.data.sources import open_source
from navil_jax.data.tokenizers import tokenizer_from_files
from navil_jax.model.params import flatten
from navil_jax.sharding import make_mesh
from navil_jax.train.__main__ import main
from navil_jax.train.checkpoint import Checkpoints
from navil_jax.train.step import abstract_state, global_batch, initial_params, initial_state, make_train_step

ROOT = Path(__file__).parents[1]
RECIPE = Path(__file__).parent / "toy_recipe.py"
PROCESSES, STEPS, SAVED = 2, 20, 10
SETTINGS = {"steps": STEPS, "checkpoint_every": SAVED, "eval_every": 0, "model.decoder.num_kv_heads": 2}
SETTINGS |= {"optimizer.peak_learning_rate": 1e-3, "model.remat": "none", "profile_steps": f"{SAVED + 2},{SAVED + 2}"}
# Layout -> devices of each process, sizes of the mesh axes.
LAYOUTS = {
    "fsdp": (2, {"fsdp": 4}),
    "all": (4, {"fsdp": 2, "tensor": 2, "context": 2}),  # goes on where fsdp was after half its steps
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket():
    pytest.importorskip("gcsfs")
    with serve() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


def flags(layout):
    _, mesh = LAYOUTS[layout]
    settings = SETTINGS | {f"mesh.{axis}": size for axis, size in mesh.items()}
    return [
        "--config", str(RECIPE), f"--config.workdir=gs://bucket/{layout}",
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(bucket):
    """A function that trains in a layout, once, and gives what the processes printed."""
    printed = {}

    def run(layout):
        if layout not in printed:
            if layout == "all":
                run("fsdp")
                for name, content in list(bucket.objects.items()):
                    if name.startswith("bucket/fsdp/") and f"checkpoints/{STEPS}/" not in name:
                        bucket.put(name.replace("fsdp", "all", 1), content)
            devices, _ = LAYOUTS[layout]
            command = [sys.executable, str(ROOT / "launch" / "local.py"), f"--processes={PROCESSES}"]
            command += [f"--devices={devices}", "--", sys.executable, "-m", "navil_jax.train", *flags(layout)]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICK}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            printed[layout] = done.stdout
        return printed[layout]

    return run


def read_log(bucket, layout):
    return [json.loads(line) for line in bucket.objects[f"bucket/{layout}/metrics.jsonl"].decode().splitlines()]


def batches_of(config, tokenizer):
    """The rows of all processes, put together on this one."""
    sources = [open_source(source.name, "train") for source in config.data.sources]
    iterators = [iter(make_dataset(config, sources, tokenizer, i, PROCESSES)) for i in range(PROCESSES)]
    while True:
        yield jax.tree.map(lambda *rows: np.concatenate(rows), *map(next, iterators))


@pytest.fixture(scope="module")
def alone(bucket, runs):
    """Losses and parameters of one device that is given the same batches, and what restores parameters on it."""
    runs("fsdp")
    load_config(RECIPE)  # registers its source here too
    with Checkpoints("gs://bucket/fsdp/checkpoints") as checkpoints:
        record = checkpoints.record()
    config = dataclasses.replace(record.config, mesh=MeshConfig())
    tokenizer = tokenizer_from_files(record.tokenizer)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state, train_step = initial_state(config, mesh, initial_params(config, mesh)), make_train_step(config, mesh)
    losses = []
    for batch in itertools.islice(batches_of(config, tokenizer), STEPS):
        state, metrics = train_step(state, global_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
    wanted = abstract_state(config, mesh).params
    return losses, flatten(jax.device_get(state.params)), wanted


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_as_one_device(layout, bucket, runs, alone):
    output = runs(layout)
    losses, params, wanted = alone
    devices, mesh = LAYOUTS[layout]
    assert f"; {PROCESSES * devices} cpu (" in output
    assert all(f"{axis}={size}" in output for axis, size in mesh.items())
    resumed = f"going on after step {SAVED} of gs://bucket/all/checkpoints" in output
    assert resumed is (layout == "all")

    lines = read_log(bucket, layout)
    logged = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert [step for step, _ in logged] == list(range(1, STEPS + 1))
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_allclose([loss for _, loss in logged], losses, rtol=1e-4)
    first = read_log(bucket, "fsdp")[-1]
    assert lines[-1]["eval/colors/accuracy"] > 0.2
    assert lines[-1] == pytest.approx(first, rel=1e-3)

    with Checkpoints(f"gs://bucket/{layout}/checkpoints") as checkpoints:
        assert checkpoints.latest_step == STEPS
        saved = flatten(jax.device_get(checkpoints.restore_params(wanted)))
    assert set(saved) == set(params)
    for name, value in params.items():
        np.testing.assert_allclose(saved[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_the_bucket_holds_everything(bucket, runs):
    runs("fsdp")
    names = {name.removeprefix("bucket/fsdp/") for name in bucket.objects if name.startswith("bucket/fsdp/")}
    wanted = {"metrics.jsonl", "timings.jsonl", "evaluation.md", "loss.png", "answers.png", "tokenizer/tokenizer.model"}
    assert wanted <= names
    assert {f"checkpoints/{step}/iterator/stream_1-of-2.json" for step in (SAVED, STEPS)} <= names
    assert any(name.startswith("tensorboard/events") for name in names)
    assert len([name for name in names if name.startswith("profile/") and name.endswith(".xplane.pb")]) == 1
    assert not any("tmp" in name for name in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.fsdp": "1", "mesh.tensor": "4"}, "config.mesh.tensor: 4 does not divide heads = 2 of decoder/"),
        ({"mesh.fsdp": "1", "mesh.tensor": "2", "mesh.data": "2", "data.rows": "3"}, "config.data.rows: 3 rows do not"),
    ],
)
def test_a_mesh_that_does_not_fit_is_named(changes, message, tmp_path, capsys):
    given = [f"--config.{key}={value}" for key, value in changes.items()]
    assert main(["--config", str(RECIPE), f"--config.workdir={tmp_path}", *given]) == 2
    assert message in capsys.readouterr().err
