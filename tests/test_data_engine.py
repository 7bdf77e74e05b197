"""Conversions in tasks of an engine: the same bytes from any engine, whatever is killed, interrupted or run twice."""

import collections
import dataclasses
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_data import jpeg, tar_bytes, write_lines

from navil_jax.data.__main__ import main
from navil_jax.data.convert import WORK, WriteShards, convert
from navil_jax.data.engine import ATTEMPTS, Beam, Engine, Local
from navil_jax.data.formats import files, open_format, webdataset
from navil_jax.data.formats.webdataset import WebDataset
from navil_jax.data.sample import Sample
from navil_jax.data.shuffle import Shuffle, Spool, lowest_key, read_run, sort_key, write_run
from navil_jax.errors import UserError

MODULES = (str(Path(__file__).parent), str(Path(__file__).parents[1]))
BEAM_WORKERS = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NAVIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclasses.dataclass(frozen=True)
class Square:
    """A job that notes in a file that it was run, and dies with some tasks the first so many times."""

    notes: str
    deadly: int = -1
    deaths: int = 0

    def __call__(self, number: int) -> int:
        path = Path(self.notes, str(number))
        times = len(path.read_bytes()) if path.exists() else 0
        with path.open("ab") as file:
            file.write(b"x")
        if number == self.deadly and times < self.deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        return number**2

    def name(self, number: int) -> str:
        return f"square {number}"


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_the_order_of_tasks(folder: Path, workers: int) -> None:
    assert Local(workers).run(Square(str(folder)), 7, "squares") == [0, 1, 4, 9, 16, 25, 36]
    assert Local(workers).run(Square(str(folder)), 0, "squares") == []


@pytest.mark.slow
def test_a_task_whose_process_is_killed_is_run_again(folder: Path) -> None:
    job = Square(str(folder), deadly=3, deaths=ATTEMPTS - 1)
    assert Local(2).run(job, 9, "squares") == [number**2 for number in range(9)]


@pytest.mark.slow
def test_a_task_that_always_kills_its_process_is_named(folder: Path) -> None:
    job = Square(str(folder), deadly=3, deaths=99)
    with pytest.raises(UserError, match=r"a process died 3 times \(out of memory, .*\) at square 3; fewer --workers"):
        Local(2).run(job, 9, "squares")


def records(folder: Path) -> str:
    """41 samples, one in eight bad, and a field that is not used."""
    made = []
    for number in range(41):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
        made.append({"image": f"{number + number % 8 // 7 * 1000}.jpg", "caption": f"c{number}", "page": "u"})
    return write_lines(folder / "x.jsonl", made)


def contents(out: str) -> dict[str, str]:
    """Every file of a conversion, hidden ones too, with its hash."""
    found = [path for path in Path(out).rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(found)}


def converted(out: str, shuffle: int | None, engine: Engine | None) -> tuple[dict[str, str], dict[str, int]]:
    done = convert(open_format("llava", "x.jsonl"), out, 6, "x", shuffle, engine)
    assert (done.samples, done.bad) == (36, 5)
    return contents(out), dict(done.unused)


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", [None, 7])
def test_processes_write_the_same_bytes(folder: Path, shuffle: int | None) -> None:
    records(folder)
    alone = converted("alone", shuffle, None)
    assert len(alone[0]) == 6 + 5 + 6 + 1  # shards, lists of bad samples, unused fields, the plan
    assert alone[1] == {"page": 36}
    for workers in (1, 2):
        assert converted(f"{workers}", shuffle, Local(workers)) == alone
        assert converted(f"{workers}", shuffle, Local(workers)) == alone  # of what is there


@pytest.fixture
def beam(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Beam:
    """Two processes of Beam's, which find the modules of the package and of this file."""
    pytest.importorskip("apache_beam", reason="the extra [beam] is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(MODULES))
    return Beam("DirectRunner", BEAM_WORKERS, f"beam/{WORK}")


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", [None, 7])
def test_beam_writes_the_same_bytes(folder: Path, beam: Beam, shuffle: int | None) -> None:
    records(folder)
    assert converted("beam", shuffle, beam) == converted("alone", shuffle, None)


@pytest.mark.slow
def test_what_goes_wrong_in_beam_is_said_in_a_line(folder: Path, beam: Beam) -> None:
    beam = dataclasses.replace(beam, options=())  # in this process
    assert beam.run(Refusing(), 3, "job") == [0, 1, 2]
    with pytest.raises(UserError, match=r"^task 3 is refused$"):
        beam.run(Refusing(), 5, "job")
    with pytest.raises(UserError, match=r"^DirectRunner: the pipeline failed: .*task 5 is broken.*; its log"):
        beam.run(Refusing(), 6, "job")
    assert not list(folder.glob(f"beam/{WORK}/*"))


@dataclasses.dataclass(frozen=True)
class Refusing:
    """A job that refuses tasks 3 and 4, and breaks at 5."""

    def __call__(self, number: int) -> int:
        if number == 5:
            raise ValueError("task 5 is broken")
        if number > 2:
            raise UserError(f"task {number} is refused")
        return number

    def name(self, number: int) -> str:
        return f"task {number}"


def test_a_shuffle_keeps_every_sample_and_follows_the_seed(folder: Path) -> None:
    records(folder)
    orders = []
    for out, seed in (("a", 1), ("b", 2), ("plain", None)):
        converted(out, seed, None)
        orders.append([sample.key for sample in open_format("array_record", out)])
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert len({tuple(order) for order in orders}) == 3


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(1, 60), shards=st.integers(1, 12), seed=st.integers(0, 2**32 - 1), fan=st.integers(1, 13))
def test_shards_one_after_another_are_the_order_of_the_keys(
    tmp_path_factory: pytest.TempPathFactory, samples: int, shards: int, seed: int, fan: int
) -> None:
    out = str(tmp_path_factory.mktemp("shuffle"))
    shuffle = Shuffle(out, min(shards, samples), seed, f"{out}/{WORK}", fan)
    source = Texts(samples)
    for job, tasks in (
        (shuffle.reading(source), shuffle.shards),
        (shuffle.regrouping(), shuffle.regroups),
        (shuffle.writing(), shuffle.shards),
    ):
        for number in [*reversed(range(tasks)), *range(tasks)]:  # in any order, and twice
            job(number)
    found = [sample.key for sample in open_format("array_record", out)]
    assert found == [str(index) for index in sorted(range(samples), key=lambda index: sort_key(seed, index))]


@dataclasses.dataclass(frozen=True)
class Texts:
    """So many samples of text; reading one kills the process while there is a file of that name, or takes a while."""

    samples: int
    deadly: str = ""
    seconds: float = 0.0

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Sample:
        time.sleep(self.seconds)
        if self.deadly and index == self.samples // 2 and os.path.exists(self.deadly):
            os.remove(self.deadly)
            os.kill(os.getpid(), signal.SIGKILL)
        return Sample(str(index), (), (("q", "a" * (index % 7 + 1)),))

    def texts(self) -> list[str]:
        return []


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", [None, 7])
def test_a_killed_worker_changes_nothing(folder: Path, shuffle: int | None) -> None:
    (folder / "deadly").write_bytes(b"")
    source = Texts(50, "deadly")
    convert(source, "killed", 5, "", shuffle, Local(2))
    assert not (folder / "deadly").exists()
    convert(source, "alone", 5, "", shuffle)
    assert contents("killed") == contents("alone")


def test_what_a_killed_process_left_behind_is_no_shard(folder: Path) -> None:
    convert(Texts(50), "whole", 5)
    (folder / "out").mkdir()
    half = (folder / "whole" / "data-00002-of-00005.array_record").read_bytes()[:100]
    (folder / "out" / f"data-00002-of-00005.array_record.{'0f' * 16}{files.PART}").write_bytes(half)
    convert(Texts(50), "out", 5)
    assert contents("out") == contents("whole")


INTERRUPTED = """
import signal
import sys
from test_data_engine import Texts
from navil_jax.data.convert import convert
from navil_jax.data.engine import Local
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
if __name__ == "__main__":
    convert(Texts(200, seconds=0.02), "killed", 20, "", eval(sys.argv[1]), Local(2))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("shuffle", "signal_number"), [(None, signal.SIGINT), (7, signal.SIGKILL)])
def test_a_conversion_that_is_killed_goes_on(folder: Path, shuffle: int | None, signal_number: int) -> None:
    (folder / "interrupted.py").write_text(INTERRUPTED)
    command = [sys.executable, "interrupted.py", repr(shuffle)]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(MODULES)}, stderr=subprocess.DEVNULL
    )
    pattern = "killed/*.array_record" if shuffle is None else f"killed/{WORK}/run-??????"
    while process.poll() is None and len(list(folder.glob(pattern))) < 4:
        time.sleep(0.01)
    process.send_signal(signal_number)
    assert process.wait(60) != 0
    there = {path: path.stat().st_mtime_ns for path in folder.glob(pattern)}
    assert 4 <= len(there) < 20
    convert(Texts(200), "whole", 20, "", shuffle)
    time.sleep(0.5)  # what a killed process started ends with it
    convert(Texts(200), "killed", 20, "", shuffle, Local(2))
    assert contents("killed") == contents("whole")
    if shuffle is None:
        assert {path: path.stat().st_mtime_ns for path in there} == there


def test_a_finished_shuffle_says_what_can_be_used_by_now(folder: Path) -> None:
    records(folder)
    before = converted("out", 3, None)
    assert converted("out", 3, None) == before
    (folder / "1007.jpg").write_bytes(jpeg(7))
    with pytest.raises(UserError, match="out: 1 samples that were bad can be used now; empty it to convert"):
        convert(open_format("llava", "x.jsonl"), "out", 6, "x", 3)


def test_a_shuffle_and_a_conversion_in_order_do_not_mix(folder: Path) -> None:
    for first, second in ((None, 3), (3, None), (3, 4)):
        out = f"out-{first}-{second}"
        convert(Texts(5), out, 2, "", first)
        with pytest.raises(UserError, match=f"{out}: holds a conversion of shuffle {first}, not {second}; empty it"):
            convert(Texts(5), out, 2, "", second)


def tars(folder: Path, count: int) -> None:
    for number in range(count):
        members = {f"{number}{n}.{end}": jpeg(n) if end == "jpg" else b"c" for n in range(4) for end in ("jpg", "txt")}
        (folder / f"t{number}.tar").write_bytes(tar_bytes(members))


@pytest.mark.parametrize("workers", [0, 2])
def test_many_files_are_indexed_in_processes_and_opened_when_they_are_read(
    folder: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars(folder, 5)
    together = open_format("webdataset", "t*.tar", engine=Local(workers))
    assert len(list(folder.glob("t*.tar.index"))) == 5
    one_by_one = open_format("webdataset", "t*.tar")
    opened: list[str] = []
    monkeypatch.setattr(WebDataset, "__init__", noted(WebDataset.__init__, opened))
    assert (len(together), together.fingerprint()) == (len(one_by_one), one_by_one.fingerprint())
    assert not opened
    assert list(together) == list(one_by_one)
    assert opened == [f"t{number}.tar" for number in range(5)]
    assert list(together.texts()) == list(one_by_one.texts())


def test_a_file_that_changed_after_it_was_indexed_ends_the_reading(folder: Path) -> None:
    tars(folder, 4)
    together = open_format("webdataset", "t*.tar", engine=Local())
    (folder / "t2.tar").write_bytes((folder / "t3.tar").read_bytes())
    with pytest.raises(OSError, match=r"t2\.tar has changed since it was indexed; start again"):
        together[8]


def noted(function: Callable[..., None], paths: list[str]) -> Callable[..., None]:
    def call(self: WebDataset, path: str, *rest: str) -> None:
        paths.append(files.name_of(path))
        function(self, path, *rest)

    return call


def test_a_broken_file_among_many_is_named(folder: Path) -> None:
    tars(folder, 3)
    (folder / "t1.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match=r"t1\.tar: is no tar file"):
        open_format("webdataset", "t*.tar", engine=Local(2))


def test_machines_share_the_indices_of_files_at_an_address(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tars(folder, 1)
    system = fsspec.filesystem("memory")
    system.pipe_file("/shared/t.tar", (folder / "t0.tar").read_bytes())
    monkeypatch.setenv("NAVIL_INDICES", "memory://indices")
    first = list(open_format("webdataset", "memory://shared/t.tar"))
    monkeypatch.setenv("NAVIL_CACHE", str(folder / "of another machine"))
    with monkeypatch.context() as patched:
        patched.setattr(webdataset, "scan_tar", lambda *_: pytest.fail("a second scan"))
        assert list(open_format("webdataset", "memory://shared/t.tar")) == first
    (folder / "t0.tar").write_bytes(tar_bytes({"1.jpg": jpeg(9), "1.txt": b"another"}))
    system.pipe_file("/shared/t.tar", (folder / "t0.tar").read_bytes())
    assert [sample.key for sample in open_format("webdataset", "memory://shared/t.tar")] == ["t.tar/1"]


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 100), min_size=1).map(sorted),
    jumps=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99))),
    ahead=st.integers(1, 40),
)
def test_ranges_of_a_remote_file_are_read_in_blocks(cuts: list[int], jumps: list[tuple[int, int]], ahead: int) -> None:
    system = fsspec.filesystem("memory")
    content = bytes(range(100))
    system.pipe_file("/ranges/a", content)
    ranges = [*itertools.pairwise([*cuts, 100]), *((min(jump), max(jump)) for jump in jumps)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files, "AHEAD", ahead)
        for begin, end in ranges:
            assert files.read_range("memory://ranges/a", begin, end) == content[begin:end]
    with pytest.raises(ValueError, match="has changed: 11 bytes expected at 90, 10 found"):
        files.read_range("memory://ranges/a", 90, 101)


def test_reading_on_costs_few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    system = fsspec.filesystem("memory")
    system.pipe_file("/ranges/b", bytes(1000))
    requests: list[tuple[int, int]] = []
    real = system.cat_file
    monkeypatch.setattr(
        type(system), "cat_file", lambda _, path, start, end: requests.append((start, end)) or real(path, start, end)
    )
    monkeypatch.setattr(files, "AHEAD", 300)
    for begin in range(0, 1000, 10):
        files.read_range("memory://ranges/b", begin, begin + 10)
    assert requests == [(0, 10), (10, 310), (310, 610), (610, 910), (910, 1210)]


@given(seed=st.integers(0, 2**32 - 1), index=st.integers(0, 2**40))
def test_keys_are_spread_and_unlike(seed: int, index: int) -> None:
    keys = np.array([sort_key(seed, index + n) for n in range(300)], np.float64) / 2.0**64
    assert len(set(keys)) == 300
    assert 0.35 < keys.mean() < 0.65
    assert np.histogram(keys, 4, (0, 1))[0].min() > 35


def test_every_order_is_as_likely_as_any_other() -> None:
    found = collections.Counter(
        tuple(sorted(range(4), key=lambda index, seed=seed: sort_key(seed, index))) for seed in range(4800)
    )
    assert len(found) == 24
    expected = 4800 / 24
    assert sum((count - expected) ** 2 / expected for count in found.values()) < 49.7  # chi squared, 23 degrees, 0.1%


@given(st.integers(1, 70_000), st.integers(0, 2**64 - 1))
def test_every_key_has_its_shard(shards: int, key: int) -> None:
    number = key * shards >> 64
    assert lowest_key(shards, number) <= key < lowest_key(shards, number + 1)
    assert (lowest_key(shards, 0), lowest_key(shards, shards)) == (0, 2**64)


@settings(max_examples=60, deadline=None)
@given(
    entries=st.lists(st.tuples(st.integers(0, 99), st.binary(max_size=5)), unique_by=lambda entry: entry[0]),
    starts=st.lists(st.integers(0, 100), unique=True).map(lambda inner: sorted({0, *inner, 100})),
)
def test_ranges_of_a_run_are_read_by_themselves(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[int, bytes]], starts: list[int]
) -> None:
    path = str(tmp_path_factory.mktemp("runs") / "run")
    write_run(path, entries, starts)
    for number, (first, end) in enumerate(itertools.pairwise(starts)):
        assert list(read_run(path, number)) == sorted(entry for entry in entries if first <= entry[0] < end)
    with Spool(entries) as spool:
        assert list(spool) == sorted(entries)


def test_mistakes_of_a_command_are_said_in_a_line(folder: Path, capsys: pytest.CaptureFixture) -> None:
    records(folder)
    given = ["convert", "--from", "llava", "--path", "x.jsonl", "--out", "out"]
    for more, said in (
        (["--", "--region=x"], "--region=x: what stands behind -- are options of Apache Beam; give --runner, too"),
        (["--shuffle", "-1"], "--shuffle: must be at least 0"),
        (["--runner", "Local"], "invalid choice: 'Local'"),
    ):
        assert main([*given, *more]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_the_command_shuffles_in_processes(folder: Path, capsys: pytest.CaptureFixture) -> None:
    records(folder)
    given = ["convert", "--from", "llava", "--path", "x.jsonl", "--shards", "3", "--shuffle", "5"]
    assert main([*given, "--out", "two", "--workers", "2"]) == 0
    assert "two: 36 samples in 3 shards; 5 left out" in capsys.readouterr().out
    assert main([*given, "--out", "alone", "--workers", "0"]) == 0
    assert contents("two") == contents("alone")
    assert WriteShards(Texts(9), "out", 2).name(1) == "samples 4 to 8 of out"
