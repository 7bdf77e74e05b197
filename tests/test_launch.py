"""Several processes: how they find each other, how they are started, and that they train as one would."""

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from navil_jax import sharding
from navil_jax.config_flags import load_config
from navil_jax.data.pipeline import make_dataset
from navil_jax.data.sources import open_source
from navil_jax.data.tokenizer import Tokenizer
from navil_jax.errors import UserError
from navil_jax.sharding import make_mesh, start_hosts
from navil_jax.train import main
from navil_jax.training.checkpoint import Checkpoints
from navil_jax.training.evaluation import Evaluator
from navil_jax.training.metrics import read_log
from navil_jax.training.step import abstract_state, global_batch, initial_params, initial_state, make_train_step

ROOT = Path(__file__).parents[1]
RECIPE = Path(__file__).parent / "toy_recipe.py"
TPU_VARIABLES = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_ID")
POD = ("--name", "pod", "--zone", "us-west4-a", "--accelerator-type", "v5litepod-16", "--version", "image")


@pytest.fixture
def joined(monkeypatch):
    """The arguments of every call that would join this process to others; no variable is set that asks for one."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    for name in (*sharding.PROCESS_VARIABLES, *TPU_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    before = jax.config.jax_platforms
    yield calls
    jax.config.update("jax_platforms", before)


def set_all(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_processes_join_by_the_variables(joined, monkeypatch):
    start_hosts()
    assert joined == []
    set_all(monkeypatch, JAX_COORDINATOR_ADDRESS="host:1234", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="3")
    start_hosts()
    assert joined == [{"num_processes": 4, "process_id": 3, "shutdown_timeout_seconds": sharding.SHUTDOWN_SECONDS}]


@pytest.mark.parametrize(
    ("platforms", "variables", "joins"),
    [
        ("tpu,cpu", {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, True),
        ("tpu,cpu", {"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_ID": "0"}, True),
        ("tpu,cpu", {"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ("tpu,cpu", {}, False),
        ("tpu,cpu", {"TPU_SKIP_MDS_QUERY": None}, True),
        ("cpu", {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, False),
        ("cpu", {"TPU_SKIP_MDS_QUERY": None}, False),
    ],
)
def test_hosts_of_a_tpu_slice_join(joined, monkeypatch, platforms, variables, joins):
    jax.config.update("jax_platforms", platforms)
    for name, value in variables.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    start_hosts()
    assert bool(joined) is joins


@pytest.mark.parametrize("missing", sharding.PROCESS_VARIABLES)
def test_a_missing_variable_is_named(joined, monkeypatch, missing):
    set_all(monkeypatch, JAX_COORDINATOR_ADDRESS="host:1234", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="0")
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=f"^{missing}: is not set in the environment, but JAX_"):
        start_hosts()
    assert joined == []


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES: must be a whole number, not 'two'"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID: must be a whole number, not '-1'"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID: 2, but JAX_NUM_PROCESSES=2 numbers them from 0"),
    ],
)
def test_a_wrong_number_is_named(joined, monkeypatch, variables, message):
    rest = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    set_all(monkeypatch, **(rest | variables))
    with pytest.raises(UserError, match=re.escape(message)):
        start_hosts()
    assert joined == []


def test_hosts_without_the_number_of_this_one(joined, monkeypatch):
    jax.config.update("jax_platforms", "tpu,cpu")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    with pytest.raises(UserError, match="TPU_WORKER_ID: is not set in the environment, but TPU_WORKER_HOSTNAMES is"):
        start_hosts()


def tpu_pod(*arguments, **environment):
    command = [str(ROOT / "launch" / "tpu_pod.sh"), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_dry_run_prints_the_commands():
    done = tpu_pod("--dry-run", *POD, "--", "python", "-m", "navil_jax.train", "--config", "my recipe.py")
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.split("\n\n")[0].split("\n")]
    gcloud = [command[4:] for command in commands if command[:4] == ["gcloud", "compute", "tpus", "tpu-vm"]]
    assert [command[0] for command in gcloud] == ["create", "scp", "ssh", "ssh", "ssh"]
    assert gcloud[0] == ["create", "pod", "--zone=us-west4-a", "--accelerator-type=v5litepod-16", "--version=image"]
    assert all("--zone=us-west4-a" in command and "--worker=all" in command for command in gcloud[1:])
    assert '-r requirements.txt "jax[tpu]"' in gcloud[3][-1]
    assert r"nohup python -m navil_jax.train --config my\ recipe.py" in gcloud[-1][-1]
    for hint in ("Follow:", "Stop:", "Delete:"):
        assert f"\n{hint}" in done.stdout


def test_pod_runs_the_command_on_a_host_that_is_there(tmp_path):
    """A `gcloud` that knows the slice, and whose hosts are a folder of this machine."""
    gcloud, home = tmp_path / "bin" / "gcloud", tmp_path / "home"
    gcloud.parent.mkdir()
    home.mkdir()
    gcloud.write_text(
        "#!/usr/bin/env bash\n"
        f"cd {home}\n"
        "case $4 in\n"
        "  create) exit 9 ;;\n"
        f'  scp) cp "$5" {home} ;;\n'
        '  ssh) case $8 in *uv*) ;; *) bash -c "${8#--command=}" ;; esac ;;\n'
        "esac\n"
    )
    gcloud.chmod(0o755)
    done = tpu_pod(*POD, "--", "echo", "one  two", "$HOME", PATH=f"{gcloud.parent}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (home / "navil_jax" / "navil_jax" / "train.py").exists()
    assert not (home / "navil_jax" / ".git").exists()
    log = home / "navil_jax" / "train.log"
    for _ in range(100):
        if log.read_text():
            break
        subprocess.run(["sleep", "0.05"], check=True)
    assert log.read_text() == "one  two $HOME\n"
    assert int((home / "navil_jax" / "train.pid").read_text()) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: --name is missing; see launch/tpu_pod.sh --help"),
        (("--name",), "error: --name needs a value"),
        (POD, "error: the command is missing (after --)"),
        (("--nmae", "x"), "error: unknown argument --nmae"),
    ],
)
def test_pod_mistakes(arguments, message):
    done = tpu_pod(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_both_launchers_explain_themselves():
    assert tpu_pod("--help").stdout.startswith("Usage: launch/tpu_pod.sh")
    assert "--processes N" in local("--help").stdout


def local(*arguments):
    command = [sys.executable, str(ROOT / "launch" / "local.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_processes_are_numbered_and_one_that_fails_ends_the_rest():
    script = 'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES, $JAX_PLATFORMS, $XLA_FLAGS"'
    done = local("--processes", "3", "--devices", "5", "--", "bash", "-c", script)
    assert done.returncode == 0
    lines = sorted(done.stdout.splitlines())
    assert [line[:14] for line in lines] == [f"{i}: {i} of 3, cpu" for i in range(3)]
    assert all(line.endswith("--xla_force_host_platform_device_count=5") for line in lines)
    done = local("--", "bash", "-c", 'if [ "$JAX_PROCESS_ID" = 1 ]; then exit 7; else exec sleep 60; fi')
    assert done.returncode == 7
    assert local("--", "no-such-command").returncode == 2


def batches_of(config, tokenizer, processes):
    """The rows of all processes, put together on this one."""
    sources = [open_source(source.name, "train") for source in config.data.sources]
    iterators = [iter(make_dataset(config, sources, tokenizer, i, processes)) for i in range(processes)]
    while True:
        yield jax.tree.map(lambda *rows: np.concatenate(rows), *map(next, iterators))


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path, capsys):
    flags = ["--config", str(RECIPE), f"--config.workdir={tmp_path}", "--config.eval_every=4"]
    done = local("--processes", "2", "--devices", "2", "--", sys.executable, "-m", "navil_jax.train", *flags)
    assert done.returncode == 0, done.stdout
    load_config(RECIPE)  # registers its source here too
    lines = read_log(tmp_path / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 8
    assert losses[-1] < 0.6 * losses[0]

    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step == 8
        record = checkpoints.record()
        config, tokenizer = record.config, Tokenizer.from_files(record.tokenizer)
        mesh = make_mesh(config.mesh)
        params = checkpoints.restore_params(abstract_state(config, mesh).params)
    evaluator = Evaluator(config, mesh, tokenizer)
    alone = evaluator.metrics(evaluator.score(params))
    assert alone == pytest.approx({name: lines[-1][name] for name in alone}, rel=1e-3)

    state, train_step = initial_state(config, mesh, initial_params(config, mesh)), make_train_step(config, mesh)
    replayed = []
    for batch in itertools.islice(batches_of(config, tokenizer, processes=2), config.steps):
        state, metrics = train_step(state, global_batch(batch, mesh))
        replayed.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, replayed, rtol=1e-3)

    assert main([*flags, "--config.steps=9"]) == 2
    assert "was written by 2 processes, and this run has 1; go on with as many" in capsys.readouterr().err
