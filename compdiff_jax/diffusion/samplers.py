"""Samplers as tables of coefficients: DDPM, DDIM, DPM-Solver++ 2M, Euler, Euler ancestral, UniPC and PNDM.

Every one of them is linear in what it knows: the sample x, what it remembers of earlier steps, the model's output and
fresh noise. So a sampler is one small matrix a step, computed here in float64, and one loop runs them all
(`trajectory.sample`). The formulas below are those of the papers, written for vectors of coefficients: `x` is the unit
vector of the sample, `output` that of the model's output, and `alpha * x - sigma * output` a row of the matrix.

All samples are in variance-preserving coordinates, x_t = alpha_t x_0 + sigma_t eps with alpha^2 + sigma^2 = 1, which is
what the model takes. k-diffusion and diffusers' Euler classes carry x_t / alpha_t.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from compdiff_jax.cli import InputError, nearest
from compdiff_jax.diffusion.schedule import NoiseSchedule

SPACINGS = ("leading", "linspace", "trailing")
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
_WITH_KARRAS = ("dpmpp_2m", "euler", "unipc")
# They take the grid of one step more, without its lowest point (`_fast_grid`).
_FAST = ("dpmpp_2m", "unipc")


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


class Table(NamedTuple):
  """N model calls of a sampler with a state of S arrays: the sample, then what the sampler remembers.

  Attributes:
    timesteps: float64 [N], what the model is told.
    matrices: float64 [N, S, S + 2]; the new state is the matrix times (state, model output, fresh noise).
    initial_scale: the first sample is this times standard normal noise.
  """

  timesteps: np.ndarray
  matrices: np.ndarray
  initial_scale: float


def make_table(sampler: Sampler, schedule: NoiseSchedule, num_steps: int) -> Table:
  """The table of `num_steps` steps; PNDM calls the model once more."""
  sampler.check(schedule)
  count, leading = schedule.num_train_timesteps, sampler.timestep_spacing == "leading"
  more = int(sampler.name in _FAST and sampler.timestep_spacing != "trailing")
  last = count - more - int(leading and schedule.steps_offset > 0)
  if not 1 <= num_steps <= last:
    raise InputError(f"sampling steps {num_steps} must lie in 1 to {last} with {sampler.name}")
  first = _grid(sampler.timestep_spacing, schedule, num_steps + more)[0]
  if first >= count:
    raise InputError(
      f"sampling steps {num_steps} begin at timestep {first:g} with scheduler.steps_offset {schedule.steps_offset}, and"
      f" the last is {count - 1}; take another number of steps"
    )
  with np.errstate(divide="ignore"):  # the last noise level is 0, its half log-SNR is infinite
    return _BUILDERS[sampler.name](sampler, schedule, num_steps)


# ---- Grids


def _grid(spacing: str, schedule: NoiseSchedule, num_steps: int) -> np.ndarray:
  """Falling timesteps, float64 [num_steps], of DDPM, DDIM, PNDM and Euler (Lin et al. 2024, Table 2); not rounded."""
  count = schedule.num_train_timesteps
  if spacing == "leading":
    return np.arange(num_steps)[::-1] * float(count // num_steps) + schedule.steps_offset
  if spacing == "linspace":
    return np.linspace(0, count - 1, num_steps)[::-1]
  return np.round(count - np.arange(num_steps) * (count / num_steps)) - 1


def _fast_grid(spacing: str, schedule: NoiseSchedule, num_steps: int) -> np.ndarray:
  """That of DPM-Solver++ and UniPC: one point more, and without the lowest, from where they go to noise level 0."""
  if spacing == "trailing":
    return _grid(spacing, schedule, num_steps)
  return np.round(_grid(spacing, schedule, num_steps + 1)[:-1])


class _Levels(NamedTuple):
  """A grid by its noise levels, each float64 [N + 1]; the last is 0.

  Attributes:
    alpha, sigma: the coefficients of x_0 and eps.
    half_log_snr: lambda = log(alpha / sigma) (Lu et al. 2022).
    timesteps: float64 [N].
  """

  alpha: np.ndarray
  sigma: np.ndarray
  half_log_snr: np.ndarray
  timesteps: np.ndarray


def _levels(sampler: Sampler, schedule: NoiseSchedule, grid: np.ndarray) -> _Levels:
  alphas_cumprod = schedule.alphas_cumprod
  if schedule.rescale_betas_zero_snr:
    alphas_cumprod[-1] = 2.0**-24  # as in diffusers: not 0, so that the ratio below stays finite
  ratios = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
  all_timesteps = np.arange(len(ratios))
  chosen = np.interp(grid, all_timesteps, ratios)
  if sampler.karras:
    # diffusers' Euler spans the levels of its grid, the others those of the whole schedule.
    low, high = (chosen[-1], chosen[0]) if sampler.name == "euler" else (ratios[0], ratios[-1])
    chosen = np.linspace(high ** (1 / 7), low ** (1 / 7), len(grid)) ** 7
    grid = np.interp(np.log(chosen), np.log(ratios), all_timesteps)
    if sampler.name != "euler":
      grid = np.round(grid)
  chosen = np.append(chosen, 0.0)
  alpha = 1 / np.sqrt(1 + chosen**2)
  return _Levels(alpha, chosen * alpha, -np.log(chosen), grid)


# ---- The samplers, with their equations

Row = np.ndarray  # coefficients of (state, model output, noise)


def _original_and_noise(schedule: NoiseSchedule, x: Row, output: Row, alpha: float, sigma: float) -> tuple[Row, Row]:
  """The x_0 and eps that a model output stands for."""
  if schedule.prediction_type == "epsilon":
    return (x - sigma * output) / alpha, output
  if schedule.prediction_type == "sample":
    return output, (x - alpha * output) / sigma
  return alpha * x - sigma * output, alpha * output + sigma * x


def _table(timesteps: np.ndarray, states: Sequence[Sequence[Row]], initial_scale: float = 1.0) -> Table:
  return Table(timesteps, np.asarray(states), initial_scale)


def _ddpm(sampler: Sampler, schedule: NoiseSchedule, num_steps: int) -> Table:
  """Ho et al. 2020, Eq. 7, over a coarser grid, with the variance of the posterior ("fixed_small"); ends on x_0."""
  timesteps = np.round(_grid(sampler.timestep_spacing, schedule, num_steps))
  levels = np.append(schedule.alphas_cumprod[timesteps.astype(int)], 1.0)
  x, output, noise = np.eye(3)
  states = []
  for bar_t, bar_s in itertools.pairwise(levels):  # s is the next, lower time
    x_0, _ = _original_and_noise(schedule, x, output, np.sqrt(bar_t), np.sqrt(1 - bar_t))
    alpha = bar_t / bar_s
    mean = (np.sqrt(bar_s) * (1 - alpha) * x_0 + np.sqrt(alpha) * (1 - bar_s) * x) / (1 - bar_t)
    variance = (1 - bar_s) / (1 - bar_t) * (1 - alpha)
    states.append([mean + np.sqrt(variance) * noise])
  return _table(timesteps, states)


def _bar(schedule: NoiseSchedule, timestep: float) -> float:
  """alpha_bar at a whole timestep; before 0 it is `final_alpha_cumprod`."""
  return schedule.alphas_cumprod[int(timestep)] if timestep >= 0 else schedule.final_alpha_cumprod


def _ddim(sampler: Sampler, schedule: NoiseSchedule, num_steps: int) -> Table:
  """Song et al. 2021, Eq. 12 and 16. As in diffusers the next time is t - T // N, whatever the grid."""
  timesteps = np.round(_grid(sampler.timestep_spacing, schedule, num_steps))
  x, output, noise = np.eye(3)
  states = []
  for t in timesteps:
    bar_t, bar_s = _bar(schedule, t), _bar(schedule, t - schedule.num_train_timesteps // num_steps)
    x_0, eps = _original_and_noise(schedule, x, output, np.sqrt(bar_t), np.sqrt(1 - bar_t))
    variance = sampler.eta**2 * (1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s)
    direction = np.sqrt(max(1 - bar_s - variance, 0.0)) * eps
    states.append([np.sqrt(bar_s) * x_0 + direction + np.sqrt(variance) * noise])
  return _table(timesteps, states)


def _euler(sampler: Sampler, schedule: NoiseSchedule, num_steps: int) -> Table:
  """Karras et al. 2022, Algorithm 2 without churn; ancestral: with the noise that k-diffusion adds after each step.

  Both are stated for x / alpha, whose noise level is r = sigma / alpha: it falls to r_down, and noise brings it to r'.
  """
  levels = _levels(sampler, schedule, _grid(sampler.timestep_spacing, schedule, num_steps))
  x, output, noise = np.eye(3)
  states = []
  for k in range(num_steps):
    x_0, eps = _original_and_noise(schedule, x, output, levels.alpha[k], levels.sigma[k])
    ratio, next_ratio = levels.sigma[k] / levels.alpha[k], levels.sigma[k + 1] / levels.alpha[k + 1]
    up = next_ratio * np.sqrt(1 - (next_ratio / ratio) ** 2) if sampler.name == "euler_ancestral" else 0.0
    down = np.sqrt(next_ratio**2 - up**2)
    states.append([levels.alpha[k + 1] * (x_0 + down * eps + up * noise)])
  # On a leading grid diffusers starts from full noise, although the first level is lower.
  return _table(levels.timesteps, states, 1.0 if sampler.timestep_spacing == "leading" else levels.sigma[0])


def _dpmpp_2m(sampler: Sampler, schedule: NoiseSchedule, num_steps: int) -> Table:
  """DPM-Solver++ 2M (Lu et al. 2022, Algorithm 2), of first order at the first step and the last, to noise level 0."""
  levels = _levels(sampler, schedule, _fast_grid(sampler.timestep_spacing, schedule, num_steps))
  alpha, sigma, h = levels.alpha, levels.sigma, np.diff(levels.half_log_snr)
  x, before, output, _ = np.eye(4)  # `before` is the x_0 of the step before
  states = []
  for k in range(num_steps):
    x_0, _ = _original_and_noise(schedule, x, output, alpha[k], sigma[k])
    direction = x_0
    if 0 < k < num_steps - 1:
      direction = x_0 + (x_0 - before) * h[k] / (2 * h[k - 1])
    states.append([sigma[k + 1] / sigma[k] * x - alpha[k + 1] * np.expm1(-h[k]) * direction, x_0])
  return _table(levels.timesteps, states)


def _unipc(sampler: Sampler, schedule: NoiseSchedule, num_steps: int) -> Table:
  """UniPC-2 with B_2(h) = e^h - 1 on x_0 (Zhao et al. 2023, Algorithms 5 to 8): every model call first corrects the
  sample that it was made for, then predicts the next. The first step and the last are of order 1.
  """
  levels = _levels(sampler, schedule, _fast_grid(sampler.timestep_spacing, schedule, num_steps))
  alpha, sigma, half_log_snr = levels.alpha, levels.sigma, levels.half_log_snr
  # x_0 of the last step and of the one before it; the corrected sample of the last step.
  x, before, before2, corrected, output, _ = np.eye(6)
  order, states = 0, []
  for k in range(num_steps):
    x_0, _ = _original_and_noise(schedule, x, output, alpha[k], sigma[k])
    if k == 0:
      corrected_now = x
    else:
      h = half_log_snr[k] - half_log_snr[k - 1]
      phi_1 = np.expm1(-h)
      if order == 1:
        residual = (x_0 - before) / 2
      else:
        r = (half_log_snr[k - 2] - half_log_snr[k - 1]) / h
        phi_2 = phi_1 / -h - 1
        phi_3 = phi_2 / -h - 1 / 2
        rho = np.linalg.solve([[1, 1], [r, 1]], [phi_2 / phi_1, 2 * phi_3 / phi_1])
        residual = rho[0] * (before2 - before) / r + rho[1] * (x_0 - before)
      corrected_now = sigma[k] / sigma[k - 1] * corrected - alpha[k] * phi_1 * (before + residual)
    order = min(2, k + 1, num_steps - k)
    h = half_log_snr[k + 1] - half_log_snr[k]
    residual = 0 * x_0
    if order == 2:
      residual = (before - x_0) * h / (half_log_snr[k - 1] - half_log_snr[k]) / 2
    predicted = sigma[k + 1] / sigma[k] * corrected_now - alpha[k + 1] * np.expm1(-h) * (x_0 + residual)
    states.append([predicted, x_0, before, corrected_now])
  return _table(levels.timesteps, states)


_ADAMS_BASHFORTH = {
  1: [1],
  2: [3 / 2, -1 / 2],
  3: [23 / 12, -16 / 12, 5 / 12],
  4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
}


def _pndm(sampler: Sampler, schedule: NoiseSchedule, num_steps: int) -> Table:
  """PNDM without Runge-Kutta steps (Liu et al. 2022, Eq. 11 and 12; "skip_prk_steps", what Stable Diffusion ships).

  The first step is made twice, the second time with the mean of the outputs at both its ends: one model call more.
  """
  timesteps = np.round(_grid(sampler.timestep_spacing, schedule, num_steps))
  stride = schedule.num_train_timesteps // num_steps
  # Outputs of the last three steps, and the sample that the first step started from.
  x, output_1, output_2, output_3, start, output, _ = np.eye(7)

  def move(x, mixed, t):
    """Eq. 11: from time t to t - stride along the mixed outputs."""
    bar_t, bar_s = _bar(schedule, t), _bar(schedule, t - stride)
    if schedule.prediction_type == "v_prediction":
      mixed = np.sqrt(bar_t) * mixed + np.sqrt(1 - bar_t) * x
    scale = bar_t * np.sqrt(1 - bar_s) + np.sqrt(bar_t * (1 - bar_t) * bar_s)
    return np.sqrt(bar_s / bar_t) * x - (bar_s - bar_t) / scale * mixed

  nothing = np.zeros_like(x)
  states = [[move(x, output, timesteps[0]), output, nothing, nothing, x]]
  if num_steps == 1:
    return _table(timesteps, states)
  states.append([move(start, (output + output_1) / 2, timesteps[1] + stride), output_1, nothing, nothing, nothing])
  outputs = (output, output_1, output_2, output_3)
  for k in range(1, num_steps):
    weights = _ADAMS_BASHFORTH[min(k + 1, 4)]
    mixed = sum(weight * row for weight, row in zip(weights, outputs))
    states.append([move(x, mixed, timesteps[k]), output, output_1, output_2, nothing])
  return _table(np.insert(timesteps, 1, timesteps[1]), states)


_BUILDERS: dict[str, Callable[[Sampler, NoiseSchedule, int], Table]] = {
  "ddpm": _ddpm,
  "ddim": _ddim,
  "dpmpp_2m": _dpmpp_2m,
  "euler": _euler,
  "euler_ancestral": _euler,
  "unipc": _unipc,
  "pndm": _pndm,
}
