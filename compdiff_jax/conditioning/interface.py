"""What every conditioner is: from a batch of attributes to cross-attention tokens, and what its losses need.

A conditioner is an NNX module that its config builds. The training step, the sampler and the export know nothing else
about it, so a new conditioner is a new config and a module with this call:

  __call__(attributes, keys=None)   -> ConditionerOutput

`attributes` is a batch as `schema` describes it; it may hold more attributes than the conditioner uses. `keys` are
typed PRNG keys, one a sample: given means training (latent noise and dropout), None means evaluation. Everything
random about sample i is drawn from `keys[i]` alone, so a result depends neither on the batch a sample sits in nor on
the device that computes it. The unconditional branch of guidance is the output for `schema.unknown(batch)`.

Conditioners compute in float32: they are tiny beside the UNet, which casts the tokens to its own dtype.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from compdiff_jax.conditioning.schema import UNKNOWN_INDEX, Attribute

Attributes = Mapping[str, jax.Array]
# (gamma, beta) of each residual block of the UNet in the order of its forward pass, [B, C] each.
Modulation = tuple[tuple[jax.Array, jax.Array], ...]


class Regression(NamedTuple):
  """What an auxiliary head says about a continuous attribute, on the scale 0 (its low end) to 1 (its high end).

  Attributes:
    prediction: [B].
    target: [B], the value that its token was made from; NaN where unknown.
    span: high - low, in the attribute's unit.
  """

  prediction: jax.Array
  target: jax.Array
  span: float


class ConditionerOutput(NamedTuple):
  """Tokens and the intermediate values that the losses read. A field that a conditioner has no use for is None.

  Attributes:
    tokens: [B, T, d_ctx], appended to the text tokens; T may be 0.
    time_vector: [B, D], added to the UNet's time embedding.
    film: modulation of the UNet's residual blocks.
    mu: [B, d], mean of the latent.
    log_sigma: [B, d], log standard deviation of the latent, in [-5, 1].
    h: [B, d], the composed node before the latent.
    parts: [B, d], the sum of the embeddings that were composed into h (of nulls where an attribute is unknown).
    logits: for each auxiliary classifier [B, K], or [B, L, K] for the K states of L labels.
    targets: for each auxiliary classifier int32 [B] or [B, L], what its token was made from; -1 where unknown.
    regressions: for each auxiliary regressor its prediction and target.
    ordinal_losses: [B] for each classifier that is not judged by its cross-entropy.
    distances: [B] for each of these, of the number that it expects from the true one, in the attribute's unit.
    penalties: further losses by name, [B].
    conditioned: bool [B], False where the tokens are the zero tokens of a sample that cannot be represented.
  """

  tokens: jax.Array
  time_vector: jax.Array | None = None
  film: Modulation | None = None
  mu: jax.Array | None = None
  log_sigma: jax.Array | None = None
  h: jax.Array | None = None
  parts: jax.Array | None = None
  logits: dict[str, jax.Array] | None = None
  targets: dict[str, jax.Array] | None = None
  regressions: dict[str, Regression] | None = None
  ordinal_losses: dict[str, jax.Array] | None = None
  distances: dict[str, jax.Array] | None = None
  penalties: dict[str, jax.Array] | None = None
  conditioned: jax.Array | None = None


class Conditioner(Protocol):
  """The call described at the top of this file, for type checkers and readers."""

  def __call__(self, attributes: Attributes, *, keys: jax.Array | None = None) -> ConditionerOutput: ...


def level_indices(attribute: Attribute, values: jax.Array) -> jax.Array:
  """Category or bin index of encoded values, int32 [B]; -1 where unknown. `Attribute.levels` for traced arrays."""
  known = attribute.is_known(values)
  if attribute.kind == "categorical":
    levels = values
  else:
    # NaN sorts behind every edge; any number inside the range keeps it out of the search.
    edges = jnp.asarray(attribute.bins, jnp.float32)
    levels = jnp.searchsorted(edges, jnp.where(known, values, attribute.low), side="right")
  return jnp.where(known, levels, UNKNOWN_INDEX).astype(jnp.int32)
