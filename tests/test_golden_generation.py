"""Generation against the released code in float32: tokens exactly, the logits of each step, and the text."""

import numpy as np
import pytest
from golden_cases import FOLDER, IMAGE_CASES, TEXT_CASES, check, computed, load_case

from navil_jax.config import Config, DataConfig
from navil_jax.convert.hf_config import image_config, read_config
from navil_jax.convert.verify.compare import Recorder, engine, generation_pairs
from navil_jax.convert.verify.golden import Case, patch_features
from navil_jax.data.prompt import response_text
from navil_jax.data.tokenizers import load_tokenizer
from navil_jax.generate.assistant import Assistant
from navil_jax.generate.sampling import Sampler


@pytest.mark.parametrize("name", computed(IMAGE_CASES))
class TestImages:
    @pytest.mark.parametrize("key", ["gen", "gen_forced"])
    def test_tokens_and_logits(self, name: str, key: str):
        """gen is greedy; in gen_forced the tokens are dictated, special ones among them."""
        check(generation_pairs(load_case(name), key))

    def test_stop_token_ends_the_answer_and_belongs_to_it(self, name: str):
        case = load_case(name)
        stop = case.info["gen_stop"]
        dictated, id_of_stop = Recorder([stop["forced"]]), case.info["eos_token_id"]
        prompt = case.prompts("gen")[0]
        assert engine(case).generate([prompt], dictated, len(stop["forced"]), id_of_stop) == [stop["returned"]]

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


def golden_assistant(case: Case) -> Assistant:
    released = read_config(FOLDER / case.name)
    data = DataConfig(template=released["template"], system_message=released["system_message"])
    config = Config(model=case.config, images=image_config(released), data=data)
    return Assistant(config, load_tokenizer(FOLDER / "prompts" / "tokenizer"), engine(case))


@pytest.mark.parametrize("name", TEXT_CASES)
@pytest.mark.parametrize("key", ["gen", "gen_cross", "gen_long"])
def test_texts(name: str, key: str):
    """gen_cross passes the position limit while it decodes, gen_long in its prompt."""
    check(generation_pairs(load_case(name), key))
