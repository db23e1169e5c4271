"""LoRA that starts from data, or from a quantized base.

Each module has a spec for `lora_jax.match` and a function that is called instead of
`lora_jax.init`, since it needs more than the shapes of the base.
"""
