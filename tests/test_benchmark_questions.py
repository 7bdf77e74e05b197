"""Questions of the benchmarks: every published layout gives the same records, images and prompts."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from golden_cases import FOLDER
from PIL import Image

from navil_jax.data.images import load_image
from navil_jax.errors import UserError
from navil_jax.evaluate.benchmarks.catalogue import BENCHMARKS
from navil_jax.evaluate.questions.layouts import SPLITS, read_questions
from navil_jax.evaluate.questions.prompts import LETTER, LETTER_CN, SHORT, make_prompt
from navil_jax.evaluate.questions.record import Record
from navil_jax.evaluate.questions.tsv import read_tsv

DATA = FOLDER / "benchmarks" / "data"
STYLES = {"vlmevalkit_internvl": "vlmevalkit", "internvl": "internvl", "lmms_eval": "lmms_eval"}


def wanted(name: str) -> dict[str, list[dict[str, Any]]]:
    """File of the made set -> its prompts in order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for text in (DATA / name / "prompts.jsonl").read_text().splitlines():
        line = json.loads(text)
        found.setdefault(line["file"], []).append(line)
    return found


CASES = [(name, file) for name in BENCHMARKS for file in wanted(name)]


def split_of(name: str, file: str) -> str:
    """The split that a file of the made sets holds."""
    stem = file.split("/")[-1]
    for split, layout in SPLITS[name].items():
        if stem == layout.tsv or (file.startswith("hf/") and stem == layout.parquet):
            return split
    raise AssertionError(file)


def records(name: str, file: str) -> list[Record]:
    if file.startswith("tsv/"):
        return read_tsv(DATA / name / file, name)
    folder = DATA / name / Path(file).parent
    return read_questions(name, folder.parent if name == "gqa" else folder, split_of(name, file)).records


def shown(image: bytes | Path) -> dict[str, Any]:
    read = load_image(image)
    return {"size": list(read.size), "rgb_sha256": hashlib.sha256(read.tobytes()).hexdigest()}


@pytest.mark.parametrize(("name", "file"), CASES)
def test_prompts_are_those_of_the_reference_codes(name, file):
    found = records(name, file)
    assert len(found) == len(wanted(name)[file])
    for record, line in zip(found, wanted(name)[file], strict=True):
        for style in STYLES.keys() & line.keys():
            assert make_prompt(name, STYLES[style], record) == line[style]


@pytest.mark.parametrize(("name", "file"), CASES)
def test_images_have_the_pixels_that_the_reference_codes_decode(name, file):
    for record, line in zip(records(name, file), wanted(name)[file], strict=True):
        if line["images"]:
            assert [shown(image()) for image in record.images] == line["images"]
        assert record.images


@pytest.mark.parametrize(("name", "file"), [case for case in CASES if case[1].startswith("tsv/")])
def test_indices_are_those_of_the_file(name, file):
    by_id = {record.id for record in records(name, file)}
    assert by_id == {line["index"] for line in wanted(name)[file]}


def test_sentences_are_those_that_were_published():
    published = json.loads((FOLDER / "benchmarks" / "prompts.json").read_text())
    assert published["short_answer.internvl"]["text"].endswith(SHORT)
    assert published["choice.internvl_and_vlmevalkit_internvl.en"]["text"].endswith(LETTER)
    assert published["choice.internvl_and_vlmevalkit_internvl.cn"]["text"].endswith(LETTER_CN)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_file_of_vlmevalkit_and_one_of_the_hub_have_the_same_lines(name):
    split = next(iter(SPLITS[name]))
    tsv = read_questions(name, DATA / name / "tsv", split).records
    hub = read_questions(name, hub_folder(name), split).records
    keys = {"answers", "answer", "answer_option", "options", "choices", "index", "A", "B", "C", "D", "task", "skills"}
    keys |= {"capability", "question_type", "type", "category", "precision", "subject", "l2-category"}
    found, same = ([shared(record.line, keys) for record in of] for of in (tsv, hub))
    assert found == same
    assert len(tsv) >= 10


def shared(line: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    """What both files tell of a line; pandas takes an option "None" for missing, and writes some numbers as 7.0."""
    found = {key: None if line[key] == "None" else line[key] for key in keys & line.keys()}
    if isinstance(found.get("options"), list):
        found["options"] = [option.removesuffix(".0") for option in found["options"]]
    return found


def hub_folder(name: str) -> Path:
    return DATA / name / "hf" / "data" if name == "mmmu" else DATA / name / "hf"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("docvqa", "val_v1.0.json"),
        ("infovqa", "infographicsVQA_val_v1.0_withQT.json"),
        ("ai2d", "test_vlmevalkit.jsonl"),
        ("scienceqa", "scienceqa_test_img.jsonl"),
        ("gqa", "llava_gqa_testdev_balanced_qwen_format.jsonl"),
        ("mmvet", "mm-vet.json"),
    ],
)
def test_files_of_the_makers_have_the_questions_of_the_hub(name, file):
    own = read_questions(name, DATA / name / file).records
    hub = read_questions(name, hub_folder(name)).records
    assert [make_prompt(name, "internvl", record) for record in own] == [
        make_prompt(name, "internvl", record) for record in hub
    ]
    assert [record.line.get("answers", record.line.get("answer")) for record in own] == [
        record.line.get("answers", record.line.get("answer")) for record in hub
    ]


def test_both_files_of_chartqa_are_one_split(tmp_path):
    for file in ("test_human.jsonl", "test_augmented.jsonl"):
        shutil.copy(DATA / "chartqa" / file, tmp_path)
    found = read_questions("chartqa", tmp_path).records
    hub = read_questions("chartqa", DATA / "chartqa" / "hf").records
    kinds = [[(record.question, record.line["answer"], record.line["type"]) for record in of] for of in (found, hub)]
    assert sorted(kinds[0]) == sorted(kinds[1])


def test_images_of_the_makers_are_found_in_a_folder_beside_their_list(tmp_path):
    shutil.copy(DATA / "docvqa" / "val_v1.0.json", tmp_path)
    record = read_questions("docvqa", tmp_path).records[0]
    with pytest.raises(UserError, match=r"entry 1: image: documents/inv0000_1\.png is not found beside"):
        record.images[0]()
    (tmp_path / "documents").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "documents" / "inv0000_1.png")
    assert record.images[0]() == tmp_path / "documents" / "inv0000_1.png"


def test_the_release_of_mme_is_read():
    found = read_questions("mme", DATA / "mme" / "release").records
    assert [record.line["category"] for record in found] == ["count", "count", "existence", "existence"]
    assert found[0].line["question_id"] == found[1].line["question_id"] == "count/0002.png"
    tsv = {record.question: record for record in read_questions("mme", DATA / "mme" / "tsv").records}
    assert all(shown(record.images[0]()) == shown(tsv[record.question].images[0]()) for record in found)


def test_a_question_without_its_image_is_refused(tmp_path):
    file = DATA / "gqa" / "hf" / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet"
    shutil.copy(file, tmp_path)
    with pytest.raises(
        UserError, match="12 questions have no image, the first is 201000000; the images of GQA are a fol"
    ):
        read_questions("gqa", tmp_path / file.name)


def test_answers_of_hidden_splits_are_missing():
    for name in ("docvqa", "infovqa", "mmbench"):
        for folder in ("tsv", "hf"):
            questions = read_questions(name, DATA / name / folder, "test")
            assert questions.layout.hidden
            assert all(not {"answer", "answers"} & record.line.keys() for record in questions.records)


def test_an_option_that_is_missing_leaves_its_letter_free(tmp_path):
    text = f"index\timage\tquestion\tA\tB\tC\tanswer\n0\t{IMAGE}\twhich\tx\tNone\tz\tC\n"
    file = tmp_path / "AI2D_TEST.tsv"
    file.write_text(text)
    (record,) = read_questions("ai2d", file).records
    assert make_prompt("ai2d", "internvl", record) == f"which\nA. x\nC. z\n{LETTER}"
    score = BENCHMARKS["ai2d"].protocols["vlmevalkit_2505"].score
    assert [score({**record.line, "prediction": said}) for said in ("C", "z", "B")] == [1, 1, 0]


def test_rows_that_are_not_asked_are_counted():
    assert read_questions("mmmu", DATA / "mmmu" / "tsv").left_out == "2 questions of other splits"
    full = DATA / "scienceqa" / "hf" / "ScienceQA-FULL" / "test-00000-of-00001.parquet"
    questions = read_questions("scienceqa", full)
    assert len(questions.records) + int(questions.left_out.split()[0]) == 12
    assert questions.left_out.endswith("without an image")


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "DocVQA_VAL.tsv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


IMAGE = "iVBOR" + "A" * 95


def test_cells_are_read_as_pandas_reads_them(tmp_path):
    rows = f'\ufeffindex\timage\tquestion\tanswer\r\n0\t{IMAGE}\t"a ""b""\nc\td"\t"[\'x\', ""y""]"\r\n\n'
    first, second = read_tsv(write(tmp_path, rows + '1\t0\tsay "hi"\tNone\r\n'), "docvqa")
    assert (first.question, first.line["answers"]) == ('a "b"\nc\td', ["x", "y"])
    assert (second.question, second.line.get("answers")) == ('say "hi"', None)
    assert first.images[0]() == second.images[0]()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("index\timage\tquestion\n0\t1\n", "row 1: has 2 cells, the head has 3"),
        (f'index\timage\tquestion\n0\t{IMAGE}\t"a"b\n', "row 1: cell 3: a quote that does not end where the cell does"),
        (f'index\timage\tquestion\n0\t{IMAGE}\t"a\n', "row 1: cell 3: a quote"),
        ("index\timage\tquestion\n0\t7\ta\n", "row 1: image: '7' is no index of a row with an image"),
        (f"index\timage\tanswer\n0\t{IMAGE}\ta\n", "row 1: has no question, which docvqa needs"),
        (b"index\timage\tquestion\n0\t1\t\xff\n", "row 1: question: not UTF-8 at byte 0"),
        ("index\timage\tquestion\n", "has no question of docvqa, split val"),
        (f"index\timage\tquestion\n0\t{IMAGE}\ta\n0\t0\tb\n", "id 0 stands twice"),
    ],
)
def test_a_broken_file_is_named_with_its_row(text, said, tmp_path):
    with pytest.raises(UserError, match="DocVQA_VAL") as caught:
        read_questions("docvqa", write(tmp_path, text))
    assert said in str(caught.value)


def test_an_image_that_is_no_base64_is_named(tmp_path):
    (record,) = read_tsv(write(tmp_path, f"index\timage\tquestion\n0\t{'A' * 97}\ta\n"), "docvqa")
    with pytest.raises(UserError, match="row 1: image: is no base64"):
        record.images[0]()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: read_questions("docvqa", folder / "x"), "no such file or folder"),
        (lambda folder: read_questions("docvqa", folder), "has no files of docvqa, split val: DocVQA_VAL.tsv, val"),
        (lambda folder: read_questions("docvqa", folder, "dev"), "--split dev: docvqa has val, test"),
        (lambda folder: read_questions("mmmu", DATA / "mmmu" / "hf"), "stands twice; name one of"),
    ],
)
def test_what_cannot_be_found_is_said(make: Callable[[Path], Any], said, tmp_path):
    with pytest.raises(UserError) as caught:
        make(tmp_path)
    assert said in str(caught.value)
