"""Configs are Python files with `get_config() -> ml_collections.ConfigDict`, overridable with `--config.a.b=value`."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from compdiff_jax.cli import InputError, nearest
from compdiff_jax.limits import check_limits


def load_config(path: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
  """The locked config of `path` with `overrides` ("--config.key=value") applied.

  Raises:
    InputError: no such file, no `get_config`, an unknown key (the nearest one is named), a value of another type or a
      number outside its limits.
  """
  if not Path(path).is_file():
    raise InputError(f"config file {path} does not exist")
  for override in overrides:
    if not re.match(r"--config\.[\w.]+=", override):
      raise InputError(f"unknown argument {override!r}; overrides are written --config.key=value")
  # The file is read once without overrides, so that a typo can be answered with the keys that exist.
  known = list(_leaves(_parse(path, ())))
  for override in overrides:
    key = override.split("=")[0].removeprefix("--config.")
    if key not in known:
      raise InputError(f"{path} has no config key {key!r}{nearest(key, known)}")
  # The last value of a key counts; the flag library would join repeated tuples.
  config = _parse(path, list({override.split("=")[0]: override for override in overrides}.values()))
  check_limits(config)
  return config


def _parse(path: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
  arguments = ["compdiff", f"--config={path}", *overrides]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=arguments)
  try:
    values(arguments)
    return values.config
  except InputError:
    raise
  except Exception as error:  # whatever the user's Python file raises
    reason = " ".join(str(error).split())
    raise InputError(f"config {path} {' '.join(overrides)}: {type(error).__name__}: {reason}") from None


def _leaves(config: ml_collections.ConfigDict, prefix: str = ""):
  for key in config:
    value = config[key]
    if isinstance(value, ml_collections.ConfigDict):
      yield from _leaves(value, f"{prefix}{key}.")
    else:
      yield prefix + key


def to_plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The config as JSON-ready plain data (tuples become lists)."""
  return json.loads(json.dumps(config.to_dict()))


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
  """Dotted keys at which two plain configs differ, as "key: old -> new"."""
  if isinstance(a, dict) and isinstance(b, dict):
    return [d for key in sorted({*a, *b}) for d in differences(a.get(key), b.get(key), f"{prefix}.{key}".lstrip("."))]
  return [] if a == b else [f"{prefix}: {json.dumps(a)} -> {json.dumps(b)}"]
