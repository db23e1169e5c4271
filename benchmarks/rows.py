"""The rows of the table that run in JAX: one model, loss and optimizer, in different forms.

form = ADAPTED["naive"](case, adapters)     # apply, weights, mask
row = JaxRow("naive, rank 8", form, case)
seconds = row.compile()                     # then row.temporary is known
row.start()
seconds = row.run(steps=1)
"""

import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

import lora_jax
from benchmarks.models import Case
from lora_jax import compress, tree
from lora_jax.weights import Adapted

PyTree = Any
Adapters = Mapping[str, Adapted]

ALPHA = 16.0
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 1e-4


class Form(NamedTuple):
  """A way to fine-tune.

  Attributes:
    apply: `({"params": weights}, inputs) -> outputs`.
    weights: the tree that it takes.
    mask: True for the leaves that train.
  """

  apply: Callable
  weights: PyTree
  mask: PyTree


def trace_axes(case: Case) -> dict[str, lora_jax.Axes]:
  """The roles of the axes of every parameter."""
  return lora_jax.trace_axes(
    lambda params, x: case.module.apply({"params": params}, x), case.params, case.inputs
  )


def make_adapters(
  case: Case, rank: int, kind: type[lora_jax.LoRA | lora_jax.DoRA] = lora_jax.LoRA
) -> Adapters:
  """Fresh adapters on all linear layers: the start of every row with this rank and kind."""
  axes = trace_axes(case)
  spec = kind(rank=rank, alpha=ALPHA)
  specs = lora_jax.match(case.params, [("all-linear", spec)], axes)
  return lora_jax.init(jax.random.key(rank), case.params, specs, axes)


def trained(adapters: Adapters, seed: int) -> Adapters:
  """Fresh adapters with random changes, so that no factor is zero and no two are alike."""
  leaves, treedef = jax.tree.flatten(adapters)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  noise = [0.01 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(treedef, [x + y for x, y in zip(leaves, noise, strict=True)])


def floor(case: Case) -> Form:
  """A frozen base: forward and backward through the bare model, with few trained parameters."""
  mask = lora_jax.trainable_mask(case.params, also=[case.floor])
  return Form(case.module.apply, case.params, mask)


def floor_keeping_products(case: Case) -> Form:
  """The floor, with blocks that save only their products and recompute the rest."""
  return floor(case)._replace(apply=case.keeping_products().apply)


def full(case: Case) -> Form:
  """Full fine-tuning."""
  return Form(case.module.apply, case.params, jax.tree.map(lambda _: True, case.params))


def ours(case: Case, adapters: Adapters) -> Form:
  """Low-rank products kept factored by `adapt`."""
  weights = lora_jax.attach(case.params, adapters)
  return Form(lora_jax.adapt(case.module.apply), weights, lora_jax.trainable_mask(weights))


def ours_keeping_products(case: Case, adapters: Adapters) -> Form:
  """The same, with blocks that save only their products and recompute the rest."""
  apply = lora_jax.adapt(case.keeping_products().apply)
  return ours(case, adapters)._replace(apply=apply)


def dora(case: Case, adapters: Adapters) -> Form:
  """DoRA with the adapters' rank."""
  rank = next(iter(adapters.values())).rank
  return ours(case, make_adapters(case, rank, lora_jax.DoRA))


def qlora(case: Case, adapters: Adapters) -> Form:
  """The adapters on a base in NF4 (Dettmers et al. 2023)."""
  axes = trace_axes(case)
  formats = lora_jax.match(case.params, [("all-linear", compress.NF4)], axes)
  return ours(dataclasses.replace(case, params=compress.quantize(case.params, formats)), adapters)


def merged(case: Case, adapters: Adapters) -> Form:
  """`W + s A B`, materialized and differentiated."""

  def apply(variables, x):
    return case.module.apply({"params": lora_jax.materialize(variables["params"])}, x)

  return ours(case, adapters)._replace(apply=apply)


def naive(case: Case, adapters: Adapters) -> Form:
  """A layer as written by hand, `x W + s (x A) B`, with autodiff."""

  def dense(next_function, args, kwargs, context):
    y = next_function(*args, **kwargs)
    adapter = adapters.get("/".join((*context.module.path, "kernel")))
    if adapter is None or context.method_name != "__call__":
      return y
    (x,) = args
    a, b = (context.module.get_variable("params", name).astype(x.dtype) for name in ("a", "b"))
    return y + adapter.scale * ((x @ a) @ b)

  def apply(variables, x):
    with nn.intercept_methods(dense):
      return case.module.apply(variables, x)

  return _beside_the_kernels(apply, case, adapters, "a", "b")


def qwix(case: Case, adapters: Adapters) -> Form:
  """The LoRA of `qwix`, which patches the module's calls; its factors have the base's dtype."""
  import qwix  # optional, and slow to import

  layers = "|".join(re.escape(path.removesuffix("/kernel")) for path in adapters)
  rank = next(iter(adapters.values())).a.shape[-1]
  provider = qwix.LoraProvider(module_path=layers, rank=rank, alpha=ALPHA)
  model = qwix.apply_lora_to_model(case.module, provider)
  adapters = jax.tree.map(lambda leaf: leaf.astype(case.module.config.dtype), adapters)
  return _beside_the_kernels(model.apply, case, adapters, "kernel_lora_a", "kernel_lora_b")


BARE = {"floor": floor, "full": full, "floor_keeping_products": floor_keeping_products}
"""The rows without adapters by name."""

ADAPTED = {
  "ours": ours,
  "ours_keeping_products": ours_keeping_products,
  "dora": dora,
  "qlora": qlora,
  "naive": naive,
  "merged": merged,
  "qwix": qwix,
}
"""The LoRA rows by name; there is one for each rank."""


def _beside_the_kernels(apply, case: Case, adapters: Adapters, a: str, b: str) -> Form:
  """A model that holds its factors as parameters of these names next to the kernels."""
  params = traverse_util.flatten_dict(case.params, sep="/")
  factors = {}
  for path, adapter in adapters.items():
    layer = path.removesuffix("kernel")
    factors |= {layer + a: adapter.a, layer + b: adapter.b}
  weights = traverse_util.unflatten_dict(params | factors, sep="/")
  return Form(apply, weights, tree.map_with_path(lambda path, _: path in factors, weights))


class JaxRow:
  """One form, compiled with its optimizer.

  Attributes:
    label: the row's label.
    trainable: the number of trained parameters.
    temporary: the compiled step's peak memory beyond its arguments and results, in bytes.
    losses: the loss of every step taken.
  """

  def __init__(self, label: str, form: Form, case: Case):
    self.label = label
    self._trainable, self._frozen = lora_jax.partition(form.weights, form.mask)
    self._batch = case.inputs, case.targets
    self._tx = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    self._step = _make_step(form.apply, case.loss, self._tx)
    self.trainable = sum(leaf.size for leaf in jax.tree.leaves(self._trainable))
    self.temporary = None
    self.losses = []

  def compile(self) -> float:
    """Traces and compiles the step from scratch; returns the seconds that it took."""
    jax.clear_caches()
    state = jax.eval_shape(self._init, self._trainable)
    started = time.perf_counter()
    lowered = jax.jit(self._step, donate_argnums=0).lower(state, self._frozen, self._batch)
    self._compiled = lowered.compile()
    seconds = time.perf_counter() - started
    self.temporary = self._compiled.memory_analysis().temp_size_in_bytes
    return seconds

  def start(self) -> None:
    """Makes the state, and takes two steps that are not timed."""
    # The step donates its state, and the rows share their arrays.
    self._state = self._init(jax.tree.map(jnp.copy, self._trainable))
    for _ in range(2):
      self.run(steps=1)

  def run(self, steps: int) -> float:
    """Takes steps; returns the seconds per step."""
    started = time.perf_counter()
    for _ in range(steps):
      self._state, loss = self._compiled(self._state, self._frozen, self._batch)
    jax.block_until_ready((self._state, loss))
    seconds = (time.perf_counter() - started) / steps
    self.losses.append(float(loss))
    return seconds

  def close(self) -> None:
    """Frees the state."""
    self._state = None

  def _init(self, trainable: PyTree) -> tuple[PyTree, PyTree]:
    return trainable, self._tx.init(trainable)


def _make_step(apply: Callable, loss: Callable, tx: optax.GradientTransformation) -> Callable:
  """`((trainable, opt_state), frozen, (inputs, targets)) -> (the same, the loss)`."""

  def step(state, frozen, batch):
    trainable, opt_state = state
    inputs, targets = batch

    def objective(trainable):
      return loss(apply({"params": lora_jax.join(trainable, frozen)}, inputs), targets)

    value, grads = jax.value_and_grad(objective)(trainable)
    updates, opt_state = tx.update(grads, opt_state, trainable)
    return (optax.apply_updates(trainable, updates), opt_state), value

  return step
