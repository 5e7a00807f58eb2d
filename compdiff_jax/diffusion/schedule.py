"""The noise schedule of a diffusers `scheduler_config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from compdiff_jax.cli import InputError, nearest

_BETA_SCHEDULES = ("linear", "scaled_linear")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
  """Forward process q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), t = 0 … num_train_timesteps - 1.

  The fields are those of diffusers' schedulers; the defaults are Stable Diffusion 2.1-base's.
  """

  num_train_timesteps: int = 1000
  beta_start: float = 0.00085
  beta_end: float = 0.012
  beta_schedule: str = "scaled_linear"
  prediction_type: str = "epsilon"
  steps_offset: int = 1
  set_alpha_to_one: bool = False
  rescale_betas_zero_snr: bool = False

  def __post_init__(self):
    if self.beta_schedule not in _BETA_SCHEDULES:
      raise InputError(f"scheduler: beta_schedule {self.beta_schedule!r}{nearest(self.beta_schedule, _BETA_SCHEDULES)}")
    if self.prediction_type not in PREDICTION_TYPES:
      raise InputError(
        f"scheduler: prediction_type {self.prediction_type!r}{nearest(self.prediction_type, PREDICTION_TYPES)}"
      )
    if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
      raise InputError(
        "scheduler: rescale_betas_zero_snr needs prediction_type 'v_prediction' or 'sample': at the last step, which is"
        " pure noise, the noise says nothing about the image"
      )

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
    known = {field.name for field in dataclasses.fields(cls)}
    for key in config:
      if key not in known:
        raise InputError(f"scheduler: unknown field {key!r}{nearest(key, known)}")
    return cls(**config)

  def to_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @property
  def alphas_cumprod(self) -> np.ndarray:
    """alpha_bar_t, float64 [num_train_timesteps].

    With `rescale_betas_zero_snr` sqrt(alpha_bar) is shifted and scaled so that its last value is 0 and its first is
    unchanged (Lin et al. 2024, Algorithm 1).
    """
    if self.beta_schedule == "linear":
      betas = np.linspace(self.beta_start, self.beta_end, self.num_train_timesteps)
    else:
      betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_train_timesteps) ** 2
    alphas_cumprod = np.cumprod(1.0 - betas)
    if self.rescale_betas_zero_snr:
      root = np.sqrt(alphas_cumprod)
      alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alphas_cumprod

  @property
  def final_alpha_cumprod(self) -> float:
    """alpha_bar "before" t = 0, where a DDIM trajectory ends."""
    return 1.0 if self.set_alpha_to_one else float(self.alphas_cumprod[0])
