"""A checkpoint on a benchmark: answers, scores, cards, submissions, a judge behind an endpoint, and what goes wrong."""

import contextlib
import csv
import http.server
import json
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from golden_cases import FOLDER
from made_runs import TOKENIZER, copy_case

from navil_jax.config import Config
from navil_jax.data.tokenizers import load_tokenizer
from navil_jax.evaluate import answers, benchmark_run
from navil_jax.evaluate.__main__ import main
from navil_jax.evaluate.answers import Ask
from navil_jax.evaluate.benchmarks.catalogue import BENCHMARKS
from navil_jax.evaluate.cards import read_cards, shown
from navil_jax.evaluate.journal import Journal
from navil_jax.evaluate.paper import AVERAGES, FIGURES, average
from navil_jax.evaluate.questions.layouts import SPLITS, read_questions
from navil_jax.evaluate.submissions import write_submission
from navil_jax.generate.assistant import Assistant

DATA = FOLDER / "benchmarks" / "data"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_case("internlm2_small", tmp_path_factory.mktemp("case") / "model")


class Model:
    """Stands in for a model: says what it is told to, and remembers what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Ask] = []
        self.says: Any = lambda ask: "A"
        self.stops_after = 10**9
        assistant = Assistant(Config(), load_tokenizer(TOKENIZER), engine=None)  # type: ignore[arg-type]
        monkeypatch.setattr(benchmark_run, "load_assistant", lambda path, mesh, slots: assistant)
        monkeypatch.setattr(answers, "generate", self.generate)

    def generate(self, assistant: Assistant, asks: Iterable[Ask], most_tokens: int) -> Iterator[tuple[Ask, str]]:
        for ask in asks:
            if len(self.asked) == self.stops_after:
                raise KeyboardInterrupt
            self.asked.append(ask)
            yield ask, self.says(ask)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    return Model(monkeypatch)


def run(checkpoint: Path, out: Path, name: str, *flags: str, data: Path | None = None) -> int:
    arguments = ["--checkpoint", str(checkpoint), "--benchmark", name, "--out", str(out)]
    return main([*arguments, "--data", str(data or DATA / name / "tsv"), *flags])


def card_of(out: Path, name: str) -> dict[str, Any]:
    (path,) = out.glob(f"{name}-*/card-*.json")
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "folder"), [("ai2d", "tsv"), ("gqa", "hf")])
def test_a_tiny_model_is_scored_from_end_to_end(name, folder, checkpoint, tmp_path, capsys):
    assert run(checkpoint, tmp_path, name, "--limit", "3", data=DATA / name / folder) == 0
    card = card_of(tmp_path, name)
    assert (card["questions"], card["limit"], card["score"] is not None) == (3, 3, True)
    folder = next(tmp_path.glob(f"{name}-*"))
    capsys.readouterr()
    assert main(["score", str(folder / "predictions.jsonl"), "--benchmark", name]) == 0
    *scores, total = map(json.loads, capsys.readouterr().out.splitlines())
    assert (len(scores), total["total"]) == (3, card["total"])


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name not in ("mmvet", "mathvista")])
def test_every_benchmark_is_scored_without_a_judge(name, model, checkpoint, tmp_path, capsys):
    assert run(checkpoint, tmp_path, name) == 0
    card = card_of(tmp_path, name)
    split = next(iter(SPLITS[name]))
    assert (card["split"], card["protocol"], card["not_scored"]) == (split, BENCHMARKS[name].primary, None)
    assert card["official"] == SPLITS[name][split].official
    assert 0 <= card["score"] <= {"mme": 2800, "ocrbench": 1000}.get(name, 100)
    assert card["prompt_example"] == model.asked[0].prompt
    assert card["checkpoint"]["sha256"] == card["checkpoint_sha256"]
    assert card["questions"] == len(model.asked)
    printed = capsys.readouterr().out.replace(str(tmp_path), "")
    figure = f"{FIGURES['NaViL-2B'][name]:g}"
    assert (figure in printed) == card["official"]
    assert ("stand-in: the paper's figure is of another split" in printed) == (not card["official"])


def test_right_answers_have_the_full_score(model, checkpoint, tmp_path):
    rows = [json.loads(line) for line in (DATA / "mmbench" / "prompts.jsonl").read_text().splitlines()]
    known = {row["internvl"]: row for row in rows if "internvl" in row}
    assert known
    with (DATA / "mmbench" / "tsv" / "MMBench_DEV_EN.tsv").open(newline="") as file:
        letters = {int(row["index"]): row["answer"] for row in csv.DictReader(file, delimiter="\t")}
    model.says = lambda ask: letters[ask.id]
    assert run(checkpoint, tmp_path, "mmbench") == 0
    assert card_of(tmp_path, "mmbench")["score"] == 100


@pytest.mark.parametrize("name", ["mmvet", "mathvista"])
def test_without_its_judge_a_benchmark_is_not_scored(name, model, checkpoint, tmp_path, capsys):
    assert run(checkpoint, tmp_path, name) == 0
    card = card_of(tmp_path, name)
    assert (card["score"], card["not_scored"]) == (None, "needs a judge: --judge URL --judge-model NAME")
    assert "not scored" in capsys.readouterr().out


def test_what_is_answered_is_not_asked_again(model, checkpoint, tmp_path, capsys):
    model.stops_after = 5
    assert run(checkpoint, tmp_path, "gqa") == 130
    assert capsys.readouterr().err.endswith("stopped; the same command goes on from here\n")
    path = tmp_path / "gqa-testdev-internvl" / "answers.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id": "half a li')
    model.stops_after = 10**9
    assert run(checkpoint, tmp_path, "gqa") == 0
    assert len({ask.id for ask in model.asked}) == len(model.asked) == 12
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [ask.id for ask in model.asked]
    assert run(checkpoint, tmp_path, "gqa") == 0
    assert len(model.asked) == 12


def test_more_questions_go_on_from_fewer(model, checkpoint, tmp_path):
    assert run(checkpoint, tmp_path, "ccbench", "--limit", "2") == 0
    assert [len(model.asked), *(card_of(tmp_path, "ccbench")[key] for key in ("questions", "scored"))] == [8, 8, 2]
    assert run(checkpoint, tmp_path, "ccbench") == 0
    assert (len(model.asked), card_of(tmp_path, "ccbench")["limit"]) == (48, None)


def test_other_settings_need_another_folder(model, checkpoint, tmp_path, capsys):
    assert run(checkpoint, tmp_path, "gqa") == 0
    assert run(checkpoint, tmp_path, "gqa", "--config.images.max_patches=1024") == 2
    error = capsys.readouterr().err
    assert "settings.json: was begun with images" in error
    assert "give another --out" in error
    assert run(checkpoint, tmp_path, "gqa", "--protocol", "lmms_eval") == 0  # other prompts, other folder
    assert len(model.asked) == 24
    (tmp_path / "gqa-testdev-internvl" / "answers.jsonl").write_text("")  # nothing is answered, so nothing binds
    assert run(checkpoint, tmp_path, "gqa", "--config.images.max_patches=1024") == 0


@pytest.mark.parametrize("flag", ["--config.steps=3", "--config.model.decoder.depth=3", "--config.data.rows=2"])
def test_flags_without_an_effect_are_refused(flag, model, checkpoint, tmp_path, capsys):
    assert run(checkpoint, tmp_path, "gqa", flag) == 2
    assert "--config: beside --benchmark only config.images" in capsys.readouterr().err
    assert run(checkpoint, tmp_path, "gqa", "--config.data.system_message=Be brief.") == 0


def test_damaged_answers_are_named_with_their_line(model, checkpoint, tmp_path, capsys):
    assert run(checkpoint, tmp_path, "gqa") == 0
    path = tmp_path / "gqa-testdev-internvl" / "answers.jsonl"
    path.write_text(path.read_text().replace('{"id"', '{"ID"', 1))
    assert run(checkpoint, tmp_path, "gqa") == 2
    assert "answers.jsonl: line 1: is damaged" in capsys.readouterr().err


def test_two_commands_cannot_write_one_file(model, checkpoint, tmp_path, capsys):
    with Journal(tmp_path / "gqa-testdev-internvl" / "answers.jsonl"):
        assert run(checkpoint, tmp_path, "gqa") == 2
    assert "answers.jsonl: another command writes there" in capsys.readouterr().err
    assert run(checkpoint, tmp_path, "gqa") == 0


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("docvqa", [{"questionId": number, "answer": "A"} for number in range(50153, 50157)]),
        ("infovqa", [{"questionId": number, "answer": "A"} for number in range(71202, 71206)]),
        ("textvqa", [{"question_id": number, "answer": "A"} for number in range(39602, 39605)]),
    ],
)
def test_hidden_splits_have_a_file_for_their_server(name, wanted, model, checkpoint, tmp_path, capsys):
    assert run(checkpoint, tmp_path, name, "--split", "test", data=DATA / name / "hf") == 0
    assert json.loads(next(tmp_path.glob("*/submission.json")).read_text()) == wanted
    card = card_of(tmp_path, name)
    assert card["score"] is None
    assert card["not_scored"].startswith("answers of this split are hidden; upload to ")
    assert "submission.json" in capsys.readouterr().out


def test_mmbench_is_submitted_as_a_table(model, checkpoint, tmp_path):
    model.says = lambda ask: "B. because" if ask.id == 2000 else ""
    assert run(checkpoint, tmp_path, "mmbench", "--split", "test") == 0
    with next(tmp_path.glob("*/submission.csv")).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:7] == ["index", "question", "A", "B", "C", "D", "prediction"]
    assert (rows[0]["index"], rows[0]["A"], rows[0]["prediction"], len(rows)) == ("2000", "circle", "B", 14)


def test_mm_vet_is_submitted_by_names(model, checkpoint, tmp_path):
    assert run(checkpoint, tmp_path, "mmvet") == 0
    found = json.loads(next(tmp_path.glob("*/submission.json")).read_text())
    assert found == {f"v1_{number}": "A" for number in range(12)}


def test_mmmu_is_submitted_as_letters_and_texts(tmp_path):
    records = read_questions("mmmu", DATA / "mmmu" / "tsv").records[:4]
    said = {record.id: answer for record, answer in zip(records, ["B. Bel", "both", "", "9 apples"], strict=True)}
    path = write_submission("mmmu", "internvl", records, said, tmp_path)
    assert path is not None
    assert json.loads(path.read_text()) == {
        "validation_Accounting_1": "B",
        "validation_Art_1": "both",
        "validation_Biology_1": "",
        "validation_Math_1": "9 apples",
    }


# A judge behind an endpoint.


class Endpoint(http.server.BaseHTTPRequestHandler):
    requests: list[dict[str, Any]]
    replies: list[str | int]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        reply = self.replies[min(len(self.requests), len(self.replies)) - 1]
        self.send_response(reply if isinstance(reply, int) else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}]}).encode())

    def log_message(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def endpoint(*replies: str | int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Address of a judge that says these, the last one again and again, and what it was asked."""
    handler = type("Handler", (Endpoint,), {"requests": [], "replies": list(replies)})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", handler.requests  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


def test_a_judge_grades_and_is_not_asked_again(model, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with endpoint("half", "0.5", "0.25") as (url, requests):
        flags = ["--judge", url, "--judge-model", "some/judge"]
        assert run(checkpoint, tmp_path, "mmvet", *flags) == 0
        assert run(checkpoint, tmp_path, "mmvet", *flags) == 0
    assert len(requests) == 13  # twelve questions, of which the first was asked twice
    assert requests[0]["path"] == "/v1/chat/completions"
    assert [request["temperature"] for request in requests[:3]] == [0, 0.5, 0]
    assert {(request["key"], request["model"]) for request in requests} == {("Bearer secret", "some/judge")}
    assert "What is the sum on the board?" in requests[0]["messages"][0]["content"]
    card = card_of(tmp_path, "mmvet")
    assert card["score"] == pytest.approx((0.5 + 11 * 0.25) / 12 * 100)
    assert card["judge"] == {"url": f"{url}/chat/completions", "model": "some/judge", "prompts": "navil_jax"}
    assert "secret" not in "".join(path.read_text() for path in tmp_path.rglob("*.json*"))
    assert "judge some/judge with prompts of navil_jax" in capsys.readouterr().out


def test_a_judge_is_asked_only_of_answers_that_no_rule_reads(model, checkpoint, tmp_path):
    model.says = lambda ask: "9" if ask.id == 1 else "no idea"
    with endpoint("5") as (url, requests):
        assert run(checkpoint, tmp_path, "mathvista", "--judge", url, "--judge-model", "j", "--limit", "3") == 0
    assert len(requests) == 2
    assert card_of(tmp_path, "mathvista")["total"]["Overall"] == {"tot": 3, "prefetch": 1, "hit": 1, "acc": 1 / 3 * 100}


def test_a_judged_choice_is_a_protocol_of_its_own(model, checkpoint, tmp_path):
    model.says = lambda ask: "hm"
    with endpoint("A", "D", "C", "B", "Z") as (url, requests):
        assert run(checkpoint, tmp_path, "mmbench", "--judge", url, "--judge-model", "j", "--limit", "2") == 0
    card = card_of(tmp_path, "mmbench")
    assert (card["protocol"], card["score"]) == ("internvl_then_vlmevalkit_2505_judge", 50)
    assert "Options:\nA. circle\nB. square" in requests[0]["messages"][0]["content"]
    assert len(requests) == 5


@pytest.mark.parametrize(
    ("replies", "said"), [((401,), "HTTP 401"), (((),), "no chat completion")], ids=["refused", "something else"]
)
def test_a_judge_that_refuses_ends_the_command(replies, said, model, checkpoint, tmp_path, capsys, monkeypatch):
    if replies == ((),):
        monkeypatch.setattr(json, "load", lambda file: {})
        replies = ("1",)
    with endpoint(*replies) as (url, _):
        assert run(checkpoint, tmp_path, "mmvet", "--judge", url, "--judge-model", "j") == 2
    error = capsys.readouterr().err
    assert said in error.replace("its reply is", "")
    assert "run the same command again" in error
    assert not list(tmp_path.glob("*/card-*.json"))


def test_a_busy_judge_is_asked_again(model, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with endpoint(503, "1.0") as (url, requests):
        assert run(checkpoint, tmp_path, "mmvet", "--judge", url, "--judge-model", "j", "--limit", "1") == 0
    assert (len(requests), card_of(tmp_path, "mmvet")["score"]) == (2, 100)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--benchmark", "vqa", "--data", "x"], "--benchmark vqa: no such benchmark"),
        (["--benchmark", "gqa"], "--data: which questions?"),
        (["--benchmark", "gqa", "--data", ""], "--data: is empty"),
        (["--benchmark", "gqa", "--data", "nowhere"], "--data nowhere: no such file or folder"),
        (["--benchmark", "gqa", "--data", "x", "--protocol", "llava"], "--protocol llava: gqa has internvl"),
        (["--benchmark", "gqa", "--data", "x", "--judge", "http://x"], "--judge and --judge-model belong together"),
        (["--benchmark", "gqa", "--data", "x", "--judge", "x", "--judge-model", "y"], "--judge x: is no address"),
        (["--benchmark", "gqa", "--data", "x", "--judge", "http://x", "--judge-model", "y"], "gqa asks no judge"),
        (["--benchmark", "mmmu", "--data", "x", "--protocol", "vlmevalkit_head_judge"], "needs a judge; give"),
        (["--benchmark", "gqa", "--data", "x", "--samples", "3"], "--samples: has no effect beside --benchmark"),
        (["--data", "x"], "--data: has no effect without --benchmark"),
        (["--judge-model", "x"], "--judge-model: has no effect without --benchmark"),
        (["--benchmark", "gqa", "--data", "x", "--limit", "-1"], "--limit: must be at least 0, not -1"),
        (["--benchmark", "gqa", "--data", str(DATA / "gqa" / "tsv"), "--split", "x"], "--split x: gqa has testdev"),
    ],
)
def test_mistakes_are_one_line(flags, said, checkpoint, capsys):
    assert main(["--checkpoint", str(checkpoint), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_answers_that_are_missing_are_said_before_the_model_is_asked(model, checkpoint, tmp_path, capsys):
    text = (DATA / "docvqa" / "tsv" / "DocVQA_TEST.tsv").read_text()
    (tmp_path / "DocVQA_VAL.tsv").write_text(text)
    assert run(checkpoint, tmp_path / "out", "docvqa", data=tmp_path) == 2
    assert "DocVQA_VAL.tsv: question 0: answers: is missing; answers are needed" in capsys.readouterr().err
    assert not model.asked


# The table, and averages as the paper has them.


def card(name: str, score: float | None, **changes: Any) -> dict[str, Any]:
    split = next(split for split, layout in SPLITS[name].items() if layout.official)
    said = {"benchmark": name, "split": split, "protocol": BENCHMARKS[name].primary, "score": score, "limit": None}
    return said | {"not_scored": None, "official": True, "judge": None, "checkpoint": {"sha256": "x"}} | changes


def test_averages_of_the_paper_are_those_it_prints():
    means = {(model, name): average(FIGURES[model], of) for model in FIGURES for name, of in AVERAGES.items()}
    printed = {key: round(value, 1) for key, value in means.items() if value is not None}
    assert printed == {
        ("NaViL-2B", "first seven"): 67.1,
        ("NaViL-2B", "last seven"): 75.1,
        ("NaViL-2B", "eleven of both models"): 68.8,
        ("NaViL-9B", "eleven of both models"): 77.0,
    }


def test_averages_are_of_whole_official_scores_of_one_checkpoint():
    cards = [card(name, score) for name, score in FIGURES["NaViL-2B"].items()]
    assert "average of the first seven: 67.1 (paper: NaViL-2B 67.1)" in shown(cards, "x")
    assert "average" not in shown(cards, "y")
    for changes in ({"official": False}, {"limit": 5}, {"score": None}, {"protocol": "lmms_eval_static"}):
        changed = [one | changes if one["benchmark"] == "mmbench" else one for one in cards]
        said = shown(changed, "x")
        assert "first seven" not in said
        assert "average of the last seven: 75.1" in said


def test_a_damaged_card_is_named(tmp_path):
    (tmp_path / "gqa").mkdir()
    (tmp_path / "gqa" / "card-internvl.json").write_text("{}")
    with pytest.raises(Exception, match=r"card-internvl\.json: is no card"):
        read_cards(tmp_path)
