"""The chat page in a headless Chromium, at the server of a tiny model."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_assistant import CONFIG, MODEL, TOKENIZER, random_params
from made_browser import PROGRAM, Page, browsing
from made_server import listening, png
from PIL import Image, ImageDraw

from navil_jax.generate.assistant import Assistant
from navil_jax.generate.engine import Engine
from navil_jax.generate.stream import TextStream
from navil_jax.serve.limits import Limits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PROGRAM.exists(), reason=f"Chromium is not here ({PROGRAM})"),
]
HTML = "<img src=x onerror=document.title='run'><b>bold</b>"
MADE_FILE = """(() => {
  const bytes = Uint8Array.from(atob(%s), letter => letter.charCodeAt(0)), data = new DataTransfer();
  data.items.add(new File([bytes], %s, {type: "image/png"}));
  return data;
})()"""
ANSWERS = "[...document.querySelectorAll('.assistant')].map(element => element.textContent)"
IDLE = "document.getElementById('stop').disabled"


def dropped(content: bytes, name: str) -> str:
    """A script that makes a DataTransfer with an image in it."""
    return MADE_FILE % (json.dumps(base64.b64encode(content).decode()), json.dumps(name))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    engine = Engine(MODEL, random_params(), max_tokens=4000, slots=2, reuse=True)
    with listening(Assistant(CONFIG, TOKENIZER, engine), Limits(new_tokens=3000, requests=8)) as (address, _):
        yield address


@pytest.fixture(scope="module")
def page(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def fresh(page: Page, address: str) -> Iterator[Page]:
    """The page as it opens; no test may make it complain."""
    page.faults.clear()
    page.look(1400, 900)
    page.open(address)
    page.until("document.title === 'tiny'")
    yield page
    assert page.faults == []


def most_tokens(page: Page, count: int) -> None:
    page.run(f"document.getElementById('most').value = {count}")


def ask(page: Page, text: str) -> str:
    """Sends a question with Enter, and waits for the end of its answer."""
    before = len(page.run(ANSWERS))
    page.run("document.getElementById('text').focus()")
    page.type(text)
    page.press("Enter")
    page.until(f"{IDLE} && {ANSWERS}.length > {before}")
    return page.run(ANSWERS)[-1]


def test_images_by_choice_drop_and_paste_tell_what_they_cost(fresh: Page, tmp_path: Path):
    (tmp_path / "cat.png").write_bytes(png())
    fresh.choose_files("#files", [tmp_path / "cat.png"])
    for event, field in (("DragEvent('drop'", "dataTransfer"), ("ClipboardEvent('paste'", "clipboardData")):
        init = f"{{bubbles: true, cancelable: true, {field}: {dropped(png(64, 96), HTML)}}}"
        fresh.run(f"void document.body.dispatchEvent(new {event}, {init}))")
    captions = "[...document.querySelectorAll('figcaption')].map(caption => caption.textContent)"
    told = fresh.until(f"({captions}.filter(text => text.includes('tokens')).length === 3) && {captions}")
    assert all(f"of {4000} tokens" in text and "read at" in text for text in told), told
    assert "cat.png, 48 x 64\n" in told[0]
    assert f"{HTML}, 64 x 96\n" in told[1]
    assert fresh.run("document.title") == "tiny"
    fresh.run("document.querySelector('figure button').click()")
    assert fresh.run("document.querySelectorAll('figure').length") == 2
    most_tokens(fresh, 8)
    assert ask(fresh, "What is this?")
    assert fresh.run("document.querySelectorAll('.user img').length") == 2


def test_an_answer_is_streamed_stopped_and_made_again(fresh: Page):
    most_tokens(fresh, 3000)
    fresh.type("Count.")
    fresh.press("Enter")
    first = len(fresh.until(f"!{IDLE} && {ANSWERS}[0]"))
    fresh.until(f"{ANSWERS}[0].length > {first}")
    fresh.press("Escape")
    fresh.until(IDLE)
    most_tokens(fresh, 6)
    fresh.run("document.getElementById('again').click()")
    again = fresh.until(f"{IDLE} && {ANSWERS}.length === 1 && {ANSWERS}[0]")
    assert len(again) < 100
    assert ask(fresh, "And?") == fresh.run(ANSWERS)[1]
    fresh.run("document.getElementById('again').click()")
    fresh.until(f"{IDLE} && {ANSWERS}.length === 2")
    most_tokens(fresh, 3000)
    fresh.run("document.getElementById('again').click()")
    fresh.until(f"!{IDLE}")
    fresh.run("document.getElementById('stop').click()")
    fresh.until(IDLE)
    fresh.run("document.getElementById('fresh').click()")
    assert fresh.run("document.getElementById('talk').children.length") == 0


def test_what_has_no_answer_is_said(fresh: Page, monkeypatch):
    monkeypatch.setattr(TextStream, "push", lambda self, token: "")
    monkeypatch.setattr(TextStream, "end", lambda self: "")
    most_tokens(fresh, 2)
    assert ask(fresh, "one") == ""
    assert "an empty answer" in fresh.run("document.querySelector('.note:last-child').textContent")
    most_tokens(fresh, 3000)
    fresh.type("two")
    fresh.press("Enter")
    fresh.until(f"!{IDLE}")
    fresh.press("Escape")
    fresh.until(f"{IDLE} && document.querySelector('.note:last-child').textContent.startsWith('no answer')")
    most_tokens(fresh, 2)
    ask(fresh, "three")
    assert fresh.run("[...document.querySelectorAll('.user')].map(turn => turn.textContent)") == ["one", "three"]
    assert fresh.run("messages.map(message => message.role)") == ["user", "assistant"] * 2


def test_enter_sends_and_shift_enter_breaks_the_line(fresh: Page):
    most_tokens(fresh, 4)
    fresh.type("one")
    fresh.press("Enter", shift=True)
    fresh.type("two")
    assert fresh.run("document.getElementById('text').value") == "one\ntwo"
    ask(fresh, "")
    assert fresh.run("document.querySelector('.user').textContent") == "one\ntwo"
    assert fresh.run("document.getElementById('text').value") == ""


def test_markup_in_questions_answers_and_names_of_files_stays_text(fresh: Page, monkeypatch):
    from navil_jax.serve.protocol import Reply

    chunk = Reply.chunk

    def marked(self: Reply, number: int, delta: dict[str, Any], *more: Any, **named: Any) -> dict[str, Any]:
        return chunk(self, number, {"content": HTML} if delta.get("content") else delta, *more, **named)

    monkeypatch.setattr(Reply, "chunk", marked)
    init = f"{{bubbles: true, cancelable: true, dataTransfer: {dropped(b'junk', HTML)}}}"
    fresh.run(f"void document.body.dispatchEvent(new DragEvent('drop', {init}))")
    fresh.until("document.querySelector('figcaption')?.textContent.includes('cannot be shown')")
    fresh.run("document.querySelector('figure button').click()")
    most_tokens(fresh, 4)
    assert HTML in ask(fresh, HTML)
    assert fresh.run("document.querySelector('.user').textContent") == HTML
    assert fresh.run("document.querySelectorAll('#talk b, #talk img').length") == 0
    assert fresh.run("document.title") == "tiny"


def scene() -> bytes:
    """A red disc in front of a blue square."""
    image, file = Image.new("RGB", (640, 480), "#f4e9d0"), io.BytesIO()
    ImageDraw.Draw(image).rectangle((90, 120, 370, 400), fill="#2f5fb3")
    ImageDraw.Draw(image).ellipse((280, 60, 560, 340), fill="#c8372d")
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("width", [390, 1400])
def test_it_follows_the_scheme_and_never_scrolls_sideways(
    fresh: Page, width: int, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch
):
    """Its screenshots show an answer that is dictated here."""
    monkeypatch.setattr(TextStream, "push", lambda self, token: "")
    monkeypatch.setattr(TextStream, "end", lambda self: "A red disc in front of a blue square.")
    (tmp_path / "scene.png").write_bytes(scene())
    (tmp_path / ("a-long-name-" * 8 + ".png")).write_bytes(scene())
    backs = set()
    for dark in (False, True):
        fresh.look(width, 844 if width < 500 else 900, dark)
        fresh.open(fresh.run("location.href"))
        most_tokens(fresh, 40)
        fresh.choose_files("#files", [tmp_path / "scene.png"])
        fresh.until("document.querySelector('figcaption')?.textContent.includes('tokens')")
        ask(fresh, "What do you see?")
        fresh.choose_files("#files", [tmp_path / "scene.png"])
        fresh.until("document.querySelector('form figcaption')?.textContent.includes('tokens')")
        backs.add(fresh.run("getComputedStyle(document.body).backgroundColor"))
        at_end = "talk.scrollTop + talk.clientHeight >= talk.scrollHeight - 1"
        assert fresh.until(at_end)
        if folder := request.config.getoption("--screenshots"):
            Path(folder, f"chat-{width}-{'dark' if dark else 'light'}.png").write_bytes(fresh.screenshot())
        fresh.choose_files("#files", [*tmp_path.glob("a-long*")])
        ask(fresh, "w" * 300)
        fresh.run("document.querySelector('details').open = true")
        assert fresh.run("document.documentElement.scrollWidth") <= width
        assert fresh.run("talk.scrollWidth <= talk.clientWidth")
    assert len(backs) == 2
