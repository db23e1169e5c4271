"""Experiment configs: `--config=configs/quickstart.py:smoke --config.adapter.rank=4`."""
