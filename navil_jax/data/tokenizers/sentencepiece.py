"""Text <-> ids on SentencePiece, in the file layout of the InternLM2 releases (released tokenizer)."""

import functools
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from navil_jax.config import SPECIAL_TOKENS
from navil_jax.data.tokenizers.base import (
    ADDED_FILE,
    CONFIG_FILE,
    MAP_FILE,
    PLAIN_TOKEN,
    Token,
    Tokenizer,
    any_of,
    content,
    json_bytes,
)
from navil_jax.errors import UserError

MODEL_FILE = "tokenizer.model"
CODE_FILES = ("tokenization_internlm2.py", "tokenization_internlm2_fast.py")
CHAT_MARKERS = (
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
)
FIRST_RESERVED = 141  # the InternLM2 table keeps pieces [UNUSED_TOKEN_141], ... for the markers, in this order
# What the released tokenizer writes closer together when it decodes, in this order.
_TIGHTER = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model and the tokens added to it.

    Plain text is also a piece that stands for a marker under another name ("[UNUSED_TOKEN_145]" for "<|im_end|>" in the
    releases).
    """

    FILES = (MODEL_FILE, CONFIG_FILE, ADDED_FILE, MAP_FILE, *CODE_FILES)  # the first two are needed
    MARKERS = CHAT_MARKERS

    def __init__(self, files: Mapping[str, bytes], name: str = "tokenizer") -> None:
        if CONFIG_FILE not in files:
            raise UserError(f"{name}: no {CONFIG_FILE}; a folder of the InternLM2 layout is needed")
        super().__init__(files, name)
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(files[MODEL_FILE])
        except RuntimeError as error:
            raise UserError(f"{name}/{MODEL_FILE}: not a SentencePiece model") from error
        core = {key: content(self._config.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self._core = {token for token in core.values() if token is not None}
        pieces = {token: self._pieces.piece_to_id(token) for token in self._core}
        self._ids = {token: i for token, i in pieces.items() if not self._pieces.is_unknown(i)} | self._ids
        self._tokens = {i: token for token, i in self._ids.items()}
        additional = (content(token) for token in self._config.get("additional_special_tokens") or [])
        self._additional = {token for token in additional if token is not None}
        self.pad_id = None if core["pad_token"] is None else self.token_id(core["pad_token"])
        self.bos_id, self.eos_id = self._pieces.bos_id(), self._pieces.eos_id()

    @property
    def vocab_size(self) -> int:
        return max(self._pieces.get_piece_size(), 1 + max(self._tokens, default=0))

    def reserved_id(self, token: str) -> int | None:
        if token not in CHAT_MARKERS:
            return None
        piece = self._pieces.piece_to_id(f"[UNUSED_TOKEN_{FIRST_RESERVED + CHAT_MARKERS.index(token)}]")
        return None if self._pieces.is_unknown(piece) else piece

    def encode(self, text: str, allow_special: bool) -> list[int]:
        if not allow_special:
            return [i for part in self._plain_parts(text) for i in self._pieces.encode(part)]
        ids: list[int] = []
        for part, added in self.split(text):
            ids += [self._ids[part]] if added else self._pieces.encode(part)
        return ids

    def encode_with_spans(self, text: str) -> list[Token]:
        tokens, start = [], 0
        for part in self._plain_parts(text):
            found = self._pieces.encode(part, return_type="offset_mapping")
            offsets = zip(found["ids"], found["offsets"], strict=True)
            tokens += [Token(i, start + begin, start + end) for i, (begin, end) in offsets]
            start += len(part)
        return tokens

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Ids -> text with the blanks that the released tokenizer sets.

        Tokens added beyond the SentencePiece table are set off by blanks, a core marker behind text gets one in front
        of that text, and blanks before punctuation go.
        """
        texts: list[str] = []
        group: list[int] = []
        for i in ids:
            token = self._tokens.get(i)
            if token is None and not 0 <= i < self._pieces.get_piece_size():
                continue
            if skip_special and token in self._special:
                continue
            if token in self._set_off:
                texts += [text for text in [self._decode_group(group)] if text]
                texts.append(token)
                group = []
            else:
                group.append(i)
        if group:
            texts.append(self._decode_group(group))
        return " ".join(texts)

    def _decode_group(self, ids: Sequence[int]) -> str:
        text, after_special = "", False
        pending: list[int] = []
        for i in ids:
            if self._tokens.get(i) in self._special:
                text += "" if after_special else " "
                text += self._pieces.decode(pending) + self._tokens[i]
                pending, after_special = [], True
            else:
                pending.append(i)
                after_special = False
        text += self._pieces.decode(pending)
        for pattern in _TIGHTER:
            text = text.replace(pattern, pattern.strip())
        return text

    @functools.cached_property
    def _special(self) -> set[str]:
        return self._core | self._additional

    @functools.cached_property
    def _set_off(self) -> set[str]:
        beyond = {token for token in self._additional if self._ids.get(token, 0) >= self._pieces.get_piece_size()}
        return (set(self._ids) - self._special) | beyond

    @functools.cached_property
    def _alias_pattern(self) -> re.Pattern[str]:
        """Pieces that SentencePiece itself would parse into a marker."""
        table = self._pieces
        inside = (i for i in self._tokens if i < table.get_piece_size())
        return any_of(table.id_to_piece(i) for i in inside if not (table.is_control(i) or table.is_unknown(i)))

    def _plain_parts(self, text: str) -> Iterator[str]:
        """Cuts every marker's alias after its first character, so that it stays text."""
        start = 0
        for match in self._alias_pattern.finditer(text):
            yield text[start : match.start() + 1]
            start = match.start() + 1
        yield text[start:]


def train_tokenizer(corpus: Iterable[str], size: int, folder: str | Path | None) -> SentencePieceTokenizer:
    """Trains a small BPE tokenizer and writes it to a folder of the released layout (None: nowhere). Deterministic.

    Every digit and newline is a piece of its own, unknown characters fall back to bytes, and no blank is put in front.
    The 6 chat markers and the 12 special tokens follow the pieces.

    Args:
      corpus: texts.
      size: pieces at most, the 256 bytes and the controls included; fewer if the corpus holds no more.

    Raises:
      UserError: the corpus is empty or has more characters than pieces.
    """
    texts = (text for text in corpus if text.strip())
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        if needed := re.search(rf"\b{size} vs (\d+)", str(error)):
            least = f"its bytes, controls and characters alone are {needed[1]}"
            raise UserError(f"config.data.tokenizer_size: {size} pieces are too few, {least}; raise it") from error
        raise UserError(f"cannot train a tokenizer of {size} pieces: {' '.join(str(error).split())}") from error
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    tokenizer = SentencePieceTokenizer(
        {MODEL_FILE: model.getvalue(), **_layout(pieces)}, str(folder or "trained tokenizer")
    )
    if folder is not None:
        tokenizer.save(folder)
    return tokenizer


def _layout(pieces: int) -> dict[str, bytes]:
    """The JSON files beside a SentencePiece model of so many pieces, of which the first are <unk>, <s>, </s>."""
    added = {token: pieces + i for i, token in enumerate((*CHAT_MARKERS, *SPECIAL_TOKENS))}
    core = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    table = {"<unk>": 0, "<s>": 1, "</s>": 2, **added}
    config = {
        "added_tokens_decoder": {
            str(i): {"content": token, **PLAIN_TOKEN, "special": True} for token, i in table.items()
        },
        "additional_special_tokens": list(added),
        **core,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "InternLM2Tokenizer",
    }
    special = {"additional_special_tokens": [{"content": token, **PLAIN_TOKEN} for token in added], **core}
    contents: dict[str, Mapping[str, Any]] = {ADDED_FILE: added, CONFIG_FILE: config, MAP_FILE: special}
    return {name: json_bytes(value) for name, value in contents.items()}
