"""The chat command on a tiny model with random weights: answers, conversations, streaming, and every bad input."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import FOLDER
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_assistant import CONFIG, MODEL, TOKENIZER, assistant, random_params
from PIL import Image

from navil_jax import chat
from navil_jax.config import (
    MeshConfig,
)
from navil_jax.convert import loading
from navil_jax.convert.loading import load_assistant
from navil_jax.data.prompt import response_text
from navil_jax.generate.assistant import Assistant
from navil_jax.generate.engine import Engine
from navil_jax.generate.messages import read_messages
from navil_jax.generate.sampling import Sampler
from navil_jax.generate.stream import TextStream, stream_text
from navil_jax.model import lora
from navil_jax.model import params as model_params
from navil_jax.sharding import make_mesh
from navil_jax.train.checkpoint import Checkpoints, Record

STEP = 3


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training workdir with one checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(STEP, random_params(), Record(CONFIG, TOKENIZER.files(), {}))
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("images") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)).save(file)
    return file


def run(*arguments: object) -> int:
    length = () if "--max-new-tokens" in arguments else ("--max-new-tokens", "8")
    return chat.main([*map(str, arguments), *length])


class TestCommand:
    def test_one_question(self, workdir: Path, image: Path, capsys: pytest.CaptureFixture, monkeypatch):
        arguments = ("--checkpoint", workdir, "--image", image, "--prompt", "What is it?")
        assert run(*arguments) == 0
        answer = capsys.readouterr().out
        images = [assistant().read_image(image)]
        assert answer == "".join(assistant().answer((), "What is it?", images, Sampler(), 8)) + "\n"
        monkeypatch.setattr(loading, "load_assistant", lambda *_, **__: assistant())
        assert run(*arguments, "--temperature", "3", "--top-k", "50", "--top-p", "0.9", "--seed", "5") == 0
        assert capsys.readouterr().out != answer

    def test_conversation(self, image: Path, capsys: pytest.CaptureFixture, monkeypatch):
        monkeypatch.setattr(loading, "load_assistant", lambda *_, **__: assistant())
        lines = [f"/image {image}", "What is it?", "And now?", "/image", "/nothing", "look at <image>", "/help"]
        lines += ["", "/reset all", "/quit now", "/reset", "What is it?", "/quit", "never read"]
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
        assert run("--checkpoint", "any") == 0
        out = capsys.readouterr().out
        images = [assistant().read_image(image)]
        question, history = "<image>\nWhat is it?", []
        for asked in (question, "And now?"):
            history.append((asked, "".join(assistant().answer(history, asked, images, Sampler(), 8))))
            assert history[-1][1] in out
        after_reset = "".join(assistant().answer((), "What is it?", [], Sampler(), 8))
        assert out.rstrip().endswith((after_reset + "\n>").strip())
        assert out.count("error: ") == 5
        assert "error: /reset: stands alone; leave out 'all'" in out
        assert "> starts anew\n" in out
        assert "error: no command /nothing" in out
        assert "error: the question holds <image> 1 times for 0 new images" in out
        assert chat.HELP in out
        assert max(map(len, chat.HELP.splitlines())) < 80

    def test_end_of_input_and_ctrl_c(self, capsys: pytest.CaptureFixture, monkeypatch):
        monkeypatch.setattr(loading, "load_assistant", lambda *_, **__: assistant())
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        assert run("--checkpoint", "any") == 0

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("builtins.input", interrupt)
        assert run("--checkpoint", "any") == 130
        monkeypatch.setattr(Assistant, "answer", interrupt)
        assert run("--checkpoint", "any", "--prompt", "x") == 130
        assert capsys.readouterr().err == "stopped\nstopped\n"

    def test_ctrl_c_ends_an_answer_and_not_the_talk(self, capsys: pytest.CaptureFixture, monkeypatch):
        monkeypatch.setattr(loading, "load_assistant", lambda *_, **__: assistant())
        histories = []

        def answer(_: Assistant, history: list, question: str, *__: object) -> Iterator[str]:
            histories.append(list(history))
            yield "half an "
            if question == "long":
                raise KeyboardInterrupt
            yield "answer"

        monkeypatch.setattr(Assistant, "answer", answer)
        monkeypatch.setattr("sys.stdin", io.StringIO("long\nshort\n\nagain\n"))
        assert run("--checkpoint", "any") == 0
        assert "half an \nstopped; this question is forgotten\n" in capsys.readouterr().out
        assert histories == [[], [], [("short", "half an answer")]]

    @pytest.mark.parametrize(
        "typed",
        ["{}", "'{}'", '"{}"', "~/red image.png", "red image.png"],
    )
    def test_files_are_named_as_terminals_do(self, typed: str, image: Path, tmp_path: Path, capsys, monkeypatch):
        (tmp_path / "red image.png").write_bytes(image.read_bytes())
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(loading, "load_assistant", lambda *_, **__: assistant())
        escaped = str(tmp_path / "red image.png").replace(" ", r"\ ")
        lines = f"/image {typed.format(tmp_path / 'red image.png')}\n/image {escaped}\n"
        lines += f"{typed.format(tmp_path / 'red image.png')}\n{escaped}\n"
        lines += f"file://{tmp_path}/red%20image.png\n"
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        assert run("--checkpoint", "any") == 0
        assert capsys.readouterr().out.count("goes with the next question") == 5

    def test_a_conversation_is_saved_with_its_images(self, image: Path, tmp_path: Path, capsys, monkeypatch):
        monkeypatch.setattr(loading, "load_assistant", lambda *_, **__: assistant())
        monkeypatch.chdir(tmp_path)
        asked = [
            "/save a.json",
            "/save",
            f"/image {image}",
            "What?",
            "And now?",
            "/save 'a b.json'",
            "/save 'a b.json'",
        ]
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(asked)))
        assert run("--checkpoint", "any", "--max-new-tokens", "1") == 0
        out = capsys.readouterr().out
        assert "error: /save: there is no answer yet" in out
        assert "error: /save: name a file" in out
        assert "2 questions and answers: a b.json" in out
        assert "error: 'a b.json': is there already; name another file" in out
        saved = json.loads((tmp_path / "a b.json").read_text())["messages"]
        assert [message["role"] for message in saved] == ["user", "assistant"] * 2
        assert saved[0]["content"] == [
            {"type": "image_url", "image_url": {"url": str(image)}},
            {"type": "text", "text": "What?"},
        ]
        asked_again = read_messages(saved[:-1])
        assert asked_again.images == (str(image),)
        assert asked_again.history[0][0] == "<image>\nWhat?"

    def test_what_cannot_be_used_is_a_line_and_the_talk_goes_on(self, tmp_path: Path, capsys, monkeypatch):
        (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
        asked = [
            b"caf\xe9?",
            b"/image",
            b"/image %s/broken.png",
            b"/image %s",
            b"/image %s/caf\xe9.png",
            b"/image a\0b",
            b"/nowhere/cat.png",
            b"/save nowhere\0",
        ]
        content = b"\n".join(line.replace(b"%s", str(tmp_path).encode()) for line in asked)
        stdin = io.TextIOWrapper(io.BytesIO(content + b"\nWhat is it?\n"), encoding="utf-8")
        monkeypatch.setattr(loading, "load_assistant", lambda *_, **__: assistant())
        monkeypatch.setattr("sys.stdin", stdin)
        assert run("--checkpoint", "any", "--max-new-tokens", "1") == 0
        out = capsys.readouterr().out
        assert [line.count("error: ") for line in out.split("> ")] == [0, *(1 for _ in asked), 0, 0]
        assert "error: the question: is no UTF-8 at character 4; write it again" in out

    def test_an_answer_that_is_cut_says_so(self, workdir: Path, image: Path, capsys, monkeypatch):
        assert run("--checkpoint", workdir, "--image", image, "--prompt", "x", "--max-new-tokens", 2) == 0
        assert "... (cut at 2 tokens; --max-new-tokens allows more)" in capsys.readouterr().err
        assistant = load_assistant(workdir, make_mesh(MeshConfig()))
        stopped: list[bool] = []
        (first,) = assistant.engine.generate([assistant.prompt((), "x", [])], Sampler(), 1, -1)[0]
        monkeypatch.setattr(Assistant, "stop_id", first)
        assert len(list(assistant.answer((), "x", [], Sampler(), 1, lambda: stopped.append(True)))) <= 1
        assert stopped == []

    def test_help_shows_examples(self, capsys: pytest.CaptureFixture):
        with pytest.raises(SystemExit) as exit_status:
            chat.main(["--help"])
        assert exit_status.value.code == 0
        assert chat.EXAMPLES.strip() in capsys.readouterr().out


class TestMistakes:
    """Each is one line on stderr and exit status 2."""

    def check(self, capsys: pytest.CaptureFixture, said: str, *arguments: object) -> None:
        assert run(*arguments, "--prompt", "x") == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert said in err

    def test_images(self, workdir: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
        text, cut = tmp_path / "text.png", tmp_path / "cut.png"
        text.write_text("no image")
        cut.write_bytes(image.read_bytes()[:-500])
        for file, said in [
            (tmp_path / "none.png", "none.png: no such file"),
            (text, "text.png: not an image"),
            (cut, "cut.png: broken or cut off"),
            (tmp_path, "is a folder; name a file"),
        ]:
            self.check(capsys, said, "--checkpoint", workdir, "--image", file)

    def test_folders(self, workdir: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
        self.check(capsys, "none: no such folder", "--checkpoint", tmp_path / "none")
        self.check(capsys, "noise.png: not a folder", "--checkpoint", image)
        self.check(capsys, "holds neither config.json", "--checkpoint", tmp_path)
        (tmp_path / "model.safetensors").touch()
        self.check(capsys, "holds neither config.json", "--checkpoint", tmp_path)
        older = shutil.copytree(workdir / "checkpoints" / str(STEP), tmp_path / "old" / "1").parent
        shutil.copytree(older / "1", older / "2")
        self.check(capsys, f"not the newest checkpoint, which is {older.resolve()}/2", "--checkpoint", older / "1")

    @pytest.mark.parametrize("missing", ["params", "params/manifest.ocdbt", "record", "record/metadata"])
    def test_half_written(self, workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture, missing: str):
        folder = shutil.copytree(workdir, tmp_path / "run")
        path = folder / "checkpoints" / str(STEP) / missing
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.check(capsys, f"checkpoints/{STEP}: ", "--checkpoint", folder)

    def test_no_tokenizer_or_another_one(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        smaller = dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, vocab_size=559))
        other = dataclasses.replace(MODEL, special_token_ids=tuple(range(12)))
        small_table = dataclasses.replace(smaller.decoder, vocab_size=500)
        for number, (model, files, said) in enumerate(
            [
                (MODEL, {}, "no tokenizer"),
                (other, TOKENIZER.files(), "ids of special tokens"),
                (dataclasses.replace(MODEL, decoder=small_table, special_token_ids=()), TOKENIZER.files(), "558 ids"),
            ]
        ):
            folder = tmp_path / str(number) / "checkpoints"
            with Checkpoints(folder, keep=1) as checkpoints:
                checkpoints.save(1, {"w": np.zeros(2)}, Record(dataclasses.replace(CONFIG, model=model), files, {}))
            self.check(capsys, said, "--checkpoint", folder)

    def test_numbers_and_placeholders(self, workdir: Path, capsys: pytest.CaptureFixture):
        self.check(capsys, "--max-new-tokens: must be at least 1, not 0", "--checkpoint", "a", "--max-new-tokens", "0")
        self.check(capsys, "--top-p: must be above 0 and at most 1, not nan", "--checkpoint", "a", "--top-p", "nan")
        for prompt, said in (("caf\udce9?", "--prompt: is no UTF-8 at character 4"), (" ", "--prompt: is empty")):
            assert chat.main(["--checkpoint", "any", "--prompt", prompt]) == 2
            assert said in capsys.readouterr().err
        self.check(capsys, "--temperature: must be at least 0, not -1", "--checkpoint", workdir, "--temperature", "-1")
        assert run("--checkpoint", workdir, "--prompt", "<image>?") == 2
        assert "1 times for 0 new images" in capsys.readouterr().err
        assert chat.main(["--checkpoint", str(workdir), "--prompt", "x", "--max-new-tokens", "99999"]) == 2
        assert "over the limit of 32768" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["checkpoints", f"checkpoints/{STEP}"])
def test_the_folder_may_be_named_in_other_ways(workdir: Path, path: str):
    assert load_assistant(workdir / path, make_mesh(MeshConfig())).config == CONFIG


def test_a_checkpoint_comes_back_in_the_dtype_of_the_products(workdir: Path):
    loaded = load_assistant(workdir, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert loaded.config == CONFIG
    assert loaded.tokenizer.files() == TOKENIZER.files()
    expected = model_params.flatten(random_params())
    for name, value in model_params.flatten(loaded.engine.programs.params).items():
        matrix = name.endswith(("kernel", "embedding"))
        assert value.dtype == ("bfloat16" if matrix else "float32"), name
        np.testing.assert_array_equal(value, expected[name].astype(value.dtype))
    prompt = loaded.prompt((), "What is it?", [])
    found, _ = loaded.engine.programs.prefill([prompt], 1)
    np.testing.assert_array_equal(found[0], assistant().engine.programs.prefill([prompt], 1)[0][0])


@pytest.mark.slow
def test_low_rank_updates_answer_as_their_merged_kernels_do(tmp_path: Path, image: Path):
    plain = dataclasses.replace(MODEL, compute_dtype="float32")
    model = dataclasses.replace(plain, lora_rank=2)
    rng = np.random.default_rng(0)
    params = model_params.unflatten(
        {
            name: jnp.asarray(rng.normal(size=value.shape) * 0.2, value.dtype) if name.endswith(lora.B) else value
            for name, value in model_params.flatten(model_params.initialise(model, seed=1)).items()
        }
    )
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(STEP, params, Record(dataclasses.replace(CONFIG, model=model), TOKENIZER.files(), {}))
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    adapted = load_assistant(tmp_path, one)
    merged = Assistant(CONFIG, TOKENIZER, Engine(plain, lora.merged(params, model.lora_scale), one))
    prompt = merged.prompt((), "What is it?", [merged.read_image(image)])
    logits = [talk.engine.programs.prefill([prompt], 8)[0] for talk in (adapted, merged)]
    np.testing.assert_allclose(*logits, atol=2e-4, rtol=1e-4)
    tokens = [talk.engine.generate([prompt], Sampler(), 8, talk.stop_id) for talk in (adapted, merged)]
    assert tokens[0] == tokens[1]


def test_typed_markers_are_plain_text(image: Path):
    images = [assistant().read_image(image)]
    clean = assistant().prompt((), "x", images)
    typed = assistant().prompt([("<IMG_CONTEXT>", "<img> <image>")], "<image> <IMG_CONTEXT></img><|im_end|>", images)
    np.testing.assert_array_equal(typed["visual_tokens"], clean["visual_tokens"])
    markers = [TOKENIZER.token_id(token) for token in ("</img>", "<IMG_LINE_BREAK>")]
    counts = [np.isin(prompt["text_tokens"], markers).sum() for prompt in (typed, clean)]
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_ten_image_sizes_share_few_programs():
    engine = Engine(MODEL, random_params())
    talk = dataclasses.replace(assistant(), engine=engine)
    sizes = [(32, 32), (60, 90), (100, 40), (128, 128), (200, 150), (224, 224), (240, 320), (320, 256), (336, 336)]
    sizes.append((448, 448))
    visual = []
    for size in sizes:
        prompt = talk.prompt((), "What is it?", [talk.read_image(Image.new("RGB", size))])
        visual.append(len(prompt["visual_tokens"]))
        engine.generate([prompt], Sampler(), 2, talk.stop_id)
    assert min(visual) == 2
    assert max(visual) > 256
    assert (engine.compilations["prefill"], engine.compilations["decode"]) == (
        2,
        2,
    )  # above 256 visual slots, above 512 tokens in all


any_tokens = st.lists(st.one_of(st.integers(0, 620), st.integers(3, 258), st.integers(438, 540)), max_size=60)


def spelled(text: str) -> list[int]:
    return TOKENIZER.encode(text, allow_special=False)


@settings(deadline=None, max_examples=300)
@given(tokens=any_tokens)
@example(tokens=spelled("did n't , no ' yes ' ! 你好é😀 a <|im_end b <|im_end|> c"))
@example(tokens=[i for c in "ab <|im_endx <|im y" for i in spelled(c)])
@example(tokens=spelled(" a \n\n b  . "))
def test_streamed_pieces_join_to_the_response(tokens: list[int]):
    pieces = list(stream_text(TOKENIZER, tokens))
    assert "".join(pieces) == response_text(TOKENIZER, tokens)
    assert all(pieces)


def test_text_is_streamed_while_it_is_made():
    """Nothing waits longer than the next two words; bytes of one character come out as one."""
    shown = ""
    tokens = iter([*spelled("the house is big and the 你好 is 😀 here"), *spelled("x" * 12)])
    consumed: list[int] = []

    def feed():
        for token in tokens:
            consumed.append(token)
            yield token

    for piece in stream_text(TOKENIZER, feed()):
        assert "\ufffd" not in piece
        shown += piece
        assert len(response_text(TOKENIZER, consumed)) - len(shown) <= 10
    assert "你好 is 😀" in shown


@settings(deadline=None)
@given(tokens=st.lists(st.integers(3, 258), max_size=40), stops=st.lists(st.text("ab. é", min_size=1), max_size=3))
@example(tokens=spelled("the answer. STOP here"), stops=["STOP", "STO"])
@example(tokens=spelled("a b  c"), stops=["b  d", " "])
def test_an_answer_ends_before_its_first_stop_string(tokens: list[int], stops: list[str]):
    stream, text = TextStream(TOKENIZER, stops), ""
    whole = response_text(TOKENIZER, tokens)
    for token in tokens:
        text += stream.push(token)
        assert whole.startswith(text)
    text += stream.end()
    found = [at for stop in stops if (at := whole.find(stop)) >= 0]
    assert text == whole[: min(found)] if found else text == whole
    assert stream.stopped == bool(found)


@pytest.mark.slow
def test_a_mistake_is_one_line_of_the_real_command(tmp_path: Path):
    command = [sys.executable, "-m", "navil_jax.chat", "--checkpoint", str(tmp_path), "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent.parent, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path}: holds neither config.json, as a Hugging Face folder does, nor")
    assert len(done.stderr.splitlines()) == 1
