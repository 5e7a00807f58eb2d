"""`compdiff sample`: images for every row of a plan, from a trained run. The same command resumes."""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

import ml_collections

from compdiff_jax import cli, default_config, distributed, sharding
from compdiff_jax.diffusion.samplers import DEFAULT_SPACINGS, SPACINGS, make_table
from compdiff_jax.metrics import Progress
from compdiff_jax.sampling.gallery import sample_grid
from compdiff_jax.sampling.guidance import NULLS, parse_guidance
from compdiff_jax.sampling.job import make_generate, run_job
from compdiff_jax.sampling.plan import read_plan
from compdiff_jax.sampling.sampler import sampler_from_config
from compdiff_jax.workdir import open_run

_SAMPLER_OPTIONS = ("timestep_spacing", "eta", "karras")


def resolve_options(config: ml_collections.ConfigDict, args: argparse.Namespace) -> ml_collections.ConfigDict:
  """`config.sample` of the run with what the command line says; another sampler leaves the options of the run's."""
  options = ml_collections.ConfigDict(config)
  if args.sampler not in (None, options.sampler):
    defaults = default_config.base().sample
    options.update({name: defaults[name] for name in _SAMPLER_OPTIONS})
  given = {name: getattr(args, name, None) for name in options}
  options.update({name: value for name, value in given.items() if value is not None})
  return options


def main(argv: list[str]) -> None:
  parser = cli.parser("compdiff sample", __doc__)
  parser.add_argument("--workdir", type=Path, required=True, help="directory of a training run")
  parser.add_argument(
    "--plan", type=Path, required=True, help="CSV with text, one column per attribute, seed, negative"
  )
  parser.add_argument("--out", type=Path, required=True, help="directory for the images and manifest.csv")
  parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged or last parameters")
  parser.add_argument("--step", type=int, default=None, help="checkpoint; the latest if not given")
  parser.add_argument("--sampler", metavar="NAME", default=None, help=", ".join(DEFAULT_SPACINGS))
  parser.add_argument("--num_steps", type=int, default=None, help="steps; the run's config if not given")
  parser.add_argument("--timestep_spacing", metavar="NAME", default=None, help=", ".join(SPACINGS))
  parser.add_argument("--eta", type=float, default=None, help="ancestral noise of ddim, 0 to 1")
  parser.add_argument("--karras", action="store_true", default=None, help="Karras noise levels: dpmpp_2m, euler, unipc")
  parser.add_argument("--guidance", type=float, default=None, help="guidance scale; the run's config if not given")
  parser.add_argument(
    "--guidance_parts", metavar="WEIGHTS", default=None, help="other weights of parts, as 'demographics=4,age=2'"
  )
  parser.add_argument("--null", metavar="NAME", default=None, help=f"unconditional demographics: {', '.join(NULLS)}")
  parser.add_argument(
    "--guidance_rescale", type=float, default=None, help="0 to 1; against overexposure at high guidance"
  )
  parser.add_argument("--negative", default=None, help="negative prompt of the rows whose column `negative` is empty")
  parser.add_argument("--batch_size", type=int, default=None, help="images a batch; the run's config if not given")
  parser.add_argument("--grid", action="store_true", help="also draw every cell with the first row's text and seed")
  distributed.add_arguments(parser)
  args = parser.parse_args(argv)
  with distributed.session(args):
    sample(args)


def sample(args: argparse.Namespace) -> None:
  """Samples the plan into `args.out`."""
  # ---- Run, plan and sampler
  run = open_run(args.workdir)
  options = resolve_options(run.config.sample, args)
  sampler = sampler_from_config(options)
  table = make_table(sampler, run.model.schedule, options.num_steps)
  if options.batch_size < 1:
    raise cli.InputError(f"--batch_size {options.batch_size} must be at least 1")
  if not 0 <= options.guidance_rescale <= 1:
    raise cli.InputError(f"--guidance_rescale {options.guidance_rescale:g} must lie in 0 to 1")
  guidance = parse_guidance(options.guidance, options.guidance_parts, options.null, run.model)
  schema = run.model.schema
  conditioner = run.model.conditioner_config
  rows = read_plan(args.plan, schema, None if conditioner.represents_unknown else conditioner.select(schema))
  rows = [dataclasses.replace(row, negative=row.negative or options.negative) for row in rows]
  mesh = sharding.make_mesh(sharding.DATA_PARALLEL)
  step, trained = run.load_trained(args.weights, mesh, args.step)
  generate = make_generate(
    run.model,
    run.tokenizer,
    prompt_attributes=tuple(run.config.prompt_attributes),
    table=table,
    guidance=guidance,
    guidance_rescale=options.guidance_rescale,
    batch_size=options.batch_size,
    mesh=mesh,
  )
  generate = functools.partial(generate, run.complete(trained, mesh))

  # ---- Images
  settings = {
    "checkpoint_step": step,
    "model_sha256": run.identity(trained),
    "weights": args.weights,
    "sampler": sampler.name,
    "steps": options.num_steps,
    "timestep_spacing": sampler.timestep_spacing,
    "eta": sampler.eta,
    "karras": sampler.karras,
    "guidance": options.guidance,
    "guidance_parts": options.guidance_parts,
    "null": options.null,
    "guidance_rescale": options.guidance_rescale,
  }
  progress = None
  for done in run_job(args.out, rows, schema, generate, settings, options.batch_size):
    if distributed.is_writer():
      progress = progress or Progress(len(rows), done, "image")
      progress.update(done)
  if progress:
    progress.close()

  # ---- Grid
  if args.grid:
    first = rows[0]
    title = (
      f'"{first.text}"  seed {first.seed}, step {step}, {args.weights}, {sampler.name}, guidance {options.guidance:g}'
    )
    grid = sample_grid(generate, schema, first.text, first.seed, title, first.negative)
    if distributed.is_writer():
      grid.save(args.out / "grid.png")
      print(f"grid: {args.out / 'grid.png'}", file=sys.stderr)
  if distributed.is_writer():
    print(f"{len(rows)} images and manifest.csv in {args.out}")
