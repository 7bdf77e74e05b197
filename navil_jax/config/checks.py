"""Checks of a config: settings of the data and of the run that cannot work together."""

import dataclasses
from typing import TYPE_CHECKING

from navil_jax.errors import UserError

if TYPE_CHECKING:
    from navil_jax.config import Config


def require(good: bool, key: str, why: str) -> None:
    if not good:
        raise UserError(f"config.{key}: {why}")


# Settings of a source that its kind does not use: samples of the package, and converted ones, are complete.
WITHOUT_EFFECT = {"": ("held_out", "root", "prompt", "boxes"), "array_record": ("root", "prompt")}


def check_data(config: "Config") -> None:
    rows, streams = config.data.rows, config.data.streams
    require(rows % (streams or 1) == 0, "data.streams", f"data.rows = {rows} do not divide by {streams} streams")
    _check_schedule(config)
    for number, source in enumerate(config.data.sources):
        key, of, kind = f"data.sources.{number}.", f" of {source.name!r}", source.kind
        require(not kind or bool(source.path), f"{key}path{of}", f"no path to the data of kind {kind}")
        require(not source.path or bool(kind), f"{key}kind{of}", f"which format has {source.path}?")
        most, least = source.max_patches, config.images.min_patches
        why = f"{most} is below images.min_patches = {least}"
        require(most is None or most >= least, f"{key}max_patches{of}", why)
        what = f"data of kind {kind}" if kind else "a built-in source"
        for name in WITHOUT_EFFECT.get(kind, ()):
            require(not getattr(source, name), f"{key}{name}{of}", f"has no effect on {what}; leave it out")


def _check_schedule(config: "Config") -> None:
    """Schedules of weights: steps in order, and at every step something to draw from."""
    sources = config.data.sources
    for number, source in enumerate(sources):
        key, steps = f"data.sources.{number}.weight_points", [point.step for point in source.weight_points]
        require(steps == sorted(set(steps)), key, f"the steps {steps} of {source.name!r} must rise")
        why = "counts in steps of config.batch_samples samples, which is 0; set it"
        require(not steps or config.batch_samples > 0, key, why)
    for step in sorted({point.step for source in sources for point in source.weight_points}):
        require(
            any(source.weight_at(step) for source in sources), "data.sources", f"from step {step} on all weights are 0"
        )


WRITERS = ("tensorboard", "wandb")


def check_run(config: "Config") -> None:
    optimizer, rows, pieces = config.optimizer, config.data.rows, config.optimizer.microbatches
    why = f"data.rows = {rows} cannot be cut into {pieces} microbatches"
    require(rows % pieces == 0, "optimizer.microbatches", why)
    require(bool(optimizer.trainable), "optimizer.trainable", "no pattern, so nothing would be trained")
    ends_higher = optimizer.final_learning_rate and optimizer.schedule == "constant"
    require(not ends_higher, "optimizer.final_learning_rate", "has no effect on the constant schedule; use cosine")
    empty = config.init_model and not config.init_from
    require(not empty, "init_model", "says to take the model of init_from, which is empty")
    traced = config.profile_steps
    why = "must be the first and the last step to trace, such as 20,23"
    require(len(traced) in (0, 2) and sorted(traced) == list(traced), "profile_steps", why)
    beyond = not config.batch_samples and bool(traced) and traced[0] > config.steps
    require(not beyond, "profile_steps", f"begins after the last of steps = {config.steps}")
    every, kept = config.checkpoint_every, config.keep_checkpoints_every
    why = f"{kept} is not a multiple of checkpoint_every = {every}, so no such step is saved"
    require(kept % every == 0, "keep_checkpoints_every", why)
    count, metric = config.keep_best_checkpoints, config.best_metric
    require(not count or bool(metric), "best_metric", "is empty; by which metric are checkpoints best?")
    require(not metric or bool(count), "best_metric", "has no effect without keep_best_checkpoints")
    unknown = [name for name in config.writers if name not in WRITERS]
    require(not unknown, "writers", f"no {unknown[:1]}; there are {', '.join(WRITERS)}")
    rests = sum(size == -1 for size in dataclasses.astuple(config.mesh))
    require(rests <= 1, "mesh", "at most one axis may be -1 (the rest)")
