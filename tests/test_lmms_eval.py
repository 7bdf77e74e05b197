"""The model that lmms-eval finds: against a stand-in of its interface, and, where it is installed, against itself."""

import importlib
import io
import json
import os
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from made_assistant import assistant
from made_runs import copy_case
from PIL import Image

from navil_jax.errors import UserError
from navil_jax.generate.assistant import Assistant, Question
from navil_jax.generate.sampling import Sampler

ROOT = Path(__file__).parents[1]
TASK = Path(__file__).parent / "lmms_eval_task"


class Lmms:
    """As much of lmms_eval.api.model.lmms (0.7.3) as a model meets."""

    rank = 0

    def __init__(self) -> None:
        self.cached: list[tuple[str, Any, str]] = []
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *of: self.cached.append(of))
        self.task_dict: dict[str, Any] = {}


class Manifest(NamedTuple):
    """lmms_eval.models.registry_v2.ModelManifest."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Instance(NamedTuple):
    """lmms_eval.api.instance.Instance."""

    args: tuple[Any, ...]


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module of the class that the entry point names, on a stand-in of lmms-eval."""
    for name, content in (
        ("lmms_eval", {}),
        ("lmms_eval.api", {}),
        ("lmms_eval.api.model", {"lmms": Lmms}),
        ("lmms_eval.models", {}),
        ("lmms_eval.models.registry_v2", {"ModelManifest": Manifest}),
    ):
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "navil_jax.evaluate.lmms_eval_model", raising=False)
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module_name, _, function = groups["lmms_eval.models"]["navil"].partition(":")
    found = getattr(importlib.import_module(module_name), function)()
    assert (found.model_id, found.chat_class_path) == ("navil", None)
    module_name, _, name = found.simple_class_path.rpartition(".")
    module = importlib.import_module(module_name)
    assert name == "NaViL"
    return module


@pytest.fixture
def model(plugin: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    slots = []

    def load(path: str, mesh: Any, count: int) -> Assistant:
        slots.append((path, count))
        return assistant()

    monkeypatch.setattr(plugin, "load_assistant", load)
    made = plugin.NaViL(pretrained="runs/x", batch_size=1, max_batch_size=None, device="cuda:0")
    assert slots == [("runs/x", 8)]
    return made


COLOURS = ("red", "green", "blue", "white")


def requests(model: Any, **settings: Any) -> list[Instance]:
    """One for each colour, and one without an image."""
    docs: list[dict[str, Any]] = [{"image": Image.new("RGB", (40, 30), colour)} for colour in COLOURS]
    docs.append({"image": None})
    model.task_dict = {"toy": {"test": docs}}

    def visual(doc: dict[str, Any]) -> list[Image.Image] | None:
        return [doc["image"]] if doc["image"] else None

    return [
        Instance(
            (
                f"What is number {number}?",
                {"max_new_tokens": 6, "until": ["\n\n"], **settings},
                visual,
                number,
                "toy",
                "test",
            )
        )
        for number in range(len(docs))
    ]


def alone(number: int) -> str:
    images = [assistant().read_image(Image.new("RGB", (40, 30), COLOURS[number]))] if number < len(COLOURS) else []
    return "".join(assistant().answer((), f"What is number {number}?", images, Sampler(), 6))


def test_answers_are_those_of_the_assistant_in_the_order_of_the_requests(model):
    asked = requests(model, do_sample=False, temperature=0.7, image_aspect_ratio="original")
    answers = model.generate_until(asked)
    assert answers == [alone(number) for number in range(5)]
    assert len(set(answers)) > 1
    assert [(name, key[0], text) for name, key, text in model.cached] == [
        ("generate_until", one.args[0], text) for one, text in zip(asked, answers, strict=True)
    ]


def test_an_answer_ends_before_the_first_text_of_until(model):
    whole = alone(0)
    stop = whole[len(whole) // 2 :][:2]
    (answer, *_) = model.generate_until(requests(model, until=[stop, ""]))
    assert answer == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("settings", "sampler", "tokens", "stops"),
    [
        ({}, Sampler(), 1024, ()),
        ({"until": "x", "temperature": None, "top_p": None, "num_beams": 1}, Sampler(), 1024, ("x",)),
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 4, "max_new_tokens": 3}, Sampler(0.5, 4, 0.9), 3, ()),
        ({"temperature": 0.5, "do_sample": False, "max_gen_toks": 7}, Sampler(), 7, ()),
    ],
)
def test_settings_of_a_task_are_kept(settings, sampler, tokens, stops, plugin):
    prompt: dict[str, Any] = {}
    assert plugin.question_of(prompt, settings, "x") == Question(prompt, sampler, tokens, stops)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_beams": 4}, "toy, document 0: num_beams: 4: there is no beam search"),
        ({"length_penalty": 2}, "toy, document 0: generation_kwargs: length_penalty is not supported"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(settings, said, model):
    with pytest.raises(UserError, match=said):
        model.generate_until(requests(model, **settings))


def test_what_is_no_image_and_other_kinds_of_task_are_refused(plugin, model):
    asked = requests(model)
    model.task_dict["toy"]["test"][0]["image"] = "clip.mp4"
    with pytest.raises(UserError, match="toy, document 0: str is no image"):
        model.generate_until(asked)
    for refused in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(UserError, match="take"):
            refused(asked)
    for arguments, said in (({"max_pixels": 3}, "navil knows no max_pixels"), ({"batch_size": "auto"}, "--batch_size")):
        with pytest.raises(UserError, match=said):
            plugin.NaViL(pretrained="x", **arguments)


@pytest.mark.slow
def test_lmms_eval_itself_runs_a_task_of_files(tmp_path):
    """Only where it is installed: it wants torch, transformers and more."""
    pytest.importorskip("lmms_eval")
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = []
    for number, colour in enumerate(COLOURS):
        file = io.BytesIO()
        Image.new("RGB", (40, 30), colour).save(file, "PNG")
        image = {"bytes": file.getvalue(), "path": f"{number}.png"}
        rows.append({"id": number, "question": "Which colour?", "answer": colour, "image": image})
    kinds = {name: {"dtype": kind, "_type": "Value"} for name, kind in (("id", "int64"), ("question", "string"))}
    features = {**kinds, "answer": kinds["question"], "image": {"_type": "Image"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    parquet.write_table(arrow.Table.from_pylist(rows).replace_schema_metadata(about), tmp_path / "test.parquet")
    task = tmp_path / "tasks" / "navil_toy"
    task.mkdir(parents=True)
    (task / "utils.py").write_text((TASK / "utils.py").read_text())
    text = (TASK / "navil_toy.yaml").read_text()
    (task / "navil_toy.yaml").write_text(text.replace("DATA", str(tmp_path / "test.parquet")))
    checkpoint = copy_case("internlm2_small", tmp_path / "model")
    given = ["--model", "navil", "--model_args", f"pretrained={checkpoint}", "--tasks", "navil_toy"]
    given += ["--include_path", str(task.parent), "--output_path", str(tmp_path / "out"), "--log_samples"]
    command = [sys.executable, "-m", "lmms_eval", *given]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert "exact_match" in done.stdout, done.stdout + done.stderr
    (samples,) = (tmp_path / "out").rglob("*_samples_navil_toy.jsonl")
    assert len(samples.read_text().splitlines()) == len(COLOURS)
