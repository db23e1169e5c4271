"""The table of programs: each a function of parameters and inputs, with what is known of it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.core
import jax
import jax.numpy as jnp
from functions import (
  EMBED,
  EMBED_ROLES,
  HEADS,
  HEADS_ROLES,
  IDS,
  IO,
  LAYER,
  LAYER_ROLES,
  LAYERS,
  LAYERS_ROLES,
  NESTED,
  NESTED_ROLES,
  PAIR,
  PAIR_ROLES,
  STACK,
  STACK_ROLES,
  W,
  X,
  attention,
  becomes_params,
  branches,
  chosen_weight,
  condition_on_params,
  constrained,
  convolve,
  dense,
  exchanged_params,
  experts,
  growing,
  growing_with_params,
  hessian_product,
  linearized,
  loop,
  loop_with_params,
  nested_scan,
  noisy,
  normal,
  on_mesh,
  scanned,
  shrinking_params,
  trained_inside,
  up_down,
  wrong_jvp,
  wrong_vjp,
)
from jax import lax
from jax.ad_checkpoint import checkpoint_name


class Program(NamedTuple):
  """One row.

  f: (params, x) -> result.
  params: a pytree of arrays.
  roles: the roles of the axes of the adapted leaves, by path.
  x: the input.
  refused: words of the reason for which strict mode refuses; empty where it must succeed.
  refused_for: the same for some weights only, by their names in `weight_table.WEIGHTS`.
  reverse: False where JAX has no reverse gradient of `f` (a while loop).
  parts: how many values of a matrix's size are made where the bare function makes one of the size
    of several joined.
  vmap: False where JAX has no vmap of `f` over its parameters, or there is nothing to map over.
  """

  f: Callable
  params: Any = W
  roles: dict[str, str] = IO
  x: Any = X
  refused: str = ""
  refused_for: Mapping[str, str] = {}
  reverse: bool = True
  vmap: bool = True
  parts: int = 0


REMAT = jax.checkpoint_policies


PROGRAMS = {
  # Products
  "matmul": Program(lambda p, x: x @ p["w"]),
  "weight on the left": Program(lambda p, x: p["w"] @ x, x=normal(13, 3)),
  "transposed use": Program(lambda p, x: x @ p["w"].T, x=normal(3, 13)),
  "transposed twice": Program(lambda p, x: x @ p["w"].T.T),
  "vector": Program(lambda p, x: x @ p["w"], x=normal(11)),
  "quadratic form": Program(
    lambda p, x: jnp.einsum("bi,io,bo->b", x[:, :11], p["w"], x[:, 11:]), x=normal(3, 24)
  ),
  "many batch axes": Program(lambda p, x: x @ p["w"], x=normal(2, 3, 1, 4, 11)),
  "both ways": Program(lambda p, x: dense(p, x) @ p["w"].T),
  "twice": Program(lambda p, x: jnp.sin(x @ p["w"]) * (x @ p["w"])),
  "highest precision": Program(lambda p, x: jnp.dot(x, p["w"], precision="highest")),
  "preferred element type": Program(
    lambda p, x: lax.dot(x, p["w"].astype(x.dtype), preferred_element_type=jnp.float32)
  ),
  "cast to the input's dtype": Program(lambda p, x: x @ p["w"].astype(x.dtype)),
  "bias and gelu": Program(
    lambda p, x: jax.nn.gelu(x @ p["w"] + p["bias"]), W | {"bias": normal(13)}
  ),
  "input of integers": Program(lambda p, x: x @ p["w"], x=jnp.arange(33).reshape(3, 11) % 4),
  "tensordot over two axes": Program(
    lambda p, x: jnp.tensordot(x, p["w"], axes=((1, 2), (0, 1))),
    {"w": normal(3, 5, 11)},
    {"w": "iio"},
    normal(2, 3, 5),
  ),
  "one of two inputs": Program(
    lambda p, x: jnp.einsum("bh,hdo->bdo", x, p["w"]),
    {"w": normal(3, 5, 11)},
    {"w": "iio"},
    normal(2, 3),
  ),
  "attention with head axes": Program(attention, HEADS, HEADS_ROLES, normal(2, 4, 11)),
  "fused query, key and value": Program(
    lambda p, x: jnp.sin(jnp.einsum("btd,dcnh->cbtnh", x, p["w"])),
    {"w": normal(11, 3, 5, 7)},
    {"w": "iooo"},
    normal(2, 4, 11),
  ),
  "experts as a batch axis": Program(
    lambda p, x: jnp.einsum("end,edk->enk", x, p["w"]), STACK, STACK_ROLES, normal(3, 2, 11)
  ),
  "experts on a middle axis": Program(
    lambda p, x: jnp.einsum("end,dek->enk", x, p["w"]),
    {"w": normal(11, 3, 13)},
    {"w": "iso"},
    normal(3, 2, 11),
  ),
  "experts on the last axis": Program(
    lambda p, x: jnp.einsum("end,dke->enk", x, p["w"]),
    {"w": normal(11, 13, 3)},
    {"w": "ios"},
    normal(3, 2, 11),
  ),
  "every expert on every row": Program(
    lambda p, x: jnp.einsum("nd,edk->nek", x, p["w"]), STACK, STACK_ROLES, normal(2, 11)
  ),
  "experts summed": Program(
    lambda p, x: jnp.einsum("end,edk->nk", x, p["w"]), STACK, STACK_ROLES, normal(3, 2, 11)
  ),
  "two weights in a row": Program(up_down, LAYER, LAYER_ROLES),
  "product of two weights": Program(
    lambda p, x: x @ (p["up"] @ p["down"]), LAYER, LAYER_ROLES, refused="both operands"
  ),
  # Rows
  "embedding": Program(lambda p, i: jnp.take(p["embed"], i, axis=0), EMBED, EMBED_ROLES, IDS),
  "embedding by index": Program(lambda p, i: p["embed"][i], EMBED, EMBED_ROLES, IDS),
  "embedding, ids out of bounds": Program(
    lambda p, i: jnp.take(p["embed"], i, axis=0, fill_value=0.5), EMBED, EMBED_ROLES, IDS * 2
  ),
  "embedding, ids clipped": Program(
    lambda p, i: jnp.take(p["embed"], i, axis=0, mode="clip"), EMBED, EMBED_ROLES, IDS * 2 - 9
  ),
  "columns": Program(lambda p, i: jnp.take(p["embed"], i % 7, axis=1), EMBED, EMBED_ROLES, IDS),
  "embedding of heads": Program(
    lambda p, i: p["embed"][i], {"embed": normal(17, 3, 7)}, {"embed": "ioo"}, IDS
  ),
  "tied embedding and head": Program(
    lambda p, i: jnp.sin(p["embed"][i]) @ p["embed"].T, EMBED, EMBED_ROLES, IDS
  ),
  "tied, the head by einsum": Program(
    lambda p, i: jnp.einsum("btd,vd->btv", jnp.sin(p["embed"][i]), p["embed"]),
    EMBED,
    EMBED_ROLES,
    IDS,
  ),
  # Without a factored form: materialized, or refused
  "function of the weight": Program(lambda p, x: x @ jnp.sin(p["w"]), refused="no rule for sin"),
  "norm of the weight": Program(lambda p, x: x @ p["w"] + jnp.sum(p["w"] ** 2), refused="no rule"),
  "stop_gradient": Program(lambda p, x: x @ lax.stop_gradient(p["w"])),
  "named": Program(lambda p, x: x @ checkpoint_name(p["w"], "kernel")),
  "scaled": Program(lambda p, x: x @ (0.5 * p["w"])),
  "scaled by a traced number": Program(lambda p, x: x @ (-p["w"] / (1 + x[0, 0] ** 2))),
  "multiplied by a row": Program(lambda p, x: x @ (p["w"] * jnp.cos(jnp.arange(13.0)))),
  "multiplied by a column": Program(lambda p, x: x @ (jnp.cos(jnp.arange(11.0))[:, None] * p["w"])),
  "divided by a row of the input": Program(
    lambda p, x: x @ (p["w"] / (2 + jnp.sin(x[0, :, None])))
  ),
  "multiplied by a matrix": Program(
    lambda p, x: x @ (p["w"] * (jnp.arange(143.0).reshape(11, 13) % 2)), refused="by a matrix"
  ),
  "a stack, each layer times a number": Program(
    lambda p, x: jnp.einsum("nd,edk->nek", x, p["w"] * jnp.arange(1.0, 4)[:, None, None]),
    STACK,
    STACK_ROLES,
  ),
  # Sums
  "plus an array": Program(lambda p, x: x @ (p["w"] + jnp.arange(143.0).reshape(11, 13) / 99)),
  "minus a step": Program(trained_inside),
  "sum of two weights": Program(
    lambda p, x: x @ (p["first"] - 0.5 * p["second"]), PAIR, PAIR_ROLES
  ),
  "interpolated and transposed": Program(
    lambda p, x: x @ (0.3 * p["first"] + 0.7 * p["second"]).T, PAIR, PAIR_ROLES, normal(5, 13)
  ),
  "rows of a sum": Program(
    lambda p, i: jnp.take(p["first"] + p["second"], i, axis=0, fill_value=0.5),
    PAIR,
    PAIR_ROLES,
    jnp.array([0, 10, 44]),
  ),
  # Several weights as one
  "joined outputs": Program(
    lambda p, x: jnp.sin(x @ jnp.concatenate([p["first"], p["second"]], 1)), PAIR, PAIR_ROLES
  ),
  "joined inputs": Program(
    lambda p, x: x @ jnp.concatenate([p["first"], p["second"]]), PAIR, PAIR_ROLES, normal(3, 22)
  ),
  "joined with an array": Program(
    lambda p, x: x @ jnp.concatenate([p["w"], jnp.ones((11, 2))], 1).T,
    x=normal(3, 15),
    parts=1,
  ),
  "joined and cut": Program(
    lambda p, x: [
      x @ w for w in jnp.split(jnp.concatenate([p["first"], p["second"]], 1), [6, 13], axis=1)
    ],
    PAIR,
    PAIR_ROLES,
  ),
  "joined, with axes of heads": Program(
    lambda p, x: jnp.einsum(
      "bd,dnh->bnh", x, jnp.concatenate([p["first"], p["second"]], 1).reshape(11, 26, 1)[:, ::1]
    ),
    PAIR,
    PAIR_ROLES,
    parts=2,
  ),
  "joined as a stack": Program(
    lambda p, x: jnp.einsum("nd,edk->enk", x, jnp.stack([p["first"], p["second"]])),
    PAIR,
    PAIR_ROLES,
  ),
  "joined as a stack on a middle axis": Program(
    lambda p, x: jnp.einsum("nd,dek->enk", x, jnp.stack([p["first"], p["second"]], 1)),
    PAIR,
    PAIR_ROLES,
    parts=1,
  ),
  "stacked, then scanned": Program(
    lambda p, x: scanned(jax.tree.map(lambda *ws: jnp.stack(ws), *p.values()), x),
    {"first": LAYER, "second": jax.tree.map(lambda w: w[::-1], LAYER)},
    {f"{layer}/{name}": "io" for layer in ("first", "second") for name in LAYER},
  ),
  "split": Program(lambda p, x: [x @ w for w in jnp.split(p["w"], [4, 9], axis=1)]),
  "reversed": Program(lambda p, x: x @ p["w"][::-1, ::-1]),
  "padded": Program(
    lambda p, x: x @ jnp.pad(p["w"], ((1, 0), (0, 2)), constant_values=0.5),
    x=normal(3, 12),
    refused_for=dict.fromkeys(("dora", "factored", "adapted-factored"), "may not be zero"),
  ),
  "padded with zeros between": Program(
    lambda p, x: x @ lax.pad(p["w"], jnp.zeros((), p["w"].dtype), ((0, 0, 0), (1, -2, 1)))
  ),
  "copied": Program(lambda p, x: x @ jnp.copy(p["w"])),
  "put on a device": Program(lambda p, x: x @ jax.device_put(p["w"], jax.devices()[0])),
  "behind a barrier": Program(
    lambda p, x: jnp.matmul(*lax.optimization_barrier((x, p["w"]))), vmap=False
  ),
  "constrained to a sharding": Program(constrained, vmap=False),
  "axes joined": Program(
    lambda p, x: x @ p["w"].reshape(11, 15), {"w": normal(11, 3, 5)}, {"w": "ioo"}
  ),
  "axes split": Program(
    lambda p, x: jnp.einsum("bi,ihe->bhe", x, p["w"].reshape(11, 3, 5)), {"w": normal(11, 15)}
  ),
  "axes of ones": Program(lambda p, x: x @ p["w"][:, None].reshape(1, 11, 1, 13)[0, :, 0]),
  "axes of two roles joined": Program(
    lambda p, x: x @ p["w"].reshape(-1)[:11], refused="mixes axes of different roles"
  ),
  "sliced": Program(lambda p, x: x @ p["w"][:, :6]),
  "every second row": Program(lambda p, x: x @ p["w"][1::2], x=normal(3, 5)),
  "one of a stack": Program(lambda p, x: x @ p["w"][1], STACK, STACK_ROLES),
  "one of a stack, traced": Program(
    lambda p, x: x @ p["w"][jnp.argmax(x[0]) % 3], STACK, STACK_ROLES
  ),
  "one weight for every row": Program(
    lambda p, x: jnp.einsum("bd,bdk->bk", x, jnp.broadcast_to(p["w"], (3, 11, 13)))
  ),
  "experts by token": Program(
    lambda p, x: jnp.einsum("td,tdf->tf", x, p["w"][jnp.array([0, 2, 2])]), STACK, STACK_ROLES
  ),
  "experts by token, two each": Program(
    lambda p, x: jnp.einsum(
      "td,tedf->tef", x, p["w"].at[jnp.arange(6).reshape(3, 2) % 4].get(mode="fill", fill_value=0.5)
    ),
    STACK,
    STACK_ROLES,
    refused_for=dict.fromkeys(("factored", "adapted-factored"), "indices out of bounds"),
  ),
  "embedding by a vmapped index": Program(
    lambda p, i: jnp.sin(jax.vmap(lambda i: p["embed"][i])(i[0])) @ p["embed"].T,
    EMBED,
    EMBED_ROLES,
    IDS,
  ),
  "single elements": Program(lambda p, i: p["w"][i, i], x=jnp.arange(3), refused="whole rows"),
  "cast to integers": Program(
    lambda p, x: x @ p["w"].astype(jnp.int32), {"w": 9 * normal(11, 13)}, refused="int32"
  ),
  "stacks exchanged": Program(
    lambda p, x: jnp.einsum("jad,jadk->jak", x, p["w"].transpose(1, 0, 2, 3)),
    {"w": normal(2, 3, 11, 13)},
    {"w": "ssio"},
    normal(3, 2, 11),
  ),
  "convolution": Program(convolve, {"w": normal(5, 3, 7)}, {"w": "iio"}, normal(2, 9, 3)),
  "convolution, strided and dilated": Program(
    functools.partial(convolve, strides=2, dilation=2),
    {"w": normal(3, 3, 5, 7)},
    {"w": "iiio"},
    normal(2, 9, 9, 5),
  ),
  "convolution, depthwise": Program(
    functools.partial(convolve, groups=6),
    {"w": normal(3, 3, 1, 6)},
    {"w": "iiio"},
    normal(2, 5, 5, 6),
  ),
  "convolution, grouped": Program(
    functools.partial(convolve, groups=2),
    {"w": normal(3, 3, 2, 6)},
    {"w": "iiio"},
    normal(2, 5, 5, 4),
  ),
  "convolution in three dimensions": Program(
    convolve, {"w": normal(2, 3, 2, 3, 7)}, {"w": "iiiio"}, normal(2, 4, 4, 4, 3)
  ),
  "convolution, the channels first": Program(
    lambda p, x: lax.conv_general_dilated(x, p["w"].astype(x.dtype), (2,), "VALID"),
    {"w": normal(7, 3, 5)},
    {"w": "oii"},
    normal(2, 3, 9),
  ),
  "gradient by the input of a convolution": Program(
    lambda p, x: jax.grad(lambda x: jnp.sum(jnp.sin(convolve(p, x, strides=2))))(x),
    {"w": normal(5, 3, 7)},
    {"w": "iio"},
    normal(2, 9, 3),
  ),
  "transposed convolution": Program(
    lambda p, x: lax.conv_transpose(
      x,
      p["w"].astype(x.dtype),
      (2,),
      "SAME",
      transpose_kernel=True,
      dimension_numbers=("NWC", "WIO", "NWC"),
    ),
    {"w": normal(5, 3, 7)},
    {"w": "iio"},
    normal(2, 9, 7),
  ),
  "experts by ragged_dot": Program(experts, STACK, STACK_ROLES, normal(5, 11), vmap=False),
  "the weight itself": Program(lambda p, x: (p["w"], x @ p["w"]), refused="returns the weight"),
  # Functions that hold functions
  "jit": Program(jax.jit(dense)),
  "jit in jit": Program(jax.jit(lambda p, x: jax.jit(dense)(p, x) * jax.jit(jnp.sum)(x))),
  "jit that only casts": Program(lambda p, x: x @ jax.jit(lambda w: w.astype(x.dtype).T)(p["w"]).T),
  "named scope": Program(jax.named_scope("layer")(dense)),
  "remat": Program(jax.checkpoint(up_down), LAYER, LAYER_ROLES),
  "remat, products saved": Program(
    jax.checkpoint(up_down, policy=REMAT.dots_saveable), LAYER, LAYER_ROLES
  ),
  "remat, products without a batch saved": Program(
    jax.checkpoint(up_down, policy=REMAT.dots_with_no_batch_dims_saveable), LAYER, LAYER_ROLES
  ),
  "remat, named values saved": Program(
    jax.checkpoint(
      lambda p, x: checkpoint_name(dense(p, x), "hidden") @ p["w"].T,
      policy=REMAT.save_only_these_names("hidden"),
    )
  ),
  "remat in remat": Program(jax.checkpoint(jax.checkpoint(up_down)), LAYER, LAYER_ROLES),
  "scan over layers": Program(scanned, LAYERS, LAYERS_ROLES),
  "scan, reversed and unrolled": Program(
    functools.partial(scanned, reverse=True, unroll=2), LAYERS, LAYERS_ROLES
  ),
  "scan of a remat": Program(
    functools.partial(scanned, body=jax.checkpoint(up_down)), LAYERS, LAYERS_ROLES
  ),
  "remat of a scan": Program(jax.checkpoint(scanned), LAYERS, LAYERS_ROLES),
  "scan, layers on a middle axis": Program(
    lambda p, x: scanned(jax.tree.map(lambda w: jnp.moveaxis(w, 1, 0), p), x),
    {"up": normal(11, 3, 13), "down": normal(13, 3, 11)},
    {"up": "iso", "down": "iso"},
  ),
  "nested scan": Program(nested_scan, NESTED, NESTED_ROLES),
  "scan with one weight for all steps": Program(
    lambda p, x: lax.scan(lambda h, u: (up_down(p, h) + u, h[0]), x[0], x), LAYER, LAYER_ROLES
  ),
  "scan with the weights in its carry": Program(
    lambda p, x: lax.scan(lambda s, u: ((s[0], up_down(s[0], s[1]) + u), s[1]), (p, x[0]), x)[0][1],
    LAYER,
    LAYER_ROLES,
  ),
  "scan over rows of a weight": Program(
    lambda p, x: lax.scan(lambda h, row: (h + row, None), jnp.zeros(13), p["w"])[0] + jnp.sum(x),
    refused="not a stack",
  ),
  "loop in a jitted step with the weights in its carry": Program(
    lambda p, x: lax.fori_loop(
      0, 3, jax.jit(lambda _, state: (state[0], jax.checkpoint(up_down)(*state))), (p, x)
    )[1],
    LAYER,
    LAYER_ROLES,
  ),
  "loop whose step is a remat": Program(
    lambda p, x: lax.scan(
      jax.checkpoint(lambda s, _: ((s[0], up_down(*s)), None)), (p, x), length=2
    )[0][1],
    LAYER,
    LAYER_ROLES,
  ),
  "loop in a loop": Program(
    lambda p, x: lax.fori_loop(
      0, 2, lambda _, s: lax.fori_loop(0, 2, lambda _, s: (s[0], up_down(*s)), s), (p, x)
    )[1],
    LAYER,
    LAYER_ROLES,
  ),
  "scan that returns slices": Program(
    lambda p, x: lax.scan(lambda h, w: (h + 0.1 * jnp.sum(jnp.sin(h @ w)), w.T), x, p["w"]),
    STACK,
    STACK_ROLES,
    refused="returns the weight",
  ),
  "scan that changes weights": Program(
    shrinking_params,
    LAYER,
    LAYER_ROLES,
    # A multiple of each is of another kind, which a loop cannot pass on in its place.
    refused_for=dict.fromkeys(
      ("dora", "factored", "adapted-factored", "masked"), "a loop changes it from one step"
    ),
  ),
  "loop that turns into a weight": Program(becomes_params, refused="the weight itself"),
  "loop that exchanges weights": Program(
    exchanged_params,
    {"first": normal(11, 11), "second": normal(11, 11) + 1},
    {"first": "io", "second": "io"},
  ),
  "fori": Program(functools.partial(loop, body=up_down), LAYER, LAYER_ROLES),
  "fori with the weights in its carry": Program(loop_with_params, LAYER, LAYER_ROLES),
  "while": Program(growing, LAYER, LAYER_ROLES, reverse=False),
  "while with the weights in its carry": Program(
    growing_with_params, LAYER, LAYER_ROLES, reverse=False
  ),
  "while with a weight in its condition": Program(condition_on_params, reverse=False),
  "cond": Program(
    lambda p, x: lax.cond(jnp.sum(x) > 0, lambda p: x @ p["w"], lambda p: -(x @ p["w"]), p)
  ),
  "switch": Program(
    functools.partial(branches, index=2),
    {"up": normal(11, 13), "down": normal(13, 11), "bias": normal(13)},
    LAYER_ROLES,
  ),
  "cond that returns a weight": Program(
    chosen_weight,
    PAIR,
    PAIR_ROLES,
  ),
  "custom_jvp": Program(wrong_jvp(dense), refused="custom_jvp"),
  "custom_vjp": Program(wrong_vjp(dense), refused="custom_vjp"),
  "custom_vjp of activations": Program(lambda p, x: wrong_vjp(jnp.sin)(x @ p["w"])),
  "relu": Program(lambda p, x: jax.nn.relu(x @ p["w"])),
  "shard_map": Program(on_mesh),
  # Transformations inside
  "vmap inside": Program(lambda p, x: jax.vmap(lambda row: dense(p, row))(x)),
  "vmap over a stack": Program(jax.vmap(dense, (0, None)), STACK, STACK_ROLES),
  "vmap over columns of the input": Program(jax.vmap(dense, (None, 1), 1), W, IO, normal(11, 3)),
  "grad inside": Program(lambda p, x: jax.grad(lambda x: jnp.sum(dense(p, x) ** 2))(x)),
  "grad by the weights inside": Program(
    lambda p, x: jax.grad(lambda p: jnp.sum(dense(p, x) ** 2))(p)
  ),
  "jvp inside": Program(lambda p, x: jax.jvp(lambda x: dense(p, x), (x,), (jnp.cos(x),))),
  "jacfwd inside": Program(lambda p, x: jax.jacfwd(lambda t: dense(p, t @ x))(x[:, 0])),
  "jacrev inside": Program(lambda p, x: jax.jacrev(lambda x: dense(p, x)[:2])(x[0])),
  "hessian inside": Program(lambda p, x: jax.hessian(lambda t: jnp.sum(dense(p, t @ x)))(x[:, 0])),
  "hessian product inside": Program(hessian_product),
  "linearize inside": Program(linearized),
  # Trees
  "tuples, lists and None": Program(
    lambda p, x: x @ p[0][1] + p[2]["bias"],
    ([None, normal(11, 13)], None, {"bias": normal(13)}),
    {"0/1": "io"},
  ),
  "FrozenDict": Program(
    dense,
    flax.core.freeze(W | {"unused": {"kernel": normal(5, 7)}}),
    {"w": "io", "unused/kernel": "io"},
  ),
  "integers and a random key": Program(noisy, W | {"key": jax.random.key(0), "step": jnp.int32(7)}),
  "a bare leaf": Program(lambda w, x: x @ w, normal(11, 13), {"": "io"}),
  "no weight": Program(dense, roles={}, vmap=False),
}
