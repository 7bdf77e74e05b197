"""Generation against the released code in float32: tokens exactly, the logits of each step, and the text."""

import functools
import json

import jax
import numpy as np
import pytest
from golden_cases import FOLDER, PICTURE_CASES, TEXT_CASES, TOLERANCE, Case, load_case, patch_features, sample_features

from navil_jax.data.prompt import response_text
from navil_jax.data.tokenizer import Tokenizer
from navil_jax.inference.engine import Engine
from navil_jax.inference.sampling import Sampler

NO_STOP = -1


@functools.cache
def engine(name: str) -> Engine:
    case = load_case(name)
    return Engine(case.config, case.params)


def picture_prompt(case: Case) -> dict[str, np.ndarray]:
    return sample_features(case.config, case.arrays["gen.input_ids"][0], patch_features(case))


class Recorder:
    """Chooses the likeliest tokens, or those dictated, and keeps the logits of each step."""

    def __init__(self, dictated: list[int] | None = None):
        self.dictated, self.logits = dictated, []

    def __call__(self, logits: jax.Array, step: int) -> jax.Array:
        self.logits.append(np.asarray(logits[0]))
        if self.dictated is None:
            return Sampler()(logits, step)
        return np.full(len(logits), self.dictated[step], np.int32)


def check(name: str, prompt: dict[str, np.ndarray], key: str, dictated: list[int] | None = None) -> None:
    """Tokens and step logits of one golden generation."""
    golden = load_case(name).arrays
    recorder, steps = Recorder(dictated), golden[f"{key}.tokens"].shape[1]
    assert engine(name).generate([prompt], recorder, steps, NO_STOP) == golden[f"{key}.tokens"].tolist()
    np.testing.assert_allclose(np.stack(recorder.logits), golden[f"{key}.logits"][0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", PICTURE_CASES)
class TestPictures:
    def test_greedy(self, name: str):
        check(name, picture_prompt(load_case(name)), "gen")

    def test_dictated_tokens_with_special_ones_among_them(self, name: str):
        case = load_case(name)
        check(name, picture_prompt(case), "gen_forced", case.arrays["gen_forced.tokens"][0].tolist())

    def test_stop_token_ends_the_answer_and_belongs_to_it(self, name: str):
        case = load_case(name)
        stop = case.info["gen_stop"]
        dictated, id_of_stop = Recorder(stop["forced"]), case.info["eos_token_id"]
        prompt = picture_prompt(case)
        assert engine(name).generate([prompt], dictated, len(stop["forced"]), id_of_stop) == [stop["returned"]]

    def test_from_files_to_text(self, name: str):
        """PNG files and a question -> the released prompt, pixels, tokens and answer."""
        case = load_case(name)
        assistant = golden_assistant(case)
        sample = case.info["samples"][0]
        pictures = [assistant.read_picture(file) for file in sorted((FOLDER / name).glob("image_*.png"))]
        history = [tuple(turn) for turn in sample.get("history") or ()]
        prompt = assistant.prompt(history, sample["question"], pictures)
        expected = picture_prompt(case)
        assert prompt.keys() == expected.keys()
        for key in ("visual_tokens", "visual_positions", "text_tokens", "text_positions", *patch_features(case)):
            np.testing.assert_array_equal(prompt[key], expected[key], err_msg=key)

        tokens = assistant.engine.generate([prompt], Sampler(), 16, assistant.stop_id)[0]
        assert tokens == case.arrays["gen.tokens"][0].tolist()
        assert response_text(assistant.tokenizer, tokens) == case.info["chat_response"] == case.info["gen_text"]
        assert "".join(assistant.answer(history, sample["question"], pictures, Sampler(), 16)) == case.info["gen_text"]


def golden_assistant(case: Case):
    from navil_jax.config import Config, DataConfig
    from navil_jax.inference.assistant import Assistant
    from navil_jax.weights.released_config import image_config

    released = json.loads((FOLDER / case.name / "config.json").read_text())
    data = DataConfig(template=released["template"], system_message=released["system_message"])
    config = Config(model=case.config, images=image_config(released), data=data)
    return Assistant(config, Tokenizer.load(FOLDER / "prompts" / "tokenizer"), engine(case.name))


@pytest.mark.parametrize("name", TEXT_CASES)
@pytest.mark.parametrize("key", ["gen", "gen_cross", "gen_long"])
def test_texts(name: str, key: str):
    """gen_cross passes the position limit while it decodes, gen_long in its prompt."""
    case = load_case(name)
    check(name, sample_features(case.config, case.arrays[f"{key}.input_ids"][0]), key)
