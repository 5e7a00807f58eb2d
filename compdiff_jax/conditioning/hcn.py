"""HCN v1, the Hierarchical Conditioner Network of CompDiff-1: attributes -> pairs -> one latent -> one token.

Every attribute has an embedding, every pair of attributes a composed node, and the pair nodes are composed once more
into h. A Gaussian latent around h, projected to the context width, is the token. Parameter paths are the
reference's state_dict keys, built from the schema's names: `emb_sex`, `compose_sex_race.net.1`, `race_classifier.4`.
The reference's `encode_age=False` is `attributes=("sex", "race")`.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.interface import Attributes, ConditionerOutput, level_indices
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.models import config as configs
from compdiff_jax.models.layers import Dense, Embed, LayerNorm

_NULL_STD = 0.02  # as the embeddings
_LATENT_HEAD_STD = 0.01
_LOG_SIGMA_START = -1.0
_LOG_SIGMA_RANGE = (-5.0, 1.0)


@dataclasses.dataclass(frozen=True)
class HCNConfig:
  """Sizes and switches of HCN v1; the defaults are the reference's, with learned nulls added.

  Attributes:
    attributes: names the conditioner uses; empty means every attribute of the schema. The schema's order counts.
    d_node: width of embeddings and nodes; composer MLPs are twice as wide inside.
    d_ctx: width of the cross-attention context.
    dropout: rate inside composers and auxiliary heads.
    use_uncertainty: False makes the latent h itself (no `mu_head`, no `logsigma_head`).
    aux_hidden_dim: hidden width of the auxiliary classifiers; 0 leaves them out.
    learned_nulls: an embedding `null_<name>` for an unknown value. Without it a sample with an unknown value gets the
      zero token, which is what the reference's release does for its unconditional branch.
  """

  attributes: tuple[str, ...] = ()
  d_node: int = 256
  d_ctx: int = 1024
  dropout: float = 0.1
  use_uncertainty: bool = True
  aux_hidden_dim: int = 512
  learned_nulls: bool = True

  def __post_init__(self):
    for name in ("d_node", "d_ctx"):
      if getattr(self, name) < 1:
        raise InputError(f"field {name} must be at least 1, got {getattr(self, name)}")
    if self.aux_hidden_dim < 0:
      raise InputError(f"field aux_hidden_dim must be 0 (no heads) or more, got {self.aux_hidden_dim}")
    if not 0 <= self.dropout < 1:
      raise InputError(f"field dropout must be in [0, 1), got {self.dropout}")

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "HCNConfig":
    """From plain data; an unknown field, or a value of the wrong type or range, is an `InputError` that names it."""
    return configs.parse(cls, config, source="conditioner", fixed={})

  def to_dict(self) -> dict[str, Any]:
    return configs.to_json(self)


class _Silu(nnx.Module):
  """Index 2 of a block. Without parameters, but the reference's positional keys count it."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return jax.nn.silu(x)


class _Dropout(nnx.Module):
  """Index 3 of a block. Its mask, drawn from the samples' keys, is handed in; None means evaluation."""

  def __init__(self, rate: float):
    self.rate = rate

  def __call__(self, x: jax.Array, keep: jax.Array | None) -> jax.Array:
    return x if keep is None else jnp.where(keep, x / (1 - self.rate), 0)


def _block(d_in: int, d_hidden: int, d_out: int, dropout: float, rngs: nnx.Rngs) -> nnx.List:
  """LayerNorm, Linear, SiLU, dropout, Linear: parameters at 0, 1 and 4."""
  layers = [LayerNorm(d_in), Dense(d_in, d_hidden, rngs=rngs), _Silu(), _Dropout(dropout)]
  return nnx.List([*layers, Dense(d_hidden, d_out, rngs=rngs)])


def _apply_block(block: nnx.List, x: jax.Array, keep: jax.Array | None) -> jax.Array:
  norm, widen, silu, dropout, narrow = block
  return narrow(dropout(silu(widen(norm(x))), keep))


class _Composer(nnx.Module):
  """A block under the name `net`: nodes of one sample, concatenated, to one node of width `d_node`."""

  def __init__(self, num_nodes: int, d_node: int, dropout: float, rngs: nnx.Rngs):
    self.net = _block(num_nodes * d_node, 2 * d_node, d_node, dropout, rngs)

  def __call__(self, nodes: list[jax.Array], keep: jax.Array | None) -> jax.Array:
    return _apply_block(self.net, jnp.concatenate(nodes, axis=-1), keep)


class HCN(nnx.Module):
  """HCN v1. Members and batch layout: `conditioning.interface`."""

  num_tokens = 1

  def __init__(self, config: HCNConfig, schema: Schema, *, rngs: nnx.Rngs):
    self.config = config
    self.schema = schema.subset(config.attributes or schema.names)
    names = self.schema.names
    self.pairs = tuple(itertools.combinations(names, 2))
    if len({self._pair_name(pair) for pair in self.pairs}) != len(self.pairs):
      raise InputError(f"conditioner: attribute names {list(names)} give two pairs the same name; rename one")
    d_node = config.d_node
    for attribute in self.schema:
      embedding = Embed(attribute.num_levels, d_node, rngs=rngs)
      setattr(self, f"emb_{attribute.name}", embedding)
      if config.learned_nulls:
        setattr(self, f"null_{attribute.name}", nnx.Param(_NULL_STD * jax.random.normal(rngs.params(), [d_node])))
    for pair in self.pairs:
      setattr(self, self._pair_name(pair), _Composer(2, d_node, config.dropout, rngs))
    if len(self.pairs) > 1:
      self.compose_all = _Composer(len(self.pairs), d_node, config.dropout, rngs)
    if config.use_uncertainty:
      self.mu_head = Dense(d_node, d_node, rngs=rngs)
      self.logsigma_head = Dense(d_node, d_node, rngs=rngs)
      for head, bias in ((self.mu_head, 0.0), (self.logsigma_head, _LOG_SIGMA_START)):
        head.kernel = nnx.Param(_LATENT_HEAD_STD * jax.random.normal(rngs.params(), [d_node, d_node]))
        head.bias = nnx.Param(jnp.full([d_node], bias, jnp.float32))
    self.proj_ctx = nnx.List([LayerNorm(d_node), Dense(d_node, config.d_ctx, rngs=rngs)])
    if config.aux_hidden_dim:
      for attribute in self.schema:
        head = _block(config.d_ctx, config.aux_hidden_dim, attribute.num_levels, config.dropout, rngs)
        setattr(self, f"{attribute.name}_classifier", head)

  @staticmethod
  def _pair_name(pair: tuple[str, str]) -> str:
    return f"compose_{pair[0]}_{pair[1]}"

  def _embed(self, name: str, levels: jax.Array) -> jax.Array:
    embedding = getattr(self, f"emb_{name}")(jnp.maximum(levels, 0))
    if not self.config.learned_nulls:
      return embedding
    return jnp.where((levels >= 0)[:, None], embedding, getattr(self, f"null_{name}")[...])

  def _draw(self, keys: jax.Array | None) -> tuple[dict[str, jax.Array | None], jax.Array | None]:
    """Dropout masks bool [B, width] by block, and the latent's noise [B, d]; all None in evaluation.

    All masks of a sample are cut from one draw, which makes a smaller program than a draw for each block.
    """
    widths = {name: 2 * self.config.d_node for name in (*map(self._pair_name, self.pairs), "compose_all")}
    widths |= {f"{name}_classifier": self.config.aux_hidden_dim for name in self.schema.names}
    masks = dict.fromkeys(widths)
    if keys is None:
      return masks, None
    mask_keys, noise_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    if self.config.dropout > 0:
      total = sum(widths.values())
      keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.config.dropout, [total]))(mask_keys)
      cuts = list(itertools.accumulate(widths.values()))[:-1]
      masks = dict(zip(widths, jnp.split(keep, cuts, axis=1)))
    return masks, jax.vmap(lambda key: jax.random.normal(key, [self.config.d_node]))(noise_keys)

  def _compose(self, embeddings: dict[str, jax.Array], masks: dict[str, jax.Array | None]) -> jax.Array:
    """Embeddings [B, d] to h [B, d]. A single attribute is its own node."""
    if not self.pairs:
      return next(iter(embeddings.values()))
    nodes = []
    for pair in self.pairs:
      name = self._pair_name(pair)
      nodes.append(getattr(self, name)([embeddings[part] for part in pair], masks[name]))
    return nodes[0] if len(nodes) == 1 else self.compose_all(nodes, masks["compose_all"])

  def _latent(self, h: jax.Array, noise: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """z, mu, log_sigma, all [B, d]; z = mu in evaluation."""
    if not self.config.use_uncertainty:
      return h, h, jnp.zeros_like(h)
    mu, log_sigma = self.mu_head(h), jnp.clip(self.logsigma_head(h), *_LOG_SIGMA_RANGE)
    return mu if noise is None else mu + jnp.exp(log_sigma) * noise, mu, log_sigma

  def __call__(self, attributes: Attributes, *, keys: jax.Array | None = None) -> ConditionerOutput:
    """Attributes {name: [B]} to a token [B, 1, d_ctx] and what the losses need.

    Continuous attributes enter as the index of their bin. The auxiliary heads read the finished token.
    """
    levels = {attribute.name: level_indices(attribute, attributes[attribute.name]) for attribute in self.schema}
    embeddings = {name: self._embed(name, level) for name, level in levels.items()}
    masks, noise = self._draw(keys)
    h = self._compose(embeddings, masks)
    z, mu, log_sigma = self._latent(h, noise)
    norm, project = self.proj_ctx
    token = project(norm(z))
    conditioned = jnp.ones(token.shape[:1], bool)
    if not self.config.learned_nulls:
      conditioned = jnp.all(jnp.stack([level >= 0 for level in levels.values()]), axis=0)
      token = jnp.where(conditioned[:, None], token, 0)
    logits, targets = {}, {}
    if self.config.aux_hidden_dim:
      for name, level in levels.items():
        head = f"{name}_classifier"
        logits[name] = _apply_block(getattr(self, head), token, masks[head])
        targets[name] = jnp.where(conditioned, level, -1)
    return ConditionerOutput(
      tokens=token[:, None],
      mu=mu,
      log_sigma=log_sigma,
      h=h,
      parts=sum(embeddings.values()),
      logits=logits,
      targets=targets,
      conditioned=conditioned,
    )

  def unconditional_tokens(self, batch: int) -> jax.Array:
    """[batch, 1, d_ctx]: the learned nulls through the network, or zeros where there are none."""
    unknown = {name: jnp.asarray(values) for name, values in self.schema.unknown(batch).items()}
    return self(unknown).tokens
