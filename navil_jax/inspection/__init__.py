"""Looking at data before they are trained on: what `navil_jax.doctor` and `navil_jax.preview` show."""
