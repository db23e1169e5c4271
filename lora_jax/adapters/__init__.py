"""Adapter methods, one per file: the spec, its initialization and the Weight that it attaches."""

from lora_jax.adapters.adalora import AdaLoRA as AdaLoRA
from lora_jax.adapters.base import Method as Method
from lora_jax.adapters.dora import DoRA as DoRA
from lora_jax.adapters.full import Full as Full
from lora_jax.adapters.loha import LoHa as LoHa
from lora_jax.adapters.lokr import LoKr as LoKr
from lora_jax.adapters.lora import LoRA as LoRA
from lora_jax.adapters.olora import OLoRA as OLoRA
from lora_jax.adapters.pissa import PiSSA as PiSSA
from lora_jax.adapters.token_rows import TokenRows as TokenRows
from lora_jax.adapters.vera import VeRA as VeRA
