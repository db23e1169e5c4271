"""Adapter methods, one file each: the spec, how it starts, what Weight it attaches."""

from lora_jax.adapters.lora import LoRA as LoRA
from lora_jax.adapters.lora import LoRAAdapter as LoRAAdapter
