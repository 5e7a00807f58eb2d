"""scheduler_config.json: read as diffusers reads it, written so that diffusers reads the same."""

import diffusers
import numpy as np
import pytest

from compdiff_jax.cli import InputError
from compdiff_jax.diffusion.samplers import DEFAULT_SPACINGS, Sampler
from compdiff_jax.diffusion.schedule import NoiseSchedule
from compdiff_jax.interop.schedulers import CLASSES, from_diffusers, to_diffusers

# As it stands in the directories of Stable Diffusion 2.1-base.
SD21_BASE = {
  "_class_name": "PNDMScheduler",
  "_diffusers_version": "0.10.0.dev0",
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "beta_start": 0.00085,
  "clip_sample": False,
  "num_train_timesteps": 1000,
  "prediction_type": "epsilon",
  "set_alpha_to_one": False,
  "skip_prk_steps": True,
  "steps_offset": 1,
  "trained_betas": None,
}


def test_the_files_of_stable_diffusion():
  assert from_diffusers(SD21_BASE) == (NoiseSchedule(), Sampler("pndm"))
  v = {**SD21_BASE, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
  assert from_diffusers(v) == (NoiseSchedule(prediction_type="v_prediction"), Sampler("ddim"))
  zero = {**v, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
  expected = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True), Sampler("ddim", "trailing")
  assert from_diffusers(zero) == expected


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_left_out_is_the_default_of_the_class(name):
  """Every class with all of its fields written out, as save_config does, and with as few as possible."""
  torch_class = getattr(diffusers, CLASSES[name])
  needed = {"ddpm": {"clip_sample": False}, "ddim": {"clip_sample": False}, "pndm": {"skip_prk_steps": True}}
  theirs = torch_class(**needed.get(name, {}))
  few = from_diffusers({"_class_name": CLASSES[name], **needed.get(name, {})})
  assert few == from_diffusers({"_class_name": CLASSES[name], **theirs.config})
  schedule, sampler = few
  np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-5)
  if hasattr(theirs, "final_alpha_cumprod"):
    np.testing.assert_allclose(schedule.final_alpha_cumprod, theirs.final_alpha_cumprod, rtol=1e-6)
  assert sampler.timestep_spacing == theirs.config.timestep_spacing == DEFAULT_SPACINGS[name]
  assert schedule.steps_offset == theirs.config.steps_offset


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_written_is_read_back_by_both_sides(name):
  zero_snr = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "beta_schedule": "linear"}
  schedules = [NoiseSchedule(), NoiseSchedule(num_train_timesteps=200, steps_offset=0, set_alpha_to_one=True)]
  if name != "pndm":
    schedules.append(NoiseSchedule(**zero_snr))
  samplers = [Sampler(name), Sampler(name, "trailing")]
  if name in ("dpmpp_2m", "euler", "unipc"):
    samplers.append(Sampler(name, karras=True))
  for schedule in schedules:
    for sampler in samplers:
      config = to_diffusers(schedule, sampler)
      assert from_diffusers(config) == (schedule, sampler)
      theirs = getattr(diffusers, config["_class_name"]).from_config(config)
      assert from_diffusers({"_class_name": CLASSES[name], **theirs.config}) == (schedule, sampler)
      np.testing.assert_allclose(schedule.alphas_cumprod[:-1], theirs.alphas_cumprod[:-1], rtol=3e-5)


def test_another_class_takes_over_its_own_spacing():
  theirs = diffusers.EulerDiscreteScheduler.from_config(to_diffusers(NoiseSchedule(), Sampler("ddim")))
  assert (theirs.config.timestep_spacing, theirs.config.steps_offset) == ("linspace", 1)
  theirs = diffusers.DDPMScheduler.from_config(to_diffusers(NoiseSchedule(), Sampler("euler")))
  assert (theirs.config.timestep_spacing, theirs.config.clip_sample) == ("leading", False)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"_class_name": "PNDMSheduler"}, "f.json: _class_name is 'PNDMSheduler'; did you mean 'PNDMScheduler'"),
    ({"_class_name": None}, "f.json: _class_name is None"),
    ({"beta_strat": 0.1}, "f.json: unknown field beta_strat; did you mean 'beta_start'"),
    ({"beta_start": "small"}, "f.json: field beta_start is 'small'; it must be float"),
    ({"beta_schedule": "squaredcos_cap_v2"}, "f.json: scheduler: beta_schedule 'squaredcos_cap_v2'"),
    ({"trained_betas": [0.1, 0.2]}, "f.json: field trained_betas is [0.1, 0.2]; only None is supported"),
    ({"clip_sample": True}, "f.json: field clip_sample is True; only False is supported"),
    ({"skip_prk_steps": False}, "f.json: field skip_prk_steps is False"),
    ({"prediction_type": "sample"}, "f.json: sampler pndm does not support prediction_type 'sample'"),
    ({"timestep_spacing": "middle"}, "f.json: timestep_spacing 'middle'"),
    ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "field solver_order is 3; only 2 is supported"),
    ({"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"}, "field solver_type is 'bh1'; only 'bh2'"),
    ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, "field use_beta_sigmas is True"),
    ({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr needs prediction_type"),
  ],
)
def test_what_is_not_supported_is_named(changes, message):
  with pytest.raises(InputError) as error:
    from_diffusers({**SD21_BASE, **changes}, "f.json")
  assert message in str(error.value)
