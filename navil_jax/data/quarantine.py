"""Samples that cannot be used: a list on disk that later runs honour, counts, and the share of them that stops a run.

A line of a quarantine file, of which a source's name, its number of samples and the index say which sample is meant, as
long as the source's files are those of "files" (see `sample.stamp`), if the line says so:

    {"source": "web", "samples": 5000, "files": "5c0fe6d2a1b3c4d5", "index": 17, "key": "web.jsonl:18",
     "reason": "no such file: 18.jpg"}
"""

import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Set
from pathlib import Path

from navil_jax.data.features import Skipped, Usable
from navil_jax.data.formats import files
from navil_jax.errors import UserError

FILE = "quarantine.jsonl"
# A share of bad samples says something once so many were read.
BAD_SHARE_FROM = 1000
# More unusable samples than this share, too long ones too, once that many were read: the recipe is wrong.
MAX_SKIPPED_SHARE, SKIPPED_SHARE_FROM = 0.5, 100
_LOGGED = 20  # different samples that one process warns of; all are in the file
_REASONS = 1000  # different reasons that are counted
_log = logging.getLogger(__name__)


class Quarantine:
    """The samples that are known to be bad. Each process appends to a file of its own, so that no line is torn.

    Args:
      workdir: holds `quarantine.jsonl` (of the first process) and `quarantine-1.jsonl` and so on; all are honoured.
        None: nothing is read there or written.
      given: a list made beforehand, a path or an address; "" for none.
      process: number of this process.

    Raises:
      UserError: `given` is missing or not such a list.
    """

    def __init__(self, workdir: str | Path | None = None, given: str = "", process: int = 0) -> None:
        self._known: defaultdict[tuple[str, int, str], set[int]] = defaultdict(set)
        self._files: dict[tuple[str, int], str] = {}  # (source, samples) -> what its files are known by
        self.path: Path | None = None
        if given:
            self._read(given, files.read_file)
        if workdir is not None:
            folder = Path(workdir)
            folder.mkdir(parents=True, exist_ok=True)
            self.path = folder / (f"quarantine-{process}.jsonl" if process else FILE)
            _cut_torn_line(self.path)
            for path in sorted(folder.glob("quarantine*.jsonl")):
                self._read(str(path), lambda name: Path(name).read_bytes())

    def _read(self, name: str, read: Callable[[str], bytes]) -> None:
        try:
            lines = read(name).decode().splitlines(keepends=True)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{name}: no list of bad samples can be read there ({error})") from error
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):  # another process is writing it
                break
            try:
                entry = json.loads(line)
                source = entry["source"], int(entry["samples"]), str(entry.get("files", ""))
                self._known[source].add(int(entry["index"]))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{name}:{number}: not a line of a quarantine file; remove it") from error

    def known(self, source: str, samples: int, files: str = "") -> Set[int]:
        """Indices of the bad samples of a source that has so many; `add` adds to this very set.

        Args:
          files: what the source's files are known by, see `sample.stamp`; what was bad in other files is not known.
            Empty: the source does not tell, any will do.
        """
        self._files[source, samples] = files
        found = self._known[source, samples, files]
        for (name, count, known), indices in self._known.items():
            if (name, count) == (source, samples) and (not files or not known):
                found |= indices
        return found

    def add(self, sample: Skipped) -> None:
        """Appends a bad sample to the file, unless it is known; it is on disk when this returns."""
        stamp = self._files.get((sample.source, sample.samples), "")
        known = self._known[sample.source, sample.samples, stamp]
        if sample.index in known:
            return
        known.add(sample.index)
        if self.path is not None:
            entry = {"source": sample.source, "samples": sample.samples} | ({"files": stamp} if stamp else {})
            entry |= {"index": sample.index, "key": sample.key, "reason": sample.reason}
            with self.path.open("ab", buffering=0) as file:
                file.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


def kind_of_reason(reason: str) -> str:
    """A reason without its numbers and names. Example: no such file: img/17.jpg -> no such file: ..."""
    return re.sub(r"\d+", "N", re.sub(r"\S*[/\\]\S*|'[^']*'|\"[^\"]*\"", "...", reason))


def _cut_torn_line(path: Path) -> None:
    """Removes the end of a line that a kill cut off."""
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(whole)
            temporary.replace(path)


class SampleWatch:
    """Counts samples as they are read, quarantines the bad ones, and stops the run where there are too many.

    Args:
      quarantine: takes bad samples.
      max_bad_share: of all samples read, once they are `BAD_SHARE_FROM`.
      oversize_is_error: whether a sample that fits no row stops the run.
      max_skipped_share: of all samples read, bad and too long ones, once they are `SKIPPED_SHARE_FROM`.
    """

    def __init__(
        self,
        quarantine: Quarantine,
        max_bad_share: float = 1.0,
        oversize_is_error: bool = False,
        max_skipped_share: float = MAX_SKIPPED_SHARE,
    ) -> None:
        self._quarantine, self._max_bad_share, self._oversize_is_error = quarantine, max_bad_share, oversize_is_error
        self._max_skipped_share = max_skipped_share
        self._reasons: Counter[str] = Counter()
        self._first: dict[str, str] = {}  # kind of reason -> that of its first sample, with its key
        self._logged: set[str] = set()

    def note(self, sample: Usable | Skipped, counts: Counter[str]) -> None:
        """Adds a sample to the counts, which are called `<source>/good`, `/resized`, `/too_long` and `/bad`.

        Raises:
          UserError: too many samples are bad, or a too long one is an error.
        """
        if isinstance(sample, Usable):
            counts[f"{sample.source}/good"] += 1
            if sample.resized:
                counts[f"{sample.source}/resized"] += 1
            return
        counts[f"{sample.source}/{'too_long' if sample.too_long else 'bad'}"] += 1
        if sample.too_long and self._oversize_is_error:
            raise UserError(
                f"{sample.key} of {sample.source}: {sample.reason}; leave such samples out with "
                'config.data.oversize="drop", or make their images smaller with "resize"'
            )
        if not sample.known:
            if not sample.too_long:
                self._quarantine.add(sample)
            self._explain(sample)
        self._check(counts)

    def _explain(self, sample: Skipped) -> None:
        kind = kind_of_reason(sample.reason)
        if kind in self._reasons or len(self._reasons) < _REASONS:
            self._reasons[kind] += 1
            self._first.setdefault(kind, f"{sample.reason} (first {sample.key})")
        if len(self._logged) < _LOGGED and sample.key not in self._logged:
            self._logged.add(sample.key)
            _log.warning("skipped %s of %s: %s", sample.key, sample.source, sample.reason)

    def _check(self, counts: Counter[str]) -> None:
        bad, too_long, good = (
            sum(n for name, n in counts.items() if name.endswith(end)) for end in ("/bad", "/too_long", "/good")
        )
        read = bad + too_long + good
        if read >= BAD_SHARE_FROM and bad > self._max_bad_share * read:
            raise UserError(
                f"{bad:,} of {read:,} samples are bad, more than config.data.max_bad_share = {self._max_bad_share:g}: "
                f"{'; '.join(self._worst())}; all are in {self._quarantine.path or 'the log'}"
            )
        if read >= SKIPPED_SHARE_FROM and bad + too_long > self._max_skipped_share * read:
            raise UserError(
                f"{bad + too_long:,} of {read:,} samples had to be skipped ({bad:,} bad, {too_long:,} too long): "
                f"{'; '.join(self._worst())}"
            )

    def _worst(self) -> Iterator[str]:
        if not self._reasons:
            yield "all were on a list of bad samples before"
        for kind, count in self._reasons.most_common(3):
            yield f"{count:,} x {self._first[kind]}"
