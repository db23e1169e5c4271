"""Several adapters on one base: switched without recompiling, or a row of a batch each its own.

    named = align({"french": x, "german": y})           # one structure, so one compiled program
    logits = step(params, named["german"], tokens)

    adapters = stack([x, y], slots=16)                   # 16 slots, of which 14 are empty
    adapters = put(adapters, 2, z)                       # adds or replaces one

    def row(slot, tokens):
      weights = attach(params, gate(adapters, slot))     # or select(adapters, slot)
      return adapt(model.apply)({"params": weights}, tokens[None])[0]

    logits = jax.vmap(row)(slots, tokens)                # the base is not batched

A LoRA adapter's structure holds its scale, and its arrays the rank; here the scale becomes part of
b and the rank is filled up with zeros, both of which are exact. What only training needs, dropout
and which factor is frozen, is left out. (To train several adapters at once, of any ranks and
scales: `lora_jax.train.members`, whose `stack` keeps both.)
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
  """The same adapters in one structure: a function compiled for one of them takes any.

  Args:
    adapters: `{name: {path: adapter}}`. At a path that one of them has and another has not, the
      other's change is zero.
    rank: of every leaf; None for the largest that a leaf has in any of them.

  Raises:
    ValueError: when a rank is larger, two adapters are not of one base, or a kind has no exact
      low-rank form.
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
  """One adapters pytree with a leading axis of slots, adapter n in slot n.

  Args:
    adapters: at least one.
    rank: as in `align`.
    slots: the length of the axis; those after the adapters are empty, which is to say zero: the
      base without an adapter. None for one slot an adapter.

  Raises:
    ValueError: when there is no adapter, or there are more than slots; and as `align` does.
  """
  slots = len(adapters) if slots is None else slots
  if not 0 < len(adapters) <= slots:
    raise ValueError(f"{len(adapters)} adapters do not fit {slots} slots; at least one must")
  aligned = align({str(n): each for n, each in enumerate(adapters)}, rank)
  empty = [jax.tree.map(jnp.zeros_like, aligned["0"])] * (slots - len(adapters))
  return jax.tree.map(lambda *xs: jnp.stack(xs), *aligned.values(), *empty)


def put(stacked: Mapping[str, LowRank], slot: int | jax.Array, adapters: Adapters) -> dict:
  """The stack with other adapters in one slot, of the same structure, so that nothing recompiles.

  Args:
    stacked: what `stack` made. Under `jax.jit(put, donate_argnums=0)` it is not copied.
    slot: which one; it may be traced, and then one that is none changes nothing.
    adapters: of any rank up to the stack's; `{}` empties the slot.

  Raises:
    ValueError: when the adapters do not fit, or the slot is no slot.
  """
  unknown = sorted(set(adapters) - set(stacked))
  if unknown:
    raise ValueError(f"the stack has no adapters at {', '.join(unknown)}; stack them all at once")
  slots = _slots(stacked)
  if isinstance(slot, int) and not 0 <= slot < slots:
    raise ValueError(f"slot {slot} is none of the stack's {slots}")
  plain = _folded(adapters)

  def updated(path: str, every: LowRank) -> LowRank:
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), every)
    one = _fitted(path, plain.get(path), empty)
    return jax.tree.map(
      lambda x, new: x.at[slot].set(new, mode="drop", wrap_negative_indices=False), every, one
    )

  return {path: updated(path, every) for path, every in stacked.items()}


def select(stacked: Mapping[str, Adapted], slot: int | jax.Array) -> dict[str, Adapted]:
  """The adapters of one slot, or, with an array of slots, of each of them along a leading axis.

  Under `vmap` every row reads a copy of its own factors, so the work does not depend on how many
  slots there are: the choice for hundreds of adapters. For a few, `gate` is faster.

  Args:
    stacked: adapters with a leading axis, of any kind.
    slot: of them; may be traced. One that is none, as -1, has zeros, for a LowRank no adapter.
  """

  def at_slot(x):
    return x.at[slot].get(mode="fill", fill_value=0, wrap_negative_indices=False)

  return jax.tree.map(at_slot, dict(stacked))


def gate(stacked: Mapping[str, LowRank], slot: int | jax.Array) -> dict[str, Gated]:
  """All slots side by side along the rank, with the gate open for one of them.

  The same function as `select`, in other arrays. Under `vmap` over slots the factors are not
  batched: each layer makes two products of all rows with rank * slots columns, which for a few
  slots costs less than a small product for each row, in time and in memory.

  Args:
    stacked: what `stack` made.
    slot: as in `select`, but one only.

  Raises:
    ValueError: when there are several slots.
  """
  if jnp.ndim(slot):
    raise ValueError("gate opens one slot; map over several, jax.vmap(lambda slot, x: ...)")
  slots = _slots(stacked)
  chosen = jax.nn.one_hot(slot, slots)

  def gated(adapter: LowRank) -> Gated:
    # The axes that lead in a and b: the slots, then the stacks.
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
  """The adapter as a LowRank, exactly.

  Raises:
    ValueError: when its kind has no such form.
  """
  try:
    return adapter.as_low_rank()
  except NotFactored as reason:
    raise ValueError(
      f"{path}: {reason}; lora_jax.to_lora(adapters, params, rank=...) makes the nearest LoRA of it"
    ) from None


def check_same_leaf(path: str, adapters: Sequence[LowRank]) -> None:
  """Raises ValueError when adapters are not of one leaf, of which ranks may differ."""
  shapes = {}
  for adapter in adapters:
    b_shape = list(adapter.b.shape)
    del b_shape[_rank_axis(adapter)]
    shapes[adapter.a.shape[:-1], tuple(b_shape), adapter.roles] = adapter
  if len(shapes) > 1:
    each = "; ".join(f"{x.a.shape} and {x.b.shape}, roles {x.roles!r}" for x in shapes.values())
    raise ValueError(f"{path}: the adapters' factors are of different leaves: {each}")


def _rank_axis(adapter: LowRank) -> int:
  """The axis of the rank in b."""
  return adapter.a.ndim - 1 - adapter.roles.count("i")


def _folded(adapters: Adapters) -> dict[str, LowRank]:
  """Plain adapters with their scales made part of b."""
  plain = {path: low_rank(path, adapter) for path, adapter in adapters.items()}
  return {
    path: dataclasses.replace(x, b=x.b * x.scale, scale=1.0, path="") for path, x in plain.items()
  }


def _empty(path: str, adapters: Sequence[LowRank], rank: int) -> LowRank:
  """The adapter of zeros of a leaf."""
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
      f"lora_jax.to_lora(adapters, rank={empty.rank}) makes the nearest one that fits"
    )
  return dataclasses.replace(
    empty,
    a=jax.lax.dynamic_update_slice_in_dim(empty.a, adapter.a.astype(empty.a.dtype), 0, -1),
    b=jax.lax.dynamic_update_slice_in_dim(
      empty.b, adapter.b.astype(empty.b.dtype), 0, _rank_axis(empty)
    ),
  )


def _slots(stacked: Mapping[str, LowRank]) -> int:
  """How many adapters a stack has room for."""
  sizes = {x.shape[0] for x in jax.tree.leaves(stacked)}
  if len(sizes) != 1:
    raise ValueError(f"the leading axes {sorted(sizes)} are no slots of one stack; see stack")
  return sizes.pop()


def _side_by_side(x: jax.Array, rank_axis: int) -> jax.Array:
  """The leading axis made part of the rank: [slots, ..., rank, ...] to [..., slots * rank, ...]."""
  x = jnp.moveaxis(x, 0, rank_axis - 1)
  return x.reshape(*x.shape[: rank_axis - 1], -1, *x.shape[rank_axis + 1 :])
