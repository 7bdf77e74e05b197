"""config.json both ways: equal for every released case, and every mistake is one line that names the key."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from golden_cases import TEXT_CASES
from hypothesis import assume, given
from hypothesis import strategies as st

from navil_jax.config import DEFAULT_SYSTEM_MESSAGE, Config, DataConfig, DecoderConfig, ModelConfig, VisionConfig
from navil_jax.config.flags import load_config
from navil_jax.convert.families import FAMILIES
from navil_jax.convert.hf_config import (
    check_exportable,
    image_config,
    model_config,
    prompt_config,
    read_config,
    to_hf_config,
    unknown_fields,
)
from navil_jax.convert.hf_files import other_preprocessing, preprocessor_config
from navil_jax.data.prompt import TEMPLATES
from navil_jax.errors import UserError

FOLDER = Path(__file__).parent / "golden"
CASES = sorted(file.parent.name for file in FOLDER.glob("*/config.json"))
RECIPES = Path(__file__).parents[1] / "configs"


def whole(hf: dict[str, Any]) -> Config:
    """All that a config.json says."""
    data = DataConfig(**prompt_config(hf))
    return Config(model=model_config(hf), images=image_config(hf), data=data)


def put(hf: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with a dotted key set."""
    hf = copy.deepcopy(hf)
    *sections, last = key.split(".")
    node = hf
    for section in sections:
        node = node[section]
    node[last] = value
    return hf


def without(hf: dict[str, Any], *keys: str) -> dict[str, Any]:
    for key in keys:
        hf = put(hf, key, None)
        *sections, last = key.split(".")
        del (hf[sections[0]] if sections else hf)[last]
    return hf


@pytest.mark.parametrize("name", CASES)
class TestReleased:
    def test_the_kept_original_comes_back_equal(self, name: str) -> None:
        hf = read_config(FOLDER / name)
        kept = copy.deepcopy(hf)
        assert to_hf_config(whole(hf), hf) == kept == hf

    def test_a_fresh_file_says_the_same(self, name: str) -> None:
        hf = read_config(FOLDER / name)
        fresh = json.loads(json.dumps(to_hf_config(whole(hf))))
        assert whole(fresh) == whole(hf)
        assert unknown_fields(fresh) == unknown_fields(hf) == []
        assert fresh["architectures"] == hf["architectures"]
        for section in {"llm_config", "vision_config"} & fresh.keys():
            for key, value in fresh[section].items():
                if key not in ("sliding_window", "architectures", "attn_implementation"):
                    assert hf[section][key] == value, key

    def test_changed_fields_alone_are_overwritten(self, name: str) -> None:
        hf = read_config(FOLDER / name)
        config = whole(hf)
        decoder = dataclasses.replace(config.model.decoder, rope_theta=5e5, rope_scaling="linear", rope_factor=8.0)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder))
        changed = to_hf_config(config, hf, dtype="bfloat16")
        prefix = "llm_config." if "llm_config" in hf else ""
        if "rope_parameters" in hf:  # version 5 of the transformers library
            rope = {"rope_theta": 5e5, "rope_type": "linear", "factor": 8.0}
            expected = {**hf, "rope_parameters": rope, "dtype": "bfloat16"}
        else:
            expected = put(hf, f"{prefix}rope_theta", 5e5)
            expected = put(expected, f"{prefix}rope_scaling", {"type": "linear", "factor": 8.0})
            expected["torch_dtype"] = "bfloat16"
        assert changed == expected
        assert whole(changed) == config


@pytest.mark.parametrize("recipe", ["navil_2b.py", "navil_9b.py", "navil_2b_tpu.py", "navil_9b_tpu.py"])
def test_a_recipe_makes_a_file_that_says_all_of_it(recipe: str) -> None:
    config = load_config(RECIPES / recipe)
    fresh = to_hf_config(config, dtype="bfloat16")
    assert model_config(fresh, config.model.special_token_ids) == config.model
    assert image_config(fresh) == config.images
    assert prompt_config(fresh) == {"template": config.data.template, "system_message": ""}
    assert (fresh["model_type"], fresh["torch_dtype"]) == ("navil_chat", "bfloat16")
    assert to_hf_config(config, fresh) == fresh


def test_a_file_of_another_architecture_is_no_base() -> None:
    config = whole(read_config(FOLDER / "internlm2_small"))
    for other in ("text_only_internlm2", "qwen3_small"):
        assert to_hf_config(config, read_config(FOLDER / other)) == to_hf_config(config)


@given(
    vision=st.none()
    | st.builds(
        VisionConfig,
        depth=st.integers(10, 50),  # beyond every full layer
        width=st.just(48),
        num_heads=st.sampled_from([2, 4]),
        norm=st.sampled_from(["layer_norm", "rms_norm"]),
        qkv_bias=st.booleans(),
        full_attention_layers=st.none() | st.lists(st.integers(0, 9)).map(tuple),
        window_size=st.integers(1, 9).map(lambda n: 2 * n),
    ),
    family=st.sampled_from(["internlm2", "qwen2", "qwen3"]),
    kv_heads=st.sampled_from([1, 2, 4]),
    rope=st.sampled_from([("none", 1.0), ("linear", 1.5), ("dynamic", 2.0)]),
    tie=st.booleans(),
    bias=st.booleans(),
    pad=st.none() | st.integers(0, 9),
    message=st.text(),
)
def test_any_model_comes_back(vision, family, kv_heads, rope, tie, bias, pad, message) -> None:
    assume(vision is None or FAMILIES[family].navil_architecture)
    fields = {"qkv_bias": bias, "out_bias": bias, **FAMILIES[family].implied}
    decoder = DecoderConfig(
        family=family,
        width=64,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=16 if family == "internlm2" else 24,
        rope_scaling=rope[0],
        rope_factor=rope[1],
        attention_experts=vision is not None,
        ffn_experts=vision is not None,
        tie_embeddings=tie,
        pad_token_id=pad,
        **fields,
    )
    model = ModelConfig(vision=vision, decoder=decoder, special_token_ids=())
    data = DataConfig(template=FAMILIES[family].template, system_message=message if vision else "")
    config = Config(model=model, data=data)
    assert whole(json.loads(json.dumps(to_hf_config(config)))) == config


def test_tied_embeddings_are_those_of_the_language_model() -> None:
    """At the top of a NaViL's config the key says nothing: the base class has it true by default."""
    hf = read_config(FOLDER / "qwen3_small")
    for top in (True, False):
        config = put(hf, "tie_word_embeddings", top)
        assert not model_config(config).decoder.tie_embeddings
        assert model_config(put(config, "llm_config.tie_word_embeddings", True)).decoder.tie_embeddings
        assert to_hf_config(whole(config), config) == config
        assert unknown_fields(config) == []
    assert model_config(read_config(FOLDER / "text_only_qwen3")).decoder.tie_embeddings


def test_absent_keys_stand_for_the_released_defaults() -> None:
    hf = read_config(FOLDER / "internlm2_small")
    hf = put(hf, "llm_config.num_key_value_heads", None)
    hf = without(hf, "system_message", "llm_config.rope_scaling", "vision_config.fullatt_block_indexes")
    config = whole(hf)
    assert config.data.system_message == DEFAULT_SYSTEM_MESSAGE
    assert config.model.decoder.num_kv_heads == config.model.decoder.num_heads
    assert config.model.decoder.rope_scaling == "none"
    assert config.model.vision.full_attention_layers is None
    assert to_hf_config(config, hf) == hf


def test_unknown_fields_are_told() -> None:
    hf = read_config(FOLDER / "internlm2_small")
    for key in ("llm_config.sparse_attention", "new_trick", "vision_config.window_order", "llm_config.qkv_bias"):
        hf = put(hf, key, 1)
    keys = ["new_trick", "vision_config.window_order", "llm_config.qkv_bias", "llm_config.sparse_attention"]
    assert unknown_fields(hf) == keys
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


@pytest.mark.parametrize("name", ["text_only_qwen3", "text_only_qwen2"])
def test_a_sliding_window_is_refused(name: str) -> None:
    hf = read_config(FOLDER / name)
    with pytest.raises(UserError, match=r"config\.json: not supported: use_sliding_window = true"):
        model_config(put(hf, "use_sliding_window", True))
    kinds = ["full_attention", "full_attention", "sliding_attention"]
    with pytest.raises(UserError, match=r'json: not supported: layer_types = .*"full_attention" for every layer'):
        model_config(put(hf, "layer_types", kinds))


# The file of Qwen2.5-0.5B as the hub has it.
QWEN2_5 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_golden_folder_of_its_language_model_alone(family: str) -> None:
    assert family in {model_config(read_config(FOLDER / name)).decoder.family for name in TEXT_CASES}
    assert FAMILIES[family].template in TEMPLATES


def test_qwen2_5_has_biases_on_queries_keys_and_values_alone() -> None:
    decoder = model_config(QWEN2_5).decoder
    assert (decoder.qkv_bias, decoder.out_bias, decoder.qk_norm, decoder.tie_embeddings) == (True, False, False, True)
    assert (decoder.head_dim, decoder.rope_theta, decoder.norm_eps) == (64, 1e6, 1e-6)
    assert unknown_fields(QWEN2_5) == []
    assert to_hf_config(whole(QWEN2_5), QWEN2_5) == QWEN2_5
    assert model_config({**QWEN2_5, "head_dim": 128}).decoder.head_dim == 128
    with pytest.raises(UserError, match=r"use_mrope = true \(supported: false"):
        model_config({**QWEN2_5, "use_mrope": True})


@pytest.mark.parametrize("name", ["qwen3_small", "text_only_qwen3", "text_only_internlm2_linear"])
def test_both_ways_to_write_the_rotation_say_the_same(name: str) -> None:
    hf = read_config(FOLDER / name)
    language = hf.get("llm_config", hf)
    scaling = language["rope_scaling"]
    newer = {key: value for key, value in language.items() if key not in ("rope_theta", "rope_scaling")}
    kind = {"rope_type": scaling["type"], "factor": scaling["factor"]} if scaling else {"rope_type": "default"}
    newer["rope_parameters"] = {"rope_theta": language["rope_theta"], **kind}
    newer = {**hf, "llm_config": newer} if "llm_config" in hf else newer
    assert whole(newer) == whole(hf)
    assert unknown_fields(newer) == []
    assert to_hf_config(whole(newer), newer) == newer


def test_missing_and_wrong_keys_are_listed_together() -> None:
    needed = ("min_dynamic_patch", "vision_config.qk_normalization", "llm_config.hidden_size", "llm_config.bias")
    hf = without(read_config(FOLDER / "internlm2_small"), *needed)
    with pytest.raises(UserError) as error:
        model_config(put(hf, "llm_config.hidden_act", "relu"), file="here/config.json")
    assert f"here/config.json: missing: {', '.join(needed)}; not supported: llm_config.hidden_act" in str(error.value)


@pytest.mark.parametrize(
    ("hf", "said"),
    [
        ({}, "architectures [] of model_type None"),
        ({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}, "'llava' is not supported"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "Qwen3ForCausalLM (qwen3)"),
        ({"model_type": "internlm2", "architectures": ["InternLM2ForRewardModel"]}, "InternLM2ForRewardModel"),
        ({"model_type": "internvl_chat", "llm_config": {}, "vision_config": {}}, "internvl_chat"),
        ({"model_type": "navil_chat", "llm_config": {}}, "vision_config is missing"),
        (
            {"model_type": "navil_chat", "llm_config": {"model_type": "internlm2"}, "vision_config": {}},
            "InternLM2VEForCausalLM (internlm2)",
        ),
    ],
)
def test_other_architectures(hf: dict[str, Any], said: str) -> None:
    for read in (model_config, image_config, prompt_config, unknown_fields):
        with pytest.raises(UserError) as error:
            read(hf, file="here/config.json")
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
    for refuse in (check_exportable, to_hf_config):
        with pytest.raises(UserError) as error:
            refuse(config)
        assert said in str(error.value)


@pytest.mark.parametrize("name", ["text_only_internlm2", "text_only_qwen3"])
def test_one_key_cannot_say_that_some_projections_have_biases(name: str) -> None:
    config = whole(read_config(FOLDER / name))
    decoder = dataclasses.replace(config.model.decoder, qkv_bias=True, out_bias=False)
    with pytest.raises(UserError, match=r"model\.decoder\.out_bias = False: .* all attention projections at once"):
        to_hf_config(dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder)))


def test_the_release_has_no_navil_with_qwen2() -> None:
    config = whole(read_config(FOLDER / "qwen3_small"))
    fields = {"family": "qwen2", **FAMILIES["qwen2"].implied}
    decoder = dataclasses.replace(config.model.decoder, **fields)
    with pytest.raises(UserError) as error:
        to_hf_config(dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder)))
    said = "model.decoder.family = qwen2: the release has no NaViL with this decoder, only with internlm2 and qwen3"
    assert str(error.value).endswith(f": {said}")


def test_a_family_that_is_not_known_is_named() -> None:
    config = Config(model=ModelConfig(decoder=DecoderConfig(family="llama")))
    with pytest.raises(UserError, match=r"config\.model\.decoder\.family: 'llama' is none of internlm2, qwen2, qwen3"):
        check_exportable(config)


def test_a_language_model_has_no_experts() -> None:
    config = whole(read_config(FOLDER / "text_only_qwen3"))
    decoder = dataclasses.replace(config.model.decoder, ffn_experts=True)
    with pytest.raises(UserError, match="without vision"):
        check_exportable(dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama9"),
        ("architectures", ["LlamaForCausalLM"]),
        ("vision_config.model_type", "siglip"),
        ("torch_dtype", "int4"),
        ("llm_config.torch_dtype", 4),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("llm_config.quantization_config", {"quant_method": "awq"}),
        ("llm_config.sliding_window", 128),
    ],
)
def test_another_model_or_other_weights_are_refused(key: str, value: Any) -> None:
    hf = read_config(FOLDER / "internlm2_small")
    with pytest.raises(UserError, match=rf"not supported: {key} = "):
        model_config(put(hf, key, value))
    with pytest.raises(UserError, match="missing: model_type"):
        model_config(without(hf, "model_type"))


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_a_preprocessor_config_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(UserError, match=r"preprocessor_config\.json: not "):
        other_preprocessing(tmp_path, whole(read_config(FOLDER / "internlm2_small")))


def test_a_preprocessor_config_that_contradicts_the_model_is_told(tmp_path: Path) -> None:
    config = whole(read_config(FOLDER / "internlm2_small"))
    said = preprocessor_config(config)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    assert other_preprocessing(tmp_path, config) == []
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**said, "patch_size": 99, "image_mean": [0, 0, 0]}))
    assert [text.split()[1] for text in other_preprocessing(tmp_path, config)] == ["patch_size", "image_mean"]
