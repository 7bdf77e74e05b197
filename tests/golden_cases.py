"""The golden folders of the tests, and the check of numbers against them."""

import functools
from pathlib import Path
from typing import Any

import pytest

from navil_jax.convert.verify import golden
from navil_jax.convert.verify.compare import Pair

FOLDER = Path(__file__).parent / "golden"
IMAGE_CASES = ("internlm2_small", "internlm2_windowed", "qwen3_small", "qwen3_small_tied")
TEXT_CASES = ("text_only_internlm2", "text_only_internlm2_linear", "text_only_qwen2", "text_only_qwen3")


def computed(cases: tuple[str, ...]) -> list[Any]:
    """The cases for tests that compile a model: the first of each family, and the others marked as slow."""
    return [pytest.param(name, marks=() if name.endswith("_small") else pytest.mark.slow) for name in cases]


@functools.cache
def load_case(name: str) -> golden.Case:
    return golden.load_case(FOLDER / name)


def check(pairs: list[Pair]) -> None:
    """Every difference is within the tolerance of its group; those that are not are named."""
    assert pairs
    assert {pair.tensor: pair.difference for pair in pairs if not pair.within_tolerance} == {}
