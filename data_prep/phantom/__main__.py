"""python -m data_prep.phantom --out DIR --num N: draws a procedural chest phantom data set."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from compdiff_jax import cli
from data_prep.dataset import add_scale_arguments, command_line, parse_cells, scale_options, write_dataset
from data_prep.phantom.population import SCHEMA, PhantomImages, rows

_PROG = "python -m data_prep.phantom"
_SIZES = (16, 1024)
_DESCRIPTION = (
  "Procedural phantoms of frontal chest radiographs. Age, sex and a four-valued abstract group shape the anatomy,"
  " with pairwise interactions; findings are drawn and named in the text. `factors` holds every number that was drawn,"
  " so the truth is exact. Nothing here comes from a person, and the groups stand for nobody."
)


def _counted(items: Iterable[dict], cells: Counter) -> Iterator[dict]:
  """Passes the examples on and counts their cells on the way."""
  for item in items:
    levels = {a.name: int(a.levels(np.array([item["attributes"][a.name]]))[0]) for a in SCHEMA}
    cells[SCHEMA.cell_name(levels)] += 1
    yield item


def main(argv: list[str]) -> None:
  parser = cli.parser(_PROG, "Draws a procedural chest phantom data set; image i depends on the seed and i only.")
  parser.add_argument("--out", required=True, metavar="DIR", help="new or empty directory for the data set")
  parser.add_argument("--num", required=True, type=int, metavar="N", help="number of images in all splits together")
  parser.add_argument("--size", default=64, type=int, help="image height and width in pixels, 16 to 1024")
  parser.add_argument("--seed", default=0, type=int, help="another seed, another population")
  parser.add_argument(
    "--holdout",
    default="",
    metavar="CELLS",
    help='cells kept out of train and val, such as "age=60-80,sex=female,group=D;age=80+,sex=male,group=C"',
  )
  add_scale_arguments(parser)
  args = parser.parse_args(argv)
  if args.num <= 0:
    raise cli.InputError(f"--num {args.num}: give a positive number of images")
  if not _SIZES[0] <= args.size <= _SIZES[1]:
    raise cli.InputError(f"--size {args.size}: give {_SIZES[0]} to {_SIZES[1]} pixels")
  if args.seed < 0:
    raise cli.InputError(f"--seed {args.seed}: give 0 or a positive number")
  held_out = parse_cells(args.holdout, SCHEMA)

  cells = Counter({SCHEMA.cell_name(cell): 0 for cell in SCHEMA.cells()})
  write_dataset(
    args.out,
    name="phantom",
    schema=SCHEMA,
    examples=_counted(rows(args.seed, args.num), cells),
    encode=PhantomImages(args.seed, args.size),
    description=_DESCRIPTION,
    held_out=held_out,
    size=args.size,
    command=command_line(_PROG, argv),
    **scale_options(args),
  )
  rarest, count = min(cells.items(), key=lambda item: item[1])
  print(
    f"  rarest cell: {rarest}, {count} of {args.num} images; {sum(n > 0 for n in cells.values())} of {len(cells)} occur"
  )


if __name__ == "__main__":
  sys.exit(cli.run(main, _PROG))
