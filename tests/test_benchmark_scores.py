"""Scorers of the benchmarks: every line and total of the reference codes, the corners they have, and the command."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from golden_cases import FOLDER
from hypothesis import given
from hypothesis import strategies as st

from navil_jax.errors import UserError
from navil_jax.evaluate.__main__ import main
from navil_jax.evaluate.benchmarks import choices
from navil_jax.evaluate.benchmarks.anls import similarity
from navil_jax.evaluate.benchmarks.catalogue import BENCHMARKS
from navil_jax.evaluate.benchmarks.lines import first_fault, read_lines, report, scores_of
from navil_jax.evaluate.benchmarks.mmmu import open_is_right
from navil_jax.evaluate.benchmarks.mmvet import lmms_grade, official_grade, vlmevalkit_grade
from navil_jax.evaluate.benchmarks.scoring import Replies, edit_distance
from navil_jax.evaluate.benchmarks.textvqa import internvl_normal, vlmevalkit_normal

ORACLE = FOLDER / "benchmarks" / "oracle"
# Five runs of MM-Vet's judge were made with replies that the lines do not hold.
LEFT_OUT = {"benchmark", "lines", "primary", "scale", "note", "totals"}


def oracle(name: str) -> list[dict[str, Any]]:
    return read_lines(ORACLE / f"{name}.jsonl", BENCHMARKS[name])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_line_has_the_score_of_every_reference_code(name):
    benchmark, lines = BENCHMARKS[name], oracle(name)
    wanted = {(line["id"], code): score for line in lines for code, score in line["scores"].items()}
    found = {(line["id"], code): benchmark.protocols[code].score(line) for line in lines for code in line["scores"]}
    assert {key: (found[key], score) for key, score in wanted.items() if found[key] != score} == {}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_scores_without_a_protocol_are_those_that_reports_use(name):
    lines = oracle(name)
    assert scores_of(BENCHMARKS[name], lines, None) == [line["expected"] for line in lines]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_totals_are_those_of_every_reference_code(name):
    wanted = json.loads((ORACLE / f"{name}.total.json").read_text())
    totals = {code.replace("official_1_run", "official"): total for code, total in wanted["totals"].items()}
    for code in ("official_5_runs",):
        totals.pop(code, None)
    extras = {key: value for key, value in wanted.items() if key not in LEFT_OUT}
    for key in ("mean_of_expected", "vanilla_all_passes_2505"):
        extras |= {key: totals.pop(key)} if key in totals else {}
    found = report(BENCHMARKS[name], oracle(name), None)
    assert found["totals"] == totals
    assert {key: found[key] for key in extras} == extras
    assert found["total"] == totals[wanted["primary"]]
    assert (found["lines"], found["primary"], found["scale"]) == (wanted["lines"], wanted["primary"], wanted["scale"])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_command_prints_every_score_and_the_total(name, capsys):
    assert main(["score", str(ORACLE / f"{name}.jsonl"), "--benchmark", name]) == 0
    *scores, total = map(json.loads, capsys.readouterr().out.splitlines())
    assert scores == [{"id": line["id"], "score": line["expected"]} for line in oracle(name)]
    assert total["total"] == json.loads((ORACLE / f"{name}.total.json").read_text())["totals"][total["primary"]]


@pytest.mark.parametrize(
    ("name", "said", "code"),
    [
        ("chartqa", "vlmevalkit", "vlmevalkit_2505"),
        ("mmbench", "internvl", "internvl_then_vlmevalkit_2505"),
        ("ccbench", "lmms_eval", "lmms_eval_static"),
        ("mathvista", "internvl", "internvl_mathvista"),
        ("scienceqa", "llava", "llava"),
    ],
)
def test_the_command_scores_by_a_named_protocol(name, said, code, capsys):
    assert main(["score", str(ORACLE / f"{name}.jsonl"), "--benchmark", name, "--protocol", said]) == 0
    *scores, total = map(json.loads, capsys.readouterr().out.splitlines())
    assert [line["score"] for line in scores] == [line["scores"][code] for line in oracle(name)]
    assert (total["protocol"], list(total["totals"])) == (code, [code])


def test_the_command_needs_no_jax():
    program = "import sys; sys.modules['jax'] = None; from navil_jax.evaluate.__main__ import main; sys.exit(main())"
    arguments = ["score", str(ORACLE / "gqa.jsonl"), "--benchmark", "gqa"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


GOOD = {"id": 1, "prediction": "yes", "answer": "yes"}
ROW = {"index": 1, "A": "x", "B": "y", "answer": "A", "prediction": "A"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gqa", "", "holds no lines"),
        ("gqa", "\n \n", "holds no lines"),
        ("gqa", "{", "line 1: is no JSON: Expecting property name"),
        ("gqa", json.dumps(GOOD) + "\n\n[1]", "line 3: must be a JSON object, not [1]"),
        ("gqa", json.dumps({**GOOD, "prediction": None}), "line 1: prediction: must be a text, not null"),
        ("gqa", json.dumps({"id": 1, "prediction": "yes"}), "line 1: answer: is missing"),
        ("gqa", json.dumps({**GOOD, "id": True}), "line 1: id: must be a text or number, not true"),
        ("gqa", json.dumps({**GOOD, "types": "x"}), 'line 1: types: must be an object, or null, not "x"'),
        ("docvqa", json.dumps({**GOOD, "answers": []}), "line 1: answers: must be a list of texts, not []"),
        ("docvqa", json.dumps({**GOOD, "answers": [1]}), "line 1: answers: must be a list of texts, not [1]"),
        ("mmbench", json.dumps({"id": 1, "passes": [ROW, {**ROW, "prediction": 3}]}), "passes[1].prediction: must be"),
        ("mmbench", json.dumps({"id": 1, "passes": [{**ROW, "C": 3}]}), "passes[0].C: must be a text, or null, not 3"),
        ("mmvet", json.dumps({**GOOD, "capability": "rec"}), "line 1: judge_replies: is missing"),
        ("gqa", "[" * 100_000, "line 1: is no JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_file_line_and_key(name, content, said, tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    file.write_text(content)
    assert main(["score", str(file), "--benchmark", name]) == 2
    error = capsys.readouterr().err
    assert str(file) in error
    assert said in error
    assert len(error.splitlines()) == 1


def test_text_that_is_no_utf8_is_one_line(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b'{"id": "\xff"}')
    assert main(["score", str(tmp_path / "a.jsonl"), "--benchmark", "gqa"]) == 2
    assert "line 1: is no JSON: 'utf-8' codec" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.jsonl", "--benchmark", "gqa"], "nowhere.jsonl: no such file"),
        (["x.jsonl", "--benchmark", "vqa"], "--benchmark vqa: no such benchmark; there are mmvet, mmmu"),
        (["x.jsonl", "--benchmark", "ocrbench", "--protocol", "internvl"], "--protocol internvl: ocrbench has vlm"),
        (["x.jsonl"], "the following arguments are required: --benchmark"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(arguments, said, capsys):
    assert main(["score", *arguments]) == 2
    assert said in capsys.readouterr().err


# Corners that the lines of the oracle need not show.


@pytest.mark.parametrize(
    ("answer", "options", "may_2025", "august_2026"),
    [
        ("A thing like that one here", ["x", "y"], "A", None),
        ("The answer is B. Not A", ["x", "y"], None, "B"),
        ("answer is aluminium", ["x", "y"], None, "A"),
        ("the answer is d", ["x", "y"], None, None),
        ("B", ["x"], None, None),
        ("Z", ["x", "y"], "Z", "Z"),
        ("Failed to obtain answer via API", ["cat", "dog"], None, None),
        ("I can't process this file. B", ["x", "y"], "Z", "Z"),
        ("CAT", ["a cat", "cat"], "B", "B"),
        ("it is a cat that sits over there", ["cat", "dog"], "A", None),
    ],
)
def test_vlmevalkit_reads_a_letter_or_a_lone_option(answer, options, may_2025, august_2026):
    by_letter = dict(zip("ABCD", options, strict=False))
    assert choices.vlmevalkit_2505(answer, by_letter) == may_2025
    assert choices.vlmevalkit_head(answer, by_letter) == august_2026


@pytest.mark.parametrize(
    ("text", "internvl", "vlmevalkit"),
    [
        ("Couldnt've", "couldn't've", "couldn't've"),
        ("somebody'd", "somebodyd", "somebodyd"),
        ("y'alld've", "y'all'd've", "y'all'd've"),
        ("Norbert's", "norbert 's", "norbert's"),
        ("10.", "10", "10."),
        ("a.b", "ab", "ab"),
        ("x-y 1,000", "x y 1000", "xy 1000"),
        ("none of the ten", "0 of 10", "0 of 10"),
        ("." * 40, "." * 8, "." * 8),
    ],
)
def test_vqa_answers_are_normalised(text, internvl, vlmevalkit):
    assert (internvl_normal(text), vlmevalkit_normal(text)) == (internvl, vlmevalkit)


def test_an_open_answer_of_two_marks_is_kept_where_one_mark_is_not():
    assert not open_is_right("1,000, and the answer is ?;", ["1,000"])
    assert open_is_right("1,000, and the answer is ?", ["1,000"])


def test_what_the_judge_of_mmvet_says_is_read_in_three_ways():
    assert [grade(Replies(["0.5 or so"])) for grade in (vlmevalkit_grade, official_grade, lmms_grade)] == [0, 0.5, 0.5]
    assert math.isnan(vlmevalkit_grade(Replies(["nan"])))
    assert lmms_grade(Replies(["2"])) == 0
    assert vlmevalkit_grade(Replies([])) == 0


def test_a_judge_that_says_nothing_of_use_leaves_a_choice_to_chance():
    row = {"index": 7, "A": "x", "B": "y", "answer": "A", "prediction": "hm", "judge_replies": ["hm"]}
    right, wrong = ({**row, "index": index, "prediction": letter} for index, letter in ((1000007, "A"), (2000007, "B")))
    benchmark = BENCHMARKS["mmbench"]
    assert benchmark.expect({"id": 7, "passes": [row, right]}) == "random"
    assert benchmark.expect({"id": 7, "passes": [row, wrong]}) == 0
    assert report(benchmark, [{"id": 7, "passes": [row]}], "vlmevalkit_2505_judge")["total"] == {"Overall": 0.0}


@given(st.text(max_size=12), st.text(max_size=12))
def test_edit_distances_are_symmetric_and_bounded(left, right):
    assert edit_distance(left, right) == edit_distance(right, left) <= max(len(left), len(right))
    assert (edit_distance(left, right) == 0) == (left == right)


@given(st.text(max_size=12), st.lists(st.text(max_size=12), min_size=1, max_size=3))
def test_anls_is_zero_or_from_one_half_to_one(prediction, answers):
    score = similarity(prediction, answers)
    assert score == 0 or 0.5 <= score <= 1
    assert similarity(answers[0], answers) == 1


@given(st.text(max_size=40), st.sampled_from(sorted(BENCHMARKS)))
def test_any_text_can_be_scored(prediction, name):
    benchmark = BENCHMARKS[name]
    for line in oracle(name)[:3]:
        rows = [{**row, "prediction": prediction} for row in line.get("passes", ())]
        changed = {**line, "prediction": prediction, **({"passes": rows} if rows else {})}
        found = [protocol.score(changed) for protocol in benchmark.protocols.values()]
        assert all(isinstance(score, str) or math.isnan(score) or 0 <= score <= 1 for score in found)


VALUES = [None, True, 0, -1, math.nan, 10**400, "", "A", "[1, 2", "[" * 5000, [], ["x"], [1], {}, {"A": "x"}, {"A": 1}]


@given(st.data(), st.sampled_from(sorted(BENCHMARKS)))
def test_a_line_of_any_kind_is_scored_or_refused(data, name):
    line = json.loads(json.dumps(data.draw(st.sampled_from(oracle(name)))))
    changed = line["passes"][0] if "passes" in line and data.draw(st.booleans()) else line
    changed[data.draw(st.sampled_from(sorted(changed)))] = data.draw(st.sampled_from(VALUES))
    benchmark = BENCHMARKS[name]
    fault = first_fault(line, benchmark)
    found = [] if fault else [len(scores_of(benchmark, [line], protocol)) for protocol in (None, *benchmark.protocols)]
    assert fault is None or (len(fault.splitlines()) == 1 and len(fault) < 200)
    assert set(found) <= {1}


def test_the_folder_holds_all_benchmarks_of_the_paper():
    assert {path.name.split(".")[0] for path in Path(ORACLE).glob("*.jsonl")} == set(BENCHMARKS)
    assert len(BENCHMARKS) == 14


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"id": 1, "prediction": "a", "answer": "a"}\n' * 2, "line 2: id: 1 stands in line 1 already"),
        ('{"id": 1, "prediction": "a", "prediction": "b", "answer": "a"}\n', "line 1: is no JSON: .*prediction"),
        ('{"id": NaN, "prediction": "a", "answer": "a"}\n', "line 1: id: must be a text or number, not NaN"),
        ('{"id": 1e999, "prediction": "a", "answer": "a"}\n', "line 1: id: must be a text or number, not Infinity"),
        ('{"id": 1, "prediction": NaN, "answer": "a"}\n', "line 1: prediction: must be a text, not NaN"),
    ],
)
def test_lines_that_say_two_things_or_none_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError, match=reason):
        read_lines(tmp_path / "x.jsonl", BENCHMARKS["gqa"])


def test_what_a_scorer_does_not_read_may_be_nan(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = {"id": 1, "prediction": "a", "capability": "rec", "judge_replies": ["nan"], "expected": math.nan}
    (tmp_path / "x.jsonl").write_text(json.dumps(line))
    assert main(["score", str(tmp_path / "x.jsonl"), "--benchmark", "mmvet"]) == 0
    score, total = map(json.loads, capsys.readouterr().out.splitlines())
    assert math.isnan(score["score"])
    assert math.isnan(total["total"]["Overall"])


@pytest.mark.parametrize("protocol", [None, "internvl"])
def test_lines_that_totals_leave_out_are_counted(protocol: str | None) -> None:
    lines = [{"id": number, "prediction": "a", "answers": ["a"] * count} for number, count in enumerate((10, 11, 1))]
    assert report(BENCHMARKS["textvqa"], lines, protocol)["left_out_of_totals"] == 2
    assert "left_out_of_totals" not in report(BENCHMARKS["textvqa"], lines[:1], protocol)
