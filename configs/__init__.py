"""Experiment configs: `--config=configs/quickstart.py:smoke --config.lora.rank=4`."""
