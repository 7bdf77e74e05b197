"""What processes of a run tell each other through JAX's coordinator, without a word between devices."""

from collections.abc import Callable

import jax
from jax._src.distributed import global_state

AGREE_SECONDS = 600  # for the first process to come to the same step
WAITS = "navil/wait/"


def agreed(key: str, decide: Callable[[], str]) -> str:
    """What the first process decides, on every process; each key is used once."""
    client = global_state.client
    if jax.process_count() == 1 or client is None:
        return decide()
    if jax.process_index() == 0:
        said = decide()
        client.key_value_set(key, said)
        return said
    return client.blocking_key_value_get(key, AGREE_SECONDS * 1000)


def data_waits(own: float) -> list[float]:
    """The share of its time that each process waited for data, as it told last, on the first process; elsewhere []."""
    client = global_state.client
    if jax.process_count() == 1 or client is None:
        return [own]
    client.key_value_set(f"{WAITS}{jax.process_index()}", repr(own), allow_overwrite=True)
    if jax.process_index():
        return []
    told = {int(key.rpartition("/")[2]): float(value) for key, value in client.key_value_dir_get(WAITS)}
    return [told.get(process, 0.0) for process in range(jax.process_count())]
