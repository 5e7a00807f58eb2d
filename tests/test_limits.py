"""Numbers of a config outside their limits are refused when it is loaded."""

import ml_collections
import pytest

from compdiff_jax.cli import InputError
from compdiff_jax.config import load_config
from compdiff_jax.default_config import base, tiny
from compdiff_jax.limits import check_limits

# Numbers that need no limit of their own: any value has a meaning, or what reads the key refuses the others by name.
_FREE = {
  *("mesh.data", "mesh.fsdp", "mesh.tensor", "sample.guidance", "sample.num_steps", "lora.scale"),
  *("scheduler.num_train_timesteps", "scheduler.steps_offset"),
}
# Fields of these are checked by the configs of networks and conditioners.
_NETWORKS = ("unet", "vae", "text_encoder", "conditioner")


def _numbers(config: ml_collections.ConfigDict, prefix: str = ""):
  for key, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      if key not in _NETWORKS:
        yield from _numbers(value, f"{prefix}{key}.")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
      yield prefix + key, value


_KEYS = sorted({key for key, _ in _numbers(tiny(base(), 32))} - _FREE)


@pytest.mark.parametrize("key", _KEYS)
def test_every_number_has_limits(key):
  config = tiny(base(), 32)
  check_limits(config)
  path, _, name = key.rpartition(".")
  owner = config
  for part in path.split("."):
    owner = owner[part] if part else owner
  kind = type(owner[name])
  for value in (kind(-1), *[float("nan")] * (kind is float)):
    owner[name] = value
    with pytest.raises(InputError, match=rf"^config\.{key} is {value}; it must be "):
      check_limits(config)


@pytest.mark.parametrize(
  ("override", "words"),
  [
    ("dropout.text=1.01", "config.dropout.text is 1.01; it must be from 0 to 1"),
    ("train.b1=1.0", "config.train.b1 is 1.0; it must be at least 0 and below 1"),
    ("train.clip_norm=0.0", "config.train.clip_norm is 0.0; it must be positive"),
    ("fairness.window=1", "config.fairness.window is 1; it must be at least 2"),
    ("vae_training.batch_size=0", "config.vae_training.batch_size is 0; it must be at least 1"),
    ("sample.guidance=nan", "config.sample.guidance is nan; it must be finite"),
    ("sample.guidance=-inf", "config.sample.guidance is -inf; it must be finite"),
    ("seed=2147483648", "config.seed is 2147483648; it must be from 0 to 2147483647"),
  ],
)
def test_overrides_are_checked(override, words):
  with pytest.raises(InputError) as caught:
    load_config("configs/demo.py", [f"--config.{override}"])
  assert str(caught.value) == words


def test_limits_themselves_are_allowed():
  overrides = ["dropout.text=1.0", "dropout.attribute=0.0", "train.b1=0.0", "loss.kl=0.0", "data.workers=0"]
  load_config("configs/demo.py", [f"--config.{override}" for override in overrides])
