"""Several processes at one evaluation: each answers a share of the questions on its own devices, and all get all."""

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src.distributed import global_state
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from navil_jax.config import MeshConfig, ModelConfig
from navil_jax.errors import UserError
from navil_jax.generate.engine import BATCH_SLOTS
from navil_jax.model import params as model_params
from navil_jax.model.params import Params
from navil_jax.sharding import make_mesh

Item = TypeVar("Item")
ROUND = 4 * BATCH_SLOTS  # questions of a process between two exchanges; so many are asked again after a crash
WAIT_MS = 7 * 24 * 3600 * 1000  # for the slowest process; a dead one is noticed by `train.peers`
_rounds, _exchanges = itertools.count(1), itertools.count()


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order; what JSON can hold. Every process must call it."""
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return [value]
    client, number = global_state.client, next(_exchanges)
    assert client is not None
    client.key_value_set_bytes(f"navil/{number}/{index}", json.dumps(value).encode())
    said = [client.blocking_key_value_get_bytes(f"navil/{number}/{process}", WAIT_MS) for process in range(count)]
    if number:  # who takes part in this exchange has read all of the one before
        client.key_value_delete(f"navil/{number - 1}/{index}")
    return [json.loads(text) for text in said]


def on_first(work: Callable[[], Any]) -> Any:
    """What `work` gives on the first process, on all of them; a `UserError` that it raises there is raised on all."""
    result, fault = None, ""
    if jax.process_index() == 0:
        try:
            result = work()
        except UserError as error:
            fault = str(error)
    result, fault = gather((result, fault))[0]
    if fault:
        raise UserError(fault)
    return result


def together(
    items: Sequence[Item], work: Callable[[Sequence[Item]], Iterable[Any]], stopped: Callable[[], bool] = lambda: False
) -> Iterator[Any]:
    """Results in the order of their items, on every process; each works on its share of every round.

    Args:
      work: items -> a result for each, in order; what JSON can hold.
      stopped: is asked after every round of several processes.

    Raises:
      UserError: that of the first item, on any process, for which `work` raises one; after the results before it.
      KeyboardInterrupt: `stopped` says so.
    """
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        yield from work(items)
        return
    for start in range(0, len(items), ROUND * count):
        block = items[start : start + ROUND * count]
        done: list[Any] = []
        fault = ""
        try:
            done.extend(work(block[index::count]))
        except UserError as error:
            fault = str(error)
        shares = gather((done, fault))
        yield from itertools.takewhile(_is_there, (_at(shares[n % count][0], n // count) for n in range(len(block))))
        if faults := [said for _, said in shares if said]:
            raise UserError(faults[0])
        if stopped():
            raise KeyboardInterrupt


_NOTHING = object()


def _at(results: list[Any], number: int) -> Any:
    return results[number] if number < len(results) else _NOTHING


def _is_there(result: Any) -> bool:
    return result is not _NOTHING


def preempted() -> bool:
    """Whether SIGTERM has come to one of several processes; all hear it after the same round."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(next(_rounds))


def own_mesh() -> Mesh:
    """The devices of this process, which runs requests of its own; parameters are split over them."""
    return make_mesh(MeshConfig(), jax.local_devices())


def on_own_devices(config: ModelConfig, params: Params, mesh: Mesh) -> tuple[Params, Mesh]:
    """The parameters, which the processes hold together, whole on the devices of each; and the mesh of these.

    In one process nothing changes. A device needs room for its share of a copy, in the dtype that is computed in.
    """
    if jax.process_count() == 1:
        return params, mesh
    meshes = [make_mesh(MeshConfig(), of) for of in _devices_by_process()]
    grid = np.stack([each.devices for each in meshes])
    everyone = Mesh(grid, ("process", *mesh.axis_names), axis_types=(jax.sharding.AxisType.Auto,) * grid.ndim)
    own = meshes[jax.process_index()]
    placed = model_params.flatten(model_params.shardings(config, own))
    dtypes = model_params.computed_dtypes(config)
    copied = {
        name: _copied(value, dtypes.get(name, value.dtype), everyone, placed[name])
        for name, value in model_params.flatten(params).items()
    }
    return model_params.unflatten(copied), own


def _devices_by_process() -> list[list[jax.Device]]:
    found: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        found.setdefault(device.process_index, []).append(device)
    return [found[process] for process in sorted(found)]


def _copied(value: jax.Array, dtype: Any, everyone: Mesh, own: NamedSharding) -> jax.Array:
    """One parameter, as `on_own_devices`: first laid out alike on every process, then taken as this one's alone."""
    alike = NamedSharding(everyone, PartitionSpec(*own.spec))
    value = jax.device_put(_cast(dtype)(value), alike)
    shards = {shard.device: shard.data for shard in value.addressable_shards}
    parts = [shards[device] for device in own.addressable_devices_indices_map(value.shape)]
    return jax.make_array_from_single_device_arrays(value.shape, own, parts)


@functools.cache
def _cast(dtype: Any) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda value: value.astype(dtype))
