"""The model: vision encoder, connector, decoder with modality-specific experts."""

from navil_jax.model.navil import NaViL

__all__ = ["NaViL"]
