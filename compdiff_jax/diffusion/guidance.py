"""Guidance turns several conditionings into one prediction function for the samplers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# (x_t [B, h, w, c], timesteps int [B]) -> model output [B, h, w, c]
Predict = Callable[[jax.Array, jax.Array], jax.Array]


def composed_guidance(
  model: Callable[[jax.Array, jax.Array, Any], jax.Array],
  contexts: Sequence[Any],
  terms: Sequence[tuple[int, int, float | jax.Array]],
  rescale: float = 0.0,
) -> Predict:
  """out_0 + sum of weight (out_i - out_j) over the terms (i, j, weight); all contexts run as one batch.

  With the one term (1, 0, scale) this is classifier-free guidance, out_0 + scale (out_1 - out_0) (Ho & Salimans 2022,
  Eq. 6 in diffusers' convention: scale 1 = no guidance).

  Args:
    model: (x_t, timesteps, context) -> model output.
    contexts: pytrees of arrays [B, …]; the first is the unconditional one, the second the fully conditional one.
    terms: which outputs differ, and the weight of the difference.
    rescale: from 0 to 1, how far the standard deviation over each sample is drawn to that of the second output, which
      keeps large weights from overexposing pictures (Lin et al. 2024, Eq. 15 and 16).
  """
  count = len(contexts)
  joined = jax.tree.map(interleave, *contexts)

  def predict(sample, timesteps):
    output = model(interleave(*[sample] * count), interleave(*[timesteps] * count), joined).astype(jnp.float32)
    outputs = jnp.unstack(output.reshape(-1, count, *output.shape[1:]), axis=1)
    guided = outputs[0] + sum(weight * (outputs[i] - outputs[j]) for i, j, weight in terms)
    if not rescale:
      return guided
    std = lambda values: jnp.std(values, axis=(1, 2, 3), keepdims=True)  # noqa: E731
    return guided * (1 - rescale + rescale * std(outputs[1]) / std(guided))

  return predict


def interleave(*parts: jax.Array) -> jax.Array:
  """n of [B, …] -> [n B, …], the n of a row next to each other, so that no row of a batch leaves its device."""
  return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
