"""The doctor: what it counts, that training agrees, its lists, its report, and going on after an interruption."""

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from check_html import check_page, undated
from hypothesis import given, settings
from hypothesis import strategies as st
from made_data import talk, write_lines
from made_sources import BUDGETS, TOKENIZER, TOKENIZER_FOLDER, doctor_config
from PIL import Image

from navil_jax.config import Config, SourceConfig
from navil_jax.data.__main__ import main
from navil_jax.data.engine import Local
from navil_jax.data.features import TooLong, fitting_features
from navil_jax.data.formats import open_format
from navil_jax.data.inspect import doctor, examination
from navil_jax.data.inspect.checkup import BAD, GOOD, NOTE, RESIZED, TOO_LONG, Checkup
from navil_jax.data.inspect.examination import examine
from navil_jax.data.inspect.input_cost import read_input_cost
from navil_jax.data.inspect.page import HERE, histogram, render
from navil_jax.data.inspect.summary import duplicates, shared, slot_advice
from navil_jax.data.inspect.token_map import row_budgets
from navil_jax.data.pipeline import batch_spec, make_dataset
from navil_jax.data.quarantine import Quarantine
from navil_jax.data.sample import Sample, Source
from navil_jax.data.sources import SOURCES
from navil_jax.errors import UserError

FLAGS = [f"--config.data.{name}={slots}" for name, slots in BUDGETS.items()]
FLAGS += [
    "--config.images.min_patches=4",
    "--config.images.max_patches=256",
    f"--config.data.tokenizer={TOKENIZER_FOLDER}",
]
FLAGS += ["--config.data.system_message=S", "--workers=0"]
GOOD_SAMPLES = 20


@pytest.fixture
def lines(tmp_path: Path) -> str:
    """20 good samples, then one with each fault."""
    records = []
    for number in range(GOOD_SAMPLES):
        Image.new("RGB", (20 + number, 24), (number, 0, 0)).save(tmp_path / f"{number}.png")
        records.append({"image": f"{number}.png", "conversations": talk("<image>\nWhich?", f"Red {number}.")})
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (900, 900)).save(tmp_path / "huge.png")
    records += [
        {"image": "broken.png", "conversations": talk("<image>", "a")},
        {"image": "missing.png", "conversations": talk("<image>", "a")},
        {"image": "0.png", "conversations": talk("<image>\nWhich?", "")},
        {"image": "0.png", "conversations": talk("<image> <image>", "two")},
        {"image": "0.png", "conversations": talk("What does <image> say?", "<image> stands here, and <img>")},
        records[3],
        {"conversations": talk("Long?", "long " * 400)},
        {"image": "huge.png", "conversations": talk("Huge?", "yes")},
    ]
    return write_lines(tmp_path / "train.jsonl", records)


def run(lines: str, out: Path, *more: str) -> int:
    given = {flag.partition("=")[0] for flag in more}
    own = [flag for flag in FLAGS if flag.partition("=")[0] not in given]
    return main(["doctor", "--source", f"llava:{lines}", "--out", str(out), *own, *more])


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_fault_is_counted_and_listed(lines: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "report"
    assert run(lines, out) == 1
    text = capsys.readouterr().out
    for label, value in (
        ("samples", "28, 22 of them usable"),
        ("images", "22"),
        ("width / height", "0.83 to 1.62 per image, median 1.19"),
        ("longer than a row", "2"),
        ("duplicates", "1"),
        ("markers in text", "2"),
        ("empty answers", "1"),
        ("bad", "4"),
    ):
        assert re.search(rf"│ {label} +{re.escape(value)} +│", text), label
    assert "4 of 28 samples are bad, more than data.max_bad_share = 0.01" in text
    joined = re.sub(r"[ │\n]", "", text)
    assert re.search(r"1xnosuchfile:\S*missing\.png\(firsttrain\.jsonl:22\)", joined)
    assert "1 x 1 images but <image> stands 2 times in the questions" in text
    listed = json_lines(out / "quarantine.jsonl")
    assert [(entry["source"], entry["samples"], entry["index"], entry["key"]) for entry in listed] == [
        ("train.jsonl", 28, index, f"train.jsonl:{index + 1}") for index in (20, 21, 22, 23)
    ]
    assert "not an image" in listed[0]["reason"]
    found = {(entry["index"], entry["finding"]) for entry in json_lines(out / "findings.jsonl")}
    assert found == {
        (22, "an answer is empty"),
        (23, "a marker or <image> stands in the text"),
        (24, "a marker or <image> stands in the text"),
        (25, "same images and text as sample 3"),
        (26, "longer than a row"),
        (27, "longer than a row"),
    }


def test_held_out_samples_are_examined_and_compared_with_training(
    lines: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    held_out = Path(write_lines(tmp_path / "test.jsonl", [{"caption": None}, *json_lines(Path(lines))[:3]]))
    source = {"kind": "llava", "path": lines, "held_out": held_out}
    flags = [f"--config.data.sources.0.{key}={value}" for key, value in source.items()]
    recipe = ["--config", str(Path(__file__).parent / "toy_recipe.py"), *flags, "--out", str(tmp_path / "report")]
    own = [flag for flag in FLAGS if "tokenizer" not in flag]
    assert main(["doctor", *recipe, *own, "--config.data.max_bad_share=1"]) == 0
    said = capsys.readouterr().out
    assert "colors (held out)" in said
    assert "3 held-out samples are trained on too" in said
    listed = json_lines(tmp_path / "report" / "quarantine.jsonl")
    assert [entry["index"] for entry in listed if entry["source"] == "colors (held out)"] == [0]


def test_a_higher_share_of_bad_samples_can_be_good(lines: str, tmp_path: Path) -> None:
    assert run(lines, tmp_path / "report", "--config.data.max_bad_share=0.2") == 0


@dataclasses.dataclass(frozen=True)
class Watched:
    """Notes which samples are read."""

    source: Source
    read: set[int]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        self.read.add(index)
        return self.source[index]

    def texts(self) -> list[str]:
        return []


def test_training_reads_nothing_that_is_in_quarantine(lines: str, tmp_path: Path) -> None:
    run(lines, tmp_path / "report")
    source = Watched(open_format("llava", lines), set())
    quarantine = Quarantine(given=str(tmp_path / "report" / "quarantine.jsonl"))
    batches = iter(make_dataset(doctor_config(), [source], TOKENIZER, quarantine=quarantine))
    for _ in range(6):
        next(batches)
    assert set(range(28)) - source.read == {20, 21, 22, 23}


@pytest.mark.parametrize("oversize", ["drop", "resize"])
def test_training_agrees_about_every_sample(lines: str, oversize: str) -> None:
    config = doctor_config(oversize=oversize)
    source, budgets = open_format("llava", lines), batch_spec(config).budgets
    notes, bad, _ = Checkup(source, "a", config, TOKENIZER, row_budgets(config))(range(len(source)))
    assert [sample.index for sample in bad] == np.flatnonzero(notes["status"] == BAD).tolist()
    seen = set()
    for index, note in enumerate(notes):
        try:
            features, resized = fitting_features(source[index], config, TOKENIZER, budgets)
        except UserError:
            expected = BAD
        except TooLong:
            expected = TOO_LONG
        else:
            expected = RESIZED if resized else GOOD
            assert note["learnt_tokens"] == np.count_nonzero(features["text_weights"])
            if not resized:
                assert [note[name] for name in row_budgets(config)] == [len(features[n]) for n in row_budgets(config)]
        assert note["status"] == expected
        seen.add(expected)
    assert seen == {GOOD, BAD, TOO_LONG} | ({RESIZED} if oversize == "resize" else set())


def test_an_interrupted_report_goes_on(
    lines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(examination, "SMALLEST_PART", 6)
    assert run(lines, tmp_path / "whole") == 1
    read: list[int] = []
    check = Checkup.__call__

    def interrupted(self: Checkup, indices: list[int]) -> tuple:
        if 21 in indices and 21 not in read:
            read.append(21)
            raise KeyboardInterrupt
        read.extend(indices)
        return check(self, indices)

    monkeypatch.setattr(Checkup, "__call__", interrupted)
    assert run(lines, tmp_path / "parted") == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert run(lines, tmp_path / "parted") == 1
    read.remove(21)
    assert read == list(range(28))
    for name in ("quarantine.jsonl", "findings.jsonl", "report.html"):
        assert content(tmp_path / "whole" / name) == content(tmp_path / "parted" / name)


def test_fields_that_are_not_used_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    records = [{"text": f"x {n}", "id": n + 1, **({"page": "u"} if n % 3 else {})} for n in range(9)]
    lines = write_lines(tmp_path / "train.jsonl", records)
    for _ in range(2):  # the second time from the notes alone
        assert run(lines, tmp_path / "report") == 0
        assert re.search(r"│ fields not used +id \(9 samples\), page \(6 samples\) +│", capsys.readouterr().out)
    assert "page (6 samples)" in (tmp_path / "report" / "report.html").read_text()
    again = ["convert", "--from", "llava", "--path", lines, "--out", str(tmp_path / "shards")]
    assert main(again) == 0
    assert "not used: id (9 samples), page (6 samples)" in capsys.readouterr().out


def test_a_report_of_something_else_is_left_alone(lines: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(lines, tmp_path / "report")
    capsys.readouterr()
    assert run(lines, tmp_path / "report", "--config.images.max_patches=32") == 2
    assert "holds a report for another config (images.max_patches was 256, is 32)" in capsys.readouterr().err
    assert run(lines, tmp_path / "report", "--config.data.threads=1", "--config.seed=3") == 1
    with open(lines, "a") as file:
        file.write('{"conversations": []}\n')
    assert run(lines, tmp_path / "report") == 2
    assert "source train.jsonl: its files have changed since" in capsys.readouterr().err


def test_files_that_were_corrected_are_noticed(lines: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(lines, tmp_path / "report")
    status = os.stat(lines)
    text = Path(lines).read_text()
    Path(lines).write_text(text.replace("Red 7.", "Red 8."))
    os.utime(lines, ns=(status.st_atime_ns, status.st_mtime_ns))  # as long, and as old
    assert run(lines, tmp_path / "report") == 2
    assert "its files have changed since" in capsys.readouterr().err
    Path(lines).write_text(text)
    os.utime(lines, ns=(status.st_atime_ns, status.st_mtime_ns))
    Image.new("RGB", (20, 24)).save(tmp_path / "missing.png")
    assert run(lines, tmp_path / "report") == 1
    assert "28, 23 of them usable" in capsys.readouterr().out
    assert [entry["index"] for entry in json_lines(tmp_path / "report" / "quarantine.jsonl")] == [20, 22, 23]


def test_placeholders_of_other_software_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Image.new("RGB", (20, 24)).save(tmp_path / "0.png")
    texts = ["<|image_pad|>Which?", "[IMG]Which?", "[IMG]And?", "Plain?"]
    records = [{"image": "0.png", "conversations": talk(text, "Red.")} for text in texts]
    assert run(write_lines(tmp_path / "train.jsonl", records), tmp_path / "report") == 0
    text = capsys.readouterr().out
    assert re.search(r"markers in text +3 +│", text)
    assert "2 x [IMG] (first train.jsonl:2)" in text
    assert "1 x <|image_pad|> (first train.jsonl:1)" in text
    page = (tmp_path / "report" / "report.html").read_text()
    assert "&lt;|image_pad|&gt;" in page


def test_report_needs_nothing_from_outside(lines: str, tmp_path: Path) -> None:
    run(lines, tmp_path / "report", "--samples", "30")
    text = (tmp_path / "report" / "report.html").read_text()
    check_page(text)
    assert "&lt;image&gt; stands here, and &lt;img&gt;" in text
    assert text.count('<details class="sample"') == 21  # all but a copy
    assert text.count("<svg") == 5
    assert re.search(r'<span class="learnt" title="\d+ tokens">Red 7\.', text)


def test_a_source_that_is_bad_throughout_has_a_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lines = write_lines(tmp_path / "train.jsonl", [b"no json"] * 3)
    assert run(lines, tmp_path / "report") == 1
    assert "3, 0 of them usable" in capsys.readouterr().out
    assert "not JSON" in (tmp_path / "report" / "report.html").read_text()


def test_a_source_without_faults_is_good(tmp_path: Path) -> None:
    Image.new("RGB", (40, 24)).save(tmp_path / "a.png")
    record = {"image": "a.png", "conversations": talk("<image>\nWhich?", "Red.")}
    assert run(write_lines(tmp_path / "train.jsonl", [record]), tmp_path / "out") == 0
    assert (tmp_path / "out" / "report.html").exists()
    assert (tmp_path / "out" / "quarantine.jsonl").read_text() == ""
    (cost,) = read_input_cost(tmp_path / "out" / "input.json").sources
    assert (cost.share, cost.measured, cost.usable, cost.images) == (1.0, 1, 1.0, 1.0)
    assert cost.bytes == (tmp_path / "a.png").stat().st_size + len("<image>\nWhich?Red.")


def content(path: Path) -> str:
    """A file's text without the day and command of a report."""
    return undated(path.read_text(errors="backslashreplace"))


def test_processes_find_the_same(lines: str, tmp_path: Path) -> None:
    assert run(lines, tmp_path / "alone") == 1
    assert run(lines, tmp_path / "two", "--workers", "2") == 1
    for name in ("quarantine.jsonl", "findings.jsonl", "report.html", "notes/000.npy"):
        assert content(tmp_path / "alone" / name) == content(tmp_path / "two" / name)


@pytest.mark.slow
def test_beam_finds_the_same(lines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("apache_beam", reason="the extra [beam] is not installed")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setattr(examination, "SMALLEST_PART", 6)
    assert run(lines, tmp_path / "alone") == 1
    pipeline = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")
    assert run(lines, tmp_path / "beam", "--runner=DirectRunner", "--", *pipeline) == 1
    for name in ("quarantine.jsonl", "findings.jsonl", "report.html", "notes/000.npy", "notes/000/000003.notes"):
        one, other = (content(tmp_path / out / name) for out in ("alone", "beam"))
        assert one == other


def test_a_source_that_cannot_be_copied_is_named(tmp_path: Path) -> None:
    class Unnamed:
        def __len__(self) -> int:
            return 1

    config = doctor_config()
    checkup = Checkup(Unnamed(), "local", config, TOKENIZER, row_budgets(config))
    with pytest.raises(UserError, match=r"of local: cannot be copied .* use --workers 0"):
        examine(config, [checkup], tmp_path, Local(1))


@dataclasses.dataclass(frozen=True)
class Deadly:
    """A crash in a decoder."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        os._exit(1)


def test_a_process_that_dies_is_reported(tmp_path: Path) -> None:
    config = doctor_config()
    checkup = Checkup(Deadly(), "deadly", config, TOKENIZER, row_budgets(config))
    with pytest.raises(UserError, match=r"a process died 3 times .* at samples 0 to 0 of deadly"):
        examine(config, [checkup], tmp_path, Local(1))


def test_a_source_with_a_mistake_in_its_code_ends_the_report(tmp_path: Path) -> None:
    config = doctor_config()
    checkup = Checkup([None], "faulty", config, TOKENIZER, row_budgets(config))
    with pytest.raises(RuntimeError, match=r"reading sample 0 of source faulty .* AttributeError"):
        examine(config, [checkup], tmp_path, Local())


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.tuples(st.sampled_from([GOOD, TOO_LONG, BAD]), st.integers(0, 6)), max_size=30))
def test_duplicates_are_found(values: list[tuple[int, int]]) -> None:
    notes = np.zeros(len(values), NOTE)
    notes["status"], notes["hash"] = [v[0] for v in values], [v[1] for v in values]
    first: dict[int, int] = {}
    expected = []
    for index, (status, value) in enumerate(values):
        if status != BAD and first.setdefault(value, index) != index:
            expected.append((index, first[value]))
    assert sorted(zip(*(a.tolist() for a in duplicates(notes)), strict=True)) == expected
    assert shared([notes, notes]) == len(first)


def test_advice_follows_the_weights() -> None:
    config = doctor_config(sources=(SourceConfig("a", 3.0), SourceConfig("b", 1.0)))
    tables = [np.zeros(10, NOTE), np.zeros(10, NOTE)]
    for table, sizes in zip(tables, ((10, 20, 40), (0, 20, 0)), strict=True):
        table["status"] = GOOD
        table["visual_tokens"], table["text_tokens"], table["patches"] = sizes
    # on average 7.5 visual and 20 text tokens and 30 patches: 5.33 samples fill 160 patches
    assert "can be filled to 83%, 67% and 100%" in slot_advice(config, tables)
    assert "40, 112 and 160 would be filled alike" in slot_advice(config, tables)
    counted = dataclasses.replace(config, batch_samples=100)  # 100 / 5.33 / 0.95 rows
    assert "a batch of 100 samples (batch_samples) fills 20 rows on average" in slot_advice(counted, tables)


def test_hash_depends_on_image_and_text_alone(lines: str) -> None:
    config = doctor_config()
    checkup = Checkup([], "a", config, TOKENIZER, row_budgets(config))
    source = open_format("llava", lines)
    one, other = source[3], source[4]
    notes = [
        checkup.note(sample)
        for sample in (
            one,
            dataclasses.replace(one, key="b", system="T"),
            dataclasses.replace(one, images=other.images),
            dataclasses.replace(one, turns=other.turns),
        )
    ]
    hashes = [int(note["hash"]) for note in notes]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_histogram_marks_the_room_of_a_row() -> None:
    drawn = histogram("a < b", np.array([1, 2, 3, 1000]), limit=500)
    assert drawn["caption"] == "a < b, logarithmic; upwards: how many"
    assert 280 < drawn["mark"] < 320
    assert histogram("a", np.array([1, 2, 3]), limit=500)["mark"] is None
    same = histogram("a", np.array([4, 4, 4]))
    assert (same["caption"], same["bars"]) == ("a: 4, the same in all 3", [])
    empty = dict.fromkeys(("marks", "reasons", "repeated", "samples"), ())
    source = {"name": "<s>", "rows": [("a", "<td>")], "charts": [drawn, same], **empty}
    head = dict.fromkeys(("verdict", "bad", "date", "command", "config"), "x")
    text = render(HERE / "doctor.html.jinja", title="<h1>", advice="a & b", sources=[source], links=[], **head)
    assert "<figcaption>a &lt; b, logarithmic; upwards: how many</figcaption>" in text
    assert f'<line class="mark" x1="{drawn["mark"]}"' in text
    for raw, escaped in (("<s>", "&lt;s&gt;"), ("<td><td>", "<td>&lt;td&gt;</td>"), ("<h1><h1>", "<h1>&lt;h1&gt;")):
        assert raw not in text
        assert escaped in text


def test_built_in_sources_and_two_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "scenes" in SOURCES
    options = doctor.argparse.Namespace(source=["scenes", "llava:a/x.jsonl", "llava:b/x.jsonl"], root="")
    sources = doctor.with_sources(Config(), options).data.sources
    assert [source.name for source in sources] == ["scenes", "x.jsonl", "x.jsonl-2"]


def test_mistakes(lines: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, said in (
        ([], "no data given"),
        (["--source", "lava:x.jsonl"], "nearest is 'llava'"),
        (["--source", "llava"], "no path given"),
        (["--source", "llava:nothing.jsonl"], "nothing.jsonl"),
        (["--source", f"llava:{lines}", "--workers", "-1"], "--workers: must be at least 0 and at most 1,024, not -1"),
        (["--root", str(tmp_path)], "--root: has no effect without --source"),
        (["--source", "scenes", "--root", "x"], "sources.0.root of 'scenes': has no effect"),
        (["--source", f"llava:{lines}", "--config.data.tokenizer=nowhere"], "nowhere: no such folder"),
        (["--config", "nothing.py"], "nothing.py: no such config file"),
    ):
        assert main(["doctor", *arguments, "--out", str(tmp_path / "report")]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_help_teaches(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--config.data.quarantine=reports/stage1/quarantine.jsonl" in text
    assert "data.max_bad_share = 0.01" in text
