"""Training: state, step, optimizer, evaluation, checkpoints, metrics and the loop."""
