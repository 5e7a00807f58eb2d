"""Which values the numbers of a config may have, whatever the other keys say."""

import math

import ml_collections

from compdiff_jax.cli import InputError

# The smallest value of counts, sizes and weights.
_AT_LEAST = {
  "data.image_size": 1,
  "data.threads": 0,
  "data.workers": 0,
  "fairness.ucb_beta": 0,
  "fairness.window": 2,
  "logging.checkpoint_every": 1,
  "logging.keep_checkpoints": 1,
  "logging.keep_every": 0,
  "logging.log_every": 1,
  "logging.sample_every": 1,
  "logging.stall_seconds": 0,
  "lora.rank": 0,
  "loss.auxiliary": 0,
  "loss.coind": 0,
  "loss.composition": 0,
  "loss.input_perturbation": 0,
  "loss.kl": 0,
  "loss.kl_anneal_steps": 0,
  "loss.min_snr_gamma": 0,
  "loss.noise_offset": 0,
  "sample.batch_size": 1,
  "train.accumulation": 1,
  "train.batch_size": 1,
  "train.reference_processes": 0,
  "train.steps": 1,
  "train.warmup_steps": 0,
  "train.weight_decay": 0,
  "vae_training.batch_size": 1,
  "vae_training.kl": 0,
  "vae_training.steps": 1,
}
_POSITIVE = (
  "fairness.min_weight",
  "scheduler.beta_end",
  "scheduler.beta_start",
  "train.clip_norm",
  "train.ema_power",
  "train.eps",
  "train.learning_rate",
  "vae_training.learning_rate",
)
_FROM_0_TO_1 = (
  "data.balance_tau",
  "dropout.all_attributes",
  "dropout.attribute",
  "dropout.text",
  "fairness.exploitation",
  "fairness.sigma_init",
  "loss.coind_share",
  "sample.eta",
  "sample.guidance_rescale",
)
# Shares of the past that a running average keeps; 1 would keep all of it.
_BELOW_1 = ("train.b1", "train.b2", "train.ema_decay")
_FINITE = ("sample.guidance",)
_SEEDS = 2**31  # the seed is an argument of the compiled step, in which integers have 32 bits


def check_limits(config: ml_collections.ConfigDict) -> None:
  """Raises an `InputError` that names a number outside its limits; keys that the config lacks are skipped."""
  rules = {
    **{key: (lambda x, least=least: x >= least, f"at least {least}") for key, least in _AT_LEAST.items()},
    **dict.fromkeys(_POSITIVE, (lambda x: x > 0, "positive")),
    **dict.fromkeys(_FROM_0_TO_1, (lambda x: 0 <= x <= 1, "from 0 to 1")),
    **dict.fromkeys(_BELOW_1, (lambda x: 0 <= x < 1, "at least 0 and below 1")),
    **dict.fromkeys(_FINITE, (math.isfinite, "finite")),
    "seed": (lambda x: 0 <= x < _SEEDS, f"from 0 to {_SEEDS - 1}"),
  }
  for key, (allowed, words) in rules.items():
    value = config
    for part in key.split("."):
      value = value.get(part) if isinstance(value, ml_collections.ConfigDict) else None
    if isinstance(value, (int, float)) and not allowed(value):  # not so for NaN either
      raise InputError(f"config.{key} is {value}; it must be {words}")
