"""Composers: the embeddings of a sample's attributes to one node of the whole, and to a context node each.

A composer's parameters lie directly on the conditioner that owns it (`host`), because the reference's state_dict keys
have no prefix for them. So a composer is not a module but three functions: `add` creates the parameters, `mask_shapes`
names the dropout masks, and `compose` does the work.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from compdiff_jax.conditioning import blocks
from compdiff_jax.conditioning.transformer import TransformerEncoder

Embeddings = Mapping[str, jax.Array]
Masks = Mapping[str, jax.Array | None]


class Composed(NamedTuple):
  """What a composer makes of the embeddings.

  Attributes:
    h: [B, d], the node of the whole.
    contexts: {name: [B, d]}, each attribute in the light of the others; empty where one token is all that is wanted.
    registers: [B, R, d] or None.
  """

  h: jax.Array
  contexts: dict[str, jax.Array]
  registers: jax.Array | None


class Composer(NamedTuple):
  """The three functions; `config` is a `typed.TypedConfig`, also found at `host.config`.

  Attributes:
    add: (host, names, config, rngs) creates the parameters on `host`.
    mask_shapes: (names, config) -> {mask: shape for one sample}.
    compose: (host, embeddings, masks) -> Composed.
  """

  add: Callable[[Any, Sequence[str], Any, nnx.Rngs], None]
  mask_shapes: Callable[[Sequence[str], Any], dict[str, tuple[int, ...]]]
  compose: Callable[[Any, Embeddings, Masks], Composed]


# ---- All pairs, then the whole: HCN v1, and the hierarchical composer


def add_pairs(host: Any, names: Sequence[str], d_node: int, dropout: float, rngs: nnx.Rngs) -> None:
  named = blocks.pairs("compose", names)
  for name in named:
    setattr(host, name, blocks.ConcatMLP(2 * d_node, 2 * d_node, d_node, dropout, rngs))
  if len(named) > 1:
    host.compose_all = blocks.ConcatMLP(len(named) * d_node, 2 * d_node, d_node, dropout, rngs)


def pair_masks(names: Sequence[str], d_node: int) -> dict[str, tuple[int, ...]]:
  return dict.fromkeys((*blocks.pairs("compose", names), "compose_all"), (2 * d_node,))


def compose_pairs(host: Any, embeddings: Embeddings, masks: Masks) -> jax.Array:
  """Embeddings [B, d] to h [B, d]. A single attribute is its own node, a single pair the whole."""
  named = blocks.pairs("compose", tuple(embeddings))
  if not named:
    return next(iter(embeddings.values()))
  nodes = [getattr(host, name)([embeddings[part] for part in pair], masks[name]) for name, pair in named.items()]
  return nodes[0] if len(nodes) == 1 else host.compose_all(nodes, masks["compose_all"])


def _add_hierarchical(host, names, config, rngs):
  add_pairs(host, names, config.d_node, config.dropout, rngs)
  if config.multi_token:
    for name in names:
      width = 2 * config.d_node
      setattr(host, f"ctx_{name}", blocks.ConcatMLP(width, width, config.d_node, config.dropout, rngs))
  _add_registers(host, config, rngs)


def _hierarchical_masks(names, config):
  contexts = dict.fromkeys((f"ctx_{name}" for name in names), (2 * config.d_node,))
  return pair_masks(names, config.d_node) | (contexts if config.multi_token else {})


def _hierarchical(host, embeddings, masks):
  """Pairs, then the whole; then each attribute once more together with the whole."""
  h = compose_pairs(host, embeddings, masks)
  contexts = {}
  if host.config.multi_token:
    contexts = {name: getattr(host, f"ctx_{name}")([e, h], masks[f"ctx_{name}"]) for name, e in embeddings.items()}
  return Composed(h, contexts, _constant_registers(host, len(h)))


# ---- One wide network over all attributes at once: the control for the hierarchy, of about the same size


def _add_flat(host, names, config, rngs):
  width, hidden, rest = len(names) * config.d_node, config.flat_hidden, (config.dropout, rngs)
  host.flat_stage1 = blocks.ConcatMLP(width, hidden, width, *rest)
  host.flat_stage2 = blocks.ConcatMLP(width, hidden, config.d_node, *rest)
  if config.multi_token:
    host.flat_stage3 = blocks.ConcatMLP(width + config.d_node, hidden, width, *rest)
  _add_registers(host, config, rngs)


def _flat_masks(names, config):
  stages = ("flat_stage1", "flat_stage2", *(["flat_stage3"] if config.multi_token else []))
  return dict.fromkeys(stages, (config.flat_hidden,))


def _flat(host, embeddings, masks):
  x = list(embeddings.values())
  h = host.flat_stage2([host.flat_stage1(x, masks["flat_stage1"])], masks["flat_stage2"])
  contexts = {}
  if host.config.multi_token:
    stacked = host.flat_stage3([*x, h], masks["flat_stage3"])
    contexts = dict(zip(embeddings, jnp.split(stacked, len(x), axis=-1)))
  return Composed(h, contexts, _constant_registers(host, len(h)))


# ---- A small transformer over the attributes, a class token for the whole, and registers


def _add_transformer(host, names, config, rngs):
  host.cls_token = blocks.learned_vectors(rngs, config.d_node)
  host.type_emb = blocks.learned_vectors(rngs, len(names) + 1 + config.num_registers, config.d_node)
  _add_registers(host, config, rngs)
  host.composer = TransformerEncoder(
    config.d_node, config.transformer_layers, config.transformer_heads, config.dropout, rngs
  )


def _transformer_masks(names, config):
  length = len(names) + 1 + config.num_registers
  return TransformerEncoder.mask_shapes(length, config.d_node, config.transformer_layers, config.transformer_heads)


def _transformer(host, embeddings, masks):
  sequence = jnp.stack(list(embeddings.values()), axis=1)
  shared = [host.cls_token[...][None], *([host.register_tokens[...]] if host.config.num_registers else [])]
  shared = jnp.concatenate(shared)
  sequence = jnp.concatenate([sequence, jnp.broadcast_to(shared, (len(sequence), *shared.shape))], axis=1)
  out = host.composer(sequence + host.type_emb[...], masks)
  count = len(embeddings)
  contexts = {name: out[:, i] for i, name in enumerate(embeddings)} if host.config.multi_token else {}
  return Composed(out[:, count], contexts, out[:, count + 1 :] if host.config.num_registers else None)


def _add_registers(host, config, rngs):
  if config.num_registers:
    host.register_tokens = blocks.learned_vectors(rngs, config.num_registers, config.d_node)


def _constant_registers(host, batch):
  """Outside the transformer nothing attends to anything: the registers are learned nodes that all samples share."""
  if not host.config.num_registers:
    return None
  return jnp.broadcast_to(host.register_tokens[...], (batch, *host.register_tokens[...].shape))


COMPOSERS = {
  "hierarchical": Composer(_add_hierarchical, _hierarchical_masks, _hierarchical),
  "flat": Composer(_add_flat, _flat_masks, _flat),
  "transformer": Composer(_add_transformer, _transformer_masks, _transformer),
}
