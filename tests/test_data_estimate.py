"""What a conversion or an examination will take, measured on some of the samples."""

import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_data import jpeg, tar_bytes, write_lines
from made_sources import TOKENIZER, TOKENIZER_FOLDER, doctor_config

from navil_jax.config import SourceConfig
from navil_jax.data import estimate
from navil_jax.data.__main__ import main
from navil_jax.data.estimate import STRETCHES, Estimate, Stretches, estimate_conversion, estimate_examination
from navil_jax.data.formats import open_format
from navil_jax.data.inspect.checkup import Checkup
from navil_jax.data.inspect.token_map import row_budgets
from navil_jax.data.sources import open_source


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NAVIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "SECONDS", 0.05)
    return tmp_path


@given(samples=st.integers(1, 300), taken=st.integers(1, 300))
def test_stretches_are_of_the_whole_source_and_nothing_comes_twice(samples: int, taken: int) -> None:
    taken = min(samples, taken)
    found = list(Stretches(range(samples), taken))  # type: ignore[arg-type]  # numbers as samples
    assert found == sorted(set(found))
    assert len(found) == taken
    assert found[0] == 0
    assert found[-1] == samples - 1 or taken < STRETCHES
    follows = sum(after == before + 1 for before, after in itertools.pairwise(found))
    assert follows >= taken - STRETCHES  # read in order but for so many jumps


@pytest.mark.parametrize("shuffle", [None, 3])
def test_some_of_many_files_stand_for_all(folder: Path, shuffle: int | None) -> None:
    for number in range(12):
        members = {
            f"{number}-{n:02}.{end}": jpeg(n) if end == "jpg" else b"c" for n in range(40) for end in ("jpg", "txt")
        }
        (folder / f"t{number:02}.tar").write_bytes(tar_bytes(members))
    entry = SourceConfig("web", kind="webdataset", path="t*.tar")
    found = estimate_conversion(entry, lambda part: open_source(part, "train"), shuffle)
    assert (found.samples, found.looked_at) == (480, "3 of 12 files")
    assert 3 * 32 <= found.measured <= 120
    assert found.size > found.measured * len(jpeg())
    assert sorted(path.name for path in folder.glob("*.index")) == ["t02.tar.index", "t06.tar.index", "t10.tar.index"]


def test_bad_samples_cost_time_too(folder: Path) -> None:
    write_lines(folder / "x.jsonl", [b"{"] * 20 + [{"text": "a"}] * 20)
    entry = SourceConfig("x", kind="llava", path="x.jsonl")
    found = estimate_conversion(entry, lambda part: open_source(part, "train"), None)
    assert (found.samples, found.looked_at) == (40, "1 of 1 files")
    assert 32 <= found.measured <= 40


def test_an_examination_is_estimated_too(folder: Path) -> None:
    write_lines(folder / "x.jsonl", [{"text": "a"}] * 50)
    config = doctor_config()
    checkup = Checkup(open_format("llava", "x.jsonl"), "x", config, TOKENIZER, row_budgets(config))
    found = estimate_examination(checkup)
    assert (found.samples, found.size) == (50, 80 * found.measured)


def test_hours_and_dollars_follow_from_samples_a_second() -> None:
    text = Estimate(samples=3_600_000, measured=200, seconds=4.0, size=2_000_000, looked_at="a").text(0.05)
    assert "measured on 200 samples of a: 50.0 samples/s in one process" in text
    assert "the whole: 3,600,000 samples, 36.000 GB written" in text
    assert re.search(r"\n +1 +20\.00 +20\.00 +1\.00\n +4 +5\.00 +20\.00 +1\.00\n", text)
    assert "dollars" not in Estimate(10, 1, 1.0, 1, "a").text(None)


def test_the_command_estimates_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture) -> None:
    write_lines(folder / "x.jsonl", [{"text": "a"}] * 50)
    given = ["convert", "--from", "llava", "--path", "x.jsonl", "--out", "out"]
    assert main([*given, "--estimate", "--price", "0.05"]) == 0
    assert "the whole: 50 samples" in capsys.readouterr().out
    assert not (folder / "out").exists()
    assert main([*given, "--price", "0.05"]) == 2
    assert "--price: has no effect without --estimate" in capsys.readouterr().err
    flags = [f"--config.data.tokenizer={TOKENIZER_FOLDER}", "--out", "report"]
    assert main(["doctor", "--source", "llava:x.jsonl", "--estimate", *flags]) == 0
    assert "x.jsonl: measured on" in capsys.readouterr().out
    assert not (folder / "report" / "notes").exists()
