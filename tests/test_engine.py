"""Cached decoding equals the full forward pass; slots, neighbours, buckets and devices change nothing."""

import contextlib
import functools
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import load_case
from hypothesis import given, settings
from hypothesis import strategies as st

from navil_jax import console
from navil_jax.batch import BatchSpec
from navil_jax.config import MeshConfig
from navil_jax.convert.verify.compare import TOLERANCE
from navil_jax.convert.verify.golden import in_order, patch_features, sample_features
from navil_jax.errors import UserError
from navil_jax.generate.engine import Engine, Request, Token
from navil_jax.generate.programs import CACHE_FLOOR, Programs, bucket
from navil_jax.generate.sampling import Sampler
from navil_jax.generate.slots import Slots, neighbour
from navil_jax.model import params as model_params
from navil_jax.sharding import make_mesh
from navil_jax.train.profiling import compilations

CASE = load_case("internlm2_small")
PROGRAMS = ("_prefill_program", "_write", "_extend_program", "_first", "_step_program", "resized", "_empty_program")


@functools.cache
def programs() -> Programs:
    return Programs(CASE.config, CASE.params)


@functools.cache
def engine(devices: int = 1, slots: int = 1, reuse: bool = False) -> Engine:
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    return Engine(CASE.config, CASE.params, mesh, max_tokens=600, slots=slots, reuse=reuse)


def image_prompt(ending: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    tokens = np.append(CASE.arrays["gen.input_ids"][0], ending)
    return sample_features(CASE.config, tokens, patch_features(CASE))


def text_prompt(tokens: list[int]) -> dict[str, np.ndarray]:
    prompt = sample_features(CASE.config, np.array(tokens))
    return prompt | {"patches": np.zeros((0, CASE.config.vision.patch_dim))}


GREEDY = Sampler()
PROMPTS = [text_prompt([1, 7, 9]), image_prompt(), text_prompt(list(range(30, 90))), image_prompt((40, 41))]
PROMPTS += [text_prompt([99]), text_prompt([3 + i % 500 for i in range(480)])]


@functools.cache
def alone(prompt: int, count: int, sampler: Sampler = GREEDY) -> list[int]:
    """The first tokens after a prompt, from an engine with one slot."""
    return engine().generate([PROMPTS[prompt]], sampler, count, stop_id=-1)[0]


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
    logits, cache = programs().prefill([prompt], len(new))
    found = [logits[0]]
    for token in new:
        logits, cache = programs().decode(jnp.array([token]), cache)
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
    prompts = PROMPTS[:5]
    expected = [alone(number, 6) for number in range(5)]
    with compilations("_step_program") as compiled:
        own = engine(devices, slots=5)
        assert own.generate(prompts, Sampler(), 6, stop_id=-1) == expected
    assert own.slots == (5 if devices == 1 else 8)
    assert own.compilations["prefill"] == own.compilations["decode"] == len(compiled) == 1
    logits, _ = Programs(CASE.config, CASE.params, own.programs.mesh).prefill(prompts, 6)
    for row, prompt in enumerate(prompts):
        single, _ = programs().prefill([prompt], 6)
        np.testing.assert_allclose(logits[row], single[0], rtol=0, atol=TOLERANCE)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_tokens_are_the_same_whoever_was_in_the_slot_and_whoever_is_beside_it(data: st.DataObject):
    """Requests of other lengths, settings and ends come and go; some are cancelled."""
    own, answers, requests = engine(slots=3, reuse=data.draw(st.booleans())), {}, []
    drawn = Sampler(temperature=2.0, top_k=40, top_p=0.95, seed=11, repetition_penalty=1.3)
    expected = {}
    for number in range(data.draw(st.integers(1, 8))):
        prompt, count = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 30))
        sampler = data.draw(st.sampled_from([Sampler(), drawn]))
        stays = data.draw(st.integers(0, 3)) > 0
        expected[number] = alone(prompt, 30, sampler)[:count] if stays else None
        answers[number] = []
        take = lambda token, number=number: answers[number].append(token.id)  # noqa: E731
        requests.append((Request(PROMPTS[prompt], sampler, count, -1, on_token=take), stays))
    for request, stays in requests:
        own.submit(request)
        for _ in range(data.draw(st.integers(0, 6))):
            own.step()
        if not stays:
            request.cancel()
    while own.step():
        pass
    for number, (request, stays) in enumerate(requests):
        assert request.reason == "length" or (request.reason == "cancelled" and not stays)
        assert expected[number] is None or answers[number] == expected[number]


def test_a_row_ends_at_its_stop_token_and_the_others_go_on():
    first, second = alone(0, 12), alone(1, 12)
    stop = next(token for token in first if token not in second)
    answers = engine(slots=2).generate(PROMPTS[:2], Sampler(), 12, stop_id=stop)
    assert answers == [first[: first.index(stop) + 1], second]


def test_each_token_is_told_while_the_answer_goes_on():
    told: list[int] = []
    own = engine()
    own.submit(Request(PROMPTS[0], Sampler(), 4, -1, on_token=lambda token: told.append(token.id)))
    counts = []
    while not counts or counts[-1] < 4:
        own.step()
        counts.append(len(told))
    assert told == alone(0, 4)
    assert counts == [1, 2, 3, 4]


def test_log_probabilities_of_an_answer_are_those_of_the_logits():
    tokens: list[Token] = []
    own = engine(slots=2)
    own.submit(Request(PROMPTS[1], Sampler(), 3, -1))
    own.submit(Request(PROMPTS[0], Sampler(), 3, -1, logprobs=2, on_token=tokens.append))
    while own.step():
        pass
    ids = [token.id for token in tokens]
    scores = jax.nn.log_softmax(forward()(text_prompt([1, 7, 9, *ids[:2]]))[-3:])
    for row, token in zip(np.asarray(scores), tokens, strict=True):
        assert token.logprob == pytest.approx(row[token.id], abs=TOLERANCE)
        assert [number for number, _ in token.top] == np.argsort(-row)[:2].tolist()
        assert token.top[0] == pytest.approx((token.id, token.logprob))


def test_cache_of_a_full_bucket():
    """The last new token takes the last position of the cache."""
    tokens = [3 + i % 500 for i in range(500)]
    answer = engine().generate([text_prompt(tokens)], Sampler(), 12, stop_id=-1)[0]
    longer = engine().generate([text_prompt(tokens)], Sampler(), 60, stop_id=-1)[0]
    assert answer == longer[:12]


def test_a_fault_of_the_devices_ends_all_requests_and_the_engine_goes_on(monkeypatch):
    own = Engine(CASE.config, CASE.params, max_tokens=600, slots=2)
    requests = [Request(prompt, Sampler(), 4, -1) for prompt in PROMPTS[:3]]
    for request in requests:
        own.submit(request)
    own.step()
    with monkeypatch.context() as patched:
        patched.setattr(Slots, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            own.step()
    assert [request.reason for request in requests] == ["error"] * 3
    assert own.generate(PROMPTS[:1], Sampler(), 4, -1) == [alone(0, 4)]


@pytest.mark.slow
def test_nothing_is_compiled_after_the_warm_up(capsys, monkeypatch):
    """100 requests of random sizes, settings and arrivals, on two devices."""
    monkeypatch.setattr(console, "LOG_SECONDS", 0.0)
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    own = Engine(CASE.config, CASE.params, mesh, max_tokens=1400, slots=4, reuse=True)
    rng = random.Random(0)
    own.warm_up()
    assert "compiling: 100%" in capsys.readouterr().err
    requests = []
    for _ in range(100):
        tokens = [rng.randrange(3, 540) for _ in range(rng.choice([1, 20, 300, 600, 1100]))]
        beginning = requests[-1].prompt["text_tokens"].tolist() if requests and rng.random() < 0.3 else []
        prompt = rng.choice([text_prompt((beginning + tokens)[:1300]), image_prompt(tuple(tokens))])
        sampler = Sampler(rng.choice([0.0, 0.7]), rng.choice([0, 5]), rng.choice([1.0, 0.9]), rng.randrange(99))
        requests.append(Request(prompt, sampler, rng.randrange(1, 60), -1, rng.choice([None, 0, 3])))
    with contextlib.ExitStack() as stack:
        compiled = {name: stack.enter_context(compilations(name)) for name in PROGRAMS}
        for request in requests:
            own.submit(request)
            for _ in range(rng.randrange(3)):
                own.step()
        while own.step():
            pass
    assert {request.reason for request in requests} == {"length"}
    assert sum(request.cached > 0 for request in requests) > 10
    assert {name: len(times) for name, times in compiled.items()} == dict.fromkeys(PROGRAMS, 0)


def test_buckets():
    sizes = {bucket(count, 256) for count in range(1, 5000)}
    assert sorted(sizes) == [256, 512, 1024, 1536, 2048, 3072, 4096, 6144]
    assert all(bucket(count, 256) >= count for count in range(1, 5000))
    lengths = sorted({bucket(count, CACHE_FLOOR) for count in range(1, 5000)})
    for shorter, longer in itertools.pairwise(lengths):
        assert neighbour(shorter, lengths[-1]) == longer
        assert neighbour(longer, lengths[0]) == shorter


def test_mistakes():
    for prompt, count, said in (
        ([3] * 500, 101, "500 tokens and 101 new ones are over the limit of 600"),
        ([3], 0, "max-new-tokens 0"),
    ):
        with pytest.raises(UserError, match=said):
            engine().submit(Request(text_prompt(prompt), Sampler(), count, -1))
    with pytest.raises(UserError, match="logprobs 21: must be from 0 to 20"):
        engine().submit(Request(text_prompt([3]), Sampler(), 1, -1, logprobs=21))
    text_case = load_case("text_only_qwen3")
    with pytest.raises(UserError, match="no vision part"):
        Engine(text_case.config, text_case.params).submit(Request(image_prompt(), Sampler(), 1, -1))
