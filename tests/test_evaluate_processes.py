"""Evaluation on several processes and devices: the same lines and scores as on one, also when it goes on with another
number of them; what one process cannot read ends all with its line."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from golden_cases import FOLDER
from made_captions import made_captions
from made_runs import copy_case
from quick_xla import QUICK

from navil_jax.train.metrics import read_log

ROOT, TESTS = Path(__file__).parents[1], Path(__file__).parent
RECIPE = TESTS / "toy_recipe.py"
DATA = FOLDER / "benchmarks" / "data"

pytestmark = pytest.mark.slow


def started(arguments: list[str], processes: int = 1, devices: int = 1) -> tuple[int, str]:
    """Status and output of a Python command, on processes of this machine with devices of their own."""
    command = [sys.executable, *arguments]
    count = f"--xla_force_host_platform_device_count={devices}"
    if processes > 1:
        launcher = [sys.executable, str(ROOT / "launch" / "local.py"), f"--processes={processes}"]
        command, count = [*launcher, f"--devices={devices}", "--", *command], ""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": f"{QUICK} {count}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_case("internlm2_small", tmp_path_factory.mktemp("case") / "model")


def benchmark(checkpoint: Path, out: Path, processes: int, devices: int = 1, data: Path = DATA / "gqa" / "tsv"):
    given = ["--checkpoint", str(checkpoint), "--benchmark", "gqa", "--data", str(data), "--out", str(out)]
    return started(["-m", "navil_jax.evaluate", *given], processes, devices)


def files_of(out: Path) -> dict[str, str]:
    """What is the same however many processes there were."""
    found = {path.name: path.read_text() for path in (out / "gqa-testdev-internvl").iterdir()}
    card = json.loads(found["card-internvl.json"])
    return found | {"card-internvl.json": json.dumps({**card, "processes": None})}


@pytest.fixture(scope="module")
def alone(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("alone")
    status, output = benchmark(checkpoint, out, 1)
    assert status == 0, output
    assert len(files_of(out)["answers.jsonl"].splitlines()) == 12
    return files_of(out)


@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (1, 4)])
def test_processes_and_devices_give_the_lines_and_the_card_of_one(processes, devices, checkpoint, alone, tmp_path):
    status, output = benchmark(checkpoint, tmp_path, processes, devices)
    assert status == 0, output
    assert files_of(tmp_path) == alone
    card = json.loads((tmp_path / "gqa-testdev-internvl" / "card-internvl.json").read_text())
    assert card["processes"] == processes
    assert output.count("answers, scores and card: ") == 1


def test_an_evaluation_goes_on_with_another_number_of_processes(checkpoint, alone, tmp_path):
    folder = tmp_path / "gqa-testdev-internvl"
    for processes, kept in ((2, 5), (1, 8)):
        lines = alone["answers.jsonl"].splitlines(keepends=True)[:kept]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        marked = {**json.loads(lines[0]), "prediction": "kept"}
        (folder / "answers.jsonl").write_text("".join([json.dumps(marked) + "\n", *lines[1:]]))
        (folder / "settings.json").write_text(alone["settings.json"])
        status, output = benchmark(checkpoint, tmp_path, processes)
        assert status == 0, output
        found = files_of(tmp_path)["answers.jsonl"].splitlines(keepends=True)
        assert json.loads(found[0])["prediction"] == "kept"
        assert found[1:] == alone["answers.jsonl"].splitlines(keepends=True)[1:]


def test_an_image_that_one_process_cannot_read_ends_all_and_keeps_the_answers_before_it(checkpoint, alone, tmp_path):
    rows = (DATA / "gqa" / "tsv" / "GQA_TestDev_Balanced.tsv").read_text().splitlines(keepends=True)
    cells = [row.split("\t") for row in rows]
    at = cells[0].index("image")
    cells[6][at] = "Z" * 80  # of the sixth question, which the second process has
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "GQA_TestDev_Balanced.tsv").write_text("".join("\t".join(row) for row in cells))
    status, output = benchmark(checkpoint, tmp_path / "out", 2, data=tmp_path / "data")
    assert status == 2
    errors = {line[3:] for line in output.splitlines() if ": error: " in line}
    assert len(errors) == 1, output
    assert "image of question " in errors.pop()
    answers = (tmp_path / "out" / "gqa-testdev-internvl" / "answers.jsonl").read_text()
    assert answers.splitlines() == alone["answers.jsonl"].splitlines()[:5]


def test_when_one_process_is_killed_the_other_says_so_and_ends(checkpoint, tmp_path):
    program = (
        "import os, signal, sys; from navil_jax.evaluate import answers; from navil_jax.evaluate.__main__ import main;"
    )
    program += "number = os.environ['JAX_PROCESS_ID']; whole = answers.generate;"
    program += "answers.generate = lambda *of: os.kill(os.getpid(), signal.SIGKILL) if number == '1' else whole(*of);"
    program += "sys.exit(main())"
    given = ["--checkpoint", str(checkpoint), "--benchmark", "gqa", "--out", str(tmp_path), "--data"]
    status, output = started(["-c", program, *given, str(DATA / "gqa" / "tsv")], 2)
    assert status == 128 + signal.SIGKILL
    assert (
        "0: error: process 1 of 2 has died (killed, out of memory or a crash); process 0 ends too, run the same"
        in output
    )
    assert "Traceback" not in output


def test_processes_with_other_questions_are_refused(checkpoint, tmp_path):
    """Each process has its own folder of data, as hosts without a shared disk have."""
    for number in (0, 1):
        rows = (DATA / "gqa" / "tsv" / "GQA_TestDev_Balanced.tsv").read_text().splitlines(keepends=True)
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "GQA_TestDev_Balanced.tsv").write_text("".join(rows[: len(rows) - number]))
    program = "import os, sys; from navil_jax.evaluate.__main__ import main; number = os.environ['JAX_PROCESS_ID'];"
    program += f"sys.exit(main([*sys.argv[1:], '--data', '{tmp_path}/' + number]))"
    given = ["--checkpoint", str(checkpoint), "--benchmark", "gqa", "--out", str(tmp_path / "out")]
    status, output = started(["-c", program, *given], 2)
    assert status == 2
    assert output.count("error: process 1: has another data than process 0; start all of them alike") == 2


@pytest.mark.parametrize(
    ("fault", "end"), [("", "True 150 all"), ("101", "True 101 item 101 is bad"), ("stop", "True 128 stopped")]
)
def test_shares_are_put_together_in_order_up_to_a_fault_or_a_signal(fault, end):
    """A round is 64 items of both, so SIGTERM at the 72nd stops them after the second."""
    status, output = started([str(TESTS / "processes_exchange.py"), fault], 2)
    assert status == 0, output
    done = [line[3:] for line in output.splitlines() if line[3:].startswith("DONE")]
    assert done == [f"DONE [20000000, 20000000] from 0 {end}"] * 2


def test_evaluators_give_on_two_processes_what_they_give_on_one(tmp_path):
    """While a run trains, where the processes hold the parameters together, and of its checkpoint."""
    flags = ["--config.steps=6", "--config.eval_every=3", "--config.eval_samples=5"]
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        f"import dataclasses, runpy\nfrom navil_jax.config import EvaluatorConfig as One\n"
        f"def get_config():\n    config = runpy.run_path({str(RECIPE)!r})['get_config']()\n"
        f"    asked = One('benchmark', benchmark='gqa', data={str(DATA / 'gqa' / 'tsv')!r})\n"
        f"    captions = One('captions', data={str(made_captions(tmp_path / 'data'))!r})\n"
        "    entries = One('held_out'), One('generated'), asked, captions\n"
        "    return dataclasses.replace(config, evaluators=entries)\n"
    )
    given = ["--config", str(recipe), f"--config.workdir={tmp_path / 'two'}", *flags]
    status, output = started(["-m", "navil_jax.train", *given], 2, 2)
    assert status == 0, output
    assert "compiled again" not in output
    assert "1 of 5 images cannot be read and count as an empty answer: image of question 2: " in output
    logged = [line for line in read_log(tmp_path / "two" / "metrics.jsonl") if "eval/colors/generated_accuracy" in line]
    assert [line["step"] for line in logged] == [3, 6]
    values = {}
    for processes in (1, 2):
        out = tmp_path / f"scores{processes}"
        status, output = started(
            ["-m", "navil_jax.evaluate", *given[:2], "--checkpoint", str(tmp_path / "two"), "--out", str(out)],
            processes,
        )
        assert status == 0, output
        assert output.count("metrics, tables and pictures: ") == 1
        values[processes] = {name: value for line in read_log(out / "metrics.jsonl") for name, value in line.items()}
    assert {"eval/gqa-testdev/internvl", "eval/captions/cider"} < set(values[1])
    assert values[1] == pytest.approx(values[2], rel=1e-5)
    assert values[1]["eval/colors/generated_accuracy"] == logged[-1]["eval/colors/generated_accuracy"]
