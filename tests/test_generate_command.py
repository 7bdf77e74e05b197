"""`python -m navil_jax.generate`: lines of requests to lines of answers, in order, resumable."""

import contextlib
import json
import types
from pathlib import Path

import numpy as np
import pytest
from made_assistant import assistant
from PIL import Image

from navil_jax.convert import loading, opened
from navil_jax.data.prompt import PLACEHOLDER
from navil_jax.errors import UserError
from navil_jax.generate.__main__ import main
from navil_jax.generate.batch import Lines
from navil_jax.generate.messages import read_messages
from navil_jax.generate.sampling import Sampler


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("images") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)).save(file)
    return file


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    checkpoint = types.SimpleNamespace(step=3)
    monkeypatch.setattr(opened, "open_checkpoint", lambda name: contextlib.nullcontext(checkpoint))
    monkeypatch.setattr(loading, "load_assistant", lambda *_, **__: assistant())
    return checkpoint


def requests(image: Path) -> list[object]:
    parts = [{"type": "image_url", "image_url": {"url": str(image)}}, {"type": "text", "text": "What is it?"}]
    return [
        {"id": "a", "prompt": "What is it?", "images": [str(image)]},
        {"id": 2, "prompt": "x", "imagse": []},
        {"messages": [{"role": "system", "content": "Hi."}, {"role": "user", "content": parts}], "logprobs": 2},
        "not an object",
        {"id": "c", "prompt": "drawn", "temperature": 2.0, "seed": 5, "max_new_tokens": 3},
        {"prompt": "x", "images": ["none.png"]},
        {"prompt": "too long", "max_new_tokens": 99999},
        {"prompt": "x", "temperature": -1},
        {"prompt": "x", "stop": [""]},
    ]


def answered(folder: Path, lines: list[object]) -> list[dict]:
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [str(folder / "in.jsonl"), "--checkpoint", "any", "--out", str(folder / "out.jsonl")]
    assert main([*arguments, "--max-new-tokens", "8"]) == 0
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_every_line_is_answered_in_order_and_errors_are_counted(tmp_path: Path, image: Path, capsys):
    found = answered(tmp_path, requests(image))
    expected = "".join(assistant().answer((), "What is it?", [assistant().read_image(image)], Sampler(), 8))
    assert found[0]["text"] == found[2]["text"] == expected
    assert [line["id"] for line in found] == ["a", 2, 3, 4, "c", 6, 7, 8, 9]
    assert [len(token["top"]) for token in found[2]["logprobs"]] == [2] * found[2]["new_tokens"]
    drawn = Sampler(temperature=2.0, seed=5)
    assert found[4]["text"] == "".join(assistant().answer((), "drawn", [], drawn, 3))
    said = {1: "imagse: no such field", 3: "must be a JSON object", 5: "none.png: no such file"}
    said |= {6: "over the limit of 32768", 7: "temperature -1", 8: "stop: must be a text"}
    assert {number: "error" in line for number, line in enumerate(found)} == {n: n in said for n in range(9)}
    assert all(text in found[number]["error"] for number, text in said.items())
    assert "9 answers: " in (out := capsys.readouterr().out)
    assert out.endswith("; 6 of them hold an error\n")


@pytest.mark.parametrize("kept", [0, 1, 2, 3.5, 9])
def test_a_command_that_was_stopped_goes_on(tmp_path: Path, image: Path, kept: float, monkeypatch):
    whole = answered(tmp_path, requests(image))
    out = tmp_path / "out.jsonl"
    lines = out.read_text().splitlines(keepends=True)
    half = lines[int(kept)][:9] if kept % 1 else ""
    out.write_text("".join(lines[: int(kept)]) + half)
    asked = []
    start = type(assistant()).start
    monkeypatch.setattr(type(assistant()), "start", lambda *given: asked.append(1) or start(*given))
    assert answered(tmp_path, requests(image)) == whole
    assert len(asked) == sum("text" in line for line in whole[int(kept) :])


def test_other_requests_or_settings_are_refused(tmp_path: Path, loaded: types.SimpleNamespace, capsys):
    answered(tmp_path, [{"prompt": "x"}])
    arguments = [str(tmp_path / "in.jsonl"), "--checkpoint", "any", "--out", str(tmp_path / "out.jsonl")]
    assert main(arguments) == 2
    assert "was begun with max_new_tokens 8, now it is 1024" in capsys.readouterr().err
    loaded.step = 4
    assert main([*arguments, "--max-new-tokens", "8"]) == 2
    assert "was begun with step 3, now it is 4" in capsys.readouterr().err
    (tmp_path / "in.jsonl").write_text('{"prompt": "y"}\n')
    assert main([*arguments, "--max-new-tokens", "8"]) == 2
    assert "was begun with sha256" in capsys.readouterr().err
    (tmp_path / "out.jsonl").write_text("")  # nothing is answered, so nothing binds
    assert main([*arguments, "--max-new-tokens", "8"]) == 0
    assert main([arguments[0], "--checkpoint", "any", "--out", arguments[0]]) == 2
    assert "is the file of requests" in capsys.readouterr().err


def test_blank_lines_hold_no_request(tmp_path: Path, image: Path):
    request = b'{"prompt": "x", "max_new_tokens": 1}\r\n'
    content = [b"\xef\xbb\xbf" + request, b"\r\n", b'{"prompt": \n', b" \t\n", request, b"\n\n"]
    (tmp_path / "in.jsonl").write_bytes(b"".join(content))
    arguments = [str(tmp_path / "in.jsonl"), "--checkpoint", "any", "--out", str(tmp_path / "out.jsonl")]
    assert main(arguments) == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    assert [json.loads(line)["id"] for line in whole.splitlines()] == [1, 3, 5]
    for kept in (1, 2):
        (tmp_path / "out.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:kept]))
        assert main(arguments) == 0
        assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_file_without_requests_is_refused(tmp_path: Path, capsys):
    (tmp_path / "in.jsonl").write_text("\n \n")
    assert main([str(tmp_path / "in.jsonl"), "--checkpoint", "any", "--out", str(tmp_path / "out.jsonl")]) == 2
    assert "in.jsonl: holds no requests" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "a", "prompt": "b"}', "not JSON: 'prompt' stands twice in one object"),
        (b'{"id": NaN, "prompt": "b"}', "not JSON: NaN is no number"),
        (b'{"prompt": "b", "images": ["http://example.com/a.png"]}', "must be the path of a file"),
        (b'{"prompt": "b", "images": [""]}', "image '': must be the path of a file"),
        ('{"prompt": "b"}'.encode("utf-16"), "not JSON: 'utf-8' codec"),
    ],
)
def test_lines_that_cannot_be_used(line: bytes, said: str, tmp_path: Path):
    with pytest.raises(UserError, match=said):
        Lines(assistant(), tmp_path, Sampler(), 8).read(line)


def test_any_id_comes_back(tmp_path: Path):
    ids = ["\ud800", "é", 1.5, [{"a": None}]]
    found = answered(tmp_path, [{"id": key, "prompt": "x", "max_new_tokens": 1} for key in ids])
    assert [line["id"] for line in found] == ids


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


IMAGE_PART = {"type": "image_url", "image_url": {"url": "data:x"}}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (None, "messages: must be a list"),
        ([], "at least one message"),
        ([{"role": "assistant", "content": "x"}], "messages.0.role: must be 'user' here, not 'assistant'"),
        ([user("x"), user("y")], "messages.1.role: must be 'assistant'"),
        ([user("x"), {"role": "assistant", "content": "y"}], "the last one must be a user's"),
        ([{"role": "system", "content": "x"}], "the last one must be a user's"),
        (["x"], "messages.0.role"),
        ([user(None)], "messages.0.content: must be a text or a list of parts"),
        ([user([])], "messages.0: is empty"),
        ([user(" ")], "messages.0: is empty"),
        ([user([{"type": "audio"}])], "must be 'text' or 'image_url', not 'audio'"),
        ([user([7])], "messages.0.content.0.type"),
        ([user([{"type": "text", "text": 7}])], "messages.0.content.0.text: must be a text"),
        ([user([{"type": "image_url", "image_url": {}}])], "must be the address of an image"),
        ([user(f"a {PLACEHOLDER}")], "holds <image>, which stands for an image"),
        ([user("\ud800")], "is no UTF-8 at character 1"),
        ([user([IMAGE_PART] * 10_000)], "10,000 parts are over the limit of 1,000"),
        ([user("x")] * 10_000, "10,000 are over the limit"),
        ([{"role": "system", "content": [IMAGE_PART]}, user("x")], "must be 'text', not 'image_url'"),
    ],
)
def test_messages_that_cannot_be_used(messages: object, said: str):
    with pytest.raises(UserError) as error:
        read_messages(messages)
    assert said in str(error.value)


def test_messages_become_turns_with_images_where_they_stand():
    parts = [{"type": "text", "text": "First"}, IMAGE_PART, {"type": "text", "text": "then?"}]
    messages = [user(parts), {"role": "assistant", "content": "A."}, user([IMAGE_PART])]
    read = read_messages([{"role": "system", "content": "S"}, *messages])
    assert (read.system, read.history, read.question) == ("S", (("First\n<image>\nthen?", "A."),), "<image>")
    assert read.images == ("data:x", "data:x")
