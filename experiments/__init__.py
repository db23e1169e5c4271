"""Main programs, `python -m experiments.train` and others; each reads from top to bottom."""
