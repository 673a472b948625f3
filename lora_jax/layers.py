"""What the blocks of the language model and of the vision tower are built from."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax.kernels import dot

ACTIVATIONS = {'silu': nn.silu, 'gelu_tanh': functools.partial(nn.gelu, approximate=True)}

_init = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')


class Dense(nn.Module):
  """A linear map whose kernel may be of any kind `dot` knows.

  Attributes:
    features: size of the output.
    dtype: of the output; None: the input's.
    use_bias: whether a bias is added.
  """

  features: int
  dtype: jax.typing.DTypeLike | None = None
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    # `self.param` would reject a kernel that is not one array of the declared shape.
    if self.is_initializing():
      kernel = self.param('kernel', _init, (x.shape[-1], self.features))
    else:
      kernel = self.get_variable('params', 'kernel')
    y = dot(x, kernel, self.dtype)
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, (self.features,))
      y += jnp.broadcast_to(bias.astype(y.dtype), y.shape)
    return y
