"""The denoising objective (Ho et al. 2020, Eq. 14), per sample and in float32."""

import jax
import jax.numpy as jnp

from compdiff_jax.diffusion.schedule import NoiseSchedule


def _alpha_sigma(schedule: NoiseSchedule, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
  """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), each [B, 1, 1, 1]."""
  alphas_cumprod = jnp.asarray(schedule.alphas_cumprod, jnp.float32)[timesteps][:, None, None, None]
  return jnp.sqrt(alphas_cumprod), jnp.sqrt(1.0 - alphas_cumprod)


def add_noise(schedule: NoiseSchedule, latents: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
  """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps; latents and noise [B, h, w, c], timesteps int [B]."""
  alpha, sigma = _alpha_sigma(schedule, timesteps)
  return alpha * latents + sigma * noise


def target(schedule: NoiseSchedule, latents: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
  """What the network should output: eps, x_0, or v = alpha eps - sigma x_0 (Salimans & Ho 2022, App. D)."""
  if schedule.prediction_type == "epsilon":
    return noise
  if schedule.prediction_type == "sample":
    return latents
  alpha, sigma = _alpha_sigma(schedule, timesteps)
  return alpha * noise - sigma * latents


def min_snr_weight(schedule: NoiseSchedule, timesteps: jax.Array, gamma: float) -> jax.Array:
  """Weight of each sample's squared error, float32 [B], by min-SNR-gamma (Hang et al. 2023, Sec. 3.4 and App.).

  With SNR = alpha_bar / (1 - alpha_bar) the error of x_0 is weighted by min(SNR, gamma). Errors of eps and v are errors
  of x_0 times SNR and SNR + 1, so their weights are min(SNR, gamma) over these.
  """
  alphas_cumprod = schedule.alphas_cumprod
  snr = jnp.asarray(alphas_cumprod / (1 - alphas_cumprod), jnp.float32)[timesteps]
  if schedule.prediction_type == "epsilon":
    return jnp.minimum(1.0, gamma / snr)
  clipped = jnp.minimum(snr, gamma)
  return clipped if schedule.prediction_type == "sample" else clipped / (snr + 1)


def denoising_loss(prediction: jax.Array, wanted: jax.Array) -> jax.Array:
  """Mean squared error per sample, float32 [B]."""
  error = prediction.astype(jnp.float32) - wanted.astype(jnp.float32)
  return jnp.mean(jnp.square(error), axis=(1, 2, 3))
