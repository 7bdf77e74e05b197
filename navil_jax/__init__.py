"""navil_jax: NaViL native multimodal language models in JAX."""
