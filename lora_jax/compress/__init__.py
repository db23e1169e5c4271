"""Smaller models from trained ones: functions from params to params with Weights.

    formats = lora_jax.match(params, [("all-linear", compress.NF4)], axes)
    smaller = compress.quantize(params, formats, axes)
    logits  = lora_jax.adapt(model.apply)({"params": smaller}, tokens)

Whatever comes out is adapted, trained and merged like any other tree.
"""

from lora_jax.compress.perplexity import make_windows as make_windows
from lora_jax.compress.perplexity import perplexity as perplexity
