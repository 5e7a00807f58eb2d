"""The optimizer: AdamW, decay on kernels only, global-norm clipping, warm-up and cosine in optimizer steps."""

import ml_collections
import optax

from compdiff_jax.cli import InputError


def learning_rate_schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
  """Linear warm-up from 0 to `learning_rate`, then a half cosine to 0 at `steps` and 0 from there on."""
  if not 0 <= config.warmup_steps < config.steps:
    raise InputError(f"train.warmup_steps {config.warmup_steps} must be smaller than train.steps {config.steps}")
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0, peak_value=config.learning_rate, warmup_steps=config.warmup_steps, decay_steps=config.steps
  )


def _decays(params):
  """Weight decay touches kernels only: biases, norms, embeddings and learned nulls are left alone."""
  return {part: {name: name.endswith("kernel") for name in leaves} for part, leaves in params.items()}


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """AdamW as configured by `config.train`."""
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      learning_rate_schedule(config),
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
      mask=_decays,
    ),
  )
