"""Weights in the names and layouts of PyTorch checkpoints."""
