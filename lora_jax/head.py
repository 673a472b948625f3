"""The head: hidden states to logits, apart from the model, for the positions that matter.

kernel = head_kernel(model, params)
logits_PV = logits(model, hidden_PD, kernel)
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lora_jax.attention import softcap
from lora_jax.kernels import Kernel, TableKernel, dot

if TYPE_CHECKING:
  from lora_jax.transformer import Transformer

# Of a table of embeddings multiplied as it lies, a CPU makes the most of between so many rows.
_AS_IT_LIES = {'float32': (9, math.inf), 'bfloat16': (2, 64)}


def head_kernel(model: 'Transformer', params: Mapping[str, Any], rows: int | None = None) -> Kernel:
  """The head as a kernel (D, V), as it is best laid out for many products.

  A tied table is (V, D) and the product wants (D, V). Turning it is a copy, and multiplying it
  as it lies is as fast on a CPU for some numbers of rows and several times slower for others
  (BUILD_NOTES.md, Speed).

  Args:
    model: the Transformer.
    params: its parameters.
    rows: hidden states in one product, where they may be few; None: many.
  """
  if not model.config.tie_embeddings:
    return params['lm_head']['kernel']
  table_VD = params['embed_tokens']['embedding'].astype(model.dtype)
  least, most = _AS_IT_LIES.get(jnp.dtype(model.dtype).name, _AS_IT_LIES['bfloat16'])
  if least <= (math.inf if rows is None else rows) <= most:
    return TableKernel(table_VD)
  return jax.lax.optimization_barrier(table_VD.T)


def logits(
  model: 'Transformer',
  hidden: jax.Array,
  kernel: Kernel,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  """Hidden states (..., D) times the head's kernel (D, V): float32 logits (..., V).

  Args:
    model: the Transformer, which may cap its logits.
    hidden: hidden states after the last norm.
    kernel: from `head_kernel`.
    dtype: what products are rounded to. Where something is chosen by the logits they
      are not to be rounded to less than float32: in bfloat16, choices would tie.
  """
  return softcap(dot(hidden, kernel, dtype).astype(jnp.float32), model.config.logit_cap)
