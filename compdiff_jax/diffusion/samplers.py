"""Samplers: pure functions from a prediction function and initial noise to latents, one `lax.scan` each."""

import jax
import jax.numpy as jnp
import numpy as np

from compdiff_jax.diffusion.guidance import Predict
from compdiff_jax.diffusion.schedule import NoiseSchedule


def initial_noise(seeds: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
  """Standard normal [B, *shape]; sample i depends on seeds[i] (uint32 [B]) alone, never on the batch around it."""
  return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


def _original_and_noise(schedule: NoiseSchedule, output, sample, alpha_cumprod):
  """The x_0 and eps that a model output stands for."""
  alpha, sigma = jnp.sqrt(alpha_cumprod), jnp.sqrt(1.0 - alpha_cumprod)
  if schedule.prediction_type == "epsilon":
    return (sample - sigma * output) / alpha, output
  if schedule.prediction_type == "sample":
    return output, (sample - alpha * output) / sigma
  return alpha * sample - sigma * output, alpha * output + sigma * sample


def ddim_sample(predict: Predict, noise: jax.Array, schedule: NoiseSchedule, num_steps: int) -> jax.Array:
  """Deterministic DDIM (Song et al. 2021, Eq. 12 with sigma = 0) on diffusers' "leading" grid.

  Args:
    predict: guided model output for (x_t, timesteps [B]).
    noise: x_T, standard normal [B, h, w, c]; the trajectory is carried in float32.
    schedule: noise schedule and prediction type.
    num_steps: number of model calls.

  Returns:
    x_0 [B, h, w, c], in the latent scale of training.
  """
  timesteps = schedule.leading_timesteps(num_steps)
  previous = timesteps - schedule.num_train_timesteps // num_steps
  alphas_cumprod = schedule.alphas_cumprod
  alpha_t = alphas_cumprod[timesteps]
  alpha_previous = np.where(previous >= 0, alphas_cumprod[np.maximum(previous, 0)], schedule.final_alpha_cumprod)

  def step(sample, inputs):
    timestep, alpha_t, alpha_previous = inputs
    output = predict(sample, jnp.full(sample.shape[:1], timestep)).astype(jnp.float32)
    original, eps = _original_and_noise(schedule, output, sample, alpha_t)
    return jnp.sqrt(alpha_previous) * original + jnp.sqrt(1.0 - alpha_previous) * eps, None

  grid = (jnp.asarray(timesteps), jnp.asarray(alpha_t, jnp.float32), jnp.asarray(alpha_previous, jnp.float32))
  return jax.lax.scan(step, noise.astype(jnp.float32), grid)[0]
