"""Prompts against the released chat function's strings and ids; training spans by hand and by properties."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from navil_jax.data.prompt import (
    DEFAULT_SYSTEM_MESSAGE,
    chat_prompt,
    encode_conversation,
    encode_prompt,
    image_text,
    prompt_ids,
    response_text,
    with_placeholders,
)
from navil_jax.data.tokenizers import load_tokenizer
from navil_jax.errors import UserError
from navil_jax.generate.stream import stream_text

GOLDEN = Path(__file__).parent / "golden"
TOKENIZERS = {
    "golden.json": load_tokenizer(GOLDEN / "prompts" / "tokenizer"),
    "golden_dummy_prefix.json": load_tokenizer(GOLDEN / "prompts" / "tokenizer_dummy_prefix"),
}
TOKENIZER = TOKENIZERS["golden.json"]
QWEN3 = load_tokenizer(GOLDEN / "prompts" / "tokenizer_qwen3")  # <think> and </think> are added tokens, but not special
THINK = [QWEN3.token_id(token) for token in ("<think>", "</think>")]
THINK_CASES = json.loads((GOLDEN / "prompts" / "golden_qwen3_think.json").read_text())["conversations"]
CONVERSATIONS = [
    pytest.param(file, case, id=f"{case['name']}-{file}")
    for file in TOKENIZERS
    for case in json.loads((GOLDEN / "prompts" / file).read_text())["conversations"]
]
MODEL_CASES = ["internlm2_small", "internlm2_windowed", "qwen3_small", "qwen3_small_tied"]
TEMPLATES = ["internlm2-chat", "qwen3-chat"]


def grids_of_images(grids: list[list[int]], num_scales: list[int]) -> list[list[tuple[int, int]]]:
    """Golden grids (time, rows, columns) of all images -> per image; each moment is written like a scale."""
    parts = np.split(np.array(grids).reshape(-1, 3), np.cumsum(num_scales)[:-1]) if num_scales else []
    return [[(rows, cols) for time, rows, cols in part.tolist() for _ in range(time)] for part in parts]


def merged(features: dict) -> tuple[list[int], dict[int, tuple[int, float]]]:
    """Ids in reading order, and place -> (target, weight) of the learnt places."""
    places = np.concatenate([features["visual_positions"], features["text_positions"]])
    tokens = np.concatenate([features["visual_tokens"], features["text_tokens"]])
    assert sorted(places) == list(range(len(places)))
    learnt = features["text_weights"] > 0
    rows = zip(
        features["text_positions"][learnt].tolist(),
        features["text_targets"][learnt].tolist(),
        features["text_weights"][learnt].tolist(),
        strict=True,
    )
    return tokens[np.argsort(places)].tolist(), {place: (target, weight) for place, target, weight in rows}


@pytest.mark.parametrize(("file", "case"), CONVERSATIONS)
def test_released_conversations(file: str, case: dict) -> None:
    tokenizer, expected = TOKENIZERS[file], case["expected"]
    grids = grids_of_images(case["grids"], case["num_scales"])
    arguments = (case["template"], case["system_message"], case["history"], case["question"], grids)
    prompt = chat_prompt(*arguments)
    assert prompt == expected["prompt"]
    assert prompt_ids(tokenizer, case["template"], prompt) == expected["input_ids"]
    assert tokenizer.token_id("<|im_end|>") == expected["eos_token_id"]
    response = response_text(tokenizer, case["answer_ids"])
    assert response == expected["response"]
    questions = [*(question for question, _ in case["history"] or ()), case["question"]]
    answers = [*(answer for _, answer in case["history"] or ()), response]
    history = zip(with_placeholders(questions, len(grids)), answers, strict=True)
    assert [list(turn) for turn in history] == expected["history"]
    if case["name"] not in ("markup_in_question", "literal_chat_markers"):
        ids, learnt = merged(encode_prompt(tokenizer, *arguments))
        assert ids == expected["input_ids"]
        assert not learnt


@pytest.mark.parametrize("case", THINK_CASES, ids=lambda case: case["name"])
def test_released_conversations_of_qwen3_s_tokenizer(case: dict) -> None:
    """The think block of the template is made of single ids, also in front of old answers."""
    once = [
        [1, rows, cols] for _, rows, cols in case["grids"]
    ]  # unlike golden.json, this file writes one moment of two
    grids = grids_of_images(once, case["num_scales"])
    arguments = ("qwen3-chat", case["system_message"], case["history"], case["question"], grids)
    prompt, expected = chat_prompt(*arguments), case["input_ids"]
    assert prompt == case["prompt"]
    assert prompt_ids(QWEN3, "qwen3-chat", prompt) == expected
    if case["name"] not in ("markup_in_question", "literal_chat_markers"):
        assert merged(encode_prompt(QWEN3, *arguments)) == (expected, {})
        turns = [*(case["history"] or ()), (case["question"], "Yes.")]
        if all(answer for _, answer in turns):
            ids, learnt = merged(encode_conversation(QWEN3, "qwen3-chat", arguments[1], turns, grids, "token"))
            assert ids[: len(expected)] == expected
            assert not {target for target, _ in learnt.values()} & set(THINK)
            assert QWEN3.decode(ids[len(expected) :]) == "Yes.<|im_end|>"


@pytest.mark.parametrize("text", ["<think>", "</think>", "<tool_call>"])
def test_typed_think_blocks_stay_text(text: str) -> None:
    typed = merged(encode_conversation(QWEN3, "qwen3-chat", text, [(text, text)], [], "token"))[0]
    clean = merged(encode_conversation(QWEN3, "qwen3-chat", "S", [("Q", "A")], [], "token"))[0]
    added = [i for i in typed if i >= QWEN3.token_id("<|endoftext|>")]
    assert added == [i for i in clean if i >= QWEN3.token_id("<|endoftext|>")]
    assert [i for i in added if i in THINK] == THINK


def test_produced_think_blocks_stay_in_the_answer() -> None:
    """They are not special, so decoding keeps them, as the released code does."""
    text = "<think>\nA cat?\n</think>\n\nA cat.<|im_end|>"
    ids = QWEN3.encode(text, allow_special=True)
    assert set(THINK) < set(ids)
    assert response_text(QWEN3, ids) == "".join(stream_text(QWEN3, ids)) == text.removesuffix("<|im_end|>")


def test_released_responses() -> None:
    for file, tokenizer in TOKENIZERS.items():
        for case in json.loads((GOLDEN / "prompts" / file).read_text())["chat_decode"]:
            assert response_text(tokenizer, case["ids"]) == case["response"], case


def test_released_default_system_message() -> None:
    messages = json.loads((GOLDEN / "prompts" / "golden.json").read_text())["default_system_messages"]
    assert set(messages) == set(TEMPLATES)
    assert set(messages.values()) == {DEFAULT_SYSTEM_MESSAGE}


@pytest.mark.parametrize("name", MODEL_CASES)
def test_released_training_labels(name: str) -> None:
    """The released inputs are the prompt, the answer and <|im_end|>; labels stand on the last two."""
    folder = GOLDEN / name
    config, golden = (json.loads((folder / file).read_text()) for file in ("config.json", "golden.json"))
    tensors, sample = load_file(folder / "golden.safetensors"), golden["samples"][0]
    grids = grids_of_images(tensors["inputs.image_grid_thw"].tolist(), tensors["inputs.num_scales"].tolist())
    history = [tuple(turn) for turn in sample.get("history") or ()]
    turns = [*history, (sample["question"], sample["answer"])]
    features = encode_conversation(TOKENIZER, config["template"], config["system_message"], turns, grids, "token")
    ids, learnt = merged(features)
    assert ids == tensors["inputs.input_ids"][0].tolist()
    labels = tensors["inputs.labels"][0]
    answer = {place - 1: (int(labels[place]), 1.0) for place in np.flatnonzero(labels != -100)}
    assert {place: learnt[place] for place in answer} == answer
    assert bool(set(learnt) - set(answer)) == bool(history)  # old answers are learnt too
    visual = np.isin(ids, [TOKENIZER.token_id("<IMG_CONTEXT>"), TOKENIZER.token_id("<img>")])
    np.testing.assert_array_equal(visual, tensors["llm.visual_token_mask"][0])
    np.testing.assert_array_equal(np.flatnonzero(visual), features["visual_positions"])


plain = st.text(max_size=30).filter(lambda text: "<" not in text and "[UNUSED" not in text)
turn_lists = st.lists(st.tuples(plain, plain.filter(bool)), min_size=1, max_size=3)


@pytest.mark.parametrize("template", TEMPLATES)
@given(system=plain, turns=turn_lists, images=st.integers(0, 2))
@example(system="", turns=[("", "\n\n  x"), ("a\n", "é😀")], images=1)
def test_training_ids_are_the_prompt_s(template: str, system: str, turns: list[tuple[str, str]], images: int) -> None:
    grids = [[(2, 2), (2, 4)]] * images
    ids, learnt = merged(encode_conversation(TOKENIZER, template, system, turns, grids, "sample"))
    *history, (question, answer) = turns
    prompt = chat_prompt(template, system, history, question, grids)
    assert ids == prompt_ids(TOKENIZER, template, f"{prompt}{answer}<|im_end|>")
    assert all(ids[place + 1] == target for place, (target, _) in learnt.items())
    assert np.isclose(sum(weight for _, weight in learnt.values()), 1)

    end = TOKENIZER.token_id("<|im_end|>")
    answers = TOKENIZER.decode([target for target, _ in (learnt[place] for place in sorted(learnt)) if target != end])
    assert sum(target == end for target, _ in learnt.values()) == len(turns)
    expected = TOKENIZER.decode([i for _, a in turns for i in TOKENIZER.encode(a, allow_special=False)])
    assert answers == expected


@pytest.mark.parametrize("template", TEMPLATES)
@given(system=plain, turns=turn_lists, images=st.integers(0, 2))
@example(system="\n", turns=[("", "\n\n  x"), ("\na\n", "é😀")], images=1)
def test_training_ids_are_the_prompt_s_with_qwen3_s_tokenizer(
    template: str, system: str, turns: list[tuple[str, str]], images: int
) -> None:
    grids = [[(2, 2), (2, 4)]] * images
    ids, learnt = merged(encode_conversation(QWEN3, template, system, turns, grids, "token"))
    *history, (question, answer) = turns
    prompt = chat_prompt(template, system, history, question, grids)
    assert ids == QWEN3.encode(f"{prompt}{answer}<|im_end|>", allow_special=True)
    assert ids.count(THINK[0]) == ids.count(THINK[1]) == (len(turns) if template == "qwen3-chat" else 0)
    assert merged(encode_prompt(QWEN3, template, system, history, question, grids))[0] == QWEN3.encode(prompt, True)
    targets = [target for target, _ in learnt.values()]
    assert targets.count(QWEN3.token_id("<|im_end|>")) == len(turns)
    assert not set(THINK) & set(targets)
    answers = QWEN3.decode([learnt[place][0] for place in sorted(learnt)])  # a token may begin in front of its answer
    assert all(unicodedata.normalize("NFC", text) in answers for _, text in turns)


def test_spans_by_hand() -> None:
    features = encode_conversation(TOKENIZER, "internlm2-chat", "S", [("Hi", "a"), ("b", "c")], [[(2, 4)]], "square")
    ids, learnt = merged(features)
    text = [TOKENIZER.decode([i]).strip() or " " for i in ids]
    assert text.count("<img>") == 1
    names = {place: TOKENIZER.decode([target]).strip() for place, (target, _) in learnt.items()}
    assert list(names.values()) == ["a", "<|im_end|>", "c", "<|im_end|>"]
    assert {round(weight, 6) for _, weight in learnt.values()} == {0.5}
    assert features["visual_tokens"].tolist() == [546, 548, 548]
    assert features["text_targets"][-1] == -1
    at_img_end = np.flatnonzero(features["text_tokens"] == TOKENIZER.token_id("</img>"))
    assert features["text_targets"][at_img_end] == TOKENIZER.encode("\n", allow_special=False)


@pytest.mark.parametrize(("rule", "weight"), [("token", 1), ("sample", 1 / 4), ("square", 1 / 2)])
def test_loss_weights(rule: str, weight: float) -> None:
    _, learnt = merged(encode_conversation(TOKENIZER, "qwen3-chat", None, [("b", "123")], [], rule))
    assert [w for _, w in learnt.values()] == [weight] * 4


@pytest.mark.parametrize("text", ["<IMG_CONTEXT>", "<img>", "<|im_end|>", "</s>", "<ref>", "[UNUSED_TOKEN_145]"])
def test_typed_markers_change_nothing(text: str) -> None:
    features = encode_conversation(TOKENIZER, "internlm2-chat", text, [(text, text)], [[(2, 2)]], "token")
    clean = encode_conversation(TOKENIZER, "internlm2-chat", "S", [("Q", "A")], [[(2, 2)]], "token")
    assert features["visual_tokens"].tolist() == clean["visual_tokens"].tolist()
    special = [i for i in merged(features)[0] if i >= 540 or i < 3]
    assert special == [i for i in merged(clean)[0] if i >= 540 or i < 3]


def test_image_in_an_answer_is_text() -> None:
    features = encode_conversation(TOKENIZER, "internlm2-chat", "S", [("Q", "say <image>")], [[(2, 2)]], "token")
    assert len(features["visual_tokens"]) == 2


def test_mistakes() -> None:
    def encode(turns: list[tuple[str, str]], images: int) -> None:
        encode_conversation(TOKENIZER, "internlm2-chat", None, turns, [[(2, 2)]] * images, "token")

    with pytest.raises(UserError, match="1 images"):
        encode([("<image> <image>", "a")], 1)
    with pytest.raises(UserError, match="0 images"):
        encode([("<image>", "a")], 0)
    with pytest.raises(UserError, match="turn 2"):
        encode([("q", "a"), ("q", "")], 0)
    with pytest.raises(UserError):
        encode([], 0)
    with pytest.raises(UserError, match="2 images"):
        chat_prompt("qwen3-chat", "", [("<image>", "a")], "q", [[(2, 2)]] * 2)


def test_image_text_example() -> None:
    assert image_text([(2, 4)]) == "<img><IMG_CONTEXT><IMG_CONTEXT><IMG_LINE_BREAK><IMG_FRAME_BREAK></img>"
