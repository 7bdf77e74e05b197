"""Files of a run on a local disk or on a bucket (gs://), through one interface: etils.epath, as Orbax has it.

Whole files (checkpoints, tokenizers, reports) are written where they belong. What is appended to line by line, and what
libraries write that know local files alone, goes through `RunFiles`. Data have needs of their own (ranges, patterns,
copies): see `data/formats/files.py`, which reaches buckets with the same package.
"""

import argparse
import importlib.util
import os
import tempfile
from pathlib import Path
from types import TracebackType

import fsspec
from etils import epath

from navil_jax.errors import UserError

DRAWINGS = (".png", ".pdf", ".svg", ".jpg")
PACKAGES = {"gs": "gcsfs"}  # kind of address -> the package that reaches it


def is_remote(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


def at_home(name: str | os.PathLike[str]) -> str:
    """A path with the home folder in the place of a leading ~, as shells have it; addresses stay as they are."""
    return os.path.expanduser(os.fspath(name))


def given_path(text: str) -> str:
    """An option's path or address, for `argparse`; one that is empty is refused."""
    if not text:
        raise argparse.ArgumentTypeError("is empty, name a file or folder")
    return at_home(text)


def new_folder(text: str) -> Path:
    """An option's local folder that will be written to, for `argparse`: refused now where that cannot be."""
    path = local_path(given_path(text))
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there}: is a file, a folder belongs there")
    if not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{there}: cannot be written to, give another folder")
    return path


def new_file(text: str) -> Path:
    """An option's local file that will be written, for `argparse`; its folder is made, or refused, now."""
    path = local_path(given_path(text))
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: is a folder, name a file")
    new_folder(os.fspath(path.parent)).mkdir(parents=True, exist_ok=True)
    return path


def new_drawing(text: str) -> Path:
    """As `new_file`, of a kind that can be drawn."""
    path = new_file(text)
    if path.suffix.lower() not in DRAWINGS:
        raise argparse.ArgumentTypeError(f"{path}: cannot be drawn; end its name in {', '.join(DRAWINGS)}")
    return path


def path_of(name: str | os.PathLike[str]) -> epath.Path:
    """A local name or an address as a path.

    Raises:
      UserError: an address of a kind that runs cannot be kept at, or whose package is not installed.
    """
    if not is_remote(name):
        return epath.Path(at_home(name))
    kind = os.fspath(name).partition("://")[0]
    if kind not in PACKAGES:
        raise UserError(f"{name}: runs are kept in local folders or at {', '.join(f'{k}://' for k in PACKAGES)}")
    if importlib.util.find_spec(PACKAGES[kind]) is None:
        raise UserError(f"{name}: needs a package that is not installed: pip install {PACKAGES[kind]}")
    # What stands in a folder is asked anew each time: other hosts and TensorStore write there too.
    fsspec.config.conf.setdefault(PACKAGES[kind].removesuffix("fs"), {})["use_listings_cache"] = False
    return epath.Path(name)


def absolute(path: epath.Path) -> epath.Path:
    """Example: runs/x -> /home/me/runs/x;  gs://bucket/x -> gs://bucket/x"""
    return path if is_remote(path) else path.resolve()


def local_path(name: str | os.PathLike[str]) -> Path:
    """A local path. Raises a `UserError` for an address."""
    if is_remote(name):
        raise UserError(f"{name}: only local folders will do here; copy with: gcloud storage cp -r")
    return Path(at_home(name))


class RunFiles:
    """Logs, lists of bad samples and images of a run: what is appended to, or can be written to local disks alone.

    In a local folder they are written in place. A bucket takes whole files only: there `local` is a temporary folder,
    which starts with the run's *.jsonl, and `upload` sends what has changed. A process that is killed loses what came
    since its last `upload`; leaving `with` uploads too, also after an error.

    Args:
      folder: of the run; is made if it does not exist.

    Attributes:
      folder: where the files belong.
      local: where to write them.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = path_of(folder)
        self._temporary = tempfile.TemporaryDirectory(prefix="navil-") if is_remote(folder) else None
        self.local = Path(self._temporary.name if self._temporary else at_home(folder))
        self.local.mkdir(parents=True, exist_ok=True)
        self._sent: dict[str, tuple[int, int]] = {}  # name -> size and time of change
        if self._temporary:
            for file in self.folder.glob("*.jsonl"):
                (self.local / file.name).write_bytes(file.read_bytes())
            self._sent = self._stamps()

    def __enter__(self) -> "RunFiles":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.upload()
        if self._temporary:
            self._temporary.cleanup()

    def upload(self) -> None:
        """Brings the bucket up to date; does nothing for a local folder."""
        if self._temporary:
            for name, stamp in self._stamps().items():
                if self._sent.get(name) != stamp:
                    (self.folder / name).write_bytes((self.local / name).read_bytes())
                    self._sent[name] = stamp

    def _stamps(self) -> dict[str, tuple[int, int]]:
        files = {file: file.stat() for file in self.local.rglob("*") if file.is_file()}
        return {str(file.relative_to(self.local)): (stat.st_size, stat.st_mtime_ns) for file, stat in files.items()}
