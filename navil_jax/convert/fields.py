"""The one table of config.json's keys: what each stands for in our configs, or which values can be computed at all.

A NaViL's file has keys of its own and the sections `vision_config` and `llm_config`; a language model's file is flat.
`released_config` reads and writes by this table (released behaviour: config files; golden configs hold every key).
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable
from typing import Any

from navil_jax.config import DEFAULT_SYSTEM_MESSAGE, DataConfig, VisionConfig

NEEDED = object()  # the key must be there
ROPE_KINDS = ("linear", "dynamic")


@dataclasses.dataclass(frozen=True)
class Field:
    """A key that is a field of a config, or two.

    Attributes:
      key: in its section of config.json.
      names: of the fields, `part.field` with the parts vision, decoder, images and data.
      read: value of the key -> values of the fields. Raises `ValueError` that says what is needed or supported.
      write: values of the fields -> value of the key, as a file of this project has it.
      missing: what the key's absence stands for, or `NEEDED`.
      otherwise: the key that stands for this one where it is missing or null.
    """

    key: str
    names: tuple[str, ...]
    read: Callable[[Any], tuple]
    write: Callable[..., Any]
    missing: Any = NEEDED
    otherwise: str = ""


@dataclasses.dataclass(frozen=True)
class Constant:
    """A key that no field stands for.

    Attributes:
      key: in its section of config.json.
      value: what a file of this project has.
      supported: the values that can be computed; empty: it has no effect on what is computed.
      needed: its absence stands for another value than `value`.
    """

    key: str
    value: Any
    supported: tuple = ()
    needed: bool = False


def _integer(value: Any, least: int = 0) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"an integer of at least {least} is needed")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise ValueError("a number above 0 is needed")
    return float(value)


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("true or false is needed")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError("a text is needed")
    return value


def _message(value: Any) -> str:
    return DEFAULT_SYSTEM_MESSAGE if value is None else _text(value)


def _id_or_null(value: Any) -> int | None:
    return None if value is None else _integer(value)


def _choice(value: Any, supported: tuple[str, ...]) -> str:
    if value not in supported:
        raise ValueError(f"supported: {', '.join(supported)}")
    return value


def _layers(value: Any) -> tuple[int, ...] | None:
    """null: every layer has full attention; a list: these have, the others have windows."""
    if value is None:
        return None
    if type(value) is not list or any(type(i) is not int or i < 0 for i in value):
        raise ValueError("a list of layer numbers or null is needed")
    return tuple(value)


def _merge_size(value: Any) -> int:
    side = 1 / _number(value)
    if side != round(side):
        raise ValueError("one over a whole number is needed")
    return round(side)


def _rope(value: Any) -> tuple[str, float]:
    """Kind and factor of the scaling of positions."""
    if value is None:
        return "none", 1.0
    supported = f"supported: null, or type {' or '.join(ROPE_KINDS)} with a factor of at least 1 and nothing else"
    if type(value) is not dict or not value.keys() <= {"type", "rope_type", "factor"}:
        raise ValueError(supported)
    kind = value.get("rope_type", value.get("type"))
    if kind == "default":
        return "none", 1.0
    factor = value.get("factor")
    if kind not in ROPE_KINDS or type(factor) not in (int, float) or not 1 <= factor < math.inf:
        raise ValueError(supported)
    return kind, float(factor)


def _field(
    key: str, name: str, read: Callable[[Any], Any], write: Callable = lambda value: value, **more: Any
) -> Field:
    return Field(key, (name,), lambda value: (read(value),), write, **more)


_size = functools.partial(_integer, least=1)
_template = functools.partial(_choice, supported=typing.get_args(typing.get_type_hints(DataConfig)["template"]))
_norm = functools.partial(_choice, supported=typing.get_args(typing.get_type_hints(VisionConfig)["norm"]))

NAVIL = (
    Constant("architectures", ["NaViL"]),
    Constant("auto_map", dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), "modeling_navil_chat.NaViL")),
    Constant("model_type", "navil_chat"),
    _field("downsample_ratio", "vision.merge_size", _merge_size, lambda side: 1 / side),
    _field("min_dynamic_patch", "images.min_patches", _size),
    _field("max_dynamic_patch", "images.max_patches", _size),
    _field("scale_downsample_ratio", "images.scale_factor", _number),
    _field("template", "data.template", _template),
    _field("system_message", "data.system_message", _message, missing=None),
    Constant("anyres_image_size", True, supported=(True,)),
    Constant("force_image_size", None),
    Constant("pad2square", False),
    Constant("ps_version", "v1"),
    Constant("select_layer", -1),
    Constant("use_backbone_lora", 0),
    Constant("use_llm_lora", 0),
)

VISION = (
    Constant("model_type", "navil_vit"),
    _field("num_hidden_layers", "vision.depth", _size),
    _field("hidden_size", "vision.width", _size),
    _field("intermediate_size", "vision.mlp_dim", _size),
    _field("num_attention_heads", "vision.num_heads", _size),
    _field("patch_size", "vision.patch_size", _size),
    _field("norm_type", "vision.norm", _norm),
    _field("layer_norm_eps", "vision.norm_eps", _number),
    _field("qkv_bias", "vision.qkv_bias", _boolean),
    _field(
        "fullatt_block_indexes",
        "vision.full_attention_layers",
        _layers,
        lambda layers: None if layers is None else list(layers),
        missing=None,
    ),
    _field("window_size", "vision.window_size", _size),
    _field("initializer_factor", "vision.layer_scale_init", _number, missing=0.1),
    Constant("qk_normalization", False, supported=(False,), needed=True),  # the released code's default cannot be run
    Constant("hidden_act", "gelu", supported=("gelu",)),
    Constant("downsample_ratio", 0.5),  # that of the section above holds
    Constant("attention_dropout", 0.0),
    Constant("drop_path_rate", 0.0),
    Constant("dropout", 0.0),
    Constant("image_size", 224),
    Constant("initializer_range", 0.02),
    Constant("num_channels", 3),
    Constant("use_flash_attn", False),
)

_DECODER = (
    _field("num_hidden_layers", "decoder.depth", _size),
    _field("hidden_size", "decoder.width", _size),
    _field("intermediate_size", "decoder.mlp_dim", _size),
    _field("num_attention_heads", "decoder.num_heads", _size),
    _field("num_key_value_heads", "decoder.num_kv_heads", _size, otherwise="num_attention_heads"),
    _field("vocab_size", "decoder.vocab_size", _size),
    _field("rms_norm_eps", "decoder.norm_eps", _number),
    _field("rope_theta", "decoder.rope_theta", _number),
    Field(
        "rope_scaling",
        ("decoder.rope_scaling", "decoder.rope_factor"),
        _rope,
        lambda kind, factor: None if kind == "none" else {"type": kind, "factor": factor},
        missing=None,
    ),
    _field("max_position_embeddings", "decoder.max_positions", _size),
    _field("tie_word_embeddings", "decoder.tie_embeddings", _boolean, missing=False),
    _field("pad_token_id", "decoder.pad_token_id", _id_or_null, missing=None),
    Constant("hidden_act", "silu", supported=("silu",)),
    Constant("initializer_range", 0.02),
    Constant("use_cache", True),
)

LANGUAGE = {
    "internlm2": (
        *_DECODER,
        _field("bias", "decoder.attention_bias", _boolean),
        Constant("attn_implementation", "eager"),
        Constant("bos_token_id", 1),
        Constant("eos_token_id", 2),
    ),
    "qwen3": (
        *_DECODER,
        _field("head_dim", "decoder.head_dim", _size),
        _field("attention_bias", "decoder.attention_bias", _boolean, missing=False),
        Constant("attention_dropout", 0.0),
        Constant("use_sliding_window", False, supported=(False,)),
        Constant("sliding_window", None),
    ),
}

# Fields of the decoder that follow from the family.
IMPLIED = {
    "internlm2": {"qk_norm": False, "serial_visual_output": True},
    "qwen3": {"qk_norm": True, "serial_visual_output": False},
}
# Classes without and with visual experts.
ARCHITECTURES = {
    "internlm2": ("InternLM2ForCausalLM", "InternLM2VEForCausalLM"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3VEForCausalLM"),
}
TEMPLATES = {"internlm2": "internlm2-chat", "qwen3": "qwen3-chat"}  # of a language model, whose file names none
INTERNLM2_AUTO_MAP = {
    "AutoConfig": "configuration_internlm2.InternLM2Config",
    "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
}

# Keys of the transformers library's base class, and keys of the sections' classes that nothing reads.
HARMLESS = frozenset(
    """
    _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures auto_map bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label is_decoder
    is_encoder_decoder label2id length_penalty max_length max_window_layers min_length model_type no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_scores pad_token_id
    prefix pretraining_tp problem_type pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id skip_final_norm_weight suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16
    """.split()  # noqa: SIM905
)
