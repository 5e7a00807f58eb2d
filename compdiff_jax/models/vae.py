"""The autoencoder of Stable Diffusion (diffusers `AutoencoderKL`): images to Gaussian latents and back."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from compdiff_jax.cli import InputError
from compdiff_jax.models import config as configs
from compdiff_jax.models.attention import Attention
from compdiff_jax.models.layers import ACTIVATIONS, Conv, GroupNorm
from compdiff_jax.models.unet_blocks import DownBlock2D, Downsample2D, ResnetBlock2D, Upsample2D

# Every norm of the autoencoder has this epsilon, and none of it can be configured.
_EPS = 1e-6

_FIXED = {
  "latents_mean": None,
  "latents_std": None,
  "shift_factor": None,
  "use_post_quant_conv": True,
  "use_quant_conv": True,
}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """The fields of a diffusers AutoencoderKL config.json that may vary here; names and defaults are diffusers'.

  Attributes:
    act_fn: the activation of the residual blocks; the last one of encoder and decoder is always SiLU.
    scaling_factor: the UNet sees latents times this factor; `encode` and `decode` leave it to the caller.
    sample_size: image height and width of training; kept for torch.
    force_upcast: whether values may overflow float16, in which nothing computes here; kept for torch.
  """

  in_channels: int = 3
  out_channels: int = 3
  down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
  up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
  block_out_channels: tuple[int, ...] = (64,)
  layers_per_block: int = 1
  act_fn: str = "silu"
  latent_channels: int = 4
  norm_num_groups: int = 32
  sample_size: int | tuple[int, ...] = 32
  scaling_factor: float = 0.18215
  force_upcast: bool = True
  mid_block_add_attention: bool = True

  def __post_init__(self):
    levels = len(self.block_out_channels)
    for field, known in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
      types = getattr(self, field)
      unknown = [block for block in types if block != known]
      if unknown:
        raise InputError(f"field {field} has {unknown[0]!r}; supported: {known}")
      if len(types) != levels:
        raise InputError(f"field {field} has {len(types)} entries for {levels} block_out_channels")
    if self.act_fn not in ACTIVATIONS:
      raise InputError(f"field act_fn is {self.act_fn!r}; supported: {', '.join(ACTIVATIONS)}")
    sizes = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "latent_channels")
    configs.check_positive(self, *sizes, "norm_num_groups", "scaling_factor")

  @property
  def downsampling(self) -> int:
    """Image pixels per latent pixel, along each side."""
    return 2 ** (len(self.block_out_channels) - 1)

  def latent_side(self, image_size: int) -> int:
    """Side of the latents of square images; an `InputError` where they do not come out even."""
    if image_size % self.downsampling:
      raise InputError(f"data.image_size {image_size} must be a multiple of {self.downsampling}")
    return image_size // self.downsampling

  @classmethod
  def from_dict(cls, values: Mapping[str, Any], source: str = "vae/config.json") -> "VAEConfig":
    """From a diffusers config.json; an unknown or unsupported field is an `InputError` that names it."""
    return configs.parse(cls, values, source=source, fixed=_FIXED)

  def to_dict(self) -> dict[str, Any]:
    return configs.to_json(self)


class SpatialAttention(Attention):
  """Single-head self-attention over the pixels of [B, h, w, C], with its own group norm, added to the input."""

  def __init__(self, channels: int, *, groups: int, dtype=jnp.float32, rngs: nnx.Rngs):
    super().__init__(channels, channels, heads=1, use_bias=True, dtype=dtype, rngs=rngs)
    self.group_norm = GroupNorm(groups, channels, eps=_EPS, dtype=dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    tokens = self.group_norm(x).reshape(batch, height * width, channels)
    return x + super().__call__(tokens).reshape(x.shape)


class MidBlock2D(nnx.Module):
  """Residual block, optional attention, residual block at the lowest resolution (diffusers `UNetMidBlock2D`)."""

  def __init__(
    self, channels: int, *, resnet: Callable[..., ResnetBlock2D], attention: Callable[..., SpatialAttention] | None
  ):
    self.attentions = nnx.List([attention(channels)] if attention else [])
    self.resnets = nnx.List([resnet(channels, channels) for _ in range(2)])

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.resnets[0](x)
    for attention in self.attentions:
      x = attention(x)
    return self.resnets[1](x)


class UpDecoderBlock2D(nnx.Module):
  """Residual blocks, then an upsampling."""

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    *,
    num_layers: int,
    resnet: Callable[..., ResnetBlock2D],
    upsample: Callable[..., Upsample2D] | None,
  ):
    inputs = [in_channels] + [out_channels] * (num_layers - 1)
    self.resnets = nnx.List([resnet(channels, out_channels) for channels in inputs])
    self.upsamplers = nnx.List([upsample(out_channels)] if upsample else [])

  def __call__(self, x: jax.Array) -> jax.Array:
    for layer in (*self.resnets, *self.upsamplers):
      x = layer(x)
    return x


class Encoder(nnx.Module):
  """Images [B, H, W, 3] -> features [B, h, w, 2 * latent_channels]."""

  def __init__(self, config: VAEConfig, dtype, rngs: nnx.Rngs):
    channels = config.block_out_channels
    resnet, attention, typed = _constructors(config, dtype, rngs)
    downsample = functools.partial(Downsample2D, padding=0, **typed)
    self.conv_in = Conv(config.in_channels, channels[0], **typed)
    self.down_blocks = nnx.List(
      [
        DownBlock2D(
          width,
          channels[level],
          num_layers=config.layers_per_block,
          resnet=resnet,
          downsample=downsample if level < len(channels) - 1 else None,
        )
        for level, width in enumerate((channels[0], *channels[:-1]))
      ]
    )
    self.mid_block = MidBlock2D(channels[-1], resnet=resnet, attention=attention)
    self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], eps=_EPS, dtype=dtype)
    self.conv_out = Conv(channels[-1], 2 * config.latent_channels, **typed)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.conv_in(x)
    for block in self.down_blocks:
      x, _ = block(x)
    x = self.mid_block(x)
    return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
  """Latents [B, h, w, latent_channels] -> images [B, H, W, 3]."""

  def __init__(self, config: VAEConfig, dtype, rngs: nnx.Rngs):
    channels = config.block_out_channels[::-1]
    resnet, attention, typed = _constructors(config, dtype, rngs)
    upsample = functools.partial(Upsample2D, **typed)
    self.conv_in = Conv(config.latent_channels, channels[0], **typed)
    self.mid_block = MidBlock2D(channels[0], resnet=resnet, attention=attention)
    self.up_blocks = nnx.List(
      [
        UpDecoderBlock2D(
          width,
          channels[level],
          num_layers=config.layers_per_block + 1,
          resnet=resnet,
          upsample=upsample if level < len(channels) - 1 else None,
        )
        for level, width in enumerate((channels[0], *channels[:-1]))
      ]
    )
    self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], eps=_EPS, dtype=dtype)
    self.conv_out = Conv(channels[-1], config.out_channels, **typed)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.mid_block(self.conv_in(x))
    for block in self.up_blocks:
      x = block(x)
    return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
  """Variational autoencoder with a diagonal Gaussian posterior over a small latent image."""

  def __init__(self, config: VAEConfig, dtype=jnp.float32, *, rngs: nnx.Rngs):
    latents = config.latent_channels
    self.encoder = Encoder(config, dtype, rngs)
    self.decoder = Decoder(config, dtype, rngs)
    self.quant_conv = Conv(2 * latents, 2 * latents, kernel_size=1, padding=0, dtype=dtype, rngs=rngs)
    self.post_quant_conv = Conv(latents, latents, kernel_size=1, padding=0, dtype=dtype, rngs=rngs)

  def encode(self, images: jax.Array) -> jax.Array:
    """Moments of the posterior.

    Args:
      images: [B, H, W, in_channels] in [-1, 1].

    Returns:
      float32 [B, h, w, 2 * latent_channels]: means, then log variances within [-30, 20]; not scaled.
    """
    mean, logvar = jnp.split(self.quant_conv(self.encoder(images)).astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([mean, jnp.clip(logvar, -30, 20)], axis=-1)

  def decode(self, latents: jax.Array) -> jax.Array:
    """Images [B, H, W, out_channels], about [-1, 1], from unscaled latents [B, h, w, latent_channels].

    The caller has divided the UNet's latents by `scaling_factor`.
    """
    return self.decoder(self.post_quant_conv(latents))

  def __call__(self, images: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Reconstructions from posterior samples, and the moments.

    Args:
      images: [B, H, W, in_channels] in [-1, 1].
      noise: standard normal, [B, h, w, latent_channels]; zeros reconstruct from the mean.

    Returns:
      (images [B, H, W, out_channels], moments [B, h, w, 2 * latent_channels]).
    """
    moments = self.encode(images)
    return self.decode(sample_posterior(moments, noise)), moments


def sample_posterior(moments: jax.Array, noise: jax.Array) -> jax.Array:
  """mean + exp(logvar / 2) * noise: [B, h, w, 2c] and [B, h, w, c] -> latents [B, h, w, c], not scaled."""
  mean, logvar = jnp.split(moments, 2, axis=-1)
  return mean + jnp.exp(0.5 * logvar) * noise


def normalize_pixels(images: jax.Array) -> jax.Array:
  """Grey levels 0 to 255, of any type, -> float32 in [-1, 1] (diffusers `VaeImageProcessor.normalize`)."""
  return images.astype(jnp.float32) / 127.5 - 1.0


def denormalize_pixels(images: jax.Array) -> jax.Array:
  """Images, about [-1, 1], -> grey levels uint8, rounded (diffusers `VaeImageProcessor.postprocess`)."""
  return jnp.round(jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0) * 255).astype(jnp.uint8)


def _constructors(config: VAEConfig, dtype, rngs: nnx.Rngs):
  """What the encoder and the decoder build alike: `resnet`, `attention` (or None) and the common arguments."""
  typed = {"dtype": dtype, "rngs": rngs}
  activation = ACTIVATIONS[config.act_fn]
  resnet = functools.partial(ResnetBlock2D, groups=config.norm_num_groups, eps=_EPS, activation=activation, **typed)
  attention = functools.partial(SpatialAttention, groups=config.norm_num_groups, **typed)
  return resnet, attention if config.mid_block_add_attention else None, typed
