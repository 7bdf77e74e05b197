"""Checkpoints from one format to another: what the subcommands of `navil_jax.convert` do."""
