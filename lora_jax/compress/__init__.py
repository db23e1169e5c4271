"""Smaller models from trained ones: functions from params to params with Weights.

    formats = lora_jax.match(params, [("all-linear", compress.NF4)], axes)
    smaller = compress.quantize(params, formats, axes)
    logits  = lora_jax.adapt(model.apply)({"params": smaller}, tokens)

The result is adapted, trained and merged like any other tree.
"""

from lora_jax.compress.quantization import FORMATS as FORMATS
from lora_jax.compress.quantization import quantize as quantize
from lora_jax.compress.quantized_training import straight_through as straight_through
from lora_jax.compress.running_text import make_windows as make_windows
from lora_jax.compress.running_text import perplexity as perplexity
from lora_jax.weights.quantized import FP8 as FP8
from lora_jax.weights.quantized import INT4 as INT4
from lora_jax.weights.quantized import INT8 as INT8
from lora_jax.weights.quantized import NF4 as NF4
