"""The config that all config files start from; each says only what differs. Users import it for their own files."""

import dataclasses

import ml_collections

from compdiff_jax.conditioning.family import CONFIGS

# Sizes of the conditioner in `tiny`, where it has them.
_TINY_CONDITIONER = {"d_node": 64, "d_ctx": 64, "aux_hidden_dim": 64, "flat_hidden": 166}


def conditioner(kind: str) -> ml_collections.ConfigDict:
  """Every field of the conditioner "none", "hcn", "typed", "flat" or "additive", with its default."""
  return ml_collections.ConfigDict({"kind": kind, **dataclasses.asdict(CONFIGS[kind]())})


def base(kind: str = "typed") -> ml_collections.ConfigDict:
  """Method defaults: the reference's optimizer and loss weights, with text and attribute dropout on.

  `kind` chooses the conditioner. The default of a new key must mean "as before": runs from before it get it, too.
  """
  config = ml_collections.ConfigDict()
  config.seed = 42
  config.compute_dtype = "float32"  # "bfloat16" on TPU and GPU; parameters, optimizer, EMA and losses stay float32
  # Parts that compute in float32 all the same: "vae", "text_encoder", and of the UNet "time_embedding", "conv_out".
  # Norm statistics, attention scores, samplers and losses always do.
  config.upcast = ()
  # "auto": the platform's kernel (models/attention_backends.py); "xla": none, should a driver have trouble with it.
  config.attention = "auto"
  # What blocks recompute in the backward pass: "none"; "matmuls" all but convolutions and linear layers; "blocks" all.
  config.remat = "none"

  config.data = ml_collections.ConfigDict(
    {
      "path": "",  # a data set of images, or of moments (data_prep.encode_latents)
      "image_size": 512,
      "mix": (),  # more data sets: (path, weight), drawn `weight` times as often as `path`
      "balance": (),  # attributes whose cells are drawn in balance: a record of a cell of n has the weight n^-tau
      "balance_tau": 0.5,  # 0: as the data are; 1: all cells equally often
      "threads": 2,  # that decode images; 0: the prefetch thread reads and decodes as well
      "workers": 0,  # processes that make batches; for hosts on which Python threads are too slow
    }
  )
  # Attributes written in front of the clinical text ("54 year old. …"); HCN v1 without age names ("age",).
  config.prompt_attributes = ()

  # A run or an imported model (compdiff import) whose networks, schedule and tokenizer training starts from.
  config.init = ""
  # diffusers component directories. Networks that have one take their shape from its config.json.
  config.weights = ml_collections.ConfigDict({"unet": "", "vae": "", "text_encoder": "", "tokenizer": ""})
  # Shapes of the networks that start from random weights; fields of the diffusers and transformers config.json.
  config.unet = ml_collections.ConfigDict()
  config.text_encoder = ml_collections.ConfigDict()
  config.train_text_encoder = False
  config.scheduler = ml_collections.ConfigDict(
    {
      "num_train_timesteps": 1000,
      "beta_start": 0.00085,
      "beta_end": 0.012,
      "beta_schedule": "scaled_linear",
      "prediction_type": "epsilon",
      "steps_offset": 1,
      "set_alpha_to_one": False,
      "rescale_betas_zero_snr": False,  # zero terminal SNR; not for epsilon
    }
  )
  config.conditioner = conditioner(kind)
  # Low-rank factors of these layers of the UNet are trained instead of the UNet; rank 0: the UNet itself is.
  config.lora = ml_collections.ConfigDict({"rank": 0, "scale": 1.0, "targets": ("to_q", "to_k", "to_v", "to_out.0")})

  # A conditioner without a latent has no `kl` and no `composition`, one without heads no `auxiliary`.
  config.loss = ml_collections.ConfigDict(
    {
      "kl": 0.005,
      "kl_anneal_steps": 5000,
      "composition": 0.1,
      "auxiliary": 1.0,
      "min_snr_gamma": 0.0,  # 5 is usual; 0: every timestep has weight 1
      "noise_offset": 0.0,  # size of a constant added to the noise of each channel
      "input_perturbation": 0.0,  # size of noise that the input has and the target lacks
      "coind": 0.0,  # conditional independence of the attributes (training/coind.py)
      "coind_share": 0.25,  # of the batch, at four more rows each
    }
  )
  # FairDiffusion: "published" or "compdiff" weights the denoising loss, "" does not. No attributes means all of them.
  config.fairness = ml_collections.ConfigDict(
    {
      "variant": "",
      "attributes": (),
      "sigma_init": 1.0,
      "window": 30,  # optimizer steps between two searches
      "exploitation": 0.95,
      "min_weight": 0.1,  # of a sample, in "compdiff"
      "ucb_beta": 0.1,
    }
  )
  config.dropout = ml_collections.ConfigDict({"text": 0.1, "attribute": 0.1, "all_attributes": 0.1})
  config.train = ml_collections.ConfigDict(
    {
      "steps": 30_000,
      "batch_size": 48,
      "accumulation": 1,
      "learning_rate": 1e-5,
      "schedule": "cosine",  # or "linear", "constant"
      "warmup_steps": 500,
      # To reproduce a published run of the reference: its processes, which shorten its schedule; 0: no.
      "reference_processes": 0,
      # Regular expressions of "component.parameter" that keep their values, e.g. "unet\\.down_blocks\\..*".
      "freeze": (),
      "b1": 0.9,
      "b2": 0.999,
      "eps": 1e-8,
      "weight_decay": 1e-2,
      "clip_norm": 1.0,
      "ema_decay": 0.9999,
      "ema_schedule": "ramp",  # how the decay grows to ema_decay; or "power", "constant"
      "ema_power": 2 / 3,
    }
  )
  # Read by compdiff train-vae alone; steps and rates are for fine-tuning, and unmeasured.
  config.vae_training = ml_collections.ConfigDict(
    {
      "init": "",  # a diffusers VAE directory to fine-tune; "": random weights in the shape of a section `vae`
      "steps": 10_000,
      "batch_size": 16,
      "learning_rate": 1e-5,
      "kl": 1e-6,
    }
  )

  config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
  # (regex of "component.parameter", axes), first match wins; without a match the largest axis divisible by fsdp.
  config.sharding_rules = ()

  config.sample = ml_collections.ConfigDict(
    {
      # As the reference samples; the options of other samplers are explained in diffusion/samplers.py.
      "sampler": "ddpm",
      "num_steps": 75,
      "timestep_spacing": "",
      "eta": 0.0,
      "karras": False,
      "guidance": 7.5,
      "guidance_parts": "",  # weights of parts that differ, as "demographics=4,age=2" (sampling/guidance.py)
      "null": "learned",  # the demographics of guidance's unconditional branch; or "zeros", as in the reference
      "guidance_rescale": 0.0,
      "negative": "",
      "batch_size": 16,
      "text": "No acute cardiopulmonary abnormality.",
    }
  )
  config.logging = ml_collections.ConfigDict(
    {
      "log_every": 50,
      "checkpoint_every": 500,
      "keep_checkpoints": 2,  # the latest; besides them
      "keep_every": 0,  # those of multiples of so many steps; 0 for none
      "keep_best": "",  # and the one with the lowest of this metric, for example "diffusion"
      "sample_every": 2500,
      "stall_seconds": 900,  # without a step: print where every thread is, and after twice that end; 0 for never
    }
  )
  return config


def tiny(config: ml_collections.ConfigDict, image_size: int) -> ml_collections.ConfigDict:
  """Networks small enough for two CPU cores, for 32 to 128 pixel images; trained from random weights."""
  config.data.image_size = image_size
  config.vae_training.update(steps=600, learning_rate=2e-3, kl=1e-3)
  config.vae = ml_collections.ConfigDict(
    {
      "in_channels": 3,
      "out_channels": 3,
      "down_block_types": ("DownEncoderBlock2D",) * 3,
      "up_block_types": ("UpDecoderBlock2D",) * 3,
      "block_out_channels": (16, 32, 64),
      "layers_per_block": 1,
      "latent_channels": 4,
      "norm_num_groups": 8,
      "sample_size": image_size,
      "mid_block_add_attention": False,
    }
  )
  config.unet = ml_collections.ConfigDict(
    {
      "sample_size": image_size // 4,
      "in_channels": 4,
      "out_channels": 4,
      # Attention at the lower resolution only: at the higher one it would double the time of a step on a CPU.
      "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
      "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
      "block_out_channels": (64, 128),
      "layers_per_block": 1,
      "cross_attention_dim": 64,
      "attention_head_dim": 4,
      "norm_num_groups": 16,
      "use_linear_projection": True,
    }
  )
  config.text_encoder = ml_collections.ConfigDict(
    {
      "vocab_size": 1000,
      "hidden_size": 64,
      "intermediate_size": 128,
      "num_hidden_layers": 2,
      "num_attention_heads": 4,
      "max_position_embeddings": 77,
      "hidden_act": "gelu",
    }
  )
  # No pretrained text encoder of this size exists, so it is trained along.
  config.train_text_encoder = True
  sizes = {field: size for field, size in _TINY_CONDITIONER.items() if field in config.conditioner}
  config.conditioner.update(sizes)
  return config
