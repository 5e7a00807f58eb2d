"""`compdiff export`: a trained run as a diffusers directory, for `DiffusionPipeline.from_pretrained`."""

import dataclasses
from pathlib import Path

from compdiff_jax import cli
from compdiff_jax.diffusion.samplers import Sampler
from compdiff_jax.interop.export_directory import write_export
from compdiff_jax.interop.schedulers import to_diffusers
from compdiff_jax.workdir import open_run


def main(argv: list[str]) -> None:
  parser = cli.parser("compdiff export", __doc__)
  parser.add_argument("--workdir", type=Path, required=True, help="directory of a training run")
  parser.add_argument("--out", type=Path, required=True, help="new directory")
  parser.add_argument("--step", type=int, default=None, help="checkpoint; the latest if not given")
  which = parser.add_mutually_exclusive_group()
  which.add_argument("--ema", action="store_true", help="averaged parameters (this is the default)")
  which.add_argument("--raw", action="store_true", help="last parameters instead of averaged ones")
  parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="stored type")
  args = parser.parse_args(argv)

  run = open_run(args.workdir)
  weights = "raw" if args.raw else "ema"
  step, params = run.load_params(weights, args.step)
  model, config = run.model, run.config
  write_export(
    args.out,
    # The torch pipeline takes its default image size from here.
    unet_config=dataclasses.replace(model.unet_config, sample_size=model.latent_shape[0]),
    unet_params=params["unet"],
    vae_config=model.vae_config,
    vae_params=params["vae"],
    text_config=model.text_config,
    text_params=params["text_encoder"],
    tokenizer_dir=run.tokenizer.directory,
    scheduler_config=to_diffusers(model.schedule, Sampler()),
    conditioner=(model.conditioner_config, params["conditioner"], model.schema),
    prompt_attributes=tuple(config.prompt_attributes),
    card={
      "data": {"set": Path(config.data.path).name, "image size": f"{config.data.image_size} px"},
      "recipe": {
        "steps": step,
        "weights": weights,
        "batch size": config.train.batch_size,
        "learning rate": config.train.learning_rate,
        "trained parts": ", ".join(model.trained),
        "text dropout": config.dropout.text,
        "attribute dropout": f"{config.dropout.attribute}, all together {config.dropout.all_attributes}",
      },
    },
    dtype=args.dtype,
  )
  print(f"diffusers directory of step {step} ({weights}) in {args.out}")
