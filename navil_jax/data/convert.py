"""Any source -> sharded ArrayRecord, in tasks of an engine: a shard that is there is whole and stays."""

import contextlib
import dataclasses
import fcntl
import glob
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from navil_jax.data.engine import Engine, Local
from navil_jax.data.formats import files
from navil_jax.data.formats.array_record import SUFFIX, count_records, shard_name, write_shard
from navil_jax.data.packed import Tally, count_usable, packed, read_tally, stretch
from navil_jax.data.sample import Source, stamp
from navil_jax.data.shuffle import Shuffle
from navil_jax.errors import UserError

if TYPE_CHECKING:
    from navil_jax.data.formats.hub import Stream

SHARD_SAMPLES = 10_000  # of a shard, if the number of shards is not given
PLAN_FILE = "conversion.json"  # in the folder: what it is made of
WORK = ".work"  # folder within it: what is handed from task to task


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a conversion wrote."""

    shards: int
    samples: int
    bad: int
    # Fields of the records -> samples that are not made of them.
    unused: Counter[str] = dataclasses.field(default_factory=Counter, compare=False)


def convert(
    source: Source,
    out: str,
    shards: int = 0,
    origin: str = "",
    shuffle: int | None = None,
    engine: Engine | None = None,
) -> Converted:
    """Writes the samples of a source as `OUT/data-NNNNN-of-NNNNN.array_record`, in its order or shuffled.

    The n-th shard holds the n-th stretch of the source; with `shuffle`, every order of all samples is as likely as any
    other. Samples of the n-th stretch that cannot be used go to `data-NNNNN-of-NNNNN.bad.jsonl` with source, key and
    reason. Images are stored as the files they were, decoded ones as PNG. An interrupted conversion goes on with the
    shards that are missing; shards in which a bad sample can be used by now are made anew. The bytes depend on the
    source and these arguments, and not on the engine.

    Args:
      out: folder, local or at an address.
      shards: number of files; 0: one per `SHARD_SAMPLES` samples.
      origin: says where the samples come from, to tell conversions apart.
      shuffle: seed of the order; None: that of the source.
      engine: where the work is done; None: in this process.

    Raises:
      UserError: `out` holds another conversion or is just written by one, the source's files have changed, no sample
        can be used, or a shuffled conversion is done and what was bad can be used by now.
    """
    with alone_in(out):
        shards = min(shards or -(-len(source) // SHARD_SAMPLES), len(source))
        said = {"origin": origin, "samples": len(source), "shards": shards, "files": stamp(source), "shuffle": shuffle}
        _check_plan(out, said)
        engine = engine or Local()
        if shuffle is None:
            tallies = engine.run(WriteShards(source, out, shards), shards, out)
        else:
            tallies = _shuffled(source, Shuffle(out, shards, shuffle, files.join(out, WORK)), engine)
        files.remove_folder(files.join(out, WORK))
    bad = sum(tally.bad for tally in tallies)
    if bad == len(source):
        raise UserError(f"{out}: none of {len(source)} samples can be used, the reasons are in *.bad.jsonl there")
    return Converted(shards, len(source) - bad, bad, sum((tally.unused for tally in tallies), Counter()))


def convert_stream(stream: "Stream", out: str, origin: str = "", engine: Engine | None = None) -> Converted:
    """Writes the usable samples of a data set of the hub to a folder, a shard for each of its files.

    A shard that is there stays, also where a bad sample could be used by now.

    Args:
      origin, engine: as of `convert`.

    Raises:
      UserError: as `convert` does, or the hub cannot be reached.
    """
    with alone_in(out):
        _check_plan(out, {"origin": origin, "shards": stream.count, "files": stream.stamp})
        found = (engine or Local()).run(WriteStream(stream, out), stream.count, out)
        files.remove_folder(files.join(out, WORK))
    tallies, samples = [tally for tally, _ in found], sum(count for _, count in found)
    bad = sum(tally.bad for tally in tallies)
    if not samples:
        raise UserError(f"{out}: none of {bad} samples can be used, the reasons are in *.bad.jsonl there")
    return Converted(stream.count, samples, bad, sum((tally.unused for tally in tallies), Counter()))


@dataclasses.dataclass(frozen=True)
class WriteStream:
    """Task n writes the n-th file of a data set of the hub as the n-th shard; its notes and its number of samples."""

    stream: "Stream"
    out: str

    def __call__(self, number: int) -> tuple[Tally, int]:
        path = files.join(self.out, shard_name(number, self.stream.count))
        if not files.exists(path):
            file = self.stream.file(number)
            write_shard(path, (record for _, record in packed(file, file.read_on(), path)))
        return read_tally(path), count_records(path)

    def name(self, number: int) -> str:
        return f"file {number + 1} of {self.stream.path}"


def _shuffled(source: Source, shuffle: Shuffle, engine: Engine) -> list[Tally]:
    """Writes the shards, or looks at what was bad if they are all there."""
    out = shuffle.out
    if not _missing(out, shuffle.shards):
        counting = CountUsable(WriteShards(source, out, shuffle.shards))
        found = engine.run(counting, shuffle.shards, f"bad samples of {out}")
        if usable := sum(count for _, count in found):
            raise UserError(
                f"{out}: {usable:,} samples that were bad can be used now; empty it to convert and shuffle all anew"
            )
        return [tally for tally, _ in found]
    tallies = engine.run(shuffle.reading(source), shuffle.shards, f"{out}: reads")
    if shuffle.regroups:
        engine.run(shuffle.regrouping(), shuffle.regroups, f"{out}: regroups")
    engine.run(shuffle.writing(), shuffle.shards, f"{out}: writes")
    return tallies


@dataclasses.dataclass(frozen=True)
class WriteShards:
    """Task n writes the n-th stretch of the source as the n-th shard."""

    source: Source
    out: str
    shards: int

    def __call__(self, number: int) -> Tally:
        path = self.path(number)
        if not files.exists(path) or count_usable(self.source, path):
            write_shard(path, (record for _, record in packed(self.source, self.stretch(number), path)))
        return read_tally(path)

    def path(self, number: int) -> str:
        return files.join(self.out, shard_name(number, self.shards))

    def stretch(self, number: int) -> range:
        return stretch(len(self.source), self.shards, number)

    def name(self, number: int) -> str:
        indices = self.stretch(number)
        return f"samples {indices.start:,} to {indices.stop - 1:,} of {self.out}"


@dataclasses.dataclass(frozen=True)
class CountUsable:
    """Task n counts the samples of the n-th list of bad ones that can be used by now."""

    written: WriteShards

    def __call__(self, number: int) -> tuple[Tally, int]:
        path = self.written.path(number)
        return read_tally(path), count_usable(self.written.source, path)

    def name(self, number: int) -> str:
        return f"bad {self.written.name(number)}"


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
        _remove_partial(folder)
        yield
        _remove_partial(folder)


def _check_plan(out: str, plan: Mapping[str, object]) -> None:
    """Notes in the folder what is converted into it; raises `UserError` if that is something else already."""
    path = files.join(out, PLAN_FILE)
    if files.exists(path):
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


def _remove_partial(folder: str) -> None:
    """Removes what processes were writing when they were killed."""
    for partial in glob.glob(os.path.join(glob.escape(folder), "**", files.PARTIAL), recursive=True):
        os.remove(partial)


def _missing(out: str, shards: int) -> bool:
    """Whether a shard is not there."""
    system, bare = files.filesystem(out)
    there = {files.name_of(path) for path in system.ls(bare, detail=False)}
    return any(shard_name(number, shards) not in there for number in range(shards))
