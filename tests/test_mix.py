"""Mixtures: schedules of weights, temperature, and what `data mix` says of a recipe."""

import dataclasses
import json
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
from navil_jax.data.inspect.mix import shares
from navil_jax.data.inspect.summary import drawn_by
from navil_jax.data.mixture import Epoch, Scheduled, proportions
from navil_jax.data.pipeline import make_dataset
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
