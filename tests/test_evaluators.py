"""Evaluators by config: benchmarks and captions while a run trains, compiled once, and entries that are refused."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest
from golden_cases import FOLDER
from made_assistant import CONFIG, TOKENIZER, random_params
from made_captions import made_captions

from navil_jax.config import EvaluatorConfig, MeshConfig
from navil_jax.config.flags import load_config
from navil_jax.errors import UserError
from navil_jax.evaluate import asking
from navil_jax.evaluate.__main__ import main as evaluate
from navil_jax.evaluate.captions import PROMPT, read_captions
from navil_jax.sharding import make_mesh
from navil_jax.train.__main__ import train
from navil_jax.train.evaluators import Evaluator, make_evaluator
from navil_jax.train.metrics import read_log
from navil_jax.train.profiling import compilations

RECIPE = Path(__file__).parent / "toy_recipe.py"
DATA = FOLDER / "benchmarks" / "data"
GQA = EvaluatorConfig("benchmark", every=2, samples=3, benchmark="gqa", data=str(DATA / "gqa" / "tsv"))


def made(entry: EvaluatorConfig) -> Evaluator:
    return make_evaluator(entry, CONFIG, make_mesh(MeshConfig(), jax.devices()[:1]), TOKENIZER)


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the model says to a prompt, by default a blank; and what it was asked."""
    said: dict[str, Any] = {"asked": []}

    def generate(assistant, asks, most_tokens):
        for ask in asks:
            said["asked"].append(ask)
            yield ask, said.get(ask.prompt, "")

    monkeypatch.setattr(asking, "generate", generate)
    return said


@pytest.mark.slow
def test_a_run_evaluates_benchmarks_and_captions_and_compiles_its_step_once(tmp_path, capsys):
    captions = EvaluatorConfig("captions", every=3, data=str(made_captions(tmp_path / "data")))
    config = dataclasses.replace(
        load_config(RECIPE), workdir=str(tmp_path / "run"), steps=6, eval_every=0, evaluators=(GQA, captions)
    )
    with contextlib.ExitStack() as stack:
        names = ("train_step", "_prefill_program", "traced")
        compiled = {name: stack.enter_context(compilations(name)) for name in names}
        assert train(config) == 0
        counts = {name: len(found) for name, found in compiled.items()}
    assert counts["train_step"] == 1
    assert counts["_prefill_program"] <= 3  # buckets of questions and captions, each once in five evaluations
    lines = read_log(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval/gqa-testdev/internvl" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "eval/captions/cider" in line] == [3, 6]
    written = (tmp_path / "run" / "gqa-testdev-internvl.jsonl").read_text().splitlines()
    assert len(written) == 12  # at the end all
    assert {"id", "prediction", "score", "answer"} <= set(json.loads(written[0]))
    assert "1 of 5 images cannot be read and count as an empty answer: image of question 2: " in capsys.readouterr().out
    given = ["--config", str(RECIPE), "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert evaluate([*given, "--evaluators", "captions"]) == 2  # the recipe has no such entry
    assert "captions: its entry needs `data`" in capsys.readouterr().err


def test_a_benchmark_is_scored_by_its_own_rules(says):
    evaluator = made(GQA)
    scores = evaluator.score(random_params())
    assert evaluator.metrics(scores) == {"eval/gqa-testdev/internvl": 0.0}
    for line, ask in zip(scores.lines, says["asked"], strict=True):
        says[ask.prompt] = line["answer"]
    assert evaluator.metrics(evaluator.score(random_params()))["eval/gqa-testdev/internvl"] == 100
    assert len(evaluator.score(random_params(), 3).lines) == 3


def test_captions_are_scored_and_a_bad_image_counts_as_an_empty_one(says, tmp_path):
    evaluator = made(EvaluatorConfig("captions", data=str(made_captions(tmp_path / "data"))))
    says[PROMPT] = "A red square of shade 3."
    scores = evaluator.score(random_params())
    assert [one.text for one in scores.said] == ["A red square of shade 3.", "", *["A red square of shade 3."] * 3]
    assert scores.scores[2] > 0 == scores.scores[0] == scores.scores[1]  # what all images have weighs nothing
    (name, value), *_ = evaluator.metrics(scores).items()
    assert (name, value) == ("eval/captions/cider", pytest.approx(sum(scores.scores) / 5))
    assert "1 of 5 images cannot be read" in evaluator.report(scores, tmp_path, final=True)
    assert len((tmp_path / "captions-cider.jsonl").read_text().splitlines()) == 5


def test_captions_of_coco_are_read(tmp_path):
    (tmp_path / "val2014").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "val2014" / name).touch()
    images = [{"id": 5, "file_name": "a.png"}, {"id": 3, "file_name": "b.png"}]
    annotations = [{"image_id": image, "caption": text} for image, text in ((3, "B."), (5, "A."), (3, "Bee."))]
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    found = [(one.id, one.image.name, one.captions) for one in read_captions(path)]
    assert found == [(5, "a.png", ("A.",)), (3, "b.png", ("B.", "Bee."))]
    path.write_text(json.dumps({"images": images[:1], "annotations": annotations}))
    with pytest.raises(UserError, match=r"captions of image 3, which `images` lacks"):
        read_captions(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: is no JSON"),
        ("[]", "line 2: must be a JSON object"),
        ('{"image": "1.png", "captions": []}', "line 2: captions: must be a list of texts"),
        ('{"image": "1.png", "captions": ["a", 3]}', "line 2: captions: must be a list of texts"),
        ('{"image": "1.png", "captions": ["a"], "captions": ["b"]}', "line 2: is no JSON"),
        ('{"image": "no.png", "captions": ["a"]}', "no such file, nor in a folder beside it"),
        ('{"image": 3, "captions": ["a"]}', "line 2: image: must be the name of a file"),
        ('{"id": 1, "image": "1.png", "captions": ["a"]}', "an id stands twice"),
        ('{"id": [1], "image": "1.png", "captions": ["a"]}', "line 2: id: must be a text or a whole number"),
    ],
)
def test_lines_of_captions_that_cannot_be_used_are_named(line, said, tmp_path):
    path = made_captions(tmp_path / "data", 1)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"captions\.jsonl: ") as caught:
        read_captions(path)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (EvaluatorConfig("benchmark"), "benchmark: which one? Its entry needs `benchmark`"),
        (EvaluatorConfig("benchmark", benchmark="gqa"), "benchmark: which one? Its entry needs `benchmark`"),
        (dataclasses.replace(GQA, benchmark="vqa"), "config.evaluators: benchmark vqa: no such benchmark"),
        (dataclasses.replace(GQA, data="nowhere"), "config.evaluators: data nowhere: no such file or folder"),
        (dataclasses.replace(GQA, split="x"), "config.evaluators: split x: gqa has testdev"),
        (dataclasses.replace(GQA, protocol="llava"), "config.evaluators: protocol llava: gqa has internvl"),
        (dataclasses.replace(GQA, benchmark="mmvet", data=str(DATA / "mmvet" / "tsv")), "it needs a judge; use"),
        (
            dataclasses.replace(GQA, benchmark="docvqa", data=str(DATA / "docvqa" / "hf"), split="test"),
            "docvqa, test: answers of this split are hidden; use",
        ),
        (EvaluatorConfig("captions"), "captions: its entry needs `data`"),
        (EvaluatorConfig("captions", data="nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (EvaluatorConfig("held_out", data="x"), "config.evaluators: held_out: data has no effect; leave it out"),
    ],
)
def test_entries_that_cannot_be_used_are_refused_before_the_first_step(entry, said):
    with pytest.raises(UserError) as caught:
        made(entry)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
