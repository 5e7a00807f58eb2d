"""A pre-norm transformer encoder over a few nodes, as `torch.nn.TransformerEncoder` with `norm_first` computes it."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from compdiff_jax.conditioning.blocks import Dropout
from compdiff_jax.models.layers import ACTIVATIONS, Dense, LayerNorm


class _SelfAttention(nnx.Module):
  """Multi-head self-attention with torch's stacked projection; heads are contiguous slices of the width."""

  def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
    self.heads = heads
    bound = math.sqrt(6 / (width + 3 * width))  # Glorot & Bengio 2010, over the stacked matrix as in torch
    kernel = jax.random.uniform(rngs.params(), [width, 3 * width], jnp.float32, -bound, bound)
    self.in_proj_kernel = nnx.Param(kernel)
    self.in_proj_bias = nnx.Param(jnp.zeros([3 * width]))
    self.out_proj = Dense(width, width, rngs=rngs)
    self.out_proj.bias = nnx.Param(jnp.zeros([width]))

  def __call__(self, x: jax.Array, drop) -> jax.Array:
    batch, length, width = x.shape
    stacked = x @ self.in_proj_kernel[...] + self.in_proj_bias[...]
    q, k, v = jnp.moveaxis(stacked.reshape(batch, length, 3, self.heads, width // self.heads), 2, 0)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(width // self.heads)
    attended = jnp.einsum("bhqk,bkhd->bqhd", drop(jax.nn.softmax(scores, axis=-1)), v)
    return self.out_proj(attended.reshape(batch, length, width))


class _EncoderLayer(nnx.Module):
  """x + attention(norm1(x)), then x + feed-forward(norm2(x)); four dropouts."""

  def __init__(self, width: int, heads: int, dropout: float, rngs: nnx.Rngs):
    self.norm1 = LayerNorm(width)
    self.self_attn = _SelfAttention(width, heads, rngs)
    self.norm2 = LayerNorm(width)
    self.linear1 = Dense(width, 2 * width, rngs=rngs)
    self.linear2 = Dense(2 * width, width, rngs=rngs)
    self.dropout = Dropout(dropout)

  @staticmethod
  def mask_shapes(length: int, width: int, heads: int) -> dict[str, tuple[int, ...]]:
    return {
      "attention": (heads, length, length),
      "attention_residual": (length, width),
      "hidden": (length, 2 * width),
      "residual": (length, width),
    }

  def __call__(self, x: jax.Array, masks: Mapping[str, jax.Array | None]) -> jax.Array:
    drop = self.dropout
    attended = self.self_attn(self.norm1(x), lambda weights: drop(weights, masks["attention"]))
    x = x + drop(attended, masks["attention_residual"])
    hidden = drop(ACTIVATIONS["gelu"](self.linear1(self.norm2(x))), masks["hidden"])
    return x + drop(self.linear2(hidden), masks["residual"])


class TransformerEncoder(nnx.Module):
  """Layers without a final norm, [B, L, width] -> [B, L, width]. The feed-forward part is twice as wide inside."""

  def __init__(self, width: int, num_layers: int, heads: int, dropout: float, rngs: nnx.Rngs):
    self.layers = nnx.List([_EncoderLayer(width, heads, dropout, rngs) for _ in range(num_layers)])

  @staticmethod
  def mask_shapes(length: int, width: int, num_layers: int, heads: int) -> dict[str, tuple[int, ...]]:
    """Shape of every dropout mask for one sample, by "layer.place"."""
    layer = _EncoderLayer.mask_shapes(length, width, heads)
    return {f"{i}.{place}": shape for i in range(num_layers) for place, shape in layer.items()}

  def __call__(self, x: jax.Array, masks: Mapping[str, jax.Array | None]) -> jax.Array:
    for i, layer in enumerate(self.layers):
      own = {name.removeprefix(f"{i}."): mask for name, mask in masks.items() if name.startswith(f"{i}.")}
      x = layer(x, own)
    return x
