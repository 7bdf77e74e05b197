"""The families of language models: one module each, found by its name, with the record FAMILY."""

import importlib
import pkgutil

from navil_jax.convert.family import Family
from navil_jax.errors import UserError

_modules = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _modules}


def find(name: str) -> Family:
    """The family of `DecoderConfig.family`.

    Raises:
      UserError: there is none of this name.
    """
    if name not in FAMILIES:
        raise UserError(f"config.model.decoder.family: {name!r} is none of {', '.join(FAMILIES)}")
    return FAMILIES[name]
