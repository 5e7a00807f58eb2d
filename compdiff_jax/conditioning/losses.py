"""Losses of a conditioner, as one value and one weight for each sample.

The training step divides the weighted sum by the sum of the weights over the *global* batch, so neither the number of
devices nor gradient accumulation changes a loss. All terms are float32. They are read from the same forward pass that
made the tokens; the reference runs the composition a second time with fresh dropout masks, which costs a pass and
compares a node that no token was made from.
"""

import jax
import jax.numpy as jnp
import optax

from compdiff_jax.conditioning.interface import ConditionerOutput

_COSINE_EPS = 1e-8  # torch.nn.functional.cosine_similarity
# On the scale 0 to 1 of a regressor the loss is small beside a cross-entropy; the reference's factor.
_REGRESSION_SCALE = 10.0

Term = tuple[jax.Array, jax.Array]


def kl_to_standard_normal(mu: jax.Array, log_sigma: jax.Array) -> jax.Array:
  """KL(N(mu, exp(log_sigma)^2) || N(0, 1)) in nats, summed over the last axis: [B, d], [B, d] -> [B]."""
  return -0.5 * jnp.sum(1 + 2 * log_sigma - mu**2 - jnp.exp(2 * log_sigma), axis=-1)


def cosine_similarity(a: jax.Array, b: jax.Array) -> jax.Array:
  """Cosine over the last axis, each norm bounded from below as torch >= 2 does: [B, d], [B, d] -> [B]."""

  def norm(x):
    # The bound is applied to the square: the root of an exact zero has no gradient.
    return jnp.sqrt(jnp.maximum(jnp.sum(x**2, axis=-1), _COSINE_EPS**2))

  return jnp.sum(a * b, axis=-1) / (norm(a) * norm(b))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """-log softmax(logits)[target] in nats: [..., K], int [...] -> [...]. A target of -1 gives a number to be masked."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))


# How a classifier over ordered levels may be judged.
ORDINAL_LOSSES = ("cross_entropy", "soft", "cumulative")
_CUMULATIVE_WEIGHT = 0.5  # the reference's


def ordinal_loss(logits: jax.Array, targets: jax.Array, loss: str, sigma: float) -> jax.Array:
  """A loss to which a level far off is worse than the next one: [B, K], int [B] -> [B], in nats.

  "soft": cross-entropy against targets proportional to exp(-((k - y) / sigma)^2 / 2).
  "cumulative": cross-entropy plus half the sum over levels of (CDF(k) - [k >= y])^2, the ranked probability score.
  "cross_entropy": no order. These are the losses of the reference's V8-ordinal. A target of -1 gives a number to mask.
  """
  levels = jnp.arange(logits.shape[-1])
  if loss == "soft":
    wanted = jax.nn.softmax(-0.5 * jnp.square((levels - targets[:, None]) / sigma), axis=-1)
    return -jnp.sum(wanted * jax.nn.log_softmax(logits, axis=-1), axis=-1)
  nats = cross_entropy(logits, targets)
  if loss == "cumulative":
    distribution = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
    nats += _CUMULATIVE_WEIGHT * jnp.sum(jnp.square(distribution - (levels >= targets[:, None])), axis=-1)
  return nats


def _label_mean(values: jax.Array) -> jax.Array:
  """[B] as it is; [B, L] -> [B]."""
  return values.reshape(len(values), -1).mean(-1)


def loss_terms(output: ConditionerOutput) -> dict[str, Term]:
  """Every loss and metric that the output carries, each as (values [B], weight [B]), float32.

  Returns:
    "kl": KL of the latent to N(0, I), summed over its width. Without a latent this is |h|^2 / 2.
    "composition": 1 - cos(h, sum of the embeddings).
    "aux_<name>": cross-entropy of a classifier on its token (over labels the mean), or 10 times the smooth L1 (Huber)
      loss of a regressor on its own; weight 0 where the attribute is unknown.
    "acc_<name>": 1 where that classifier is right, else 0 (over labels the mean); same weight; a metric, not a loss.
    "mae_<name>": distance of that regressor, or of an ordinal classifier, in the attribute's unit; same weight; a
      metric, not a loss.
    "context_norm": Euclidean norm of a token, the mean over the sample's tokens; a metric, not a loss.
    The penalties of the output under their own names.
  """
  terms = {}
  weight = output.conditioned.astype(jnp.float32)
  if output.tokens.shape[1]:
    terms["context_norm"] = (jnp.mean(jnp.linalg.norm(output.tokens, axis=-1), axis=1), weight)
  if output.mu is not None:
    terms["kl"] = (kl_to_standard_normal(output.mu, output.log_sigma), weight)
  if output.parts is not None:
    terms["composition"] = (1 - cosine_similarity(output.h, output.parts), weight)
  for name, logits in (output.logits or {}).items():
    targets = output.targets[name]
    known = (targets.reshape(len(targets), -1)[:, 0] >= 0).astype(jnp.float32)
    values = (output.ordinal_losses or {}).get(name, cross_entropy(logits, targets))
    terms[f"aux_{name}"] = (_label_mean(values), known)
    terms[f"acc_{name}"] = (_label_mean((jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)), known)
    if name in (output.distances or {}):
      terms[f"mae_{name}"] = (output.distances[name], known)
  for name, (prediction, target, span) in (output.regressions or {}).items():
    known = target == target  # NaN is the only x != x; it must not reach the loss, where 0 times NaN is NaN
    target = jnp.where(known, target, 0)
    known = known.astype(jnp.float32)
    terms[f"aux_{name}"] = (_REGRESSION_SCALE * optax.huber_loss(prediction, target), known)
    terms[f"mae_{name}"] = (jnp.abs(prediction - target) * span, known)
  for name, values in (output.penalties or {}).items():
    terms[name] = (values, weight)
  return terms
