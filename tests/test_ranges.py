"""Numbers of configs and options: each has a range, and one outside it is refused in a line that names it."""

import argparse
import dataclasses
import math
import typing
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navil_jax.config import (
    Config,
    DataConfig,
    EvaluatorConfig,
    OptimizerConfig,
    ScaleConfig,
    SourceConfig,
    VisionConfig,
    validate,
)
from navil_jax.config.flags import apply_overrides
from navil_jax.config.ranges import Count, PositiveShare, Range, read_as
from navil_jax.errors import UserError

NAMED = Config(
    data=DataConfig(sources=(SourceConfig("easy_vqa"), SourceConfig("scenes"))),
    optimizer=OptimizerConfig(learning_rate_scales=(ScaleConfig("vision/**", 1.0),)),
    evaluators=(EvaluatorConfig("held_out", 1, 1),),
    profile_steps=(1, 2),
    model=dataclasses.replace(Config().model, vision=VisionConfig(full_attention_layers=(1,))),
)


def numbers(node: Any, prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    """(key, annotated type) of every number of a config; entries of tuples of numbers count as one, `.0`."""
    for name, hint in typing.get_type_hints(type(node), include_extras=True).items():
        value, key = getattr(node, name), f"{prefix}{name}"
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if type(None) in typing.get_args(hint):
            hint = options[0]
        if typing.get_origin(hint) is tuple:
            entry = typing.get_args(hint)[0]
            if value and dataclasses.is_dataclass(value[0]):
                for index, inner in enumerate(value):
                    yield from numbers(inner, f"{key}.{index}.")
            elif entry is not str and not dataclasses.is_dataclass(entry):
                yield f"{key}.0", entry
        elif dataclasses.is_dataclass(value):
            yield from numbers(value, f"{key}.")
        elif hint in (int, float) or typing.get_origin(hint) is Annotated:
            yield key, hint


NUMBERS = dict(numbers(NAMED))


def replaced(node: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    if isinstance(node, tuple):
        index = int(path[0])
        return (*node[:index], replaced(node[index], path[1:], value), *node[index + 1 :])
    return dataclasses.replace(node, **{path[0]: replaced(getattr(node, path[0]), path[1:], value)})


def outside(limits: Range, base: type) -> st.SearchStrategy[Any]:
    """Numbers that the range does not hold, those at its ends often."""
    values: st.SearchStrategy[Any] = st.integers() if base is int else st.floats()
    ends = [limits.low - 1, limits.low, limits.high, limits.high + 1]
    if base is float:
        ends += [math.nan, math.inf, -math.inf, -5e-324]
    ends = [base(end) for end in ends if base is float or math.isfinite(end)]
    return (st.sampled_from(ends) | values).filter(lambda value: value not in limits)


def test_every_number_of_a_config_has_a_range():
    assert len(NUMBERS) > 70
    assert [key for key, hint in NUMBERS.items() if typing.get_origin(hint) is not Annotated] == []


def test_the_defaults_are_within_their_ranges():
    validate(Config())
    validate(NAMED)


@pytest.mark.parametrize("key", NUMBERS)
@settings(max_examples=20)
@given(data=st.data())
def test_a_number_out_of_its_range_is_refused_by_its_key(key, data):
    base, limits = typing.get_args(NUMBERS[key])
    value = data.draw(outside(limits, base))
    with pytest.raises(UserError) as error:
        validate(replaced(NAMED, key.split("."), value))
    assert str(error.value).startswith(f"config.{key}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", [key for key in NUMBERS if not key.endswith(".0")])
@settings(max_examples=20)
@given(data=st.data())
def test_so_it_is_in_a_flag(key, data):
    base, limits = typing.get_args(NUMBERS[key])
    value = data.draw(outside(limits, base))
    with pytest.raises(UserError) as error:
        apply_overrides(NAMED, {key: repr(value)})
    assert str(error.value).startswith(f"config.{key}")
    assert "\n" not in str(error.value)


def test_the_entry_is_named_beside_its_number():
    with pytest.raises(UserError, match=r"config\.data\.sources\.1\.weight of 'scenes': must be above 0, not -1\.0"):
        apply_overrides(NAMED, {"data.sources.1.weight": "-1"})


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("model.decoder.pad_token_id", "99999", "99999 lies outside the vocabulary of 92556"),
        ("model.vision.full_attention_layers", "99", "there is no layer [99], the last one is 23"),
        ("model.vision.window_size", "7", "7 is not a multiple of merge_size = 2"),
        ("model.special_token_ids", ",".join(["7"] * 12), "two special tokens have the same id"),
        ("model.decoder.rope_factor", "2", "has no effect without rope_scaling"),
        ("optimizer.final_learning_rate", "1e-6", "has no effect on the constant schedule"),
        ("profile_steps", "2000,2001", "begins after the last of steps = 1000"),
        ("data.sources.0.prompt", "x", "has no effect on a built-in source; leave it out"),
        ("data.sources.0.root", "x", "has no effect on a built-in source"),
        ("data.sources.0.held_out", "x", "has no effect on a built-in source"),
    ],
)
def test_what_has_no_meaning_or_no_effect_beside_the_rest_is_refused(key, text, message):
    with pytest.raises(UserError) as error:
        apply_overrides(NAMED, {key: text})
    of = " of 'easy_vqa'" if key.startswith("data.sources.0") else ""
    assert str(error.value).startswith(f"config.{key}{of}: {message}")


@pytest.mark.parametrize("name", ["prompt", "root"])
def test_converted_data_are_complete(name):
    source = SourceConfig("a", kind="array_record", path="a", **{name: "x"})
    with pytest.raises(UserError, match=rf"sources\.0\.{name} of 'a': has no effect on data of kind array_record"):
        validate(Config(data=DataConfig(sources=(source,))))


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (Count, "0", "must be at least 1, not 0"),
        (Count, "1.5", "'1.5' is not a whole number"),
        (Count, str(2**31), "must be at least 1 and at most 2,147,483,647"),
        (PositiveShare, "nan", "must be above 0 and at most 1, not nan"),
        (PositiveShare, "x", "'x' is not a number"),
    ],
)
def test_an_option_is_read_as_its_kind(kind, text, message):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        read_as(kind)(text)
    assert str(error.value).startswith(message)
    assert read_as(Count)("7") == 7
    assert read_as(PositiveShare)("1") == 1.0
