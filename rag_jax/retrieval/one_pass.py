"""Inner products from one product in bfloat16, and how far they may be wrong.

In: questions in float32, and rows as a device stores them. Out: scores that
choose the rows to score again, bounds on their error, and the norms of rows
that the bounds need.

With q = p + r and e = f + s, where p and f are rounded to bfloat16, the error
is q e - p f = r e + p s: at most |r| |e| + |p| |s|. The residual r of a
question is known. s is 0 where bfloat16 or int8 is stored.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

# Added to squared norms. So the bounds cover numbers that float32 loses because
# they are too small.
_SQUARE_UNDERFLOW = 2.0**-80


def one_pass_scores(
  questions: Float[Array, "B R"], rows: Any
) -> Float[Array, "B N"]:
  """Returns inner products of rounded numbers, summed in float32.

  Args:
    questions: in float32.
    rows: [N, R] in float32, bfloat16 or int8.
  """
  return jnp.einsum(
    "BR,NR->BN",
    _rounded(questions).astype(jnp.bfloat16),
    # The integers of int8 are exact in bfloat16.
    rows.astype(jnp.bfloat16),
    preferred_element_type=jnp.float32,
  )


def error_per_norm(
  questions: Float[Array, "B R"], dtype: Any
) -> Float[Array, "B"]:
  """Returns how far scores are wrong at most, per unit of the norm of a row.

  That is, how far `one_pass_scores` are from sums of products in float32, in
  whatever order. Such a sum is itself off by at most half a unit of rounding,
  2**-24 |q| |e|, per addition. The product is allowed four times that, because
  the adders of matrix units do not always round to nearest. 2**-21 per addition
  covers both, and the rounding of the norms and of the bound.

  Args:
    questions: in float32.
    dtype: of the stored rows.
  """
  rounded = _rounded(questions)
  error = _norms(questions - rounded)
  if dtype == jnp.float32:  # rows are rounded too, to 8 bits
    error += 2.0**-8 * _norms(rounded)
  return error + 2.0**-21 * (questions.shape[1] + 16) * _norms(questions)


def row_norms(rows: Any, scales: Any, xp: Any = np) -> Any:
  """Returns the norms [N] of stored rows, in float32.

  Args:
    rows: [N, R] in float32, bfloat16 or int8.
    scales: [N] of the rows, or None.
    xp: the module: NumPy or JAX's.
  """
  norms = _norms(rows.astype(np.float32), xp)
  return norms if scales is None else norms * scales


def _norms(x: Any, xp: Any = jnp) -> Any:
  return xp.sqrt(xp.sum(x * x, axis=-1) + _SQUARE_UNDERFLOW)


def _rounded(x: jax.Array) -> jax.Array:
  """Returns float32 numbers that bfloat16 can hold."""
  # XLA would leave out a cast there and back.
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
