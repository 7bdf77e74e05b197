"""Compiled programs are kept in the bucket: a restart compiles nothing anew."""

import os
import subprocess
import sys
from pathlib import Path

import bucket_server
import pytest
from launched import dry_run, manifest

SCRIPT = """
import jax
import jax.numpy as jnp

found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
print(sum(name.endswith("/cache_misses") for name in found), sum(name.endswith("/cache_hits") for name in found))
"""


@pytest.mark.slow
def test_a_restart_finds_the_programs_of_the_first_start(tmp_path: Path):
    job = manifest(dry_run(tmp_path, "jobset", "manifest", "--", "python", "-c", SCRIPT).out)["spec"]["replicatedJobs"]
    command = job[0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[:3] == ["env", "JAX_COMPILATION_CACHE_DIR=gs://my-bucket/compiled", "python"]
    command[2] = sys.executable
    with bucket_server.serve() as bucket:
        settings = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}
        environment = os.environ | bucket.environment | settings
        counts = [
            list(map(int, subprocess.check_output(command, env=environment, text=True, timeout=120).split()))
            for _ in range(2)
        ]
        assert [name for name in bucket.objects if name.startswith("my-bucket/compiled/")] != []
    assert counts[0][0] > 0 and counts[0][1] == 0
    assert counts[1] == [0, counts[0][0]]
