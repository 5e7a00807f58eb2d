"""What the configs of all conditioners have in common: members with defaults, plain data in and out, checks."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from flax import nnx

from compdiff_jax.cli import InputError, nearest
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.models import config as configs

# What the unconditional branch of guidance appends to the empty prompt.
UNCONDITIONAL = ("nulls", "zeros")


class ConditionerConfig:
  """Base of the config classes, which are frozen dataclasses of plain values.

  The class attributes below are what the rest of the program may ask a config of any kind; a subclass makes those that
  a user chooses into fields.

  Attributes:
    kind: the conditioner's name, the field `kind` of its plain data.
    attributes: names of the schema's attributes that the conditioner uses; empty means all. The schema's order counts.
    d_ctx: width of the cross-attention context.
    d_time_emb: width of the vector that is added to the UNet's time embedding; 0: there is none.
    film_channels: widths of the UNet's residual blocks, which are modulated; empty: they are not.
    hierarchical: whether attributes are composed in pairs, and these to the whole: the method of CompDiff.
    represents_unknown: whether a single unknown attribute has a learned representation. If not, all attributes are
      given or none, for which there are zero tokens: plans, guidance and exports refuse the rest.
    loss_weights: weight of a loss term beside the others of its kind, for terms where it is not 1: auxiliary heads
      ("aux_<name>") share `config.loss.auxiliary` in this proportion.
  """

  kind = ""
  attributes = ()
  d_ctx = 0
  d_time_emb = 0
  film_channels = ()
  hierarchical = False
  represents_unknown = True
  loss_weights = MappingProxyType({})

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> "ConditionerConfig":
    """From plain data; an unknown field, or a value of the wrong type or range, is an `InputError` that names it."""
    return configs.parse(cls, values, source="conditioner", fixed={"kind": cls.kind})

  def to_dict(self) -> dict[str, Any]:
    return {"kind": self.kind, **configs.to_json(self)}

  def select(self, schema: Schema) -> Schema:
    """The attributes that enter the conditioner."""
    selected = schema.subset(self.attributes or schema.names)
    if not selected.names:
      raise InputError(f"conditioner: kind {self.kind!r} needs attributes and the schema has none; use kind 'none'")
    return selected

  def build(self, schema: Schema, rngs: nnx.Rngs) -> nnx.Module:
    """The conditioner (`interface.Conditioner`) for data with this schema."""
    raise NotImplementedError


def check_rate(config: ConditionerConfig, name: str) -> None:
  """Raises an `InputError` when a dropout rate is outside [0, 1)."""
  if not 0 <= getattr(config, name) < 1:
    raise InputError(f"field {name} must be in [0, 1), got {getattr(config, name)}")


def check_not_negative(config: ConditionerConfig, *names: str) -> None:
  """Raises an `InputError` when a size that may be 0 (none of it) is negative."""
  for name in names:
    if getattr(config, name) < 0:
      raise InputError(f"field {name} must be 0 (none) or more, got {getattr(config, name)}")


def check_choice(config: ConditionerConfig, name: str, choices: tuple[str, ...]) -> None:
  """Raises an `InputError` that names the choices when a value is none of them."""
  value = getattr(config, name)
  if value not in choices:
    raise InputError(f"field {name} is {value!r}{nearest(value, choices)}")
