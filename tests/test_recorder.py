"""What the recorder logs of a run, and what it does with steps that went wrong."""

import dataclasses
import json

import numpy as np
import pytest
from tiny import tiny_model

from navil_jax.config import Config, DataConfig, SourceConfig
from navil_jax.data.pipeline import batch_spec
from navil_jax.errors import UserError
from navil_jax.model import params as model_params
from navil_jax.train.metrics import MetricsLog, read_log
from navil_jax.train.recorder import IN_FLIGHT, Recorder, most_samples

CONFIG = Config(
    steps=4,
    model=tiny_model(),
    data=DataConfig(sources=(SourceConfig("a"),), rows=2, visual_slots=12, text_slots=20, patch_slots=40),
    log_every=1,
)
BATCH = batch_spec(CONFIG).fake(CONFIG.model)
METRICS = {"tokens": 50, "text_tokens": 30, "images": 2, "patches": 16, "learning_rate": 0.1}
METRICS |= {"samples": int(BATCH.segment_ids.max(axis=1).sum())}
METRICS |= {"gradient_norm": 1.0, "spike": 0, "skipped": 0, "losses": 50, "loss_mean": 2.0, "loss_variance": 0.01}


def step(loss=2.0, number=1, **changed):
    """What a step returns."""
    values = METRICS | {"loss": loss} | changed
    arrays = {name: np.float32(value) for name, value in values.items()}
    return arrays | {"source_loss": np.float32([loss]), "source_weight": np.float32([1.0])}


def recorder(folder, before=None, config=CONFIG, **optimizer):
    config = dataclasses.replace(
        config, workdir=str(folder), optimizer=dataclasses.replace(config.optimizer, **optimizer)
    )
    trained = model_params.flatten(model_params.shapes(CONFIG.model))
    return Recorder(config, MetricsLog(folder), trained, before or {})


def test_sums_since_the_start_of_the_run_and_useful_work(tmp_path, capsys):
    watched = recorder(tmp_path, before={"tokens_seen": 100, "text_tokens_seen": 7})
    for number in (1, 2):
        watched.add(number, step(number=number), BATCH, 0.0, {})
    watched.flush()
    lines = read_log(tmp_path / "metrics.jsonl")
    assert [(line["tokens_seen"], line["text_tokens_seen"]) for line in lines] == [(150, 37), (200, 67)]
    assert watched.last == {name: value for name, value in lines[-1].items() if name != "step"}
    assert read_log(tmp_path / "timings.jsonl")[-1]["flops_per_second"] > 0
    assert "TFLOP/s" in capsys.readouterr().out


def test_the_host_goes_on_while_the_devices_take_the_last_steps(tmp_path):
    """So the next batch is laid out, and put on the devices, while they are at a step: nothing waits for that step."""
    watched = recorder(tmp_path)
    for number in range(1, 6):
        watched.add(number, step(number=number), BATCH, 0.0, {})
        fetched = [line["step"] for line in read_log(tmp_path / "metrics.jsonl")]
        assert fetched[-1] == max(1, number - IN_FLIGHT)  # the first step, which compiles, is waited for


@pytest.mark.parametrize("log_every", [1, 50])
def test_a_run_counted_in_samples_ends_in_the_step_that_reaches_them(tmp_path, log_every, capsys):
    watched = recorder(tmp_path, config=dataclasses.replace(CONFIG, steps=100, batch_samples=3, log_every=log_every))
    number = 0
    while not watched.ended(number):
        number += 1
        watched.add(number, step(number=number), BATCH, 0.0, {})
    assert number == -(-300 // METRICS["samples"])
    assert watched.samples_seen == number * METRICS["samples"]
    watched.flush()
    logged = [line["step"] for line in read_log(tmp_path / "timings.jsonl")]
    assert logged[-1] == number
    assert len(logged) == len(set(logged))
    assert f"{watched.samples_seen:,} of 300 samples" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("late", [0, 3, 7])
@pytest.mark.parametrize("planned", [400, 1063, 3000])
def test_uneven_steps_end_where_a_resumed_run_ends(tmp_path, late, planned):
    """One step in eight holds many samples: the run ends with the first step that reaches them all, however resumed."""
    samples = lambda number: 200 if (number + late) % 8 == 3 else 5  # noqa: E731
    sums = np.cumsum([samples(number) for number in range(1, 1000)])
    right = int(np.searchsorted(sums, planned)) + 1

    def run(start, before):
        config = dataclasses.replace(CONFIG, steps=planned, batch_samples=1, log_every=10)
        watched = recorder(tmp_path, before, config)
        number = start
        while not watched.ended(number):
            number += 1
            ids = np.zeros_like(BATCH.segment_ids)
            ids[0, 0] = samples(number)
            batch = dataclasses.replace(BATCH, segment_ids=ids)
            watched.add(number, step(samples=samples(number)), batch, 0.0, {})
        return number, watched

    number, watched = run(0, {})
    assert (number, watched.samples_seen) == (right, sums[right - 1])
    for start in (right - 3, right):
        assert run(start, {"samples_seen": int(sums[start - 1])})[0] == right


def test_other_processes_rows_may_hold_a_sample_in_every_slot():
    ids = np.array([[1, 1, 2, 0]])
    assert most_samples(ids, CONFIG) == 2 + (CONFIG.data.rows - 1) * CONFIG.data.text_slots


def test_a_spike_is_noted_with_its_samples(tmp_path, capsys):
    watched = recorder(tmp_path)
    watched.add(1, step(9.0, spike=1), BATCH, 0.0, {})
    said = capsys.readouterr().out
    assert "step 1: loss 9.0000 is a spike (the last ones: 2.0000 +- 0.1000); samples of its batch: a/" in said
    samples = json.loads((tmp_path / "spike_step_1_process_0.json").read_text())["samples"]
    assert len(samples) == len(np.unique(BATCH.sample_ids[BATCH.segment_ids > 0]))


def test_a_spike_stops_the_run_where_it_shall(tmp_path):
    watched = recorder(tmp_path, spikes="stop")
    with pytest.raises(UserError, match=r"step 1: loss 9.0000 is a spike .* config\.optimizer\.spikes=skip"):
        watched.add(1, step(9.0, spike=1), BATCH, 0.0, {})


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path, capsys):
    watched = recorder(tmp_path, not_finite="skip", max_skipped=2)
    bad = {"loss": np.nan, "skipped": 1}
    for number, values in enumerate((bad, bad, {}, bad, bad), start=1):
        watched.add(number, step(number=number, **values), BATCH, 0.0, {})
    watched.flush()
    assert "step 5: loss is nan; samples of its batch: a/" in capsys.readouterr().out
    assert [line["step"] for line in read_log(tmp_path / "metrics.jsonl") if "loss" in line] == [3]
    watched.add(6, step(number=6, **bad), BATCH, 0.0, {})
    with pytest.raises(UserError, match=r"step 6: loss is nan; .* 3 steps in a row were skipped"):
        watched.flush()


@pytest.mark.parametrize(
    ("means", "said"),
    [
        ([2.0, 1.0, 0.5, 1.4], ""),
        ([2.0, 0.5, 1.6, 3.0], "step 3: the mean loss is 1.60, once it was 0.50; look at the learning rate"),
        ([5.0, 62.0], "step 2: the mean loss is 62.00, worse than guessing (4.56); look at"),
        ([2.0, 0.5, 1.6, 0.5, 1.7], "step 5: the mean loss is 1.70, once it was 0.50"),
    ],
)
def test_a_loss_that_leaves_its_range_is_said_once(means, said, tmp_path, capsys):
    watched = recorder(tmp_path)
    for number, mean in enumerate(means, start=1):
        watched.add(number, step(number=number, loss_mean=mean), BATCH, 0.0, {})
    watched.flush()
    lines = [line for line in capsys.readouterr().out.splitlines() if "the mean loss is" in line]
    assert len(lines) == bool(said) + (len(means) == 5)
    assert said in "\n".join(lines)


def test_few_losses_give_no_alarm(tmp_path, capsys):
    watched = recorder(tmp_path)
    watched.add(1, step(loss_mean=62.0, losses=9), BATCH, 0.0, {})
    watched.flush()
    assert "the mean loss" not in capsys.readouterr().out


@pytest.mark.parametrize("log_every", [3, 5, 7])
def test_lines_are_of_round_steps_and_of_the_last(tmp_path, log_every, capsys):
    watched = recorder(tmp_path, config=dataclasses.replace(CONFIG, steps=17, log_every=log_every))
    for number in range(1, 18):
        watched.add(number, step(number=number), BATCH, 0.0, {})
        if number == 8:  # an evaluation
            watched.flush()
            watched.restart_clock()
    watched.flush()
    shown = [int(line.split("/")[0].removeprefix("step ")) for line in capsys.readouterr().out.splitlines()]
    assert shown == sorted({*range(log_every, 18, log_every), 17})
    assert [line["step"] for line in read_log(tmp_path / "timings.jsonl")] == shown
