"""Training: state, step, optimiser, evaluation, checkpoints, metrics and the loop."""
