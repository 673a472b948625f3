"""Arithmetic of adapters: sums of what they add to their kernels, exact or cut to a rank.

  both = arithmetic.weighted_sum([(one, 2.0), (other, 1.0)], [0.5, 0.5])        # rank r1 + r2
  small = arithmetic.weighted_sum([(one, 2.0), (other, 1.0)], [0.5, 0.5], rank=8)
  voted = arithmetic.ties([(one, 2.0), (other, 1.0)], [1.0, 1.0], density=0.2, rank=8)
  attached = lora.attach(params, both, scale=1.0)

An operand is an adapter and its scale, of one number or by path and layer. A result is a
plain adapter of scale 1: fused modules are split, and where an adapter of PiSSA began is
taken off. A sum never forms a kernel's update; TIES and DARE must, a layer at a time.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from lora_jax import lora
from lora_jax.errors import UserError

Operand = tuple[Mapping[str, Any], lora.Scale]
# A (L, in, R) and scale * B (L, R, out), whose product is what an adapter adds.
Factors = tuple[jax.Array, jax.Array]


def weighted_sum(
  operands: Sequence[Operand], weights: Sequence[float], rank: int | None = None
) -> dict:
  """The adapter that adds the weighted sum of what the operands add.

  Args:
    operands: adapters of one base, with their scales.
    weights: a factor for each.
    rank: R of the result, the nearest one of that rank (by QR of the factors and the
      singular values of a matrix of the summed ranks); None: exact, by concatenation.

  Raises:
    UserError: an operand is no plain LoRA, or is for another base.
  """
  whole = {
    path: _concatenate([(a, weight * b) for weight, (a, b) in zip(weights, factors, strict=True)])
    for path, factors in _by_path(operands, weights).items()
  }
  return _tree(whole if rank is None else {path: _cut(*f, rank) for path, f in whole.items()})


def ties(operands: Sequence[Operand], weights: Sequence[float], density: float, rank: int) -> dict:
  """TIES merging (Yadav et al. 2023, algorithm 1) of each kernel's updates, then cut to a rank.

  Of each update the share `density` of largest magnitude is kept; every entry takes the
  sign of their sum, and is the mean of the weighted updates that have that sign.

  Args:
    operands: adapters of one base, with their scales.
    weights: a factor for each.
    density: share of the entries that are kept, above 0 and at most 1.
    rank: R of the result.

  Raises:
    UserError: as `weighted_sum`; the density is none.
  """

  def elect(update_KIO: jax.Array, key: jax.Array) -> jax.Array:
    del key
    kept = jax.vmap(lambda update: _largest(update, density))(update_KIO)
    sign = jnp.where(kept.sum(0, keepdims=True) >= 0, 1, -1)
    agrees = jnp.sign(kept) == jnp.broadcast_to(sign, kept.shape)
    total = (agrees * kept * _column(weights)).sum(0)
    return total / jnp.maximum(agrees.sum(0), 1)

  return _of_updates(elect, jax.random.key(0), operands, weights, density, rank)


def dare(
  key: jax.Array,
  operands: Sequence[Operand],
  weights: Sequence[float],
  density: float,
  rank: int,
) -> dict:
  """DARE (Yu et al. 2024): drops entries of each kernel's updates at random and rescales the rest.

  Args:
    key: PRNG key.
    operands: adapters of one base, with their scales.
    weights: a factor for each.
    density: share of the entries that are kept, above 0 and at most 1.
    rank: R of the result.

  Raises:
    UserError: as `ties`.
  """

  def drop(update_KIO: jax.Array, key: jax.Array) -> jax.Array:
    keep = jax.random.bernoulli(key, density, update_KIO.shape)
    return (jnp.where(keep, update_KIO / density, 0) * _column(weights)).sum(0)

  return _of_updates(drop, key, operands, weights, density, rank)


def _of_updates(
  merge: Callable[[jax.Array, jax.Array], jax.Array],
  key: jax.Array,
  operands: Sequence[Operand],
  weights: Sequence[float],
  density: float,
  rank: int,
) -> dict:
  """Merges the updates (K, in, out) of each kernel in each layer, and cuts the result."""
  if not 0 < density <= 1:
    raise UserError(f'density {density}: give a share above 0 and at most 1')

  def of_layer(layer: tuple[list[Factors], jax.Array]) -> Factors:
    factors, key = layer
    merged = merge(jnp.stack([_product(a, b) for a, b in factors]), key)
    u, s, v = jnp.linalg.svd(merged, full_matrices=False)
    return u[:, :rank], s[:rank, None] * v[:rank]

  out = {}
  for i, (path, factors) in enumerate(_by_path(operands, weights).items()):
    keys = jax.random.split(jax.random.fold_in(key, i), factors[0][0].shape[0])
    out[path] = jax.lax.map(of_layer, (factors, keys))
  return _tree(out)


def _by_path(operands: Sequence[Operand], weights: Sequence[float]) -> dict[str, list[Factors]]:
  """Path of each kernel -> the factors of every operand, of rank 1 and zero where it has none."""
  if len(operands) != len(weights) or not operands:
    raise UserError(f'{len(operands)} adapters and {len(weights)} weights; give one for each')
  held = [_plain(adapters, scale) for adapters, scale in operands]
  paths = dict.fromkeys(path for factors in held for path in factors)
  out = {}
  for path in paths:
    shapes = {(a.shape[:2], b.shape[2:]) for a, b in (f[path] for f in held if path in f)}
    if len(shapes) > 1:
      raise UserError(f'the adapters have {path} of different sizes; they are for different bases')
    (layers, fan_in), (fan_out,) = shapes.pop()
    none = jnp.zeros((layers, fan_in, 1)), jnp.zeros((layers, 1, fan_out))
    out[path] = [factors.get(path, none) for factors in held]
  return out


def _plain(adapters: Mapping[str, Any], scale: lora.Scale) -> dict[str, Factors]:
  """Path of each kernel -> what the adapter adds to it, in float32."""
  modules = lora.modules(adapters)
  odd = [
    *lora.replaced(adapters),
    *(f'{path}/m' for path in modules if 'm' in modules[path].leaves),
  ]
  if odd:
    raise UserError(f'the adapter holds {odd[0]}, which does not add up; give plain LoRA adapters')
  out = {}
  for path, module in modules.items():
    leaves = {name: leaf.astype(jnp.float32) for name, leaf in module.leaves.items()}
    scales = lora.scales_of(scale, module)[..., None, None]
    factors = [(leaves['a'], scales * leaves['b'])]
    if 'a0' in leaves:
      factors.append((leaves['a0'], -scales * leaves['b0']))
    out[path] = _concatenate(factors)
  return out


def _concatenate(factors: Sequence[Factors]) -> Factors:
  a, b = zip(*factors, strict=True)
  return jnp.concatenate(a, axis=-1), jnp.concatenate(b, axis=-2)


def _cut(a: jax.Array, b: jax.Array, rank: int) -> Factors:
  """The nearest product of rank R in the Frobenius norm (Eckart and Young 1936)."""
  in_basis, in_part = jnp.linalg.qr(a)
  out_basis, out_part = jnp.linalg.qr(b.swapaxes(-1, -2))
  small = _product(in_part, out_part.swapaxes(-1, -2))
  u, s, v = jnp.linalg.svd(small, full_matrices=False)
  u, s, v = u[..., :rank], s[..., :rank, None], v[..., :rank, :]
  return _product(in_basis, u), s * _product(v, out_basis.swapaxes(-1, -2))


# Accelerators round the factors of a product otherwise, to as little as bfloat16.
_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _largest(update: jax.Array, density: float) -> jax.Array:
  """Keeps a share of the entries, those of largest magnitude."""
  kept = int(density * update.size)
  magnitudes = jnp.abs(update)
  smallest = jnp.sort(magnitudes, axis=None)[update.size - kept] if kept else jnp.inf
  return jnp.where(magnitudes >= smallest, update, 0)


def _column(weights: Sequence[float]) -> jax.Array:
  return jnp.asarray(weights, jnp.float32)[:, None, None]


def _tree(factors: Mapping[str, Factors]) -> dict:
  leaves = {f'{path}/a': a for path, (a, _) in factors.items()}
  leaves |= {f'{path}/b': b for path, (_, b) in factors.items()}
  return unflatten_dict(leaves, sep='/')
