"""Traces of chosen steps are written, and the memory of the devices is logged where they know it."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from navil_jax.config import Config
from navil_jax.config.flags import apply_overrides
from navil_jax.errors import UserError
from navil_jax.train.metrics import MetricsLog, Throughput, progress_fields, read_log
from navil_jax.train.profiling import Profiler, compilations, peak_memory

DONE = Throughput(2.0, 4, tokens=900, images=6, patches=300, token_slots=1000, patch_slots=400, memory=3 << 29)


def run(profiler, steps):
    for step in steps:
        profiler.begin(step)
        profiler.end(step, jnp.ones(8) * step)


def test_chosen_steps_are_traced_once(tmp_path):
    run(Profiler((2, 3), tmp_path / "profile"), range(1, 6))
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


@pytest.mark.parametrize(("steps", "first"), [((), 1), ((2, 3), 3)])
def test_nothing_is_traced_unasked_or_after_the_first_step(tmp_path, steps, first):
    run(Profiler(steps, tmp_path / "profile"), range(first, 6))
    run(Profiler((2, 3), None), range(1, 6))
    assert not list(tmp_path.iterdir())


def test_compilations_are_counted_by_name():
    def counted(x):
        return x + 1

    with compilations("counted") as seconds:
        for size in (2, 3, 3):
            jax.jit(counted)(jnp.ones(size))
            jax.jit(lambda x: x * 2)(jnp.ones(size))
    jax.jit(counted)(jnp.ones(4))
    assert len(seconds) == 2
    assert min(seconds) > 0


@pytest.mark.parametrize("text", ["5", "4,3", "1,2,3"])
def test_steps_that_are_no_range(text):
    with pytest.raises(UserError, match=r"^config.profile_steps: must be the first and the last step to trace"):
        apply_overrides(Config(), {"profile_steps": text})


def test_peak_memory_is_that_of_the_fullest_device(monkeypatch):
    assert peak_memory() is None  # CPU
    devices = [SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n}) for n in (5, 7, 6)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_memory() == 7


def test_peak_memory_is_logged_and_shown(tmp_path):
    log = MetricsLog(tmp_path)
    log.write_timing(4, DONE)
    log.close()
    assert read_log(tmp_path / "timings.jsonl")[0]["peak_memory_gib"] == 1.5
    assert "  peak memory 1.5 GiB  " in "  ".join(progress_fields(40, 100, 2.31, 5e-5, DONE))
