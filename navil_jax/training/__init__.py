"""Loss, optimizer, step, checkpoints and logs."""
