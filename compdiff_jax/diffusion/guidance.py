"""Guidance turns two conditionings into one prediction function for the samplers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# (x_t [B, h, w, c], timesteps int [B]) -> model output [B, h, w, c]
Predict = Callable[[jax.Array, jax.Array], jax.Array]


def classifier_free_guidance(
  model: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
  conditional: jax.Array,
  unconditional: jax.Array,
  scale: float | jax.Array,
) -> Predict:
  """out_u + scale (out_c - out_u) (Ho & Salimans 2022, Eq. 6 in diffusers' convention: scale 1 = no guidance).

  Args:
    model: (x_t, timesteps, encoder_hidden_states) -> model output.
    conditional, unconditional: encoder_hidden_states [B, L, C]. Both branches run as one batch of 2B.
    scale: guidance weight, a scalar.
  """
  context = jnp.concatenate([unconditional, conditional])

  def predict(sample, timesteps):
    both = model(jnp.concatenate([sample, sample]), jnp.concatenate([timesteps, timesteps]), context)
    out_unconditional, out_conditional = jnp.split(both.astype(jnp.float32), 2)
    return out_unconditional + scale * (out_conditional - out_unconditional)

  return predict
