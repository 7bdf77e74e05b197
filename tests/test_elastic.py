"""A run goes on with another number of hosts, devices and mesh shape: the same rows, every sample once."""

import dataclasses
import json
import re
import shutil
import signal
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_sources import TOKENIZER, assert_equal, config, made, samples_of
from quick_xla import QUICK

from benchmarks import elastic
from benchmarks.elastic import losses, rows_by_step
from navil_jax.batch import Batch
from navil_jax.config import Config, MeshConfig
from navil_jax.data.pipeline import make_dataset
from navil_jax.data.streams import divisors, sample_counts, streams_of, with_streams
from navil_jax.errors import UserError
from navil_jax.model.params import flatten
from navil_jax.sharding import make_mesh
from navil_jax.train.__main__ import main
from navil_jax.train.checkpoint import Checkpoints
from navil_jax.train.step import abstract_state

RECIPE = Path(__file__).parent / "toy_recipe.py"


class Hosts:
    """The data of a run on several hosts, in this process."""

    def __init__(self, settings_: Config, hosts: int):
        sources = [made(30), made(9, seed=1)]
        self._hosts = [iter(make_dataset(settings_, sources, TOKENIZER, i, hosts)) for i in range(hosts)]

    def step(self) -> Batch:
        """The global batch."""
        return jax.tree.map(lambda *rows: np.concatenate(rows), *map(next, self._hosts))

    def states(self) -> dict[str, dict]:
        """The state of every stream, as a checkpoint holds it."""
        return json.loads(json.dumps({n: s for host in self._hosts for n, s in host.get_state()["streams"].items()}))

    def restore(self, states: dict[str, dict]) -> None:
        for host in self._hosts:
            own = host.get_state()
            host.set_state(own | {"streams": {number: states[number] for number in own["streams"]}})

    def counts(self) -> Counter:
        return sum((Counter(sample_counts(host)) for host in self._hosts), Counter())


@settings(max_examples=12, deadline=None)
@given(data=st.data(), streams=st.sampled_from([1, 2, 3, 4, 6, 8]), each=st.integers(1, 2), window=st.integers(1, 3))
def test_elastic_streams_give_the_same_rows_on_any_number_of_hosts(
    data: st.DataObject, streams: int, each: int, window: int
) -> None:
    """Hosts change after every few steps; one host serves all streams of the run that it is compared with."""
    settings_ = config(2, rows=streams * each, streams=streams, balance_window=window, packing_lookahead=1, threads=1)
    whole, states = Hosts(settings_, 1), None
    for _ in range(3):
        hosts = Hosts(settings_, data.draw(st.sampled_from(divisors(streams)), "hosts"))
        if states is not None:
            hosts.restore(states)
        for _ in range(data.draw(st.integers(1, 3), "steps")):
            assert_equal(hosts.step(), whole.step())
        states = hosts.states()
        assert states == whole.states()
        assert hosts.counts() == whole.counts()
        assert len(states) == streams


def test_elastic_streams_give_each_sample_once_in_an_epoch() -> None:
    """Also where the hosts change in the middle of it; what was read has come or waits."""
    settings_ = config(rows=4, streams=4, packing_lookahead=1)
    sources = [made(400)]
    seen: Counter = Counter()
    states = None
    for hosts in (4, 2, 1, 4):
        iterators = [iter(make_dataset(settings_, sources, TOKENIZER, i, hosts)) for i in range(hosts)]
        for iterator in iterators:
            if states is not None:
                own = iterator.get_state()
                iterator.set_state(own | {"streams": {n: states[n] for n in own["streams"]}})
            for _ in range(3):
                seen.update(samples_of(next(iterator)))
        states = {n: s for iterator in iterators for n, s in iterator.get_state()["streams"].items()}
    read = sum(state["parent"]["reader"]["next_index"] for state in states.values())
    waiting = sum(len(state["parent"]["waiting"]) for state in states.values())
    assert max(seen.values()) == 1
    assert len(seen) == read - waiting > 100


def test_elastic_hosts_must_divide_the_streams() -> None:
    with pytest.raises(UserError, match=r"streams: 4 processes cannot share the 6 streams .*; go on with 1, 2, 3 or 6"):
        streams_of(config(rows=12, streams=6), 0, 4)
    with pytest.raises(UserError, match=r"^config\.data\.rows: 6 rows do not divide by 4 streams .*take 1, 2, 3 or 6$"):
        with_streams(config(rows=6), 4)
    assert with_streams(config(rows=6), 3).data.streams == 3
    assert with_streams(config(rows=6), 3, saved=6).data.streams == 6
    assert [list(streams_of(config(rows=6, streams=6), host, 3)) for host in range(3)] == [[0, 1], [2, 3], [4, 5]]


STREAMS, EVERY, STEPS = 4, 3, 12  # a save falls between the two steps of a window
FLAGS = {"data.streams": STREAMS, "data.balance_window": 2, "checkpoint_every": EVERY, "keep_checkpoints": 9}
FLAGS |= {"eval_every": 0, "model.decoder.num_kv_heads": 2, "optimizer.peak_learning_rate": 1e-3, "model.remat": "none"}
# Processes, devices of each, mesh axes, step at which it ends.
LEGS = (
    (4, 1, {"fsdp": 4}, 3),
    (2, 2, {"data": 2, "tensor": 2, "fsdp": 1}, 6),
    (1, 1, {}, STEPS),
)


def flags(workdir: Path, steps: int = STEPS, mesh: dict[str, int] | None = None) -> list[str]:
    changes = FLAGS | {"steps": steps} | {f"mesh.{axis}": size for axis, size in (mesh or {}).items()}
    given_ = [f"--config.{key}={value}" for key, value in changes.items()]
    return ["--config", str(RECIPE), f"--config.workdir={workdir}", *given_]


def train(workdir: Path, processes: int, devices: int, given_: list[str], hit: str = "") -> tuple[int, str]:
    """As the benchmark's, with programs that compile quickly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", QUICK)
        return elastic.train(workdir, processes, devices, given_, hit)


def saved(workdir: Path, step: int = STEPS) -> tuple[dict[str, np.ndarray], dict[str, dict]]:
    """Parameters after the last step, and the states of the streams."""
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        assert checkpoints.latest_step == step
        assert checkpoints.streams == STREAMS
        run = dataclasses.replace(checkpoints.record().config, mesh=MeshConfig())
        assert run.data.streams == STREAMS
        wanted = abstract_state(run, make_mesh(run.mesh, jax.devices()[:1])).params
        params = flatten(jax.device_get(checkpoints.restore_params(wanted)))
    iterator = workdir / "checkpoints" / str(step) / "iterator"
    states = {path.stem: json.loads(path.read_text()) for path in iterator.glob("*.json")}
    return params, states


def check_like(workdir: Path, other: Path) -> None:
    """Rows and states of the data are equal; losses and parameters but for the order of float32 sums."""
    assert rows_by_step(workdir) == rows_by_step(other)
    np.testing.assert_allclose(losses(workdir), losses(other), rtol=1e-4)
    (params, states), (expected, expected_states) = saved(workdir), saved(other)
    assert states == expected_states
    assert set(params) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(params[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    status, output = train(workdir, 1, 1, flags(workdir))
    assert status == 0, output
    assert len(losses(workdir)) == len(rows_by_step(workdir)) == STEPS
    return workdir


@pytest.mark.slow
def test_elastic_run_of_four_two_and_one_processes_is_as_if_undisturbed(undisturbed: Path, tmp_path: Path) -> None:
    for processes, devices, mesh, steps in LEGS:
        status, output = train(tmp_path, processes, devices, flags(tmp_path, steps, mesh))
        assert status == 0, output
    check_like(tmp_path, undisturbed)


def copied(run: Path, workdir: Path, step: int) -> None:
    """A run that has come to `step`, of another one."""
    shutil.copytree(run / "checkpoints" / str(step), workdir / "checkpoints" / str(step))
    shutil.copy(run / "metrics.jsonl", workdir)


@pytest.mark.slow
def test_elastic_run_keeps_its_streams(undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another number is refused; a number of processes that does not divide them too, by all of these."""
    copied(undisturbed, tmp_path, EVERY)
    assert main([flag.replace("streams=4", "streams=2") for flag in flags(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "data.streams was 4 and is 2; set config.workdir to a new folder\n" in said
    status, output = train(tmp_path, 3, 1, flags(tmp_path))
    assert status == 2
    assert output.count("share the 4 streams of data of this run alike; go on with 1, 2 or 4 of them, ") == 3


@pytest.mark.slow
def test_elastic_run_goes_on_exactly_after_a_signal_to_one_of_two_processes(undisturbed: Path, tmp_path: Path) -> None:
    """SIGTERM: all save the same step. SIGKILL: the other says so in one line, within the launcher's 3 s."""
    status, output = train(tmp_path, 2, 1, flags(tmp_path), f"1 {int(signal.SIGTERM)} 2")
    assert status == 128 + signal.SIGTERM, output
    (stopped,) = re.findall(r"stopped after step (\d+) of 12, saved \d+\.\d s after all processes knew", output)
    assert 2 <= int(stopped) < 10
    status, output = train(tmp_path, 2, 1, flags(tmp_path), f"1 {int(signal.SIGKILL)} 10")
    assert status == 128 + signal.SIGKILL
    assert output.count("going on after step") == 1
    lines = [line for line in output.splitlines() if line.startswith("0: ")]
    assert lines[-1].startswith("0: error: process 1 of 2 has died (killed, out of memory or a "), output
    assert not re.search("Traceback|fault of navil_jax|Check failure", output)
    status, output = train(tmp_path, 1, 1, flags(tmp_path))
    assert status == 0, output
    check_like(tmp_path, undisturbed)


@pytest.mark.slow
def test_elastic_run_ends_in_two_lines_where_one_of_two_processes_cannot_read_its_disk(tmp_path: Path) -> None:
    status, output = train(tmp_path, 2, 1, flags(tmp_path), "1 0 4")
    assert status in (1, 2)
    assert "1: error: disk: Input/output error; check the disk and run the same command again\n" in output
    assert "0: error: process 1 of 2 has failed, as its output says; process 0 ends too, " in output
    assert not re.search("Traceback|fault of navil_jax|Check failure", output)
