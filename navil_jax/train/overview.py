"""Overview: what can be known of a run from its workdir, local or in a bucket, while it goes on or later."""

import dataclasses
import json
import math
import os
import socket
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from navil_jax.config import Config
from navil_jax.config.plain import from_json, to_json
from navil_jax.errors import UserError
from navil_jax.paths import is_remote, path_of
from navil_jax.train.goodput import FILE as GOODPUT
from navil_jax.train.goodput import Attempt, attempts_of
from navil_jax.train.lock import FILE as LOCK
from navil_jax.train.metrics import lines_of

RUN = "run.json"
STALE_MINUTES = 10.0
RECENT, USUAL = 50, 200  # losses in which a spike is looked for, and those before them that say what is usual
SLOW_HOST = 0.1  # share of its time that a host waits for data, where the others wait much less


def write_run(workdir: epath.Path, config: Config, mesh: jax.sharding.Mesh) -> None:
    """Writes what a run is and where it runs to `<workdir>/run.json`; on the first process."""
    device = mesh.devices.flat[0]
    said = {
        "config": json.loads(to_json(config)),
        "command": sys.argv,
        "host": socket.gethostname(),
        "processes": jax.process_count(),
        "devices": mesh.size,
        "device_kind": device.device_kind,
        "mesh": dict(mesh.shape),
        "jax": jax.__version__,
        "python": sys.version.split()[0],
    }
    (workdir / RUN).write_text(json.dumps(said, indent=1))


class _Tail:
    """The lines of a JSONL log that grows; each is read once.

    Attributes:
      damaged: how many lines of the file are none.
    """

    def __init__(self, path: epath.Path) -> None:
        self._path, self._read = path, 0
        self.lines: list[dict[str, Any]] = []
        self.damaged = 0

    def refresh(self) -> list[dict[str, Any]]:
        size = self._path.stat().length if self._path.exists() else 0
        if size < self._read:  # lines of steps that are taken again were dropped
            self._restart()
        if size > self._read and not self._add(size):
            self._restart()  # a line that is none, where a later part was read: perhaps it was rewritten in between
            self._add(size)
        return self.lines

    def _restart(self) -> None:
        self._read, self.lines, self.damaged = 0, [], 0

    def _add(self, size: int) -> bool:
        """Reads on; gives whether all is as it should be, or was read from the beginning."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read(size - self._read).rpartition(b"\n")
        lines, damaged = lines_of(whole + newline)
        if damaged and self._read:
            return False
        self.lines, self.damaged = self.lines + lines, damaged
        self._read += len(whole) + len(newline)
        return True


@dataclasses.dataclass(frozen=True)
class Overview:
    """A run at one time.

    Attributes:
      metrics, timings: lines of the logs.
      attempts: of goodput; the last one may be going on.
      checkpoints: steps, in order.
      config, about: None and {} of a run that is older than run.json.
      seen: seconds since 1970 of the last sign of life; None if there is none.
      lives: whether its first process lives; None: it runs elsewhere.
      notes: what of the folder could not be read, and why.
    """

    folder: epath.Path
    metrics: Sequence[dict[str, Any]]
    timings: Sequence[dict[str, Any]]
    attempts: Sequence[Attempt]
    checkpoints: Sequence[int]
    config: Config | None
    about: dict[str, Any]
    seen: float | None
    lives: bool | None
    notes: Sequence[str] = ()

    def last(self, name: str) -> float | None:
        """The newest value of a name of the logs."""
        lines = (*reversed(self.timings), *reversed(self.metrics))
        return next((line[name] for line in lines if name in line), None)

    @property
    def step(self) -> int:
        return max((line["step"] for line in self.metrics), default=0)

    @property
    def steps(self) -> int | None:
        """At which the run ends, as far as that can be told; None if not at all."""
        if self.config is None:
            return None
        planned = self.config.steps * self.config.batch_samples
        if not planned:
            return self.config.steps
        samples = self.last("samples_seen")
        return math.ceil(self.step * planned / samples) if samples else None

    @property
    def finished(self) -> bool:
        return self.steps is not None and self.step >= self.steps

    @property
    def eta(self) -> float | None:
        """Seconds that the steps left will take, at the pace of the last ones."""
        pace = self.last("seconds_per_step")
        return None if pace is None or self.steps is None else (self.steps - self.step) * pace

    def losses(self) -> list[tuple[int, float]]:
        return [(line["step"], line["loss"]) for line in self.metrics if "loss" in line]

    def samples(self) -> dict[str, dict[str, int]]:
        """Source -> what became of its samples -> how many, of the first process's streams."""
        found: dict[str, dict[str, int]] = {}
        for line in self.metrics:
            for name, value in line.items():
                if name.startswith("samples/"):
                    source, _, what = name.removeprefix("samples/").rpartition("/")
                    found.setdefault(source, {})[what] = int(value)
        return found

    def alarms(self, now: float, minutes: float = STALE_MINUTES) -> list[str]:
        """What somebody should look at."""
        found = []
        if self.lives is False and self.steps is not None and not self.finished:
            found.append("its process has ended before the run has its length; the same command goes on")
        elif self.seen is not None and now - self.seen > 60 * minutes and not self.finished:
            found.append(f"no step for {(now - self.seen) / 60:.0f} minutes")
        found += _spikes([loss for _, loss in self.losses() if math.isfinite(loss)], self.step)
        for source, counts in self.samples().items():
            read, bad = sum(counts.values()), counts.get("bad", 0)
            limit = self.config.data.max_bad_share if self.config else 0.01
            if bad > limit / 2 * read and read >= 100:
                found.append(f"{bad / read:.1%} of the samples of {source} are bad; quarantine.jsonl says why")
        host, wait, others = (self.last(f"slowest_host{end}") for end in ("", "_data_wait", "_others_data_wait"))
        if host is not None and wait is not None and wait > SLOW_HOST and wait > 3 * (others or 0):
            found.append(f"slow host: process {host:.0f} waits for data {wait:.0%} of its time, others {others:.0%}")
        return found


def _spikes(losses: Sequence[float], step: int) -> list[str]:
    """A line about the highest of the newest losses, if it is far outside of those before them."""
    recent, usual = losses[-RECENT:], losses[-RECENT - USUAL : -RECENT]
    if len(usual) < RECENT:
        return []
    middle = statistics.median(usual)
    spread = 1.4826 * statistics.median(abs(loss - middle) for loss in usual)
    highest = max(recent)
    if highest <= max(middle + 8 * spread, 1.2 * middle):
        return []
    at = step - len(recent) + 1 + recent.index(highest)
    return [f"loss spike: {highest:.4g} about step {at}, usual was {middle:.4g} +- {spread:.2g}"]


class Reader:
    """Reads a run again and again.

    Raises:
      UserError: there is no such folder, or it holds no run.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = path_of(folder)
        if not self.folder.exists() and not is_remote(self.folder):
            raise UserError(f"{self.folder}: no such folder; give the workdir of a training run")
        if not any((self.folder / name).exists() for name in (RUN, "metrics.jsonl", "checkpoints")):
            raise UserError(f"{self.folder}: holds no run, neither {RUN} nor metrics.jsonl; {_advice(self.folder)}")
        self._metrics, self._timings = (_Tail(self.folder / f"{name}.jsonl") for name in ("metrics", "timings"))

    def read(self) -> Overview:
        goodput = self.folder / GOODPUT
        attempts, damaged = attempts_of(goodput.read_bytes()) if goodput.exists() else ([], 0)
        about = _parsed(self.folder / RUN)
        lock, lives = self.folder / LOCK, None
        holder = _parsed(lock)
        if holder.get("host") == socket.gethostname() and not is_remote(lock):
            lives = os.path.exists(f"/proc/{holder.get('pid')}") if os.path.isdir("/proc") else None
        seen = [attempt.began + sum(attempt.seconds.values()) for attempt in attempts]
        if is_remote(lock) and lock.exists():  # it is renewed as long as the run lives
            seen.append(float(lock.stat().mtime))
        folder = self.folder / "checkpoints"
        saved = sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.exists() else []
        lines = list(self._metrics.refresh()), list(self._timings.refresh())
        counts = {"metrics.jsonl": self._metrics.damaged, "timings.jsonl": self._timings.damaged, GOODPUT: damaged}
        notes = [f"{name}: {count:,} damaged lines are left out" for name, count in counts.items() if count]
        try:
            config = self._config(about, saved)
        except UserError as error:
            config = None
            notes.append(f"the config is of another version ({error}): how many steps there will be is unknown")
        return Overview(self.folder, *lines, attempts, saved, config, about, max(seen, default=None), lives, notes)

    def _config(self, about: dict[str, Any], saved: Sequence[int]) -> Config | None:
        """Of run.json, else of the newest checkpoint."""
        if "config" in about:
            return from_json(json.dumps(about["config"]))
        record = _parsed(self.folder / "checkpoints" / str(saved[-1]) / "record" / "metadata") if saved else {}
        return from_json(record["config"]) if "config" in record else None


def _advice(folder: epath.Path) -> str:
    """What to give in the place of a folder that is no workdir, but perhaps a study's or that of several runs."""
    below = () if is_remote(folder) else (*folder.glob(f"*/{RUN}"), *folder.glob(f"*/*/{RUN}"))
    workdirs = sorted(os.fspath(file.parent) for file in below)
    return f"give one of the {len(workdirs)} in it, such as {workdirs[0]}" if workdirs else "give the workdir of one"


def _parsed(path: epath.Path) -> dict[str, Any]:
    """An object of a JSON file; {} if there is none, or it is just being written."""
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def age(seconds: float) -> str:
    """Example: 75 -> "1 min ago" """
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0, seconds):.0f} s ago"
