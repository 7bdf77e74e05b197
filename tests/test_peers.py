"""Watching over the processes of a run: a death is named also where what was computed with the dead fails first."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import os, signal, sys, time
import jax
from navil_jax.sharding import start_hosts
start_hosts()
from navil_jax.train import peers
heard = peers.Peers._note
def late(self, number, what):
    time.sleep({late})
    heard(self, number, what)
peers.Peers._note = late
with peers.Peers():
    if jax.process_index() == {killed}:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    raise RuntimeError("connection closed by peer")
"""


@pytest.mark.parametrize(("killed", "late"), [(1, 0.5), (0, 0)])
def test_a_death_is_named_where_the_survivor_fails_before_it_hears_of_it(killed: int, late: float) -> None:
    """Where the first process dies JAX aborts the others within a second, so there the word of it comes undelayed."""
    started = [sys.executable, "launch/local.py", "--processes", "2", "--devices", "1"]
    program = [sys.executable, "-c", PROGRAM.format(killed=killed, late=late)]
    done = subprocess.run([*started, "--", *program], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 128 + signal.SIGKILL
    assert f"{1 - killed}: error: process {killed} of 2 has died" in done.stdout, done.stdout + done.stderr
    assert not re.search("Traceback|Check failure", done.stdout)
