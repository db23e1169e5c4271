"""Training steps of a Llama with adapters, in shapes alone, for the tests of what they cost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

import lora_jax
from lora_jax.models import llama
from lora_jax.train import members
from lora_jax.train.chunked_loss import chunked_completion_objective
from lora_jax.train.optimizer import adamw, schedule
from lora_jax.train.plan import Run
from lora_jax.train.step import completion_objective, init_state, make_train_step

SMALL = llama.LlamaConfig(
  vocab_size=1000,
  width=128,
  mlp_width=384,
  num_layers=4,
  num_heads=4,
  num_kv_heads=2,
  head_dim=32,
  max_length=512,
  tie_embeddings=True,
  scan_layers=True,
)
UNTIED = dataclasses.replace(
  SMALL, vocab_size=4000, width=256, mlp_width=768, num_layers=6, head_dim=64, tie_embeddings=False
)
SMOLLM2 = dataclasses.replace(
  SMALL,
  vocab_size=49152,
  width=576,
  mlp_width=1536,
  num_layers=30,
  num_heads=9,
  num_kv_heads=3,
  head_dim=64,
)
POLICIES = {
  "none": None,
  "dots": lora_jax.products_saveable,
  "nothing": jax.checkpoint_policies.nothing_saveable,
}


def make_run(
  config=SMALL,
  *,
  rows=4,
  length=64,
  targets=1,
  rank=8,
  remat="none",
  parts=1,
  chunk=0,
  packed=False,
  full=False,
  together=0,
  in_turn=False,
  **changes,
):
  """The run of a config, with adapters on every linear layer.

  targets: of a row. chunk: positions whose logits are held at a time, 0 for all. packed: whether
  rows have segments. full: train the base itself and no adapters. together: how many members, each
  with such rows, train in one program; 0 for the plain step. in_turn: whether they take each step
  in turn. changes: of the config.
  """
  config = dataclasses.replace(config, remat_policy=POLICIES[remat], **changes)
  model = llama.Llama(config)
  tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  axes = lora_jax.trace_axes(lambda p, t: model.apply({"params": p}, t), params, tokens)
  specs = lora_jax.match(params, [("all-linear", lora_jax.LoRA(rank=rank, alpha=16.0))], axes)
  adapters = lora_jax.init(jax.random.key(0), params, {} if full else specs, axes)
  weights = lora_jax.attach(params, adapters)
  mask = lora_jax.trainable_mask(weights, also=[".*"] if full else ())
  trainable, frozen = lora_jax.partition(weights, mask)
  rate = schedule(peak=1e-3, warmup_steps=10, total_steps=100, kind="linear")

  def make_tx(rate):
    return adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0)

  apply = lora_jax.adapt(model.apply)
  objective = chunked_completion_objective(apply, chunk) if chunk else completion_objective(apply)
  at = jax.ShapeDtypeStruct((rows, targets), jnp.int32)
  batch = {"tokens": tokens, "at": at, "targets": at}
  batch["weights"] = jax.ShapeDtypeStruct((rows, targets), jnp.float32)
  batch |= {"segments": tokens} if packed else {}
  if together:
    steps, rates = jnp.full(together, 100), jnp.ones((together, 100))
    settings = members.Settings(steps, rates, dropout_keys=None)
    stacked = jax.eval_shape(members.stack, [adapters] * together)
    init = functools.partial(members.init, make_tx=make_tx)
    batch = {name: jax.ShapeDtypeStruct((together, *x.shape), x.dtype) for name, x in batch.items()}
    return Run(
      members.make_train_step(objective, make_tx, parts=parts, in_turn=in_turn),
      *jax.eval_shape(init, params, stacked, settings),
      batch,
    )
  tx = make_tx(rate)
  return Run(
    make_train_step(objective, tx, parts=parts),
    jax.eval_shape(lambda trainable: init_state(trainable, tx), trainable),
    frozen,
    batch,
  )
