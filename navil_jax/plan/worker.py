"""The process that compiles: `python -m navil_jax.plan.worker REQUEST.json RESULT.json`, started by `compile`.

It runs apart so that the environment of the TPU compiler is right whatever the caller's is, and so that its memory is
given back. It holds no device: programs are lowered from shapes.
"""

import dataclasses
import json
import math
import re
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from navil_jax.config import Config
from navil_jax.config.plain import from_json
from navil_jax.data.pipeline import batch_spec
from navil_jax.errors import UserError
from navil_jax.generate.programs import Programs
from navil_jax.plan.hlo import summarise
from navil_jax.plan.topology import Slice, parse_topology
from navil_jax.sharding import make_mesh, named, use_rules
from navil_jax.train.step import abstract_state, make_train_step

NEW_TOKENS = 512  # room for answers in a cache


def main(argv: list[str]) -> None:
    request, result = Path(argv[0]), Path(argv[1])
    result.write_text(json.dumps(answer(json.loads(request.read_text()))))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles what is asked for.

    Args:
      request: config (JSON text), topology (name), shape (chips), rows (global), task (train, prefill or decode), hlo
        (a file for the compiled program's text, or empty).

    Returns:
      The fields of `compiling.Compiled` but effort, or `error`: one line, a user's mistake.
    """
    config = from_json(request["config"])
    place = dataclasses.replace(parse_topology(request["topology"]), shape=tuple(request["shape"]))
    try:
        devices = _devices(place)
        use_rules(config.mesh.rules)
        mesh = make_mesh(config.mesh, devices)
        lowered, state = _lower(config, mesh, request)
    except UserError as error:
        return {"error": str(error)}
    found: dict[str, Any] = {
        "device_kind": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "devices": [_place(device) for device in mesh.devices.flat],
        "state": state,
        "memory": None,
        "exhausted": None,
        "refusal": "",
        "program": None,
    }
    began = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "Ran out of memory" not in message:
            raise
        found |= {"exhausted": exhausted_bytes(message, state), "refusal": message.split("\n")[0].partition(": ")[2]}
    else:
        memory, text = compiled.memory_analysis(), compiled.as_text() or ""
        if request.get("hlo"):
            Path(request["hlo"]).write_text(text)
        names = ("argument", "output", "alias", "temp", "generated_code", "host_temp")
        found["memory"] = {name: getattr(memory, f"{name}_size_in_bytes") for name in names}
        found["program"] = dataclasses.asdict(summarise(text))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return found | {"seconds": time.monotonic() - began, "host_bytes": usage.ru_maxrss * 1024}


def _place(device: Any) -> list[int]:
    """Where a device is: x, y, z, core and slice."""
    return [*device.coords, device.core_on_chip, getattr(device, "slice_index", None) or 0]


def _devices(place: Slice) -> list[Any]:
    try:
        topology = topologies.get_topology_desc(platform="tpu", **place.libtpu_options)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"--topology: the TPU compiler cannot set up {place.name}: {' '.join(str(error).split())}"
        ) from error
    return list(topology.devices)


def _lower(config: Config, mesh: Mesh, request: dict[str, Any]) -> tuple[jax.stages.Lowered, dict[str, float]]:
    """The program before it is compiled, and the bytes of its arguments by category."""
    spec, state = batch_spec(config), abstract_state(config, mesh)
    batch = spec.abstract(named(mesh, "batch"))
    if request["task"] == "train":
        return make_train_step(config, mesh).lower(state, batch), {
            "batch": _device_bytes(batch),
            "trained parameters": _device_bytes(state.trainable),
            "frozen parameters": _device_bytes(state.frozen),
            "optimizer state": _device_bytes(state.optimizer),
            "average of parameters": _device_bytes(state.ema),
        }
    lowered = Programs(config.model, None, mesh).lower(spec, NEW_TOKENS)[request["task"]]
    return lowered, {"parameters": _device_bytes((state.trainable, state.frozen))}


def _device_bytes(tree: Any) -> float:
    """Bytes that a device holds of abstract sharded arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def exhausted_bytes(message: str, state: Mapping[str, float]) -> float | None:
    """HBM that the compiler says a program would need; None where another memory is exhausted.

    Args:
      state: bytes of the arguments, which one of the two messages leaves out.

    Examples: "... in memory space hbm. Used 20.50G of 15.75G hbm. ..." -> 20.5 * 2**30;
    "... total memory required for HLO temporaries (25.08G) exceeds available HBM (15.75G)" -> that and the state
    """
    if found := re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message):
        return float(found[1]) * _UNITS[found[2]]
    if found := re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds", message):
        return float(found[1]) * _UNITS[found[2]] + sum(state.values())
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
