"""The typed conditioner of CompDiff-2: every attribute enters as what it is, and leaves as a token of its own.

Categories have embedding tables, labels one for their states; numbers, in their own unit, a sinusoidal encoder; an
unknown value has a learned null. A composer makes one node h of the whole and one node of each attribute in the light
of the others. The Gaussian latent is around h alone. Tokens, in this order: one for each attribute, the whole,
registers.

Parameter paths are the reference's state_dict keys (CompDiff2Conditioner). Its stages are

  2a        multi_token=False                       4,339,503 parameters for age, sex and four races
  2b        the defaults                            6,315,567
  2c        d_time_emb=1280                         6,644,527
  2d, 2e    composer="transformer", d_time_emb=1280 4,803,375   (2e is 2d trained with attribute dropout)
  2b_flat   composer="flat"                         6,317,559

There are three routes into the UNet, which may be combined: tokens, a vector added to the time embedding, and a
modulation of the residual blocks.
"""

import dataclasses
import math
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning import blocks
from compdiff_jax.conditioning.composers import COMPOSERS
from compdiff_jax.conditioning.config import (
  UNCONDITIONAL,
  ConditionerConfig,
  check_choice,
  check_not_negative,
  check_rate,
)
from compdiff_jax.conditioning.film import FiLM
from compdiff_jax.conditioning.interface import Attributes, ConditionerOutput, Regression
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.models.config import check_positive
from compdiff_jax.models.layers import Dense, Embed

# The encoder of a number gives about 0.15. Beside it a table of 0.02, as CLIP's, would vanish in the first norm of a
# pair, and a short run would not get over that.
_TABLE_STD = 0.5
# Parameter names such as proj_cls are taken, so no attribute may be called that.
_RESERVED = ("cls", "reg", "joint", "film")


@dataclasses.dataclass(frozen=True)
class TypedConfig(ConditionerConfig):
  """Sizes and switches; the defaults are the reference's stage 2b, with an unconditional branch that training reaches.

  Attributes:
    attributes: names the conditioner uses; empty means every attribute of the schema. The schema's order counts.
    d_node: width of embeddings and nodes; hierarchical composers and transformer layers are twice as wide inside.
    d_ctx: width of the cross-attention context.
    composer: "hierarchical" (all pairs, then the whole), "transformer" or "flat".
    multi_token: a token for each attribute beside the one of the whole.
    num_registers: further tokens that belong to no attribute; they need multi_token.
    tokens: False keeps the tokens from the UNet (auxiliary heads still read them); then another route is needed.
    d_time_emb: width of the UNet's time embedding, to which a vector made of the latent is added (the reference's
      Route B); 0: it is not.
    film_channels: widths of the UNet's residual blocks, which the latent then modulates (`conditioning.film`); empty:
      it does not.
    film_hidden: inner width of that network.
    freq_dim: number of sinusoidal features of a continuous attribute, even.
    flat_hidden: inner width of the flat composer; 664 gives it the size of the hierarchical one.
    transformer_layers, transformer_heads: of the transformer composer.
    dropout: rate inside composers and auxiliary heads.
    use_uncertainty: False makes the latent h itself (no `mu_head`, no `logsigma_head`).
    aux_hidden_dim: hidden width of the auxiliary heads; 0 leaves them out.
    unconditional: what a sample gets of which nothing is known: the tokens of the learned "nulls", or "zeros" as in
      the reference, whose released nulls are untrained: a single unknown attribute has no meaning there.
  """

  attributes: tuple[str, ...] = ()
  d_node: int = 256
  d_ctx: int = 1024
  composer: str = "hierarchical"
  multi_token: bool = True
  num_registers: int = 0
  tokens: bool = True
  d_time_emb: int = 0
  film_channels: tuple[int, ...] = ()
  film_hidden: int = 512
  freq_dim: int = 128
  flat_hidden: int = 664
  transformer_layers: int = 2
  transformer_heads: int = 4
  dropout: float = 0.1
  use_uncertainty: bool = True
  aux_hidden_dim: int = 512
  unconditional: str = "nulls"

  kind = "typed"
  loss_weights = MappingProxyType({"aux_joint": 0.5})

  def __post_init__(self):
    check_positive(self, "d_node", "d_ctx", "freq_dim", "flat_hidden", "transformer_layers", "transformer_heads")
    check_positive(self, "film_hidden", *(["film_channels"] if self.film_channels else []))
    check_not_negative(self, "num_registers", "d_time_emb", "aux_hidden_dim")
    check_rate(self, "dropout")
    check_choice(self, "composer", tuple(COMPOSERS))
    check_choice(self, "unconditional", UNCONDITIONAL)
    if self.freq_dim % 2:
      raise InputError(f"field freq_dim must be even (cosines and sines), got {self.freq_dim}")
    if self.num_registers and not self.multi_token:
      raise InputError(f"field num_registers is {self.num_registers}; registers need multi_token=True")
    if not self.tokens and not self.d_time_emb and not self.film_channels:
      raise InputError("field tokens is False without d_time_emb and film_channels; nothing would reach the UNet")
    if not self.tokens and self.num_registers:
      raise InputError(f"field num_registers is {self.num_registers}; registers need tokens=True")
    if self.composer == "transformer" and self.d_node % self.transformer_heads:
      raise InputError(f"field transformer_heads is {self.transformer_heads}; it must divide d_node {self.d_node}")

  @property
  def hierarchical(self) -> bool:
    return self.composer == "hierarchical"

  @property
  def represents_unknown(self) -> bool:
    return self.unconditional == "nulls"

  def build(self, schema: Schema, rngs: nnx.Rngs) -> "Typed":
    return Typed(self, schema, rngs=rngs)


class Typed(nnx.Module):
  """The typed conditioner. Call and batch layout: `conditioning.interface`."""

  def __init__(self, config: TypedConfig, schema: Schema, *, rngs: nnx.Rngs):
    self.config = config
    self.schema = config.select(schema)
    names = self.schema.names
    for name in _RESERVED:
      if name in names:
        raise InputError(f"conditioner: attribute {name!r} has the name of a part of the network; rename it")
    for attribute in self.schema:
      self._add_encoder(attribute, rngs)
    COMPOSERS[config.composer].add(self, names, config, rngs)
    if config.use_uncertainty:
      self.mu_head, self.logsigma_head = blocks.latent_heads(config.d_node, rngs)
    token_names = [*(names if config.multi_token else ()), "cls", *(["reg"] if config.num_registers else [])]
    for name in token_names:
      setattr(self, f"proj_{name}", blocks.projection(config.d_node, config.d_ctx, rngs))
    if config.d_time_emb:
      self.time_proj = Dense(config.d_node, config.d_time_emb, rngs=rngs)
      # Zero: training starts from the UNet's own time embedding.
      self.time_proj.kernel = nnx.Param(jnp.zeros([config.d_node, config.d_time_emb]))
      self.time_proj.bias = nnx.Param(jnp.zeros([config.d_time_emb]))
    if config.film_channels:
      self.film = FiLM(config.d_node, config.film_hidden, config.film_channels, rngs)
    sizes = self._head_sizes() if config.aux_hidden_dim else {}
    self.heads = tuple(sizes)
    for head, size in sizes.items():
      setattr(self, head, blocks.block(config.d_ctx, config.aux_hidden_dim, size, config.dropout, rngs))

  def _add_encoder(self, attribute: Attribute, rngs: nnx.Rngs) -> None:
    name, d_node = attribute.name, self.config.d_node
    if attribute.kind == "continuous":
      setattr(self, f"{name}_encoder", blocks.number_encoder(self.config.freq_dim, d_node, rngs))
    else:
      setattr(self, f"emb_{name}", Embed(blocks.num_rows(attribute), d_node, std=_TABLE_STD, rngs=rngs))
    setattr(self, f"null_{name}", blocks.learned_vectors(rngs, d_node))

  def _head_sizes(self) -> dict[str, int]:
    """{parameter name: outputs}: what is told from each attribute's token, and the full cell from the whole's."""
    sizes = {}
    for attribute in self.schema:
      number = attribute.kind == "continuous"
      head = f"{attribute.name}_{'regressor' if number else 'classifier'}"
      sizes[head] = 1 if number else blocks.num_rows(attribute)
    cells = math.prod(attribute.num_levels for attribute in self.schema.grouping)
    return {**sizes, "joint_classifier": cells} if self.schema.grouping.names else sizes

  def _embed(self, attribute: Attribute, values: jax.Array) -> jax.Array:
    """Encoded values [B] to embeddings [B, d]: the null where unknown."""
    name, known = attribute.name, attribute.is_known(values)
    if attribute.kind == "continuous":
      embedding = blocks.encode_number(getattr(self, f"{name}_encoder"), attribute, values)
    else:
      embedding = blocks.sum_rows(getattr(self, f"emb_{name}"), blocks.table_rows(attribute, values))
    return jnp.where(known[:, None], embedding, getattr(self, f"null_{name}")[...])

  def __call__(self, attributes: Attributes, *, keys: jax.Array | None = None) -> ConditionerOutput:
    """Attributes {name: [B]} to tokens [B, T, d_ctx], the other routes' vectors, and what the losses need."""
    config, names = self.config, self.schema.names
    composer = COMPOSERS[config.composer]
    mask_shapes = composer.mask_shapes(names, config) | dict.fromkeys(self.heads, (config.aux_hidden_dim,))
    masks, noise = blocks.draw(keys, mask_shapes, config.dropout, config.d_node)
    embeddings = {a.name: self._embed(a, attributes[a.name]) for a in self.schema}
    composed = composer.compose(self, embeddings, masks)
    z, mu, log_sigma = blocks.latent(self, composed.h, noise)

    nodes = {**composed.contexts, "cls": z}
    by_name = {name: blocks.apply_projection(getattr(self, f"proj_{name}"), node) for name, node in nodes.items()}
    tokens = jnp.stack(list(by_name.values()), axis=1)
    if composed.registers is not None:
      registers = blocks.apply_projection(self.proj_reg, composed.registers)
      tokens = jnp.concatenate([tokens, registers], axis=1)
    time_vector = self.time_proj(z) if config.d_time_emb else None

    known = jnp.stack([a.is_known(attributes[a.name]) for a in self.schema])
    conditioned = jnp.ones(known.shape[1:], bool)
    if config.unconditional == "zeros":
      conditioned = jnp.any(known, axis=0)
      tokens = jnp.where(conditioned[:, None, None], tokens, 0)
      time_vector = None if time_vector is None else jnp.where(conditioned[:, None], time_vector, 0)
    return ConditionerOutput(
      tokens=tokens if config.tokens else tokens[:, :0],
      time_vector=time_vector,
      film=self.film(z, conditioned) if config.film_channels else None,
      mu=mu,
      log_sigma=log_sigma,
      h=composed.h,
      parts=sum(embeddings.values()),
      **self._heads(attributes, by_name, masks),
      conditioned=conditioned,
    )

  def _heads(self, attributes: Attributes, tokens: dict[str, jax.Array], masks: dict) -> dict[str, dict]:
    """What the auxiliary heads say, and what they should: fields of `ConditionerOutput`.

    Each reads its attribute's token, that of the whole cell the token of the whole; a single token is read by all.
    """
    classes = {a.name: blocks.class_targets(a, attributes[a.name]) for a in self.schema}
    logits, targets, regressions = {}, {}, {}
    for head in self.heads:
      name, _, role = head.rpartition("_")
      said = blocks.apply_block(getattr(self, head), tokens.get(name, tokens["cls"]), masks[head])
      if role == "classifier":
        if name == "joint":
          sizes = {a.name: a.num_levels for a in self.schema.grouping}
          logits[name], targets[name] = said, blocks.joint_levels(classes, sizes)
        else:
          logits[name], targets[name] = blocks.class_logits(self.schema[name], said), classes[name]
      else:
        attribute = self.schema[name]
        span = attribute.high - attribute.low
        regressions[name] = Regression(said[:, 0], (attributes[name] - attribute.low) / span, span)
    return {"logits": logits, "targets": targets, "regressions": regressions}
