"""Records in the layouts of published data sets: ShareGPT4V, LLaVA-OneVision and interleaved ones."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
from made_data import jpeg, outcomes, talk, write_lines

from navil_jax.data.formats import open_format
from navil_jax.data.sample import Sample

PHOTO = "coco/train2017/000000000009.jpg"


def put_photo(root: Path) -> None:
    (root / PHOTO).parent.mkdir(parents=True)
    (root / PHOTO).write_bytes(jpeg())


def read(root: Path, *records: dict) -> list[Sample | str]:
    put_photo(root)
    return outcomes(open_format("llava", write_lines(root / "a.jsonl", records), root=str(root)))


def test_sharegpt4v_s_array(tmp_path: Path) -> None:
    """Captions ask before `<image>`, and its mixture has text alone from ShareGPT, with a field model."""
    put_photo(tmp_path)
    caption = {"id": "000000000009", "image": PHOTO, "conversations": talk("What is here?\n<image>", "A meal.")}
    text = {"id": "LGwmcsd_0", "model": "", "conversations": talk("Hi", "Hello", "And?", "Bye")}
    (tmp_path / "a.json").write_text(json.dumps([caption, text]))
    first, second = outcomes(open_format("llava", str(tmp_path / "a.json"), root=str(tmp_path)))
    assert first == Sample("a.json#1", (jpeg(),), (("What is here?\n<image>", "A meal."),))
    assert second == Sample("a.json#2", (), (("Hi", "Hello"), ("And?", "Bye")))


def test_llava_onevision_s_parquet(tmp_path: Path) -> None:
    """A struct of bytes and path, null in samples of text alone; data_source says where each is from."""
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    turn = pyarrow.struct([("from", pyarrow.string()), ("value", pyarrow.string())])
    rows = {
        "id": ["a", "b", "c"],
        "image": pyarrow.array([{"bytes": jpeg(), "path": "a.jpg"}, None, {"bytes": jpeg(7), "path": None}], image),
        "conversations": pyarrow.array(
            [talk("<image>\nq", "x"), talk("text", "y"), talk("no mark", "z")], pyarrow.list_(turn)
        ),
        "data_source": ["sharegpt4v(coco)", "magpie_pro", "ai2d"],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    found = outcomes(open_format("parquet", str(tmp_path / "a.parquet")))
    assert found == [
        Sample("a.parquet#1", (jpeg(),), (("<image>\nq", "x"),)),
        Sample("a.parquet#2", (), (("text", "y"),)),
        Sample("a.parquet#3", (jpeg(7),), (("no mark", "z"),)),
    ]
    assert isinstance(found[0], Sample)
    assert found[0].unused == ("data_source", "id")


def test_images_stand_anywhere_in_the_turns_of_the_user(tmp_path: Path) -> None:
    """As M4-Instruct and other sets of several images have them."""
    turns = talk("First <image>, then <image>.\nWhich is red?", "Both.", "And <image>?", "No.", "Sure?", "Yes.")
    more = {"sample_id": 0, "choice_list": None, "metadata": {"dataset": "x", "task_instruction": ""}}
    first, second = read(
        tmp_path,
        {"image": [PHOTO] * 3, "conversations": turns, **more},
        {"image": [PHOTO] * 2, "conversations": turns},
    )
    assert isinstance(first, Sample)
    assert len(first.images) == 3
    assert first.turns == (
        ("First <image>, then <image>.\nWhich is red?", "Both."),
        ("And <image>?", "No."),
        ("Sure?", "Yes."),
    )
    assert second == "2 images but <image> stands 3 times in the questions"


def test_records_of_videos_that_are_not_there_are_refused(tmp_path: Path) -> None:
    records = [
        {"video": "a.mp4", "conversations": talk(f"{mark}\nWhat?", "A cat."), "data_source": "0_30_s_academic"}
        for mark in ("<image>", "<video>")
    ]
    assert all(str(found).startswith("no such file") for found in read(tmp_path, *records))
