"""A scheduler_config.json of diffusers to a noise schedule and a sampler, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from compdiff_jax.cli import InputError, nearest
from compdiff_jax.diffusion.samplers import DEFAULT_SPACINGS, Sampler
from compdiff_jax.diffusion.schedule import NoiseSchedule
from compdiff_jax.models.config import parse

CLASSES = {
  "ddpm": "DDPMScheduler",
  "ddim": "DDIMScheduler",
  "dpmpp_2m": "DPMSolverMultistepScheduler",
  "euler": "EulerDiscreteScheduler",
  "euler_ancestral": "EulerAncestralDiscreteScheduler",
  "unipc": "UniPCMultistepScheduler",
  "pndm": "PNDMScheduler",
}
# What a class takes for a field that its file leaves out, where that is not the value of `_Fields` or `_FIXED`.
_DEFAULTS = {
  "ddpm": {"clip_sample": True},
  "ddim": {"clip_sample": True, "set_alpha_to_one": True},
  "pndm": {"skip_prk_steps": False},
}
# Fields that are understood, but supported with this value only.
_FIXED = {
  "trained_betas": None,
  "clip_sample": False,
  "thresholding": False,
  "variance_type": "fixed_small",
  "skip_prk_steps": True,
  "solver_order": 2,
  "algorithm_type": "dpmsolver++",
  "lower_order_final": True,
  "euler_at_final": False,
  "final_sigmas_type": "zero",
  "lambda_min_clipped": float("-inf"),
  "predict_x0": True,
  "disable_corrector": [],
  "solver_p": None,
  "interpolation_type": "linear",
  "timestep_type": "discrete",
  "sigma_min": None,
  "sigma_max": None,
  "use_lu_lambdas": False,
  "use_exponential_sigmas": False,
  "use_beta_sigmas": False,
  "use_flow_sigmas": False,
  "use_dynamic_shifting": False,
  "shift_terminal": None,
}
_SOLVER_TYPES = {"dpmpp_2m": "midpoint", "unipc": "bh2"}
# Without effect beside the values above.
_IGNORED = ("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type")


@dataclasses.dataclass(frozen=True)
class _Fields:
  """The fields that may vary, with the defaults that all the classes share."""

  num_train_timesteps: int = 1000
  beta_start: float = 0.0001
  beta_end: float = 0.02
  beta_schedule: str = "linear"
  prediction_type: str = "epsilon"
  steps_offset: int = 0
  set_alpha_to_one: bool = False
  rescale_betas_zero_snr: bool = False
  timestep_spacing: str = ""
  use_karras_sigmas: bool | None = False


def from_diffusers(values: Mapping[str, Any], source: str = "scheduler_config.json") -> tuple[NoiseSchedule, Sampler]:
  """The schedule and sampler of a scheduler_config.json; fields that the file leaves out are as its class has them.

  Raises:
    InputError: the class or a field is unknown, or asks for something unsupported; `source` names the file.
  """
  names = {class_name: name for name, class_name in CLASSES.items()}
  class_name = values.get("_class_name")
  if class_name not in names:
    raise InputError(f"{source}: _class_name is {class_name!r}{nearest(str(class_name), names)}")
  name = names[class_name]
  values = {**_DEFAULTS.get(name, {}), **values}
  if values.get("variance_type", "") is None:  # what a class without this choice writes
    del values["variance_type"]
  fixed, ignored = dict(_FIXED), list(_IGNORED)
  if name in _SOLVER_TYPES:
    fixed["solver_type"] = _SOLVER_TYPES[name]
  else:
    ignored.append("solver_type")
  fields = dataclasses.asdict(parse(_Fields, values, source=source, fixed=fixed, ignored=ignored))
  options = {"timestep_spacing": fields.pop("timestep_spacing"), "karras": bool(fields.pop("use_karras_sigmas"))}
  try:
    schedule, sampler = NoiseSchedule(**fields), Sampler(name, **options)
    sampler.check(schedule)
  except InputError as error:
    raise InputError(f"{source}: {error}") from None
  return schedule, sampler


def to_diffusers(schedule: NoiseSchedule, sampler: Sampler) -> dict[str, Any]:
  """The scheduler_config.json of a schedule and sampler. (The eta of DDIM is an argument of the torch pipeline.)

  As in the files of Stable Diffusion, `clip_sample` and `skip_prk_steps` stand in all of them, because their defaults
  are wrong for latents, and what is the class's default is left out: another class that takes over this config then
  has its own timestep spacing.
  """
  config = {"_class_name": CLASSES[sampler.name], **schedule.to_dict(), "clip_sample": False, "skip_prk_steps": True}
  if not schedule.rescale_betas_zero_snr:
    del config["rescale_betas_zero_snr"]
  if sampler.timestep_spacing != DEFAULT_SPACINGS[sampler.name]:
    config["timestep_spacing"] = sampler.timestep_spacing
  if sampler.karras:
    config["use_karras_sigmas"] = True
  return config
