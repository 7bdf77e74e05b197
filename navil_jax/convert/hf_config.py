"""The config.json of a released NaViL, InternLM2 or Qwen3 <-> our configs, by the table `released_fields`."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from navil_jax.config import Config, DecoderConfig, ImageConfig, ModelConfig, VisionConfig, validate
from navil_jax.convert.fields import (
    ARCHITECTURES,
    HARMLESS,
    IMPLIED,
    INTERNLM2_AUTO_MAP,
    LANGUAGE,
    NAVIL,
    NEEDED,
    TEMPLATES,
    VISION,
    Constant,
    Field,
)
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
        released = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{file}: not found; give the folder of a checkpoint") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: line {error.lineno}: not valid JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a text file") from error
    if not isinstance(released, dict):
        raise UserError(f"{file}: not a JSON object; give the folder of a checkpoint")
    return released


def model_config(
    released: dict[str, Any], special_token_ids: tuple[int, ...] = (), file: str | Path = FILE, **settings: Any
) -> ModelConfig:
    """The model that a config.json describes.

    Args:
      released: the parsed file; a NaViL config has vision_config and llm_config, a language model is flat.
      special_token_ids: from the checkpoint's tokenizer, in the order of SPECIAL_TOKENS; empty without vision.
      file: what errors call it.
      settings: further fields of ModelConfig (dtypes, remat, attention).

    Raises:
      UserError: another architecture; or, listed together, the missing keys and those that cannot be computed.
    """
    values, family, navil = _read(released, file), _family(released, file), _is_navil(released)
    decoder = {"family": family, "attention_experts": navil, "ffn_experts": navil, **IMPLIED[family]}
    decoder |= values.get("decoder", {})
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


def image_config(released: dict[str, Any], file: str | Path = FILE) -> ImageConfig:
    """How the checkpoint prepares images; the defaults for a language model. Errors as in `model_config`."""
    return ImageConfig(**_read(released, file).get("images", {}))


def prompt_config(released: dict[str, Any], file: str | Path = FILE) -> dict[str, str]:
    """`template` and `system_message` of `DataConfig`; the former alone for a language model.

    Errors as in `model_config`.
    """
    return _read(released, file).get("data", {"template": TEMPLATES[_family(released, file)]})


def unknown_fields(released: dict[str, Any], file: str | Path = FILE) -> list[str]:
    """Dotted keys that neither act on what is computed nor are known to be harmless; an import tells of them.

    Example: {"model_type": "qwen3", ..., "new_trick": true} -> ["new_trick"]
    """
    unknown = []
    for prefix, values, table in _sections(released, file):
        known = {entry.key for entry in table} | HARMLESS
        if _is_navil(released) and not prefix:
            known |= {"vision_config", "llm_config"}
        unknown += [prefix + key for key in sorted(values.keys() - known)]
    return unknown


def released_config(config: Config, base: dict[str, Any] | None = None, dtype: str | None = None) -> dict[str, Any]:
    """The config.json of a model that was trained or imported here. The inverse of the readers above.

    Args:
      config: model, images, and the template and system message of data.
      base: the config.json that the model was imported from. Only what differs from it is changed, so an unchanged
        model has an equal file. One of another architecture is left aside.
      dtype: of the exported tensors; None: that of `base`, or else of the parameters.

    Raises:
      UserError: the model is none that the released layout has, see `check_exportable`.
    """
    check_exportable(config)
    released = _fresh(config)
    if base is not None and _kind(base) == _kind(released):
        released = copy.deepcopy(base)
    else:
        base = None
    for _, values, table in _sections(released, FILE):
        for field in table:
            if isinstance(field, Field):
                wanted = tuple(_get(config, name) for name in field.names)
                if base is None or _said(field, values) != wanted:
                    values[field.key] = field.write(*wanted)
    if dtype or base is None:
        released["dtype" if "dtype" in released else "torch_dtype"] = dtype or config.model.param_dtype
    return released


def check_exportable(config: Config) -> None:
    """Refuses a model that the released code cannot compute.

    Raises:
      UserError: lists the fields of the config, each with the reason.
    """
    decoder, vision = config.model.decoder, config.model.vision
    problems = []

    def require(good: bool, key: str, why: str) -> None:
        if not good:
            problems.append(f"model.{key} = {_get(config, key)}: {why}")

    for key in ("decoder.attention_experts", "decoder.ffn_experts"):
        if vision is None:
            require(not _get(config, key), key, "a language model without vision has no visual experts")
        else:
            require(_get(config, key), key, "the released model always has visual experts")
    for name, value in IMPLIED[decoder.family].items():
        if name != "serial_visual_output" or decoder.attention_experts:
            require(getattr(decoder, name) == value, f"decoder.{name}", f"{decoder.family} always has {value}")
    if decoder.family == "internlm2":
        width = decoder.num_heads * decoder.head_dim
        require(
            width == decoder.width, "decoder.head_dim", f"internlm2 needs width / num_heads (width {decoder.width})"
        )
    if vision is not None:
        require(vision.window_order, "vision.window_order", "the released code always puts patches in window order")
        require(vision.merge_size == 2, "vision.merge_size", "the released code joins 2x2 patches")
        default = VisionConfig.rope_theta
        require(vision.rope_theta == default, "vision.rope_theta", f"the released code has {default}")
    if problems:
        raise UserError(f"the model cannot be exported to the released layout: {'; '.join(problems)}")


def _is_navil(released: dict[str, Any]) -> bool:
    names = released.get("architectures") or [""]
    return released.get("model_type") == "navil_chat" or str(names[0]).startswith("NaViL")


def _family(released: dict[str, Any], file: str | Path) -> str:
    """The family of the language model, after a check that the architecture is one that can be computed."""
    navil = _is_navil(released)
    prefix, language = ("llm_config.", released.get("llm_config")) if navil else ("", released)
    if navil:
        for key in ("vision_config", "llm_config"):
            if not isinstance(released.get(key), dict):
                raise UserError(f"{file}: {key} is missing; a NaViL config has a section of this name")
    names, family = language.get("architectures") or [], language.get("model_type")
    wanted = {family: classes[navil] for family, classes in ARCHITECTURES.items()}
    if family not in wanted or ((names or navil) and wanted[family] not in names):
        supported = ", ".join(f"{name} ({family})" for family, name in wanted.items())
        raise UserError(
            f"{file}: {prefix}architectures {names} of {prefix}model_type {family!r} is not supported; "
            f"{'a NaViL' if navil else 'a language model, where it is no NaViL,'} has {supported}"
        )
    return family


def _kind(released: dict[str, Any]) -> tuple[bool, str]:
    return _is_navil(released), _family(released, FILE)


def _sections(released: dict[str, Any], file: str | Path) -> Iterator[Section]:
    family = _family(released, file)
    if not _is_navil(released):
        yield "", released, LANGUAGE[family]
        return
    yield "", released, NAVIL
    yield "vision_config.", released["vision_config"], VISION
    yield "llm_config.", released["llm_config"], LANGUAGE[family]


def _said(field: Field, values: dict[str, Any]) -> tuple:
    """What a section says of a field. Raises `KeyError` if it is needed and missing, `ValueError` if it is wrong."""
    value = values.get(field.key, field.missing)
    if field.otherwise and value in (NEEDED, None):
        value = values.get(field.otherwise, NEEDED)
    if value is NEEDED:
        raise KeyError(field.key)
    return field.read(value)


def _read(released: dict[str, Any], file: str | Path) -> dict[str, dict[str, Any]]:
    """Part of the config -> field -> value, of all sections."""
    parts: dict[str, dict[str, Any]] = {}
    missing, wrong = [], []
    for prefix, values, table in _sections(released, file):
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
    if missing or wrong:
        lists = {"missing": ", ".join(missing), "not supported": "; ".join(wrong)}
        raise UserError(f"{file}: {'; '.join(f'{what}: {keys}' for what, keys in lists.items() if keys)}")
    return parts


def _check(constant: Constant, values: dict[str, Any]) -> None:
    if constant.needed and constant.key not in values:
        raise KeyError(constant.key)
    value = values.get(constant.key, constant.value)
    if constant.supported and (type(value), value) not in [(type(good), good) for good in constant.supported]:
        raise ValueError(f"supported: {', '.join(map(json.dumps, constant.supported))}")


def _get(config: Config, name: str) -> Any:
    """The value of a field `part.field`."""
    part, _, field = name.partition(".")
    parts = {"vision": config.model.vision, "decoder": config.model.decoder, "images": config.images}
    return getattr(parts.get(part, config.data), field)


def _fresh(config: Config) -> dict[str, Any]:
    """A file with all that no field stands for."""
    family, navil = config.model.decoder.family, config.model.vision is not None

    def constants(table: tuple[Field | Constant, ...]) -> dict[str, Any]:
        return {entry.key: copy.deepcopy(entry.value) for entry in table if isinstance(entry, Constant)}

    language = {"model_type": family, "architectures": [ARCHITECTURES[family][navil]], **constants(LANGUAGE[family])}
    if navil:
        return {**constants(NAVIL), "vision_config": constants(VISION), "llm_config": language}
    return {**language, "auto_map": dict(INTERNLM2_AUTO_MAP)} if family == "internlm2" else language
