"""Journal: a file of JSON lines that grows by one for everything done, so that what was stopped goes on."""

import fcntl
import json
from pathlib import Path
from types import TracebackType
from typing import Any

from navil_jax.errors import UserError


class Journal:
    """Entries by their `id`. A line that a stopped process left half written is dropped.

    Raises:
      UserError: a whole line that is none of ours, or another process that writes there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another command writes there; wait for its end, or give another --out") from None
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        for number, text in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(text)
                self._entries[json.dumps(entry["id"])] = entry
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{path}: line {number}: is damaged; remove the line, or the file to begin anew"
                ) from None
        self._file.truncate(len(whole))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str | int) -> dict[str, Any] | None:
        """The entry of an id, if there is one."""
        return self._entries.get(json.dumps(key))

    def add(self, entry: dict[str, Any]) -> None:
        """Writes an entry to the disk."""
        self._file.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        self._file.flush()
        self._entries[json.dumps(entry["id"])] = entry


def same_settings(path: Path, settings: dict[str, Any], journal: Path) -> None:
    """Keeps the settings of a journal in a file, and refuses to go on with others once the journal holds anything.

    Raises:
      UserError: names the first one that differs.
    """
    if path.exists() and journal.exists() and journal.stat().st_size:
        before = json.loads(path.read_text())
        for key, value in settings.items():
            if before.get(key) != value:
                was, now = json.dumps(before.get(key)), json.dumps(value)
                raise UserError(f"{path}: was begun with {key} {was}, now it is {now}; give another --out")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1) + "\n")
