"""The conditional UNet of Stable Diffusion 1.x and 2.x (diffusers `UNet2DConditionModel`)."""

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from compdiff_jax.cli import InputError, nearest
from compdiff_jax.models import config as configs
from compdiff_jax.models.attention import Transformer2D
from compdiff_jax.models.attention_backends import BACKENDS
from compdiff_jax.models.layers import ACTIVATIONS, Conv, Dense, GroupNorm
from compdiff_jax.models.remat import rematerialized
from compdiff_jax.models.unet_blocks import (
  DownBlock2D,
  Downsample2D,
  ResnetBlock2D,
  UNetMidBlock2DCrossAttn,
  UpBlock2D,
  Upsample2D,
)

# Does a block of this type attend to the context?
_DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}

# Small parts that may compute in float32 while the rest does not; `conv_out` takes the norm before it along.
UPCAST = ("time_embedding", "conv_out")

# Options of the torch class that no Stable Diffusion 1.x or 2.x text-to-image model uses, with the value they all have.
_FIXED = {
  "addition_embed_type": None,
  "addition_embed_type_num_heads": 64,
  "addition_time_embed_dim": None,
  "attention_type": "default",
  "center_input_sample": False,
  "class_embed_type": None,
  "class_embeddings_concat": False,
  "conv_in_kernel": 3,
  "conv_out_kernel": 3,
  "cross_attention_norm": None,
  "dropout": 0.0,
  "dual_cross_attention": False,
  "encoder_hid_dim": None,
  "encoder_hid_dim_type": None,
  "mid_block_only_cross_attention": None,
  "mid_block_type": "UNetMidBlock2DCrossAttn",
  "num_attention_heads": None,
  "num_class_embeds": None,
  "only_cross_attention": False,
  "projection_class_embeddings_input_dim": None,
  "resnet_out_scale_factor": 1.0,
  "resnet_skip_time_act": False,
  "resnet_time_scale_shift": "default",
  "reverse_transformer_layers_per_block": None,
  "time_cond_proj_dim": None,
  "time_embedding_act_fn": None,
  "time_embedding_dim": None,
  "time_embedding_type": "positional",
  "timestep_post_act": None,
}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """The fields of a diffusers UNet config.json that may vary here; names and defaults are diffusers'.

  Attributes:
    sample_size: latent height and width that samplers use by default; the network takes any size.
    attention_head_dim: the NUMBER of heads, of all blocks or of each (diffusers keeps the wrong name for old files).
    upcast_attention: kept for torch; attention scores are float32 here on every platform.
  """

  sample_size: int | tuple[int, ...] | None = None
  in_channels: int = 4
  out_channels: int = 4
  down_block_types: tuple[str, ...] = (
    "CrossAttnDownBlock2D",
    "CrossAttnDownBlock2D",
    "CrossAttnDownBlock2D",
    "DownBlock2D",
  )
  up_block_types: tuple[str, ...] = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  layers_per_block: int = 2
  downsample_padding: int = 1
  mid_block_scale_factor: float = 1.0
  act_fn: str = "silu"
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  cross_attention_dim: int = 1280
  transformer_layers_per_block: int = 1
  attention_head_dim: int | tuple[int, ...] = 8
  use_linear_projection: bool = False
  upcast_attention: bool = False
  flip_sin_to_cos: bool = True
  freq_shift: int = 0

  def __post_init__(self):
    levels = len(self.block_out_channels)
    for field, known in (("down_block_types", _DOWN_BLOCKS), ("up_block_types", _UP_BLOCKS)):
      types = getattr(self, field)
      unknown = [block for block in types if block not in known]
      if unknown:
        raise InputError(f"field {field} has {unknown[0]!r}; supported: {', '.join(known)}")
      if len(types) != levels:
        raise InputError(f"field {field} has {len(types)} entries for {levels} block_out_channels")
    if self.act_fn not in ACTIVATIONS:
      raise InputError(f"field act_fn is {self.act_fn!r}; supported: {', '.join(ACTIVATIONS)}")
    sizes = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "norm_num_groups")
    configs.check_positive(self, *sizes, "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim")
    if self.downsample_padding not in (0, 1):
      raise InputError(f"field downsample_padding is {self.downsample_padding}; supported: 0, 1")
    if len(self.heads) != levels:
      raise InputError(f"field attention_head_dim has {len(self.heads)} entries for {levels} block_out_channels")
    attends = zip(
      (_DOWN_BLOCKS[block] for block in self.down_block_types),
      (_UP_BLOCKS[block] for block in reversed(self.up_block_types)),
      (level == levels - 1 for level in range(levels)),  # the mid block
    )
    for heads, channels, places in zip(self.heads, self.block_out_channels, attends):
      if any(places) and channels % heads:
        raise InputError(f"field attention_head_dim (number of heads) is {heads}; it must divide {channels} channels")

  @property
  def heads(self) -> tuple[int, ...]:
    """The number of attention heads of each level."""
    if isinstance(self.attention_head_dim, int):
      return (self.attention_head_dim,) * len(self.block_out_channels)
    return self.attention_head_dim

  @property
  def resnet_channels(self) -> tuple[int, ...]:
    """The output width of every residual block in the order of the forward pass: down, mid, up."""
    widths, layers = self.block_out_channels, self.layers_per_block
    down = [width for width in widths for _ in range(layers)]
    up = [width for width in reversed(widths) for _ in range(layers + 1)]
    return (*down, widths[-1], widths[-1], *up)

  @classmethod
  def from_dict(cls, values: Mapping[str, Any], source: str = "unet/config.json") -> "UNetConfig":
    """From a diffusers config.json; an unknown or unsupported field is an `InputError` that names it."""
    return configs.parse(cls, values, source=source, fixed=_FIXED)

  def to_dict(self) -> dict[str, Any]:
    return configs.to_json(self)


def timestep_embedding(
  timesteps: jax.Array, channels: int, *, flip_sin_to_cos: bool = True, freq_shift: int = 0
) -> jax.Array:
  """Sinusoidal embedding of the diffusion time, [B] -> float32 [B, channels] (DDPM; diffusers `Timesteps`).

  Frequencies fall geometrically from 1 to 1/10000 (exclusive when `freq_shift` is 0). Stable Diffusion puts the
  cosines first, which `flip_sin_to_cos` says.
  """
  half = channels // 2
  frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
  angles = timesteps.astype(jnp.float32)[:, None] * frequencies
  parts = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
  return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, channels % 2)))


class TimestepEmbedding(nnx.Module):
  """Linear, activation, linear, [B, in] -> [B, out]."""

  def __init__(self, in_channels: int, out_channels: int, *, activation, dtype=jnp.float32, rngs: nnx.Rngs):
    self.activation = activation
    self.linear_1 = Dense(in_channels, out_channels, dtype=dtype, rngs=rngs)
    self.linear_2 = Dense(out_channels, out_channels, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.linear_2(self.activation(self.linear_1(x)))


class UNet2DCondition(nnx.Module):
  """Predicts noise (or v) from noisy latents, the diffusion time and a sequence of context tokens.

  `remat` names a policy of `models.remat` for its residual and transformer blocks, `attention` one of
  `attention_backends.BACKENDS`, and `upcast` those of `UPCAST` that compute in float32 whatever `dtype` is.
  """

  def __init__(
    self,
    config: UNetConfig,
    dtype=jnp.float32,
    *,
    remat: str = "none",
    attention: str = "auto",
    upcast: Collection[str] = (),
    rngs: nnx.Rngs,
  ):
    if attention not in BACKENDS:
      raise InputError(f"config.attention is {attention!r}{nearest(attention, BACKENDS)}")
    self.config = config
    channels = config.block_out_channels
    groups = config.norm_num_groups
    time_channels = 4 * channels[0]
    typed = {"dtype": dtype, "rngs": rngs}
    precise = lambda part: jnp.float32 if part in upcast else dtype  # noqa: E731
    self.activation = ACTIVATIONS[config.act_fn]
    resnet = functools.partial(
      rematerialized(ResnetBlock2D, remat),
      groups=groups,
      eps=config.norm_eps,
      activation=self.activation,
      time_channels=time_channels,
      **typed,
    )
    transformer = functools.partial(
      rematerialized(Transformer2D, remat),
      context_channels=config.cross_attention_dim,
      num_layers=config.transformer_layers_per_block,
      groups=groups,
      linear_projection=config.use_linear_projection,
      attention=attention,
      **typed,
    )
    downsample = functools.partial(Downsample2D, padding=config.downsample_padding, **typed)
    upsample = functools.partial(Upsample2D, **typed)
    last = len(channels) - 1

    self.conv_in = Conv(config.in_channels, channels[0], **typed)
    self.time_embedding = TimestepEmbedding(
      channels[0], time_channels, activation=self.activation, dtype=precise("time_embedding"), rngs=rngs
    )

    # The widths of the features that the down path leaves for the up path, used last in, first out.
    skips = [channels[0]]
    width = channels[0]
    self.down_blocks = nnx.List()
    for level, (block_type, heads) in enumerate(zip(config.down_block_types, config.heads)):
      self.down_blocks.append(
        DownBlock2D(
          width,
          channels[level],
          num_layers=config.layers_per_block,
          resnet=resnet,
          transformer=functools.partial(transformer, heads=heads) if _DOWN_BLOCKS[block_type] else None,
          downsample=downsample if level < last else None,
        )
      )
      width = channels[level]
      skips += [width] * (config.layers_per_block + (level < last))

    self.mid_block = UNetMidBlock2DCrossAttn(
      width,
      resnet=functools.partial(resnet, output_scale=config.mid_block_scale_factor),
      transformer=functools.partial(transformer, heads=config.heads[-1]),
    )

    self.up_blocks = nnx.List()
    for level, block_type in zip(reversed(range(len(channels))), config.up_block_types):
      heads = config.heads[level]
      self.up_blocks.append(
        UpBlock2D(
          width,
          channels[level],
          [skips.pop() for _ in range(config.layers_per_block + 1)],
          resnet=resnet,
          transformer=functools.partial(transformer, heads=heads) if _UP_BLOCKS[block_type] else None,
          upsample=upsample if level > 0 else None,
        )
      )
      width = channels[level]

    self.conv_norm_out = GroupNorm(groups, width, eps=config.norm_eps, dtype=precise("conv_out"))
    self.conv_out = Conv(width, config.out_channels, dtype=precise("conv_out"), rngs=rngs)

  def __call__(
    self,
    sample: jax.Array,
    timesteps: jax.Array,
    encoder_hidden_states: jax.Array,
    time_vector: jax.Array | None = None,
    film: Sequence[tuple[jax.Array, jax.Array]] | None = None,
  ) -> jax.Array:
    """The prediction for `sample`.

    Args:
      sample: noisy latents, [B, h, w, in_channels]; any height and width.
      timesteps: diffusion times, [B], integers or floats in [0, num_train_timesteps).
      encoder_hidden_states: context tokens of any number, [B, L, cross_attention_dim].
      time_vector: optional [B, 4 * block_out_channels[0]], added to the time embedding (CompDiff-2's Route B).
      film: optional (gamma, beta) for each residual block, [B, C] each with the C of `UNetConfig.resnet_channels`: its
        output h becomes gamma h + beta.

    Returns:
      [B, h, w, out_channels], in the compute type, or float32 where `conv_out` is upcast.
    """
    config = self.config
    time = self.time_embedding(
      timestep_embedding(
        timesteps,
        config.block_out_channels[0],
        flip_sin_to_cos=config.flip_sin_to_cos,
        freq_shift=config.freq_shift,
      )
    )
    if time_vector is not None:
      time = time + time_vector.astype(time.dtype)

    film = iter(film or ())
    x = self.conv_in(sample)
    skips = [x]
    for block in self.down_blocks:
      x, features = block(x, time, encoder_hidden_states, film)
      skips += features
    x = self.mid_block(x, time, encoder_hidden_states, film)
    for block in self.up_blocks:
      x = block(x, skips, time, encoder_hidden_states, film)
    return self.conv_out(self.activation(self.conv_norm_out(x)))
