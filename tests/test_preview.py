"""Packed rows as people see them."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from check_html import check_page
from hypothesis import given, settings
from hypothesis import strategies as st
from made_sources import TOKENIZER, TOKENIZER_FOLDER, doctor_config
from PIL import Image

from navil_jax.batch import BatchSpec
from navil_jax.config import ImageConfig
from navil_jax.console import render
from navil_jax.data.__main__ import main
from navil_jax.data.features import sample_features
from navil_jax.data.inspect import page, terminal
from navil_jax.data.inspect.reading import RowView, Span, read_spans, view_rows, view_sample
from navil_jax.data.pipeline import batch_spec
from navil_jax.data.sample import Sample

RECIPE = str(Path(__file__).parent / "toy_recipe.py")
CONTEXT = TOKENIZER.token_id("<IMG_CONTEXT>")


def noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def samples() -> list[Sample]:
    return [
        Sample("a", (noise(64, 40, 1), noise(33, 32, 2)), (("One <image> two <image>?", "Yes."), ("And?", "No."))),
        Sample("b", (), (("<img> as text?", "It is text: <image>"),)),
        Sample("c", (noise(96, 32, 3),), (("Describe.", "Wide."),)),
    ]


def padded(image: Image.Image) -> np.ndarray:
    """With black at the right and the bottom, to multiples of 32 pixels."""
    pixels = np.asarray(image)
    return np.pad(pixels, ((0, -image.height % 32), (0, -image.width % 32), (0, 0)))


def test_packed_samples_are_read_back_whole() -> None:
    config = dataclasses.replace(doctor_config(), images=ImageConfig(min_patches=4, max_patches=64))
    features = [sample_features(s, config, TOKENIZER, i, 10 + i) for i, s in enumerate(samples())]
    spec: BatchSpec = dataclasses.replace(batch_spec(config), rows=2, text_slots=400)
    first, empty = view_rows(spec.build([features], CONTEXT), TOKENIZER, config.model.vision)
    assert empty.samples == ()
    assert [(view.source, view.sample) for view in first.samples] == [(0, 10), (1, 11), (2, 12)]
    for sample, view, own in zip(samples(), first.samples, features, strict=True):
        alone = view_sample(own, TOKENIZER, config.model.vision)
        assert view.spans == alone.spans
        assert len(view.images) == len(sample.images)
        for seen, image, again in zip(view.images, sample.images, alone.images, strict=True):
            np.testing.assert_array_equal(np.asarray(seen), padded(image))
            np.testing.assert_array_equal(np.asarray(again), padded(image))
        learnt = [span.text.strip() for span in view.spans if span.weight]
        assert learnt == [f"{answer}<|im_end|>" for _, answer in sample.turns]
        weights = {span.weight for span in view.spans if span.weight}
        assert weights == set(own["text_weights"][own["text_weights"] > 0].tolist())
    text = first.samples[1].spans[0].text
    assert "<img> as text?" in text
    assert text.endswith("assistant\n")
    assert first.fill == {
        "visual slots": (sum(len(f["visual_tokens"]) for f in features), spec.visual_slots),
        "text slots": (sum(len(f["text_tokens"]) for f in features), 400),
        "patch slots": (sum(len(f["patches"]) for f in features), spec.patch_slots),
    }


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.tuples(st.text("aé 漢\n", min_size=1, max_size=6), st.booleans()), max_size=5))
def test_spans_lose_no_token(parts: list[tuple[str, bool]]) -> None:
    ids: list[int] = []
    weights: list[float] = []
    for text, learnt in parts:
        found = [*TOKENIZER.encode(text, allow_special=False), TOKENIZER.token_id("<|im_end|>")]
        ids, weights = ids + found, weights + [0.5 * learnt] * len(found)
    spans = read_spans(ids, weights, TOKENIZER)
    assert sum(span.tokens for span in spans) == len(ids)
    assert [span.weight for span in spans for _ in range(span.tokens)] == weights
    assert "".join(span.text for span in spans).count("<|im_end|>") == len(parts)


def test_text_cannot_steer_terminal_or_page() -> None:
    config = doctor_config()
    bad = Sample("x", (), (("\x1b[2J<script>alert(1)</script>", "b\x07 & <b>"),))
    view = view_sample(sample_features(bad, config, TOKENIZER), TOKENIZER, config.model.vision)
    text = render(terminal.sample_text(view))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "alert(1)" in text
    row = RowView((view,), {})
    html = page.render(page.HERE / "rows.html.jinja", title="", rows=[row], titles={(0, 0): "<script>"}, links=[])
    assert html.count("<script") == 1  # the page's own
    assert "&lt;script&gt;alert(1)" in html


def test_long_text_is_cut_short() -> None:
    assert page.shortened("abcdef", 4) == "abcd ... (2 more characters)"
    assert page.shortened("abcd", 4) == "abcd"
    assert Span("a", 1).weight == 0


def arguments(*more: str) -> list[str]:
    return [
        "preview",
        "--config",
        RECIPE,
        f"--config.data.tokenizer={TOKENIZER_FOLDER}",
        "--config.model.decoder.vocab_size=92556",
        *more,
    ]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "rows.html"
    assert main(arguments("--rows", "3", "--out", str(path))) == 0
    text = capsys.readouterr().out
    assert text.count("\nrow ") == 3
    assert "[image 1: 32 x 32 pixels, 5 tokens]" in text
    assert "colors, colors/train/" in text
    assert "\x1b" not in text
    assert "samples in these rows:  colors 6" in text
    assert any(f"|{name}<|im_end|>}}" in text for name in ("red", "green", "blue", "white"))
    page_text = path.read_text()
    check_page(page_text)
    assert page_text.count('<h2 id="row-') == 3


def test_colours_on_a_terminal(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(arguments("--rows", "1")) == 0
    assert "\x1b[32m{" in capsys.readouterr().out


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for more, said in (
        (["--rows", "0"], "--rows: must be at least 1, not 0"),
        (["--config.data.rows_=1"], "rows_"),
        (["--out", str(tmp_path)], f"--out: {tmp_path}: is a folder, name a file"),
        (["--config.data.quarantine=none.jsonl"], "none.jsonl"),
    ):
        assert main(arguments(*more)) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.splitlines()[-1].startswith("error: ")


def test_help_teaches(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["preview", "--help"])
    assert ended.value.code == 0
    assert "--rows 4 --out rows.html" in capsys.readouterr().out
