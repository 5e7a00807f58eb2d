"""The layers every network here is made of: torch's arithmetic and default initialisation, in NHWC.

Flax's own layers differ where it matters: norm epsilon 1e-6 (torch 1e-5), variance as E[x^2] - E[x]^2 (which cancels),
LeCun-normal kernels with zero bias. These hold float32 parameters and compute in `dtype`; norm statistics are float32.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from compdiff_jax.cli import InputError
from compdiff_jax.models.convolution import convolution
from compdiff_jax.models.product import product


def gelu(x: jax.Array) -> jax.Array:
  """x Phi(x), exactly and not by the tanh approximation (Hendrycks & Gimpel 2016).

  In float32 it is torch's formula: on a CPU erf takes a third of the time of erfc. In lower precision 1 + erf would
  cancel, and erfc does not.
  """
  if x.dtype == jnp.float32:
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))
  return jax.nn.gelu(x, approximate=False)


# By their names in the config files of diffusers and transformers.
ACTIVATIONS = {
  "gelu": gelu,
  "mish": jax.nn.mish,
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
  "swish": jax.nn.silu,
}


def torch_uniform(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> nnx.Param:
  """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what torch.nn.Linear and Conv2d draw for both weight and bias."""
  bound = 1 / math.sqrt(fan_in)
  # Drawn flat: XLA compiles the generator of a four-dimensional array five times as long on a CPU.
  draws = jax.random.uniform(rngs.params(), (math.prod(shape),), jnp.float32, -bound, bound)
  return nnx.Param(draws.reshape(shape))


class Dense(nnx.Module):
  """Linear map of the last axis, [..., in] -> [..., out]."""

  def __init__(self, in_features: int, out_features: int, *, use_bias: bool = True, dtype=jnp.float32, rngs: nnx.Rngs):
    self.dtype = dtype
    self.kernel = torch_uniform(rngs, (in_features, out_features), in_features)
    self.bias = torch_uniform(rngs, (out_features,), in_features) if use_bias else None

  def __call__(self, x: jax.Array, columns: slice = slice(None)) -> jax.Array:
    """All output features, or those of `columns` alone."""
    kernel = self.kernel[:, columns].astype(self.dtype)
    y = product(x.astype(self.dtype), kernel)
    return y if self.bias is None else y + self.bias[columns].astype(self.dtype)


class Conv(nnx.Module):
  """2D convolution, [B, h, w, in] -> [B, h', w', out], with explicit padding.

  `padding` is ((top, bottom), (left, right)), or one number for all four sides. Flax's "SAME" would put the padding
  of a strided convolution elsewhere than torch does.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    kernel_size: int = 3,
    strides: int = 1,
    padding: int | tuple[tuple[int, int], tuple[int, int]] = 1,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.dtype = dtype
    self.strides = (strides, strides)
    self.padding = ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding
    fan_in = in_features * kernel_size**2
    self.kernel = torch_uniform(rngs, (kernel_size, kernel_size, in_features, out_features), fan_in)
    self.bias = torch_uniform(rngs, (out_features,), fan_in)

  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.kernel[...].astype(self.dtype)
    y = convolution(x.astype(self.dtype), kernel, self.strides, self.padding)
    return y + self.bias[...].astype(self.dtype)


class GroupNorm(nnx.Module):
  """Group normalisation over space and the channels of each group (Wu & He 2018), [B, h, w, C] -> [B, h, w, C]."""

  def __init__(self, groups: int, channels: int, *, eps: float, dtype=jnp.float32):
    if channels % groups:
      raise InputError(f"field norm_num_groups is {groups}, which does not divide a layer of {channels} channels")
    self.groups = groups
    self.eps = eps
    self.dtype = dtype
    self.scale = nnx.Param(jnp.ones(channels))
    self.bias = nnx.Param(jnp.zeros(channels))

  def __call__(self, x: jax.Array) -> jax.Array:
    # Space is reduced channel by channel before channels are grouped: the channel axis stays whole and innermost, which
    # vectorises on every backend (a [.., groups, channels / groups] view leaves an axis of 2 to 4 on small networks).
    x = x.astype(jnp.float32)
    centred = x - self._group_mean(x)
    inverse = lax.rsqrt(self._group_mean(jnp.square(centred)) + self.eps)
    return (centred * (inverse * self.scale[...]) + self.bias[...]).astype(self.dtype)

  def _group_mean(self, x: jax.Array) -> jax.Array:
    """Mean over space and the channels of a group, [B, h, w, C] -> [B, 1, 1, C]."""
    batch, _, _, channels = x.shape
    means = x.mean((1, 2)).reshape(batch, self.groups, channels // self.groups).mean(-1)
    return jnp.repeat(means, channels // self.groups, axis=-1)[:, None, None, :]


class LayerNorm(nnx.Module):
  """Layer normalisation of the last axis with torch's default epsilon."""

  def __init__(self, features: int, *, eps: float = 1e-5, dtype=jnp.float32):
    self.eps = eps
    self.dtype = dtype
    self.scale = nnx.Param(jnp.ones(features))
    self.bias = nnx.Param(jnp.zeros(features))

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    # The variance is taken from the centred values, so that nothing cancels.
    centred = x - x.mean(-1, keepdims=True)
    normal = centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
    return (normal * self.scale[...] + self.bias[...]).astype(self.dtype)


class Embed(nnx.Module):
  """Lookup table, integers [...] -> [..., features]; drawn from N(0, std^2), by default as CLIP's embeddings are."""

  def __init__(self, num_embeddings: int, features: int, *, std: float = 0.02, dtype=jnp.float32, rngs: nnx.Rngs):
    self.dtype = dtype
    self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (num_embeddings, features)))

  def __call__(self, indices: jax.Array) -> jax.Array:
    return self.embedding[...][indices].astype(self.dtype)
