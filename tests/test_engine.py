"""Cached decoding equals the full forward pass; rows, buckets and devices change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import load_case
from hypothesis import given, settings
from hypothesis import strategies as st

from navil_jax.batch import BatchSpec
from navil_jax.config import MeshConfig
from navil_jax.convert.verify.compare import TOLERANCE
from navil_jax.convert.verify.golden import in_order, patch_features, sample_features
from navil_jax.errors import UserError
from navil_jax.generate.engine import Engine, bucket
from navil_jax.generate.sampling import Sampler
from navil_jax.model import params as model_params
from navil_jax.sharding import make_mesh
from navil_jax.train.profiling import compilations

CASE = load_case("internlm2_small")


@functools.cache
def engine(devices: int = 1) -> Engine:
    return Engine(CASE.config, CASE.params, make_mesh(MeshConfig(), jax.devices()[:devices]), max_tokens=600)


def image_prompt(ending: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    tokens = np.append(CASE.arrays["gen.input_ids"][0], ending)
    return sample_features(CASE.config, tokens, patch_features(CASE))


def text_prompt(tokens: list[int]) -> dict[str, np.ndarray]:
    prompt = sample_features(CASE.config, np.array(tokens))
    return prompt | {"patches": np.zeros((0, CASE.config.vision.patch_dim))}


@functools.cache
def forward():
    """Logits [n, vocab] of a whole text in reading order, without a cache."""
    logits = jax.jit(lambda params, batch: (model := model_params.bind(CASE.config, params)).logits(model(batch)[0]))

    def run(prompt: dict[str, np.ndarray]) -> np.ndarray:
        batch = BatchSpec(1, 64, 128, 256).build([[prompt]], CASE.config.special_id("<IMG_CONTEXT>"))
        return in_order(batch, logits(CASE.params, batch))

    return run


def check_against_forward(prompt: dict[str, np.ndarray], whole: dict[str, np.ndarray], new: list[int]) -> None:
    expected = forward()(whole)[-len(new) - 1 :]
    logits, cache = engine().prefill([prompt], len(new))
    found = [logits[0]]
    for token in new:
        logits, cache = engine().decode(jnp.array([token]), cache)
        found.append(logits[0])
    np.testing.assert_allclose(np.stack(found), expected, rtol=0, atol=TOLERANCE)


plain_tokens = st.lists(st.integers(3, 540), min_size=1, max_size=40)


@settings(max_examples=10, deadline=None)
@given(tokens=plain_tokens, new=st.lists(st.integers(3, 540), min_size=1, max_size=8))
def test_prefill_and_decode_equal_the_forward_pass(tokens: list[int], new: list[int]):
    check_against_forward(text_prompt(tokens), text_prompt(tokens + new), new)


def test_prefill_and_decode_equal_the_forward_pass_after_an_image():
    new = (30, 2, 77, 90)
    check_against_forward(image_prompt(), image_prompt(new), list(new))


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_rows_of_different_lengths_equal_each_alone(devices: int):
    prompts = [text_prompt([1, 7, 9]), image_prompt(), text_prompt(list(range(30, 90))), image_prompt((40, 41))]
    prompts.append(text_prompt([99]))
    alone = [engine().generate([prompt], Sampler(), 6, stop_id=-1)[0] for prompt in prompts]
    with compilations("_decode_program") as compiled:
        assert engine(devices).generate(prompts, Sampler(), 6, stop_id=-1) == alone
        logits, _ = engine(devices).prefill(prompts, 6)
    for row, prompt in enumerate(prompts):
        single, _ = engine().prefill([prompt], 6)
        np.testing.assert_allclose(logits[row], single[0], rtol=0, atol=TOLERANCE)
    if devices > 1:
        assert engine(devices).compilations == {"prefill": 1, "decode": 1}
        assert len(compiled) == 1


def test_a_row_ends_at_its_stop_token_and_the_others_go_on():
    prompts = [text_prompt([1, 7, 9]), text_prompt([5, 6])]
    script = np.array([[10, 20], [544, 21], [11, 22], [544, 544], [12, 23]])
    steps = list(engine().stream(prompts, lambda logits, step: script[step], 5, stop_id=544))
    assert steps == [[10, 20], [544, 21], [None, 22], [None, 544]]
    assert engine().generate(prompts, lambda logits, step: script[step], 3, 544) == [[10, 544], [20, 21, 22]]


def test_streaming_gives_each_token_before_the_next_is_chosen():
    chosen = []

    def choose(logits: jax.Array, step: int) -> jax.Array:
        chosen.append(step)
        return Sampler()(logits, step)

    stream = engine().stream([text_prompt([1, 7, 9])], choose, 4, stop_id=-1)
    for step in range(4):
        next(stream)
        assert chosen == list(range(step + 1))


def test_cache_of_a_full_bucket():
    """The last new token takes the last place of the cache."""
    tokens = [3 + i % 500 for i in range(500)]
    _, cache = engine().prefill([text_prompt(tokens)], 12)
    assert cache.keys.shape[3] == 512
    answer = engine().generate([text_prompt(tokens)], Sampler(), 12, stop_id=-1)[0]
    longer = engine().generate([text_prompt(tokens)], Sampler(), 60, stop_id=-1)[0]
    assert answer == longer[:12]


def test_buckets():
    sizes = {bucket(count, 256) for count in range(1, 5000)}
    assert sorted(sizes) == [256, 512, 1024, 1536, 2048, 3072, 4096, 6144]
    assert all(bucket(count, 256) >= count for count in range(1, 5000))


def test_mistakes():
    with pytest.raises(UserError, match="500 tokens and 101 new ones are over the limit of 600"):
        engine().prefill([text_prompt([3] * 500)], 101)
    with pytest.raises(UserError, match="max-new-tokens 0"):
        engine().prefill([text_prompt([3])], 0)
    text_case = load_case("text_only_qwen3")
    with pytest.raises(UserError, match="no vision part"):
        Engine(text_case.config, text_case.params).prefill([image_prompt()], 1)
