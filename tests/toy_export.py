"""A toy model with every part, as JAX parameters and as an exported directory that diffusers loads."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from diffusers import DiffusionPipeline

from compdiff_jax.conditioning.config import ConditionerConfig
from compdiff_jax.conditioning.hcn import HCNConfig
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.conditioning.typed import TypedConfig
from compdiff_jax.data.tokenizer import SMALLEST_VOCABULARY, train_tokenizer
from compdiff_jax.diffusion.samplers import Sampler
from compdiff_jax.diffusion.schedule import NoiseSchedule
from compdiff_jax.interop.export_directory import write_export
from compdiff_jax.interop.schedulers import to_diffusers
from compdiff_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from compdiff_jax.models.functional import Functional
from compdiff_jax.models.unet import UNet2DCondition, UNetConfig
from compdiff_jax.models.vae import AutoencoderKL, VAEConfig

SCHEMA = Schema(
  (
    Attribute("age", "continuous", low=0, high=100, bins=(18, 40, 60, 80), unit="year"),
    Attribute("sex", "categorical", values=("male", "female")),
    Attribute("race", "categorical", values=("white", "black", "asian", "hispanic")),
  )
)
UNET = UNetConfig(
  sample_size=8,
  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
  block_out_channels=(16, 32),
  layers_per_block=1,
  norm_num_groups=8,
  cross_attention_dim=24,
  attention_head_dim=(2, 4),
  use_linear_projection=True,
)
VAE = VAEConfig(
  down_block_types=("DownEncoderBlock2D",) * 2,
  up_block_types=("UpDecoderBlock2D",) * 2,
  block_out_channels=(8, 16),
  norm_num_groups=4,
  sample_size=16,
)
TEXT = CLIPTextConfig(
  vocab_size=SMALLEST_VOCABULARY,
  hidden_size=24,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=2,
  hidden_act="gelu",
  bos_token_id=SMALLEST_VOCABULARY - 2,
  eos_token_id=SMALLEST_VOCABULARY - 1,
  pad_token_id=SMALLEST_VOCABULARY - 1,
)
# HCN as this project trains it; as the reference released it: sex and race in one token, age in the prompt, no nulls;
# and a conditioner that also adds to the time embedding, with everything that is unknown zero.
VARIANTS = {
  "nulls": (HCNConfig(d_node=16, d_ctx=24, aux_hidden_dim=8), ()),
  "released": (HCNConfig(("sex", "race"), d_node=16, d_ctx=24, aux_hidden_dim=0, learned_nulls=False), ("age",)),
  "time": (TypedConfig(d_node=16, d_ctx=24, d_time_emb=64, aux_hidden_dim=8, unconditional="zeros"), ()),
  "transformer": (
    TypedConfig(d_node=16, d_ctx=24, aux_hidden_dim=0, composer="transformer", transformer_heads=2, num_registers=1),
    (),
  ),
}
SCHEDULE = NoiseSchedule()
TEXTS = ["Effusion left.", "No finding.", "Large heart."]


def random_params(model: Functional, seed: int) -> dict[str, jax.Array]:
  """Weights that keep activations near one, with wide biases, norms, embeddings and nulls; nothing is compiled."""
  rng = np.random.default_rng(seed)
  params = {}
  for name, leaf in model.shapes.items():
    fan_in = math.prod(leaf.shape[:-1]) if name.endswith("kernel") else 4
    mean = 1 if name.endswith("scale") else 0
    params[name] = jnp.asarray(rng.normal(mean, fan_in**-0.5, leaf.shape), jnp.float32)
  return params


unet = Functional(lambda rngs: UNet2DCondition(UNET, rngs=rngs))
vae = Functional(lambda rngs: AutoencoderKL(VAE, rngs=rngs))
text_encoder = Functional(lambda rngs: CLIPTextModel(TEXT, rngs=rngs))
UNET_PARAMS, TEXT_PARAMS, VAE_PARAMS = random_params(unet, 1), random_params(text_encoder, 2), random_params(vae, 3)


def conditioner(config: ConditionerConfig, schema: Schema = SCHEMA) -> tuple[Functional, dict[str, jax.Array]]:
  model = Functional(lambda rngs: config.build(schema, rngs))
  rng = np.random.default_rng(4)
  return model, {name: jnp.asarray(rng.normal(0, 0.7, x.shape), jnp.float32) for name, x in model.shapes.items()}


def export(out, tokenizer_dir, variant: str, **changes):
  config, prompt_attributes = VARIANTS[variant]
  arguments = {
    "unet_config": UNET,
    "unet_params": UNET_PARAMS,
    "vae_config": VAE,
    "vae_params": VAE_PARAMS,
    "text_config": TEXT,
    "text_params": TEXT_PARAMS,
    "tokenizer_dir": tokenizer_dir,
    "scheduler_config": to_diffusers(SCHEDULE, Sampler()),
    "conditioner": (config, conditioner(config)[1], SCHEMA),
    "prompt_attributes": prompt_attributes,
    "card": {"name": "Toy", "text": "Effusion left.", "data": {"images": 12}, "recipe": {"steps": 3}},
  }
  return write_export(out, **(arguments | changes))


def make_tokenizer(directory):
  train_tokenizer(TEXTS, directory, SMALLEST_VOCABULARY)
  return directory


def load(directory, **options):
  pipe = DiffusionPipeline.from_pretrained(directory, trust_remote_code=True, **options)
  pipe.set_progress_bar_config(disable=True)
  return pipe
