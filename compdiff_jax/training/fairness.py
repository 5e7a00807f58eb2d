"""FairDiffusion: random sample weights whose spread per group is learned, to close the gap between group losses.

Group g has a spread sigma_g in [0, 1]. In every step a sample's denoising loss is weighted by
w = 1 + sum over attributes of sigma[its group] n, n ~ N(0, 1), and the gap of the groups' mean losses is recorded.
Every `window` steps a Gaussian process of minus the gap over sigma is fitted, and sigma moves to where its upper
confidence bound is highest. In every step sigma is mixed with a uniform draw.

Two variants, which differ in more than the floor of the weights:

  published  the authors' code: weights unclamped, loss mean(w l), an attribute with an absent group has gap 0
  compdiff   the baseline of the CompDiff code: w >= min_weight, loss sum(w l) / sum(w), absent groups are skipped

Both here: group means are taken over the global batch; sigma and its history are part of the training state; draws are
functions of (seed, step, sample); the window counts optimizer steps, as there are no epochs; unknown values are of no
group. Only the denoising term is weighted, so any conditioner may be combined with it.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from compdiff_jax.cli import InputError, nearest
from compdiff_jax.conditioning.interface import level_indices
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.training import bandit, streams

# Uniform draws from which the search starts.
_RAW_SAMPLES = {"published": 20, "compdiff": 32}


class FairState(NamedTuple):
  """What FairDiffusion remembers, float32.

  Attributes:
    sigma: [G], one entry for each level of each attribute, in the schema's order.
    sigmas: [window + 1, G] and gaps: [window + 1], the steps since the last fit; the first `count` rows are filled.
    count: int32 [].
  """

  sigma: jax.Array
  sigmas: jax.Array
  gaps: jax.Array
  count: jax.Array


@dataclasses.dataclass(frozen=True)
class FairDiffusion:
  """The weighting of one run.

  Attributes:
    schema: the attributes whose levels are the groups.
    variant, sigma_init, window, exploitation, min_weight, ucb_beta: see `config.fairness`.
  """

  schema: Schema
  variant: str
  sigma_init: float
  window: int
  exploitation: float
  min_weight: float
  ucb_beta: float

  @property
  def num_groups(self) -> int:
    return sum(attribute.num_levels for attribute in self.schema)

  @property
  def group_names(self) -> tuple[str, ...]:
    return tuple(f"group_{a.name}_{level}" for a in self.schema for level in a.level_names)

  def create(self) -> FairState:
    sigma = jnp.full([self.num_groups], self.sigma_init, jnp.float32)
    rows = self.window + 1  # the first fit sees steps 0 to `window`
    return FairState(sigma, jnp.zeros([rows, self.num_groups]), jnp.zeros([rows]), jnp.int32(0))

  def groups(self, attributes: Mapping[str, jax.Array]) -> jax.Array:
    """Membership of each sample in each group, float32 [B, G]; an unknown value is in none."""
    levels = [jax.nn.one_hot(level_indices(a, attributes[a.name]), a.num_levels) for a in self.schema]
    return jnp.concatenate(levels, axis=1)

  def weights(self, sigma: jax.Array, groups: jax.Array, keys: jax.Array) -> jax.Array:
    """w_i = 1 + sum_attributes sigma[group of i] n_{i, attribute}, [B]; in `compdiff` at least `min_weight`.

    Args:
      sigma: [G]; groups: [B, G] of `groups`; keys: typed PRNG keys [B], one a sample.
    """
    draws = jax.vmap(lambda key: jax.random.normal(key, [len(self.schema.names)]))(keys)
    column = np.repeat(np.arange(len(self.schema.names)), [attribute.num_levels for attribute in self.schema])
    weights = 1.0 + jnp.sum(groups * sigma * draws[:, column], axis=1)
    return jnp.maximum(weights, self.min_weight) if self.variant == "compdiff" else weights

  def terms(
    self, losses: jax.Array, errors: jax.Array, weights: jax.Array, groups: jax.Array
  ) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The weighted denoising loss and the unweighted error of each group, each as (values [B], weight [B]).

    Their means are sum(values weight) / sum(weight) over the global batch, as for every other term of the loss.

    Args:
      losses: [B], what is trained on, such as errors under min-SNR weights; errors: [B], without any weighting.
      weights: [B] of `weights`; groups: [B, G] of `groups`.
    """
    whole = (losses, weights) if self.variant == "compdiff" else (losses * weights, jnp.ones_like(weights))
    return {"diffusion": whole, **{name: (errors, groups[:, i]) for i, name in enumerate(self.group_names)}}

  def gap(self, means: jax.Array, counts: jax.Array) -> jax.Array:
    """The sum over attributes of the largest minus the smallest mean loss of its groups, [].

    Args:
      means: mean unweighted loss of each group over the global batch [G]; counts: its samples [G], 0 where absent.
    """
    present = counts > 0
    total, start = jnp.zeros([]), 0
    for attribute in self.schema:
      own = slice(start, start + attribute.num_levels)
      start += attribute.num_levels
      high = jnp.max(jnp.where(present[own], means[own], -jnp.inf))
      low = jnp.min(jnp.where(present[own], means[own], jnp.inf))
      counted = jnp.all(present[own]) if self.variant == "published" else jnp.any(present[own])
      total += jnp.where(counted, high - low, 0.0)
    return total

  def advance(
    self, state: FairState, means: jax.Array, counts: jax.Array, seed: int | jax.Array, step: jax.Array
  ) -> tuple[FairState, dict[str, jax.Array]]:
    """Records (sigma, gap) of a step and lets sigma explore; returns the metrics too. Part of the jitted step."""
    gap = self.gap(means, counts)
    recorded = FairState(
      self._explored(state.sigma, seed, step),
      state.sigmas.at[state.count].set(state.sigma),
      state.gaps.at[state.count].set(gap),
      state.count + 1,
    )
    sigma = {"fair_sigma_mean": jnp.mean(state.sigma), "fair_sigma_std": jnp.std(state.sigma)}
    return recorded, {**sigma, "fair_loss_gap": gap, "fair_sigma_update": jnp.float32(self.due(step))}

  def _explored(self, sigma: jax.Array, seed: int | jax.Array, step: int | jax.Array) -> jax.Array:
    """sigma <- clip(rho sigma + (1 - rho) u), u ~ U(0, 1), rho the exploitation."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), streams.EXPLORATION), step)
    drawn = jax.random.uniform(key, [self.num_groups])
    return jnp.clip(self.exploitation * sigma + (1 - self.exploitation) * drawn, 0.0, 1.0)

  def due(self, step: int | jax.Array) -> bool | jax.Array:
    """Whether step number `step` (from 0) ends with a search."""
    return (step > 0) & (step % self.window == 0)

  def search(self, state: FairState, seed: int, step: int) -> FairState:
    """The state after a step that ends with a search: sigma from the Gaussian process, explored once; no history.

    Runs on the host, on arrays of any sharding. Where no process can be fitted (gaps that are not finite, a singular
    covariance), sigma goes on as it was. All hosts take the first one's result: their floating-point libraries may
    differ.
    """
    sigma, sigmas, gaps, count = jax.device_get(state)
    sigmas, gaps = sigmas[:count].astype(np.float64), gaps[:count].astype(np.float64)
    try:
      if not np.isfinite(gaps).all():
        raise np.linalg.LinAlgError
      rng = np.random.default_rng([seed, streams.SEARCH, step])
      process = bandit.fit(sigmas, -gaps)
      best = bandit.maximise(process, self.ucb_beta, rng, raw_samples=_RAW_SAMPLES[self.variant])
      sigma = self._explored(jnp.asarray(best, jnp.float32), seed, step)
    except np.linalg.LinAlgError:
      pass
    cleared = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    fresh = cleared._replace(sigma=multihost_utils.broadcast_one_to_all(np.asarray(sigma)))
    return jax.device_put(fresh, jax.tree.map(lambda x: x.sharding, state))


def make_fairness(config: ml_collections.ConfigDict, schema: Schema) -> FairDiffusion | None:
  """The weighting that `config.fairness` asks for; None where `variant` is empty."""
  fields = config.fairness
  if not fields.variant:
    return None
  if fields.variant not in _RAW_SAMPLES:
    raise InputError(f"fairness.variant is {fields.variant!r}{nearest(fields.variant, _RAW_SAMPLES)}")
  groups = schema.subset(fields.attributes) if fields.attributes else schema.grouping
  if not groups.names:
    raise InputError("fairness.variant needs attributes to make groups of, and the schema has none")
  settings = {name: value for name, value in fields.items() if name != "attributes"}
  return FairDiffusion(schema=groups, **settings)
