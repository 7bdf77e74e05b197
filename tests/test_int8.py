"""Matrices in 8 bits: how near they are, what they serve, and where they lie."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import computed, load_case
from hypothesis import given, settings
from hypothesis import strategies as st
from made_assistant import CONFIG, MODEL, TOKENIZER, random_params
from made_runs import copy_case

from navil_jax.chat import main as chat
from navil_jax.config import MeshConfig
from navil_jax.generate.assistant import Assistant
from navil_jax.generate.engine import Engine
from navil_jax.generate.programs import Programs
from navil_jax.generate.sampling import Sampler
from navil_jax.model import params as model_params
from navil_jax.model.int8 import Int8, int8_product, rounded
from navil_jax.model.linear import product
from navil_jax.sharding import make_mesh


@settings(max_examples=30, deadline=None)
@given(
    inputs=st.lists(st.integers(1, 6), min_size=1, max_size=2),
    outputs=st.lists(st.integers(1, 6), min_size=1, max_size=2),
    layers=st.integers(0, 2),
    size=st.sampled_from([0.0, 1e-6, 1.0, 1e6]),
)
def test_a_rounded_kernel_is_off_by_half_a_step_at_most(
    inputs: list[int], outputs: list[int], layers: int, size: float
):
    shape = (*([layers] if layers else []), *inputs, *outputs)
    kernel = size * jax.random.normal(jax.random.key(len(shape)), shape)
    found = rounded(kernel, len(inputs), bool(layers))
    assert found.values.dtype == jnp.int8
    steps = np.broadcast_to(found.scale, shape)
    assert (np.abs(found.values * found.scale - kernel) <= steps * 0.501).all()
    if not layers:
        x = jax.random.normal(jax.random.key(1), (3, *inputs))
        expected = product(x, found.values * found.scale, len(inputs))
        np.testing.assert_allclose(int8_product(x, found, len(inputs)), expected, rtol=1e-5, atol=1e-5 * size)


def logits_of(programs: Programs, prompts: list) -> np.ndarray:
    """After the prompt, and after a token more."""
    first, cache = programs.prefill(prompts, 8)
    second, _ = programs.decode(jnp.zeros(len(first), jnp.int32), cache)
    return np.stack([first, second])[:, : len(prompts)]


@pytest.mark.parametrize("name", computed(("internlm2_small", "qwen3_small")))
def test_logits_stay_near_and_the_matrices_of_all_experts_take_a_quarter(name: str):
    case = load_case(name)
    prompts = case.samples("inputs", images=True)
    exact = logits_of(Programs(case.config, case.params), prompts)
    params = model_params.with_int8(case.config, copy.deepcopy(case.params))
    found = logits_of(Programs(case.config, params), prompts)
    assert 0 < np.linalg.norm(found - exact) < 0.03 * np.linalg.norm(exact)
    flat = model_params.flatten(params)
    assert {name for name, value in flat.items() if isinstance(value, Int8)} == {
        name for name in flat if name.startswith("decoder/layers/") and name.endswith("/kernel")
    }
    before = model_params.flatten(case.params)["decoder/layers/ffn/visual/down/kernel"]
    after = flat["decoder/layers/ffn/visual/down/kernel"]
    assert after.values.nbytes * 4 == before.nbytes


@pytest.mark.parametrize("axes", [{"fsdp": 2}, {"tensor": 2}])
def test_a_mesh_answers_as_one_device(axes: dict[str, int]):
    model = dataclasses.replace(MODEL, compute_dtype="float32")
    params = model_params.with_int8(model, copy.deepcopy(random_params()))
    asked = Assistant(CONFIG, TOKENIZER, Engine(model, None))
    prompts = [asked.prompt((), text, []) for text in ("Hi", "Which shape is blue?")]
    answers = [
        Engine(model, params, mesh, slots=2).generate(prompts, Sampler(), 6, asked.stop_id)
        for mesh in (None, make_mesh(MeshConfig(**axes), jax.devices()[:2]))
    ]
    assert answers[0] == answers[1]


def test_chat_takes_the_flag(tmp_path, capsys):
    folder = copy_case("internlm2_small", tmp_path / "model")
    given_ = ["--checkpoint", str(folder), "--prompt", "Hi", "--max-new-tokens", "4"]
    assert chat([*given_, "--int8"]) == 0
    assert capsys.readouterr().out.strip()
