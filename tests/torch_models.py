"""Small PyTorch models with twins in JAX, for tests that hand adapters from side to side."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax import lax
from peers import peft, torch, transformers

import lora_jax
from lora_jax import exchange
from lora_jax.io import names
from lora_jax.models import layers, llama


@dataclasses.dataclass(frozen=True)
class Twins:
  """A model on both sides.

  torch: makes the PyTorch model, with the same values each time.
  params, apply: the model here; `apply(params, inputs)`.
  inputs: of both, an array.
  settings: what `exchange.load` and `exchange.save` are told of the model.
  """

  torch: Callable[[], torch.nn.Module]
  params: Any
  apply: Callable
  inputs: np.ndarray
  settings: dict[str, Any]

  @functools.cached_property
  def axes(self):
    return lora_jax.trace_axes(self.apply, self.params, jnp.asarray(self.inputs))

  def logits(self, adapters) -> np.ndarray:
    """The output here; of the base with {}."""
    merged = lora_jax.merge(self.params, adapters)
    return np.asarray(jax.jit(self.apply)(merged, jnp.asarray(self.inputs)))

  def load(self, folder):
    return exchange.load(folder, self.params, self.axes, **self.settings)

  def save(self, folder, adapters, **changes):
    settings = self.settings | {"base_model": "tiny", "task_type": None} | changes
    exchange.save(folder, adapters, self.params, self.axes, **settings)


def of_models(cases: Mapping[str, tuple]) -> list:
  """(case, model, its number) of each model that a case's row begins with.

  At every commit each case is tested on one model, and each model on some of the cases.
  """
  return [
    pytest.param(
      case, model, n, id=f"{case}-{model}", marks=[] if n == i % len(row[0]) else [pytest.mark.slow]
    )
    for i, (case, row) in enumerate(cases.items())
    for n, model in enumerate(row[0])
  ]


def torch_logits(model: torch.nn.Module, inputs: np.ndarray) -> np.ndarray:
  with torch.no_grad():
    output = model(torch.tensor(inputs))
  return (output.logits if hasattr(output, "logits") else output).numpy()


def in_peft(twins: Twins, folder) -> np.ndarray:
  """The logits in `peft` with the adapter of a folder, whose keys are those that `peft` saves."""
  model = peft.get_peft_model(twins.torch(), peft.PeftConfig.from_pretrained(folder))
  tensors = peft.utils.load_peft_weights(str(folder), device="cpu")
  saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False).keys()
  assert tensors.keys() == saved, tensors.keys() ^ saved
  keys = peft.set_peft_model_state_dict(model, tensors)
  assert not keys.unexpected_keys, keys.unexpected_keys
  return torch_logits(model.eval(), twins.inputs)


def made_by_peft(twins: Twins, config, folder, **options) -> np.ndarray:
  """Saves an adapter with random values, as if it were trained; returns the logits with it."""
  model = peft.get_peft_model(twins.torch(), config)
  shake(model)
  expected = torch_logits(model.eval(), twins.inputs)
  model.save_pretrained(folder, **options)
  return expected


def shake(model: torch.nn.Module) -> None:
  """Moves everything that trains by random amounts."""
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def shaken(params, adapters):
  """The adapters with what trains moved by random amounts."""
  weights = lora_jax.attach(params, adapters)
  trained, rest = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
  rng = np.random.default_rng(5)  # numpy's, which compiles nothing
  moved = jax.tree.map(
    lambda x: jnp.asarray(x + 0.3 * rng.normal(size=x.shape).astype(np.float32)), trained
  )
  return lora_jax.detach(lora_jax.join(moved, rest), adapters)


def llama_twins(tie: bool = False, scan: bool = False) -> Twins:
  config = llama.LlamaConfig(
    vocab_size=40,
    width=16,
    mlp_width=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_length=64,
    norm_eps=1e-6,
    tie_embeddings=tie,
    scan_layers=scan,
  )

  def make():
    return _filled(
      transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
          vocab_size=40,
          hidden_size=16,
          intermediate_size=24,
          num_hidden_layers=3,
          num_attention_heads=4,
          num_key_value_heads=2,
          max_position_embeddings=64,
          tie_word_embeddings=tie,
        )
      )
    )

  table = {x: path for x, path in names.LLAMA_HF.items() if not (tie and x == "lm_head.weight")}
  params = _params(make(), table)
  return Twins(
    make,
    layers.stack_layers(params) if scan else params,
    lambda params, tokens: llama.Llama(config).apply({"params": params}, tokens),
    np.array([[5, 6, 7, 8, 9, 10]]),
    {"table": names.LLAMA_HF},
  )


GPT2 = {
  "transformer.wte.weight": "wte/embedding",
  "transformer.wpe.weight": "wpe/embedding",
  "transformer.h.{i}.ln_1.weight": "h_{i}/ln_1/scale",
  "transformer.h.{i}.ln_1.bias": "h_{i}/ln_1/bias",
  "transformer.h.{i}.attn.c_attn.weight": names.InOut("h_{i}/attn/c_attn/kernel"),
  "transformer.h.{i}.attn.c_attn.bias": "h_{i}/attn/c_attn/bias",
  "transformer.h.{i}.attn.c_proj.weight": names.InOut("h_{i}/attn/c_proj/kernel"),
  "transformer.h.{i}.attn.c_proj.bias": "h_{i}/attn/c_proj/bias",
  "transformer.h.{i}.ln_2.weight": "h_{i}/ln_2/scale",
  "transformer.h.{i}.ln_2.bias": "h_{i}/ln_2/bias",
  "transformer.h.{i}.mlp.c_fc.weight": names.InOut("h_{i}/mlp/c_fc/kernel"),
  "transformer.h.{i}.mlp.c_fc.bias": "h_{i}/mlp/c_fc/bias",
  "transformer.h.{i}.mlp.c_proj.weight": names.InOut("h_{i}/mlp/c_proj/kernel"),
  "transformer.h.{i}.mlp.c_proj.bias": "h_{i}/mlp/c_proj/bias",
  "transformer.ln_f.weight": "ln_f/scale",
  "transformer.ln_f.bias": "ln_f/bias",
  "lm_head.weight": "head/kernel",
}


def gpt2_twins() -> Twins:
  """GPT-2, whose linear layers are transformers' Conv1D, with weights (in, out)."""

  def make():
    return _filled(
      transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
          vocab_size=40,
          n_embd=16,
          n_layer=2,
          n_head=2,
          n_positions=16,
          bos_token_id=0,
          eos_token_id=0,
          tie_word_embeddings=False,
        )
      )
    )

  params = _params(make(), GPT2)
  return Twins(make, params, _gpt2, np.array([[5, 6, 7, 8, 9, 10]]), {"table": GPT2})


def _gpt2(params, tokens):
  def dense(p, x):
    return x @ p["kernel"] + p["bias"]

  def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

  length = tokens.shape[1]
  x = params["wte"]["embedding"][tokens] + params["wpe"]["embedding"][jnp.arange(length)]
  for layer in (params["h_0"], params["h_1"]):
    query, key, value = (
      y.reshape(*y.shape[:2], 2, 8)
      for y in jnp.split(dense(layer["attn"]["c_attn"], norm(layer["ln_1"], x)), 3, axis=-1)
    )
    y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = x + dense(layer["attn"]["c_proj"], y.reshape(x.shape))
    y = jax.nn.gelu(dense(layer["mlp"]["c_fc"], norm(layer["ln_2"], x)), approximate=True)
    x = x + dense(layer["mlp"]["c_proj"], y)
  return norm(params["ln_f"], x) @ params["head"]["kernel"]


IMAGES = {
  f"{name}.{parameter}": f"{name}/{leaf}"
  for name in ("first", "second", "series", "to_heads", "from_heads")
  for parameter, leaf in (("weight", "kernel"), ("bias", "bias"))
}


class _Images(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.first = torch.nn.Conv2d(3, 6, 3, padding=1)
    self.second = torch.nn.Conv2d(6, 4, (2, 3), stride=2)
    self.series = torch.nn.Conv1d(4, 5, 3)
    self.to_heads = torch.nn.Linear(5, 2 * 4)
    self.from_heads = torch.nn.Linear(2 * 4, 7)

  def forward(self, x):
    x = torch.tanh(self.second(torch.relu(self.first(x)))).flatten(2)
    x = torch.tanh(self.series(x)).mean(-1)
    return self.from_heads(torch.tanh(self.to_heads(x)))


def image_twins() -> Twins:
  """Convolutions whose window is before or after their channels, and layers of several heads."""

  def make():
    return _filled(_Images())

  state = {name: jnp.asarray(tensor.numpy()) for name, tensor in make().state_dict().items()}
  state |= {
    "first.weight": state["first.weight"].transpose(2, 3, 1, 0),
    "series.weight": state["series.weight"].transpose(2, 1, 0),
    "to_heads.weight": state["to_heads.weight"].T.reshape(5, 2, 4),
    "to_heads.bias": state["to_heads.bias"].reshape(2, 4),
    "from_heads.weight": state["from_heads.weight"].T.reshape(2, 4, 7),
  }
  params = traverse_util.unflatten_dict({IMAGES[x]: state[x] for x in state}, sep="/")
  images = np.random.default_rng(0).normal(size=(2, 3, 6, 8)).astype(np.float32)
  return Twins(make, params, _images, images, {"table": IMAGES})


def _images(params, x):
  def conv(name, x, numbers, **settings):
    p = params[name]
    y = lax.conv_general_dilated(x, p["kernel"], dimension_numbers=numbers, **settings)
    return y + p["bias"].reshape(-1, *[1] * (x.ndim - 2))

  x = conv("first", x, ("NCHW", "HWIO", "NCHW"), window_strides=(1, 1), padding="SAME")
  x = conv(
    "second", jax.nn.relu(x), ("NCHW", "OIHW", "NCHW"), window_strides=(2, 2), padding="VALID"
  )
  x = jnp.tanh(x).reshape(*x.shape[:2], -1)
  x = conv("series", x, ("NCH", "HIO", "NCH"), window_strides=(1,), padding="VALID")
  x = jnp.tanh(x).mean(-1)
  x = jnp.einsum("nd,dhk->nhk", x, params["to_heads"]["kernel"]) + params["to_heads"]["bias"]
  x = jnp.tanh(x)
  return jnp.einsum("nhk,hko->no", x, params["from_heads"]["kernel"]) + params["from_heads"]["bias"]


def _filled(model: torch.nn.Module) -> torch.nn.Module:
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
  return model.eval()


def _params(model: torch.nn.Module, table):
  """The parameters of a PyTorch model as a tree, the weights of its linear layers as (in, out)."""
  flat = {}
  for template, path in table.items():
    for layer in range(3 if "{i}" in template else 1):
      name = template.replace("{i}", str(layer))
      if path is None or name not in model.state_dict():
        continue
      tensor = jnp.asarray(model.state_dict()[name].numpy())
      is_transposed = names.is_transposed(name, table)
      flat[path.replace("{i}", str(layer))] = tensor.T if is_transposed else tensor
  return traverse_util.unflatten_dict(flat, sep="/")
