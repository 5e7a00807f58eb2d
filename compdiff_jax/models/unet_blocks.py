"""Residual, resampling and U-shaped blocks, shared by the UNet and the autoencoder.

Blocks receive `resnet(in_channels, out_channels)` and `transformer(channels, heads=...)`: constructors in which the
model has already fixed what is the same for all blocks (norms, time embedding, context width, types).
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from compdiff_jax.models.attention import Transformer2D
from compdiff_jax.models.layers import Conv, Dense, GroupNorm


class ResnetBlock2D(nnx.Module):
  """(x + h) / output_scale, where h is two norm-activation-conv stages with the time embedding added between them.

  Counterpart of diffusers `ResnetBlock2D` with `time_embedding_norm="default"`; [B, h, w, in] -> [B, h, w, out].
  """

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    *,
    groups: int,
    eps: float,
    activation: Callable[[jax.Array], jax.Array],
    time_channels: int | None = None,
    output_scale: float = 1.0,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.activation = activation
    self.output_scale = output_scale
    self.norm1 = GroupNorm(groups, in_channels, eps=eps, dtype=dtype)
    self.conv1 = Conv(in_channels, out_channels, dtype=dtype, rngs=rngs)
    self.time_emb_proj = Dense(time_channels, out_channels, dtype=dtype, rngs=rngs) if time_channels else None
    self.norm2 = GroupNorm(groups, out_channels, eps=eps, dtype=dtype)
    self.conv2 = Conv(out_channels, out_channels, dtype=dtype, rngs=rngs)
    widen = functools.partial(Conv, in_channels, out_channels, kernel_size=1, padding=0, dtype=dtype, rngs=rngs)
    self.conv_shortcut = widen() if in_channels != out_channels else None

  def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
    """`x`: [B, h, w, in]; `time`: [B, time_channels], before its activation."""
    h = self.conv1(self.activation(self.norm1(x)))
    if self.time_emb_proj is not None:
      h = h + self.time_emb_proj(self.activation(time))[:, None, None, :]
    h = self.conv2(self.activation(self.norm2(h)))
    shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
    return (shortcut + h) / self.output_scale


# (gamma, beta) of residual blocks, [B, C] each, in the order in which they run; empty where nothing is modulated.
Film = Iterator[tuple[jax.Array, jax.Array]]
_UNMODULATED: Film = iter(())


def _modulated(h: jax.Array, film: Film) -> jax.Array:
  """gamma h + beta (FiLM, Perez et al. 2018) with the next pair, [B, h, w, C] -> [B, h, w, C]."""
  pair = next(film, None)
  if pair is None:
    return h
  gamma, beta = (vector[:, None, None, :].astype(h.dtype) for vector in pair)
  return gamma * h + beta


class Downsample2D(nnx.Module):
  """Strided 3x3 convolution that halves height and width.

  `padding` 1 pads all four sides (the UNet); 0 pads right and bottom only (the autoencoder's encoder).
  """

  def __init__(self, channels: int, *, padding: int, dtype=jnp.float32, rngs: nnx.Rngs):
    sides = ((0, 1), (0, 1)) if padding == 0 else padding
    self.conv = Conv(channels, channels, strides=2, padding=sides, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.conv(x)


class Upsample2D(nnx.Module):
  """Nearest-neighbour enlargement to `size` (twice the input unless given), then a 3x3 convolution."""

  def __init__(self, channels: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
    self.conv = Conv(channels, channels, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
    return self.conv(resize_nearest(x, size or (2 * x.shape[1], 2 * x.shape[2])))


def resize_nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """[B, h, w, C] -> [B, *size, C] with source index floor(i * h / size), as torch's mode "nearest" has it."""
  for axis, target in zip((1, 2), size):
    source = x.shape[axis]
    index = np.arange(target) * source // target
    if np.array_equal(index, np.arange(target) // 2):
      # Doubling, cropped for an odd target: a broadcast, whose gradient is a sum instead of a scatter.
      x = lax.slice_in_dim(jnp.repeat(x, 2, axis=axis), 0, target, axis=axis)
    else:
      x = jnp.take(x, index, axis=axis)
  return x


class DownBlock2D(nnx.Module):
  """Residual blocks, then a downsampling. With a `transformer` after each it is diffusers' CrossAttnDownBlock2D."""

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    *,
    num_layers: int,
    resnet: Callable[..., ResnetBlock2D],
    transformer: Callable[..., Transformer2D] | None = None,
    downsample: Callable[..., Downsample2D] | None = None,
  ):
    inputs = [in_channels] + [out_channels] * (num_layers - 1)
    self.resnets = nnx.List([resnet(channels, out_channels) for channels in inputs])
    self.attentions = nnx.List([transformer(out_channels) for _ in inputs] if transformer else [])
    self.downsamplers = nnx.List([downsample(out_channels)] if downsample else [])

  def __call__(
    self, x: jax.Array, time: jax.Array | None = None, context: jax.Array | None = None, film: Film = _UNMODULATED
  ) -> tuple[jax.Array, list[jax.Array]]:
    """Returns the output and the features after every layer, which the up path concatenates."""
    skips = []
    for i, resnet in enumerate(self.resnets):
      x = _modulated(resnet(x, time), film)
      if self.attentions:
        x = self.attentions[i](x, context)
      skips.append(x)
    for downsampler in self.downsamplers:
      x = downsampler(x)
      skips.append(x)
    return x, skips


class UpBlock2D(nnx.Module):
  """Residual blocks on [x, skip], then an upsampling. With a `transformer` it is diffusers' CrossAttnUpBlock2D.

  `skip_channels` are the widths of the skips in the order of use: the last feature of the down path comes first.
  """

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    skip_channels: Sequence[int],
    *,
    resnet: Callable[..., ResnetBlock2D],
    transformer: Callable[..., Transformer2D] | None = None,
    upsample: Callable[..., Upsample2D] | None = None,
  ):
    inputs = [in_channels] + [out_channels] * (len(skip_channels) - 1)
    self.resnets = nnx.List([resnet(channels + skip, out_channels) for channels, skip in zip(inputs, skip_channels)])
    self.attentions = nnx.List([transformer(out_channels) for _ in inputs] if transformer else [])
    self.upsamplers = nnx.List([upsample(out_channels)] if upsample else [])

  def __call__(
    self, x: jax.Array, skips: list[jax.Array], time: jax.Array, context: jax.Array, film: Film = _UNMODULATED
  ) -> jax.Array:
    """Takes its skips from the end of `skips` and enlarges to the size of the next one, which may be odd."""
    for i, resnet in enumerate(self.resnets):
      x = _modulated(resnet(jnp.concatenate([x, skips.pop()], axis=-1), time), film)
      if self.attentions:
        x = self.attentions[i](x, context)
    for upsampler in self.upsamplers:
      x = upsampler(x, skips[-1].shape[1:3])
    return x


class UNetMidBlock2DCrossAttn(nnx.Module):
  """Residual block, transformer, residual block at the lowest resolution."""

  def __init__(self, channels: int, *, resnet: Callable[..., ResnetBlock2D], transformer: Callable[..., Transformer2D]):
    self.attentions = nnx.List([transformer(channels)])
    self.resnets = nnx.List([resnet(channels, channels) for _ in range(2)])

  def __call__(self, x: jax.Array, time: jax.Array, context: jax.Array, film: Film = _UNMODULATED) -> jax.Array:
    x = self.attentions[0](_modulated(self.resnets[0](x, time), film), context)
    return _modulated(self.resnets[1](x, time), film)
