"""HCN v1, the Hierarchical Conditioner Network of CompDiff-1: attributes -> pairs -> one latent -> one token.

Every attribute has an embedding, every pair of attributes a composed node, and the pair nodes are composed once more
into h. A Gaussian latent around h, projected to the context width, is the token. Parameter paths are the reference's
state_dict keys, built from the schema's names: `emb_sex`, `compose_sex_race.net.1`, `race_classifier.4`. The
reference's `encode_age=False` is `attributes=("sex", "race")`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from compdiff_jax.conditioning import blocks, composers
from compdiff_jax.conditioning.config import ConditionerConfig, check_choice, check_not_negative, check_rate
from compdiff_jax.conditioning.interface import Attributes, ConditionerOutput
from compdiff_jax.conditioning.losses import ORDINAL_LOSSES, ordinal_loss
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.models.config import check_positive


@dataclasses.dataclass(frozen=True)
class HCNConfig(ConditionerConfig):
  """Sizes and switches of HCN v1; the defaults are the reference's, with learned nulls added.

  Attributes:
    attributes: names the conditioner uses; empty means every attribute of the schema. The schema's order counts.
    d_node: width of embeddings and nodes; composer MLPs are twice as wide inside.
    d_ctx: width of the cross-attention context.
    dropout: rate inside composers and auxiliary heads.
    use_uncertainty: False makes the latent h itself (no `mu_head`, no `logsigma_head`).
    aux_hidden_dim: hidden width of the auxiliary classifiers; 0 leaves them out.
    ordinal_encoder: bins of a continuous attribute are embedded as the sum of the table's rows up to their own, so that
      neighbours share all but one. False: each bin has a row of its own, as in the reference.
    ordinal_loss: how the classifier of a continuous attribute's bins is judged, see `losses.ordinal_loss`.
    soft_sigma: width of the targets of the loss "soft", in bins.
    learned_nulls: an embedding `null_<name>` for an unknown value. Without it a sample with an unknown value gets the
      zero token, which is what the reference's release does for its unconditional branch.
  """

  attributes: tuple[str, ...] = ()
  d_node: int = 256
  d_ctx: int = 1024
  dropout: float = 0.1
  use_uncertainty: bool = True
  aux_hidden_dim: int = 512
  ordinal_encoder: bool = False
  ordinal_loss: str = "cross_entropy"
  soft_sigma: float = 0.75
  learned_nulls: bool = True

  kind = "hcn"
  hierarchical = True

  def __post_init__(self):
    check_positive(self, "d_node", "d_ctx", "soft_sigma")
    check_choice(self, "ordinal_loss", ORDINAL_LOSSES)
    check_not_negative(self, "aux_hidden_dim")
    check_rate(self, "dropout")

  @property
  def represents_unknown(self) -> bool:
    return self.learned_nulls

  def build(self, schema: Schema, rngs: nnx.Rngs) -> "HCN":
    return HCN(self, schema, rngs=rngs)


class HCN(nnx.Module):
  """HCN v1. Call and batch layout: `conditioning.interface`."""

  def __init__(self, config: HCNConfig, schema: Schema, *, rngs: nnx.Rngs):
    self.config = config
    self.schema = config.select(schema)
    d_node = config.d_node
    blocks.add_tables(self, self.schema, d_node, config.learned_nulls, rngs)
    composers.add_pairs(self, self.schema.names, d_node, config.dropout, rngs)
    if config.use_uncertainty:
      self.mu_head, self.logsigma_head = blocks.latent_heads(d_node, rngs)
    self.proj_ctx = blocks.projection(d_node, config.d_ctx, rngs)
    if config.aux_hidden_dim:
      for attribute in self.schema:
        head = blocks.block(config.d_ctx, config.aux_hidden_dim, blocks.num_rows(attribute), config.dropout, rngs)
        setattr(self, f"{attribute.name}_classifier", head)

  def __call__(self, attributes: Attributes, *, keys: jax.Array | None = None) -> ConditionerOutput:
    """Attributes {name: [B]} to a token [B, 1, d_ctx] and what the losses need.

    Continuous attributes enter as the index of their bin. The auxiliary heads read the finished token.
    """
    config = self.config
    rows = {a.name: blocks.table_rows(a, attributes[a.name]) for a in self.schema}
    ordered = [a.name for a in self.schema if a.kind == "continuous"]
    embeddings, conditioned = blocks.embed_rows(
      self, rows, config.learned_nulls, ordered if config.ordinal_encoder else ()
    )
    mask_shapes = composers.pair_masks(self.schema.names, config.d_node)
    mask_shapes |= {f"{name}_classifier": (config.aux_hidden_dim,) for name in rows}
    masks, noise = blocks.draw(keys, mask_shapes, config.dropout, config.d_node)
    h = composers.compose_pairs(self, embeddings, masks)
    z, mu, log_sigma = blocks.latent(self, h, noise)
    token = blocks.apply_projection(self.proj_ctx, z)
    token = jnp.where(conditioned[:, None], token, 0)
    logits, targets = {}, {}
    if config.aux_hidden_dim:
      targets = blocks.masked_targets(self.schema, attributes, conditioned)
      for attribute in self.schema:
        head = f"{attribute.name}_classifier"
        outputs = blocks.apply_block(getattr(self, head), token, masks[head])
        logits[attribute.name] = blocks.class_logits(attribute, outputs)
    return ConditionerOutput(
      tokens=token[:, None],
      mu=mu,
      log_sigma=log_sigma,
      h=h,
      parts=sum(embeddings.values()),
      logits=logits,
      targets=targets,
      **self._ordinal(logits, targets, attributes),
      conditioned=conditioned,
    )

  def _ordinal(
    self, logits: dict[str, jax.Array], targets: dict[str, jax.Array], attributes: Attributes
  ) -> dict[str, dict]:
    """How classifiers of bins are judged where it is not by the cross-entropy: fields of `ConditionerOutput`."""
    config = self.config
    if config.ordinal_loss == "cross_entropy":
      return {}
    losses, distances = {}, {}
    for attribute in self.schema.grouping:
      name = attribute.name
      if attribute.kind == "continuous" and name in logits:
        losses[name] = ordinal_loss(logits[name], targets[name], config.ordinal_loss, config.soft_sigma)
        middles = jnp.asarray([attribute.representative(level) for level in range(attribute.num_levels)], jnp.float32)
        expected = jnp.sum(jax.nn.softmax(logits[name], axis=-1) * middles, axis=-1)
        distances[name] = jnp.abs(expected - jnp.where(targets[name] >= 0, attributes[name], 0))
    return {"ordinal_losses": losses, "distances": distances}
