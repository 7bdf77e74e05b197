"""Tokenizers: text to ids and back. The files of a folder tell its kind: SentencePiece or byte-level BPE."""

from collections.abc import Mapping
from pathlib import Path

from navil_jax.data.tokenizers.base import JSON_FILE, Tokenizer
from navil_jax.data.tokenizers.byte_level import ByteLevelTokenizer
from navil_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from navil_jax.errors import UserError
from navil_jax.paths import path_of


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads a folder with tokenizer.model (InternLM2), or with tokenizer.json or vocab.json and merges.txt (Qwen).

    Beside them stand tokenizer_config.json and, in some folders, added_tokens.json and special_tokens_map.json.

    Raises:
      UserError: the folder or a needed file is missing or broken.
    """
    path = path_of(folder)
    if not path.is_dir():
        raise UserError(f"{folder}: no such folder with a tokenizer")
    known = {*SentencePieceTokenizer.FILES, *ByteLevelTokenizer.FILES}
    names = {name for name in known if (path / name).is_file()}
    return tokenizer_from_files({name: (path / name).read_bytes() for name in names}, str(path))


def tokenizer_from_files(files: Mapping[str, bytes], name: str = "tokenizer") -> Tokenizer:
    """The inverse of `Tokenizer.files`. Errors as in `load_tokenizer`; they call the folder `name`."""
    if "tokenizer.model" in files:
        return SentencePieceTokenizer(files, name)
    if JSON_FILE in files or {"vocab.json", "merges.txt"} <= files.keys():
        return ByteLevelTokenizer(files, name)
    raise UserError(
        f"{name}: no tokenizer.model (InternLM2), no {JSON_FILE} and no vocab.json with merges.txt (Qwen); "
        "give a folder that holds a tokenizer"
    )
