"""One loader for folders of every kind and ids of the hub: its result is asked, trained on, exported and scored."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import jax
import numpy as np
import pytest
from toy_recipe import Colors

import navil_jax
import navil_jax.config
import navil_jax.paths
from navil_jax import chat
from navil_jax.config.flags import load_config
from navil_jax.convert.hub import folder_of
from navil_jax.convert.opened import open_checkpoint, open_start
from navil_jax.errors import UserError
from navil_jax.evaluate.__main__ import main as evaluate
from navil_jax.model.params import flatten
from navil_jax.sharding import make_mesh
from navil_jax.train.__main__ import main, train
from navil_jax.train.metrics import read_log

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "tests" / "toy_recipe.py")
QUESTION, SHOWN = "Which color?", Colors("test")[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`, that has learnt its colours, and its export `hf`."""
    folder = tmp_path_factory.mktemp("folders")
    flags = ["--config.steps=32", "--config.eval_every=0", "--config.checkpoint_every=40"]
    assert main(["--config", RECIPE, f"--config.workdir={folder / 'run'}", *flags]) == 0
    navil_jax.load_pretrained(folder / "run").export(folder / "hf")
    return folder


@pytest.mark.parametrize("kind", ["run", "run/checkpoints", "run/checkpoints/32", "hf"])
def test_every_kind_of_folder_answers(folders: Path, kind: str) -> None:
    loaded = navil_jax.load_pretrained(folders / kind)
    assert loaded.ask(QUESTION, [SHOWN.images[0]], max_new_tokens=8) == SHOWN.turns[0][1]


def test_both_formats_hold_the_same_parameters(folders: Path) -> None:
    run, exported = (flatten(navil_jax.load_pretrained(folders / name).params) for name in ("run", "hf"))
    assert run.keys() == exported.keys()
    for name, value in run.items():
        np.testing.assert_array_equal(value, exported[name], err_msg=name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("q", "a.png"), r"images: give a list, such as \[\"cat.png\"\], not str"),
        (("q", 5), "images: give a list"),
        (("q", np.zeros((4, 4, 3), np.uint8)), "not an array; PIL.Image.fromarray"),
        (("q", [np.zeros((4, 4, 3), np.uint8)]), "not ndarray; PIL.Image.fromarray"),
        (("q", [None]), "an image must be a path, bytes or a PIL image, not NoneType"),
        (("q", [""]), "is an empty name; give a path"),
        ((None,), "question: give a str, not NoneType"),
        (("",), "the question is empty"),
        (("\ud800",), "no UTF-8 at character 1"),
        (("q", (), 5), "sampler: give a Sampler"),
        (("q", (), None, 2.5), "max_new_tokens: give a whole number, not 2.5"),
        (("q", (), None, True), "max_new_tokens: give a whole number, not True"),
    ],
)
def test_what_cannot_be_asked_says_what_to_give(folders: Path, arguments: tuple, said: str) -> None:
    loaded = navil_jax.load_pretrained(folders / "run")
    with pytest.raises((TypeError, UserError), match=said):
        loaded.ask(*arguments)


@pytest.mark.parametrize(
    ("path", "said"), [(None, "not NoneType"), (5, "not int"), (b"x", "not bytes"), ("", "is empty")]
)
def test_what_is_no_path_says_what_to_give(path: object, said: str) -> None:
    with pytest.raises((TypeError, UserError), match=f"path: .*{said}"):
        navil_jax.load_pretrained(path)  # type: ignore[arg-type]


def test_chat_takes_a_hugging_face_folder(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    SHOWN.images[0].save(tmp_path / "shown.png")
    arguments = ["--image", str(tmp_path / "shown.png"), "--prompt", QUESTION, "--max-new-tokens", "8"]
    assert chat.main(["--checkpoint", str(folders / "hf"), *arguments]) == 0
    assert capsys.readouterr().out.strip() == SHOWN.turns[0][1]


def test_a_run_starts_from_a_hugging_face_folder(folders: Path, tmp_path: Path) -> None:
    flags = ["--config.init_model=true", "--config.steps=2", "--config.optimizer.peak_learning_rate=1e-6"]
    arguments = ["--config", RECIPE, f"--config.workdir={tmp_path}", f"--config.init_from={folders / 'hf'}", *flags]
    assert main(arguments) == 0
    assert read_log(tmp_path / "metrics.jsonl")[0]["loss"] < 0.1
    with open_checkpoint(tmp_path) as opened:
        assert opened.origin["name"] == "hf"


def test_scores_of_a_checkpoint_are_those_of_its_run(folders: Path, tmp_path: Path) -> None:
    logged = next(line for line in read_log(folders / "run" / "metrics.jsonl") if "eval/colors/loss" in line)
    assert evaluate(["--checkpoint", str(folders / "run"), "--out", str(tmp_path)]) == 0
    assert read_log(tmp_path / "metrics.jsonl") == [logged]
    assert "| colors | color | 12 | 100.0% |" in (tmp_path / "evaluation.md").read_text()


def test_sources_of_a_run_can_be_changed_for_its_scores(folders: Path, tmp_path: Path) -> None:
    flags = ["--out", str(tmp_path), "--config.data.sources.0.weight=2", "--samples", "4"]
    assert evaluate(["--checkpoint", str(folders / "run"), *flags]) == 0
    assert "| colors | color | 4 |" in (tmp_path / "evaluation.md").read_text()


def test_what_trained_in_float32_is_scored_in_float32(tmp_path: Path) -> None:
    """Though config.model.param_dtype, which holds for frozen parameters, says bfloat16."""
    flags = ["--config.steps=3", "--config.eval_every=0", "--config.model.param_dtype=bfloat16"]
    assert main(["--config", RECIPE, f"--config.workdir={tmp_path / 'run'}", *flags]) == 0
    assert {x.dtype.name for x in flatten(navil_jax.load_pretrained(tmp_path / "run").params).values()} == {"float32"}
    assert evaluate(["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "scores")]) == 0
    assert read_log(tmp_path / "scores" / "metrics.jsonl")[0] in read_log(tmp_path / "run" / "metrics.jsonl")


def test_written_answers_are_right_where_forced_ones_are(folders: Path, tmp_path: Path) -> None:
    arguments = ["--config", RECIPE, "--evaluators", "generated", "--samples", "5", "--out", str(tmp_path)]
    assert evaluate(["--checkpoint", str(folders / "hf"), *arguments]) == 0
    assert read_log(tmp_path / "metrics.jsonl") == [{"step": 0, "eval/colors/generated_accuracy": 1.0}]
    assert (tmp_path / "generated.png").exists()


def test_flags_hold_for_the_checkpoint(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--checkpoint", str(folders / "run"), "--out", str(tmp_path), "--evaluators", "generated"]
    assert evaluate([*arguments, "--config.images.max_patches=2"]) == 2
    assert "images.max_patches" in capsys.readouterr().err
    assert evaluate([*arguments, "--config.data.system_message=Speak as a pirate.", "--samples", "1"]) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--evaluators", "nothing"], "config.evaluators: no 'nothing'; the nearest is "),
        (["--evaluators", "json:Nothing"], "json:Nothing"),
        (["--samples", "-1"], "--samples: must be at least 0, not -1"),
        (["--config.model.decoder.depth=3"], "its params are those of another model"),
    ],
)
def test_mistakes_are_one_line(folders: Path, capsys: pytest.CaptureFixture, flags: list[str], said: str) -> None:
    assert evaluate(["--checkpoint", str(folders / "run"), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_evaluators_of_a_recipe_run_when_they_are_due(tmp_path: Path) -> None:
    config = load_config(RECIPE)
    entries = (navil_jax.config.EvaluatorConfig("held_out", every=2, samples=2),)
    entries += (navil_jax.config.EvaluatorConfig("generated", every=0),)
    assert train(dataclasses.replace(config, workdir=str(tmp_path), steps=5, eval_every=0, evaluators=entries)) == 0
    lines = read_log(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval/colors/loss" in line] == [2, 4, 5]
    assert [line["step"] for line in lines if "eval/colors/generated_accuracy" in line] == [5]


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as a download of one repository asks for; `server.folder` has its files."""

    COMMIT = "0" * 39 + "1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        folder: Path = self.server.folder  # type: ignore[attr-defined]
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/maker/toy/tree/"):
            sizes = [{"type": "file", "path": f.name, "oid": "1", "size": f.stat().st_size} for f in folder.iterdir()]
            return self._send(json.dumps(sizes).encode(), body)
        if path.startswith("/api/models/maker/toy"):
            files = [{"rfilename": str(file.relative_to(folder))} for file in sorted(folder.rglob("*"))]
            return self._send(json.dumps({"id": "maker/toy", "sha": self.COMMIT, "siblings": files}).encode(), body)
        file = folder / path.rpartition("/")[2]
        if path.startswith("/maker/toy/resolve/") and file.is_file():
            return self._send(file.read_bytes(), body)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("X-Error-Message", "Repository not found")
        self.send_header("Content-Length", "0")
        return self.end_headers()

    def _send(self, content: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(folders: Path, tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    pytest.importorskip("huggingface_hub")
    shutil.copytree(folders / "hf", tmp_path / "files")
    (tmp_path / "files" / "demo.mp4").write_bytes(b"not wanted")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.folder, server.asked = tmp_path / "files", []  # type: ignore[attr-defined]
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def _command(server: ThreadingHTTPServer, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    settings |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "navil_jax.convert", *arguments]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, cwd=home, timeout=120)


def test_an_id_on_the_hub_is_a_folder_too(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for name in ("maker/toy", "hf://maker/toy"):
        done = _command(hub, home, "inspect", name, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["whole"]
    assert not any("demo.mp4" in path for path in hub.asked)  # type: ignore[attr-defined]
    assert sum("resolve" in path and "safetensors" in path for path in hub.asked) <= 4  # type: ignore[attr-defined]
    done = _command(hub, home, "inspect", "maker/nothing")
    assert done.returncode == 2
    assert "maker/nothing: no such folder here, and the Hugging Face hub says: " in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_run_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert folder_of("runs/nothing") == navil_jax.paths.path_of("runs/nothing")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"^maker/toy: no such folder; to download it .* pip install huggingface_hub$"):
        folder_of("maker/toy")


def test_the_newest_checkpoint_of_the_workdir_comes_before_init_from(folders: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(load_config(RECIPE), workdir=str(folders / "run"), init_from=str(tmp_path / "none"))
    with open_start(config) as start:
        assert start is not None
        assert start.step == 32
    fresh = dataclasses.replace(config, workdir=str(tmp_path / "new"))
    with open_start(fresh, planned=True) as start:
        assert start is None
    with pytest.raises(UserError, match="no such folder"), open_start(fresh):
        pass


def test_a_checkpoint_is_put_on_the_devices_that_share_it(folders: Path) -> None:
    mesh = make_mesh(navil_jax.config.MeshConfig(fsdp=2, tensor=1, data=-1))
    with open_checkpoint(folders / "hf") as opened:
        params = flatten(opened.restore(opened.config.model, mesh))
    whole = max(params.values(), key=lambda x: x.size)
    assert isinstance(whole, jax.Array)
    assert len({str(shard.index) for shard in whole.addressable_shards}) == 2
