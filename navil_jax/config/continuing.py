"""What may change when a run goes on, and when one run starts from another one."""

import dataclasses
import os
from typing import Any

from navil_jax.config import Config, validate
from navil_jax.config.flags import resumed_keys
from navil_jax.config.plain import differences
from navil_jax.errors import UserError

# What may differ between a run and its continuation: nothing that changes which numbers come out, but for the length.
# The mesh is free and so is the number of hosts, as long as it divides data.streams.
FREE_KEYS: tuple[str, ...] = (
    "workdir",
    "steps",
    "log_every",
    "writers",
    "profile_steps",
    "eval_",
    "evaluators",
    "checkpoint_",
    "keep_",
    "best_",
    "mesh.",
)
FREE_KEYS += ("model.remat", "model.attention", "data.threads", "data.workers", "data.max_bad_share", "resume_with")
FREE_KEYS += tuple(f"optimizer.{key}" for key in ("microbatches", "not_finite", "spike", "max_skipped"))
# What cannot change within a run, even if config.resume_with asks for it: what is saved would not fit.
FIXED_KEYS = ("model.", "data.streams", "optimizer.algorithm", "optimizer.trainable", "optimizer.ema_decay", "init_")
# What may differ besides between the models of two runs, of which the second starts with the first one's parameters.
FREE_MODEL_KEYS = (
    "model.remat",
    "model.attention",
    "model.param_dtype",
    "model.compute_dtype",
    "model.gradient_sums",
    "model.lora_",
)


def check_continues(
    saved: Config,
    config: Config,
    folder: str | os.PathLike[str],
    fingerprints: tuple[dict[str, str], dict[str, str]] = ({}, {}),
) -> dict[str, tuple[Any, Any]]:
    """What is changed on purpose, by `config.resume_with`: key -> (value so far, value from here on).

    Args:
      fingerprints: of the data so far and of those from here on (`data.sources.fingerprints`); other data count as
        another config. Missing so far: the data were read before there were fingerprints, which of held-out ones is
        no change.

    Raises:
      UserError: `config` is otherwise not a continuation of the run that wrote the checkpoints in `folder`, or
        `config.resume_with` names no key. Its length may always change, but not if that moves the end of a cosine.
    """
    changed = {k: v for k, v in differences(saved, config).items() if not k.startswith(FREE_KEYS)}
    if config.optimizer.schedule == "cosine" and saved.steps != config.steps:
        changed["steps"] = saved.steps, config.steps
    before, now = fingerprints
    now = {key: value for key, value in now.items() if key in before or not key.endswith("held_out.fingerprint")}
    changed |= {k: (before.get(k), now.get(k)) for k in before | now if before.get(k) != now.get(k)}
    asked = resumed_keys(config)
    fixed = {k: v for k, v in changed.items() if k.startswith(FIXED_KEYS)}
    refused = fixed or {k: v for k, v in changed.items() if not _is_within(k, asked)}
    if refused:
        way = "" if fixed else f", or change it in this run from here on with config.resume_with={','.join(refused)}"
        raise UserError(
            f"{folder}: holds a run with another config: {_listed(refused)}; set config.workdir to a new folder{way}"
        )
    return changed


def _is_within(key: str, names: tuple[str, ...]) -> bool:
    """Whether a key, or a group that it belongs to, is among the names."""
    return any(f"{key}.".startswith(f"{name}.") for name in names)


def with_model_of(config: Config, saved: Config) -> Config:
    """The config with the model, template, system message and image settings of another one (`config.init_model`).

    How the model is computed (remat, attention, dtypes) and its low-rank updates stay as in `config`.
    """
    names = {key.removeprefix("model.") for key in FREE_MODEL_KEYS}
    own = {
        field.name: getattr(config.model, field.name)
        for field in dataclasses.fields(config.model)
        if field.name.startswith(tuple(names))
    }
    prompt = {name: getattr(saved.data, name) for name in ("template", "system_message")}
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(saved.model, **own),
        images=saved.images,
        data=dataclasses.replace(config.data, **prompt),
    )
    validate(config)
    return config


def check_same_model(saved: Config, config: Config, folder: str | os.PathLike[str]) -> None:
    """Raises a `UserError` if parameters of the run in `folder` would mean something else in `config.model`."""
    changed = {k: v for k, v in differences(saved, config).items() if k.startswith("model.")}
    changed = {k: v for k, v in changed.items() if not k.startswith(FREE_MODEL_KEYS)}
    if changed:
        raise UserError(f"{folder}: holds another model: {_listed(changed)}; change the recipe or config.init_from")


def _listed(changed: dict[str, tuple[Any, Any]]) -> str:
    more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
    return ", ".join(f"{key} was {old} and is {new}" for key, (old, new) in list(changed.items())[:3]) + more
