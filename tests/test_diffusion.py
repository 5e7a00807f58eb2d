"""Noise schedule, objective and guidance against diffusers' schedulers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from jax.sharding import NamedSharding

from compdiff_jax.cli import InputError
from compdiff_jax.diffusion import objective
from compdiff_jax.diffusion.guidance import composed_guidance
from compdiff_jax.diffusion.schedule import NoiseSchedule

_SCHEDULES = [
  {},
  {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "steps_offset": 0, "set_alpha_to_one": True},
  {"prediction_type": "v_prediction"},
  {"prediction_type": "sample", "num_train_timesteps": 200},
  {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
]


def _torch(array):
  return torch.from_numpy(np.array(array))


def _draw(seed, shape=(3, 4, 5, 4)):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("fields", _SCHEDULES)
def test_forward_process_and_targets_equal_diffusers(fields):
  schedule = NoiseSchedule(**fields)
  config = {k: v for k, v in schedule.to_dict().items() if k not in ("set_alpha_to_one", "steps_offset")}
  theirs = DDPMScheduler(**config)
  np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=2e-5, atol=1e-8)
  latents, noise = _draw(0), _draw(1)
  timesteps = np.array([0, 57, schedule.num_train_timesteps - 1])
  noisy = objective.add_noise(schedule, latents, noise, timesteps)
  expected = theirs.add_noise(_torch(latents), _torch(noise), _torch(timesteps))
  np.testing.assert_allclose(noisy, expected, atol=1e-5)
  target = objective.target(schedule, latents, noise, timesteps)
  expected = {
    "epsilon": noise,
    "sample": latents,
    "v_prediction": theirs.get_velocity(_torch(latents), _torch(noise), _torch(timesteps)).numpy(),
  }[schedule.prediction_type]
  np.testing.assert_allclose(target, expected, atol=1e-5)


def test_denoising_loss_is_the_mean_square_of_each_sample():
  a, b = _draw(0), _draw(1)
  loss = objective.denoising_loss(jnp.asarray(a, jnp.bfloat16), b)
  assert loss.dtype == jnp.float32
  rounded = np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64)
  np.testing.assert_allclose(loss, [np.mean((x - y) ** 2) for x, y in zip(rounded, b.astype(np.float64))], rtol=1e-5)


def test_guidance_is_linear_in_the_scale_and_one_is_none():
  def model(sample, timesteps, context):
    return sample * context.mean((1, 2))[:, None, None, None] + timesteps[:, None, None, None]

  sample, timesteps = _draw(0), jnp.array([1, 2, 3])
  conditional, unconditional = _draw(1, (3, 5, 2)), _draw(2, (3, 5, 2))
  contexts = [unconditional, conditional]
  out = lambda scale: composed_guidance(model, contexts, [(1, 0, scale)])(sample, timesteps)  # noqa: E731
  np.testing.assert_allclose(out(1.0), model(sample, timesteps, conditional), rtol=1e-5)
  np.testing.assert_allclose(out(0.0), model(sample, timesteps, unconditional), rtol=1e-5)
  np.testing.assert_allclose(out(3.0), out(0.0) + 3 * (out(1.0) - out(0.0)), rtol=1e-4, atol=1e-5)


def test_guidance_moves_no_row_to_another_device():
  model = lambda sample, timesteps, context: jnp.tanh(sample * context.mean((1, 2))[:, None, None, None])  # noqa: E731
  rows = NamedSharding(jax.make_mesh((8,), ("data",)), jax.P("data"))
  sample, timesteps, *contexts = jax.device_put([_draw(0, (16, 4, 4, 2)), np.zeros(16), *_draw(1, (2, 16, 5, 2))], rows)
  guided = lambda *args: composed_guidance(model, args[2:], [(1, 0, 5.0)], 0.5)(*args[:2])  # noqa: E731
  compiled = jax.jit(guided, out_shardings=rows).lower(sample, timesteps, *contexts).compile().as_text()
  assert "f32[2," in compiled  # a device's own two rows
  assert not re.findall(r"all-gather|all-to-all|collective-permute|all-reduce", compiled)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescaled_guidance_equals_diffusers(rescale):
  model = lambda sample, timesteps, context: sample * context.mean((1, 2))[:, None, None, None] + 1  # noqa: E731
  sample, timesteps = _draw(0), jnp.array([1, 2, 3])
  conditional, unconditional = _draw(1, (3, 5, 2)), _draw(2, (3, 5, 2))
  out = lambda scale, *rescale: composed_guidance(  # noqa: E731
    model, [unconditional, conditional], [(1, 0, scale)], *rescale
  )(sample, timesteps)
  ours = out(5.0, rescale)
  expected = rescale_noise_cfg(_torch(out(5.0)), _torch(out(1.0)), rescale)
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"beta_schedule": "cosine"}, "beta_schedule 'cosine'"),
    ({"prediction_type": "epsilonn"}, "did you mean 'epsilon'"),
    ({"steps_ofset": 1}, "did you mean 'steps_offset'"),
    ({"rescale_betas_zero_snr": True}, "needs prediction_type 'v_prediction'"),
  ],
)
def test_bad_schedules_are_refused(fields, words):
  with pytest.raises(InputError, match=words):
    NoiseSchedule.from_dict(fields)
