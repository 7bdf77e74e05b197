"""config.json in the Hugging Face (hf) format <-> our configs: of a NaViL, or of a language model of a known family.

The keys stand in the tables of `fields` and `families`.
"""

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from navil_jax.config import Config, DecoderConfig, ImageConfig, ModelConfig, VisionConfig, validate
from navil_jax.convert import families
from navil_jax.convert.families import FAMILIES
from navil_jax.convert.family import Family
from navil_jax.convert.fields import (
    DTYPES,
    HARMLESS,
    NAVIL,
    NEEDED,
    ROPE,
    ROPE_PARAMETERS,
    VISION,
    WEIGHTS,
    Constant,
    Field,
)
from navil_jax.convert.stored import parsed
from navil_jax.errors import UserError

FILE = "config.json"
Section = tuple[str, dict[str, Any], tuple[Field | Constant, ...]]  # prefix of its dotted keys, its values, its table


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder.

    Raises:
      UserError: it is missing or no JSON object.
    """
    file = folder / FILE
    try:
        hf = parsed(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{file}: not found; give the folder of a checkpoint") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: line {error.lineno}: not valid JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a text file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not isinstance(hf, dict):
        raise UserError(f"{file}: not a JSON object; give the folder of a checkpoint")
    return hf


def model_config(
    hf: dict[str, Any], special_token_ids: tuple[int, ...] = (), file: str | Path = FILE, **settings: Any
) -> ModelConfig:
    """The model that a config.json describes.

    Args:
      hf: the parsed file; a NaViL config has vision_config and llm_config, a language model is flat.
      special_token_ids: from the checkpoint's tokenizer, in the order of SPECIAL_TOKENS; empty without vision.
      file: what errors call it.
      settings: further fields of ModelConfig (dtypes, remat, attention).

    Raises:
      UserError: another architecture; or, listed together, the missing keys and those that cannot be computed.
    """
    values, family, navil = _read(hf, file), _family(hf, file), _is_navil(hf)
    decoder: dict[str, Any] = {"family": family.name, "attention_experts": navil, "ffn_experts": navil}
    decoder |= {**family.implied, **values.get("decoder", {})}
    if decoder["width"] % decoder["num_heads"] and "head_dim" not in decoder:
        raise UserError(f"{file}: hidden_size {decoder['width']} is no multiple of {decoder['num_heads']} heads")
    decoder.setdefault("head_dim", decoder["width"] // decoder["num_heads"])
    model = ModelConfig(
        vision=VisionConfig(**values["vision"]) if navil else None,
        decoder=DecoderConfig(**decoder),
        special_token_ids=special_token_ids if navil else (),
        **settings,
    )
    try:
        validate(Config(model=model))
    except UserError as error:
        raise UserError(f"{file}: what it says gives an impossible model: {error}") from error
    return model


def image_config(hf: dict[str, Any], file: str | Path = FILE) -> ImageConfig:
    """How the checkpoint prepares images; the defaults for a language model. Errors as in `model_config`."""
    return ImageConfig(**_read(hf, file).get("images", {}))


def prompt_config(hf: dict[str, Any], file: str | Path = FILE) -> dict[str, Any]:
    """`template` and `system_message` of `DataConfig`; the former alone for a language model.

    Errors as in `model_config`.
    """
    return _read(hf, file).get("data", {"template": _family(hf, file).template})


def unknown_fields(hf: dict[str, Any], file: str | Path = FILE) -> list[str]:
    """Dotted keys that neither act on what is computed nor are known to be harmless; an import tells of them.

    Example: {"model_type": "qwen3", ..., "new_trick": true} -> ["new_trick"]
    """
    unknown = []
    for prefix, values, table in _sections(hf, file):
        known = {entry.key for entry in table} | HARMLESS
        if _is_navil(hf) and not prefix:
            known |= {"vision_config", "llm_config"}
        unknown += [prefix + key for key in sorted(values.keys() - known)]
    return unknown


def to_hf_config(config: Config, base: dict[str, Any] | None = None, dtype: str | None = None) -> dict[str, Any]:
    """The config.json of a model that was trained or imported here. The inverse of the readers above.

    Args:
      config: model, images, and the template and system message of data.
      base: the config.json that the model was imported from. Only what differs from it is changed, so an unchanged
        model has an equal file. One of another architecture is left aside.
      dtype: of the exported tensors; None: that of `base`, or else of frozen parameters.

    Raises:
      UserError: the model is none that the release and its hf format have, see `check_exportable`.
    """
    check_exportable(config)
    hf = _fresh(config)
    if base is not None and _kind(base) == _kind(hf):
        hf = copy.deepcopy(base)
    else:
        base = None
    for _, values, table in _sections(hf, FILE):
        for field in table:
            if isinstance(field, Field):
                wanted = tuple(_get(config, name) for name in field.names)
                if base is None or _said(field, values) != wanted:
                    values[field.key] = field.write(*wanted)
    if dtype or base is None:
        for prefix, values, _ in _sections(hf, FILE):
            for key in {"dtype", "torch_dtype"} & values.keys():
                values[key] = values[key] and (dtype or config.model.param_dtype)
            if not (prefix or values.get("dtype")):
                values["torch_dtype"] = dtype or config.model.param_dtype
    return hf


def check_exportable(config: Config) -> None:
    """Refuses a model that the released code cannot compute.

    Raises:
      UserError: lists the fields of the config, each with the reason.
    """
    decoder, vision = config.model.decoder, config.model.vision
    family = families.find(decoder.family)
    problems = []

    def require(good: bool, key: str, why: str) -> None:
        if not good:
            problems.append(f"model.{key} = {_get(config, key)}: {why}")

    for key in ("decoder.attention_experts", "decoder.ffn_experts"):
        if vision is None:
            require(not _get(config, key), key, "a language model without vision has no visual experts")
        else:
            require(_get(config, key), key, "the released model always has visual experts")
    for name, value in family.implied.items():
        if name != "serial_visual_output" or decoder.attention_experts:
            require(getattr(decoder, name) == value, f"decoder.{name}", f"{family.name} always has {value}")
    for name, why in family.limits(decoder):
        require(False, f"decoder.{name}", why)
    if vision is not None:
        known = " and ".join(family.name for family in FAMILIES.values() if family.navil_architecture)
        why = f"the release has no NaViL with this decoder, only with {known}"
        require(bool(family.navil_architecture), "decoder.family", why)
        require(vision.window_order, "vision.window_order", "the released code always puts patches in window order")
        require(vision.merge_size == 2, "vision.merge_size", "the released code joins 2x2 patches")
        default = VisionConfig.rope_theta
        require(vision.rope_theta == default, "vision.rope_theta", f"the released code has {default}")
    if problems:
        raise UserError(f"the model cannot be exported to the Hugging Face format: {'; '.join(problems)}")


def _is_navil(hf: dict[str, Any]) -> bool:
    names = hf.get("architectures") or [""]
    return hf.get("model_type") == "navil_chat" or str(names[0]).startswith("NaViL")


def _family(hf: dict[str, Any], file: str | Path) -> Family:
    """The family of the language model, after a check that the architecture is one that can be computed."""
    navil = _is_navil(hf)
    if navil:
        for key in ("vision_config", "llm_config"):
            if not isinstance(hf.get(key), dict):
                raise UserError(f"{file}: {key} is missing; a NaViL config has a section of this name")
    prefix, language = ("llm_config.", hf["llm_config"]) if navil else ("", hf)
    names, kind = language.get("architectures") or [], language.get("model_type")
    classes = {f.name: f.navil_architecture if navil else f.architecture for f in FAMILIES.values()}
    wanted = {name: architecture for name, architecture in classes.items() if architecture}
    if kind not in wanted or ((names or navil) and wanted[kind] not in names):
        supported = ", ".join(f"{architecture} ({name})" for name, architecture in wanted.items())
        raise UserError(
            f"{file}: {prefix}architectures {names} of {prefix}model_type {kind!r} is not supported; "
            f"{'a NaViL' if navil else 'a language model, where it is no NaViL,'} has {supported}"
        )
    return FAMILIES[kind]


def _kind(hf: dict[str, Any]) -> tuple[bool, str]:
    return _is_navil(hf), _family(hf, FILE).name


def _sections(hf: dict[str, Any], file: str | Path) -> Iterator[Section]:
    fields = _family(hf, file).fields
    language = hf["llm_config"] if _is_navil(hf) else hf
    table = (*fields, *(ROPE if language.get("rope_parameters") is None else ROPE_PARAMETERS))
    if not _is_navil(hf):
        yield "", hf, table
        return
    yield "", hf, NAVIL
    yield "vision_config.", hf["vision_config"], VISION
    yield "llm_config.", language, table


def _said(field: Field, values: dict[str, Any]) -> tuple:
    """What a section says of a field. Raises `KeyError` if it is needed and missing, `ValueError` if it is wrong."""
    value = values.get(field.key, field.missing)
    if field.otherwise and value in (NEEDED, None):
        value = field.otherwise(values)
    if value is NEEDED:
        raise KeyError(field.key)
    return field.read(value)


def _read(hf: dict[str, Any], file: str | Path) -> dict[str, dict[str, Any]]:
    """Part of the config -> field -> value, of all sections."""
    parts: dict[str, dict[str, Any]] = {}
    missing, wrong = [], []
    for prefix, values, table in _sections(hf, file):
        for entry in table:
            try:
                if isinstance(entry, Field):
                    for name, value in zip(entry.names, _said(entry, values), strict=True):
                        part, _, field = name.partition(".")
                        parts.setdefault(part, {})[field] = value
                else:
                    _check(entry, values)
            except KeyError:
                missing.append(prefix + entry.key)
            except ValueError as error:
                wrong.append(f"{prefix}{entry.key} = {json.dumps(values.get(entry.key))} ({error})")
        wrong += [f"{prefix}{key} = {json.dumps(values[key])[:80]} ({why})" for key, why in _of_weights(values, table)]
        wrong += [f"{prefix}{key} beside another one in rope_parameters" for key in _contradictions(values, table)]
    if missing or wrong:
        lists = {"missing": ", ".join(missing), "not supported": "; ".join(wrong)}
        raise UserError(f"{file}: {'; '.join(f'{what}: {keys}' for what, keys in lists.items() if keys)}")
    return parts


def _of_weights(values: dict[str, Any], table: tuple[Field | Constant, ...]) -> Iterator[tuple[str, str]]:
    """Keys of `WEIGHTS` that no table has and that say what cannot be computed, and why."""
    known = {entry.key for entry in table}
    for key in WEIGHTS:
        value = values.get(key)
        if value is None or key in known:
            continue
        if key == "quantization_config":
            yield key, "quantized weights are not read; save them in bfloat16"
        elif key == "sliding_window":
            yield key, "every layer has full attention here; supported: null"
        elif value not in DTYPES:
            yield key, f"supported: {', '.join(DTYPES)}"


def _contradictions(values: dict[str, Any], table: tuple[Field | Constant, ...]) -> Iterator[str]:
    """Keys of the rotation of before version 5 of the transformers library that say what rope_parameters denies."""
    if ROPE_PARAMETERS[0] not in table:
        return
    with contextlib.suppress(KeyError, ValueError):  # told already
        said = dict(zip(ROPE_PARAMETERS[0].names, _said(ROPE_PARAMETERS[0], values), strict=True))
        for field in ROPE:
            if field.key in values and _said(field, values) != tuple(said[name] for name in field.names):
                yield field.key


def _check(constant: Constant, values: dict[str, Any]) -> None:
    if constant.needed and constant.key not in values:
        raise KeyError(constant.key)
    value = values.get(constant.key, constant.value)
    if constant.check:
        constant.check(value)
    if constant.supported and (type(value), value) not in [(type(good), good) for good in constant.supported]:
        raise ValueError(f"supported: {', '.join(map(json.dumps, constant.supported))}")


def _get(config: Config, name: str) -> Any:
    """The value of a field `part.field`."""
    part, _, field = name.partition(".")
    parts = {"vision": config.model.vision, "decoder": config.model.decoder, "images": config.images}
    return getattr(parts.get(part, config.data), field)


def _fresh(config: Config) -> dict[str, Any]:
    """A file with all that no field stands for."""
    family, navil = families.find(config.model.decoder.family), config.model.vision is not None

    def constants(table: tuple[Field | Constant, ...]) -> dict[str, Any]:
        known = (entry for entry in table if isinstance(entry, Constant) and entry.written)
        return {entry.key: copy.deepcopy(entry.value) for entry in known}

    architecture = family.navil_architecture if navil else family.architecture
    language = {"model_type": family.name, "architectures": [architecture], **constants(family.fields)}
    if navil:
        return {**constants(NAVIL), "vision_config": constants(VISION), "llm_config": {**language, **family.released}}
    return {**language, "auto_map": dict(family.auto_map)} if family.auto_map else language
