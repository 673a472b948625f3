"""Causal attention by cuDNN's flash kernel, through `jax.nn.dot_product_attention`.

if takes(q_BTNH, cap, hopper):
  out_BTNH = self_attend(q_BTNH, k_BKTH, v_BKTH, mask_BTT, scale)
"""

import functools

import jax
import jax.numpy as jnp

# Of `jax.nn.dot_product_attention`.
_IMPLEMENTATION = 'cudnn'


def takes(q_BTNH: jax.Array | jax.ShapeDtypeStruct, cap: float, hopper: bool) -> bool:
  """Whether the kernel can be given such queries: its rules in JAX 0.10 to 0.12.

  Args:
    q_BTNH: queries, or anything of their shape and dtype.
    cap: of the scores, see `attention.softcap`.
    hopper: whether the GPU's compute capability is 9.0 or more.
  """
  _, time, _, head_dim = q_BTNH.shape
  return (
    q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
    and not cap
    and head_dim % 8 == 0
    and head_dim <= (256 if hopper else 128)
    # For the backward pass with a mask.
    and time % 2 == 0
  )


def self_attend(
  q_BTNH: jax.Array,
  k_BKTH: jax.Array,
  v_BKTH: jax.Array,
  mask_BTT: jax.Array | None,
  scale: float,
) -> jax.Array:
  """Attention to tokens that are not later in the row, and that the mask shows.

  Blocks of later tokens are skipped. JAX's own batching rule wants a mask for each head
  as soon as masks are mapped over; here an axis that is mapped over joins the batch
  instead, and one mask serves all heads. The price is that the backward pass runs the
  forward kernel once more, unless the block is rematerialised: the compiler then sees
  that it has just been run. Differentiable in reverse mode, once.

  Args:
    q_BTNH: queries.
    k_BKTH: keys of the same tokens.
    v_BKTH: values of the same tokens.
    mask_BTT: True where a query (second axis) may see a key (third), at least itself;
      None: all.
    scale: what scores are multiplied by.

  Returns:
    out_BTNH.
  """
  return _flash(scale, q_BTNH, k_BKTH, v_BKTH, mask_BTT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(scale, q_BTNH, k_BKTH, v_BKTH, mask_BTT):
  return _forward(scale, q_BTNH, k_BKTH, v_BKTH, mask_BTT)[0]


def _forward(scale, *held):
  # Run as for a backward pass, so that there it is found to be the same operation.
  run = lambda q_BTNH, k_BKTH, v_BKTH, mask_BTT: jax.vjp(
    _kernel(scale, mask_BTT), q_BTNH, k_BKTH, v_BKTH
  )[0]
  return _joining_batches(run)(*held), held


def _backward(scale, held, grad_BTNH):
  run = lambda q_BTNH, k_BKTH, v_BKTH, mask_BTT, grad_BTNH: jax.vjp(
    _kernel(scale, mask_BTT), q_BTNH, k_BKTH, v_BKTH
  )[1](grad_BTNH)
  return *_joining_batches(run)(*held, grad_BTNH), None


_flash.defvjp(_forward, _backward)


def _kernel(scale, mask_BTT):
  def attend(q_BTNH, k_BKTH, v_BKTH):
    return jax.nn.dot_product_attention(
      q_BTNH,
      k_BKTH.swapaxes(1, 2),
      v_BKTH.swapaxes(1, 2),
      mask=None if mask_BTT is None else mask_BTT[:, None],
      scale=scale,
      is_causal=True,
      implementation=_IMPLEMENTATION,
    )

  return attend


def _joining_batches(run):
  """`run`, of arrays that lead with a batch: mapped over, it runs once on a longer batch."""
  mapped = jax.custom_batching.custom_vmap(run)

  @mapped.def_vmap
  def rule(size, is_mapped, *args):
    def join(x, x_is_mapped):
      x = x if x_is_mapped else jnp.broadcast_to(x[None], (size, *x.shape))
      return x.reshape(-1, *x.shape[2:])

    # There may be another axis to map over outside.
    out = _joining_batches(run)(*jax.tree.map(join, args, tuple(is_mapped)))
    out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
    return out, jax.tree.map(lambda _: True, out)

  return mapped
