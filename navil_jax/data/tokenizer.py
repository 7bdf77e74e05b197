"""Text <-> ids on SentencePiece, in the file layout of the InternLM2 releases (released tokenizer)."""

import functools
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from navil_jax.config import SPECIAL_TOKENS
from navil_jax.errors import UserError

MODEL_FILE, CONFIG_FILE, ADDED_FILE, MAP_FILE = (
    "tokenizer.model",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
FILES = (MODEL_FILE, CONFIG_FILE, ADDED_FILE, MAP_FILE, "tokenization_internlm2.py")  # the first two are needed
CHAT_MARKERS = (
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
)
# What the released tokenizer writes closer together when it decodes, in this order.
_TIGHTER = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class Token(NamedTuple):
    """An id and the characters [begin, end) of the text that it stands for; both equal inside a split character."""

    id: int
    begin: int
    end: int


class Tokenizer:
    """A SentencePiece model and the tokens added to it.

    Added tokens (the markers of the chat template, of pictures and of boxes) are parsed from text only where the caller
    allows it. Elsewhere a literal "<img>" typed by a user is plain text, and so is a SentencePiece piece that stands
    for a marker under another name ("[UNUSED_TOKEN_145]" for "<|im_end|>" in the releases).
    """

    def __init__(self, files: Mapping[str, bytes], name: str = "tokenizer") -> None:
        """From the contents of the files; `name` is what errors call them. Raises `UserError` as `load`."""
        for needed in (MODEL_FILE, CONFIG_FILE):
            if needed not in files:
                raise UserError(f"{name}: no {needed}; a folder of the InternLM2 layout is needed")
        self._files = {file: files[file] for file in FILES if file in files}
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(files[MODEL_FILE])
        except RuntimeError as error:
            raise UserError(f"{name}/{MODEL_FILE}: not a SentencePiece model") from error
        config = _json(self._files, CONFIG_FILE, name)
        self._name = name
        self._ids = {token["content"]: int(i) for i, token in config.get("added_tokens_decoder", {}).items()}
        self._ids |= _json(self._files, ADDED_FILE, name)
        self._tokens = {i: token for token, i in self._ids.items()}
        self._additional = {_content(t) for t in config.get("additional_special_tokens", [])}
        self._core = {_content(config[key]) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self.pad_id = self.token_id(_content(config["pad_token"]))
        self.bos_id, self.eos_id = self._pieces.bos_id(), self._pieces.eos_id()

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads tokenizer.model, tokenizer_config.json and, where there, added_tokens.json, special_tokens_map.json.

        Raises:
          UserError: the folder or a needed file is missing or broken.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder with a tokenizer")
        return cls({name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}, str(folder))

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "Tokenizer":
        """The inverse of `files`."""
        return cls(files)

    def files(self) -> dict[str, bytes]:
        """File name -> content, byte for byte as loaded, for embedding in a checkpoint."""
        return dict(self._files)

    def save(self, folder: str | Path) -> None:
        """Writes the files as they were loaded."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (Path(folder) / name).write_bytes(content)

    @property
    def vocab_size(self) -> int:
        """Ids in use: pieces and added tokens."""
        return max(self._pieces.get_piece_size(), 1 + max(self._tokens, default=0))

    @functools.cached_property
    def special_token_ids(self) -> tuple[int, ...]:
        """Ids of `config.SPECIAL_TOKENS`, in that order. Raises `UserError` for a token that is not in the table."""
        return tuple(self.token_id(token) for token in SPECIAL_TOKENS)

    def token_id(self, token: str) -> int:
        """The id of an added token. Raises `UserError` if there is none."""
        if token not in self._ids:
            raise UserError(f"{self._name}: no token {token} in {ADDED_FILE} or {CONFIG_FILE}; add it there")
        return self._ids[token]

    def encode(self, text: str, allow_special: bool) -> list[int]:
        """Text -> ids, without `<s>`.

        Args:
          allow_special: parse added tokens, longest first, as the released tokenizer does everywhere, and encode the
            text between them piece by piece. Otherwise all text is plain.

        Example: "<img>a" -> [546, 441] if allow_special, else ids of "<", "im", "g", ">", "a"
        """
        if not allow_special:
            return [i for part in self._plain_parts(text) for i in self._pieces.encode(part)]
        ids = []
        for part in self._added_pattern.split(text):
            ids += [self._ids[part]] if part in self._ids else self._pieces.encode(part)
        return ids

    def encode_with_spans(self, text: str) -> list[Token]:
        """Plain text -> ids, as `encode` without special tokens, with the characters that each stands for."""
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
        of that text, and blanks before punctuation go. Bytes that are no UTF-8 become U+FFFD. An id outside the table
        (a model's vocabulary may be larger) decodes to nothing; the released code fails on it.

        Args:
          skip_special: leave out all special tokens.
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
        text, pending, after_special = "", [], False
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
    def _added_pattern(self) -> re.Pattern[str]:
        return _any_of(self._ids)

    @functools.cached_property
    def _alias_pattern(self) -> re.Pattern[str]:
        """Pieces that SentencePiece itself would parse into a marker."""
        table = self._pieces
        inside = (i for i in self._tokens if i < table.get_piece_size())
        return _any_of(table.id_to_piece(i) for i in inside if not (table.is_control(i) or table.is_unknown(i)))

    def _plain_parts(self, text: str) -> Iterator[str]:
        """Cuts every marker's alias after its first character, so that it stays text."""
        start = 0
        for match in self._alias_pattern.finditer(text):
            yield text[start : match.start() + 1]
            start = match.start() + 1
        yield text[start:]


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the tokens, longest first; matches nothing if there are none."""
    return re.compile("(" + ("|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)) or r"(?!)") + ")")


def _content(token: str | Mapping[str, str]) -> str:
    return token if isinstance(token, str) else token["content"]


def _json(files: Mapping[str, bytes], file: str, name: str) -> dict:
    try:
        return json.loads(files.get(file, b"{}"))
    except ValueError as error:
        raise UserError(f"{name}/{file}: not JSON ({error})") from error


def train_tokenizer(corpus: Iterable[str], size: int, folder: str | Path | None) -> Tokenizer:
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
        raise UserError(f"cannot train a tokenizer of {size} pieces: {' '.join(str(error).split())}") from error
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    tokenizer = Tokenizer({MODEL_FILE: model.getvalue(), **_layout(pieces)}, str(folder or "trained tokenizer"))
    if folder is not None:
        tokenizer.save(folder)
    return tokenizer


def _layout(pieces: int) -> dict[str, bytes]:
    """The JSON files beside a SentencePiece model of so many pieces, of which the first are <unk>, <s>, </s>."""
    added = {token: pieces + i for i, token in enumerate((*CHAT_MARKERS, *SPECIAL_TOKENS))}
    core = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    table = {"<unk>": 0, "<s>": 1, "</s>": 2, **added}
    config = {
        "added_tokens_decoder": {str(i): {"content": token, **plain, "special": True} for token, i in table.items()},
        "additional_special_tokens": list(added),
        **core,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "InternLM2Tokenizer",
    }
    special = {"additional_special_tokens": [{"content": token, **plain} for token in added], **core}
    contents = {ADDED_FILE: added, CONFIG_FILE: config, MAP_FILE: special}
    return {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in contents.items()}
