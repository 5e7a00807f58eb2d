"""The attention layer, and the transformer that lets image features attend to the context tokens."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from compdiff_jax.models.attention_backends import attention
from compdiff_jax.models.layers import Conv, Dense, GroupNorm, LayerNorm, gelu


def split_heads(x: jax.Array, heads: int) -> jax.Array:
  """[B, T, H*D] -> [B, T, H, D]."""
  return x.reshape(*x.shape[:-1], heads, -1)


def merge_heads(x: jax.Array) -> jax.Array:
  """[B, T, H, D] -> [B, T, H*D]."""
  return x.reshape(*x.shape[:-2], -1)


class Attention(nnx.Module):
  """Multi-head attention of tokens [B, T, C] to a context [B, S, K], or to themselves (diffusers `Attention`)."""

  def __init__(
    self,
    channels: int,
    context_channels: int,
    *,
    heads: int,
    use_bias: bool = False,
    backend: str = "auto",
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    dense = functools.partial(Dense, dtype=dtype, rngs=rngs)
    self.heads = heads
    self.backend = backend
    self.to_q = dense(channels, channels, use_bias=use_bias)
    self.to_k = dense(context_channels, channels, use_bias=use_bias)
    self.to_v = dense(context_channels, channels, use_bias=use_bias)
    # A list because the key is `to_out.0`: torch keeps a dropout at position 1.
    self.to_out = nnx.List([dense(channels, channels)])

  def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
    context = x if context is None else context
    query, key, value = (
      split_heads(features, self.heads) for features in (self.to_q(x), self.to_k(context), self.to_v(context))
    )
    return self.to_out[0](merge_heads(attention(query, key, value, backend=self.backend)))


class GEGLU(nnx.Module):
  """The projection of a gated linear unit (Shazeer 2020): its first half is the value, the second half the gate."""

  def __init__(self, in_features: int, out_features: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
    self.proj = Dense(in_features, 2 * out_features, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Two products with halves of the kernel. Were one product split, the backward pass would copy its gradient, the
    # largest activation of the network, to join the halves again.
    half = self.proj.kernel.shape[-1] // 2
    return self.proj(x, slice(half)), self.proj(x, slice(half, None))


class FeedForward(nnx.Module):
  """Gated linear unit with an exact GELU, of four times the width, and a projection back, [B, T, C] -> [B, T, C]."""

  def __init__(self, channels: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
    # Positions in a torch Sequential, where 1 is a dropout.
    self.net = nnx.Dict(
      {
        "0": GEGLU(channels, 4 * channels, dtype=dtype, rngs=rngs),
        "2": Dense(4 * channels, channels, dtype=dtype, rngs=rngs),
      }
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    # Value and gate are the widest activations of the network. What follows elementwise is as wide, and cheap, so the
    # backward pass computes it again: kept, it takes a sixth of a GPU's memory. A TPU's compiler keeps little of it.
    return lax.platform_dependent(*self.net["0"](x), tpu=self._down, default=jax.checkpoint(self._down))

  def _down(self, value: jax.Array, gate: jax.Array) -> jax.Array:
    return self.net["2"](value * gelu(gate))


class BasicTransformerBlock(nnx.Module):
  """Pre-norm self-attention, cross-attention to the context, feed-forward; each added to its input."""

  def __init__(
    self,
    channels: int,
    context_channels: int,
    *,
    heads: int,
    attention: str = "auto",
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    attend = functools.partial(Attention, channels, heads=heads, backend=attention, dtype=dtype, rngs=rngs)
    self.norm1 = LayerNorm(channels, dtype=dtype)
    self.attn1 = attend(channels)
    self.norm2 = LayerNorm(channels, dtype=dtype)
    self.attn2 = attend(context_channels)
    self.norm3 = LayerNorm(channels, dtype=dtype)
    self.ff = FeedForward(channels, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
    x = x + self.attn1(self.norm1(x))
    x = x + self.attn2(self.norm2(x), context)
    return x + self.ff(self.norm3(x))


class Transformer2D(nnx.Module):
  """Transformer blocks over the pixels of [B, h, w, C], added to the input (diffusers `Transformer2DModel`)."""

  def __init__(
    self,
    channels: int,
    *,
    heads: int,
    context_channels: int,
    num_layers: int,
    groups: int,
    linear_projection: bool,
    attention: str = "auto",
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    # SD 2 stores the two projections as linear layers, SD 1 as 1x1 convolutions: one map, two parameter shapes.
    project = Dense if linear_projection else functools.partial(Conv, kernel_size=1, padding=0)
    # This norm alone has epsilon 1e-6; the UNet's other group norms have 1e-5.
    self.norm = GroupNorm(groups, channels, eps=1e-6, dtype=dtype)
    self.proj_in = project(channels, channels, dtype=dtype, rngs=rngs)
    self.transformer_blocks = nnx.List(
      [
        BasicTransformerBlock(channels, context_channels, heads=heads, attention=attention, dtype=dtype, rngs=rngs)
        for _ in range(num_layers)
      ]
    )
    self.proj_out = project(channels, channels, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    tokens = self.proj_in(self.norm(x)).reshape(batch, height * width, channels)
    for block in self.transformer_blocks:
      tokens = block(tokens, context)
    return x + self.proj_out(tokens.reshape(x.shape))
