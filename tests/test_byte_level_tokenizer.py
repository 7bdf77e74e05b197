"""The byte-level tokenizer: both file layouts, added tokens, spans, and what prompts and answers make of it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from byte_level_files import CORE, CORPUS, LAYOUTS, PLAIN_SIZE, grown, load, trained
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from navil_jax.config import SPECIAL_TOKENS
from navil_jax.data.prompt import chat_prompt, encode_conversation, encode_prompt, prompt_ids, response_text
from navil_jax.data.tokenizers import load_tokenizer, tokenizer_from_files
from navil_jax.data.tokenizers.base import with_special_tokens
from navil_jax.data.tokenizers.byte_level import ByteLevelTokenizer
from navil_jax.errors import UserError
from navil_jax.generate.stream import stream_text

TEXTS = (
    "<|im_start|>user\nhi<|im_end|>",
    "a<think>\n\n</think>\n\nb",
    "It's 2026, isn't it?\n\n  \n x",
    "éé e\u0301 你😀",
)


@pytest.mark.parametrize("layout", LAYOUTS)
class TestLayouts:
    def test_ids_are_the_library_s(self, layout: str) -> None:
        tokenizer = load(layout)
        assert isinstance(tokenizer, ByteLevelTokenizer)
        for text in (*TEXTS, *CORPUS):
            ids = tokenizer.encode(text, allow_special=True)
            assert ids == trained().encode(text).ids
            for skip in (True, False):
                assert tokenizer.decode(ids, skip_special=skip) == trained().decode(ids, skip_special_tokens=skip)

    def test_facts(self, layout: str) -> None:
        tokenizer = load(layout)
        assert tokenizer.vocab_size == trained().get_vocab_size() == PLAIN_SIZE + 5
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, PLAIN_SIZE + 2, PLAIN_SIZE)

    def test_files_come_back_as_they_were(self, layout: str, tmp_path: Path) -> None:
        load(layout).save(tmp_path / "new")
        assert load_tokenizer(tmp_path / "new").files() == load(layout).files() == LAYOUTS[layout]

    def test_growing(self, layout: str) -> None:
        plain, tokenizer = load(layout), with_special_tokens(load(layout))
        size = plain.vocab_size
        assert tokenizer.special_token_ids == tuple(range(size, size + len(SPECIAL_TOKENS)))
        assert tokenizer.vocab_size == size + len(SPECIAL_TOKENS)
        assert with_special_tokens(tokenizer) is tokenizer
        assert tokenizer_from_files(tokenizer.files()).special_token_ids == tokenizer.special_token_ids
        ids = tokenizer.encode("<img><IMG_CONTEXT></img><think>", allow_special=True)
        assert ids[:3] == [tokenizer.token_id(token) for token in ("<img>", "<IMG_CONTEXT>", "</img>")]
        assert tokenizer.decode(ids) == "<img><IMG_CONTEXT></img><think>"
        assert tokenizer.decode(ids, skip_special=True) == "<think>"
        for text in TEXTS:
            assert tokenizer.encode(text, allow_special=True) == plain.encode(text, allow_special=True)


def test_the_same_as_the_transformers_library(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    grown().save(tmp_path)
    reference = transformers.Qwen2TokenizerFast.from_pretrained(tmp_path)
    assert len(reference) == grown().vocab_size
    for text in (*TEXTS, *CORPUS, "".join(SPECIAL_TOKENS)):
        ids = grown().encode(text, allow_special=True)
        assert ids == reference(text).input_ids
        for skip in (True, False):
            assert grown().decode(ids, skip_special=skip) == reference.decode(ids, skip_special_tokens=skip)


@given(text=st.text(max_size=40) | st.lists(st.sampled_from([*CORE, *SPECIAL_TOKENS, " ", "a", "é"])).map("".join))
def test_plain_text_comes_back(text: str) -> None:
    tokenizer = grown()
    ids = tokenizer.encode(text, allow_special=False)
    assert all(i < PLAIN_SIZE for i in ids)
    assert tokenizer.decode(ids) == normalizers.NFC().normalize_str(text)


@given(text=st.text(max_size=40) | st.text("e\u0301é你😀 a\u0323", max_size=20))
def test_spans_cover_the_text(text: str) -> None:
    tokens = grown().encode_with_spans(text)
    assert [token.id for token in tokens] == grown().encode(text, allow_special=False)
    ends = [0, *(token.end for token in tokens)]
    assert [token.begin for token in tokens] == ends[:-1]
    assert ends[-1] == len(text)


def test_spans_of_known_texts() -> None:
    def spans(text: str) -> list[tuple[int, int]]:
        return [(token.begin, token.end) for token in grown().encode_with_spans(text)]

    assert spans("xé") == [(0, 1), (1, 1), (1, 2)]
    assert spans("q😀z") == [(0, 1), (1, 1), (1, 1), (1, 1), (1, 2), (2, 3)]
    assert spans("") == []


def test_typed_markers_stay_text() -> None:
    tokenizer = grown()
    for text in (*SPECIAL_TOKENS, *CORE):
        ids = tokenizer.encode(f"a {text} b{text}", allow_special=False)
        assert max(ids) < PLAIN_SIZE, text
        assert [token.id for token in tokenizer.encode_with_spans(f"a {text} b{text}")] == ids


def test_decode_leaves_out_ids_beyond_the_table() -> None:
    ids = grown().encode("boxes", allow_special=False)
    assert grown().decode([-1, *ids[:1], 10**12, *ids[1:], grown().vocab_size]) == "boxes"
    assert grown().decode(grown().encode("é", allow_special=False)[:1]) == "\ufffd"


@pytest.mark.parametrize("template", ["qwen3-chat", "internlm2-chat"])
def test_prompts_of_a_conversation(template: str) -> None:
    """Nothing stands in front, markers are single tokens, and the answer's text is what is learnt."""
    arguments = (template, "Be brief.", [("What <img>?", "a <box>")], "And this?", [((2, 4),)])
    prompt = chat_prompt(*arguments)
    ids = prompt_ids(grown(), template, prompt)
    assert ids == trained_ids(prompt)
    assert ids[0] == grown().token_id("<|im_start|>")
    typed = encode_prompt(grown(), *arguments)
    visual = typed["visual_tokens"].tolist()
    assert visual == [grown().token_id(token) for token in ("<img>", "<IMG_CONTEXT>", "<IMG_CONTEXT>")]
    assert sorted([*typed["visual_positions"], *typed["text_positions"]]) == list(
        range(typed["text_positions"][-1] + 1)
    )

    sample = encode_conversation(grown(), template, "", [("Why é?", "Because é <img>.")], [], "token")
    learnt = sample["text_targets"][sample["text_weights"] > 0]
    assert grown().decode(learnt) == "Because é <img>.<|im_end|>"
    assert np.count_nonzero(learnt >= PLAIN_SIZE) == 1


def trained_ids(prompt: str) -> list[int]:
    """The library's ids of a prompt, with the special tokens added to its own table."""
    tokenizer = tokenizers.Tokenizer.from_str(trained().to_str())
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer.encode(prompt).ids


@given(text=st.text("ab é<|im_end>你\u0301😀", max_size=30))
def test_streamed_pieces_join_to_the_answer(text: str) -> None:
    ids = [*grown().encode(text, allow_special=False), grown().token_id("<|im_end|>")]
    assert "".join(stream_text(grown(), ids)) == response_text(grown(), ids)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tokenizer.json": b"{"}, r"tokenizer\.json: not JSON"),
        ({"tokenizer.json": b"[]"}, "not a JSON object"),
        ({"tokenizer.json": b"{}"}, "not a byte-level BPE"),
        ({"tokenizer.json": b'{"decoder": {"type": "ByteLevel"}, "model": {}}'}, "not a tokenizer"),
        ({"tokenizer_config.json": b"x"}, r"tokenizer_config\.json: not JSON"),
        ({"added_tokens.json": b'{"<far>": 9999}'}, r"the token <far> has the id 9999 .* and \d+ after the pieces"),
    ],
)
def test_broken_files(files: Mapping[str, bytes], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tokenizer_from_files(LAYOUTS["both"] | files)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_bytes(LAYOUTS["both"]["vocab.json"])
    with pytest.raises(UserError, match=r"no tokenizer\.model .* no vocab\.json with merges\.txt"):
        load_tokenizer(tmp_path)
