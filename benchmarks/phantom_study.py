"""The study: all methods on the phantom with one budget, one order of data and the same seeds, and cells held out.

  python -m benchmarks.phantom_study --out build/study --quick     two CPU cores
  python -m benchmarks.phantom_study --out build/study             one GPU

The same command goes on where it stopped. It draws the data, trains one autoencoder that all methods share, trains and
samples every method and seed, measures, and writes tables (Markdown and CSV), plots and a picture grid to --out.

Real images to compare with are a population of their own, one a patient: a number in every seen cell, and a larger one
in every held-out cell. So every cell can be judged. Each run samples exactly their texts and attributes.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import study_runs
from benchmarks.study_runs import Budget, Study
from compdiff_jax import cli
from compdiff_jax.data.records import RecordSet
from data_prep.dataset import write_dataset
from data_prep.phantom import __main__ as phantom
from data_prep.phantom.population import SCHEMA, PhantomImages, row, visit_of

_MODULE = "benchmarks.phantom_study"
# Eight of the 32 cells, balanced: two cells of each age and of each group, one of each sex; every pair of
# levels remains in training. Not the rarest: most would have enough images if they were not held out.
HELD_OUT = (
  "age=18-40,sex=female,group=A",
  "age=18-40,sex=male,group=B",
  "age=40-60,sex=female,group=B",
  "age=40-60,sex=male,group=D",
  "age=60-80,sex=female,group=D",
  "age=60-80,sex=male,group=C",
  "age=80+,sex=female,group=C",
  "age=80+,sex=male,group=A",
)
# Seeds of the phantom. References before: 1 while methods were tuned, 2 and 3 in earlier forms of the study.
_POPULATION, _REFERENCE = 0, 4
IMAGE_SIZE = 32
# What differs from the configs of the methods, for all of them. Latents are 8 x 8; attention is at 4 x 4.
NETWORKS = {
  "data.image_size": IMAGE_SIZE,
  "vae.sample_size": IMAGE_SIZE,
  "unet.sample_size": IMAGE_SIZE // 4,
}
TEXT_LENGTH = 40
# Phantoms drawn for train, val and test together; real images to compare with in a seen and in a held-out cell.
SIZES = {"quick": (4000, 40, 80), "full": (12_000, 60, 120)}
BUDGETS = {
  "quick": Budget(vae_steps=800, vae_batch_size=32, steps=600, batch_size=32, learning_rate=4e-3, sample_steps=20),
  "full": Budget(vae_steps=4000, vae_batch_size=32, steps=4000, batch_size=128, learning_rate=2e-3),
}


def main(argv: list[str]) -> None:
  parser = cli.parser(f"python -m {_MODULE}", __doc__.splitlines()[0])
  study_runs.add_arguments(parser)
  parser.add_argument("--quick", action="store_true", help="the size for two CPU cores")
  parser.add_argument("--real", type=_two_sizes, metavar="SEEN,HELD_OUT", help="real images to compare with, a cell")
  parser.add_argument("--cells", type=_cells, default=HELD_OUT, metavar="SPEC", help="cells to hold out, joined by ;")
  args = parser.parse_args(argv)
  study_runs.chosen_methods(args)
  form = "quick" if args.quick else "full"
  budget = study_runs.chosen_budget(args, BUDGETS[form])
  study = Study(args.out, SCHEMA.names, NETWORKS, budget, TEXT_LENGTH)
  if args.job:
    study_runs.run_job(study, args)
    return
  images, seen, held_out = SIZES[form]
  if args.real:
    seen, held_out = args.real
  prepare(args.out, images, seen, held_out, args.cells)
  on_cpu = args.quick or os.environ.get("JAX_PLATFORMS", "") == "cpu"
  study_runs.run(study, _MODULE, argv, args, on_cpu=on_cpu, title="Phantom study")


def _two_sizes(text: str) -> tuple[int, int]:
  seen, _, held_out = text.partition(",")
  if not (seen.isdecimal() and held_out.isdecimal() and int(seen) and int(held_out)):
    raise argparse.ArgumentTypeError(f"{text!r} is not two numbers as 40,80")
  return int(seen), int(held_out)


def _cells(text: str) -> tuple[str, ...]:
  cells = [SCHEMA.parse_cell(part) for part in text.split(";")]
  if any(len(cell) < len(SCHEMA.names) for cell in cells):
    raise argparse.ArgumentTypeError(f"{text!r} has cells that do not name all of {', '.join(SCHEMA.names)}")
  return tuple(SCHEMA.cell_name(cell) for cell in cells)


def prepare(out: Path, images: int, seen: int, held_out: int, cells: Sequence[str] = HELD_OUT) -> None:
  """Draws the data and the reference, each once."""
  if not (out / "data" / "dataset_info.json").exists():
    options = ["--num", images, "--size", IMAGE_SIZE, "--seed", _POPULATION, "--holdout", ";".join(cells)]
    phantom.main(["--out", str(out / "data"), *map(str, options)])
  if set(found := RecordSet(out / "data").held_out) != set(cells):
    raise cli.InputError(f"{out} holds out {';'.join(found)}; go on with these (--cells) or a new --out")
  reference = out / "reference"
  if not (reference / "dataset_info.json").exists():
    write_reference(reference, seen, held_out, cells)
  size = seen * (len(SCHEMA.cells()) - len(cells)) + held_out * len(cells)
  if (found := RecordSet(reference).splits["test"]) != size:
    raise cli.InputError(f"{reference} has {found} images and not {size}; go on with its sizes (--real) or a new --out")


def write_reference(path: Path, seen: int, held_out: int, cells: Sequence[str] = HELD_OUT) -> None:
  """Real images of other patients than those of training: the first `seen` or `held_out` of a cell, one a patient."""
  names = [SCHEMA.cell_name(cell) for cell in SCHEMA.cells()]
  missing = {name: held_out if name in cells else seen for name in names}
  chosen, index = [], 0
  while any(missing.values()):
    if visit_of(_REFERENCE, index)[1] == 0:
      candidate = row(_REFERENCE, index)
      levels = {a.name: int(a.levels(np.array([candidate["attributes"][a.name]]))[0]) for a in SCHEMA}
      name = SCHEMA.cell_name(levels)
      if missing[name]:
        missing[name] -= 1
        chosen.append(candidate)
    index += 1
  write_dataset(
    path,
    name="phantom",
    schema=SCHEMA,
    examples=chosen,
    encode=PhantomImages(_REFERENCE, IMAGE_SIZE),
    description="Phantoms for comparison; no patient of these is in training.",
    size=IMAGE_SIZE,
    command=f"python -m {_MODULE}",
    fractions=(0, 0, 1),
  )


if __name__ == "__main__":
  sys.exit(cli.run(main, f"python -m {_MODULE}"))
