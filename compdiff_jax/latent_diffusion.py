"""The whole model: frozen VAE, text encoder, conditioner and UNet, put together from a config."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from compdiff_jax.cli import InputError, nearest
from compdiff_jax.conditioning.config import ConditionerConfig
from compdiff_jax.conditioning.family import config_from_dict
from compdiff_jax.conditioning.interface import ConditionerOutput, Modulation
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.diffusion.schedule import NoiseSchedule
from compdiff_jax.interop.weights import load_component, read_config
from compdiff_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from compdiff_jax.models.functional import Functional
from compdiff_jax.models.lora import LoRA
from compdiff_jax.models.unet import UPCAST, UNet2DCondition, UNetConfig
from compdiff_jax.models.vae import AutoencoderKL, VAEConfig, denormalize_pixels, normalize_pixels, sample_posterior

# {component: {dotted parameter name: array}}
Params = Mapping[str, Mapping[str, jax.Array]]

COMPONENTS = ("unet", "vae", "text_encoder", "conditioner", "lora")

# What config.compute_dtype may be. Training in float16 would need its loss scaled, and a CPU cannot multiply it.
DTYPES = ("float32", "bfloat16")
# What config.upcast may name.
UPCASTS = ("vae", "text_encoder", *UPCAST)


class Context(NamedTuple):
  """What the UNet is conditioned on, in the order of its arguments.

  Attributes:
    encoder_hidden_states: [B, 77 + T, C], text tokens followed by demographic tokens.
    time_vector: [B, D], added to the time embedding, or None.
    film: modulation of the residual blocks, or None.
  """

  encoder_hidden_states: jax.Array
  time_vector: jax.Array | None
  film: Modulation | None


def _network_config(config_class: Any, torch_class: str, directory: str, fields: ml_collections.ConfigDict) -> Any:
  """Pretrained weights bring their own shape; `fields` describes a network that starts from random weights."""
  return config_class.from_dict(read_config(directory, torch_class) if directory else fields.to_dict())


@dataclasses.dataclass(frozen=True)
class LatentDiffusion:
  """The networks as pure functions; parameters are always passed in, as {component: flat dict}.

  Attributes:
    schema: the attributes of the data.
    schedule: noise schedule and prediction type.
    unet_config, vae_config, text_config, conditioner_config: what the networks were built from.
    unet, vae, text_encoder, conditioner: the networks.
    trained: the components that training changes; the others are frozen.
    image_size: side of the square images in pixels.
    lora: low-rank factors that are trained instead of the UNet, or None.
  """

  schema: Schema
  schedule: NoiseSchedule
  unet_config: UNetConfig
  vae_config: VAEConfig
  text_config: CLIPTextConfig
  conditioner_config: ConditionerConfig
  unet: Functional
  vae: Functional
  text_encoder: Functional
  conditioner: Functional
  trained: tuple[str, ...]
  image_size: int
  lora: LoRA | None = None

  @classmethod
  def from_config(cls, config: ml_collections.ConfigDict, schema: Schema) -> "LatentDiffusion":
    """Builds the networks abstractly; nothing is allocated. Raises InputError where the parts do not fit together."""
    if not config.weights.vae:
      raise InputError("config.weights.vae names no directory; train an autoencoder with compdiff train-vae")
    if config.compute_dtype not in DTYPES:
      raise InputError(f"config.compute_dtype {config.compute_dtype!r} must be {' or '.join(DTYPES)}")
    dtype = jnp.dtype(config.compute_dtype)
    upcast = tuple(config.upcast)
    for part in upcast:
      if part not in UPCASTS:
        raise InputError(f"config.upcast names {part!r}{nearest(part, UPCASTS)}")
    unet_config = _network_config(UNetConfig, "UNet2DConditionModel", config.weights.unet, config.unet)
    vae_config = VAEConfig.from_dict(read_config(config.weights.vae, "AutoencoderKL"))
    text_config = _network_config(CLIPTextConfig, "CLIPTextModel", config.weights.text_encoder, config.text_encoder)
    conditioner_config = config_from_dict(config.conditioner.to_dict())
    width = unet_config.cross_attention_dim
    if text_config.hidden_size != width or conditioner_config.d_ctx != width:
      raise InputError(
        f"unet.cross_attention_dim {width}, text_encoder.hidden_size {text_config.hidden_size} and conditioner.d_ctx"
        f" {conditioner_config.d_ctx} must be equal: their tokens share one context"
      )
    time_width = 4 * unet_config.block_out_channels[0]
    if conditioner_config.d_time_emb not in (0, time_width):
      raise InputError(
        f"conditioner.d_time_emb {conditioner_config.d_time_emb} must be the width of the UNet's time embedding,"
        f" 4 * {unet_config.block_out_channels[0]} = {time_width}, or 0 for none"
      )
    if conditioner_config.film_channels not in ((), unet_config.resnet_channels):
      raise InputError(
        f"conditioner.film_channels must be the widths of the UNet's residual blocks, {unet_config.resnet_channels}, or"
        " () for no modulation"
      )
    if unet_config.in_channels != vae_config.latent_channels:
      raise InputError(
        f"unet.in_channels {unet_config.in_channels} must equal vae.latent_channels {vae_config.latent_channels}"
      )
    vae_config.latent_side(config.data.image_size)
    if not config.train_text_encoder and not config.weights.text_encoder:
      raise InputError(
        "a frozen text encoder needs weights: set config.weights.text_encoder to a diffusers text_encoder directory,"
        " or config.train_text_encoder=True"
      )
    conditioned = conditioner_config.select(schema).names
    for name in config.prompt_attributes:
      if schema[name].kind == "multilabel":
        raise InputError(f"prompt_attributes names {name}: a multilabel attribute cannot be written into the prompt")
      if name in conditioned:
        raise InputError(
          f"{name} is in prompt_attributes and in the conditioner: dropping it would leave it in the other, and neither"
          " could be guided alone; set conditioner.attributes without it, or prompt_attributes=()"
        )
    conditioner = Functional(lambda rngs: conditioner_config.build(schema, rngs))
    options = {"remat": config.remat, "attention": config.attention}
    unet = Functional(lambda rngs: UNet2DCondition(unet_config, dtype, **options, upcast=upcast, rngs=rngs))
    vae_dtype = jnp.float32 if "vae" in upcast else dtype
    text_dtype = jnp.float32 if "text_encoder" in upcast else dtype
    lora = None
    if config.lora.rank:
      if not config.weights.unet:
        raise InputError(
          "lora.rank adapts a UNet that stays as it is: set config.weights.unet to a diffusers directory"
        )
      lora = LoRA(unet.shapes, tuple(config.lora.targets), config.lora.rank, config.lora.scale)
    trained = ["lora" if lora else "unet"]
    if conditioner.shapes:
      trained.append("conditioner")
    if config.train_text_encoder:
      trained.append("text_encoder")
    return cls(
      schema=schema,
      schedule=NoiseSchedule.from_dict(config.scheduler.to_dict()),
      unet_config=unet_config,
      vae_config=vae_config,
      text_config=text_config,
      conditioner_config=conditioner_config,
      unet=unet,
      vae=Functional(lambda rngs: AutoencoderKL(vae_config, dtype=vae_dtype, rngs=rngs)),
      text_encoder=Functional(lambda rngs: CLIPTextModel(text_config, text_dtype, **options, rngs=rngs)),
      conditioner=conditioner,
      trained=tuple(trained),
      image_size=config.data.image_size,
      lora=lora,
    )

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    side = self.vae_config.latent_side(self.image_size)
    return side, side, self.vae_config.latent_channels

  @property
  def frozen(self) -> tuple[str, ...]:
    """The components that training needs and does not change."""
    names = [name for name in ("vae", "text_encoder") if name not in self.trained]
    return (*names, "unet") if self.lora else tuple(names)

  def component(self, name: str) -> Functional | LoRA:
    return getattr(self, name)

  def load_frozen(self, weights: Mapping[str, str]) -> dict[str, Any]:
    """The parameters of `frozen`, read from the directories of `config.weights`."""
    return {name: load_component(weights[name], self.component(name)) for name in self.frozen}

  def initial_params(self, key: jax.Array, weights: Mapping[str, str], given: Params | None = None) -> dict[str, Any]:
    """Starting values of the trained components.

    Those `given`, of which a component takes its own; else pretrained where `config.weights` names a directory; else
    random, such as the nulls of a conditioner that is given without.
    """
    params = {}
    for name in self.trained:
      component, own = self.component(name), (given or {}).get(name, {})
      if own.keys() >= component.shapes.keys():
        start = own
      elif weights.get(name):
        start = load_component(weights[name], component)
      else:
        # A key of its own for each component: training one more does not change how the others start.
        start = component.init(jax.random.fold_in(key, COMPONENTS.index(name)))
      params[name] = {parameter: own.get(parameter, start[parameter]) for parameter in component.shapes}
    return params

  def assemble(self, params: Params) -> Params:
    """All components as the networks take them: low-rank factors are merged into the UNet."""
    if self.lora is None:
      return params
    rest = {name: own for name, own in params.items() if name != "lora"}
    return {**rest, "unet": self.lora.merge(params["unet"], params["lora"])}

  def moments(self, params: Params, images: jax.Array) -> jax.Array:
    """The VAE's posterior, mean and log-variance: images uint8 [B, H, W, 3] -> [B, h, w, 2c]."""
    return self.vae(params["vae"], normalize_pixels(images), method="encode")

  def latents(self, moments: jax.Array, noise: jax.Array) -> jax.Array:
    """A posterior sample, scaled for diffusion: moments [B, h, w, 2c], noise [B, h, w, c] -> float32 [B, h, w, c]."""
    return sample_posterior(moments.astype(jnp.float32), noise) * self.vae_config.scaling_factor

  def decode(self, params: Params, latents: jax.Array) -> jax.Array:
    """Latents [B, h, w, c] -> images uint8 [B, H, W, 3]."""
    return denormalize_pixels(self.vae(params["vae"], latents / self.vae_config.scaling_factor, method="decode"))

  def context(
    self, params: Params, input_ids: jax.Array, attributes: Mapping[str, jax.Array]
  ) -> tuple[Context, ConditionerOutput]:
    """What prompts int32 [B, 77] and attributes condition the UNet on, and the conditioner's output; evaluation."""
    return self.join_context(params, self.encode_text(params, input_ids), attributes)

  def encode_text(self, params: Params, input_ids: jax.Array) -> jax.Array:
    """Prompts int32 [B, 77] -> text tokens [B, 77, C]."""
    return self.text_encoder(params["text_encoder"], input_ids)

  def join_context(
    self, params: Params, text: jax.Array, attributes: Mapping[str, jax.Array], keys: jax.Array | None = None
  ) -> tuple[Context, ConditionerOutput]:
    """`context` from text tokens [B, 77, C]; with `keys` as in training (`conditioning.interface`)."""
    output = self.conditioner(params.get("conditioner", {}), attributes, keys=keys)
    # A conditioner without attributes does not know the size of the batch.
    tokens = jnp.broadcast_to(output.tokens, (len(text), *output.tokens.shape[1:]))
    return Context(jnp.concatenate([text, tokens.astype(text.dtype)], axis=1), output.time_vector, output.film), output
