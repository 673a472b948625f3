"""How far kernels are aligned with what they multiply: the normalised feature norm of PLoP.

Of a kernel W and an input z it is ||z W|| over what it would be for a random input as long
as z (Hayou, Ghosh and Yu 2025, arXiv:2506.20629, definition 1). Where training has turned W
towards its inputs it is above 1, and near 1 where z is to W like any other vector. PLoP puts
adapters where it is lowest: there is most left to learn.

The random input is not drawn. Over all directions ||z' W||^2 averages ||z||^2 ||W||_F^2 / in
exactly, and that is what is divided by; the paper has the same for large widths.

  norms, tokens = over_tokens(model, params, batch)
  norms['layers/attn/o_proj'] / tokens        # (L,), means over the batch's tokens
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from lora_jax.kernels import Kernel, dense
from lora_jax.layers import Dense
from lora_jax.transformer import Transformer
from lora_jax.vision import Features

_SOWN = 'feature_norm'


def feature_norms(x: jax.Array, y: jax.Array, kernel: Kernel) -> jax.Array:
  """The normalised feature norm (...) of each input; of one that is zero, 0.

  Args:
    x: inputs, (..., in).
    y: their products with the kernel, (..., out).
    kernel: of any kind, (in, out).
  """
  length = lambda values: jnp.linalg.norm(values.astype(jnp.float32), axis=-1)
  of_kernel = jnp.linalg.norm(dense(kernel, jnp.float32).reshape(-1))
  at_random = length(x) * of_kernel * x.shape[-1] ** -0.5
  return length(y) / jnp.where(at_random > 0, at_random, 1)


def over_tokens(
  model: Transformer, params: Mapping[str, Any], batch: Mapping[str, Any]
) -> tuple[dict[str, jax.Array], jax.Array]:
  """Sums of each module's feature norms over the real tokens of a batch, and how many they are.

  Nothing is read off the model's own code: each Dense is watched from here, and has what is
  seen stored with its layer.

  Args:
    model: the Transformer.
    params: without adapters.
    batch: 'tokens', 'positions', 'segments', and 'features' with 'slots' where there are any.

  Returns:
    Path of each module of the blocks -> (L,), and a float32 scalar.
  """
  real_BT = batch['segments'] != 0

  def watch(call, arguments, options, context):
    y = call(*arguments, **options)
    module = context.module
    if isinstance(module, Dense):
      product = y
      if module.use_bias:
        product = y - jnp.broadcast_to(
          module.get_variable('params', 'bias').astype(y.dtype), y.shape
        )
      norms_BT = feature_norms(arguments[0], product, module.get_variable('params', 'kernel'))
      # What padding computes may be anything, and no number times 0 is no number.
      module.sow('intermediates', _SOWN, jnp.where(real_BT, norms_BT, 0).sum())
    return y

  features = Features(batch['features'], batch['slots']) if 'features' in batch else None
  with nn.intercept_methods(watch):
    _, sown = model.apply(
      {'params': params},
      batch['tokens'],
      batch['positions'],
      batch['segments'],
      features=features,
      mutable=['intermediates'],
    )
  flat: dict[str, Any] = dict(flatten_dict(sown['intermediates'], sep='/'))
  norms = {path.removesuffix(f'/{_SOWN}'): of_layers for path, (of_layers,) in flat.items()}
  return norms, real_BT.sum().astype(jnp.float32)
