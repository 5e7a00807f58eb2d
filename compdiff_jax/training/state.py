"""The training state: plain pytrees with named fields."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

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


def update_ema(ema: Params, params: Params, step: jax.Array, decay: float) -> Params:
  """ema <- d ema + (1 - d) params with d = min(decay, (1 + step) / (10 + step)), diffusers' EMAModel warm-up."""
  step = step.astype(jnp.float32)
  d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return jax.tree.map(lambda e, p: e + (1.0 - d) * (p.astype(e.dtype) - e), ema, params)
