"""`compdiff export`: a run as a diffusers directory, for `DiffusionPipeline.from_pretrained`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from compdiff_jax import cli, sharding
from compdiff_jax.cli import InputError
from compdiff_jax.data.input_pipeline import data_sets
from compdiff_jax.interop.export_directory import LAYOUTS, write_export
from compdiff_jax.interop.safetensors_file import DTYPES, parse_size
from compdiff_jax.interop.schedulers import to_diffusers
from compdiff_jax.interop.weights import save_weights
from compdiff_jax.metrics import read_metrics
from compdiff_jax.sampling.sampler import sampler_from_config
from compdiff_jax.workdir import Run, open_run


def main(argv: list[str]) -> None:
  parser = cli.parser("compdiff export", __doc__)
  parser.add_argument("--workdir", type=Path, required=True, help="directory of a training run or an imported model")
  parser.add_argument("--out", type=Path, required=True, help="new directory")
  parser.add_argument("--step", type=int, default=None, help="checkpoint; the latest if not given")
  which = parser.add_mutually_exclusive_group()
  which.add_argument("--ema", action="store_true", help="averaged parameters (this is the default)")
  which.add_argument("--raw", action="store_true", help="last parameters instead of averaged ones")
  parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="stored type")
  parser.add_argument("--max_shard_size", default=None, help="most data in one file of weights, such as 5GB")
  parser.add_argument(
    "--layout", choices=LAYOUTS, default=LAYOUTS[0], help="'reference' is for the pipeline of the PyTorch reference"
  )
  parser.add_argument("--report", type=Path, help="directory of compdiff evaluate, whose figures the model card shows")
  parser.add_argument("--lora", action="store_true", help="only the LoRA of the UNet, for pipe.load_lora_weights(DIR)")
  args = parser.parse_args(argv)

  if args.lora and args.report:
    raise InputError("--lora writes no model card, which --report is for; leave one of them out")
  max_bytes = parse_size(args.max_shard_size) if args.max_shard_size else None
  figures, sampling = _read_report(args.report) if args.report else ({}, {})
  run = open_run(args.workdir)
  weights = "imported" if run.source else "raw" if args.raw else "ema"
  if args.lora:
    step = _export_lora(run, args.out, "raw" if args.raw else "ema", args.step, args.dtype)
    print(f"LoRA of step {step} ({weights}) in {args.out}")
    return
  mesh = sharding.make_mesh(sharding.DATA_PARALLEL)
  step, trained = run.load_trained("raw" if args.raw else "ema", mesh, args.step)
  if args.report:
    figures = {"images": _evaluated_images(sampling, args.report, run.identity(trained)), **figures}
  params = run.complete(trained, mesh)
  model = run.model
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
    scheduler_config=to_diffusers(model.schedule, sampler_from_config(run.config.sample)),
    conditioner=(model.conditioner_config, params.get("conditioner", {}), model.schema),
    prompt_attributes=tuple(run.config.prompt_attributes),
    null=run.config.sample.null,
    card={**_described(run, step, weights), "metrics": figures},
    dtype=args.dtype,
    max_bytes=max_bytes,
    layout=args.layout,
  )
  print(f"diffusers directory of step {step} ({weights}) in {args.out}")


def _export_lora(run: Run, out: Path, weights: str, step: int | None, dtype: str) -> int:
  """Writes the low-rank factors of a run under the names that diffusers and PEFT have for them."""
  if run.model.lora is None:
    raise InputError(f"--lora: {run.workdir} has trained the UNet itself (lora.rank is 0); leave the option out")
  step, trained = run.load_trained(weights, sharding.make_mesh(sharding.DATA_PARALLEL), step)
  with cli.whole_directory(out) as directory, cli.writing(out):
    factors = run.model.lora.unscaled(trained["lora"])
    save_weights(directory, "pytorch_lora_weights", {f"unet.{name}": x for name, x in factors.items()}, dtype)
  return step


def _described(run: Run, step: int, weights: str) -> dict[str, Any]:
  """The example prompt and the tables "data" and "recipe" of the model card."""
  size = f"{run.model.image_size} px"
  if run.source:
    recipe = {"weights": f"imported from {run.source['name']} ({run.source['kind']})"}
    return {"data": {"set": "not known to the import", "image size": size}, "recipe": recipe | _steps(step)}
  config = run.config
  start = {"started from": Path(config.init).name} if config.get("init") else {}
  return {
    "text": config.sample.text,
    "data": {"set": ", ".join(map(_weighted_name, data_sets(config.data))), "image size": size},
    "recipe": {
      **start,
      **_steps(step),
      "weights": weights,
      "batch size": config.train.batch_size,
      "learning rate": config.train.learning_rate,
      "trained parts": ", ".join(run.model.trained),
      "text dropout": config.dropout.text,
      "attribute dropout": f"{config.dropout.attribute}, all together {config.dropout.all_attributes}",
      **_last_loss(run.workdir, step),
    },
  }


def _weighted_name(data_set: tuple[str, float]) -> str:
  path, weight = data_set
  return Path(path).name if weight == 1 else f"{Path(path).name} (weight {weight:g})"


def _steps(step: int) -> dict[str, int]:
  return {"steps": step} if step else {}


def _last_loss(workdir: Path, step: int) -> dict[str, float]:
  """The training loss of the last report up to `step`, where there is one."""
  losses = [row["loss"] for row in read_metrics(workdir) if row["step"] <= step]
  return {"training loss": losses[-1]} if losses else {}


def _read_report(directory: Path) -> tuple[dict[str, str], dict[str, Any]]:
  """The short table of a report as {measure and group: figure}, and how its synthetic images were sampled."""
  path = directory / "report.json"
  try:
    report = json.loads(path.read_text())
    figures = {f"{row['measure']}, {row['group']}": _figure(row) for row in report["headline"]}
    return figures, report["inputs"]["synthetic"].get("sampling", {})
  except OSError as error:
    raise InputError(f"cannot read {path}: {error.strerror}; give as --report the --out of compdiff evaluate") from None
  except (KeyError, TypeError, ValueError):
    raise InputError(f"{path} is not a report of compdiff evaluate; give as --report its --out") from None


def _evaluated_images(sampling: dict[str, Any], directory: Path, model_sha256: str) -> str:
  """Which images a report in `directory` is about. Raises InputError where another model made them."""
  if "model_sha256" not in sampling:
    return "not made by compdiff sample: the report does not say by which model"
  if sampling["model_sha256"] != model_sha256:
    raise InputError(
      f"{directory} is about images of another model (step {sampling['checkpoint_step']}, {sampling['weights']}; its"
      f" model_sha256 is {sampling['model_sha256'][:12]}, here {model_sha256[:12]}); evaluate images of this one, or"
      " choose that one with --workdir, --step, --ema or --raw"
    )
  said = {name: sampling.get(name, "") for name in ("sampler", "steps", "guidance", "guidance_parts", "null")}
  return ", ".join(f"{name} {value}" for name, value in said.items() if value != "")


def _figure(row: dict[str, Any]) -> str:
  """Value, numbers of images, reference and status, as far as the row has them."""
  if row.get("value") is None:
    return row.get("status", "not measured")
  counts = [f"{row[key]} {side}" for key, side in (("n_synthetic", "synthetic"), ("n_real", "real")) if key in row]
  images = f", {' and '.join(counts)} images" if counts else ""
  reference = row.get("reference_name", "")
  if "reference" in row:
    figure = _with_interval(row["reference"], row.get("reference_lo"), row.get("reference_hi"))
    reference = f"reference {figure}, {reference}"
  value = _with_interval(row["value"], row.get("lo"), row.get("hi"))
  return "; ".join(filter(None, (f"{value}{images}", reference, row.get("status"))))


def _with_interval(value: float, low: float | None, high: float | None) -> str:
  return f"{value:.4g}" if low is None else f"{value:.4g} ({low:.4g} to {high:.4g})"
