"""Every sampler against its scheduler in diffusers, on a model in closed form and with the same noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compdiff_jax.cli import InputError
from compdiff_jax.diffusion import samplers, trajectory
from compdiff_jax.diffusion.samplers import DEFAULT_SPACINGS, SPACINGS, Sampler
from compdiff_jax.diffusion.schedule import NoiseSchedule
from tests import toy_diffusion

_OPTIONS = [
  *[Sampler(name, spacing) for name in DEFAULT_SPACINGS for spacing in SPACINGS],
  *[Sampler("ddim", spacing, eta=eta) for spacing, eta in (("leading", 1.0), ("trailing", 0.6))],
  *[Sampler(name, karras=True) for name in ("dpmpp_2m", "euler", "unipc")],
]
# Schedules with numbers of steps. From a zero signal-to-noise ratio diffusers' Euler comes down from 4096 times the
# noise: in a single step only rounding is left of the picture.
_CASES = [
  (NoiseSchedule(), (1, 2, 5, 20)),
  (NoiseSchedule(beta_schedule="linear", beta_end=0.02, steps_offset=0, set_alpha_to_one=True), (1, 5)),
  (NoiseSchedule(prediction_type="v_prediction"), (5, 20)),
  (NoiseSchedule(prediction_type="sample", num_train_timesteps=200), (1, 5)),
  (NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True), (5,)),
]


@pytest.mark.parametrize("sampler", _OPTIONS, ids=str)
def test_equals_diffusers(sampler):
  compared = 0
  for schedule, steps in _CASES:
    try:
      sampler.check(schedule)
    except InputError:
      continue
    for num_steps in steps:
      ours = toy_diffusion.sample_jax(schedule, sampler, num_steps)
      theirs = toy_diffusion.sample_torch(schedule, sampler, num_steps)
      np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0, err_msg=f"{schedule} {num_steps}")
      compared += 1
  assert compared >= 8


def test_grids():
  """As the reference samples, and the model calls of PNDM."""
  ddpm = samplers.make_table(Sampler("ddpm"), NoiseSchedule(), 75).timesteps
  np.testing.assert_array_equal(ddpm, np.arange(963, 0, -13))
  assert len(samplers.make_table(Sampler("pndm"), NoiseSchedule(), 20).timesteps) == 21
  np.testing.assert_array_equal(
    samplers.make_table(Sampler("pndm"), NoiseSchedule(), 4).timesteps, [751, 501, 501, 251, 1]
  )


@pytest.mark.parametrize("sampler", _OPTIONS, ids=str)
@pytest.mark.parametrize("steps_offset", [0, 1, 2])
def test_every_number_of_steps_gives_a_finite_table_or_is_refused(sampler, steps_offset):
  """Up to one step a timestep; what is refused has a timestep twice or one behind the last."""
  schedule, refused = NoiseSchedule(num_train_timesteps=20, steps_offset=steps_offset), []
  for num_steps in range(1, 21):
    try:
      table = samplers.make_table(sampler, schedule, num_steps)
    except InputError:
      refused.append(num_steps)
      continue
    assert np.isfinite(table.matrices).all() and 0 <= table.timesteps.min() <= table.timesteps.max() <= 19
  fast = sampler.name in ("dpmpp_2m", "unipc")
  points = {n: n + 1 if fast and sampler.timestep_spacing != "trailing" else n for n in range(1, 21)}
  outside = {n for n, p in points.items() if p > 20}
  if sampler.timestep_spacing == "leading":
    outside |= {n for n, p in points.items() if (p - 1) * (20 // p) + steps_offset > 19}
  assert set(refused) == outside


def test_a_picture_depends_on_its_seed_alone_and_every_step_draws_anew():
  """The compiled program, with the noise drawn inside."""
  table, shape = samplers.make_table(Sampler("ddpm"), NoiseSchedule(), 4), (4, 4, 2)

  @jax.jit
  def run(seeds):
    predict = lambda sample, timesteps: jnp.tanh(sample) + timesteps[:, None, None, None] / 1000  # noqa: E731
    draw = lambda step: trajectory.step_noise(seeds, step, shape)  # noqa: E731
    return trajectory.sample(predict, trajectory.initial_noise(seeds, shape), draw, table)

  together, alone = run(jnp.array([1, 7, 2], jnp.uint32)), run(jnp.array([7], jnp.uint32))
  np.testing.assert_array_equal(together[1], alone[0])
  assert np.abs(together[0] - together[1]).max() > 0.1

  seeds = jnp.arange(64, dtype=jnp.uint32)
  draws = [trajectory.initial_noise(seeds, shape), *(trajectory.step_noise(seeds, step, shape) for step in (0, 1))]
  correlation = np.corrcoef(np.reshape(draws, (3, -1)))
  np.testing.assert_allclose(correlation, np.eye(3), atol=0.08)
  assert np.std(draws[1]) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: Sampler("dpmpp2m"), "sampler 'dpmpp2m'; did you mean 'dpmpp_2m'"),
    (lambda: Sampler("ddim", "leding"), "timestep_spacing 'leding'; did you mean 'leading'"),
    (lambda: Sampler("ddim", eta=1.5), "eta 1.5 must lie in 0 to 1"),
    (lambda: Sampler("ddpm", eta=0.5), "only ddim has eta, ddpm has not"),
    (lambda: Sampler("pndm", karras=True), "pndm has no Karras noise levels; dpmpp_2m, euler, unipc have"),
    (lambda: samplers.make_table(Sampler(), NoiseSchedule(), 0), "sampling steps 0 must lie in 1 to 999"),
    (lambda: samplers.make_table(Sampler(), NoiseSchedule(), 1000), "sampling steps 1000 must lie in 1 to 999"),
    (lambda: samplers.make_table(Sampler("euler"), NoiseSchedule(), 1001), "must lie in 1 to 1000"),
    (lambda: samplers.make_table(Sampler("dpmpp_2m"), NoiseSchedule(), 1000), "must lie in 1 to 999 with dpmpp_2m"),
    (lambda: samplers.make_table(Sampler("unipc", "leading"), NoiseSchedule(), 999), "must lie in 1 to 998 with unipc"),
    (
      lambda: samplers.make_table(Sampler(), NoiseSchedule(steps_offset=2), 500),
      "sampling steps 500 begin at timestep 1000 with scheduler.steps_offset 2",
    ),
    (lambda: Sampler("pndm").check(NoiseSchedule(prediction_type="sample")), "pndm does not support prediction_type"),
    (
      lambda: Sampler("pndm").check(NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)),
      "pndm does not support rescale_betas_zero_snr",
    ),
  ],
)
def test_what_cannot_be_sampled_is_named(make, words):
  with pytest.raises(InputError) as error:
    make()
  assert words in str(error.value)
