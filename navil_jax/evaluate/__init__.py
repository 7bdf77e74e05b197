"""Evaluation of a checkpoint, and evaluators that need what stands above the trainer."""
