"""The log survives kills and resumes without duplicates; progress lines and images show what they should."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from navil_jax.data.sample import Sample
from navil_jax.train.evaluators import varied
from navil_jax.train.metrics import (
    Answer,
    MetricsLog,
    Throughput,
    progress_fields,
    read_log,
)
from navil_jax.train.plots import plot_answers, plot_losses, running_mean


def write(folder, steps, start=0, scale=1.0):
    log = MetricsLog(folder, start)
    for step in steps:
        log.write(step, {"loss": np.float32(step) * scale})
    return log


def test_lines_are_on_disk_at_once(tmp_path):
    log = write(tmp_path / "new", [1, 2])
    assert read_log(tmp_path / "new" / "metrics.jsonl") == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]
    log.close()


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    write(tmp_path, range(1, 6)).close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    write(tmp_path, range(4, 7), start=3, scale=10.0).close()
    lines = read_log(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_log(path) == [{"step": 1}]
    assert read_log(tmp_path / "none.jsonl") == []


def test_a_run_goes_on_from_a_log_with_damaged_lines(tmp_path):
    """A machine that loses power can leave zeros in it."""
    write(tmp_path, [1, 2]).close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"step": 1,', b"\0\0\0") + b'{"loss": 3.0}\n')
    assert read_log(path) == [{"step": 2, "loss": 2.0}]
    log = write(tmp_path, [3], start=2)
    log.close()
    assert (log.damaged, log.dropped) == (2, 0)
    assert [line["step"] for line in read_log(path)] == [2, 3]


def test_values_keep_their_float32_bits(tmp_path):
    value = np.float32(1) / np.float32(3)
    log = MetricsLog(tmp_path)
    log.write(1, {"loss": value})
    log.close()
    assert np.float32(json.loads((tmp_path / "metrics.jsonl").read_text())["loss"]) == value
    assert list((tmp_path / "tensorboard").iterdir())


def test_progress_line():
    done = Throughput(2.0, 4, tokens=900, images=6, patches=300, token_slots=1000, patch_slots=400, data_wait=0.008)
    line = "  ".join(progress_fields(40, 100, 2.31, 5e-5, done))
    assert line == (
        "step 40/100  loss 2.3100  lr 5.0e-05  450 tokens/s  3.0 images/s  0 TFLOP/s  "
        "padding 10% of tokens, 25% of patches  data wait 0.4%  ETA 0:00:30"
    )


def test_progress_fields_of_a_device_with_a_known_peak_and_of_counted_samples():
    done = Throughput(
        2.0, 4, tokens=900, images=6, patches=300, token_slots=1000, patch_slots=400, flops=3e14, peak=5e14
    )
    line = "  ".join(progress_fields(40, 100, 2.31, 5e-5, done, "80 of 200 samples"))
    assert line.startswith("step 40/100  80 of 200 samples  loss 2.3100")
    assert "3.0 images/s  MFU 30.0%  padding" in line
    line = "  ".join(progress_fields(40, 100, 2.31, 5e-5, dataclasses.replace(done, peak=None)))
    assert "  150 TFLOP/s  " in line


def test_times_are_kept_apart_from_what_a_run_reproduces(tmp_path):
    log = write(tmp_path, [4])
    done = Throughput(2.0, 4, tokens=900, images=6, patches=300, token_slots=1000, patch_slots=400, data_wait=0.008)
    done = dataclasses.replace(done, flops=200.0, peak=400.0)
    log.write_timing(4, done)
    log.close()
    assert read_log(tmp_path / "metrics.jsonl") == [{"step": 4, "loss": 4.0}]
    expected = {"step": 4, "seconds_per_step": 0.5, "tokens_per_second": 450.0, "data_wait": 0.004}
    expected |= {"flops_per_second": 100.0, "mfu": 0.25}
    assert read_log(tmp_path / "timings.jsonl") == [expected]


def test_smoothing_is_a_running_mean():
    values = np.arange(100.0)
    np.testing.assert_allclose(running_mean(values), [0.0, *(np.arange(99) + 0.5)])
    np.testing.assert_allclose(running_mean(np.array([3.0])), [3.0])


@pytest.mark.parametrize("lines", [[], [{"step": 1, "loss": 2.0}, {"step": 1, "eval/scenes/loss": 1.0}]])
def test_loss_curve_is_drawn(tmp_path, lines):
    plot_losses(tmp_path / "loss.png", lines, "a run")
    assert Image.open(tmp_path / "loss.png").size == (1200, 600)


def test_many_sources_and_steps_keep_apart_from_their_legend(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    names = [f"source_{number}" for number in range(12)]
    lines = [{"step": step, "loss": 2.0} | {f"eval/{name}/loss": 2.0 for name in names} for step in range(1, 20_001, 4)]
    plot_losses(tmp_path / "loss.png", lines, "a run")
    figure = drawn[0]
    figure.draw_without_rendering()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [text for text in texts if text.startswith("held out: ")] == [f"held out: {name}" for name in names]
    assert not figure.legends[0].get_window_extent().overlaps(figure.axes[0].get_window_extent())
    styles = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(styles) == 13


def test_a_wrong_answer_is_told_without_colour(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    plot_answers(tmp_path / "grid.png", [Answer(None, "q", "a", "b", False), Answer(None, "q", "a", "a", True)])
    wrong, right = (axis.texts[0].get_text() for axis in drawn[0].axes[:2])
    assert (wrong, right) == ("\u2717 a\ntruth: b", "\u2713 a")


def test_shown_answers_repeat_as_little_as_they_can():
    images = [Image.new("RGB", (2, 2), (number, 0, 0)) for number in range(4)]
    samples = [Sample(str(n), (images[n // 30],), ((f"q{n % 20 if n > 60 else 0}", f"a{n % 3}"),)) for n in range(120)]
    shown = [samples[place] for place in varied(list(range(120)), lambda place: samples[place], 4)]
    assert len({id(one.images[0]) for one in shown}) == 4
    assert len({one.turns[-1][0] for one in shown}) >= 3
    assert len(varied([1, 2], lambda _: samples[0], 4)) == 2
    assert varied([], lambda _: samples[0], 4) == []


def test_right_answers_are_green_and_wrong_ones_red(tmp_path):
    def colours(answer):
        image = np.full((8, 8, 3), 255, np.uint8)
        plot_answers(tmp_path / "grid.png", [Answer(image, "How many? $x_", answer, "two", answer == "two")], columns=1)
        pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).astype(int)
        green = (pixels[..., 1] - pixels[..., 0] > 80).sum()
        red = (pixels[..., 0] - pixels[..., 1] > 80).sum()
        return green, red

    green, red = colours("two")
    assert green > 10
    assert red == 0
    green, red = colours("three")
    assert green == 0
    assert red > 10


def test_grid_takes_samples_without_image(tmp_path):
    plot_answers(tmp_path / "grid.png", [Answer(None, "q", "a", "a", True)] * 5)
    assert Image.open(tmp_path / "grid.png").size[0] == 1320


def test_a_log_that_is_cut_while_it_is_written_is_noticed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(1, {"loss": 1.0})
    assert not log.was_cut()
    (tmp_path / "metrics.jsonl").write_text("")
    log.write(2, {"loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("")
    assert log.was_cut()
    log.write(3, {"loss": 1.0})
    assert not log.was_cut()
    log.close()
    assert MetricsLog(tmp_path, step=1).dropped == 1
