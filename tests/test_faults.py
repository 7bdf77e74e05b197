"""Bad samples are left out, listed and counted; readers that fail end the run soon and say why."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_recipe

from navil_jax.config import Config, DataConfig, ModelConfig, SourceConfig
from navil_jax.data import features as features_module
from navil_jax.data.features import Skipped, Usable
from navil_jax.data.pipeline import make_dataset
from navil_jax.data.quarantine import Quarantine, SampleWatch
from navil_jax.data.sample import BadSample, Sample
from navil_jax.data.streams import sample_counts
from navil_jax.data.tokenizers import load_tokenizer
from navil_jax.errors import UserError
from navil_jax.train.__main__ import train

TOKENIZER = load_tokenizer(Path(__file__).parent / "golden" / "prompts" / "tokenizer")


@dataclasses.dataclass(frozen=True)
class Faulty:
    """Texts; what happens at an index instead is said by `faults`, and `log` (a file) lists what was read."""

    samples: int = 20
    faults: tuple[tuple[int, str], ...] = ()
    log: str = ""

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Sample:
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{index}\n")
        fault = dict(self.faults).get(index, "")
        if fault == "bad":
            raise BadSample("made", f"made:{index}", f"no such file: images/{index}.jpg")
        if fault == "exit":
            raise SystemExit(0)
        if fault == "kill" and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "bug":
            raise KeyError("answers")
        if fault == "disk":
            raise OSError(5, "Input/output error")
        images = (b"no image",) if fault == "image" else ()
        return Sample(f"made:{index}", images, ((f"Question {index}", "a" * (1 + index % 7)),))

    def texts(self) -> list[str]:
        return []


def config(**changes: object) -> Config:
    data = DataConfig(
        (SourceConfig("made"),), rows=2, visual_slots=8, text_slots=120, patch_slots=8, packing_lookahead=2
    )
    return Config(
        model=ModelConfig(special_token_ids=TOKENIZER.special_token_ids),
        data=dataclasses.replace(data, system_message="S", **changes),
    )


def batches(source: Faulty, quarantine: Quarantine | None = None, **changes: object):
    return iter(make_dataset(config(**changes), [source], TOKENIZER, quarantine=quarantine))


def entries(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def indices_read(log: Path) -> Counter:
    return Counter(map(int, log.read_text().split()))


def test_bad_samples_are_listed_once_and_not_read_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    source = Faulty(faults=((3, "bad"), (11, "image")), log=str(log))
    iterator = batches(source, Quarantine(tmp_path / "run"))
    first = [next(iterator) for _ in range(12)]
    counts = sample_counts(iterator)
    assert counts["made/bad"] > 4  # in several epochs
    assert counts["made/bad"] == pytest.approx(counts["made/good"] / 9, abs=2)
    assert indices_read(log)[3] == indices_read(log)[11] == 1
    listed = entries(tmp_path / "run" / "quarantine.jsonl")
    assert sorted(entry["index"] for entry in listed) == [3, 11]
    assert {(entry["source"], entry["samples"]) for entry in listed} == {("made", 20)}
    by_index = {entry["index"]: entry for entry in listed}
    assert by_index[3]["key"] == "made:3"
    assert by_index[3]["reason"] == "no such file: images/3.jpg"
    assert "image" in by_index[11]["reason"]

    log.write_text("")
    again = batches(source, Quarantine(tmp_path / "run"))
    for batch in first:
        jax.tree.map(np.testing.assert_array_equal, next(again), batch)
    assert not {3, 11} & set(indices_read(log))
    assert sample_counts(again) == counts
    assert len(entries(tmp_path / "run" / "quarantine.jsonl")) == 2


@pytest.mark.parametrize("step", [0, 2, 5])
def test_resume_is_bit_equal_though_the_list_has_grown(tmp_path: Path, step: int) -> None:
    """The interrupted run had read ahead, past its checkpoint, and listed what it found."""
    source = Faulty(60, faults=tuple((index, "bad") for index in range(0, 60, 7)))
    iterator = batches(source, Quarantine(tmp_path / "whole"))
    whole, states = [], [iterator.get_state()]
    for _ in range(9):
        whole.append(next(iterator))
        states.append(iterator.get_state())
    interrupted = batches(source, Quarantine(tmp_path / "parts"))
    saved = json.dumps(interrupted.get_state())
    for number in range(7):
        next(interrupted)
        if number + 1 == step:
            saved = json.dumps(interrupted.get_state())
    interrupted.close()
    resumed = batches(source, Quarantine(tmp_path / "parts"))
    resumed.set_state(json.loads(saved))
    for number in range(step, 9):
        jax.tree.map(np.testing.assert_array_equal, next(resumed), whole[number])
        assert resumed.get_state() == states[number + 1]


def test_lists_made_beforehand_and_of_other_processes_are_honoured(tmp_path: Path) -> None:
    line = {"source": "made", "samples": 20, "key": "k", "reason": "r"}
    given = tmp_path / "given.jsonl"
    given.write_text(json.dumps(line | {"index": 4}) + "\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "quarantine-3.jsonl").write_text(json.dumps(line | {"index": 5}) + '\n{"source": "ma')
    quarantine = Quarantine(tmp_path / "run", str(given), process=1)
    assert quarantine.known("made", 20) == {4, 5}
    assert quarantine.known("made", 21) == set()  # the data are others
    quarantine.add(Skipped("made", 20, 6, "made:6", "broken"))
    quarantine.add(Skipped("made", 20, 4, "made:4", "broken"))
    assert [entry["index"] for entry in entries(tmp_path / "run" / "quarantine-1.jsonl")] == [6]
    log = tmp_path / "log"
    iterator = batches(Faulty(log=str(log)), quarantine)
    for _ in range(6):
        next(iterator)
    assert not {4, 5, 6} & set(indices_read(log))
    assert sample_counts(iterator)["made/bad"] > 0
    with pytest.raises(UserError, match=r"none\.jsonl: no list of bad samples"):
        Quarantine(given=str(tmp_path / "none.jsonl"))
    given.write_text('{"sample": 3}\n')
    with pytest.raises(UserError, match=r"given\.jsonl:1: not a line of a quarantine file"):
        Quarantine(given=str(given))


def test_bad_samples_of_other_files_are_read(tmp_path: Path) -> None:
    """A list says of which files it speaks: what was bad there does not hold for others of the same name and number."""
    first = Quarantine(tmp_path)
    first.known("web", 8, "files-1")
    first.add(Skipped("web", 8, 3, "a.jsonl:4", "broken"))
    assert Quarantine(tmp_path).known("web", 8, "files-1") == {3}
    assert Quarantine(tmp_path).known("web", 8, "files-2") == set()
    assert Quarantine(tmp_path).known("web", 8) == {3}  # a source that does not tell its files
    again = Quarantine(tmp_path)
    again.known("web", 8, "files-2")
    again.add(Skipped("web", 8, 3, "b.jsonl:4", "broken too"))
    assert [entry["files"] for entry in entries(tmp_path / "quarantine.jsonl")] == ["files-1", "files-2"]


def test_a_line_cut_off_by_a_kill_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    whole = json.dumps({"source": "made", "samples": 20, "index": 1, "key": "k", "reason": "r"}) + "\n"
    path.write_text(whole + whole[:20])
    quarantine = Quarantine(tmp_path)
    assert quarantine.known("made", 20) == {1}
    quarantine.add(Skipped("made", 20, 2, "made:2", "half a \ud800 pair"))
    assert [entry["index"] for entry in entries(path)] == [1, 2]


def noted(watch: SampleWatch, outcomes: list[Usable | Skipped]) -> Counter:
    counts: Counter = Counter()
    for outcome in outcomes:
        watch.note(outcome, counts)
    return counts


def test_too_many_bad_samples_stop_the_run_and_name_the_worst_reasons(tmp_path: Path) -> None:
    good = [Usable("web", {})] * 980
    files = [Skipped("web", 5000, i, f"web:{i}", f"no such file: images/{i}.jpg") for i in range(14)]
    broken = [Skipped("chat", 70, i, f"chat:{i}", f"image of {i} x 1 pixels is broken") for i in range(6)]
    watch = SampleWatch(Quarantine(tmp_path), max_bad_share=0.02)
    assert noted(watch, good + files + broken) == {"web/good": 980, "web/bad": 14, "chat/bad": 6}
    with pytest.raises(UserError) as caught:
        noted(SampleWatch(Quarantine(tmp_path), max_bad_share=0.019), files + broken + good + files[:1])
    text = str(caught.value)
    assert text.startswith(
        "21 of 1,001 samples are bad, more than config.data.max_bad_share = 0.019: 15 x no such file"
    )
    assert "(first web:0); 6 x image of 0 x 1 pixels is broken (first chat:0)" in text
    assert text.endswith(f"all are in {tmp_path}/quarantine.jsonl")
    assert "\n" not in text


def test_few_samples_say_nothing_about_the_share_unless_most_are_unusable() -> None:
    good, bad = Usable("web", {}), Skipped("web", 5, 0, "web:0", "broken")
    long = Skipped("web", 5, 1, "web:1", "9 text_tokens do not fit a row's 8", too_long=True)
    noted(SampleWatch(Quarantine(), max_bad_share=0.01), [good] * 900 + [bad] * 99)
    noted(SampleWatch(Quarantine(), max_bad_share=0.01), [good] * 1000 + [long] * 900)
    with pytest.raises(UserError, match=r"51 of 100 samples had to be skipped \(1 bad, 50 too long\)"):
        noted(SampleWatch(Quarantine(), max_bad_share=0.01), [good] * 49 + [long] * 50 + [bad])


def test_a_run_stops_at_the_share_it_was_given(tmp_path: Path) -> None:
    source = Faulty(50, faults=((7, "bad"),))
    with pytest.raises(
        UserError, match=r"2\d of 1,0\d\d samples are bad, .*: 1 x no such file: images/7.jpg \(first made:7\)"
    ):
        for _ in batches(source, Quarantine(tmp_path)):
            pass
    iterator = batches(source, Quarantine(tmp_path), max_bad_share=0.05)
    for _ in range(150):
        next(iterator)
    with pytest.raises(UserError, match="all were on a list of bad samples before"):
        for _ in batches(source, Quarantine(tmp_path)):
            pass


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize(
    ("fault", "message"), [("exit", "SystemExit: 0"), ("bug", "KeyError: 'answers'"), ("disk", "Input/output error")]
)
def test_a_reader_that_fails_raises_where_batches_are_taken(
    threads: int, fault: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(features_module, "PAUSES", (0.01, 0.01))
    iterator = batches(Faulty(faults=((5, fault),)), Quarantine(tmp_path), threads=threads)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"reading sample 5 of source made .* failed: ") as caught:
        for _ in range(20):
            next(iterator)
    assert message in str(caught.value)
    assert time.monotonic() - began < 10
    assert not (tmp_path / "quarantine.jsonl").exists()  # it is not the sample's fault


def test_what_disk_or_network_refused_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "PAUSES", (0.01, 0.01))
    failures = iter([5, 110])
    read = Faulty.__getitem__

    def failing(self: Faulty, index: int) -> Sample:
        if index == 5 and (number := next(failures, None)):
            raise OSError(number, "not now")
        return read(self, index)

    plain = batches(Faulty(), threads=0)
    expected = [next(plain) for _ in range(6)]
    monkeypatch.setattr(Faulty, "__getitem__", failing)
    tried = batches(Faulty(), threads=0)
    for batch in expected:
        jax.tree.map(np.testing.assert_array_equal, next(tried), batch)
    assert next(failures, None) is None


@pytest.mark.slow
def test_a_failing_reader_ends_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = toy_recipe.get_config()
    read = toy_recipe.Colors.__getitem__

    def failing(self: toy_recipe.Colors, index: int) -> Sample:
        if self.split == "train" and index == 40:
            raise SystemExit(0)
        return read(self, index)

    monkeypatch.setattr(toy_recipe.Colors, "__getitem__", failing)
    with pytest.raises(RuntimeError, match=r"reading sample 40 of source colors .* failed: SystemExit"):
        train(dataclasses.replace(config, workdir=str(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [("kill", r"a worker process died .* with one of: .*made/5"), ("exit", r"reading sample 5 .*SystemExit")],
)
def test_a_worker_process_that_dies_raises(fault: str, message: str) -> None:
    iterator = batches(Faulty(faults=((5, fault),)), workers=2)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        for _ in range(20):
            next(iterator)
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_worker_processes_find_bad_samples_like_threads(tmp_path: Path) -> None:
    source = Faulty(faults=((3, "bad"), (11, "image")))
    plain, other = batches(source, Quarantine(tmp_path / "a")), batches(source, Quarantine(tmp_path / "b"), workers=2)
    for _ in range(6):
        jax.tree.map(np.testing.assert_array_equal, next(plain), next(other))
    assert sample_counts(plain) == sample_counts(other)
    plain.close()
    other.close()
    found = [entries(tmp_path / name / "quarantine.jsonl") for name in "ab"]
    assert found[0] == found[1]


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import test_faults
if __name__ == "__main__":
    iterator = test_faults.batches(test_faults.Faulty(), workers=2)
    next(iterator)
    print("ready", flush=True)
    time.sleep(600)
"""


def children_of(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == pid:
                found += [int(folder.name), *children_of(int(folder.name))]
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes in /proc")
def test_workers_end_with_a_trainer_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    trainer = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout.readline() == "ready\n"
    workers = children_of(trainer.pid)
    assert len(workers) >= 3  # with the server that starts them
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers):
        time.sleep(0.1)
    assert not [pid for pid in workers if Path(f"/proc/{pid}/cmdline").exists()]


def test_reading_that_hangs_ends_the_process_and_shows_where() -> None:
    code = """
import threading, time
from navil_jax.data.watchdog import Watchdog

def hanging_read():
    time.sleep(600)

reader = threading.Thread(target=hanging_read)
reader.start()
with Watchdog(0.5) as watch:
    for _ in range(3):
        with watch.waiting():
            time.sleep(0.3)
    time.sleep(1)
    print("waits", flush=True)
    with watch.waiting():
        reader.join()
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert done.stdout == "waits\n"
    assert "error: no data for 0.5 s, reading hangs" in done.stderr
    assert "hanging_read" in done.stderr
