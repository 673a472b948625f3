"""The adapters on the device: a bank of slots under each module that an adapter may adapt.

  bank = AdapterBank(params, config, jnp.float32)
  bank.write(1, bank.fit(adapter, 'medicine'))
  params_with_slots = attach(params, bank.held, slots_B)    # within a jitted program

An adapter of any target set and of any rank up to the bank's takes a slot by writes of fixed
shapes at a traced index, so nothing is ever compiled for it.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax import lora, targets
from lora_jax.bank_kernel import NONE, Bank, BankKernel
from lora_jax.errors import UserError
from lora_jax.hub.peft import Adapter
from lora_jax.kernels import LoraKernel
from lora_jax.serve.config import ServeConfig

Params = Mapping[str, Any]


@flax.struct.dataclass
class Update:
  """What an adapter holds for one module, on the host, with layers first.

  Attributes:
    a: (L, in, R), of its own rank.
    b: (L, R, out).
    scale: (L,), float32.
    m: (L, out), or None: no magnitudes.
  """

  a: np.ndarray
  b: np.ndarray
  scale: np.ndarray
  m: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Updates:
  """An adapter as `AdapterBank.write` takes it: path of a module -> its update."""

  modules: Mapping[str, Update]

  @property
  def nbytes(self) -> int:
    leaves = [leaf for update in self.modules.values() for leaf in vars(update).values()]
    return sum(leaf.nbytes for leaf in leaves if leaf is not None)


class AdapterBank:
  """Slots for adapters over one base.

  Attributes:
    held: path of a module -> its slots, all layers in each; an argument of programs.
  """

  def __init__(self, params: Params, config: ServeConfig, dtype: jax.typing.DTypeLike):
    """Makes room for `config.slots` adapters beside `NONE`.

    Args:
      params: the base.
      config: how many slots, of which rank, and under which modules.
      dtype: of A and B: that of activations, to which they would be cast in any case.

    Raises:
      UserError: a target matches nothing, or is of what sees images.
    """
    flat = _flatten(params)
    owners = targets.resolve(config.targets, params)
    paths = dict.fromkeys(path for owner in owners for path in targets.parts(owner))
    for path in filter(targets.is_sight, paths):
      raise UserError(f'{path} sees images, not requests; serve adapters of the language model')
    self._rank, self._dora = config.rank, config.dora
    # The lengths that magnitudes are divided by are those of the base and an update.
    self._base = {path: flat[f'{path}/kernel'] if config.dora else None for path in paths}
    self.held = {}
    for path in paths:
      layers, fan_in, fan_out = flat[f'{path}/kernel'].shape
      self.held[path] = Bank.empty(
        config.slots + 1,
        layers,
        fan_in=fan_in,
        fan_out=fan_out,
        rank=config.rank,
        dtype=dtype,
        dora=config.dora,
      )

  @property
  def nbytes(self) -> int:
    """What all slots take on the device."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self.held))

  def fit(self, adapter: Adapter, name: str) -> Updates:
    """Takes an adapter apart into what slots hold.

    Args:
      adapter: made for this base.
      name: of the adapter, for errors.

    Raises:
      UserError: there is no room for it in a slot.
    """
    others = lora.replaced(adapter.params)
    if others:
      raise UserError(
        f'{name}: trains {next(iter(others))} too, which all requests share; merge it into a base'
      )
    scales = adapter.scales()
    modules = {}
    for path, module in lora.modules(adapter.params).items():
      if path not in self.held:
        raise UserError(
          f'{name}: adapts {path}, and there are slots for {", ".join(self.held)}; start with it '
          'among --targets'
        )
      leaves = {key: np.asarray(leaf) for key, leaf in module.leaves.items()}
      if not all(np.isfinite(leaf).all() for leaf in leaves.values()):
        raise UserError(f'{name}: has numbers in {path} that are not finite; train it again')
      a, b, m = leaves['a'], leaves['b'], leaves.get('m')
      if 'a0' in leaves:
        # The kernel goes without what A and B began as (PiSSA).
        a = np.concatenate([a, leaves['a0']], axis=-1)
        b = np.concatenate([b, -leaves['b0']], axis=-2)
      if a.shape[-1] > self._rank:
        raise UserError(
          f'{name}: has rank {a.shape[-1]} in {path}, and slots have {self._rank}; start with '
          f'--max_rank={a.shape[-1]}'
        )
      if m is not None and not self._dora:
        raise UserError(f'{name}: has magnitudes (DoRA), and slots have none; start with --dora')
      modules[path] = Update(a, b, np.asarray(scales[module.owner], np.float32), m)
    return Updates(modules)

  def write(self, slot: int, updates: Updates) -> None:
    """Puts an adapter into a slot, in the place of what was there."""
    for path, bank in self.held.items():
      at = np.int32(slot)
      if path in updates.modules:
        update = self._padded(bank, updates.modules[path])
        self.held[path] = _write(bank, self._base[path], at, update)
      else:
        self.held[path] = _silence(bank, at)

  def warm_up(self) -> None:
    """Compiles what `write` runs; no slot changes."""
    nothing = Updates({})
    everywhere = {path: Update(*_zeros(bank)) for path, bank in self.held.items()}
    self.write(NONE, Updates(everywhere))
    self.write(NONE, nothing)

  def _padded(self, bank: Bank, update: Update) -> Update:
    """The update in the shapes and dtype of a slot, whatever it was stored in."""
    a, b, scale, m = _zeros(bank)
    a[..., : update.a.shape[-1]] = update.a
    b[..., : update.b.shape[-2], :] = update.b
    scale[:] = update.scale
    if update.m is not None:
      m[:] = update.m
    return Update(a, b, scale, m if self._dora else None)


def attach(params: Params, held: Mapping[str, Bank], slots_B: jax.Array) -> dict:
  """Puts a bank under a base, whose rows then have the adapters in these slots.

  Args:
    params: the base.
    held: of an `AdapterBank`.
    slots_B: the slot of each row, int32.
  """
  flat = _flatten(params)
  for path, bank in held.items():
    slots_LB = jnp.broadcast_to(slots_B, (bank.scale.shape[0], slots_B.size))
    flat[f'{path}/kernel'] = BankKernel(flat[f'{path}/kernel'], bank, slots_LB)
  return unflatten_dict(flat, sep='/')


def _zeros(bank: Bank) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """An update of a slot's shapes that changes nothing."""
  layers, _, fan_in, rank = bank.a.shape
  fan_out = bank.b.shape[-1]
  shapes = (layers, fan_in, rank), (layers, rank, fan_out), (layers,), (layers, fan_out)
  a, b, scale, m = (np.zeros(shape, np.float32) for shape in shapes)
  return a, b, scale, m


@functools.partial(jax.jit, donate_argnames='bank')
def _write(bank: Bank, w: Any, slot: jax.Array, update: Any) -> Bank:
  gain = None
  if bank.gain is not None:
    fresh = lambda: lora.gain(LoraKernel(w, update.a, update.b, update.scale), update.m)
    # Lengths are of whole kernels, which an adapter without magnitudes has no use for.
    gain = jax.lax.cond(jnp.any(update.m != 0), fresh, lambda: jnp.ones_like(update.m))
    gain = _put(bank.gain, gain, slot)
  return Bank(
    _put(bank.a, update.a, slot),
    _put(bank.b, update.b, slot),
    _put(bank.scale, update.scale, slot),
    gain,
  )


@functools.partial(jax.jit, donate_argnames='bank')
def _silence(bank: Bank, slot: jax.Array) -> Bank:
  """Makes a slot change nothing; its A and B stay, since a scale of 0 is enough."""
  gain = bank.gain
  if gain is not None:
    gain = _put(gain, jnp.ones((gain.shape[0], gain.shape[2])), slot)
  scale = _put(bank.scale, jnp.zeros(bank.scale.shape[0]), slot)
  return dataclasses.replace(bank, scale=scale, gain=gain)


def _put(leaf: jax.Array, fresh: jax.Array, slot: jax.Array) -> jax.Array:
  fresh = jnp.asarray(fresh, leaf.dtype)
  return jax.lax.dynamic_update_index_in_dim(leaf, fresh, slot, axis=1)


def _flatten(tree: Params) -> dict[str, Any]:
  return dict(flatten_dict(tree, sep='/'))
