"""The pieces that conditioners are built from, and how training draws what is random in them.

Parameter paths are the reference's state_dict keys. Its blocks are `Sequential`s whose keys count activations and
dropout too, which is why those are modules here: a block has parameters at 0, 1 and 4.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.interface import level_indices
from compdiff_jax.conditioning.schema import STATES, UNKNOWN_INDEX, Attribute, Schema
from compdiff_jax.models.layers import Dense, Embed, LayerNorm
from compdiff_jax.models.unet import timestep_embedding

_NULL_STD = 0.02  # as the embeddings
_LATENT_HEAD_STD = 0.01
_LOG_SIGMA_START = -1.0
_LOG_SIGMA_RANGE = (-5.0, 1.0)


class Silu(nnx.Module):
  """An activation that takes up a position in a sequence of layers."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return jax.nn.silu(x)


class Dropout(nnx.Module):
  """Dropout that takes up a position. Its mask, drawn from the samples' keys, is handed in; None means evaluation."""

  def __init__(self, rate: float):
    self.rate = rate

  def __call__(self, x: jax.Array, keep: jax.Array | None) -> jax.Array:
    return x if keep is None else jnp.where(keep, x / (1 - self.rate), 0)


def block(d_in: int, d_hidden: int, d_out: int, dropout: float, rngs: nnx.Rngs) -> nnx.List:
  """LayerNorm, Linear, SiLU, dropout, Linear; no residual."""
  layers = [LayerNorm(d_in), Dense(d_in, d_hidden, rngs=rngs), Silu(), Dropout(dropout)]
  return nnx.List([*layers, Dense(d_hidden, d_out, rngs=rngs)])


def apply_block(layers: nnx.List, x: jax.Array, keep: jax.Array | None) -> jax.Array:
  """[B, d_in] -> [B, d_out]; `keep` bool [B, d_hidden] is the dropout mask."""
  norm, widen, silu, dropout, narrow = layers
  return narrow(dropout(silu(widen(norm(x))), keep))


class ConcatMLP(nnx.Module):
  """A block under the name `net`, over the concatenation of some nodes of each sample."""

  def __init__(self, d_in: int, d_hidden: int, d_out: int, dropout: float, rngs: nnx.Rngs):
    self.net = block(d_in, d_hidden, d_out, dropout, rngs)

  def __call__(self, nodes: Sequence[jax.Array], keep: jax.Array | None) -> jax.Array:
    return apply_block(self.net, jnp.concatenate(nodes, axis=-1), keep)


def projection(d_in: int, d_out: int, rngs: nnx.Rngs) -> nnx.List:
  """LayerNorm and Linear: a node to a token."""
  return nnx.List([LayerNorm(d_in), Dense(d_in, d_out, rngs=rngs)])


def apply_projection(layers: nnx.List, x: jax.Array) -> jax.Array:
  norm, project = layers
  return project(norm(x))


def learned_vectors(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
  """N(0, 0.02^2): a null, or any other vector that is learned like an embedding."""
  return nnx.Param(_NULL_STD * jax.random.normal(rngs.params(), shape))


def num_rows(attribute: Attribute) -> int:
  """Rows of an attribute's table: one a level, or one for each state of each label."""
  return len(STATES) * len(attribute.values) if attribute.kind == "multilabel" else attribute.num_levels


def table_rows(attribute: Attribute, values: jax.Array) -> jax.Array:
  """The rows that make up each value, int32 [B, k]; -1 where unknown. One for a level, one for each label otherwise."""
  if attribute.kind != "multilabel":
    return level_indices(attribute, values)[:, None]
  first = len(STATES) * jnp.arange(len(attribute.values), dtype=jnp.int32)
  return jnp.where(attribute.is_known(values)[:, None], first + values.astype(jnp.int32), UNKNOWN_INDEX)


def sum_rows(table: Embed, rows: jax.Array) -> jax.Array:
  """int32 [B, k] -> [B, d]: the sum of the rows over sqrt(k), which is as large as one row of a fresh table."""
  return jnp.sum(table(jnp.maximum(rows, 0)), axis=1) / math.sqrt(rows.shape[1])


def add_tables(host: Any, schema: Schema, d_node: int, nulls: bool, rngs: nnx.Rngs) -> None:
  """For each attribute a table, `emb_<name>`, and an embedding of the unknown value, `null_<name>`.

  Raises InputError for a number without bins, of which a table would say nothing.
  """
  for attribute in schema:
    if num_rows(attribute) == 1:
      raise InputError(
        f"conditioner: {attribute.name} is a number without bins, all of whose values would be alike here; give it bins"
        " in the schema, or use kind 'typed' or 'additive', which take the number itself"
      )
    setattr(host, f"emb_{attribute.name}", Embed(num_rows(attribute), d_node, rngs=rngs))
    if nulls:
      setattr(host, f"null_{attribute.name}", learned_vectors(rngs, d_node))


def embed_rows(
  host: Any, rows: Mapping[str, jax.Array], nulls: bool, cumulative: Sequence[str] = ()
) -> tuple[dict[str, jax.Array], jax.Array]:
  """Table rows {name: [B, k]} to embeddings {name: [B, d]}, and bool [B]: whether a sample can be represented.

  Without nulls that is where everything is known; elsewhere the embedding is that of some row.
  For the names in `cumulative` an embedding is the sum of all rows up to the level's own.
  """
  embeddings = {name: sum_rows(getattr(host, f"emb_{name}"), own) for name, own in rows.items()}
  for name in cumulative:
    table = jnp.cumsum(getattr(host, f"emb_{name}").embedding[...], axis=0)
    embeddings[name] = table[jnp.maximum(rows[name][:, 0], 0)]
  known = {name: own[:, 0] >= 0 for name, own in rows.items()}
  if not nulls:
    return embeddings, jnp.all(jnp.stack(list(known.values())), axis=0)
  for name, own in known.items():
    embeddings[name] = jnp.where(own[:, None], embeddings[name], getattr(host, f"null_{name}")[...])
  return embeddings, jnp.ones_like(own)


def class_targets(attribute: Attribute, values: jax.Array) -> jax.Array:
  """What a classifier of the attribute should say: the level, int32 [B], or the state of each label, [B, L]."""
  if attribute.kind != "multilabel":
    return level_indices(attribute, values)
  return values.astype(jnp.int32)


def masked_targets(schema: Schema, attributes: Mapping[str, jax.Array], conditioned: jax.Array) -> dict[str, jax.Array]:
  """`class_targets` of every attribute; -1 where `conditioned`, bool [B], says that no token was made."""
  targets = {a.name: class_targets(a, attributes[a.name]) for a in schema}
  return {
    name: jnp.where(conditioned.reshape(-1, *[1] * (own.ndim - 1)), own, UNKNOWN_INDEX) for name, own in targets.items()
  }


def class_logits(attribute: Attribute, outputs: jax.Array) -> jax.Array:
  """The outputs of a head with `num_rows` of them, [B, K] or, for labels, [B, L, number of states]."""
  if attribute.kind != "multilabel":
    return outputs
  return outputs.reshape(len(outputs), len(attribute.values), len(STATES))


def number_encoder(num_features: int, d_out: int, rngs: nnx.Rngs) -> nnx.List:
  """The encoder of a continuous attribute on top of its sinusoidal features; parameters at 0 and 2."""
  return nnx.List([Dense(num_features, d_out, rngs=rngs), Silu(), Dense(d_out, d_out, rngs=rngs)])


def encode_number(layers: nnx.List, attribute: Attribute, values: jax.Array) -> jax.Array:
  """Values in the attribute's own unit [B] -> [B, d_out]; some finite vector where unknown.

  The features are [cos(x f_k), sin(x f_k)] with f_k = 10000^(-k / K), those of the diffusion time: for years, the
  fastest turns in 6.3 years and the slowest hardly moves over a life.
  """
  widen, silu, narrow = layers
  numbers = jnp.where(attribute.is_known(values), values, attribute.low)
  return narrow(silu(widen(timestep_embedding(numbers, widen.kernel[...].shape[0]))))


def latent_heads(d_node: int, rngs: nnx.Rngs) -> tuple[Dense, Dense]:
  """The maps to the mean (starts near 0) and the log standard deviation (starts near -1) of the latent."""
  heads = Dense(d_node, d_node, rngs=rngs), Dense(d_node, d_node, rngs=rngs)
  for head, bias in zip(heads, (0.0, _LOG_SIGMA_START)):
    head.kernel = nnx.Param(_LATENT_HEAD_STD * jax.random.normal(rngs.params(), [d_node, d_node]))
    head.bias = nnx.Param(jnp.full([d_node], bias, jnp.float32))
  return heads


def latent(host: Any, h: jax.Array, noise: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
  """z, mu, log_sigma, all [B, d], from the `mu_head` and `logsigma_head` of a conditioner; z = mu in evaluation.

  Without uncertainty h is the latent itself, with log_sigma 0.
  """
  if not host.config.use_uncertainty:
    return h, h, jnp.zeros_like(h)
  mu, log_sigma = host.mu_head(h), jnp.clip(host.logsigma_head(h), *_LOG_SIGMA_RANGE)
  return mu if noise is None else mu + jnp.exp(log_sigma) * noise, mu, log_sigma


def pairs(prefix: str, names: Sequence[str]) -> dict[str, tuple[str, str]]:
  """{"prefix_a_b": ("a", "b")} of every pair of attributes. Raises InputError where two pairs have the same name."""
  combinations = list(itertools.combinations(names, 2))
  named = {f"{prefix}_{a}_{b}": (a, b) for a, b in combinations}
  if len(named) != len(combinations):
    raise InputError(f"conditioner: attribute names {list(names)} give two pairs the same name; rename one")
  return named


def joint_levels(levels: Mapping[str, jax.Array], sizes: Mapping[str, int]) -> jax.Array:
  """Index of the full cell, first attribute slowest, int32 [B]; -1 where any attribute is unknown.

  `sizes` names the attributes that count, at least one.
  """
  index = 0
  for name, size in sizes.items():
    index = index * size + levels[name]
  known = jnp.all(jnp.stack([levels[name] >= 0 for name in sizes]), axis=0)
  return jnp.where(known, index, UNKNOWN_INDEX)


def draw(
  keys: jax.Array | None, mask_shapes: Mapping[str, tuple[int, ...]], dropout: float, d_noise: int
) -> tuple[dict[str, jax.Array | None], jax.Array | None]:
  """What is random in one forward pass: dropout masks by name, and the latent's noise.

  All masks of a sample are cut from one draw, which makes a smaller program than a draw for each block.

  Args:
    keys: typed PRNG keys [B], or None in evaluation. Row i of every result depends on keys[i] alone.
    mask_shapes: shape of each mask for one sample.
    dropout: the rate; 0 draws no masks.
    d_noise: width of the noise.

  Returns:
    ({name: bool [B, *shape], True where a value is kept}, standard normal [B, d_noise]); all None in evaluation.
  """
  masks = dict.fromkeys(mask_shapes)
  if keys is None:
    return masks, None
  mask_keys, noise_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
  if dropout > 0 and mask_shapes:
    sizes = [math.prod(shape) for shape in mask_shapes.values()]
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - dropout, [sum(sizes)]))(mask_keys)
    parts = jnp.split(keep, list(itertools.accumulate(sizes))[:-1], axis=1)
    masks = {name: part.reshape(-1, *mask_shapes[name]) for name, part in zip(mask_shapes, parts)}
  return masks, jax.vmap(lambda key: jax.random.normal(key, [d_noise]))(noise_keys)
