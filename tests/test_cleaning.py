"""`python -m navil_jax.data clean`: what each step leaves out, that it goes on, and that its lists are used."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from check_html import check_page, undated
from golden_cases import FOLDER
from made_cleaning import GOOD, SETTINGS, needs_packages, write_faults
from made_data import write_lines

from benchmarks.near_duplicates import caption, clouds, jpeg
from navil_jax.config import SourceConfig
from navil_jax.data.__main__ import main
from navil_jax.data.cleaning import compare, measure, near, parts
from navil_jax.data.cleaning.decide import RULES
from navil_jax.data.formats import files, open_format
from navil_jax.data.images import load_image
from navil_jax.data.left_out import Without, list_file
from navil_jax.data.sources import open_source
from navil_jax.errors import UserError
from navil_jax.evaluate.questions.layouts import read_questions

MME = FOLDER / "benchmarks" / "data" / "mme" / "tsv"


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """A file of samples, and the rule that leaves each out."""
    return write_faults(tmp_path_factory.mktemp("faults"))


def clean(path: str, out: Path, *more: str) -> dict[int, dict]:
    """Runs the command; index -> entry of the list."""
    flags = [flag for flag in ("--workers=0",) if not any(text.startswith("--workers") for text in more)]
    assert main(["clean", "--from", "llava", "--path", path, "--out", str(out), *flags, *more]) == 0
    return entries(out, Path(path).name)


def entries(out: Path, name: str) -> dict[int, dict]:
    head, *lines = [json.loads(line) for line in (out / list_file(name)).read_text().splitlines()]
    assert (head["source"], head["left_out"]) == (name, len(lines))
    return {line["index"]: line for line in lines}


def rules(found: dict[int, dict], samples: int) -> list[str]:
    return [found[index]["rule"] if index in found else "" for index in range(samples)]


@needs_packages
def test_every_fault_is_found_and_nothing_else(
    faults: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, wanted = faults
    found = clean(path, tmp_path / "out", *SETTINGS)
    assert rules(found, len(wanted)) == wanted
    said = capsys.readouterr().out
    assert f"train.jsonl       {len(wanted)}" in said
    assert f'leave_out="{tmp_path}/out/train.jsonl.leave_out.jsonl"' in said
    near = wanted.index("near")
    assert found[near]["kept"] == {"source": "train.jsonl", "index": 4, "key": "train.jsonl:5"}
    assert found[near]["key"] == f"train.jsonl:{near + 1}"
    assert "of 256 bits of the image differ" in found[near]["reason"]
    assert found[wanted.index("few_words")]["reason"] == "number of words 1, below 3"
    assert found[wanted.index("unreadable")]["reason"].startswith("no such file")
    page = (tmp_path / "out" / "report.html").read_text()
    check_page(page)
    assert all(f'id="rule-{rule}"' in page for rule in wanted if rule)


@needs_packages
@pytest.mark.parametrize("name", ["captions", "images", "exact", "near", "few_words", "blank", "unreadable"])
def test_what_is_off_leaves_nothing_out(faults: tuple[str, list[str]], tmp_path: Path, name: str) -> None:
    path, wanted = faults
    found = clean(path, tmp_path / "out", *SETTINGS, "--off", name)
    assert not [one for one in found.values() if name in (one["rule"], RULES[one["rule"]])]
    assert sum(map(bool, wanted)) > len(found) or name == "exact"  # the same sample again is near, too


@pytest.fixture
def in_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tasks of each kind."""
    monkeypatch.setattr(parts, "LEAST", 7)
    monkeypatch.setattr(near, "TABLES", 4)
    monkeypatch.setattr(compare, "FEW", 0)


@pytest.fixture(scope="module")
def alone(faults: tuple[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What this process writes, as `written` has it."""
    out = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(near, "TABLES", 4)
        clean(faults[0], out, *SETTINGS)
    return written(str(out))


def written(out: str) -> list[str]:
    """The list, and the report without its day and command."""
    found = (files.read_file(files.join(out, name)).decode() for name in (list_file("train.jsonl"), "report.html"))
    return [undated(text) for text in found]


@needs_packages
@pytest.mark.slow
def test_processes_write_the_same_list_and_report(
    alone: list[str], in_tasks: None, faults: tuple[str, list[str]], tmp_path: Path
) -> None:
    clean(faults[0], tmp_path / "two", *SETTINGS, "--workers=2")
    assert written(str(tmp_path / "two")) == alone


@needs_packages
@pytest.mark.slow
def test_beam_writes_the_same_list_and_report(
    alone: list[str], in_tasks: None, faults: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("apache_beam", reason="the extra [beam] is not installed")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    pipeline = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")
    clean(faults[0], tmp_path / "beam", *SETTINGS, "--runner=DirectRunner", "--", *pipeline)
    assert written(str(tmp_path / "beam")) == alone


@needs_packages
def test_a_cleaning_at_an_address_goes_on_and_its_list_is_used_there(
    alone: list[str], in_tasks: None, faults: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAVIL_CACHE", str(tmp_path / "cache"))
    path, wanted = faults
    command = ["clean", "--from", "llava", "--path", path, "--out", "memory://cleaned", *SETTINGS, "--workers=0"]
    assert main(command) == 0
    monkeypatch.setattr(measure.Measure, "__call__", None)
    monkeypatch.setattr(near, "find_near", None)
    assert main(command) == 0
    assert written("memory://cleaned") == alone
    source = open_source(SourceConfig("train.jsonl", kind="llava", path=path, leave_out="memory://cleaned"), "train")
    assert len(source) == sum(not rule for rule in wanted)


@needs_packages
def test_an_interrupted_run_goes_on_with_the_parts_that_are_missing(
    faults: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "LEAST", 8)
    path, wanted = faults
    whole = clean(path, tmp_path / "whole", *SETTINGS)
    read: list[int] = []
    call = measure.Measure.__call__

    def watched(self, indices):
        if indices[0] == 16 and not read.count(-1):
            read.append(-1)
            raise KeyboardInterrupt
        read.extend(indices)
        return call(self, indices)

    monkeypatch.setattr(measure.Measure, "__call__", watched)
    assert (
        main(["clean", "--from", "llava", "--path", path, "--out", str(tmp_path / "o"), "--workers=0", *SETTINGS])
        == 130
    )
    assert clean(path, tmp_path / "o", *SETTINGS) == whole
    assert sorted(read) == [-1, *range(len(wanted))]


@needs_packages
def test_other_thresholds_read_no_sample_again(
    faults: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = faults
    clean(path, tmp_path / "out")
    monkeypatch.setattr(measure.Measure, "__call__", None)
    found = clean(path, tmp_path / "out", "--min-side=1000")
    assert sum(one["rule"] == "small" for one in found.values()) >= GOOD


@needs_packages
def test_the_sample_of_the_first_source_is_kept(faults: tuple[str, list[str]], tmp_path: Path) -> None:
    path, _ = faults
    parts_ = {"first": {"root": str(Path(path).parent), "annotation": path}, "second": {"root": str(Path(path).parent)}}
    lines = Path(path).read_text().splitlines()
    parts_["second"]["annotation"] = write_lines(tmp_path / "second.jsonl", map(json.loads, lines[4:6] + lines[:2]))
    (tmp_path / "meta.json").write_text(json.dumps(parts_))
    out = tmp_path / "out"
    assert (
        main(["clean", "--from", "meta", "--path", str(tmp_path / "meta.json"), "--out", str(out), "--workers=0"]) == 0
    )
    found = entries(out, "second")
    assert [(one["rule"], one["kept"]["source"], one["kept"]["index"]) for one in found.values()] == [
        ("exact", "first", index) for index in (4, 5, 0, 1)
    ]


@needs_packages
def test_images_and_questions_of_benchmarks_are_left_out(tmp_path: Path) -> None:
    questions = read_questions("mme", MME)
    image = load_image(questions.records[0].images[0](), "mme")
    jpeg(image, 60).save(tmp_path / "0.png")
    clouds(1).save(tmp_path / "1.png")
    long = "How many of the people who stand beside the old lighthouse wear a yellow coat?"
    asked = write_lines(tmp_path / "asked.jsonl", [{"caption": long, "image": "1.png"}])
    clouds(2).save(tmp_path / "2.png")
    records = [
        {"image": "0.png", "caption": "A thing that nobody asked about"},
        {"image": "2.png", "caption": f"Yes. {long} Two of them."},
        {"image": "2.png", "caption": "A plain image of some clouds"},
    ]
    path = write_lines(tmp_path / "train.jsonl", records)
    against = ["--against", f"mme:{MME}", "--against", f"llava:{asked}"]
    found = clean(path, tmp_path / "out", *against)
    assert rules(found, 3) == ["benchmark_image", "benchmark_question", ""]
    assert found[0]["kept"]["source"] == f"--against mme:{MME}"
    assert found[1]["kept"]["key"] == "asked.jsonl:1"
    assert clean(path, tmp_path / "out", *against, "--off", "benchmarks") == {}


@needs_packages
def test_a_phrase_of_many_questions_leaves_nothing_out(tmp_path: Path) -> None:
    phrase = "Answer the question with the letter of the right option only please"
    questions = [{"caption": f"{number} {phrase}"} for number in range(6)]
    asked = write_lines(tmp_path / "asked.jsonl", questions)
    path = write_lines(tmp_path / "train.jsonl", [{"caption": f"What is it? {phrase} now"}])
    assert clean(path, tmp_path / "out", "--against", f"llava:{asked}") == {}


@needs_packages
def test_sampling_keeps_the_same_samples_wherever_they_stand(tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = list({caption(draw): None for _ in range(200)})
    kept = []
    for name, order in (("a", texts), ("b", texts[::-1])):
        path = write_lines(tmp_path / f"{name}.jsonl", [{"caption": text} for text in order])
        out = clean(path, tmp_path / name, "--keep", f"{name}.jsonl=50", "--off", "near")
        assert {one["rule"] for one in out.values()} == {"sampling"}
        kept.append({text for index, text in enumerate(order) if index not in out})
    assert len(kept[0]) == 50
    assert kept[0] == kept[1]
    share = clean(path, tmp_path / "b", "--keep", "b.jsonl=0.3", "--off", "near")
    assert 0.15 < 1 - len(share) / len(texts) < 0.45


@needs_packages
def test_training_and_convert_use_the_list(
    faults: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, wanted = faults
    clean(path, tmp_path / "out", *SETTINGS)
    entry = SourceConfig("train.jsonl", kind="llava", path=path, leave_out=str(tmp_path / "out"))
    source = open_source(entry, "train")
    staying = [index for index, rule in enumerate(wanted) if not rule]
    whole = open_format("llava", path)
    assert [sample.key for sample in map(source.__getitem__, range(len(source)))] == [whole[i].key for i in staying]
    capsys.readouterr()
    listed = ["--leave-out", str(tmp_path / "out" / list_file("train.jsonl"))]
    assert main(["convert", "--from", "llava", "--path", path, "--out", str(tmp_path / "shards"), *listed]) == 0
    assert f"{len(wanted) - len(staying)} more are left out by {listed[1]}" in capsys.readouterr().out
    converted = open_format("array_record", str(tmp_path / "shards"))
    assert [converted[index].key for index in range(len(converted))] == [whole[index].key for index in staying]


@needs_packages
def test_a_list_of_other_files_is_refused(
    faults: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(Path(faults[0]).parent, folder)
    path = str(folder / "train.jsonl")
    clean(path, tmp_path / "out")
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join([lines[1], lines[0], *lines[2:]]))
    entry = SourceConfig("train.jsonl", kind="llava", path=path, leave_out=str(tmp_path / "out"))
    with pytest.raises(UserError, match="files have changed"):
        open_source(entry, "train")
    assert main(["clean", "--from", "llava", "--path", path, "--out", str(tmp_path / "out")]) == 2
    assert "holds measures of other sources, or their files have changed" in capsys.readouterr().err
    (folder / "train.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(UserError, match=f"is of {len(lines)} samples, the source has {len(lines) - 1}"):
        open_source(entry, "train")


@needs_packages
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--off", "nothing"], "--off nothing: no such step or rule"),
        (["--keep", "train.jsonl"], "write SOURCE=N"),
        (["--keep", "other=3"], "with one of the sources train.jsonl"),
        (["--keep", "train.jsonl=some"], "'some' is neither a number of samples nor a share"),
        (["--keep", "train.jsonl=1.5"], "'1.5' is neither"),
        (["--keep", "train.jsonl=nan"], "'nan' is neither"),
        (["--keep", "train.jsonl=-1"], "'-1' is neither"),
        (["--scripts", "latin,klingon"], "no script named 'klingon'"),
        (["--max-image-bits", "-1"], "--max-image-bits"),
        (["--pair", "all"], "--pair"),
        (["--against", "mme:nowhere"], "nowhere: no such file or folder"),
        (["--against", "mme"], "--against mme: no path given, write mme:PATH"),
        (["--against", "llava:"], "no path given, write llava:PATH"),
        (["--against", "docvqa/none:x"], "docvqa has val, test"),
        (["--against", "mmee:x"], "no kind of data named 'mmee'"),
        (["--config", "configs/demo.py"], "or twice"),
        (["--", "--region=x"], "--region=x: what stands behind -- are options of Apache Beam; give --runner, too"),
        (["--runner=DataflowRunner"], "workers of Dataflow do not see"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], said: str) -> None:
    path = write_lines(tmp_path / "train.jsonl", [{"caption": "A cat on a mat"}])
    command = ["clean", "--from", "llava", "--path", path, "--out", str(tmp_path / "out"), "--workers=0"]
    assert main([*command, *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "measures").exists()


@needs_packages
def test_the_parts_of_a_meta_source_find_their_lists_in_the_folder(tmp_path: Path) -> None:
    parts_ = {}
    for name, texts in (("a b", ["A cat on a mat", "x"]), ("a_b", ["y", "A dog in a house", "z"])):
        lines = write_lines(tmp_path / f"{name}.jsonl", [{"caption": text} for text in texts])
        parts_[name] = {"root": str(tmp_path), "annotation": lines}
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps(parts_))
    out = str(tmp_path / "out")
    assert main(["clean", "--from", "meta", "--path", str(meta), "--out", out, "--workers=0"]) == 0
    source = open_source(SourceConfig("stage", kind="meta", path=str(meta), leave_out=out), "train")
    assert [source[index].turns[0][1] for index in range(len(source))] == ["A cat on a mat", "A dog in a house"]
    shards = str(tmp_path / "shards")
    assert main(["convert", "--from", "meta", "--path", str(meta), "--out", shards, "--leave-out", out]) == 0
    assert [len(open_format("array_record", f"{shards}/{name}")) for name in parts_] == [1, 1]


def test_samples_without_the_list_are_those_between(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"caption": f"text {number}"} for number in range(12)])
    source = open_format("llava", path)
    for left_out in ([], [0], [11], [0, 1, 2], [3, 5, 7, 11], list(range(11))):
        view = Without(source, np.array(left_out, np.int64))
        wanted = [index for index in range(12) if index not in left_out]
        assert [view[index].turns for index in range(len(view))] == [source[index].turns for index in wanted]
        with pytest.raises(IndexError):
            view[len(view)]
        assert (view.stamp() == source.stamp()) == (view.fingerprint() == source.fingerprint())


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (None, "no list can be read"),
        ("nothing\n", "is not a list"),
        ("[]\n", "is not a list"),
        ('{"samples": 3, "files": "", "left_out": 2}\n{"index": 1}\n', "is not whole"),
        ('{"samples": 3, "files": "", "left_out": 1}\n{"index": 3}\n', "is not whole"),
        ('{"samples": 3, "files": "", "left_out": 2}\n{"index": 2}\n{"index": 1}\n', "is not whole"),
        ('{"samples": 4, "files": "", "left_out": 0}\n', "is of 4 samples, the source has 3"),
        ('{"samples": 3, "files": "other", "left_out": 0}\n', "the files have changed"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path: Path, lines: str | None, said: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"caption": f"text {number}"} for number in range(3)])
    listed = tmp_path / "list.jsonl"
    if lines is not None:
        listed.write_text(lines)
    with pytest.raises(UserError, match=said):
        open_source(SourceConfig("a", kind="llava", path=path, leave_out=str(listed)), "train")


@needs_packages
def test_a_list_of_everything_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"caption": "a"}, {"caption": "b"}])
    clean(path, tmp_path / "out")
    with pytest.raises(UserError, match="leaves out all 2 samples"):
        open_source(SourceConfig("a.jsonl", kind="llava", path=path, leave_out=str(tmp_path / "out")), "train")
