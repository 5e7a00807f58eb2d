"""Guidance turns two conditionings into one prediction function for the samplers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (x_t [B, h, w, c], timesteps int [B]) -> model output [B, h, w, c]
Predict = Callable[[jax.Array, jax.Array], jax.Array]


def classifier_free_guidance(
  model: Callable[[jax.Array, jax.Array, Any], jax.Array],
  conditional: Any,
  unconditional: Any,
  scale: float | jax.Array,
) -> Predict:
  """out_u + scale (out_c - out_u) (Ho & Salimans 2022, Eq. 6 in diffusers' convention: scale 1 = no guidance).

  Args:
    model: (x_t, timesteps, context) -> model output.
    conditional, unconditional: contexts, pytrees of arrays [B, …]. Both branches run as one batch of 2B.
    scale: guidance weight, a scalar.
  """
  context = jax.tree.map(lambda u, c: jnp.concatenate([u, c]), unconditional, conditional)

  def predict(sample, timesteps):
    both = model(jnp.concatenate([sample, sample]), jnp.concatenate([timesteps, timesteps]), context)
    out_unconditional, out_conditional = jnp.split(both.astype(jnp.float32), 2)
    return out_unconditional + scale * (out_conditional - out_unconditional)

  return predict
