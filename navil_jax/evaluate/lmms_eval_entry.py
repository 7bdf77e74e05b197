"""What lmms-eval finds of navil_jax: its entry point `lmms_eval.models`, which names the class of `lmms_eval_model`."""

from typing import Any


def manifest() -> Any:
    """lmms-eval's record of the model `navil`; JAX is imported when the model is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("navil", simple_class_path="navil_jax.evaluate.lmms_eval_model.NaViL", aliases=("navil_jax",))
