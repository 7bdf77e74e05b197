"""Every field of a record is used, or makes it bad where the text would say something else, or is named as not used."""

import decimal
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_data import jpeg, outcomes, talk
from PIL import Image

from navil_jax.data.formats import open_format
from navil_jax.data.formats.records import to_sample
from navil_jax.errors import UserError

RED, BLUE = jpeg(200), jpeg(90)
ASKED = {"question": "q", "answer": "a"}
TALK = {"conversations": talk("q", "a")}


def turn(role: str, text: Any, **more: Any) -> dict:
    return {"role": role, "content": text, **more}


def messages(**of_answer: Any) -> dict:
    return {"messages": [turn("user", "q"), turn("assistant", "a", **of_answer)]}


def reason(record: dict, root: Path) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        to_sample(record, "k", str(root))
    return str(error.value)


EMPTY = ["", " ", b"", {}, {"bytes": None, "path": None}, {"bytes": b"", "path": ""}, [None], [""], [{}], [None, ""]]


@pytest.mark.parametrize("field", ["image", "images", "jpg", "photo", "image_path", "image_files"])
@pytest.mark.parametrize("empty", [*EMPTY, np.array([None], dtype=object)])
def test_an_image_that_is_there_and_empty_makes_a_record_bad(field: str, empty: object, tmp_path: Path) -> None:
    for text in (ASKED, TALK, {"text": "x"}):
        assert reason({field: empty, **text}, tmp_path).startswith(f"{field} is there and empty")


@pytest.mark.parametrize("nothing", [None, [], math.nan, np.array([], dtype=object)])
def test_no_image_at_all_is_a_sample_of_text(nothing: object) -> None:
    for field in ("image", "images", "png", "image_path"):
        assert to_sample({field: nothing, **ASKED}, "k").images == ()
    assert to_sample({"file_name": "", **ASKED}, "k").images == ()


@pytest.mark.parametrize("empty", EMPTY)
def test_an_empty_image_among_others_makes_a_record_bad(empty: object, tmp_path: Path) -> None:
    entry = empty[0] if isinstance(empty, list) else empty
    assert "image 2 of 2 is empty" in reason({"images": [RED, entry], **ASKED}, tmp_path)
    part = {"type": "image", "image": entry or ""}
    assert "empty" in reason({"messages": [turn("user", [part]), turn("assistant", "a")]}, tmp_path)


OTHERS = [
    BLUE,
    "b.jpg",
    "b.mp4",
    "b.wav",
    "b.ply",
    {"bytes": BLUE, "path": None},
    {"bytes": None, "path": "b"},
    [BLUE],
    ["b.png"],
    "data:image/png;base64,iVBORw0KGgo=",
    "DATA:audio/wav;base64,AAAA",
    Image.new("RGB", (3, 3)),
    b"\0\0\0\x20ftypisom",
    b"ply\nformat ascii",
    "b.jpg ",
    "b.jpg?size=9",
    np.zeros((4, 4, 3), np.uint8),
    np.array([BLUE], dtype=object),
]


@pytest.mark.parametrize("value", OTHERS, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("field", ["second", "right", "depth", "depth_map", "point_cloud", "other", "pair", "b"])
def test_a_second_image_by_any_name_makes_a_record_bad(field: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(RED)
    for image in (RED, "a.jpg", {"bytes": RED, "path": "a.jpg"}, [RED]):
        assert reason({"image": image, field: value, "text": "x"}, tmp_path).startswith(f"{field} names what is not")


@pytest.mark.parametrize("value", [BLUE, {"bytes": BLUE, "path": "b"}, "data:image/png;base64,iVBORw0KGgo="])
def test_an_image_in_a_field_of_facts_makes_a_record_bad(value: object, tmp_path: Path) -> None:
    for field in ("source", "original", "text_layer", "n", "answers"):
        assert reason({"image": RED, field: value, "text": "x"}, tmp_path).startswith(f"{field} names what is not")


HARMLESS = {
    "id": 7,
    "url": "http://x/a.jpg",
    "width": 3,
    "similarity": 0.3,
    "path": "x/a.jpg",
    "mask": BLUE,
    "depth": 3,
}


@pytest.mark.parametrize("image", [RED, "a.jpg"])
def test_what_tells_of_an_image_is_named_as_not_used(image: object, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(RED)
    sample = to_sample({"image": image, **HARMLESS, "nothing": None, "text": "x"}, "k", str(tmp_path))
    assert sample.unused == tuple(sorted(HARMLESS))


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({**TALK, "history": [["q", "a"]]}, "history"),
        ({**ASKED, "context": "Long ago."}, "context"),
        ({**ASKED, "choices": ["a", "b"]}, "choices"),
        ({**ASKED, "A": "x", "B": "y", "C": "z"}, "A is not read"),
        ({**ASKED, "choice_a": "x"}, "choice_a"),
        ({**ASKED, "Option_1": "x"}, "Option_1"),
        ({**ASKED, "multiple_choices": ["x"]}, "multiple_choices"),
        ({**ASKED, "candidates": ["x", "y"]}, "candidates"),
        ({"turns": [{**ASKED, "answer_choices": ["x", "y"]}]}, "turns 1: answer_choices"),
        ({**TALK, "weight": decimal.Decimal(0)}, "weight is 0"),
        ({"caption": "x", "instruction": "Which?"}, "instruction"),
        ({**messages(), "tools": [{"name": "f"}]}, "tools"),
        ({**messages(), "weight": 0}, "weight is 0"),
        ({**TALK, "loss": False}, "loss is False"),
        (messages(weight=0), "messages 2: weight is 0"),
        (messages(weight=0.5), "messages 2: weight is 0.5"),
        ({**ASKED, "History": [["q", "a"]]}, "History"),
        (messages(Loss=False), "messages 2: Loss is False"),
        (messages(loss_mask=0), "messages 2: loss_mask is 0"),
        (messages(weight="0.5"), "messages 2: weight is 0.5"),
        (messages(loss="false"), "messages 2: loss is False"),
        (messages(train=np.False_), "messages 2: train is False"),
        (messages(masked=True), "messages 2: masked is True"),
        (messages(tool_calls=[{"id": 1}]), "messages 2: tool_calls"),
        (messages(reasoning_content="Hm."), "messages 2: reasoning_content"),
        (messages(value="b"), "content and value differ"),
        (messages(**{"from": "human"}), "role and from differ"),
        ({"turns": [{**ASKED, "loss": 0}]}, "turns 1: loss is 0"),
        ({"turns": [{**ASKED, "user": "other"}]}, "question and user differ"),
        ({"turns": [{**ASKED, "context": "x"}]}, "turns 1: context"),
        ({"messages": [turn("system", "s"), *messages()["messages"]], "system": "t"}, "another system message"),
        ({**ASKED, "system": "s", "system_prompt": "t"}, "system and system_prompt are different"),
        (
            {**TALK, "messages": [turn("user", "other"), turn("assistant", "a")]},
            "conversations and messages are differ",
        ),
        ({"text": "a", "caption": "b"}, "caption and text are different texts"),
        ({"text": "a", "txt": "b"}, "text and txt are different texts"),
        (
            {"messages": [turn("user", [{"type": "image", "image": RED, "text": "t"}]), turn("assistant", "a")]},
            "has text beside its image",
        ),
        ({"conversations": "[{'from': 'human'}]"}, "must be a list, not text that describes one"),
    ],
)
def test_what_would_change_the_meaning_makes_a_record_bad(record: dict, named: str, tmp_path: Path) -> None:
    assert named in reason(record, tmp_path)


@pytest.mark.parametrize(
    ("record", "unused"),
    [
        ({**TALK, "context": "x", "choices": ["a"]}, ("choices", "context")),
        ({**TALK, "correct": False, "label": 0, "box": [0, 0], "score": 0.0}, ("box", "correct", "label", "score")),
        ({**ASKED, "a": "x", "choice": 2}, ("a", "choice")),
        ({**TALK, "text": "all of it", "answer": "b"}, ("answer", "text")),
        ({**TALK, "messages": 2, "turns": []}, ("messages",)),
        (messages(name="bot", weight=1, loss=True), ("messages.loss", "messages.name", "messages.weight")),
        ({"messages": [turn("user", "q", weight=0), turn("assistant", "a", value="a")]}, ()),
        (
            {"messages": [turn("user", [{"type": "text", "text": "q", "k": 1}]), turn("assistant", "a")]},
            ("messages.k",),
        ),
        ({"texts": [{"user": "q", "assistant": "a", "source": "s"}]}, ("texts.source",)),
        ({**TALK, **messages()}, ()),
        ({"text": "a", "caption": "a", "cls": 3}, ("cls",)),
        ({**ASKED, "system": "s", "system_prompt": "s", "key": "k", "kind": "x"}, ()),
    ],
)
def test_what_changes_nothing_is_named_as_not_used(record: dict, unused: tuple[str, ...]) -> None:
    assert to_sample(record, "k").unused == unused


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_a_system_message_has_several_names(name: str) -> None:
    assert to_sample({**TALK, name: "Be brief."}, "k").system == "Be brief."


@given(names=st.lists(st.text(st.characters(codec="utf-8"), max_size=100), unique=True, max_size=60))
def test_any_field_is_used_or_named_or_makes_the_record_bad(names: list[str]) -> None:
    record = {**dict.fromkeys(names, "said"), **ASKED}
    told = {name[:80] for name in record if name not in ("question", "answer", "key", "kind", "system")}
    try:
        said = len(to_sample(record, "k").unused)
    except (ValueError, OSError):
        said = min(50, len(told))  # bad, with a reason
    assert said == min(50, len(told))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: two columns are called 'text'"):
        open_format("parquet", str(tmp_path / "x.parquet"))


@pytest.mark.parametrize("kind", [pyarrow.float16(), pyarrow.float32(), pyarrow.float64()])
def test_numbers_of_parquet_are_the_shortest_text_of_their_type(tmp_path: Path, kind: pyarrow.DataType) -> None:
    column = pyarrow.array(np.array([1.1, 3.0, 0.3], kind.to_pandas_dtype()), kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    found = [sample.turns[0][1] for sample in open_format("parquet", str(tmp_path / "x.parquet"))]
    assert found == ["1.1", "3.0", "0.3"]


@pytest.mark.parametrize("column", ["text", "other"])
def test_a_time_of_parquet_that_no_calendar_has_is_a_bad_sample(tmp_path: Path, column: str) -> None:
    times = pyarrow.array([9 * 10**18, 0], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"caption": ["a", "b"], column: times}), tmp_path / "x.parquet")
    found = outcomes(open_format("parquet", str(tmp_path / "x.parquet")))
    assert f"{column}: timestamp[us] holds a value that cannot be read" in str(found[0])


def test_all_columns_of_parquet_count(tmp_path: Path) -> None:
    rows = [{"image": RED, "text": "x", "right": None, "id": 1}, {"image": RED, "text": "x", "right": BLUE, "id": 2}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    source = open_format("parquet", str(tmp_path / "x.parquet"))
    assert source[0].unused == ("id",)
    assert "right names what is not read" in str(outcomes(source)[1])
