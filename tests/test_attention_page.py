"""Looking inside: exact weights against NumPy and PyTorch's outputs, cells on the right patches, drawings and page."""

import re
from pathlib import Path

import numpy as np
import pytest
from check_html import check_page
from golden_cases import computed, load_case
from hypothesis import given, settings
from hypothesis import strategies as st
from made_assistant import CONFIG, MODEL, TOKENIZER, assistant
from made_runs import copy_case
from PIL import Image

from navil_jax.config import ImageConfig
from navil_jax.convert.verify.golden import Case
from navil_jax.data.features import patch_features
from navil_jax.data.images import image_patches, plan_scales
from navil_jax.data.prompt import encode_prompt
from navil_jax.generate.__main__ import main
from navil_jax.generate.attention import look
from navil_jax.generate.heat_maps import COLOURS, SHARE, curves, grids, heat_map, units_of
from navil_jax.generate.programs import Programs, length_of
from navil_jax.model.params import flatten

CASES = ("internlm2_small", "qwen3_small")


def rms(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * scale


def turned(x: np.ndarray, theta: float) -> np.ndarray:
    """[S, heads, D] with rotary embeddings."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] / theta ** (np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.concatenate([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)


def recomputed(case: Case, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights [H, S, S] and what the layer's attention gives [S, width], in float64, from PyTorch's input."""
    decoder = case.config.decoder
    own = {
        name.removeprefix("decoder/layers/"): np.asarray(value[layer], np.float64)
        for name, value in flatten(case.params).items()
        if name.startswith("decoder/layers/")
    }
    x = case.arrays[f"llm.layer_{layer - 1}" if layer else "llm.input_embeds"][0].astype(np.float64)
    visual = case.arrays["llm.visual_token_mask"][0].astype(bool)
    x = rms(x, own["attention_norm/scale"], decoder.norm_eps)

    def projected(which: str) -> np.ndarray:
        text, image = (np.einsum("sw,whd->shd", x, own[f"qkv/{of}/{which}/kernel"]) for of in ("text", "visual"))
        if decoder.qk_norm and which != "v":
            text, image = (
                rms(of, own[f"qkv/{name}/{which}_norm/scale"], decoder.norm_eps)
                for of, name in ((text, "text"), (image, "visual"))
            )
        return np.where(visual[:, None, None], image, text)

    group = decoder.num_heads // decoder.num_kv_heads
    q, k = (turned(projected(which), decoder.rope_theta) for which in "qk")
    k, v = (np.repeat(of, group, axis=1) for of in (k, projected("v")))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(decoder.head_dim)
    scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    heads = np.einsum("hqk,khd->qhd", weights, v)
    text = np.einsum("shd,hdw->sw", heads, own["out/text/kernel"])
    if decoder.serial_visual_output:
        image = text @ own["out/visual/kernel"]
    else:
        image = np.einsum("shd,hdw->sw", heads, own["out/visual/kernel"])
    return weights, np.where(visual[:, None], image, text)


@pytest.mark.parametrize("name", computed(CASES))
def test_weights_shares_and_norms_are_those_of_numpy_whose_outputs_are_pytorchs(name):
    case = load_case(name)
    (sample,) = case.samples("inputs", images=True)
    length, depth = length_of(sample), case.config.decoder.depth
    found = look(Programs(case.config, case.params), sample, range(depth), range(length))
    visual = case.arrays["llm.visual_token_mask"][0].astype(bool)
    asking = ~visual & (np.cumsum(visual) > 0)
    for layer in range(depth):
        weights, output = recomputed(case, layer)
        np.testing.assert_allclose(output, case.arrays[f"llm.attn_out_{layer}"][0], atol=2e-5)
        np.testing.assert_allclose(found.weights[layer], weights, atol=2e-6)
        np.testing.assert_allclose(found.weights[layer].sum(axis=-1), 1, atol=1e-6)
        share = weights[:, asking][:, :, visual].sum(axis=-1).mean()
        np.testing.assert_allclose(found.shares[layer], (share, 1 - share), atol=1e-6)
    for place in range(depth + 1):
        x = case.arrays[f"llm.layer_{place - 1}" if place else "llm.input_embeds"][0].astype(np.float64)
        norms = np.linalg.norm(x, axis=-1)
        np.testing.assert_allclose(found.norms[place], (norms[visual].mean(), norms[~visual].mean()), rtol=1e-4)


def test_a_prompt_longer_than_a_chunk_of_queries_is_summed_up_over_chunks():
    question = " ".join(["Which shape is blue?"] * 60)
    prompt = assistant().prompt((), question, [assistant().read_image(Image.new("RGB", (64, 48), "red"))])
    length = length_of(prompt)
    assert length > 512
    found = look(assistant().engine.programs, prompt, [1], range(length))
    visual = np.zeros(length, bool)
    visual[prompt["visual_positions"]] = True
    asking = ~visual & (np.cumsum(visual) > 0)
    share = found.weights[1][:, asking][:, :, visual].sum(axis=-1).mean()
    np.testing.assert_allclose(found.shares[1], (share, 1 - share), atol=1e-5)


def test_without_images_there_are_no_shares():
    found = look(assistant().engine.programs, assistant().prompt((), "Hi", []), [0], [-1])
    assert found.shares is None
    assert np.isnan(found.norms[:, 0]).all()
    assert np.isfinite(found.norms[:, 1]).all()


IMAGES = ImageConfig(min_patches=4, max_patches=400)


def prompt_of(images: list[Image.Image]) -> dict:
    """A prompt of these images, without a model."""
    patches = [image_patches(image, IMAGES, MODEL.encoder) for image in images]
    tokens = encode_prompt(TOKENIZER, CONFIG.data.template, "", (), "Hi", [one.grids for one in patches])
    return {**tokens, **patch_features(patches, CONFIG)}


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(20, 300), st.integers(20, 300)), min_size=1, max_size=2),
    seed=st.integers(0, 9),
)
def test_cells_lie_on_the_patches_of_their_tokens(sizes: list[tuple[int, int]], seed: int):
    """A model that attends to each visual token by the brightness of its patches makes a map of the image itself."""
    noise = np.random.default_rng(seed)
    images = [Image.fromarray(noise.integers(0, 256, (h, w, 3), np.uint8)).resize((w, h)) for w, h in sizes]
    prompt = prompt_of(images)
    weights = np.zeros(length_of({**prompt, "text_tokens": prompt["text_tokens"]}))
    units = units_of(prompt, MODEL)
    weights[units.positions] = prompt["patches"].reshape(len(units.positions), -1).mean(axis=1)
    found = grids(units, weights)
    scales = [
        (image, scale) for image in images for scale in plan_scales(image.height, image.width, IMAGES, MODEL.encoder)
    ]
    assert len(found) == len(scales)
    side, merge = MODEL.encoder.patch_size, MODEL.encoder.merge_size
    for grid, (image, scale) in zip(found, scales, strict=True):
        canvas = np.zeros((scale.rows * side, scale.cols * side, 3))
        narrow = image.resize((scale.width, image.height), Image.Resampling.BICUBIC)
        canvas[: scale.height, : scale.width] = narrow.resize((scale.width, scale.height), Image.Resampling.BICUBIC)
        unit = side * merge
        expected = canvas.reshape(scale.rows // merge, unit, scale.cols // merge, unit, 3).mean(axis=(1, 3, 4))
        np.testing.assert_allclose(grid, expected, atol=1e-9)


def test_a_drawing_has_the_highest_colour_where_the_weight_is_largest():
    image = Image.new("RGB", (96, 64), "black")
    scale = plan_scales(64, 96, IMAGES, MODEL.encoder)[-1]
    grid = np.zeros((scale.rows // 2, scale.cols // 2))
    grid[1, 2] = 0.25
    drawing = np.asarray(heat_map(image, scale, grid, 0.25, MODEL.encoder.patch_size))
    cell = drawing.shape[0] // grid.shape[0]
    hot = (drawing == (SHARE * COLOURS[-1]).round()).all(axis=-1)
    expected = np.zeros_like(hot)
    expected[cell : 2 * cell, 2 * cell : 3 * cell] = True
    np.testing.assert_array_equal(hot, expected)


def test_curves_take_a_single_layer_and_missing_values():
    assert curves("t", {"visual": [float("nan")], "text": [0.0]}).size == curves("t", {"a": [1.0, 2.0]}).size


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_case("internlm2_small", tmp_path_factory.mktemp("case") / "model")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "a & b.png"
    Image.new("RGB", (200, 120), "teal").save(path)
    return path


def run(checkpoint: Path, image: Path, out: Path, *flags: str) -> int:
    given_ = ["--checkpoint", str(checkpoint), "--image", str(image), "--prompt", "<b>What?</b>", "--out", str(out)]
    return main(["attention", *given_, *flags])


def test_the_command_writes_drawings_and_a_page_that_needs_nothing_else(checkpoint, image, tmp_path, capsys):
    assert run(checkpoint, image, tmp_path, "--layers", "0,2", "--heads", "mean,1", "--tokens=-1,0,-1") == 0
    drawings = list(tmp_path.glob("layer-*.png"))
    scales = {re.search(r"scale-(\d)", path.name)[1] for path in drawings}  # type: ignore[index]
    assert len(drawings) == 2 * 2 * 2 * len(scales)
    assert {path.name for path in tmp_path.iterdir()} - {path.name for path in drawings} == {
        "index.html", "shares.png", "norms.png",
    }  # fmt: skip
    page = (tmp_path / "index.html").read_text()
    check_page(page)
    assert page.count("<img ") == len(drawings) + 3  # two curves and the colours
    assert "&lt;b&gt;What?&lt;/b&gt;" in page
    assert "a &amp; b.png" in page
    assert "8 rows of drawings and their page: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--layers", "3"], "--layers: there is no layer 3; the model and prompt have 3, from 0"),
        (["--layers", "x"], "--layers: 'x' is no number"),
        (["--layers", ","], "--layers: ',' names none"),
        (["--heads", "4"], "--heads: there is no head 4"),
        (["--heads", ""], "--heads: ',' names none"),
        (["--tokens", "9999"], "--tokens: there is no token 9999"),
        (["--tokens=-9999"], "--tokens: there is no token -9999"),
        (["--image", "no.png"], "no.png: no such file"),
    ],
)
def test_mistakes_are_one_line(flags, said, checkpoint, image, tmp_path, capsys):
    assert run(checkpoint, image, tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())
