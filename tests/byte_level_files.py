"""A small byte-level tokenizer in the file layouts of the Qwen3 releases."""

import functools
import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from navil_jax.data.tokenizers import Tokenizer, tokenizer_from_files
from navil_jax.data.tokenizers.base import with_special_tokens

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = ["user\nWhat colour is the <box>?\nIt is red. 你好", "assistant\nThere are 12 of 34 <img>.", "a <img> b"] * 9
CORE = {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<think>": False, "</think>": False}


@functools.cache
def trained() -> tokenizers.Tokenizer:
    """Byte-level BPE with the five added tokens of Qwen3 that matter."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(t, normalized=False, special=special) for t, special in CORE.items()])
    return tokenizer


def layouts() -> dict[str, dict[str, bytes]]:
    """Files of a Qwen3 folder: as released, with tokenizer.json alone, and without it."""
    spec = json.loads(trained().to_str())
    decoder = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in spec["added_tokens"]}
    additional = ["<|im_start|>", "<|im_end|>"]
    config = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    config |= {"add_bos_token": False, "additional_special_tokens": additional, "added_tokens_decoder": decoder}
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in spec["model"]["merges"]) + "\n"
    parts = {"vocab.json": json.dumps(spec["model"]["vocab"]).encode(), "merges.txt": merges.encode()}
    whole = {"tokenizer.json": trained().to_str().encode()}
    said = {"tokenizer_config.json": json.dumps(config).encode()}
    return {"both": whole | parts | said, "tokenizer.json": whole | said, "vocab.json": parts | said}


LAYOUTS = layouts()
PLAIN_SIZE = trained().get_vocab_size(with_added_tokens=False)


@functools.cache
def load(layout: str = "both") -> Tokenizer:
    return tokenizer_from_files(LAYOUTS[layout])


@functools.cache
def grown() -> Tokenizer:
    return with_special_tokens(load())
