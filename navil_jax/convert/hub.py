"""Hugging Face hub: an id such as OpenGVLab/NaViL-2B -> the folder that it was downloaded to."""

import re
from pathlib import Path
from typing import Any

from etils import epath

from navil_jax.errors import UserError
from navil_jax.paths import is_remote, path_of

PREFIX = "hf://"  # says that an id is meant, whatever folders there are
# Code is kept for an export, and never run here; pictures of a repository are not downloaded.
WANTED = ("*.json", "*.model", "*.txt", "*.safetensors", "*.py", "*.jinja", "*.md", "LICENSE*", "NOTICE*")
PICKLED = "*.bin"  # where there is nothing else


def folder_of(path: str | Path) -> epath.Path:
    """A folder as it is; an id on the hub is downloaded, or taken from the cache where it is already.

    The folder of a repository in the hub's cache (models--NAME--NAME) stands for its snapshot.
    `NAME/NAME` is an id if there is no such folder and no folder of the first name; `hf://NAME/NAME` always is.

    Raises:
      UserError: the package huggingface_hub is missing, the hub refuses, or a cache holds several snapshots.
    """
    text = str(path)
    if text.startswith(PREFIX):
        return _download(text.removeprefix(PREFIX))
    plain = not is_remote(text) and re.fullmatch(r"[\w.-]+/[\w.-]+", text)
    if plain and not text.startswith(".") and not Path(text).parent.exists():
        return _download(text)
    return _snapshot(path_of(path))


def _snapshot(folder: epath.Path) -> epath.Path:
    """Of the folder of a repository in the hub's cache, the one snapshot in it, or that of its branch `main`."""
    if not (folder.name.startswith("models--") and (folder / "snapshots").is_dir()):
        return folder
    found = sorted(entry.name for entry in (folder / "snapshots").iterdir())
    main = folder / "refs" / "main"
    name = main.read_text().strip() if main.is_file() else ""
    if name not in found and len(found) != 1:
        raise UserError(f"{folder}: the cache of a repository; give one of its snapshots: {', '.join(found) or 'none'}")
    return folder / "snapshots" / (name if name in found else found[0])


def _download(name: str) -> epath.Path:
    try:
        import huggingface_hub  # optional: who has folders needs no hub
        from huggingface_hub.errors import HfHubHTTPError
    except ModuleNotFoundError as error:
        raise UserError(
            f"{name}: no such folder; to download it from the Hugging Face hub: pip install huggingface_hub"
        ) from error
    errors: Any = (ValueError, *HfHubHTTPError.__bases__)  # the HTTP library is another one in each version
    try:
        siblings = huggingface_hub.HfApi().model_info(name).siblings or []
        safe = any(sibling.rfilename.endswith(".safetensors") for sibling in siblings)
        wanted = WANTED if safe else (*WANTED, PICKLED)
        return path_of(huggingface_hub.snapshot_download(name, allow_patterns=list(wanted)))
    except errors as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(f"{name}: no such folder here, and the Hugging Face hub says: {first}") from error
