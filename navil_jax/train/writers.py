"""Writers: where the scalars of a run go beside its own files (`config.writers`)."""

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from etils import epath
from tensorboardX import SummaryWriter

from navil_jax.config import Config
from navil_jax.config.plain import to_json
from navil_jax.errors import UserError
from navil_jax.paths import path_of


class Writer(Protocol):
    """Takes the scalars of steps."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Events in `<folder>/tensorboard`; those of later steps, of an earlier attempt, are hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._events.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which goes on where the run does; WANDB_PROJECT, WANDB_MODE and the like count.

    Raises:
      UserError: the package wandb is not installed, or cannot start.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise UserError("config.writers: wandb is not installed; pip install wandb, or leave it out") from error
        workdir = path_of(config.workdir)
        try:
            self._run = wandb.init(
                project=None,  # WANDB_PROJECT, else uncategorized
                id=_run_id(workdir / "wandb.json"),
                resume="allow",
                name=workdir.name,
                dir=folder,
                config=json.loads(to_json(config)),
            )
        except wandb.errors.Error as error:
            raise UserError(f"config.writers: wandb: {error}") from error
        self._run.define_metric("*", step_metric="step")  # steps are taken again after a restart

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


def _run_id(path: epath.Path) -> str:
    """The id that Weights & Biases knows the run of a workdir by."""
    if not path.exists():
        path.write_text(json.dumps({"id": uuid.uuid4().hex[:12]}))
    return json.loads(path.read_text())["id"]


def make_writers(config: Config, folder: Path, step: int) -> list[Writer]:
    """The writers that a config names. Args: step: finished steps that the run goes on from."""
    made: list[Writer] = []
    for name in dict.fromkeys(config.writers):
        made.append(TensorBoard(folder, step) if name == "tensorboard" else WeightsAndBiases(folder, config))
    return made
