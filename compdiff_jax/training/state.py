"""The training state: plain pytrees with named fields."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from compdiff_jax.cli import InputError, nearest
from compdiff_jax.training.fairness import FairState

# {component: {dotted parameter name: array}}, for example {"unet": {"conv_in.kernel": …}, "conditioner": {…}}
Params = dict[str, dict[str, jax.Array]]


class TrainState(NamedTuple):
  """Everything that changes during training. Randomness is a function of (seed, step), so no key is carried.

  Attributes:
    step: optimizer steps taken, int32 [].
    params: the trained components.
    ema: their exponential moving average, float32.
    opt_state: the optimizer's state.
    fairness: what FairDiffusion remembers; None in a run without it.
  """

  step: jax.Array
  params: Params
  ema: Params
  opt_state: Any
  fairness: FairState | None = None

  @classmethod
  def create(
    cls, params: Params, optimizer: optax.GradientTransformation, fairness: FairState | None = None
  ) -> "TrainState":
    # The EMA must not alias the parameters: the step donates both buffers.
    return cls(jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimizer.init(params), fairness)

  def parts(self) -> dict[str, Any]:
    """The pieces of a checkpoint; sampling and export read `params` or `ema` alone."""
    optimizer = {"step": self.step, "state": self.opt_state}
    if self.fairness is not None:
      optimizer["fairness"] = self.fairness
    return {"params": self.params, "ema": self.ema, "optimizer": optimizer}

  @classmethod
  def from_parts(cls, parts: dict[str, Any]) -> "TrainState":
    optimizer = parts["optimizer"]
    return cls(optimizer["step"], parts["params"], parts["ema"], optimizer["state"], optimizer.get("fairness"))


EMA_SCHEDULES = ("ramp", "power", "constant")


def ema_decay(step: jax.Array, config: ml_collections.ConfigDict) -> jax.Array:
  """The decay d of one update by `config.train`, never above `ema_decay`; `step` counts the updates before it.

  "ramp" is (1 + step) / (10 + step) and "power" 1 - (1 + step)^-ema_power, the two warm-ups of diffusers' EMAModel, of
  which the first update is a copy; "constant" is `ema_decay` throughout, which weighs the initial parameters long.
  """
  step = step.astype(jnp.float32)
  if config.ema_schedule == "constant":
    return jnp.float32(config.ema_decay)
  ramp = (1 + step) / (10 + step) if config.ema_schedule == "ramp" else 1 - (1 + step) ** -config.ema_power
  return jnp.where(step == 0, 0.0, jnp.minimum(config.ema_decay, ramp))


def check_ema(config: ml_collections.ConfigDict) -> None:
  """Raises an `InputError` where `config.train` asks for an average that does not exist."""
  if config.ema_schedule not in EMA_SCHEDULES:
    raise InputError(f"train.ema_schedule is {config.ema_schedule!r}{nearest(config.ema_schedule, EMA_SCHEDULES)}")


def update_ema(ema: Params, params: Params, d: jax.Array) -> Params:
  """ema <- d ema + (1 - d) params."""
  return jax.tree.map(lambda e, p: e + (1.0 - d) * (p.astype(e.dtype) - e), ema, params)
