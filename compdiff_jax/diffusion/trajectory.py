"""From noise to latents: one `lax.scan` that runs any sampler's table, with random draws that belong to the sample."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from compdiff_jax.diffusion.guidance import Predict
from compdiff_jax.diffusion.samplers import Table


def initial_noise(seeds: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
  """Standard normal [B, *shape]; sample i depends on seeds[i] (uint32 [B]) alone, never on the batch around it."""
  return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


def step_noise(seeds: jax.Array, step: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
  """The fresh noise of model call `step` = 0, 1, …: standard normal [B, *shape], a function of (seeds[i], step)."""
  draw = lambda seed: jax.random.normal(jax.random.fold_in(jax.random.key(seed), step), shape)  # noqa: E731
  return jax.vmap(draw)(seeds)


def sample(
  predict: Predict,
  noise: jax.Array,
  draw: Callable[[jax.Array], jax.Array],
  table: Table,
) -> jax.Array:
  """Runs a sampler.

  Args:
    predict: guided model output for (x_t, timesteps float32 [B]).
    noise: standard normal [B, h, w, c]; the trajectory is carried in float32.
    draw: fresh noise [B, h, w, c] of a step; called by the samplers that need it.
    table: coefficients of the sampler, `samplers.make_table`.

  Returns:
    x_0 [B, h, w, c], in the latent scale of training.
  """
  random = bool(np.any(table.matrices[..., -1]))
  matrices = jnp.asarray(table.matrices if random else table.matrices[..., :-1], jnp.float32)
  state = jnp.zeros((matrices.shape[1], *noise.shape), jnp.float32).at[0].set(table.initial_scale * noise)

  def step(state, inputs):
    number, timestep, matrix = inputs
    output = predict(state[0], jnp.full(noise.shape[:1], timestep)).astype(jnp.float32)
    known = jnp.concatenate([state, output[None], *([draw(number)[None]] if random else [])])
    # Elementwise, not a matrix product: float32 on every platform, and no sample depends on the size of the batch.
    return jnp.sum(matrix[..., None, None, None, None] * known, axis=1), None

  inputs = (jnp.arange(len(matrices)), jnp.asarray(table.timesteps, jnp.float32), matrices)
  return jax.lax.scan(step, state, inputs)[0][0]
