"""A benchmark from files to a card: questions, answers, scores, and what a server of a hidden split takes."""

import argparse
import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from navil_jax.config import Config
from navil_jax.console import say
from navil_jax.convert.loading import load_assistant
from navil_jax.convert.opened import OpenCheckpoint, open_checkpoint
from navil_jax.errors import UserError
from navil_jax.evaluate.answers import answer_all, first_questions, hash_of, lines_of
from navil_jax.evaluate.benchmark_plan import Plan, make_plan
from navil_jax.evaluate.benchmarks.lines import report, scores_of
from navil_jax.evaluate.benchmarks.scoring import RANDOM, headline
from navil_jax.evaluate.cards import read_cards, shown, write_card
from navil_jax.evaluate.journal import same_settings
from navil_jax.evaluate.judge import ALWAYS, Judge, judged_lines
from navil_jax.evaluate.processes import gather, on_first, own_mesh
from navil_jax.evaluate.questions.prompts import make_prompt
from navil_jax.evaluate.questions.record import Record
from navil_jax.evaluate.submissions import WHERE, write_submission
from navil_jax.generate.assistant import Assistant
from navil_jax.generate.engine import BATCH_SLOTS
from navil_jax.generate.sampling import Sampler
from navil_jax.paths import is_remote
from navil_jax.train.checkpoint import find_checkpoints

MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.model")


def run_benchmark(options: argparse.Namespace, config_of: Callable[[Config], Config], out: Path) -> None:
    """Answers, scores, writes files below `out`, and prints the table.

    Each of several processes answers a share on its own devices; the first one alone writes, prints and asks the judge.

    Args:
      config_of: the config with the flags of the command, from that of the checkpoint.

    Raises:
      UserError: an option that is wrong, missing or without effect; questions that cannot be read.
    """
    if not options.data:
        raise UserError("--data: which questions? Give a file or folder of them (docs/benchmarks.md)")
    if bool(options.judge) != bool(options.judge_model):
        raise UserError("--judge and --judge-model belong together: an address, and the name of a model there")
    judge = Judge(options.judge, options.judge_model) if options.judge else None
    plan = make_plan(options.benchmark, options.data, options.split, options.protocol, options.limit, judge)
    if jax.process_index() == 0:
        say(_told(plan))
    checkpoint = _checkpoint(options.checkpoint)
    assistant = load_assistant(options.checkpoint, own_mesh(), BATCH_SLOTS)
    assistant = dataclasses.replace(assistant, config=_flagged(assistant.config, config_of))
    folder = out / f"{plan.benchmark.name}-{plan.questions.split}-{plan.style}"
    settings = _settings(plan, assistant, checkpoint)
    _check_alike(settings | {"protocol": plan.protocol, "limit": plan.limit, "questions": len(plan.questions.records)})
    on_first(lambda: same_settings(folder / "settings.json", settings, folder / "answers.jsonl"))
    records = first_questions(plan.questions.records, plan.limit)
    answers = answer_all(
        assistant, plan.benchmark.name, plan.style, records, plan.most_tokens, folder / "answers.jsonl"
    )
    on_first(lambda: _write(plan, settings, checkpoint, records, answers, out, folder))


def _check_alike(settings: dict[str, Any]) -> None:
    """Raises a `UserError` on every process if one has other questions, settings or another checkpoint."""
    first, *others = gather(settings)
    for number, said in enumerate(others, 1):
        if different := [key for key in first if said[key] != first[key]]:
            raise UserError(f"process {number}: has another {different[0]} than process 0; start all of them alike")


def _write(
    plan: Plan,
    settings: dict[str, Any],
    checkpoint: dict[str, Any],
    records: list[Record],
    answers: dict[str | int, str],
    out: Path,
    folder: Path,
) -> None:
    """Lines, submission, scores, card and table."""
    lines = lines_of(records, answers)
    _write_lines(folder / "predictions.jsonl", lines)
    if plan.questions.layout.hidden or plan.benchmark.name == "mmvet":
        path = write_submission(plan.benchmark.name, plan.style, records, answers, folder)
        say(f"for {WHERE[plan.benchmark.name]}: {path}")
    card = settings | _scored(plan, lines, folder) | _about(plan, records, checkpoint) | {"scored": len(lines)}
    path = write_card(folder, card)
    say(shown(read_cards(out), checkpoint["sha256"]))
    say(f"answers, scores and card: {path}")


def _flagged(own: Config, config_of: Callable[[Config], Config]) -> Config:
    """The checkpoint's config with the flags of the command, which may change images and the prompt's frame."""
    config = config_of(own)
    said = config.data
    data = dataclasses.replace(own.data, template=said.template, system_message=said.system_message)
    if dataclasses.replace(own, images=config.images, data=data) != config:
        raise UserError(
            "--config: beside --benchmark only config.images, config.data.template and config.data.system_message "
            "have an effect; leave others out"
        )
    return config


def _told(plan: Plan) -> str:
    questions = plan.questions
    said = f"{plan.benchmark.name}, {questions.split}: {len(questions.records):,} questions"
    left_out = f"; left out: {questions.left_out}" if questions.left_out else ""
    return f"{said} of {', '.join(map(str, questions.files))}{left_out}"


def _checkpoint(name: str) -> dict[str, Any]:
    """Name, step and SHA-256 of a checkpoint's files."""
    with open_checkpoint(name) as opened:
        if is_remote(opened.path):
            raise UserError(f"{name}: copy the checkpoint to a local folder; its files are hashed for the card")
        return {"name": name, "step": opened.step, "sha256": hash_of(_files(opened))}


def _files(opened: OpenCheckpoint) -> list[Path]:
    if opened.kind == "pytorch":
        return sorted(file for form in MODEL_FILES for file in Path(opened.path).glob(form))
    folder = Path(find_checkpoints(opened.path)) / str(opened.step)
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _settings(plan: Plan, assistant: Assistant, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What answers depend on."""
    config = assistant.config
    return {
        "benchmark": plan.benchmark.name,
        "split": plan.questions.split,
        "prompts": plan.style,
        "max_new_tokens": plan.most_tokens,
        "images": dataclasses.asdict(config.images),
        "template": config.data.template,
        "system_message": config.data.system_message,
        "checkpoint_sha256": checkpoint["sha256"],
        "data": {str(path.name): path.stat().st_size for path in plan.questions.files},
    }


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), errors="replace")


def _scored(plan: Plan, lines: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Score and totals, or why there are none."""
    benchmark, protocol = plan.benchmark, plan.protocol
    nothing = {"score": None, "total": None, "drawn_by_chance": 0}
    if plan.questions.layout.hidden:
        where = WHERE.get(benchmark.name, "its server")
        return {**nothing, "not_scored": f"answers of this split are hidden; upload to {where}"}
    if not plan.judge and benchmark.name in ALWAYS:
        return {**nothing, "not_scored": "needs a judge: --judge URL --judge-model NAME"}
    if plan.judge:
        name = "".join(letter if letter.isalnum() else "-" for letter in plan.judge.model)
        lines = list(judged_lines(benchmark, protocol, lines, plan.judge, folder / f"judged-{protocol}-{name}.jsonl"))
        _write_lines(folder / "predictions.jsonl", lines)
    scores = scores_of(benchmark, lines, protocol)
    pairs = zip(lines, scores, strict=True)
    _write_lines(folder / f"scores-{protocol}.jsonl", [{"id": line["id"], "score": score} for line, score in pairs])
    total = report(benchmark, lines, protocol)["total"]
    return {"score": headline(total), "total": total, "drawn_by_chance": scores.count(RANDOM), "not_scored": None}


def _about(plan: Plan, records: list[Record], checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Where a score comes from."""
    judge = plan.judge
    return {
        "official": plan.questions.layout.official,
        "protocol": plan.protocol,
        "scale": plan.benchmark.scale,
        "questions": len(records),
        "limit": plan.limit or None,
        "left_out": plan.questions.left_out or None,
        "prompt_example": make_prompt(plan.benchmark.name, plan.style, records[0]),
        "decoding": "greedy",
        "seed": Sampler().seed,
        "judge": {"url": judge.url, "model": judge.model, "prompts": "navil_jax"} if judge else None,
        "checkpoint": checkpoint,
        "versions": {"navil_jax": _version(), "jax": jax.__version__, "python": platform.python_version()},
        "device": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
    }


def _version() -> str:
    try:
        return importlib.metadata.version("navil-jax")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
