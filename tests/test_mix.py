"""Mixtures: schedules of weights, temperature, and what `data mix` says of a recipe."""

import dataclasses
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_data import talk, write_lines
from made_sources import TOKENIZER, TOKENIZER_FOLDER, assert_equal, config, made

from navil_jax.config import Config, SourceConfig, WeightPoint, validate
from navil_jax.config.flags import apply_overrides
from navil_jax.config.plain import from_json, to_json
from navil_jax.data.inspect.checkup import BAD, GOOD, NOTE, RESIZED
from navil_jax.data.inspect.mix import shares
from navil_jax.data.inspect.summary import drawn_by
from navil_jax.data.mixture import Epoch, Scheduled, proportions
from navil_jax.data.pipeline import make_dataset
from navil_jax.data.sources import expand_sources
from navil_jax.errors import UserError

NO_END = sys.maxsize


def scheduled(batch_samples: int = 5, **changes: object) -> Config:
    """One source whose weight falls from 3 to 0.5 at step 2 and to 0 at step 4, and one that begins at step 2."""
    first = SourceConfig("a", weight=3.0, weight_points=(WeightPoint(2, 0.5), WeightPoint(4, 0.0)))
    second = SourceConfig("b", weight_points=(WeightPoint(0, 0.0), WeightPoint(2, 1.0)))
    third = SourceConfig("c")
    return dataclasses.replace(config(sources=(first, second, third), **changes), batch_samples=batch_samples)


weights = st.lists(st.floats(0, 10).map(lambda weight: round(weight, 3)), min_size=3, max_size=3).filter(any)


@settings(max_examples=60, deadline=None)
@given(
    stretches=st.lists(weights, min_size=1, max_size=4), lengths=st.lists(st.integers(0, 40), min_size=3, max_size=3)
)
def test_realised_shares_follow_the_schedule(stretches: list[list[float]], lengths: list[int]) -> None:
    starts = np.cumsum([0, *lengths])[: len(stretches)].tolist()
    chosen = Scheduled(stretches, starts, [NO_END] * 3)
    drawn: Counter[int] = Counter()
    for place in range(starts[-1] + 60):
        assert chosen.counts(place) == [drawn[number] for number in range(3)]
        number, index = chosen[place]
        assert index == drawn[number]  # every source goes on where it was
        drawn[number] += 1
    for start, end, own in zip(starts, [*starts[1:], starts[-1] + 60], stretches, strict=True):
        found = np.subtract(chosen.counts(end), chosen.counts(start))
        expected = (end - start) * np.array(own) / sum(own)
        assert np.abs(found - expected).max() < 3
        assert not found[np.array(own) == 0].any()


@settings(max_examples=30, deadline=None)
@given(streams=st.integers(1, 7), step=st.integers(0, 20), batch=st.integers(1, 50))
def test_streams_together_change_weights_at_the_step(streams: int, step: int, batch: int) -> None:
    data = config(
        sources=(SourceConfig("a", weight_points=(WeightPoint(step, 0.0),)), SourceConfig("b", weight=1e-9))
    ).data
    drawn = sum(
        proportions(data, batch, [9, 9], [NO_END] * 2, stream, streams).counts(10**6)[0] for stream in range(streams)
    )
    assert abs(drawn - step * batch) <= streams


@pytest.mark.parametrize(("temperature", "expected"), [(0.0, [1, 3]), (1.0, [10, 300]), (2.0, [1, 3 * 10**0.5])])
def test_temperature_weighs_by_sizes(temperature: float, expected: list[float]) -> None:
    sources = (SourceConfig("a"), SourceConfig("b", weight=3.0, repeat=2.0))
    settings = config(sources=sources, temperature=temperature)
    drawn = drawn_by(settings, [10, 50], 0)
    np.testing.assert_allclose(drawn / drawn.sum(), np.array(expected) / sum(expected), rtol=1e-6)


def test_a_run_goes_on_exactly_at_any_step_and_with_other_hosts() -> None:
    sources = [made(20), made(7, seed=1), made(30, seed=2)]
    settings = scheduled(streams=2)
    whole, states, batches = iter(make_dataset(settings, sources, TOKENIZER)), [], []
    for _ in range(6):
        states.append(whole.get_state())
        batches.append(next(whole))
    names = [int(number) for batch in batches for number in np.unique(batch.source_ids)]
    assert set(names) == {0, 1, 2}
    for step, state in enumerate(states):
        again = iter(make_dataset(settings, sources, TOKENIZER))
        again.set_state(state)
        for batch in batches[step:]:
            assert_equal(next(again), batch)
    for host in range(2):
        part = iter(make_dataset(settings, sources, TOKENIZER, host, 2))
        part.set_state(states[2])
        for batch in batches[2:]:
            np.testing.assert_array_equal(next(part).tokens, batch.tokens[host : host + 1])


@pytest.mark.parametrize(
    ("source", "batch_samples", "reason"),
    [
        (SourceConfig("a", weight_points=(WeightPoint(3, 1.0),)), 0, "batch_samples samples, which is 0"),
        (SourceConfig("a", weight_points=(WeightPoint(3, 1.0), WeightPoint(3, 2.0))), 5, "must rise"),
        (SourceConfig("a", weight_points=(WeightPoint(3, 0.0),)), 5, "from step 3 on all weights are 0"),
        (SourceConfig("a", weight_points=(WeightPoint(3, -1.0),)), 5, "weight_points.0.weight"),
    ],
)
def test_schedules_that_mean_nothing_are_refused(source: SourceConfig, batch_samples: int, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        validate(dataclasses.replace(config(sources=(source,)), batch_samples=batch_samples))


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 30), repeat=st.floats(0.1, 3), drawn=st.integers(1, 120))
def test_samples_that_are_never_seen_are_counted(size: int, repeat: float, drawn: int) -> None:
    """Against the mean over shuffled epochs."""
    settings = config(sources=(SourceConfig("a", repeat=repeat),))
    table = np.zeros(0, [("status", "u1")])
    (share,) = shares(settings, [size], [table], drawn)
    epoch, random = Epoch(size, repeat), np.random.default_rng(0)
    numbers = np.array([epoch[place] for place in range(len(epoch))])
    firsts = [random.permutation(numbers)[:drawn] for _ in range(300)]
    unseen = np.mean([size - len(np.unique(first)) for first in firsts])
    assert abs(share.never_seen - unseen) <= 0.5 + 0.2 * size**0.5  # rounded, and so many standard errors


def test_the_command_tells_epochs_tokens_and_what_is_never_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from navil_jax.data.__main__ import main

    for name, count in (("few", 4), ("many", 100)):
        write_lines(
            tmp_path / f"{name}.jsonl", [{"conversations": talk(f"Question {i}?", "Yes.")} for i in range(count)]
        )
    (tmp_path / "recipe.py").write_text(
        "from navil_jax.config import *\n"
        "def get_config():\n"
        f"    few = SourceConfig('few', kind='llava', path={str(tmp_path / 'few.jsonl')!r})\n"
        f"    many = SourceConfig('many', kind='llava', path={str(tmp_path / 'many.jsonl')!r},\n"
        "        weight_points=(WeightPoint(1, 4.0),))\n"
        f"    data = DataConfig(sources=(few, many), tokenizer={str(TOKENIZER_FOLDER)!r})\n"
        "    model = ModelConfig(special_token_ids=())\n"
        "    return Config(data=data, model=model, steps=2, batch_samples=40)\n"
    )
    arguments = ["mix", "--config", str(tmp_path / "recipe.py"), "--samples", "10"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    few, many = found["sources"]
    assert (few["drawn"], many["drawn"]) == (20 + 8, 20 + 32)
    assert (few["epochs"], few["never_seen"], few["read"]) == (7.0, 0, 4)
    assert (many["epochs"], many["never_seen"], many["read"]) == (0.52, 48, 10)
    assert found["schedule"] == [{"step": 0, "drawn": [20, 20]}, {"step": 1, "drawn": [8, 32]}]
    assert found["tokens"]["visual_tokens"] == 0 < found["tokens"]["learnt_tokens"] < found["tokens"]["text_tokens"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    for text in (
        "few: each sample is drawn 7 times",
        "many: 48 of 100 samples are never seen",
        "4 from step 1",
        "80 samples",
    ):
        assert text in said
    assert re.search(r"share +steps 0 to 0 +steps 1 to 1\nfew +50.0% +20.0%\n", said)
    assert re.search(r"samples drawn +40 +40\n", said)


def meta_shares(folder: Path, **changes: object) -> tuple[np.ndarray, np.ndarray]:
    """Shares of parts a (30 samples) and b (10) of a meta file and of a source of 40, before step 5 and later."""
    for name, count in (("a", 30), ("b", 10)):
        write_lines(folder / f"{name}.jsonl", [{"conversations": talk("Q?", "A.")}] * count)
    (folder / "m.json").write_text(json.dumps({name: {"annotation": f"{name}.jsonl"} for name in "ab"}))
    meta = SourceConfig("m", kind="meta", path=str(folder / "m.json"), weight_points=(WeightPoint(5, 3.0),))
    base = dataclasses.replace(config(sources=(meta, SourceConfig("c")), **changes), batch_samples=80)
    expanded = expand_sources(base)
    chosen = proportions(expanded.data, 80, [30, 10, 40], [NO_END] * 3)
    before, whole = np.array(chosen.counts(400)), np.array(chosen.counts(800))
    return before / 400, (whole - before) / 400


def test_parts_of_a_meta_file_share_its_weight_at_every_step(tmp_path: Path) -> None:
    before, later = meta_shares(tmp_path)
    np.testing.assert_allclose(before, [3 / 8, 1 / 8, 1 / 2], atol=0.01)
    np.testing.assert_allclose(later, [9 / 16, 3 / 16, 1 / 4], atol=0.01)


def test_sizes_of_parts_of_a_meta_file_count_once(tmp_path: Path) -> None:
    before, later = meta_shares(tmp_path, temperature=1.0)
    np.testing.assert_allclose(before, [3 / 8, 1 / 8, 1 / 2], atol=0.01)
    np.testing.assert_allclose(later, [9 / 16, 3 / 16, 1 / 4], atol=0.01)


@pytest.mark.parametrize("temperature", [1.0, 1.5, 1e6])
def test_every_source_is_drawn_at_every_temperature(temperature: float) -> None:
    settings = config(sources=(SourceConfig("a"), SourceConfig("b")), temperature=temperature)
    assert drawn_by(settings, [1, 10**9], 0).all()
    with pytest.raises(UserError, match=r"data\.temperature: must be at least 1, or 0, not 0\.01"):
        validate(dataclasses.replace(settings, data=dataclasses.replace(settings.data, temperature=0.01)))


def test_tokens_are_those_of_samples_that_can_be_used() -> None:
    table = np.zeros(4, NOTE)
    table["status"], table["text_tokens"], table["visual_tokens"] = [GOOD, RESIZED, BAD, BAD], 10, [8, 10**6, 0, 0]
    (share,) = shares(config(), [100], [table], 40)
    assert (share.drawn, share.tokens["text_tokens"], share.tokens["visual_tokens"]) == (40, 200, 20 * (8 + 48) // 2)


def test_what_a_program_reads_is_json_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from navil_jax.data.__main__ import main

    recipe = str(Path(__file__).parent / "toy_recipe.py")
    assert main(["mix", "--config", recipe, "--samples", "2", "--json", f"--config.workdir={tmp_path}"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["sources"][0]["read"] == 2
    assert json.loads(said.out)["schedule"] == []
    assert "a tokenizer was trained" in said.err


def test_points_are_set_by_a_flag_and_saved() -> None:
    key, base = "data.sources.1.weight_points", dataclasses.replace(scheduled(), batch_samples=5)
    changed = apply_overrides(base, {key: "10_000:0.2,20_000:0"})
    assert changed.data.sources[1].weight_points == (WeightPoint(10_000, 0.2), WeightPoint(20_000, 0.0))
    assert from_json(to_json(changed)) == changed
    assert apply_overrides(changed, {key: ""}).data.sources[1].weight_points == ()
    for text in ("5", "5:1:2", "x:1", "5:x", "1.5:1"):
        with pytest.raises(UserError, match=rf"^config\.{key}: '{text}' is not step:weight,\.\.\.$"):
            apply_overrides(base, {key: text})
    with pytest.raises(UserError, match=r"evaluators: is a group of fields"):
        apply_overrides(base, {"evaluators": "held_out"})
    with pytest.raises(UserError, match=r"model: is a group of fields"):
        apply_overrides(base, {"model": "3"})
