"""A diffusion model in closed form, run by our samplers and by diffusers' schedulers with the same noise."""

import importlib
from typing import Any
from unittest import mock

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

from compdiff_jax.diffusion import trajectory
from compdiff_jax.diffusion.samplers import Sampler, make_table
from compdiff_jax.diffusion.schedule import NoiseSchedule
from compdiff_jax.interop.schedulers import to_diffusers

# Tiny models on few cores: waiting for a second thread takes longer than the arithmetic.
torch.set_num_threads(1)

SHAPE = (3, 2, 3, 4)
SEEDS = np.array([7, 0, 2**32 - 1], np.uint32)
NOISE = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
_CENTRE, _WIDTH = 1.0, 0.5


def predict(schedule: NoiseSchedule, sample: Any, timesteps: Any) -> np.ndarray:
  """The best possible output for pixels that are N(1, 0.5^2) or N(-1, 0.5^2), each with probability 1/2."""
  sample, timesteps = np.asarray(sample, np.float64), np.asarray(timesteps, np.float64)
  bar = np.interp(timesteps, np.arange(schedule.num_train_timesteps), schedule.alphas_cumprod)[:, None, None, None]
  alpha, sigma = np.sqrt(bar), np.sqrt(1 - bar)
  spread = (alpha * _WIDTH) ** 2 + sigma**2
  original = alpha * _WIDTH**2 * sample + sigma**2 * _CENTRE * np.tanh(alpha * _CENTRE * sample / spread)
  original = original / spread
  eps = (sample - alpha * original) / sigma
  output = {"epsilon": eps, "sample": original, "v_prediction": alpha * eps - sigma * original}
  return output[schedule.prediction_type].astype(np.float32)


# Fresh noise of each step, [52, *SHAPE].
FRESH = np.asarray(
  jax.jit(jax.vmap(lambda step: trajectory.step_noise(SEEDS, step, SHAPE[1:])))(jnp.arange(52))
)  # fmt: skip


def sample_jax(schedule: NoiseSchedule, sampler: Sampler, num_steps: int) -> np.ndarray:
  with jax.disable_jit():  # the closed form is NumPy, and compiling takes longer than the steps
    model = lambda *inputs: jnp.asarray(predict(schedule, *inputs))  # noqa: E731
    table = make_table(sampler, schedule, num_steps)
    return np.asarray(trajectory.sample(model, NOISE, lambda step: FRESH[int(step)], table))


def sample_torch(schedule: NoiseSchedule, sampler: Sampler, num_steps: int) -> np.ndarray:
  """The same by the class of diffusers, as StableDiffusionPipeline calls it."""
  config = to_diffusers(schedule, sampler)
  scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
  options = {"eta": sampler.eta} if sampler.name == "ddim" else {}
  scheduler.set_timesteps(num_steps)
  sample = torch.from_numpy(NOISE) * scheduler.init_noise_sigma
  for step, timestep in enumerate(scheduler.timesteps):
    scaled = scheduler.scale_model_input(sample, timestep)
    output = predict(schedule, scaled.numpy(), timestep.expand(len(sample)).numpy())
    noise = torch.from_numpy(FRESH[step].copy())
    with same_noise(scheduler, lambda: noise):  # noqa: B023
      sample = scheduler.step(torch.from_numpy(output), timestep, sample, **options).prev_sample
  return sample.numpy()


def same_noise(scheduler: Any, next_noise: Any):
  """Within the block the steps of `scheduler` take their fresh noise from `next_noise()`."""
  module = importlib.import_module(type(scheduler).__module__)
  if not hasattr(module, "randn_tensor"):
    module = importlib.import_module("diffusers.utils.torch_utils")
  return mock.patch.object(module, "randn_tensor", lambda *args, **kwargs: next_noise())
