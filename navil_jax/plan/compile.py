"""Compiles for a TPU slice in a process of its own, and remembers what came out of it.

JAX's persistent cache never hits for programs that are compiled ahead of time for a topology, so the results (a few
kilobytes each) are kept: under $NAVIL_PLAN_CACHE, or ~/.cache/navil_jax/plans. Their names follow from the config, the
slice, the versions of JAX and of the compiler, and the sources that shape the program.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from navil_jax.config import Config, SourceConfig
from navil_jax.config.plain import to_json
from navil_jax.console import waiting
from navil_jax.errors import UserError
from navil_jax.paths import at_home
from navil_jax.plan.hlo import Collective, Kernel, Loop, Program
from navil_jax.plan.topology import Slice

LIBTPU = "jax[tpu]>=0.10.2,<0.13"  # what `pip install` must get: the compiler that fits the JAX there
PACKAGE = Path(__file__).parents[1]
_SOURCES = (
    "batch.py",
    "config",
    "generate",
    "model",
    "plan/hlo.py",
    "plan/topology.py",
    "plan/worker.py",
    "sharding.py",
    "train",
)

Task = Literal["train", "prefill", "decode"]
Effort = Literal["full", "fast"]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the TPU compiler says of one program; bytes are those of one device."""

    device_kind: str
    mesh: dict[str, int]
    devices: list[list[int]]  # of every place in the mesh: x, y, z, core, slice
    state: dict[str, float]  # bytes of arguments by category
    memory: dict[str, float] | None  # None: it does not fit
    exhausted: float | None  # bytes of HBM that it would need, where it does not fit and the compiler says so
    refusal: str  # what the compiler says where it does not fit
    program: Program | None
    seconds: float  # of compiling
    host_bytes: float  # memory of the compiling process
    effort: Effort

    @property
    def total(self) -> float:
        """Bytes of HBM that a device needs; infinite where another memory is exhausted."""
        if self.memory is None:
            return math.inf if self.exhausted is None else self.exhausted
        size = self.memory
        return size["argument"] + size["output"] - size["alias"] + size["temp"] + size["generated_code"]


def compile_for(
    config: Config, place: Slice, rows: int, task: Task = "train", effort: Effort = "full", hlo: str = ""
) -> Compiled:
    """Compiles a program of this config for a slice, or finds it among those compiled before.

    Args:
      rows: of the global batch.
      effort: fast takes a fifth to a half of the time; memory is right to about a tenth and its cycles mean nothing.
      hlo: file for the program's text (then it is always compiled).

    Raises:
      UserError: libtpu is missing, the mesh does not fit the slice, or the compiler knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"the TPU compiler is missing; install it: pip install '{LIBTPU}' (no TPU is needed)")
    request = {"config": to_json(_relevant(config, rows)), "topology": place.name, "rows": rows, "task": task}
    request["shape"] = list(place.shape)
    file = cache_folder() / f"{_key(request, effort)}.json"
    if file.is_file() and not hlo:
        answer = json.loads(file.read_text())
    else:
        with waiting(f"compiling {task} for {place.name}, {rows} rows{' (fast)' if effort == 'fast' else ''}"):
            answer = _ask(request | {"hlo": hlo}, effort)
        if "error" in answer:
            raise UserError(answer["error"])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(answer))
    answer["program"] = _program(answer["program"]) if answer["program"] else None
    return Compiled(**answer, effort=effort)


def _relevant(config: Config, rows: int) -> Config:
    """The config without what does not change the program."""
    sources = tuple(
        SourceConfig(f"source{number}", max_patches=source.max_patches)
        for number, source in enumerate(config.data.sources)
    )
    data = dataclasses.replace(config.data, sources=sources, rows=rows, streams=0, balance_window=1)
    data = dataclasses.replace(data, tokenizer="", system_message="", quarantine="")
    return dataclasses.replace(config, data=data, workdir="", init_from="", resume_with="", init_model=False)


def cache_folder() -> Path:
    """Where compiled plans and measured kernels are kept."""
    named = os.environ.get("NAVIL_PLAN_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(at_home(named)) if named else Path(home) / "navil_jax" / "plans"


def _key(request: dict[str, Any], effort: Effort) -> str:
    found = hashlib.sha256(json.dumps([request, effort], sort_keys=True).encode())
    if flags := os.environ.get("LIBTPU_INIT_ARGS"):  # the compiler reads it too
        found.update(flags.encode())
    for package in ("jax", "jaxlib", "libtpu", "flax", "optax"):
        found.update(f"{package} {importlib.metadata.version(package)}".encode())
    for source in _SOURCES:
        path = PACKAGE / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.update(file.read_bytes())
    return found.hexdigest()[:32]


def _ask(request: dict[str, Any], effort: Effort) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        question.write_text(json.dumps(request))
        command = [sys.executable, "-m", "navil_jax.plan.worker", str(question), str(answer)]
        done = subprocess.run(command, env=compiler_environment(effort), capture_output=True, text=True)
        if done.returncode < 0:
            raise UserError(
                f"the TPU compiler crashed (signal {-done.returncode}) on {request['task']} for {request['topology']}; "
                "try another --mesh, or other slots"
            )
        if unknown := re.search(r"Unknown command line flag '(.+)'", done.stderr):
            raise UserError(f"LIBTPU_INIT_ARGS: this TPU compiler has no flag --{unknown[1]}")
        if done.returncode or not answer.is_file():
            raise RuntimeError(f"the compiling process failed ({done.returncode}):\n{done.stderr[-4000:]}")
        return json.loads(answer.read_text())


def compiler_environment(effort: Effort) -> dict[str, str]:
    """This process's environment, made right for a TPU compiler without a TPU."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS" and not name.startswith("JAX_")}
    quiet = dict.fromkeys(("TPU_STDERR_LOG_LEVEL", "TPU_MIN_LOG_LEVEL", "TF_CPP_MIN_LOG_LEVEL"), "3")
    return {
        **kept,
        **quiet,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])),
        **({"JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0"} if effort == "fast" else {}),
    }


def _program(plain: dict[str, Any]) -> Program:
    """A `Program` from what JSON kept of it."""

    def kernel(name: str, operands: Sequence[str], settings: str, label: str) -> Kernel:
        return Kernel(name, tuple(operands), settings, label)

    def collective(kind: str, size: float, devices: Sequence[int], overlapped: bool, label: str) -> Collective:
        return Collective(kind, size, tuple(devices), overlapped, label)

    return Program(
        tuple(
            Loop(
                loop["name"],
                loop["runs"],
                loop["cycles"],
                tuple(collective(*entry) for entry in loop["collectives"]),
                tuple(kernel(*entry) for entry in loop["kernels"]),
            )
            for loop in plain["loops"]
        )
    )
