"""A grid of real runs: interrupted, continued, and read back."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from quick_xla import QUICK

from navil_jax.config import SourceConfig
from navil_jax.data.mixture import Epoch
from navil_jax.data.toy.book import PIECE, pieces
from navil_jax.data.toy.pages import is_for_pages
from navil_jax.errors import UserError
from navil_jax.study.__main__ import main
from navil_jax.study.grid import Run, check_study, encoder_config, grid, load_study, run_config, union
from navil_jax.study.results import read_results
from navil_jax.study.run import llm_parameters, parse_shard
from navil_jax.study.text import write_corpus
from navil_jax.train.metrics import read_log

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "study" / "tiny.py"


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "navil_jax.study", "run", "--config", TINY, "--out", folder, "--jobs", "2"]
    settings = {"XLA_FLAGS": QUICK, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_a_grid_goes_on_where_it_was_interrupted(tmp_path, capsys):
    stopped = start(tmp_path)
    log = tmp_path / "language" / "s" / "metrics.jsonl"
    while stopped.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    output, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 130, output
    assert "the same command goes on from here" in output
    assert not (tmp_path / "results.jsonl").exists()

    again = start(tmp_path)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    study = load_study(TINY)
    assert "going on after step" in (tmp_path / "logs" / "language-s.txt").read_text()
    rows = read_results(tmp_path / "results.jsonl")
    assert {(row.run, row.step) for row in rows} == {(run.name, step) for run in study.runs for step in (4, 8)}
    for run in study.runs:
        last = [row for row in rows if row.run == run.name][-1]
        logged = read_log(tmp_path / "runs" / run.name / "metrics.jsonl")
        assert last.loss == logged[-1]["eval/easy_vqa_captions/loss"]
        assert last.samples == [line for line in logged if "samples_seen" in line][-1]["samples_seen"] > 0
        assert last.initialised == run.initialised
    starts = {row.initialised: row.loss for row in rows if row.step == 4}
    assert starts[True] != starts[False]

    assert main(["run", "--config", str(TINY), "--out", str(tmp_path)]) == 0
    assert "2 runs, 2 finished" in capsys.readouterr().out
    assert main(["fit", str(tmp_path / "results.jsonl")]) == 0
    assert "data: from scratch / initialised" in capsys.readouterr().out


def test_a_grid_has_every_combination_once():
    runs = union(grid(["a", "b"], [(1, 16), (2, 16)], initialised=(True, False)), grid(["a"], [(1, 16)], seeds=(1, 0)))
    assert len(runs) == len(set(runs)) == 9
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert len({run.name for run in runs}) == 9
    assert Run("a", (3, 64), True, False, False, 0.5, 2).name == "a-3x64-f-scratch-d0.5-s2"


def test_the_config_of_a_run(tmp_path):
    study = load_study(TINY)
    run = Run("s", (2, 32), ffn_experts=True, attention_experts=False, initialised=False, data_share=0.25, seed=3)
    config = run_config(study, run, tmp_path)
    vision, decoder = config.model.vision, config.model.decoder
    assert (vision.depth, vision.width, vision.mlp_dim, vision.num_heads) == (2, 32, 128, 2)
    assert (decoder.ffn_experts, decoder.attention_experts) == (True, False)
    assert config.data.sources[0].repeat == 0.25
    assert config.seed == config.data.seed == 3
    assert config.init_from == ""
    assert run_config(study, dataclasses.replace(run, initialised=True), tmp_path).init_from.endswith(
        "s-2x32-f-init-d0.25-s3"
    )


def test_a_share_of_the_data_is_a_share_of_its_samples(tmp_path):
    (tmp_path / "m.json").write_text(
        '{"a": {"annotation": "a", "length": 3}, "b": {"annotation": "b", "length": 1, "repeat_time": 5}}'
    )
    study = load_study(TINY)
    (scenes,) = study.base.data.sources
    sources = (
        dataclasses.replace(scenes, repeat=2.0),
        dataclasses.replace(scenes, repeat=0.5),
        SourceConfig("m", 4.0, "meta", str(tmp_path / "m.json")),
    )
    base = dataclasses.replace(study.base, data=dataclasses.replace(study.base.data, sources=sources))
    run = Run("s", (2, 32), initialised=False, data_share=0.25)
    found = run_config(dataclasses.replace(study, base=base), run, tmp_path).data.sources
    epochs = [Epoch(1000, source.repeat) for source in found]
    assert [len({epoch[place] for place in range(len(epoch))}) for epoch in epochs] == [250, 125, 250, 250]
    assert [source.weight for source in found] == [scenes.weight, scenes.weight, 1.5, 2.5]
    whole = run_config(dataclasses.replace(study, base=base), dataclasses.replace(run, data_share=1.0), tmp_path)
    assert whole.data.sources == sources


def test_the_size_of_a_language_model_counts_no_experts():
    study = load_study(TINY)
    sizes = {
        llm_parameters(run_config(study, Run("s", (1, 16), ffn, attention), Path()))
        for ffn, attention in ((True, True), (True, False), (False, False))
    }
    assert len(sizes) == 1
    width, vocabulary = 32, 416
    layer = width * 16 * (2 * 2 + 2 * 1) + 3 * width * 64 + 2 * width
    assert sizes == {2 * vocabulary * width + layer + width}


def test_the_small_study_is_possible_and_small():
    study = load_study(ROOT / "configs" / "study" / "small.py")
    assert {run.seed for run in study.runs} == {0, 1, 2}
    sizes = [12 * depth * width**2 for depth, width in {run.encoder for run in study.runs if run.encoder[0] != 3}]
    assert max(sizes) < 1.25 * min(sizes)
    assert len(study.runs) < 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": ()}, "runs: the study has none"),
        ({"runs": (Run("x", (1, 16)),)}, "no LLM 'x'; the study has s"),
        ({"runs": (Run("s", (1, 17)),)}, "encoder width 17 is not a multiple of the heads' 16"),
        ({"runs": (Run("s", (1, 16), data_share=0.0),)}, "data_share 0.0 is no share"),
        ({"language": None}, "is initialised, but neither language nor language_models says how"),
        ({"metric": ("x",)}, "metric: 'x' is not among the sources easy_vqa_captions"),
    ],
)
def test_an_impossible_study_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check_study(dataclasses.replace(load_study(TINY), **changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "defines no get_study"),
        ("def get_study(): return 5", "returned int, not navil_jax.study.grid.Study"),
        ("def get_study(): return 1 / 0", "ZeroDivisionError: division by zero"),
        ("def get_study(:", "SyntaxError"),
    ],
)
def test_a_bad_study_file_is_told(tmp_path, text, message):
    path = tmp_path / "x.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_study(path)


@pytest.mark.parametrize("text", ["4", "4/4", "-1/4", "a/b", "1/2/3"])
def test_a_bad_shard_is_refused(text):
    with pytest.raises(UserError, match="--shard"):
        parse_shard(text)


def test_shards_share_the_runs_out():
    runs = load_study(ROOT / "configs" / "study" / "small.py").runs
    parts = [runs[index::count] for index, count in (parse_shard("0/3"), parse_shard("1/3"), parse_shard("2/3"))]
    assert sorted(run.name for part in parts for run in part) == sorted(run.name for run in runs)


def test_an_encoder_keeps_the_width_of_its_heads():
    vision = load_study(TINY).base.model.vision
    assert encoder_config(vision, 5, 48).num_heads == 3


def test_the_text_is_real_and_its_parts_are_apart(tmp_path):
    write_corpus(tmp_path, 60_000)
    parts = [
        [json.loads(line)["text"] for line in (tmp_path / name).read_text().splitlines()]
        for name in ("train.jsonl", "held_out.jsonl")
    ]
    assert len(parts[0]) > 7 * len(parts[1]) > 0
    assert not set(parts[0]) & set(parts[1])
    shown = {piece for number, piece in enumerate(pieces(60_000)) if is_for_pages(number)}
    assert shown and not shown & (set(parts[0]) | set(parts[1]))
    assert max(map(len, parts[0])) <= 2 * PIECE + 1
    assert "heaven" in " ".join(parts[0])


def test_a_folder_with_another_text_is_not_gone_on_with(tmp_path):
    write_corpus(tmp_path, 60_000)
    before = (tmp_path / "train.jsonl").read_text()
    write_corpus(tmp_path, 60_000)
    assert (tmp_path / "train.jsonl").read_text() == before
    with pytest.raises(UserError, match=r"held_out\.jsonl: is not the text of this study"):
        write_corpus(tmp_path, 50_000)
    (tmp_path / "train.jsonl").write_text('{"text": "docstrings"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl: is not the text of this study"):
        write_corpus(tmp_path, 60_000)
