"""The additive conditioner: a token that is an analysis of variance (ANOVA) of the attributes.

  node  = base + sum of the main effect of each attribute + sum of the interaction of each pair of attributes
          + the interaction of all attributes
  token = Linear(node)

The projection is linear without a norm before it, so the token is additive as well. An interaction is a table with a
row for each combination of levels; rows start at zero and an L2 penalty pulls them back there. The penalty does not
grow with the data while the pull of the data on a row grows with the number of its examples, so a frequent pair may
leave the main effects, a rare one hardly does (the shrinkage of a random-effects model), and a pair that training has
not seen is exactly the sum of its main effects. All K attributes together have K - 1 times the penalty of a pair, and a
combination that training has not seen is exactly the sum of main effects and pairs.

Labels have an effect for each of their states, and interactions with the levels or labels of the other attributes.
An unknown attribute has no effects. `base` alone is therefore the token of "nothing is known": no nulls are needed.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning import blocks
from compdiff_jax.conditioning.config import ConditionerConfig, check_not_negative, check_rate
from compdiff_jax.conditioning.interface import Attributes, ConditionerOutput
from compdiff_jax.conditioning.schema import UNKNOWN_INDEX, Attribute, Schema
from compdiff_jax.models.config import check_positive
from compdiff_jax.models.layers import Dense, Embed

_MAX_ROWS = 100_000


@dataclasses.dataclass(frozen=True)
class AdditiveConfig(ConditionerConfig):
  """Sizes of the additive conditioner and the strength of its shrinkage.

  Attributes:
    attributes: names the conditioner uses; empty means every attribute of the schema.
    d_node: width of the effects.
    d_ctx: width of the cross-attention context.
    freq_dim: number of sinusoidal features of a continuous attribute's main effect, even.
    interaction_of_all: whether all attributes together interact, too, where there are three or more: in a table with a
      row for each of their combinations, at most 100,000.
    interaction_penalty: weight of the sum over all table rows of the mean square of a row, in the total loss; rows of
      all K attributes together count K - 1 times.
    aux_hidden_dim: hidden width of the auxiliary classifiers; 0 leaves them out. dropout: their dropout rate.
  """

  attributes: tuple[str, ...] = ()
  d_node: int = 256
  d_ctx: int = 1024
  freq_dim: int = 128
  interaction_of_all: bool = True
  interaction_penalty: float = 0.01
  aux_hidden_dim: int = 512
  dropout: float = 0.1

  kind = "additive"

  def __post_init__(self):
    check_positive(self, "d_node", "d_ctx", "freq_dim")
    check_not_negative(self, "interaction_penalty", "aux_hidden_dim")
    check_rate(self, "dropout")
    if self.freq_dim % 2:
      raise InputError(f"field freq_dim must be even (cosines and sines), got {self.freq_dim}")

  @property
  def loss_weights(self) -> Mapping[str, float]:
    return {"interaction": self.interaction_penalty}

  def build(self, schema: Schema, rngs: nnx.Rngs) -> "Additive":
    return Additive(self, schema, rngs=rngs)


def _interactions(names: Sequence[str], of_all: bool) -> dict[str, tuple[str, ...]]:
  """{table: the attributes that interact in it}: every pair, and if `of_all` three or more all together."""
  whole = {"interaction_all": tuple(names)} if of_all and len(names) > 2 else {}
  return {**blocks.pairs("interaction", names), **whole}


def _combined_rows(rows: Sequence[jax.Array], sizes: Sequence[int]) -> jax.Array:
  """Rows [B, k_i] of tables of sizes[i] rows -> all combinations of them, [B, prod k_i]; -1 if any is unknown."""
  combined, known = jnp.zeros_like(rows[0][:, :1]), True
  for own, size in zip(rows, sizes):
    combined = (combined[:, :, None] * size + own[:, None, :]).reshape(len(own), -1)
    known &= own[:, :1] >= 0
  return jnp.where(known, combined, UNKNOWN_INDEX)


class Additive(nnx.Module):
  """The additive conditioner. Call and batch layout: `conditioning.interface`."""

  def __init__(self, config: AdditiveConfig, schema: Schema, *, rngs: nnx.Rngs):
    self.config = config
    self.schema = config.select(schema)
    d_node = config.d_node
    # Base and effects start at unit size: no norm follows that would bring them to the size of the text tokens.
    self.base = nnx.Param(jax.random.normal(rngs.params(), [d_node]))
    for attribute in self.schema:
      if attribute.kind == "continuous":
        effect = blocks.number_encoder(config.freq_dim, d_node, rngs)
      else:
        rows = blocks.num_rows(attribute)
        effect = Embed(rows, d_node, rngs=rngs)
        effect.embedding = nnx.Param(jax.random.normal(rngs.params(), [rows, d_node]))
      setattr(self, f"effect_{attribute.name}", effect)
    for name, parts in _interactions(self.schema.names, config.interaction_of_all).items():
      rows = math.prod(blocks.num_rows(self.schema[part]) for part in parts)
      if rows > _MAX_ROWS:
        spare = ", or set conditioner.interaction_of_all=False" if len(parts) > 2 else ""
        raise InputError(
          f"conditioner: {', '.join(parts)} have {rows:,} combinations, and a table of interactions has at most"
          f" {_MAX_ROWS:,} rows; name fewer in conditioner.attributes{spare}"
        )
      table = Embed(rows, d_node, rngs=rngs)
      table.embedding = nnx.Param(jnp.zeros([rows, d_node]))
      setattr(self, name, table)
    self.proj_ctx = Dense(d_node, config.d_ctx, rngs=rngs)
    if config.aux_hidden_dim:
      for attribute in self.schema:
        head = blocks.block(config.d_ctx, config.aux_hidden_dim, blocks.num_rows(attribute), config.dropout, rngs)
        setattr(self, f"{attribute.name}_classifier", head)

  def _main_effect(self, attribute: Attribute, values: jax.Array) -> jax.Array:
    """Encoded values -> [B, d]: of levels and labels from a table, of a number a smooth function; 0 where unknown."""
    effect = getattr(self, f"effect_{attribute.name}")
    if attribute.kind == "continuous":
      vectors = blocks.encode_number(effect, attribute, values)
    else:
      vectors = blocks.sum_rows(effect, blocks.table_rows(attribute, values))
    return jnp.where(attribute.is_known(values)[:, None], vectors, 0)

  def __call__(self, attributes: Attributes, *, keys: jax.Array | None = None) -> ConditionerOutput:
    """Attributes {name: [B]} to a token [B, 1, d_ctx] and the size of the interactions."""
    config = self.config
    rows = {a.name: blocks.table_rows(a, attributes[a.name]) for a in self.schema}
    node = self.base[...] + sum(self._main_effect(a, attributes[a.name]) for a in self.schema)
    penalty = jnp.zeros([])
    for name, parts in _interactions(self.schema.names, config.interaction_of_all).items():
      table = getattr(self, name)
      row = _combined_rows([rows[part] for part in parts], [blocks.num_rows(self.schema[part]) for part in parts])
      node = node + jnp.where((row[:, :1] >= 0), blocks.sum_rows(table, row), 0)
      penalty = penalty + (len(parts) - 1) * jnp.sum(jnp.mean(table.embedding[...] ** 2, axis=-1))
    token = self.proj_ctx(node)
    logits = {}
    if config.aux_hidden_dim:
      heads = {name: getattr(self, f"{name}_classifier") for name in rows}
      masks, _ = blocks.draw(keys, dict.fromkeys(heads, (config.aux_hidden_dim,)), config.dropout, 0)
      outputs = {name: blocks.apply_block(head, token, masks[name]) for name, head in heads.items()}
      logits = {name: blocks.class_logits(self.schema[name], own) for name, own in outputs.items()}
    conditioned = jnp.ones(token.shape[:1], bool)
    return ConditionerOutput(
      tokens=token[:, None],
      logits=logits,
      targets=blocks.masked_targets(self.schema, attributes, conditioned),
      penalties={"interaction": jnp.broadcast_to(penalty, token.shape[:1])},
      conditioned=conditioned,
    )
