"""What a run shows: JSONL files, scalars for writers, and progress lines."""

import dataclasses
import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from navil_jax.train.writers import TensorBoard, Writer


class MetricsLog:
    """Writes `<folder>/metrics.jsonl`, one object per line, `timings.jsonl`, and what writers make of both.

    Lines written so far are on disk as soon as `write` returns, so nothing is lost when the process is killed. Times
    are kept apart: they differ from run to run, and nothing in metrics.jsonl does.

    Attributes:
      dropped: lines of later steps that were there.
      damaged: lines that were there and are none.

    Args:
      folder: is made if it does not exist.
      step: finished steps of the checkpoint that the run goes on from (0: none). What was logged for later steps by
        an earlier attempt is dropped, so that no step stands there twice.
      writers: get all scalars too; None: TensorBoard.
    """

    def __init__(self, folder: str | Path, step: int = 0, writers: Sequence[Writer] | None = None):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        before, self.damaged = lines_of(path.read_bytes()) if path.exists() else ([], 0)
        kept = [json.dumps(line) + "\n" for line in before if line["step"] <= step]
        self.dropped = len(before) - len(kept)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)
        self._path, self._file = path, path.open("a", buffering=1)
        self._size = path.stat().st_size  # that it has if nobody else writes to it
        self._timings = (folder / "timings.jsonl").open("a", buffering=1)
        self._writers = [TensorBoard(folder, step)] if writers is None else writers

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one line `{"step": step, **values}` and its scalars."""
        self._size += self._add(self._file, step, values)

    def was_cut(self) -> bool:
        """Whether somebody has taken lines out of metrics.jsonl since the last call."""
        written, self._size = self._size, self._path.stat().st_size if self._path.exists() else 0
        return self._size < written

    def write_timing(self, step: int, done: "Throughput") -> None:
        """Adds a line about the steps up to this one: seconds_per_step, tokens_per_second, data_wait (share), useful
        FLOP/s of a device, their share of its peak (mfu) and its peak memory where these are known."""
        seconds = max(done.seconds, 1e-9)
        values = {
            "seconds_per_step": seconds / done.steps,
            "tokens_per_second": done.tokens / seconds,
            "data_wait": done.data_wait / seconds,
            "flops_per_second": done.flops / seconds,
        }
        if done.peak:
            values["mfu"] = done.flops / seconds / done.peak
        if done.memory:
            values["peak_memory_gib"] = done.memory / 2**30
        self.write_times(step, values)

    def write_times(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a line of whatever else differs from run to run, such as what a checkpoint cost."""
        if values:
            self._add(self._timings, step, values)

    def _add(self, file: TextIO, step: int, values: Mapping[str, float]) -> int:
        """Adds a line and its scalars; gives its bytes."""
        line = json.dumps({"step": step} | {k: float(v) for k, v in values.items()}) + "\n"
        file.write(line)
        for writer in self._writers:
            writer.write(step, values)
        return len(line)  # which is ASCII

    def close(self) -> None:
        self._file.close()
        self._timings.close()
        for writer in self._writers:
            writer.close()


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a JSONL log; none if there is no file. Lines cut off by a kill or damaged are left out."""
    return lines_of(Path(path).read_bytes())[0] if Path(path).exists() else []


def lines_of(
    content: bytes, is_line: Callable[[dict[str, Any]], bool] | None = None
) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a JSONL log, and how many others there are: damaged by a full disk, a dead machine, an editor.

    Args:
      is_line: what an object must be; None: a step with numbers.

    Example: b'{"step": 1, "loss": 2.5}\\n\\0\\0\\0\\n{"step": 2, "lo' -> [{"step": 1, "loss": 2.5}], 1
    """
    whole = content.decode(errors="replace").split("\n")[:-1]
    objects = [_object(line) for line in whole]
    lines = [found for found in objects if found is not None and (is_line or _is_scalars)(found)]
    return lines, len(whole) - len(lines)


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _is_scalars(line: dict[str, Any]) -> bool:
    return isinstance(line.get("step"), int) and all(isinstance(value, (int, float)) for value in line.values())


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Sums over some steps; `tokens` and `patches` are real ones, the slots count padding too."""

    seconds: float
    steps: int
    tokens: int
    images: int
    patches: int
    token_slots: int
    patch_slots: int
    data_wait: float = 0.0  # seconds of `seconds` in which the host waited for a batch
    flops: float = 0.0  # useful ones of one device; padding is no use
    peak: float | None = None  # FLOP/s of one device, where it is known
    memory: int | None = None  # bytes in use at most so far on a device, where that is known


def progress_fields(
    step: int, steps: int, loss: float, learning_rate: float, done: Throughput, samples: str = ""
) -> list[str]:
    """The fields of a line about the steps since the last one.

    Args:
      steps: at which the run will end.
      samples: how far a run counted in samples is.

    Example:
      step 40/100  loss 2.3100  lr 5.0e-05  450 tokens/s  3.0 images/s  0.15 TFLOP/s  padding 10% of tokens, 25% of ...
    """
    seconds = max(done.seconds, 1e-9)
    token_padding, patch_padding = 1 - done.tokens / done.token_slots, 1 - done.patches / done.patch_slots
    left = datetime.timedelta(seconds=round((steps - step) * seconds / done.steps))
    speed = f"MFU {done.flops / seconds / done.peak:.1%}" if done.peak else f"{done.flops / seconds / 1e12:.3g} TFLOP/s"
    return [
        f"step {step}/{steps}",
        *([samples] if samples else []),
        f"loss {loss:.4f}",
        f"lr {learning_rate:.1e}",
        f"{done.tokens / seconds:,.0f} tokens/s",
        f"{done.images / seconds:,.1f} images/s",
        speed,
        *([f"peak memory {done.memory / 2**30:.1f} GiB"] if done.memory else []),
        f"padding {token_padding:.0%} of tokens, {patch_padding:.0%} of patches",
        f"data wait {done.data_wait / seconds:.1%}",
        f"ETA {left}",
    ]


@dataclasses.dataclass(frozen=True)
class Answer:
    """A held-out question with what the model says."""

    image: Any  # whatever matplotlib's imshow takes; None: no image
    question: str
    answer: str
    truth: str
    right: bool
