"""Any source -> sharded ArrayRecord, shard by shard: a shard that is there is whole, and is not written again."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from navil_jax.console import Progress
from navil_jax.data.formats import files
from navil_jax.data.formats.array_record import SUFFIX, pack, shard_name, write_shard
from navil_jax.data.formats.records import is_of_sample, reason
from navil_jax.data.sample import BadSample, Source, stamp
from navil_jax.errors import UserError

SHARD_SAMPLES = 10_000  # of a shard, if the number of shards is not given
PLAN_FILE = "conversion.json"  # in the folder: what it is made of


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a conversion wrote."""

    shards: int
    samples: int
    bad: int
    # Of the shards written now: fields of the records -> samples that are not made of them.
    unused: Counter[str] = dataclasses.field(default_factory=Counter, compare=False)


def convert(source: Source, out: str, shards: int = 0, origin: str = "") -> Converted:
    """Writes the samples of a source, in its order, as `OUT/data-NNNNN-of-NNNNN.array_record`.

    Samples that cannot be used go to `data-NNNNN-of-NNNNN.bad.jsonl` with source, key and reason. Images are stored
    as the files they were, decoded ones as PNG. An interrupted conversion goes on with the first missing shard; shards
    in which a bad sample can be used by now are made anew.

    Args:
      out: folder, local or at an address.
      shards: number of files; 0: one per `SHARD_SAMPLES` samples.
      origin: says where the samples come from, to tell conversions apart.

    Raises:
      UserError: `out` holds another conversion or is just written by one, the source's files have changed, or no sample
        can be used.
    """
    with alone_in(out):
        return _convert(source, out, shards, origin)


@contextlib.contextmanager
def alone_in(out: str) -> Iterator[None]:
    """Keeps a local folder for this command; raises `UserError` if another one writes there."""
    if files.is_remote(out):
        yield
        return
    folder = files.at_home(out)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, ".lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out}: another command writes there; wait for it, or give another --out") from error
        yield


def _convert(source: Source, out: str, shards: int, origin: str) -> Converted:
    shards = min(shards or -(-len(source) // SHARD_SAMPLES), len(source))
    _check_plan(out, {"origin": origin, "samples": len(source), "shards": shards, "files": stamp(source)})
    bounds = [len(source) * number // shards for number in range(shards + 1)]
    there = [_is_done(source, files.join(out, shard_name(number, shards))) for number in range(shards)]
    done = sum(bounds[number + 1] - bounds[number] for number in range(shards) if there[number])
    unused: Counter[str] = Counter()
    with Progress(out, len(source), "samples", done) as progress:
        for number in (number for number in range(shards) if not there[number]):
            path = files.join(out, shard_name(number, shards))
            write_shard(path, _records(source, range(bounds[number], bounds[number + 1]), path, progress, unused))
    bad_count = sum(len(_bad_entries(files.join(out, shard_name(number, shards)))) for number in range(shards))
    if bad_count == len(source):
        raise UserError(f"{out}: none of {len(source)} samples can be used, the reasons are in *.bad.jsonl there")
    return Converted(shards, len(source) - bad_count, bad_count, unused)


def _records(source: Source, indices: range, path: str, progress: Progress, unused: Counter[str]) -> Iterator[bytes]:
    """The packed samples that can be used; then writes the list of the others, before the shard gets its name.

    Args:
      unused: takes the fields that they are not made of.
    """
    bad = []
    for index in indices:
        try:
            sample = source[index]
            yield pack(sample)
            unused.update(sample.unused)
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and not is_of_sample(error):
                raise
            entry = {"source": "", "key": str(index), "reason": reason(error), "index": index}
            if isinstance(error, BadSample):
                entry |= {"source": error.source, "key": error.key, "reason": error.reason}
            bad.append(json.dumps(entry) + "\n")
        progress.update()
    if bad or _exists(_bad_file(path)):
        files.write_file(_bad_file(path), "".join(bad).encode())


def _is_done(source: Source, path: str) -> bool:
    """Whether a shard is there, and what was bad still is."""
    if not _exists(path):
        return False
    for entry in _bad_entries(path):
        with contextlib.suppress(UserError, OSError):
            pack(source[entry["index"]])
            return False
    return True


def _check_plan(out: str, plan: dict[str, str | int]) -> None:
    """Notes in the folder what is converted into it; raises `UserError` if that is something else already."""
    path = files.join(out, PLAN_FILE)
    if _exists(path):
        found = json.loads(files.read_file(path))
        changed = [name for name in plan if found.get(name) != plan[name]]
        if changed == ["files"]:
            raise UserError(f"{out}: holds a conversion of files that have changed; empty it or give another --out")
        if changed:
            said = ", and ".join(f"{name} {found.get(name)}, not {plan[name]}" for name in changed if name != "files")
            raise UserError(f"{out}: holds a conversion of {said}; empty it or give another --out")
        return
    system, bare = files.filesystem(out)
    if system.isdir(bare) and any(name.endswith(SUFFIX) for name in system.ls(bare, detail=False)):
        raise UserError(f"{out}: holds *{SUFFIX} of another origin; empty it or give another --out")
    system.makedirs(bare, exist_ok=True)
    files.write_file(path, json.dumps(plan, indent=2).encode())


def _exists(path: str) -> bool:
    system, bare = files.filesystem(path)
    return system.exists(bare)


def _bad_file(path: str) -> str:
    return path.removesuffix(SUFFIX) + ".bad.jsonl"


def _bad_entries(path: str) -> list[dict[str, Any]]:
    """What a shard's list of bad samples says of each."""
    lines = files.read_file(_bad_file(path)).splitlines() if _exists(_bad_file(path)) else []
    return [json.loads(line) for line in lines]
