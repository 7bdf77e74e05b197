"""What `navil_jax.plan` does: TPU topologies, ahead-of-time compilation, reading compiled programs, the time model."""
