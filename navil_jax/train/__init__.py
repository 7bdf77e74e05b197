"""The trainer: loss, optimizer, compiled step, checkpoints, evaluators and logs."""
