"""The conditioners by name."""

from collections.abc import Mapping
from typing import Any

from compdiff_jax.cli import InputError, nearest
from compdiff_jax.conditioning.additive import AdditiveConfig
from compdiff_jax.conditioning.config import ConditionerConfig
from compdiff_jax.conditioning.flat import FlatConfig
from compdiff_jax.conditioning.hcn import HCNConfig
from compdiff_jax.conditioning.none import NoConditionerConfig
from compdiff_jax.conditioning.typed import TypedConfig

CONFIGS = {config.kind: config for config in (NoConditionerConfig, HCNConfig, TypedConfig, FlatConfig, AdditiveConfig)}


def config_from_dict(values: Mapping[str, Any]) -> ConditionerConfig:
  """The config of the conditioner that `values["kind"]` names. Raises InputError for an unknown kind or field."""
  kind = values.get("kind", "")
  if kind not in CONFIGS:
    raise InputError(f"conditioner: kind is {kind!r}{nearest(str(kind), CONFIGS)}")
  return CONFIGS[kind].from_dict(values)
