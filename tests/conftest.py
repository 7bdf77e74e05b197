"""Four CPU devices for every test, and quick compilation."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",  # compiles in about half the time
)
# XLA's pool has one thread per core or device. A device whose collective waits holds one; with several collectives in
# flight all are held while a device that must join has none left, and everything stops for good.
os.environ.setdefault("NPROC", "32")
# As navil_jax/train/host_memory.py, for the worker processes of pytest-xdist and those that tests start.
os.environ |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
