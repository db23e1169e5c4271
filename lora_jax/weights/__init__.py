"""Weights: frozen pytrees that represent an array and are used in its place."""

from lora_jax.weights.adalora import AdaLoRA as AdaLoRA
from lora_jax.weights.adapted import Adapted as Adapted
from lora_jax.weights.base import NotFactored as NotFactored
from lora_jax.weights.base import Weight as Weight
from lora_jax.weights.base import is_weight as is_weight
from lora_jax.weights.base import materialize as materialize
from lora_jax.weights.coded import Coded as Coded
from lora_jax.weights.dora import DoRA as DoRA
from lora_jax.weights.dora import input_norms as input_norms
from lora_jax.weights.factored import Factored as Factored
from lora_jax.weights.full import Full as Full
from lora_jax.weights.gated import Gated as Gated
from lora_jax.weights.gguf_blocks import GGUFBlocks as GGUFBlocks
from lora_jax.weights.loha import LoHa as LoHa
from lora_jax.weights.lokr import LoKr as LoKr
from lora_jax.weights.low_rank import LowRank as LowRank
from lora_jax.weights.pruned import Pruned as Pruned
from lora_jax.weights.pruned import inside_mask as inside_mask
from lora_jax.weights.pruned import unmasked as unmasked
from lora_jax.weights.pytree import register as register
from lora_jax.weights.quantized import Format as Format
from lora_jax.weights.quantized import Quantized as Quantized
from lora_jax.weights.recentred import Recentred as Recentred
from lora_jax.weights.token_rows import TokenRows as TokenRows
from lora_jax.weights.vera import VeRA as VeRA
