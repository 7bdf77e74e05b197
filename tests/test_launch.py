"""Several processes: how they find each other, and how they are started on one machine."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from quick_xla import QUICK

from navil_jax import sharding
from navil_jax.errors import UserError
from navil_jax.sharding import start_hosts

ROOT = Path(__file__).parents[1]
TPU_VARIABLES = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_ID", "MEGASCALE_NUM_SLICES")


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
        ("tpu,cpu", {"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "2"}, True),
        ("tpu,cpu", {"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "1"}, False),
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


def test_a_port_that_is_taken_is_said_before_anyone_waits(joined, monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        set_all(monkeypatch, JAX_COORDINATOR_ADDRESS=f"h:{port}", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0")
        with pytest.raises(UserError, match=f"^JAX_COORDINATOR_ADDRESS: port {port} cannot be listened at"):
            start_hosts()
        monkeypatch.setenv("JAX_PROCESS_ID", "1")
        start_hosts()
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    start_hosts()
    assert len(joined) == 2
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host")
    with pytest.raises(UserError, match="must be HOST:PORT"):
        start_hosts()


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


def local(*arguments):
    command = [sys.executable, str(ROOT / "launch" / "local.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICK}
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
