"""The text encoder of Stable Diffusion (transformers `CLIPTextModel`), up to its last hidden state."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from compdiff_jax.cli import InputError
from compdiff_jax.models import config as configs
from compdiff_jax.models.attention import attention, merge_heads, split_heads
from compdiff_jax.models.layers import ACTIVATIONS, Dense, Embed, LayerNorm
from compdiff_jax.models.remat import rematerialized

_ACTIVATIONS = ACTIVATIONS | {"quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x)}

_FIXED = {
  "attention_dropout": 0.0,
  "dropout": 0.0,
  "is_encoder_decoder": False,
  "model_type": "clip_text_model",
}

# Initialisation of the torch class and bookkeeping of transformers: nothing here changes the hidden states.
_IGNORED = (
  "architectures",
  "chunk_size_feed_forward",
  "dtype",
  "id2label",
  "initializer_factor",
  "initializer_range",
  "label2id",
  "output_attentions",
  "output_hidden_states",
  "problem_type",
  "return_dict",
  "torch_dtype",
  "transformers_version",
)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
  """The fields of a CLIP text encoder's config.json that may vary here; names and defaults are transformers'.

  The token ids and `projection_dim` belong to the pooled output, which Stable Diffusion does not use; they are kept
  for torch.
  """

  vocab_size: int = 49408
  hidden_size: int = 512
  intermediate_size: int = 2048
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  max_position_embeddings: int = 77
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  projection_dim: int | None = 512
  bos_token_id: int | None = 49406
  eos_token_id: int | None = 49407
  pad_token_id: int | None = 1

  def __post_init__(self):
    if self.hidden_act not in _ACTIVATIONS:
      raise InputError(f"field hidden_act is {self.hidden_act!r}; supported: {', '.join(_ACTIVATIONS)}")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    configs.check_positive(self, *sizes, "max_position_embeddings")
    if self.hidden_size % self.num_attention_heads:
      raise InputError(
        f"field num_attention_heads is {self.num_attention_heads}; it must divide hidden_size {self.hidden_size}"
      )

  @classmethod
  def from_dict(cls, values: Mapping[str, Any], source: str = "text_encoder/config.json") -> "CLIPTextConfig":
    """From a transformers config.json; an unknown or unsupported field is an `InputError` that names it."""
    return configs.parse(cls, values, source=source, fixed=_FIXED, ignored=_IGNORED)

  def to_dict(self) -> dict[str, Any]:
    return configs.to_json(self)


class CLIPTextEmbeddings(nnx.Module):
  """Token plus learned position embeddings, int [B, T] -> [B, T, C]."""

  def __init__(self, config: CLIPTextConfig, dtype, rngs: nnx.Rngs):
    self.token_embedding = Embed(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
    self.position_embedding = Embed(config.max_position_embeddings, config.hidden_size, dtype=dtype, rngs=rngs)

  def __call__(self, input_ids: jax.Array) -> jax.Array:
    return self.token_embedding(input_ids) + self.position_embedding(jnp.arange(input_ids.shape[1]))


class CLIPAttention(nnx.Module):
  """Causal multi-head self-attention with biases, [B, T, C] -> [B, T, C]."""

  def __init__(self, channels: int, *, heads: int, backend: str, dtype, rngs: nnx.Rngs):
    self.heads = heads
    self.backend = backend
    self.k_proj = Dense(channels, channels, dtype=dtype, rngs=rngs)
    self.v_proj = Dense(channels, channels, dtype=dtype, rngs=rngs)
    self.q_proj = Dense(channels, channels, dtype=dtype, rngs=rngs)
    self.out_proj = Dense(channels, channels, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    query, key, value = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
    return self.out_proj(merge_heads(attention(query, key, value, causal=True, backend=self.backend)))


class CLIPMLP(nnx.Module):
  """Linear, activation, linear, [B, T, C] -> [B, T, C]."""

  def __init__(self, config: CLIPTextConfig, dtype, rngs: nnx.Rngs):
    self.activation = _ACTIVATIONS[config.hidden_act]
    self.fc1 = Dense(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)
    self.fc2 = Dense(config.intermediate_size, config.hidden_size, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.fc2(self.activation(self.fc1(x)))


class CLIPEncoderLayer(nnx.Module):
  """Pre-norm causal self-attention and MLP, each added to its input."""

  def __init__(self, config: CLIPTextConfig, dtype, backend: str, rngs: nnx.Rngs):
    norm = functools.partial(LayerNorm, config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
    self.layer_norm1 = norm()
    heads = config.num_attention_heads
    self.self_attn = CLIPAttention(config.hidden_size, heads=heads, backend=backend, dtype=dtype, rngs=rngs)
    self.layer_norm2 = norm()
    self.mlp = CLIPMLP(config, dtype, rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x + self.self_attn(self.layer_norm1(x))
    return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nnx.Module):
  """The stack of layers."""

  def __init__(self, config: CLIPTextConfig, dtype, remat: str, backend: str, rngs: nnx.Rngs):
    layer = rematerialized(CLIPEncoderLayer, remat)
    self.layers = nnx.List([layer(config, dtype, backend, rngs) for _ in range(config.num_hidden_layers)])

  def __call__(self, x: jax.Array) -> jax.Array:
    for layer in self.layers:
      x = layer(x)
    return x


class CLIPTextTransformer(nnx.Module):
  """Embeddings, layers and the final layer norm."""

  def __init__(self, config: CLIPTextConfig, dtype, remat: str, backend: str, rngs: nnx.Rngs):
    self.embeddings = CLIPTextEmbeddings(config, dtype, rngs)
    self.encoder = CLIPEncoder(config, dtype, remat, backend, rngs)
    self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)

  def __call__(self, input_ids: jax.Array) -> jax.Array:
    return self.final_layer_norm(self.encoder(self.embeddings(input_ids)))


class CLIPTextModel(nnx.Module):
  """Token ids to the hidden states that condition the UNet.

  `remat` is a policy of `models.remat` for its layers, `attention` one of `attention_backends.BACKENDS`.
  """

  def __init__(
    self,
    config: CLIPTextConfig,
    dtype=jnp.float32,
    *,
    remat: str = "none",
    attention: str = "auto",
    rngs: nnx.Rngs,
  ):
    # The extra level gives the published keys their `text_model.` prefix.
    self.text_model = CLIPTextTransformer(config, dtype, remat, attention, rngs)

  def __call__(self, input_ids: jax.Array) -> jax.Array:
    """int [B, T] with T <= max_position_embeddings -> [B, T, hidden_size], after the final layer norm.

    No padding mask: Stable Diffusion attends to its padding, whose token therefore matters.
    """
    return self.text_model(input_ids)
