"""How the C library hands out memory, where XLA computes on a CPU."""

import contextlib
import ctypes
import glob

from navil_jax.sharding import jax_setting

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # of glibc's mallopt
_KEPT = 2**31 - 1  # bytes free at the end of the heap before they are given back
_GROWTH = 2**28  # bytes by which the heap grows


def keep_freed_memory() -> None:
    """Lets this process keep what a step frees, for the next step needs it again; call it before JAX has devices.

    Otherwise glibc gives large blocks back to the system, and every step pays for fresh pages: 30,000 page faults and
    40% more CPU time a step of a small model. One heap serves all threads, since those of further threads cannot hold
    large blocks. On a machine with an accelerator, and with other C libraries than glibc, nothing changes.
    """
    if jax_setting("jax_platforms") not in (None, "", "cpu") or glob.glob("/dev/nvidia[0-9]*"):
        return
    with contextlib.suppress(AttributeError):  # musl, macOS
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _GROWTH)):
            mallopt(option, value)
