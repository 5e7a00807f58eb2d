"""Which conditioner a state dict of the reference holds."""

from collections.abc import Mapping, Sequence
from typing import Any

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.config import ConditionerConfig
from compdiff_jax.conditioning.flat import FlatConfig
from compdiff_jax.conditioning.hcn import HCNConfig
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.conditioning.typed import TypedConfig

_AGE_BINS = (18.0, 40.0, 60.0, 80.0)
_SEXES = ("male", "female")
_RACES = ("White", "Black", "Asian", "Hispanic")
_MAX_AGE, _DROPOUT, _HEADS = 100, 0.1, 4  # where config.json does not say

Shapes = Mapping[str, Sequence[int]]


def infer_conditioner(
  shapes: Shapes, reference_config: Mapping[str, Any] | None = None, source: str = "the conditioner"
) -> tuple[ConditionerConfig, Schema]:
  """Recognises a conditioner of the reference from its state dict.

  Args:
    shapes: {key of the state dict: shape}.
    reference_config: the config.json beside it, where there is one. Keys and shapes decide; from here comes what they
      do not tell: the number of attention heads (4 without it), the dropout rate, the largest age.
    source: the file, for error messages.

  Returns:
    The config and the reference's schema: age in years, sex, race. Unknown values have no trained representation
    there, so the unconditional branch is zero tokens, as in the reference.

  Raises:
    InputError: the keys are those of no conditioner, or of one that is not supported, which is named.
  """
  weights = _Weights(shapes, reference_config or {}, source)
  return _recognise(weights), _reference_schema(weights)


class _Weights:
  """A state dict's shapes and its config; what is missing or malformed is an error that names the file."""

  def __init__(self, shapes: Shapes, config: Mapping[str, Any], source: str):
    self._shapes = shapes
    self._config = config
    self.source = source

  def __contains__(self, key: str) -> bool:
    return key in self._shapes

  def size(self, key: str, axis: int = 0) -> int:
    if key not in self:
      raise InputError(f"{self.source} has no {key}; give all weights of the conditioner")
    return self._shapes[key][axis]

  def count(self, pattern: str) -> int:
    """How many of pattern.format(0), pattern.format(1), … there are."""
    number = 0
    while pattern.format(number) in self:
      number += 1
    return number

  def number(self, field: str, default: float) -> float:
    """A field of the config."""
    value = self._config.get(field, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      raise InputError(f"{self.source}: field {field} of its config.json is {value!r}; it must be a number")
    return value

  def refuse(self, class_name: str) -> InputError:
    return InputError(
      f"{self.source} holds a {class_name}, which is not supported; give an HCN, CompDiff-2 or FLAT model"
    )


def _recognise(weights: _Weights) -> ConditionerConfig:
  if "emb_age.freq_bands" in weights:
    raise weights.refuse("HierarchicalConditionerV9 (hcn_v9_continuous_age.py)")
  if "proj_cls.1.weight" in weights:
    return _typed(weights)
  if "fusion.0.weight" in weights or "proj_age.weight" in weights:
    return _flat(weights)
  # The first version reads its classifiers off the latent, and may have no token at all.
  first = "sex_classifier.1.weight" in weights and "sex_classifier.4.weight" not in weights
  if "compose_sex_race.net.1.weight" in weights and (first or "proj_ctx.1.weight" not in weights):
    raise weights.refuse("HierarchicalConditioner of the first version (hcn.py)")
  if "proj_ctx.1.weight" in weights:
    return _hcn(weights)
  raise InputError(
    f"{weights.source} holds no conditioner of the reference: none of proj_cls.1.weight, proj_ctx.1.weight,"
    " fusion.0.weight and proj_age.weight is there; give its hcn or demographic_encoder weights"
  )


def _hcn(weights: _Weights) -> HCNConfig:
  return HCNConfig(
    attributes=("age", "sex", "race") if "emb_age.weight" in weights else ("sex", "race"),
    d_node=weights.size("emb_sex.weight", 1),
    d_ctx=weights.size("proj_ctx.1.weight"),
    dropout=float(weights.number("dropout", _DROPOUT)),
    use_uncertainty="mu_head.weight" in weights,
    aux_hidden_dim=_hidden("sex_classifier.1.weight", weights),
    learned_nulls=False,
  )


def _typed(weights: _Weights) -> TypedConfig:
  own = {}
  if "composer.layers.0.linear1.weight" in weights:
    layers = weights.count("composer.layers.{}.linear1.weight")
    heads = int(weights.number("transformer_heads", _HEADS))
    own = {"composer": "transformer", "transformer_layers": layers, "transformer_heads": heads}
    own["num_registers"] = weights.size("type_emb") - 4  # three attributes and the class token
  elif "flat_stage1.net.1.weight" in weights:
    own = {"composer": "flat", "flat_hidden": weights.size("flat_stage1.net.1.weight")}
  return TypedConfig(
    attributes=("age", "sex", "race"),
    d_node=weights.size("emb_sex.weight", 1),
    d_ctx=weights.size("proj_cls.1.weight"),
    multi_token="proj_age.1.weight" in weights,
    d_time_emb=weights.size("time_proj.weight") if "time_proj.weight" in weights else 0,
    freq_dim=weights.size("age_encoder.0.weight", 1),
    dropout=float(weights.number("dropout", _DROPOUT)),
    use_uncertainty="mu_head.weight" in weights,
    aux_hidden_dim=_hidden("sex_classifier.1.weight", weights),
    unconditional="zeros",
    **own,
  )


def _flat(weights: _Weights) -> FlatConfig:
  single = "fusion.0.weight" in weights
  deep = _hidden("cls_sex.1.weight", weights)
  return FlatConfig(
    attributes=("age", "sex", "race"),
    d_node=weights.size("emb_sex.weight", 1),
    d_ctx=weights.size("fusion.3.weight" if single else "proj_age.weight"),
    mode="single" if single else "separate",
    heads="deep" if deep else "shallow" if "cls_sex.weight" in weights else "none",
    dropout=float(weights.number("dropout", _DROPOUT)),
    unconditional="zeros",
    **({"aux_hidden_dim": deep} if deep else {}),
  )


def _hidden(key: str, weights: _Weights) -> int:
  """The hidden width of an auxiliary head; 0 where there is none: heads are for training and may be left out."""
  return weights.size(key) if key in weights else 0


def _reference_schema(weights: _Weights) -> Schema:
  """Age, sex and race as the reference encodes them. A table of another size is another vocabulary: refused."""
  races = weights.size("emb_race.weight")
  if weights.size("emb_sex.weight") != len(_SEXES) or races not in (3, 4):
    raise InputError(
      f"{weights.source} has {weights.size('emb_sex.weight')} sexes and {races} races; the reference's categories are"
      f" {', '.join(_SEXES)} and {', '.join(_RACES)} (or the first three of these)"
    )
  bins = len(_AGE_BINS) + 1
  if "emb_age.weight" in weights and weights.size("emb_age.weight") != bins:
    raise InputError(f"{weights.source} has {weights.size('emb_age.weight')} age bins; the reference has {bins}")
  high = float(weights.number("max_age", _MAX_AGE))
  return Schema(
    (
      Attribute("age", "continuous", low=0.0, high=high, bins=_AGE_BINS, unit="year"),
      Attribute("sex", "categorical", values=_SEXES),
      Attribute("race", "categorical", values=_RACES[:races]),
    )
  )
