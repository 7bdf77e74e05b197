"""Four CPU devices, quick and shared compilation, and shapes checked against their annotations, for every test."""

import os
import shutil
import tempfile
from collections import Counter

import pytest
from quick_xla import QUICK

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=4 {QUICK}")
# XLA's pool has one thread per core or device. A device whose collective waits holds one; with several collectives in
# flight all are held while a device that must join has none left, and everything stops for good.
os.environ.setdefault("NPROC", "32")
# As navil_jax/train/host_memory.py, for the worker processes of pytest-xdist and those that tests start.
os.environ |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
# Compiled programs of this session: pytest-xdist's workers and the processes that tests start inherit the folder.
PROGRAMS = "JAX_COMPILATION_CACHE_DIR"
OWN_PROGRAMS = PROGRAMS not in os.environ
if OWN_PROGRAMS:
    os.environ[PROGRAMS] = tempfile.mkdtemp(prefix="navil_jax-programs-")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", metavar="FOLDER", help="tests of the chat page put pictures of it there")


def pytest_configure(config: pytest.Config) -> None:
    """Shapes and dtypes that the model and the loss are annotated with are checked in every call (while tracing)."""
    from jaxtyping import install_import_hook  # reads the environment that is set above

    modules = ("attention", "decoder", "experts", "layers", "navil", "rope", "vision")
    install_import_hook([*(f"navil_jax.model.{name}" for name in modules), "navil_jax.train.loss"], "beartype.beartype")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests first, so that pytest-xdist's workers end together."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_unconfigure(config: pytest.Config) -> None:
    if OWN_PROGRAMS:
        shutil.rmtree(os.environ[PROGRAMS], ignore_errors=True)
