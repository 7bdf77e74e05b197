"""Weights both ways: Hugging Face folders of the release and Orbax checkpoints."""
