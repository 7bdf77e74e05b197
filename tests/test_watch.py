"""Watching a run: what is known of it is read from its workdir while it goes on, and alarms say what is wrong."""

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bucket_server import BucketServer, serve
from check_html import check_page
from made_runs import run_logs
from PIL import Image

from navil_jax.console import render
from navil_jax.errors import UserError
from navil_jax.train.__main__ import main
from navil_jax.train.goodput import Attempt
from navil_jax.train.overview import Overview, Reader
from navil_jax.train.recorder import slowest_host
from navil_jax.train.watch import curve, view


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketServer]:
    pytest.importorskip("gcsfs")
    with serve() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def shown(run: Overview, now: float | None = None) -> str:
    return render(view(run, now or time.time()), 120)


def test_a_run_is_seen_as_it_is(tmp_path: Path) -> None:
    run = Reader(run_logs(tmp_path, list(np.linspace(4, 2, 300)))).read()
    text = shown(run)
    assert "300 of 1,000, last sign 5 s ago" in text
    assert re.search(r"loss +2\.0000 +█+▇", text)
    assert re.search(r"speed +50,000 tokens/s, 2 s a step, MFU 41\.0%", text)
    assert re.search(r"time left +0:23:20", text)
    assert re.search(r"goodput +57\.9%, 0 restarts; start-up and compilation, first time 42%", text)
    assert re.search(r"samples of web +2 bad, 990 good", text)
    assert re.search(r"checkpoints +100", text)
    assert "8 TPU v5 of 2 processes" in text
    assert ": running" in text
    assert "ALARM" not in text


def alarms(folder: Path, later: float = 0.0) -> list[str]:
    return Reader(folder).read().alarms(time.time() + later)


def test_alarms_say_what_is_wrong(tmp_path: Path) -> None:
    quiet = list(2 + 0.1 * np.random.default_rng(0).standard_normal(400))
    assert alarms(run_logs(tmp_path, quiet)) == []
    assert alarms(tmp_path, 900) == ["no step for 15 minutes"]
    spiked = [*quiet[:370], 6.5, *quiet[371:]]
    assert re.fullmatch(
        r"loss spike: 6\.5 about step 371, usual was [12]\.\d+ \+- 0\.\d+", alarms(run_logs(tmp_path, spiked))[0]
    )
    slow = {"slowest_host": 3, "slowest_host_data_wait": 0.6, "slowest_host_others_data_wait": 0.01}
    assert alarms(run_logs(tmp_path, quiet, **slow)) == [
        "slow host: process 3 waits for data 60% of its time, others 1%"
    ]
    assert alarms(run_logs(tmp_path, quiet, **slow | {"slowest_host_others_data_wait": 0.5})) == []
    lines = (tmp_path / "metrics.jsonl").read_text().replace('"samples/web/bad": 2', '"samples/web/bad": 30')
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert alarms(tmp_path) == ["2.9% of the samples of web are bad; quarantine.jsonl says why"]
    (tmp_path / ".lock").write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1}))
    assert alarms(tmp_path)[0].startswith("its process has ended before the run has its length")


def test_a_run_that_has_its_length_raises_no_alarm(tmp_path: Path) -> None:
    run = Reader(run_logs(tmp_path, [2.0] * 1000)).read()
    assert run.alarms(time.time() + 1e6) == []
    assert ": has its length" in shown(run)


def test_what_comes_later_is_read_and_what_is_dropped_is_not(tmp_path: Path) -> None:
    reader = Reader(run_logs(tmp_path, [3.0, 2.0]))
    assert reader.read().step == 2
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 3, "loss": 1.5}\n{"step": 4, "lo')
    assert [step for step, _ in reader.read().losses()] == [1, 2, 3]
    with path.open("a") as file:
        file.write('ss": 1.25}\n')
    assert reader.read().losses()[-1] == (4, 1.25)
    path.write_text('{"step": 1, "loss": 7.0}\n')
    assert reader.read().losses() == [(1, 7.0)]


def test_damaged_lines_of_the_logs_are_left_out_and_counted(tmp_path: Path) -> None:
    run_logs(tmp_path, [3.0, 2.0])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\0\0\0\n{"loss": 2}\n[1]\n5\n{"step": null}\n{"step": 3, "loss": "x"}\n\xff\n')
        file.write(b'{"step": 3, "loss": NaN}\n{"step": 4, "loss": 1.5}\n')
    for name in ("timings.jsonl", "goodput.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"began": 1}\n')
    reader = Reader(tmp_path)
    for _ in range(2):
        run = reader.read()
        assert [step for step, _ in run.losses()] == [1, 2, 3, 4]
        assert run.notes == [
            "metrics.jsonl: 7 damaged lines are left out",
            "timings.jsonl: 1 damaged lines are left out",
            "goodput.jsonl: 1 damaged lines are left out",
        ]
    assert "note" in shown(run)
    assert main(["report", str(tmp_path)]) == 0
    assert "7 damaged lines are left out" in (tmp_path / "report.html").read_text()


def test_a_run_whose_config_is_of_another_version_is_shown_without_it(tmp_path: Path) -> None:
    file = run_logs(tmp_path, [3.0, 2.0]) / "run.json"
    file.write_text(file.read_text().replace('"eval_every"', '"eval_often"'))
    text = shown(Reader(tmp_path).read())
    assert "2 of an unknown number" in text
    assert "config.eval_often: no such key" in text


def test_a_run_without_a_step_or_its_own_file_is_shown(tmp_path: Path) -> None:
    run_logs(tmp_path, [])
    for name in ("goodput.jsonl", "timings.jsonl", "metrics.jsonl"):
        (tmp_path / name).unlink()
    assert "no step yet" in shown(Reader(tmp_path).read())
    old = run_logs(tmp_path / "old", [2.0])
    (old / "run.json").unlink()
    text = shown(Reader(old).read())
    assert "1 of an unknown number" in text


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("watch", "report"):
        assert main([command, str(tmp_path / "none")]) == 2
        assert "none: no such folder; give the workdir of a training run" in capsys.readouterr().err
        assert main([command, str(tmp_path)]) == 2
        assert "holds no run, neither run.json nor metrics.jsonl" in capsys.readouterr().err
    run_logs(tmp_path / "runs" / "b", [2.0])
    run_logs(tmp_path / "runs" / "a", [2.0])
    with pytest.raises(UserError, match=r"holds no run, .*; give one of the 2 in it, such as .*/runs/a$"):
        Reader(tmp_path)
    with pytest.raises(UserError, match="runs are kept in local folders or at gs://"):
        Reader("s3://bucket/run")


def test_the_command_prints_once_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_logs(tmp_path, [2.0] * 10)
    assert main(["watch", str(tmp_path)]) == 0
    assert "10 of 1,000" in capsys.readouterr().out
    assert main(["watch", str(tmp_path), "--once"]) == 0
    attempt = Attempt(time.time() - 10_000, 0, 10, {"start": 1, "steps": 9})
    (tmp_path / "goodput.jsonl").write_text(json.dumps(attempt.__dict__) + "\n")
    assert main(["watch", str(tmp_path), "--once"]) == 1
    assert "ALARM  no step for 16" in capsys.readouterr().out
    assert main(["watch", str(tmp_path), "--once", "--minutes", "1000"]) == 0


def test_a_run_in_a_bucket_is_watched(tmp_path: Path, bucket: BucketServer) -> None:
    for path in run_logs(tmp_path, [3.0, 2.0]).iterdir():
        if path.is_file():
            bucket.put(f"bucket/run/{path.name}", path.read_bytes())
    bucket.put("bucket/run/checkpoints/2/_CHECKPOINT_METADATA", b"{}")
    run = Reader("gs://bucket/run").read()
    assert run.losses() == [(1, 3.0), (2, 2.0)]
    assert run.checkpoints == [2]
    assert "2 of 1,000" in shown(run)


def test_the_report_needs_nothing_from_outside_and_holds_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_logs(tmp_path, list(np.linspace(4, 2, 1500)))
    Image.new("RGB", (8, 8)).save(tmp_path / "answers.png")
    (tmp_path / "evaluation.md").write_text("| colors | <b>12</b> |")
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/report.html\n"
    text = (tmp_path / "report.html").read_text()
    check_page(text)
    assert text.count("<polyline") == 1  # the loss; speed, MFU and data wait are known of one step alone
    assert len(text) < 60_000  # a long curve is thinned out
    assert re.search("<td[^>]*>8</td>\\s*<td[^>]*>1000</td>", text)  # steps of the recipe and of the run
    assert "| colors | &lt;b&gt;12" in text
    assert "TPU v5" in text
    assert "steps that count" in text
    assert main(["report", str(tmp_path), "--recipe", "configs/demo.py", "--out", str(tmp_path / "other.html")]) == 0
    assert "easy_vqa" in (tmp_path / "other.html").read_text()


def test_a_curve_of_blocks_falls_as_the_loss_does() -> None:
    assert curve([4, 2, 1]) == "█▃▁"
    assert curve([1.0]) == "▁"
    assert curve([4, float("nan"), 1]) == "█▁"
    assert curve([]) == ""
    assert len(curve(list(range(1000)))) == 60


def test_the_slowest_host_is_told_by_its_wait() -> None:
    assert slowest_host([0.5]) == slowest_host([]) == {}
    assert slowest_host([0.02, 0.4, 0.0]) == {
        "slowest_host": 1,
        "slowest_host_data_wait": 0.4,
        "slowest_host_others_data_wait": 0.01,
    }


def test_the_help_of_the_trainer_names_both(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["watch", "--help"], ["report", "--help"]):
        with pytest.raises(SystemExit):
            main(words)
    assert capsys.readouterr().out.count("python -m navil_jax.train watch") >= 2
