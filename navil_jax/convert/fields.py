"""Tables of config.json in the Hugging Face (hf) format: what each key stands for, or which values are supported.

A NaViL's file has keys of its own and the sections `vision_config` and `llm_config`; a language model's file is flat.
What all language models share is here, what is particular to one in `families`. `hf_config` reads and writes by these
tables (released behaviour: config files; golden configs hold every key).
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

from navil_jax.config import DEFAULT_SYSTEM_MESSAGE, DataConfig, ImageConfig, VisionConfig

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
      otherwise: gives the value from the section's other keys where this one is missing or null.
    """

    key: str
    names: tuple[str, ...]
    read: Callable[[Any], tuple]
    write: Callable[..., Any]
    missing: Any = NEEDED
    otherwise: Callable[[Mapping[str, Any]], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Constant:
    """A key that no field stands for.

    Attributes:
      key: in its section of config.json.
      value: what a file of this project has.
      supported: the values that can be computed; empty: it has no effect on what is computed, or `check` says.
      needed: its absence stands for another value than `value`.
      check: raises `ValueError` that says what is supported.
      written: whether a file of this project has it.
    """

    key: str
    value: Any
    supported: tuple = ()
    needed: bool = False
    check: Callable[[Any], None] | None = None
    written: bool = True


def _integer(value: Any, least: int = 0, most: int = 2**31 - 1) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"an integer of at least {least} is needed")
    if value > most:
        raise ValueError(f"more than {most:,}")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise ValueError("a number above 0 is needed")
    return float(value)


def boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("true or false is needed")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError("a text is needed")
    return value


def _as_many_as_heads(values: Mapping[str, Any]) -> Any:
    return values.get("num_attention_heads", NEEDED)


def _message(value: Any) -> str:
    return DEFAULT_SYSTEM_MESSAGE if value is None else _text(value)


def _id_or_null(value: Any) -> int | None:
    return None if value is None else _integer(value)


def _choice(value: Any, supported: tuple[str, ...]) -> str:
    if value not in supported:
        raise ValueError(f"supported: {', '.join(supported)}")
    return value


def _of_navil(value: Any) -> None:
    if value and not (isinstance(value, list) and str(value[0]).startswith("NaViL")):
        raise ValueError("supported: null or NaViL")


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


def _scales(value: Any) -> tuple[bool, float]:
    """Whether images are packed in several scales, and the factor; the released preprocessing takes 0 for one scale."""
    one = type(value) in (int, float) and value == 0
    return (False, ImageConfig.scale_factor) if one else (True, _number(value))


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
    numeric = isinstance(factor, int | float) and not isinstance(factor, bool)
    if kind not in ROPE_KINDS or factor is None or not numeric or not 1 <= factor < math.inf:
        raise ValueError(supported)
    return kind, float(factor)


def _rope_parameters(value: Any) -> tuple[float, str, float]:
    """Base, kind and factor."""
    if type(value) is not dict or "rope_theta" not in value:
        raise ValueError("an object with rope_theta is needed")
    return _number(value["rope_theta"]), *_rope({key: value[key] for key in value if key != "rope_theta"})


def field(key: str, name: str, read: Callable[[Any], Any], write: Callable = lambda value: value, **more: Any) -> Field:
    """A key that is one field."""
    return Field(key, (name,), lambda value: (read(value),), write, **more)


def one_bias(key: str, missing: Any = NEEDED) -> Field:
    """A key that says of all attention projections at once whether they have a bias."""
    names = ("decoder.qkv_bias", "decoder.out_bias")
    return Field(key, names, lambda value: (boolean(value),) * 2, lambda qkv, out: qkv and out, missing)


size = functools.partial(_integer, least=1)
layers = functools.partial(_integer, least=1, most=10_000)
_template = functools.partial(_choice, supported=typing.get_args(typing.get_type_hints(DataConfig)["template"]))
_norm = functools.partial(_choice, supported=typing.get_args(typing.get_type_hints(VisionConfig)["norm"]))

NAVIL = (
    Constant("architectures", ["NaViL"], check=_of_navil),
    Constant(
        "auto_map",
        {
            "AutoConfig": "configuration_navil_chat.NaViLChatConfig",
            **dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), "modeling_navil_chat.NaViL"),
        },
    ),
    Constant("model_type", "navil_chat", supported=("navil_chat",), needed=True),
    field("downsample_ratio", "vision.merge_size", _merge_size, lambda side: 1 / side),
    field("min_dynamic_patch", "images.min_patches", size),
    field("max_dynamic_patch", "images.max_patches", size),
    Field(
        "scale_downsample_ratio",
        ("images.multiscale", "images.scale_factor"),
        _scales,
        lambda several, factor: factor if several else 0.0,
    ),
    field("template", "data.template", _template),
    field("system_message", "data.system_message", _message, missing=None),
    Constant("anyres_image_size", True, supported=(True,)),
    Constant("force_image_size", None),
    Constant("pad2square", False),
    Constant("ps_version", "v1"),
    Constant("select_layer", -1),
    Constant("use_backbone_lora", 0),
    Constant("use_llm_lora", 0),
)

VISION = (
    Constant("model_type", "navil_vit", supported=("navil_vit",)),
    field("num_hidden_layers", "vision.depth", layers),
    field("hidden_size", "vision.width", size),
    field("intermediate_size", "vision.mlp_dim", size),
    field("num_attention_heads", "vision.num_heads", size),
    field("patch_size", "vision.patch_size", size),
    field("norm_type", "vision.norm", _norm),
    field("layer_norm_eps", "vision.norm_eps", _number),
    field("qkv_bias", "vision.qkv_bias", boolean),
    field(
        "fullatt_block_indexes",
        "vision.full_attention_layers",
        _layers,
        lambda layers: None if layers is None else list(layers),
        missing=None,
    ),
    field("window_size", "vision.window_size", size),
    field("initializer_factor", "vision.layer_scale_init", _number, missing=0.1),
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

DECODER = (
    field("num_hidden_layers", "decoder.depth", layers),
    field("hidden_size", "decoder.width", size),
    field("intermediate_size", "decoder.mlp_dim", size),
    field("num_attention_heads", "decoder.num_heads", size),
    field("num_key_value_heads", "decoder.num_kv_heads", size, otherwise=_as_many_as_heads),
    field("vocab_size", "decoder.vocab_size", size),
    field("rms_norm_eps", "decoder.norm_eps", _number),
    field("max_position_embeddings", "decoder.max_positions", size),
    field("tie_word_embeddings", "decoder.tie_embeddings", boolean, missing=False),
    field("pad_token_id", "decoder.pad_token_id", _id_or_null, missing=None),
    Constant("hidden_act", "silu", supported=("silu",)),
    Constant("initializer_range", 0.02),
    Constant("use_cache", True),
)

# The rotation of a decoder, in a file of this project and of the transformers library before version 5.
ROPE = (
    field("rope_theta", "decoder.rope_theta", _number),
    Field(
        "rope_scaling",
        ("decoder.rope_scaling", "decoder.rope_factor"),
        _rope,
        lambda kind, factor: None if kind == "none" else {"type": kind, "factor": factor},
        missing=None,
    ),
)
# The same in a file of version 5 and later.
ROPE_PARAMETERS = (
    Field(
        "rope_parameters",
        ("decoder.rope_theta", "decoder.rope_scaling", "decoder.rope_factor"),
        _rope_parameters,
        lambda theta, kind, factor: {
            "rope_theta": theta,
            **({"rope_type": "default"} if kind == "none" else {"rope_type": kind, "factor": factor}),
        },
    ),
)

# Of any section: what is computed, and in what the weights are stored; a key that says another thing is refused.
WEIGHTS = ("quantization_config", "sliding_window", "torch_dtype", "dtype")
DTYPES = ("float32", "float16", "bfloat16", "float64", "auto")

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
