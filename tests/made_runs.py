"""Runs on disk: checkpoints of their own, golden cases as the hub has them, and logs."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import toy_recipe
from golden_cases import FOLDER

from navil_jax.config import Config, ModelConfig
from navil_jax.config.plain import to_json
from navil_jax.data.tokenizers import load_tokenizer
from navil_jax.train.checkpoint import Checkpoints, Record

RECIPE = Path(__file__).parent / "toy_recipe.py"
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


def run_logs(folder: Path, losses: list[float], **about: object) -> Path:
    """The files of a run, as a trainer leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": n + 1, "loss": loss, "samples/web/good": 990, "samples/web/bad": 2} for n, loss in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    timing = {"step": len(losses), "seconds_per_step": 2.0, "tokens_per_second": 5e4, "data_wait": 0.03, "mfu": 0.41}
    (folder / "timings.jsonl").write_text(json.dumps(timing | about) + "\n")
    attempt = {"began": time.time() - 100, "first": 0, "last": len(losses), "seconds": {"start": 40, "steps": 55}}
    (folder / "goodput.jsonl").write_text(json.dumps(attempt) + "\n")
    config = json.loads(to_json(toy_recipe.get_config())) | {"steps": 1000}
    said = {"config": config, "command": ["train", "--config", str(RECIPE)], "host": "a", "processes": 2, "devices": 8}
    (folder / "run.json").write_text(json.dumps(said | {"device_kind": "TPU v5", "mesh": {"fsdp": 8}}))
    (folder / "checkpoints" / "100").mkdir(parents=True, exist_ok=True)
    return folder
