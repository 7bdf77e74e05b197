"""Freed memory is kept."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROUNDS = 20
SCRIPT = f"""
import resource, sys, threading
import numpy as np
if sys.argv[1] == "kept":
    from navil_jax.train.host_memory import keep_freed_memory
    keep_freed_memory()

def work():
    for _ in range({ROUNDS}):
        np.ones(2**22)  # 32 MiB

work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    settings = kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", SCRIPT, mode]
    return int(subprocess.run(command, env=settings, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back so soon")
def test_a_later_round_needs_no_fresh_pages():
    pages = 2**25 // os.sysconf("SC_PAGE_SIZE")
    assert page_faults("given back") > 4 * page_faults("kept")
    assert page_faults("kept") < 2 * pages
