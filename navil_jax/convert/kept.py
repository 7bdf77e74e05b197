"""What is kept of an imported folder beside its weights and its tokenizer, so that an export is loaded as it was."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PATTERNS = ("*.py", "LICENSE*", "NOTICE*", "chat_template.*", "chat_templates/*", "generation_config.json")
MERGED = "preprocessor_config.json"  # kept but for the keys that an export writes
LARGEST = 4 << 20  # bytes of a file
CARD = "README.md"
LICENSE_KEYS = re.compile(r"license(_\w+)?:")


def kept_files(folder: Path) -> tuple[dict[str, str], list[str]]:
    """(name -> text of all files to keep, what is left behind and why). Code is text here: nothing runs it."""
    kept, left = {}, []
    for file in sorted({file for pattern in (*PATTERNS, MERGED) for file in folder.glob(pattern) if file.is_file()}):
        if file.stat().st_size > LARGEST:
            left.append(f"{file}: has more than {LARGEST:,} bytes and is not kept for an export")
            continue
        try:
            kept[str(file.relative_to(folder))] = file.read_bytes().decode()
        except UnicodeDecodeError:
            left.append(f"{file}: is no text and is not kept for an export")
    return kept, left


def license_lines(folder: Path) -> list[str]:
    """The lines of the front matter of a model card that name the license."""
    if not (folder / CARD).is_file():
        return []
    text = (folder / CARD).read_text(errors="replace").lstrip("\ufeff")
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    return [line.strip() for line in front[1].split("\n") if LICENSE_KEYS.match(line)] if front else []


def named_code(*configs: Mapping[str, Any]) -> list[str]:
    """The files that `auto_map` in config.json and tokenizer_config.json names in the folder itself.

    Example: {"auto_map": {"AutoModel": "modeling_navil_chat.NaViL"}} -> ["modeling_navil_chat.py"]
    """
    classes: list[Any] = []
    for config in configs:
        said = config.get("auto_map")
        for value in said.values() if isinstance(said, dict) else ():
            classes += value if isinstance(value, list) else [value]
    here = (name for name in classes if isinstance(name, str) and "--" not in name and "." in name)
    return sorted({f"{name.rpartition('.')[0].replace('.', '/')}.py" for name in here})
