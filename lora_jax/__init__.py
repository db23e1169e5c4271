"""LoRA and low-rank compression as pure transforms of JAX parameter trees.

specs    = lora_jax.match(params, [("all-linear", lora_jax.LoRA(rank=8, alpha=16.0))])
adapters = lora_jax.init(jax.random.key(0), params, specs)
apply    = lora_jax.adapt(model.apply)
logits   = apply({"params": lora_jax.attach(params, adapters)}, tokens)
merged   = lora_jax.merge(params, adapters)
"""

# The transform
from lora_jax.transform import RULES as RULES
from lora_jax.transform import MaterializationError as MaterializationError
from lora_jax.transform import adapt as adapt

# isort: split
# Which leaves are adapted, and how
from lora_jax.adapters import AdaLoRA as AdaLoRA
from lora_jax.adapters import DoRA as DoRA
from lora_jax.adapters import Full as Full
from lora_jax.adapters import LoHa as LoHa
from lora_jax.adapters import LoKr as LoKr
from lora_jax.adapters import LoRA as LoRA
from lora_jax.adapters import OLoRA as OLoRA
from lora_jax.adapters import PiSSA as PiSSA
from lora_jax.adapters import TokenRows as TokenRows
from lora_jax.adapters import VeRA as VeRA
from lora_jax.axes import Axes as Axes
from lora_jax.axes import trace_axes as trace_axes
from lora_jax.calibration import second_moments as second_moments
from lora_jax.remat import products_saveable as products_saveable
from lora_jax.starts import eva as eva
from lora_jax.starts import loftq as loftq
from lora_jax.starts.eva import EVA as EVA
from lora_jax.starts.loftq import LoftQ as LoftQ
from lora_jax.summaries import Summary as Summary
from lora_jax.summaries import summary as summary
from lora_jax.targets import match as match

# isort: split
# Trees of adapters and Weights
from lora_jax.attachment import attach as attach
from lora_jax.attachment import detach as detach
from lora_jax.attachment import init as init
from lora_jax.attachment import merge as merge
from lora_jax.attachment import seal as seal
from lora_jax.attachment import trainable_mask as trainable_mask
from lora_jax.attachment import unmerge as unmerge
from lora_jax.attachment import unseal as unseal
from lora_jax.attachment import with_dropout as with_dropout
from lora_jax.tree import join as join
from lora_jax.tree import partition as partition

# isort: split
# Composition
from lora_jax.compose import combiners as combiners
from lora_jax.compose.batching import align as align
from lora_jax.compose.batching import gate as gate
from lora_jax.compose.batching import put as put
from lora_jax.compose.batching import select as select
from lora_jax.compose.batching import stack as stack
from lora_jax.compose.combining import combine as combine
from lora_jax.compose.combining import rescale as rescale
from lora_jax.compose.combining import to_lora as to_lora

# isort: split
# Weights
from lora_jax.weights import Adapted as Adapted
from lora_jax.weights import Factored as Factored
from lora_jax.weights import LowRank as LowRank
from lora_jax.weights import NotFactored as NotFactored
from lora_jax.weights import Pruned as Pruned
from lora_jax.weights import Recentred as Recentred
from lora_jax.weights import Weight as Weight
from lora_jax.weights import is_weight as is_weight
from lora_jax.weights import materialize as materialize
