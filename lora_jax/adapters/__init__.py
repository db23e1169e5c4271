"""Adapter methods, one file each: the spec, how it starts, what Weight it attaches."""

from lora_jax.adapters.base import Method as Method
from lora_jax.adapters.lora import LoRA as LoRA
