"""Generation against the released code in float32: tokens exactly, the logits of each step, and the text."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import FOLDER, IMAGE_CASES, TEXT_CASES, check, computed, load_case

from navil_jax.config import Config, DataConfig
from navil_jax.convert.hf_config import image_config, read_config
from navil_jax.convert.verify.compare import generation_pairs
from navil_jax.convert.verify.golden import Case, patch_features
from navil_jax.data.prompt import response_text
from navil_jax.data.tokenizers import load_tokenizer
from navil_jax.generate import slots
from navil_jax.generate.assistant import Assistant
from navil_jax.generate.engine import Engine, Request
from navil_jax.generate.sampling import Chosen, Sampler


@pytest.mark.parametrize("name", computed(IMAGE_CASES))
class TestImages:
    @pytest.mark.parametrize("key", ["gen", "gen_forced"])
    def test_tokens_and_logits(self, name: str, key: str):
        """gen is greedy; in gen_forced the tokens are dictated, special ones among them."""
        check(generation_pairs(load_case(name), key))

    def test_tokens_in_a_full_engine(self, name: str):
        """Beside drawn answers to longer prompts, in slots that others have left."""
        case, own = load_case(name), engine(name)
        prompt, golden = case.prompts("gen")[0], case.arrays["gen.tokens"][0].tolist()
        told: list[list[int]] = []
        for number in range(20):
            told.append([])
            drawn = Sampler(temperature=3.0, seed=number) if number % 3 else Sampler()
            own.submit(
                Request(prompt, drawn, len(golden), -1, on_token=lambda token, own=told[-1]: own.append(token.id))
            )
        while own.step():
            pass
        assert told[::3] == [golden] * 7
        assert all(answer != golden for number, answer in enumerate(told) if number % 3)

    def test_stop_token_ends_the_answer_and_belongs_to_it(self, name: str, monkeypatch):
        case = load_case(name)
        stop = case.info["gen_stop"]
        tokens = np.array(stop["forced"])
        monkeypatch.setattr(slots, "choose", dictated(tokens))
        own = Engine(case.config, case.params)
        found = own.generate([case.prompts("gen")[0]], Sampler(), len(tokens), case.info["eos_token_id"])
        assert found == [stop["returned"]]

    def test_from_files_to_text(self, name: str):
        """PNG files and a question -> the released prompt, pixels, tokens and answer."""
        case = load_case(name)
        assistant = golden_assistant(case)
        sample = case.info["samples"][0]
        images = [assistant.read_image(file) for file in sorted((FOLDER / name).glob("image_*.png"))]
        history = [tuple(turn) for turn in sample.get("history") or ()]
        prompt = assistant.prompt(history, sample["question"], images)
        expected = case.prompts("gen")[0]
        assert prompt.keys() == expected.keys()
        for key in ("visual_tokens", "visual_positions", "text_tokens", "text_positions", *patch_features(case)):
            np.testing.assert_array_equal(prompt[key], expected[key], err_msg=key)

        tokens = assistant.engine.generate([prompt], Sampler(), 16, assistant.stop_id)[0]
        assert tokens == case.arrays["gen.tokens"][0].tolist()
        assert response_text(assistant.tokenizer, tokens) == case.info["chat_response"] == case.info["gen_text"]
        assert "".join(assistant.answer(history, sample["question"], images, Sampler(), 16)) == case.info["gen_text"]


def dictated(tokens: np.ndarray) -> Callable[..., Chosen]:
    """In the place of `sampling.choose`: the step-th token is the step-th of these."""

    def choose(logits, settings, seen, step, logprobs) -> Chosen:
        zeros = jnp.zeros((len(step), 1))
        return Chosen(jnp.asarray(tokens, jnp.int32)[step], zeros[:, 0], zeros.astype(jnp.int32), zeros)

    return choose


@functools.cache
def engine(name: str) -> Engine:
    """Eight slots, which every test of a case uses anew."""
    case = load_case(name)
    return Engine(case.config, case.params, slots=8)


def golden_assistant(case: Case) -> Assistant:
    released = read_config(FOLDER / case.name)
    data = DataConfig(template=released["template"], system_message=released["system_message"])
    config = Config(model=case.config, images=image_config(released), data=data)
    return Assistant(config, load_tokenizer(FOLDER / "prompts" / "tokenizer"), engine(case.name))


@pytest.mark.parametrize("name", TEXT_CASES)
@pytest.mark.parametrize("key", ["gen", "gen_cross", "gen_long"])
def test_texts(name: str, key: str):
    """gen_cross passes the position limit while it decodes, gen_long in its prompt."""
    case = load_case(name)
    check(generation_pairs(case, key))
    tokens = case.arrays[f"{key}.tokens"]
    assert engine(name).generate(case.prompts(key), Sampler(), tokens.shape[1], stop_id=-1) == tokens.tolist()
