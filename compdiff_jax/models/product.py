"""Product with a kernel: one function, which linear layers and 1x1 convolutions share."""

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x @ kernel, [..., in] x [in, out] -> [..., out].

  The gradients are those that JAX would derive. But for that of the kernel a CPU has to transpose one of the sides,
  which can take longer than the product itself: here it is the narrower one, in JAX's own form always the cotangent.
  """
  return x @ kernel


def _gradients(inputs: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, kernel = inputs
  if x.shape[-1] > cotangent.shape[-1]:
    of_kernel = lax.platform_dependent(x, cotangent, cpu=_cotangent_transposed, default=_over_rows)
  else:
    of_kernel = _over_rows(x, cotangent)
  return cotangent @ kernel.T, of_kernel


product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _gradients)


def _over_rows(x: jax.Array, cotangent: jax.Array) -> jax.Array:
  """x^T cotangent, summed over all axes but the last: [..., in] and [..., out] -> [in, out]. A CPU transposes x."""
  return jnp.tensordot(x, cotangent, (tuple(range(x.ndim - 1)),) * 2)


def _cotangent_transposed(x: jax.Array, cotangent: jax.Array) -> jax.Array:
  """The same; the barrier keeps the compiler from turning the product round again, to transpose x."""
  of_rows = lax.optimization_barrier(cotangent.reshape(-1, cotangent.shape[-1]).T)
  return (of_rows @ x.reshape(-1, x.shape[-1])).T
