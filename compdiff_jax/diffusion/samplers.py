"""Samplers: pure functions from a prediction function and initial noise to latents, one `lax.scan` each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from compdiff_jax.cli import InputError, nearest
from compdiff_jax.diffusion.guidance import Predict
from compdiff_jax.diffusion.schedule import NoiseSchedule

# {sampler: its timestep spacing where none is asked for}, as in diffusers.
DEFAULT_SPACINGS = {
  "ddpm": "leading",
  "ddim": "leading",
  "dpmpp_2m": "linspace",
  "euler": "linspace",
  "euler_ancestral": "linspace",
  "unipc": "linspace",
  "pndm": "leading",
}
SPACINGS = ("leading", "linspace", "trailing")
_WITH_KARRAS = ("dpmpp_2m", "euler", "unipc")


@dataclasses.dataclass(frozen=True)
class Sampler:
  """A sampler and its options; it is the scheduler of diffusers that `interop.schedulers.CLASSES` names.

  Attributes:
    name: a key of `DEFAULT_SPACINGS`.
    timestep_spacing: "leading", "linspace" or "trailing" (Lin et al. 2024, Table 2); "" is the sampler's default.
    eta: share of ancestral noise of DDIM, 0 to 1; 0 is deterministic (Song et al. 2021, Eq. 16).
    karras: noise levels of Karras et al. 2022, Eq. 5, in place of the timestep spacing.
  """

  name: str = "ddim"
  timestep_spacing: str = ""
  eta: float = 0.0
  karras: bool = False

  def __post_init__(self):
    if self.name not in DEFAULT_SPACINGS:
      raise InputError(f"sampler {self.name!r}{nearest(self.name, DEFAULT_SPACINGS)}")
    if not self.timestep_spacing:
      object.__setattr__(self, "timestep_spacing", DEFAULT_SPACINGS[self.name])
    if self.timestep_spacing not in SPACINGS:
      raise InputError(f"timestep_spacing {self.timestep_spacing!r}{nearest(self.timestep_spacing, SPACINGS)}")
    if not 0 <= self.eta <= 1:
      raise InputError(f"eta {self.eta:g} must lie in 0 to 1")
    if self.eta and self.name != "ddim":
      raise InputError(f"eta {self.eta:g}: only ddim has eta, {self.name} has not")
    if self.karras and self.name not in _WITH_KARRAS:
      raise InputError(f"karras: {self.name} has no Karras noise levels; {', '.join(_WITH_KARRAS)} have them")

  def check(self, schedule: NoiseSchedule) -> None:
    """Refuses what diffusers has no counterpart of, so that every picture can be drawn in torch too."""
    if schedule.prediction_type == "sample" and self.name in ("pndm", "euler_ancestral"):
      raise InputError(f"sampler {self.name} does not support prediction_type 'sample'; take ddim, ddpm or dpmpp_2m")
    if schedule.rescale_betas_zero_snr and self.name == "pndm":
      raise InputError("sampler pndm does not support rescale_betas_zero_snr; take ddim, ddpm or dpmpp_2m")


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
