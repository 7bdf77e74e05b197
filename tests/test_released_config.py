"""config.json both ways: equal for every released case, and every mistake is one line that names the key."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from navil_jax.config import DEFAULT_SYSTEM_MESSAGE, Config, DataConfig, DecoderConfig, ModelConfig, VisionConfig
from navil_jax.config.flags import load_config
from navil_jax.convert.fields import IMPLIED
from navil_jax.convert.hf_config import (
    check_exportable,
    image_config,
    model_config,
    prompt_config,
    read_config,
    released_config,
    unknown_fields,
)
from navil_jax.errors import UserError

FOLDER = Path(__file__).parent / "golden"
CASES = sorted(file.parent.name for file in FOLDER.glob("*/config.json"))
RECIPES = Path(__file__).parents[1] / "configs"


def whole(released: dict[str, Any]) -> Config:
    """All that a config.json says."""
    data = DataConfig(**prompt_config(released))
    return Config(model=model_config(released), images=image_config(released), data=data)


def put(released: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with a dotted key set."""
    released = copy.deepcopy(released)
    *sections, last = key.split(".")
    node = released
    for section in sections:
        node = node[section]
    node[last] = value
    return released


def without(released: dict[str, Any], *keys: str) -> dict[str, Any]:
    for key in keys:
        released = put(released, key, None)
        *sections, last = key.split(".")
        del (released[sections[0]] if sections else released)[last]
    return released


@pytest.mark.parametrize("name", CASES)
class TestReleased:
    def test_the_kept_original_comes_back_equal(self, name: str) -> None:
        released = read_config(FOLDER / name)
        kept = copy.deepcopy(released)
        assert released_config(whole(released), released) == kept == released

    def test_a_fresh_file_says_the_same(self, name: str) -> None:
        released = read_config(FOLDER / name)
        fresh = json.loads(json.dumps(released_config(whole(released))))
        assert whole(fresh) == whole(released)
        assert unknown_fields(fresh) == unknown_fields(released) == []
        assert fresh["architectures"] == released["architectures"]
        for section in {"llm_config", "vision_config"} & fresh.keys():
            for key, value in fresh[section].items():
                if key not in ("sliding_window", "architectures"):
                    assert released[section][key] == value, key

    def test_changed_fields_alone_are_overwritten(self, name: str) -> None:
        released = read_config(FOLDER / name)
        config = whole(released)
        decoder = dataclasses.replace(config.model.decoder, rope_theta=5e5, rope_scaling="linear", rope_factor=8.0)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder))
        changed = released_config(config, released, dtype="bfloat16")
        prefix = "llm_config." if "llm_config" in released else ""
        expected = put(released, f"{prefix}rope_theta", 5e5)
        expected = put(expected, f"{prefix}rope_scaling", {"type": "linear", "factor": 8.0})
        assert changed == {**expected, "torch_dtype": "bfloat16"}
        assert whole(changed) == config


@pytest.mark.parametrize("recipe", ["navil_2b.py", "navil_9b.py"])
def test_a_recipe_makes_a_file_that_says_all_of_it(recipe: str) -> None:
    config = load_config(RECIPES / recipe)
    fresh = released_config(config, dtype="bfloat16")
    assert model_config(fresh, config.model.special_token_ids) == config.model
    assert image_config(fresh) == dataclasses.replace(config.images, multiscale=True)  # no file says so
    assert prompt_config(fresh) == {"template": config.data.template, "system_message": ""}
    assert (fresh["model_type"], fresh["torch_dtype"]) == ("navil_chat", "bfloat16")
    assert released_config(config, fresh) == fresh


def test_a_file_of_another_architecture_is_no_base() -> None:
    config = whole(read_config(FOLDER / "internlm2_small"))
    for other in ("text_only_internlm2", "qwen3_small"):
        assert released_config(config, read_config(FOLDER / other)) == released_config(config)


@given(
    vision=st.none()
    | st.builds(
        VisionConfig,
        depth=st.integers(1, 50),
        width=st.just(48),
        num_heads=st.sampled_from([2, 4]),
        norm=st.sampled_from(["layer_norm", "rms_norm"]),
        qkv_bias=st.booleans(),
        full_attention_layers=st.none() | st.lists(st.integers(0, 9)).map(tuple),
        window_size=st.integers(1, 9).map(lambda n: 2 * n),
    ),
    family=st.sampled_from(["internlm2", "qwen3"]),
    kv_heads=st.sampled_from([1, 2, 4]),
    rope=st.sampled_from([("none", 1.0), ("linear", 1.5), ("dynamic", 2.0)]),
    tie=st.booleans(),
    bias=st.booleans(),
    pad=st.none() | st.integers(0, 9),
    message=st.text(),
)
def test_any_model_comes_back(vision, family, kv_heads, rope, tie, bias, pad, message) -> None:
    decoder = DecoderConfig(
        family=family,
        width=64,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=24 if family == "qwen3" else 16,
        rope_scaling=rope[0],
        rope_factor=rope[1],
        attention_bias=bias,
        attention_experts=vision is not None,
        ffn_experts=vision is not None,
        tie_embeddings=tie,
        pad_token_id=pad,
        **IMPLIED[family],
    )
    model = ModelConfig(vision=vision, decoder=decoder, special_token_ids=())
    data = DataConfig(template=f"{family}-chat", system_message=message if vision else "")
    config = Config(model=model, data=data)
    assert whole(json.loads(json.dumps(released_config(config)))) == config


def test_tied_embeddings_are_those_of_the_language_model() -> None:
    """At the top of a NaViL's config the key says nothing: the base class has it true by default."""
    released = read_config(FOLDER / "qwen3_small")
    for top in (True, False):
        config = put(released, "tie_word_embeddings", top)
        assert not model_config(config).decoder.tie_embeddings
        assert model_config(put(config, "llm_config.tie_word_embeddings", True)).decoder.tie_embeddings
        assert released_config(whole(config), config) == config
        assert unknown_fields(config) == []
    assert model_config(read_config(FOLDER / "text_only_qwen3")).decoder.tie_embeddings


def test_absent_keys_stand_for_the_released_defaults() -> None:
    released = read_config(FOLDER / "internlm2_small")
    released = put(released, "llm_config.num_key_value_heads", None)
    released = without(released, "system_message", "llm_config.rope_scaling", "vision_config.fullatt_block_indexes")
    config = whole(released)
    assert config.data.system_message == DEFAULT_SYSTEM_MESSAGE
    assert config.model.decoder.num_kv_heads == config.model.decoder.num_heads
    assert config.model.decoder.rope_scaling == "none"
    assert config.model.vision.full_attention_layers is None
    assert released_config(config, released) == released


def test_unknown_fields_are_told() -> None:
    released = read_config(FOLDER / "internlm2_small")
    for key in ("llm_config.sparse_attention", "new_trick", "vision_config.window_order", "llm_config.qkv_bias"):
        released = put(released, key, 1)
    keys = ["new_trick", "vision_config.window_order", "llm_config.qkv_bias", "llm_config.sparse_attention"]
    assert unknown_fields(released) == keys
    assert unknown_fields(put(read_config(FOLDER / "text_only_qwen3"), "sparse", 1)) == ["sparse"]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("vision_config.qk_normalization", True, "vision_config.qk_normalization = true (supported: false)"),
        ("vision_config.hidden_act", "relu", 'vision_config.hidden_act = "relu" (supported: "gelu")'),
        ("vision_config.norm_type", "batch", "supported: layer_norm, rms_norm"),
        ("vision_config.hidden_size", "48", 'vision_config.hidden_size = "48" (an integer'),
        ("vision_config.fullatt_block_indexes", 3, "a list of layer numbers or null"),
        ("vision_config.num_attention_heads", 5, "width 48 is not a multiple of 5"),
        ("llm_config.hidden_act", "gelu", 'llm_config.hidden_act = "gelu" (supported: "silu")'),
        ("llm_config.rope_scaling", {"type": "yarn", "factor": 2.0}, "llm_config.rope_scaling = {"),
        ("llm_config.rope_scaling", {"type": "linear", "factor": 0.5}, "a factor of at least 1"),
        ("llm_config.rope_scaling", {"type": "linear", "factor": 2.0, "low": 1}, "and nothing else"),
        ("llm_config.rope_theta", float("nan"), "llm_config.rope_theta = NaN (a number"),
        ("llm_config.bias", 1, "llm_config.bias = 1 (true or false"),
        ("llm_config.vocab_size", -1, "llm_config.vocab_size = -1 (an integer of at least 1"),
        ("llm_config.num_attention_heads", 7, "no multiple of 7 heads"),
        ("llm_config.num_key_value_heads", 3, "num_kv_heads = 3"),
        ("template", "vicuna", 'template = "vicuna" (supported: internlm2-chat, qwen3-chat)'),
        ("anyres_image_size", False, "anyres_image_size = false (supported: true)"),
        ("downsample_ratio", 0.3, "downsample_ratio = 0.3 (one over a whole number"),
    ],
)
def test_settings_that_cannot_be_computed_are_named(key: str, value: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        model_config(put(read_config(FOLDER / "internlm2_small"), key, value), file="here/config.json")
    assert str(error.value).startswith("here/config.json: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_sliding_window_is_refused() -> None:
    with pytest.raises(UserError, match="use_sliding_window = true"):
        model_config(put(read_config(FOLDER / "text_only_qwen3"), "use_sliding_window", True))


def test_missing_and_wrong_keys_are_listed_together() -> None:
    needed = ("min_dynamic_patch", "vision_config.qk_normalization", "llm_config.hidden_size", "llm_config.bias")
    released = without(read_config(FOLDER / "internlm2_small"), *needed)
    with pytest.raises(UserError) as error:
        model_config(put(released, "llm_config.hidden_act", "relu"), file="here/config.json")
    assert f"here/config.json: missing: {', '.join(needed)}; not supported: llm_config.hidden_act" in str(error.value)


@pytest.mark.parametrize(
    ("released", "said"),
    [
        ({}, "architectures [] of model_type None"),
        ({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}, "'llava' is not supported"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "Qwen3ForCausalLM (qwen3)"),
        ({"model_type": "internlm2", "architectures": ["InternLM2ForRewardModel"]}, "InternLM2ForRewardModel"),
        ({"model_type": "internvl_chat", "llm_config": {}, "vision_config": {}}, "internvl_chat"),
        ({"model_type": "navil_chat", "llm_config": {}}, "vision_config is missing"),
        (
            {"model_type": "navil_chat", "llm_config": {"model_type": "internlm2"}, "vision_config": {}},
            "InternLM2VEForCausalLM (internlm2)",
        ),
    ],
)
def test_other_architectures(released: dict[str, Any], said: str) -> None:
    for read in (model_config, image_config, prompt_config, unknown_fields):
        with pytest.raises(UserError) as error:
            read(released, file="here/config.json")
        assert "here/config.json: " in str(error.value)
        assert said in str(error.value)
        assert "\n" not in str(error.value)


def test_broken_files(tmp_path: Path) -> None:
    for content, said in (("{\n1", "line 2: not valid JSON"), ("[]", "not a JSON object"), (b"\xff\xfe", "text file")):
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=said):
            read_config(tmp_path)


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("vision", {"window_order": False}, "model.vision.window_order = False: the released code always"),
        ("vision", {"rope_theta": 5000.0}, "model.vision.rope_theta"),
        ("vision", {"merge_size": 4}, "2x2"),
        ("decoder", {"attention_experts": False}, "model.decoder.attention_experts = False"),
        ("decoder", {"ffn_experts": False}, "model.decoder.ffn_experts = False"),
        ("decoder", {"serial_visual_output": False}, "internlm2 always has True"),
        ("decoder", {"qk_norm": True}, "model.decoder.qk_norm = True: internlm2 always has False"),
        ("decoder", {"head_dim": 32}, "model.decoder.head_dim = 32"),
    ],
)
def test_models_that_the_released_layout_lacks(part: str, changes: dict[str, Any], said: str) -> None:
    config = whole(read_config(FOLDER / "internlm2_small"))
    check_exportable(config)
    changed = dataclasses.replace(getattr(config.model, part), **changes)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **{part: changed}))
    for refuse in (check_exportable, released_config):
        with pytest.raises(UserError) as error:
            refuse(config)
        assert said in str(error.value)


def test_a_language_model_has_no_experts() -> None:
    config = whole(read_config(FOLDER / "text_only_qwen3"))
    decoder = dataclasses.replace(config.model.decoder, ffn_experts=True)
    with pytest.raises(UserError, match="without vision"):
        check_exportable(dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder)))
