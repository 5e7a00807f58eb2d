"""FLAT, the reference's DemographicEncoder: embeddings of all attributes, one projection, no hierarchy and no latent.

Parameter paths are the reference's state_dict keys: `emb_age`, `fusion.0`, `proj_sex`, `cls_race`. For age, sex and
four races it has 934,155 parameters (single token, shallow heads), 2,509,067 (single, deep), 803,595 (separate,
shallow) or 2,378,507 (separate, deep), and a learned null of d_node for each attribute beside them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from compdiff_jax.conditioning import blocks
from compdiff_jax.conditioning.config import (
  UNCONDITIONAL,
  ConditionerConfig,
  check_choice,
  check_rate,
)
from compdiff_jax.conditioning.interface import Attributes, ConditionerOutput
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.models.config import check_positive
from compdiff_jax.models.layers import ACTIVATIONS, Dense, LayerNorm

_WEIGHT_STD = 0.02


@dataclasses.dataclass(frozen=True)
class FlatConfig(ConditionerConfig):
  """Sizes and switches of the flat encoder.

  Attributes:
    attributes: names the conditioner uses; empty means every attribute of the schema. The schema's order counts.
    d_node: width of the embeddings; the fusion of a single token is twice as wide inside.
    d_ctx: width of the cross-attention context.
    mode: "single" (one token of all attributes) or "separate" (one token for each).
    heads: auxiliary classifiers that are "shallow" (linear), "deep" (as those of HCN) or "none".
    aux_hidden_dim: hidden width of deep heads; dropout: their dropout rate.
    unconditional: what stands for an unknown value: learned "nulls", or "zeros" as in the reference, where a sample
      with an unknown value gets zero tokens.
  """

  attributes: tuple[str, ...] = ()
  d_node: int = 256
  d_ctx: int = 1024
  mode: str = "single"
  heads: str = "shallow"
  aux_hidden_dim: int = 512
  dropout: float = 0.1
  unconditional: str = "nulls"

  kind = "flat"

  def __post_init__(self):
    check_positive(self, "d_node", "d_ctx", "aux_hidden_dim")
    check_rate(self, "dropout")
    check_choice(self, "mode", ("single", "separate"))
    check_choice(self, "heads", ("shallow", "deep", "none"))
    check_choice(self, "unconditional", UNCONDITIONAL)

  @property
  def represents_unknown(self) -> bool:
    return self.unconditional == "nulls"

  def build(self, schema: Schema, rngs: nnx.Rngs) -> "Flat":
    return Flat(self, schema, rngs=rngs)


class _Gelu(nnx.Module):
  """Takes up position 2 of the fusion."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return ACTIVATIONS["gelu"](x)


def _linear(d_in: int, d_out: int, rngs: nnx.Rngs) -> Dense:
  """Weights N(0, 0.02^2), bias 0."""
  layer = Dense(d_in, d_out, rngs=rngs)
  layer.kernel = nnx.Param(_WEIGHT_STD * jax.random.normal(rngs.params(), [d_in, d_out]))
  layer.bias = nnx.Param(jnp.zeros([d_out]))
  return layer


class Flat(nnx.Module):
  """The flat encoder. Call and batch layout: `conditioning.interface`."""

  def __init__(self, config: FlatConfig, schema: Schema, *, rngs: nnx.Rngs):
    self.config = config
    self.schema = config.select(schema)
    names, d_node = self.schema.names, config.d_node
    blocks.add_tables(self, self.schema, d_node, config.represents_unknown, rngs)
    if config.mode == "single":
      widen = _linear(len(names) * d_node, 2 * d_node, rngs)
      self.fusion = nnx.List([widen, LayerNorm(2 * d_node), _Gelu(), _linear(2 * d_node, config.d_ctx, rngs)])
    else:
      for name in names:
        setattr(self, f"proj_{name}", _linear(d_node, config.d_ctx, rngs))
    if config.heads != "none":
      for attribute in self.schema:
        setattr(self, f"cls_{attribute.name}", self._head(blocks.num_rows(attribute), rngs))

  def _head(self, outputs: int, rngs: nnx.Rngs) -> nnx.Module:
    config = self.config
    if config.heads == "shallow":
      return _linear(config.d_ctx, outputs, rngs)
    head = blocks.block(config.d_ctx, config.aux_hidden_dim, outputs, config.dropout, rngs)
    head[1] = _linear(config.d_ctx, config.aux_hidden_dim, rngs)
    head[4] = _linear(config.aux_hidden_dim, outputs, rngs)
    return head

  def __call__(self, attributes: Attributes, *, keys: jax.Array | None = None) -> ConditionerOutput:
    """Attributes {name: [B]} to tokens [B, T, d_ctx]; continuous attributes enter as the index of their bin."""
    config = self.config
    rows = {a.name: blocks.table_rows(a, attributes[a.name]) for a in self.schema}
    embeddings, conditioned = blocks.embed_rows(self, rows, config.represents_unknown)
    if config.mode == "single":
      token = jnp.concatenate(list(embeddings.values()), axis=-1)
      for layer in self.fusion:
        token = layer(token)
      by_name = dict.fromkeys(rows, token)
      tokens = token[:, None]
    else:
      by_name = {name: getattr(self, f"proj_{name}")(embedding) for name, embedding in embeddings.items()}
      tokens = jnp.stack(list(by_name.values()), axis=1)
    return ConditionerOutput(
      tokens=jnp.where(conditioned[:, None, None], tokens, 0),
      logits=self._logits(by_name, keys),
      targets=blocks.masked_targets(self.schema, attributes, conditioned),
      conditioned=conditioned,
    )

  def _logits(self, tokens: dict[str, jax.Array], keys: jax.Array | None) -> dict[str, jax.Array]:
    if self.config.heads == "none":
      return {}
    heads = {name: getattr(self, f"cls_{name}") for name in tokens}
    if self.config.heads == "shallow":
      outputs = {name: head(tokens[name]) for name, head in heads.items()}
    else:
      masks, _ = blocks.draw(keys, dict.fromkeys(heads, (self.config.aux_hidden_dim,)), self.config.dropout, 0)
      outputs = {name: blocks.apply_block(head, tokens[name], masks[name]) for name, head in heads.items()}
    return {name: blocks.class_logits(self.schema[name], own) for name, own in outputs.items()}
