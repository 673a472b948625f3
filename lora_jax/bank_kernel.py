"""A bank of adapters under one kernel, of which each row of a batch is multiplied by its own.

The product with the base is one for all rows; to it a row adds the low-rank update in the
slot that it names. What that costs depends on the rows and never on how many slots there
are. The slot `NONE` holds zeros: a row that names it is answered by the base.

  kernel = BankKernel(w, Bank.empty(2, fan_in=4, fan_out=3, rank=2), slots=jnp.asarray([1, 0]))
  y_BTO = dot(x_BTI, kernel)
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

# The slot of a row without an adapter.
NONE = 0


@flax.struct.dataclass
class Bank:
  """One module's low-rank updates, a slot each. Layers, where there are such, come first.

  Attributes:
    a: (slots, in, R), zero beyond an adapter's own rank.
    b: (slots, R, out).
    scale: (slots,), float32; 0 in a slot that does not adapt this module.
    gain: (slots, out), float32, what each output is multiplied by (DoRA), 1 in a slot
      without; None: no slot has any.
  """

  a: jax.Array
  b: jax.Array
  scale: jax.Array
  gain: jax.Array | None = None

  @classmethod
  def empty(
    cls,
    slots: int,
    *lead: int,
    fan_in: int,
    fan_out: int,
    rank: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
    dora: bool = False,
  ) -> 'Bank':
    """Slots that change nothing, under the leading axes `lead`."""
    return cls(
      jnp.zeros((*lead, slots, fan_in, rank), dtype),
      jnp.zeros((*lead, slots, rank, fan_out), dtype),
      jnp.zeros((*lead, slots)),
      jnp.ones((*lead, slots, fan_out)) if dora else None,
    )


@flax.struct.dataclass
class BankKernel:
  """A frozen kernel, a bank of updates, and which of them each row of a batch takes.

  Attributes:
    w: the base kernel, (in, out); any kind that `dot` accepts.
    bank: the updates.
    slots: (B,), int32.
    form: how updates are computed, 'gather' or 'grouped'; '': as is best on this device.
  """

  w: Any
  bank: Bank
  slots: jax.Array
  form: str = flax.struct.field(pytree_node=False, default='')


def add_updates(
  base: jax.Array, x: jax.Array, kernel: BankKernel, dtype: jax.typing.DTypeLike
) -> jax.Array:
  """Adds each row's own update to the product of all rows with the base.

  Args:
    base: `x @ w`, (B, ..., out), of `dtype`.
    x: (B, ..., in).
    kernel: whose `w` has been used already.
    dtype: what sums are kept in.

  Returns:
    `gain * (base + scale * x @ a @ b)`, (B, ..., out), of `dtype`.
  """
  bank, slots_B = kernel.bank, kernel.slots
  x_BTI = x.reshape(x.shape[0], -1, x.shape[-1])
  form = _grouped if (kernel.form or _best()) == 'grouped' else _gathered
  update = form(x_BTI, bank, slots_B, dtype).reshape(base.shape)
  if bank.gain is None:
    return base + update
  gain_BO = bank.gain[slots_B]
  # In float32: a gain rounded to bfloat16 could not leave 1 by little.
  gain = jnp.broadcast_to(jnp.expand_dims(gain_BO, range(1, base.ndim - 1)), base.shape)
  return (base + (gain - 1) * base + gain * update).astype(dtype)


def _best() -> str:
  """The form for the device of this process."""
  return 'gather'


def _gathered(x_BTI: jax.Array, bank: Bank, slots_B: jax.Array, dtype) -> jax.Array:
  """Each row's A and B side by side, and products batched over rows."""
  a_BIR, b_BRO = (leaf[slots_B].astype(x_BTI.dtype) for leaf in (bank.a, bank.b))
  low_BTR = jnp.einsum('BTI,BIR->BTR', x_BTI, a_BIR)
  low_BTR = _scaled(low_BTR, bank.scale[slots_B][:, None, None])
  return jnp.einsum('BTR,BRO->BTO', low_BTR, b_BRO, preferred_element_type=dtype)


def _scaled(low: jax.Array, scale: jax.Array) -> jax.Array:
  """`scale * low`, and 0 at scale 0 whatever the A of an adapter before makes of a row."""
  return jnp.where(scale == 0, 0, low * scale.astype(low.dtype))


def _grouped(x_BTI: jax.Array, bank: Bank, slots_B: jax.Array, dtype) -> jax.Array:
  """Rows sorted by slot, and one product for each slot's rows (Chen et al. 2023, SGMV).

  No adapter is copied. Its cost is that of the rows where the device multiplies groups as
  such, as TPUs do; elsewhere XLA goes over the empty groups too.
  """
  batch, time, fan_in = x_BTI.shape
  order_B = jnp.argsort(slots_B)
  sizes = time * jnp.bincount(slots_B, length=bank.scale.shape[0]).astype(jnp.int32)
  sorted_PI = x_BTI[order_B].reshape(-1, fan_in)
  low_PR = jax.lax.ragged_dot(sorted_PI, bank.a.astype(x_BTI.dtype), sizes)
  scale_P = jnp.repeat(bank.scale[slots_B[order_B]], time, total_repeat_length=batch * time)
  low_PR = _scaled(low_PR, scale_P[:, None])
  b = bank.b.astype(x_BTI.dtype)
  update_PO = jax.lax.ragged_dot(low_PR, b, sizes, preferred_element_type=dtype)
  update_BTO = update_PO.reshape(batch, time, -1)
  return update_BTO[jnp.argsort(order_B)]
