"""Checkpoints on disk: a run's own, and golden cases as the hub has them."""

import shutil
from pathlib import Path
from typing import Any

import jax
from golden_cases import FOLDER

from navil_jax.config import Config, ModelConfig
from navil_jax.data.tokenizers import load_tokenizer
from navil_jax.train.checkpoint import Checkpoints, Record

TOKENIZER = FOLDER / "prompts" / "tokenizer"


def saved_run(workdir: Path, config: ModelConfig, params: Any) -> Path:
    files = load_tokenizer(TOKENIZER).files()
    with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
        params = jax.tree.map(jax.numpy.asarray, params)
        checkpoints.save(3, params, Record(Config(model=config), files, {}))
    return workdir


def copy_case(name: str, folder: Path) -> Path:
    """A golden checkpoint with its tokenizer, as the hub has it."""
    folder.mkdir(parents=True)
    for file in [*(FOLDER / name).glob("*.json"), FOLDER / name / "model.safetensors", *TOKENIZER.iterdir()]:
        if file.name not in ("golden.json", "token_to_id.json"):
            shutil.copy(file, folder)
    return folder
