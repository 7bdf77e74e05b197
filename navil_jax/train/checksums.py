"""Checksums of checkpoints: no changed byte of the parameters, of the place in the data or of the record goes unseen.

Arrays are Zarr 3 chunks that each end with a CRC-32C, which TensorStore compares whenever it reads one. It costs less
than the compression that Orbax would use in its place, and trained weights shrink by little.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import grain
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint._src.serialization import tensorstore_utils

from navil_jax.errors import UserError
from navil_jax.paths import absolute

ARRAYS = ("params", "optimizer", "ema")  # items of a checkpoint
CODECS = ({"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"})
DIGEST = "sha256"


def _zarr3_metadata(global_shape: tuple[int, ...], chunk_shape: tuple[int, ...], use_compression: bool) -> dict:
    """In the place of Orbax's own, which has no checksums of values and no setting for them."""
    del use_compression
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk_shape}}
    return {"shape": global_shape, "chunk_grid": grid, "codecs": [*CODECS]}


tensorstore_utils._build_zarr3_metadata = _zarr3_metadata


def array_handler() -> ocp.PyTreeCheckpointHandler:
    """Writes trees of arrays with checksums; reads older ones without them as well."""
    return ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)


class IteratorHandler(grain.checkpoint.CheckpointHandler):
    """The place in the data of each stream, `stream_<number>-of-<count>.json` with a CRC-32 beside it.

    Each process writes and reads those of the streams that it serves, so any number of processes can go on. Before
    0.2.0 a process was a stream and its file called `process_<number>-of-<count>.json`, which is read as well.
    """

    def save(self, directory: epath.Path, item: Any = None, args: Any = None) -> None:
        own = (item or args.item).get_state()
        for number, state in own["streams"].items():
            path, text = directory / f"stream_{number}-of-{own['count']}.json", json.dumps(state, indent=4)
            path.write_text(text)
            path.with_suffix(".crc32").write_text(str(zlib.crc32(text.encode())))

    def restore(self, directory: epath.Path, item: Any = None, args: Any = None) -> Any:
        check_states(directory)
        iterator = item or args.item
        own = iterator.get_state()
        for number in own["streams"]:
            name = f"_{number}-of-{own['count']}.json"
            before = directory / f"process{name}"
            path = before if before.exists() else directory / f"stream{name}"
            own["streams"][number] = json.loads(path.read_text())
        iterator.set_state(own)
        iterator.start_prefetch()
        return iterator


def count_streams(iterator: epath.Path) -> int:
    """How many streams of data a checkpoint holds, or 0 if none; raises `ValueError` unless all are there."""
    names = [path.stem for kind in ("stream", "process") for path in iterator.glob(f"{kind}_*-of-*.json")]
    counts = {int(name.rpartition("-")[2]) for name in names}
    if counts and counts != {len(names)}:
        raise ValueError(f"holds {len(names)} of {max(counts)} streams of data")
    return len(names)


@ocp.args.register_with_handler(IteratorHandler, for_save=True)
@dataclasses.dataclass
class SaveIterator(ocp.args.CheckpointArgs):
    item: grain.DatasetIterator


@ocp.args.register_with_handler(IteratorHandler, for_restore=True)
@dataclasses.dataclass
class RestoreIterator(ocp.args.CheckpointArgs):
    item: grain.DatasetIterator


def check_states(iterator: epath.Path) -> None:
    """Raises `ValueError` if a stream's place in the data is not what was written."""
    for said in iterator.glob("*.crc32"):
        state = said.with_suffix(".json")
        if said.read_text() != str(zlib.crc32(state.read_bytes())):
            raise ValueError(f"{state.name} is not what was written")


def sealed(said: dict[str, Any]) -> dict[str, Any]:
    """A record with its SHA-256."""
    return {**said, DIGEST: _digest(said)}


def unsealed(said: dict[str, Any]) -> dict[str, Any]:
    """The record without its SHA-256. Raises `ValueError` if it is not what was written."""
    rest = {key: value for key, value in said.items() if key != DIGEST}
    if said.get(DIGEST, _digest(rest)) != _digest(rest):
        raise ValueError("the record is not what was written")
    return rest


def _digest(said: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


class _TidyLoop(asyncio.SelectorEventLoop):
    """Ends what still runs before it closes: when one read of Orbax fails, the others would print tracebacks."""

    def close(self) -> None:
        if not (self.is_closed() or self.is_running()):
            tasks = asyncio.all_tasks(self)
            for task in tasks:
                task.cancel()
            self.run_until_complete(asyncio.wait(tasks) if tasks else asyncio.sleep(0))
        super().close()


@contextlib.contextmanager
def tidy_loops() -> Iterator[None]:
    """Orbax reads quietly in here, also where a read fails."""
    with mock.patch.object(asyncio, "new_event_loop", _TidyLoop):
        yield


def is_damage(error: Exception) -> bool:
    """Whether the libraries raise this for a damaged file."""
    wrong_text = (ValueError, LookupError, TypeError, AttributeError, AssertionError, NotImplementedError)
    return isinstance(error, (OSError, *wrong_text)) or type(error) is Exception


def told(error: BaseException) -> str:
    """One line for what a library says of a file that it cannot read; a damaged array by its parameter."""
    while error.__cause__:
        error = error.__cause__
    text = str(error) or type(error).__name__
    if found := re.search(r'"([^"/]+)/[^"/]+(?:/[\d/]*)?" in OCDBT database at [^"]*"(?:[^"]*/)?([^"/]+)/+"', text):
        why = "was changed on disk, its checksum is another" if "Digest mismatch" in text else "cannot be read"
        return f"{found[2]}: {found[1].replace('.', '/')} {why}"
    return text.strip().split("\n")[0].split(" [tensorstore_spec")[0]


@contextlib.contextmanager
def reading(step: epath.Path, *items: str) -> Iterator[None]:
    """Turns missing items of a checkpoint, and failures to read them, into a `UserError` that says what can be used."""
    for name in items:
        if not (step / name / ("_METADATA" if name in ARRAYS else "")).exists():
            alone = (
                ""
                if name in ("params", "record")
                else "if it holds parameters only, start from it with config.init_from; "
            )
            raise DamagedCheckpoint(step, f"{name} is missing", f"{alone}if half copied, ")
    try:
        with tidy_loops():
            yield
    except Exception as error:
        if not is_damage(error):
            raise
        raise DamagedCheckpoint(step, f"cannot be read ({told(error)})") from error


class DamagedCheckpoint(UserError):
    """A checkpoint that cannot be used. Every older one is read, until one is whole.

    Attributes:
      step: its folder.
      why: what is wrong with it.
      older: steps of the newest older one that is whole; None if there is none.
    """

    def __init__(self, step: epath.Path, why: str, before: str = "") -> None:
        self.step, self.why, self.older = step, why, _whole(step)
        way = "copy it again or start anew, as there is no older one that is whole"
        if self.older is not None:
            way = f"delete this folder to use step {self.older}, which is whole"
        super().__init__(f"{step}: {why}; {before}{way}")


def _whole(step: epath.Path) -> int | None:
    """The newest checkpoint before `step` that is whole."""
    steps = (int(entry.name) for entry in step.parent.iterdir() if entry.name.isdecimal())
    for older in sorted((number for number in steps if number < int(step.name)), reverse=True):
        try:
            check_all(step.parent / str(older))
        except Exception as error:
            if not is_damage(error):
                raise
        else:
            return older
    return None


def set_aside(damaged: DamagedCheckpoint, folder: epath.Path) -> str:
    """Renames a damaged checkpoint of a folder, so that the newest one that is whole is its newest; gives what to say.

    Raises:
      DamagedCheckpoint: none is whole, or it is one of another folder, which is not touched.
    """
    if damaged.older is None or absolute(damaged.step.parent) != absolute(folder):
        raise damaged
    for entry in list(folder.iterdir()):
        if entry.name.isdecimal() and int(entry.name) > damaged.older:
            with contextlib.suppress(FileNotFoundError):  # another process was sooner
                entry.rename(folder / f"{entry.name}.damaged")
    return (
        f"warning: {damaged.step}: {damaged.why}; it is called {damaged.step.name}.damaged from here on, and the run "
        f"goes on from step {damaged.older}, which is whole"
    )


def check_all(step: epath.Path) -> None:
    """Reads every file that a run needs of a checkpoint. Raises what the libraries raise, see `told`."""
    unsealed(json.loads((step / "record" / "metadata").read_text()))
    check_states(step / "iterator")
    count_streams(step / "iterator")
    for item in ARRAYS:
        if (step / item).exists():
            for array in _arrays(step / item):
                _read(array)


def _arrays(folder: epath.Path) -> Iterator[ts.TensorStore]:
    base = str(absolute(folder))
    store = {"driver": "ocdbt", "base": (base if "://" in base else f"file://{base}") + "/"}
    said = json.loads((folder / "_METADATA").read_text())
    driver = "zarr3" if said.get("use_zarr3") else "zarr"
    for leaf in said["tree_metadata"].values():
        if leaf["value_metadata"]["skip_deserialize"]:  # an empty node of the tree
            continue
        name = ".".join(part["key"] for part in leaf["key_metadata"])
        spec = {"driver": driver, "kvstore": {**store, "path": f"{name}/"}, "fill_missing_data_reads": False}
        yield ts.open(spec, open=True, read=True).result()


def _read(array: ts.TensorStore) -> None:
    """Reads the chunks of an array one after the other, and forgets them."""
    chunk = [int(size or 1) for size in array.chunk_layout.read_chunk.shape or array.shape]
    steps = (range(0, size, step) for size, step in zip(array.shape, chunk, strict=True))
    for start in itertools.product(*steps):
        ends = (min(first + step, size) for first, step, size in zip(start, chunk, array.shape, strict=True))
        array[tuple(slice(first, end) for first, end in zip(start, ends, strict=True))].read().result()
