"""Four CPU devices for every test, and quick compilation."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"  # compiles in about half the time
    " --xla_cpu_collective_call_terminate_timeout_seconds=600",  # four devices on two busy cores may wait long
)
