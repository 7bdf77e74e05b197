"""Checkpoints: parameters, optimizer state, place in the data, config, tokenizer and metrics, written as one by Orbax.

A checkpoint is the folder `<folder>/<step>`, where `step` counts finished training steps. It appears only when it is
complete. Saving is asynchronous: training goes on while the files are written.
"""

import base64
import contextlib
import dataclasses
import re
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath

from navil_jax.config import Config
from navil_jax.config.plain import from_json, to_json
from navil_jax.data.watchdog import Watchdog
from navil_jax.errors import UserError
from navil_jax.model.params import Params, flatten, unflatten
from navil_jax.paths import absolute, path_of
from navil_jax.train.checksums import (
    ARRAYS,
    IteratorHandler,
    RestoreIterator,
    SaveIterator,
    array_handler,
    count_streams,
    reading,
    sealed,
    unsealed,
)
from navil_jax.train.keep import Keep

WRITE_SECONDS = 1800.0  # for one checkpoint
POLL_SECONDS = 0.01


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint says of itself."""

    config: Config
    tokenizer: dict[str, bytes]  # file name -> content
    metrics: dict[str, float]
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)  # what the first parameters were converted from
    fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)  # of the data, by key


class Checkpoints:
    """The checkpoints of one folder. Close it (or use `with`), so that the last write is finished.

    A write that takes longer than `WRITE_SECONDS` ends the process: storage that hangs cannot be waited for.

    Args:
      folder: local or gs:// path.
      keep: checkpoints that stay when a new one is written, or how many of the newest; None: only read, and the folder
        must exist.

    Attributes:
      completed: `time.monotonic()` when the last save was complete.
    """

    def __init__(self, folder: str | epath.Path, keep: Keep | int | None = None):
        self.folder = path_of(folder)
        keep = Keep(keep) if isinstance(keep, int) else keep
        if keep is None and not self.folder.exists():
            raise UserError(f"{self.folder}: no such checkpoint folder")
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep.policy() if keep else None,
            best_fn=keep.value if keep and keep.best else None,  # Orbax writes metrics if this is given
            async_options=ocp.AsyncOptions(timeout_secs=round(WRITE_SECONDS)),
            read_only=keep is None,
            save_interval_steps=0 if keep is None else 1,
            create=keep is not None,
            cleanup_tmp_directories=keep is not None,
        )
        self._handlers = {
            **{item: array_handler() for item in ARRAYS},
            "iterator": IteratorHandler(),
            "record": ocp.JsonCheckpointHandler(),
        }
        with _quietly() if keep is None else contextlib.nullcontext():
            self._manager = ocp.CheckpointManager(absolute(self.folder), options=options, item_handlers=self._handlers)
        self._watchdog = Watchdog(WRITE_SECONDS, stacks=False)
        self._complete = threading.Event()  # the last save
        self._complete.set()
        self._keep, self.completed = keep, 0.0

    def __enter__(self) -> "Checkpoints":
        if self._keep:
            self._watchdog.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        alone = jax.process_count() == 1  # else it would wait for processes that will not come
        if error is None or alone or not self.is_saving:
            self._manager.close()
        self._watchdog.__exit__()

    @property
    def latest_step(self) -> int | None:
        """Finished steps of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Blocks until everything saved so far is on disk; raises what went wrong in the background."""
        while self.is_saving:
            time.sleep(POLL_SECONDS)
        self._manager.wait_until_finished()

    def hurry(self, seconds: float) -> None:
        """What is being written must be on disk within so many seconds; else the process ends."""
        self._watchdog.hurry(seconds)

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is being written in the background; raises what went wrong there.

        An error of one process is seen here at once, while Orbax waits for the others first.
        """
        self._manager.check_for_errors()
        return not self._complete.is_set()

    def _await(self) -> None:
        """Notes when a save is complete; in a thread of its own, for Orbax's answer can wait for other processes."""
        while self._manager.is_saving_in_progress():
            time.sleep(POLL_SECONDS)
        self._watchdog.end()
        self.completed = time.monotonic()
        self._complete.set()

    def check(self) -> None:
        """Raises a `UserError` if the newest checkpoint is no longer there."""
        newest = self.latest_step
        if newest is not None:
            self.wait()
            if not (self.folder / str(newest)).exists():
                raise UserError(
                    f"{self.folder / str(newest)}: was removed while the run goes on; put it back, or begin anew"
                )

    def strangers(self) -> list[str]:
        """Folders that look like checkpoints and are not called by their step alone, so that none finds them."""
        if not self.folder.exists():  # a bucket has a folder once it holds something
            return []
        named = (entry.name for entry in self.folder.iterdir() if re.fullmatch(r"\d+\D.*|\D+\d+", entry.name))
        return sorted(name for name in named if (self.folder / name / "record").exists())

    def save(
        self,
        step: int,
        params: Params | None,
        record: Record,
        optimizer_state: Any = None,
        iterator: grain.DatasetIterator | None = None,
        ema: Params | None = None,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Starts to write a checkpoint; the arrays may be donated as soon as this returns. A step is written once.

        Args:
          step: finished training steps.
          params: nested dicts of arrays, trainable and frozen ones; None where they are written by other means.
          record: config, tokenizer files and metrics.
          optimizer_state: any pytree of arrays; without it the checkpoint can be read and started from, not continued.
          iterator: of the data, before the batch of the next step is drawn.
          ema: running averages of the trainable parameters minus these, where there are some.
          metrics: hold the one that the best checkpoints are chosen by; None: this is not one of them.
        """
        if step == self.latest_step:
            return
        self._watchdog.begin(
            f"{self.folder / str(step)}: is not written after {WRITE_SECONDS:g} s, the storage hangs; check it and run "
            "the same command again"
        )
        tokenizer = {name: base64.b64encode(content).decode() for name, content in record.tokenizer.items()}
        said = {"config": to_json(record.config), "tokenizer": tokenizer}
        said |= {"metrics": record.metrics, "origin": record.origin, "fingerprints": record.fingerprints}
        items = {"record": ocp.args.JsonSave(sealed(said))}
        if params is not None:
            items["params"] = ocp.args.PyTreeSave(params)
        if optimizer_state is not None:
            items["optimizer"] = ocp.args.PyTreeSave(optimizer_state)
        if ema:
            items["ema"] = ocp.args.PyTreeSave(ema)
        if iterator is not None:
            items["iterator"] = SaveIterator(iterator)
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
        self._complete.clear()
        threading.Thread(target=self._await, daemon=True, name="save-watch").start()

    def record(self) -> Record:
        """What the newest checkpoint says of itself.

        Raises:
          UserError: no checkpoint, an incomplete one, or one without a tokenizer.
        """
        said = self._restore(record=ocp.args.JsonRestore())["record"]
        with self._reading("record"):
            said = unsealed(said)
        try:
            config, tokenizer, metrics = said["config"], said["tokenizer"], said["metrics"]
        except KeyError as error:
            raise UserError(
                f"{self._newest()}: its record has no {error}, it was not written by this program"
            ) from error
        if not tokenizer:
            raise UserError(
                f"{self._newest()}: holds no tokenizer, so its tokens cannot be told; take another checkpoint"
            )
        files = {name: base64.b64decode(content) for name, content in tokenizer.items()}
        return Record(from_json(config), files, metrics, said.get("origin", {}), said.get("fingerprints", {}))

    def restore(
        self, params: Params, optimizer_state: Any, ema: Params, iterator: grain.DatasetIterator
    ) -> tuple[Params, Any, Params]:
        """Reads the newest checkpoint to go on with training.

        Args:
          params, optimizer_state, ema: abstract arrays (`jax.ShapeDtypeStruct` with a sharding): each process reads
            its own shards only. An empty `ema` is not read.
          iterator: is put to the saved place; it has as many streams as are saved (`streams`).

        Returns:
          The parameters, the optimizer state, and the running averages minus the parameters.

        Raises:
          UserError: no checkpoint, an incomplete one, or other parameters than asked for (names the first ones).
        """
        arrays = {"params": params, "optimizer": optimizer_state} | ({"ema": ema} if ema else {})
        for item, wanted in arrays.items():
            self._check_shapes(item, wanted)
        items = self._restore(**{item: _restore_args(wanted) for item, wanted in arrays.items()})
        self._restore(iterator=RestoreIterator(iterator))  # last: it starts to read data, in threads of its own
        return items["params"], items["optimizer"], items["ema"] if ema else {}

    @property
    def streams(self) -> int:
        """How many streams of data the newest checkpoint holds the places of (`data.streams`)."""
        with self._reading("iterator"):
            return count_streams(self._newest() / "iterator")

    @property
    def averages(self) -> frozenset[str]:
        """Names of the parameters whose running averages the newest checkpoint's evaluations use; mostly none.

        What was evaluated is what is talked with, exported and started from, so the averages are read in the place of
        these parameters wherever the run is not continued. A checkpoint of step 0 was converted and has none.
        """
        config = self.record().config
        if not (self.latest_step and config.optimizer.ema_decay and config.eval_ema):
            return frozenset()
        with self._reading("ema"):
            return frozenset(_shapes(self._manager.item_metadata(self.latest_step)["ema"].tree))

    @property
    def param_dtypes(self) -> dict[str, np.dtype]:
        """Name -> dtype of every parameter in the newest checkpoint, as it is read: averages are float32."""
        with self._reading("params"):
            saved = self._manager.item_metadata(self.latest_step)["params"].tree
        dtypes = {name: np.dtype(leaf.dtype) for name, leaf in flatten(saved).items()}
        return dtypes | dict.fromkeys(self.averages, np.dtype("float32"))

    def restore_params(self, params: Params, averaged: bool = True) -> Params:
        """Reads the parameters of the newest checkpoint alone, if `averaged` its `averages` where there are some.

        Arguments and errors as in `restore`. Averages are float32 sums of a parameter and of what its average differs
        by, made one after the other and rounded to the dtypes asked for.
        """
        self._check_shapes("params", params)
        averages = self.averages if averaged else frozenset()
        if not averages:
            return self._restore(params=_restore_args(params))["params"]
        wanted = flatten(params)
        rest = {name: leaf for name, leaf in wanted.items() if name not in averages}
        found = self._restore_some("params", rest) if rest else {}
        for name in sorted(averages):
            leaf = wanted[name]
            part = {name: jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=leaf.sharding)}
            value, difference = (self._restore_some(item, part)[name] for item in ("params", "ema"))
            found[name] = (value + difference).astype(leaf.dtype)
        return unflatten(found)

    def _restore_some(self, item: str, wanted: dict[str, Any]) -> dict[str, jax.Array]:
        """Parameters by name of the newest checkpoint's `item`, which may hold others."""
        with self._reading(item), ocp.Checkpointer(array_handler()) as reader:
            args = _restore_args(unflatten(wanted), partial_restore=True)
            return flatten(reader.restore(absolute(self._newest() / item), args=args))

    def _newest(self) -> epath.Path:
        if self.latest_step is None:
            raise UserError(f"{self.folder}: holds no complete checkpoint (no folder named by a step)")
        return self.folder / str(self.latest_step)

    def _restore(self, **items: ocp.args.CheckpointArgs) -> ocp.args.Composite:
        with self._reading(*items):
            return self._manager.restore(self.latest_step, args=ocp.args.Composite(**items))

    @contextlib.contextmanager
    def _reading(self, *items: str) -> Iterator[None]:
        """Missing items of the newest checkpoint, and failures to read them, as a `UserError`."""
        with reading(self._newest(), *items):
            yield

    def _check_shapes(self, item: str, wanted: Any) -> None:
        """Compares names and shapes with the checkpoint's before anything is read."""
        with self._reading(item):
            saved = _shapes(self._manager.item_metadata(self.latest_step)[item].tree)
        asked = _shapes(wanted)
        wrong = [
            f"{name} is {saved.get(name, 'absent')} there and {asked.get(name, 'absent')} here"
            for name in sorted(saved | asked)
            if saved.get(name) != asked.get(name)
        ]
        if wrong:
            more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UserError(
                f"{self._newest()}: its {item} are those of another model or recipe: {'; '.join(wrong[:3])}{more}"
            )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings of Orbax, which has two for every folder that is only read."""
    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(before)


def _restore_args(wanted: Any, **more: Any) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), **more)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Leaf name -> shape, where names do not depend on the kind of container (dict, tuple, named tuple)."""

    def part(key: Any) -> str:
        return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))

    return {"/".join(map(part, path)): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def find_checkpoints(path: str | epath.Path) -> epath.Path:
    """The folder for `Checkpoints`.

    Args:
      path: workdir of a run, its `checkpoints` folder, or the newest checkpoint in there; local or gs://.

    Raises:
      UserError: there is no such folder, or it is another checkpoint than the newest.
    """
    path = path_of(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint folder; give the workdir of a training run")
    if not path.is_dir():
        raise UserError(f"{path}: not a folder; give the workdir of a training run")
    if any(path.glob("*.safetensors")):
        raise UserError(
            f"{path}: holds PyTorch weights (*.safetensors); convert them first: "
            f"python -m navil_jax.convert import {path} FOLDER"
        )
    if (path / "checkpoints").is_dir():
        return path / "checkpoints"
    if not path.name.isdecimal():
        return path
    folder = absolute(path).parent
    with Checkpoints(folder) as checkpoints:
        if str(checkpoints.latest_step) != path.name:
            raise UserError(f"{path}: not the newest checkpoint, which is {folder}/{checkpoints.latest_step}")
    return folder


def has_steps(folder: epath.Path) -> bool:
    """Whether a checkpoint folder holds a complete checkpoint."""
    if not any(entry.name.isdecimal() for entry in folder.iterdir()):
        return False
    with Checkpoints(folder) as checkpoints:
        return checkpoints.latest_step is not None


def saved_streams(folder: epath.Path) -> int:
    """How many streams of data the run has that wrote the checkpoints of a folder; 0 if there are none."""
    if not (folder.exists() and has_steps(folder)):
        return 0
    with Checkpoints(folder) as checkpoints:
        return checkpoints.streams
