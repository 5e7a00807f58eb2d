"""config.json contents of the networks: of published models, as their files have them, and of toys for parity tests."""

from compdiff_jax.ahead_of_time.stand_ins import SD21_BASE


def _blocks(kind: str, *attends: bool) -> list[str]:
  return [f"{'CrossAttn' if attend else ''}{kind}Block2D" for attend in attends]


def _autoencoder(*channels: int, **fields) -> dict:
  return {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": list(channels),
    "down_block_types": ["DownEncoderBlock2D"] * len(channels),
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    **fields,
  }


_SD15_UNET = {
  "_class_name": "UNet2DConditionModel",
  "_diffusers_version": "0.6.0",
  "act_fn": "silu",
  "attention_head_dim": 8,
  "block_out_channels": [320, 640, 1280, 1280],
  "center_input_sample": False,
  "cross_attention_dim": 768,
  "down_block_types": _blocks("Down", True, True, True, False),
  "downsample_padding": 1,
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "in_channels": 4,
  "layers_per_block": 2,
  "mid_block_scale_factor": 1,
  "norm_eps": 1e-05,
  "norm_num_groups": 32,
  "out_channels": 4,
  "sample_size": 64,
  "up_block_types": _blocks("Up", False, True, True, True),
}
_SD21_UNET = SD21_BASE["unet"] | {
  "num_class_embeds": None,
  "only_cross_attention": False,
  "sample_size": 96,
  "upcast_attention": True,
}
_TINY_UNET = _SD15_UNET | {
  "block_out_channels": [32, 64],
  "cross_attention_dim": 32,
  "down_block_types": _blocks("Down", False, True),
  "sample_size": 32,
  "up_block_types": _blocks("Up", True, False),
}

_SD15_TEXT = {
  "architectures": ["CLIPTextModel"],
  "attention_dropout": 0.0,
  "bos_token_id": 0,
  "dropout": 0.0,
  "eos_token_id": 2,
  "hidden_act": "quick_gelu",
  "hidden_size": 768,
  "initializer_factor": 1.0,
  "initializer_range": 0.02,
  "intermediate_size": 3072,
  "layer_norm_eps": 1e-05,
  "max_position_embeddings": 77,
  "model_type": "clip_text_model",
  "num_attention_heads": 12,
  "num_hidden_layers": 12,
  "pad_token_id": 1,
  "projection_dim": 768,
  "torch_dtype": "float32",
  "transformers_version": "4.22.0.dev0",
  "vocab_size": 49408,
}
_TINY_TEXT = _SD15_TEXT | {
  "hidden_size": 32,
  "intermediate_size": 37,
  "num_attention_heads": 4,
  "num_hidden_layers": 5,
  "projection_dim": 512,
  "vocab_size": 1000,
}

SD15 = {
  "unet": _SD15_UNET,
  "vae": _autoencoder(128, 256, 512, 512, sample_size=512),
  "text_encoder": _SD15_TEXT,
}
# With v-prediction, at 768 px.
SD21 = SD21_BASE | {"unet": _SD21_UNET}
# What diffusers' own tests download (the tiny-stable-diffusion repositories)…
TINY_HUB = {"unet": _TINY_UNET, "vae": _autoencoder(32, 64, layers_per_block=1), "text_encoder": _TINY_TEXT}
# … and what they build in memory: the eight heads of the default divide only the channels of the level that attends.
TINY_MEMORY = {
  "unet": _TINY_UNET
  | {
    "block_out_channels": [4, 8],
    "cross_attention_dim": 8,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "time_cond_proj_dim": None,
  },
  "vae": _autoencoder(4, 8, layers_per_block=1, norm_num_groups=2),
  "text_encoder": _TINY_TEXT
  | {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2},
}
PUBLISHED = {
  "SD 1.5": SD15,
  "SD 2.1-base": SD21_BASE,
  "SD 2.1": SD21,
  "tiny, Hub": TINY_HUB,
  "tiny, in memory": TINY_MEMORY,
}

UNETS = {
  # One number of heads, 1x1 convolutions around the transformers: the style of SD 1.
  "SD 1 style": TINY_HUB["unet"],
  # Four levels, heads per level, linear projections: the style of SD 2.1.
  "SD 2 style": _SD21_UNET
  | {
    "block_out_channels": [8, 16, 24, 24],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 20,
    "attention_head_dim": [1, 2, 3, 3],
  },
  # Every field that may vary is another than its default.
  "options": {
    "sample_size": 9,
    "in_channels": 3,
    "out_channels": 5,
    "down_block_types": _blocks("Down", False, True),
    "up_block_types": _blocks("Up", True, False),
    "block_out_channels": [18, 24],
    "layers_per_block": 1,
    "downsample_padding": 0,
    "mid_block_scale_factor": 1.5,
    "act_fn": "mish",
    "norm_num_groups": 3,
    "norm_eps": 0.1,
    "cross_attention_dim": 8,
    "transformer_layers_per_block": 2,
    "attention_head_dim": [2, 3],
    "use_linear_projection": True,
    "upcast_attention": True,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
  },
}

VAES = {
  "SD style": _autoencoder(8, 16, 16, norm_num_groups=4),
  "one level": _autoencoder(16, layers_per_block=1, norm_num_groups=8),
  # Every field that may vary is another than its default.
  "options": {
    "in_channels": 1,
    "out_channels": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 12],
    "layers_per_block": 2,
    "act_fn": "gelu",
    "latent_channels": 3,
    "norm_num_groups": 2,
    "sample_size": 9,
    "scaling_factor": 0.13025,
    "force_upcast": False,
    "mid_block_add_attention": False,
  },
}

TEXT_ENCODERS = {
  "SD 1 style": TINY_HUB["text_encoder"],
  # Every field that may vary is another than its default; the activation is SD 2.1's.
  "options": {
    "vocab_size": 99,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 83,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-3,
    "projection_dim": 16,
    "bos_token_id": 96,
    "eos_token_id": 97,
    "pad_token_id": 0,
  },
}
