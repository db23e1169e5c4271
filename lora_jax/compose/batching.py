"""Several adapters on one base: switched without recompiling, or one for each row of a batch.

    named = align({"french": x, "german": y})           # one structure, so one compiled program
    logits = step(params, named["german"], tokens)

    adapters = stack([x, y], slots=16)                   # 16 slots, 14 of them empty
    adapters = put(adapters, 2, z)                       # adds or replaces an adapter

    def row(slot, tokens):
      weights = attach(params, gate(adapters, slot))     # or select(adapters, slot)
      return adapt(model.apply)({"params": weights}, tokens[None])[0]

    logits = jax.vmap(row)(slots, tokens)                # the base is not batched

A LoRA adapter's structure holds its scale, and its shapes the rank. Here the scale is multiplied
into b and the rank is padded with zeros; both are exact. Dropout and the choice of a frozen factor,
which only training needs, are dropped. (To train several adapters of any ranks and scales at once,
use `lora_jax.train.members`, whose `stack` keeps both.)
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from lora_jax.weights import Adapted, Gated, LowRank, NotFactored

Adapters = Mapping[str, Adapted]


def align(
  adapters: Mapping[str, Adapters], rank: int | None = None
) -> dict[str, dict[str, LowRank]]:
  """Returns the same adapters in one structure: a function compiled for one of them takes any.

  Args:
    adapters: `{name: {path: adapter}}`. At a path that only some of them have, the change of the
      others is zero.
    rank: the rank of every leaf; None for the leaf's largest rank among the adapters.

  Raises:
    ValueError: if an adapter's rank is larger, if adapters are for different bases, or if a kind
      has no exact low-rank form.
  """
  folded = {name: _folded(each) for name, each in adapters.items()}
  at_path: dict[str, list[LowRank]] = {}
  for each in folded.values():
    for path, adapter in each.items():
      at_path.setdefault(path, []).append(adapter)
  empty = {
    path: _empty(path, each, max(x.rank for x in each) if rank is None else rank)
    for path, each in at_path.items()
  }
  return {
    name: {path: _fitted(path, each.get(path), empty[path]) for path in empty}
    for name, each in folded.items()
  }


def stack(
  adapters: Sequence[Adapters], *, rank: int | None = None, slots: int | None = None
) -> dict[str, LowRank]:
  """Stacks adapters into one pytree with a leading axis of slots, adapter n in slot n.

  Args:
    adapters: at least one.
    rank: as in `align`.
    slots: the length of the axis. Slots after the adapters are empty, i.e. zero: the base without
      an adapter. None for one slot per adapter.

  Raises:
    ValueError: if there is no adapter, if there are more adapters than slots, or as in `align`.
  """
  slots = len(adapters) if slots is None else slots
  if not 0 < len(adapters) <= slots:
    raise ValueError(f"{len(adapters)} adapters do not fit {slots} slots; at least one must")
  aligned = align({str(n): each for n, each in enumerate(adapters)}, rank)
  empty = [jax.tree.map(jnp.zeros_like, aligned["0"])] * (slots - len(adapters))
  return jax.tree.map(lambda *xs: jnp.stack(xs), *aligned.values(), *empty)


def put(stacked: Mapping[str, LowRank], slot: int | jax.Array, adapters: Adapters) -> dict:
  """Replaces the adapters of one slot of a stack. The structure stays, so nothing recompiles.

  Args:
    stacked: the result of `stack`. Under `jax.jit(put, donate_argnums=0)` it is not copied.
    slot: the index of the slot. It may be traced; a traced index out of range changes nothing.
    adapters: of any rank up to the stack's; `{}` empties the slot.

  Raises:
    ValueError: if the adapters do not fit, or if the slot is out of range.
  """
  unknown = sorted(set(adapters) - set(stacked))
  if unknown:
    raise ValueError(f"the stack has no adapters at {', '.join(unknown)}; stack them all at once")
  slots = _slots(stacked)
  if isinstance(slot, int) and not 0 <= slot < slots:
    raise ValueError(f"slot {slot} is not among the stack's {slots}")
  plain = _folded(adapters)

  def updated(path: str, every: LowRank) -> LowRank:
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), every)
    one = _fitted(path, plain.get(path), empty)
    return jax.tree.map(
      lambda x, new: x.at[slot].set(new, mode="drop", wrap_negative_indices=False), every, one
    )

  return {path: updated(path, every) for path, every in stacked.items()}


def select(stacked: Mapping[str, Adapted], slot: int | jax.Array) -> dict[str, Adapted]:
  """Returns the adapters of one slot; of several slots, with an array, along a leading axis.

  Under `vmap` every row reads a copy of its own factors, so the work does not depend on the number
  of slots. Use it for hundreds of adapters. For a few, `gate` is faster.

  Args:
    stacked: adapters with a leading axis, of any kind.
    slot: the index of the slot; it may be traced. An index out of range, such as -1, yields zeros,
      which for a LowRank means no adapter.
  """

  def at_slot(x):
    return x.at[slot].get(mode="fill", fill_value=0, wrap_negative_indices=False)

  return jax.tree.map(at_slot, dict(stacked))


def gate(stacked: Mapping[str, LowRank], slot: int | jax.Array) -> dict[str, Gated]:
  """Returns all slots side by side along the rank, with a gate that selects one of them.

  Computes the same function as `select`. Under `vmap` over slots the factors are not batched: each
  layer computes two products of all rows with rank * slots columns. For a few slots this takes less
  time and memory than a small product for each row.

  Args:
    stacked: the result of `stack`.
    slot: as in `select`, but a single one.

  Raises:
    ValueError: if there are several slots.
  """
  if jnp.ndim(slot):
    raise ValueError("gate selects one slot; map over several, jax.vmap(lambda slot, x: ...)")
  slots = _slots(stacked)
  chosen = jax.nn.one_hot(slot, slots)

  def gated(adapter: LowRank) -> Gated:
    # The leading axes of a and b: the slots, then the stacks.
    leading = _rank_axis(adapter)
    gates = jnp.repeat(chosen.astype(adapter.a.dtype), adapter.rank)
    return Gated(
      w=None,
      a=_side_by_side(adapter.a, adapter.a.ndim - 1),
      b=_side_by_side(adapter.b, leading),
      gate=jnp.broadcast_to(gates, (*adapter.a.shape[1:leading], gates.size)),
      roles=adapter.roles,
    )

  return {path: gated(adapter) for path, adapter in stacked.items()}


def low_rank(path: str, adapter: Adapted) -> LowRank:
  """Returns the adapter as a LowRank, exactly.

  Raises:
    ValueError: if its kind has no exact low-rank form.
  """
  try:
    return adapter.as_low_rank()
  except NotFactored as reason:
    raise ValueError(
      f"{path}: {reason}; lora_jax.to_lora(adapters, params, rank=...) computes its nearest LoRA"
    ) from None


def check_same_leaf(path: str, adapters: Sequence[LowRank]) -> None:
  """Raises ValueError if adapters are not for one leaf; their ranks may differ."""
  shapes = {}
  for adapter in adapters:
    b_shape = list(adapter.b.shape)
    del b_shape[_rank_axis(adapter)]
    shapes[adapter.a.shape[:-1], tuple(b_shape), adapter.roles] = adapter
  if len(shapes) > 1:
    each = "; ".join(f"{x.a.shape} and {x.b.shape}, roles {x.roles!r}" for x in shapes.values())
    raise ValueError(f"{path}: the adapters' factors are of different leaves: {each}")


def _rank_axis(adapter: LowRank) -> int:
  """The rank axis of b."""
  return adapter.a.ndim - 1 - adapter.roles.count("i")


def _folded(adapters: Adapters) -> dict[str, LowRank]:
  """Plain adapters with their scales multiplied into b."""
  plain = {path: low_rank(path, adapter) for path, adapter in adapters.items()}
  return {
    path: dataclasses.replace(x, b=x.b * x.scale, scale=1.0, path="") for path, x in plain.items()
  }


def _empty(path: str, adapters: Sequence[LowRank], rank: int) -> LowRank:
  """An adapter of zeros for a leaf."""
  check_same_leaf(path, adapters)
  like = adapters[0]
  axis = _rank_axis(like)
  dtype = jnp.result_type(*(x for adapter in adapters for x in (adapter.a, adapter.b)))
  a = jnp.zeros((*like.a.shape[:-1], rank), dtype)
  b = jnp.zeros((*like.b.shape[:axis], rank, *like.b.shape[axis + 1 :]), dtype)
  return dataclasses.replace(like, a=a, b=b)


def _fitted(path: str, adapter: LowRank | None, empty: LowRank) -> LowRank:
  """The adapter with the rank and the dtype of the empty one."""
  if adapter is None:
    return empty
  check_same_leaf(path, [adapter, empty])
  if adapter.rank > empty.rank:
    raise ValueError(
      f"{path}: the adapter's rank {adapter.rank} exceeds {empty.rank}; "
      f"lora_jax.to_lora(adapters, rank={empty.rank}) computes the nearest one that fits"
    )
  return dataclasses.replace(
    empty,
    a=jax.lax.dynamic_update_slice_in_dim(empty.a, adapter.a.astype(empty.a.dtype), 0, -1),
    b=jax.lax.dynamic_update_slice_in_dim(
      empty.b, adapter.b.astype(empty.b.dtype), 0, _rank_axis(empty)
    ),
  )


def _slots(stacked: Mapping[str, LowRank]) -> int:
  """The number of slots of a stack."""
  sizes = {x.shape[0] for x in jax.tree.leaves(stacked)}
  if len(sizes) != 1:
    raise ValueError(f"the leading axes {sorted(sizes)} are not the slots of one stack; see stack")
  return sizes.pop()


def _side_by_side(x: jax.Array, rank_axis: int) -> jax.Array:
  """Joins the leading axis with the rank: [slots, ..., rank, ...] to [..., slots * rank, ...]."""
  x = jnp.moveaxis(x, 0, rank_axis - 1)
  return x.reshape(*x.shape[: rank_axis - 1], -1, *x.shape[rank_axis + 1 :])
