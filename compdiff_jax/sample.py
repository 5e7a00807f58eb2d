"""`compdiff sample`: images for every row of a plan, from a trained run. The same command resumes."""

import functools
import sys
from pathlib import Path

from compdiff_jax import cli
from compdiff_jax.metrics import Progress
from compdiff_jax.sampling.gallery import sample_grid
from compdiff_jax.sampling.job import make_generate, run_job
from compdiff_jax.sampling.plan import read_plan
from compdiff_jax.workdir import open_run


def main(argv: list[str]) -> None:
  parser = cli.parser("compdiff sample", __doc__)
  parser.add_argument("--workdir", type=Path, required=True, help="directory of a training run")
  parser.add_argument("--plan", type=Path, required=True, help="CSV with text, one column per attribute, and seed")
  parser.add_argument("--out", type=Path, required=True, help="directory for the images and manifest.csv")
  parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged or last parameters")
  parser.add_argument("--step", type=int, default=None, help="checkpoint; the latest if not given")
  parser.add_argument("--num_steps", type=int, default=None, help="DDIM steps; the run's config if not given")
  parser.add_argument("--guidance", type=float, default=None, help="guidance scale; the run's config if not given")
  parser.add_argument("--batch_size", type=int, default=None, help="images a batch; the run's config if not given")
  parser.add_argument("--grid", action="store_true", help="also draw every cell with the first row's text and seed")
  args = parser.parse_args(argv)

  # ---- Run and plan
  run = open_run(args.workdir)
  defaults = run.config.sample
  num_steps = defaults.num_steps if args.num_steps is None else args.num_steps
  guidance = defaults.guidance if args.guidance is None else args.guidance
  batch_size = defaults.batch_size if args.batch_size is None else args.batch_size
  if batch_size < 1:
    raise cli.InputError(f"--batch_size {batch_size} must be at least 1")
  schema = run.model.schema
  rows = read_plan(args.plan, schema)
  step, params = run.load_params(args.weights, args.step)
  sampler = make_generate(
    run.model,
    run.tokenizer,
    prompt_attributes=tuple(run.config.prompt_attributes),
    num_steps=num_steps,
    guidance=guidance,
    batch_size=batch_size,
  )
  generate = functools.partial(sampler, params)

  # ---- Images
  settings = {
    "checkpoint_step": step,
    "weights": args.weights,
    "sampler": "ddim",
    "steps": num_steps,
    "guidance": guidance,
  }
  progress = None
  for done in run_job(args.out, rows, schema, generate, settings, batch_size):
    progress = progress or Progress(len(rows), done, "image")
    progress.update(done)
  progress.close()

  # ---- Grid
  if args.grid:
    first = rows[0]
    title = f'"{first.text}"  seed {first.seed}, step {step}, {args.weights}, guidance {guidance:g}'
    sample_grid(generate, schema, first.text, first.seed, title).save(args.out / "grid.png")
    print(f"grid: {args.out / 'grid.png'}", file=sys.stderr)
  print(f"{len(rows)} images and manifest.csv in {args.out}")
