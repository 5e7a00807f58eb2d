"""`compdiff plan`: writes a sampling plan, balanced over intersections or copied from a split."""

from compdiff_jax import cli
from compdiff_jax.cli import InputError
from compdiff_jax.data.records import RecordSet
from compdiff_jax.sampling.plan import balanced_plan, copied_plan, write_plan


def main(argv: list[str]) -> None:
  parser = cli.parser("compdiff plan", __doc__)
  parser.add_argument("--data", required=True, help="data set directory: its schema, texts and continuous values")
  parser.add_argument("--balance", help="attributes whose every combination gets --per_cell rows, e.g. age,sex,race")
  parser.add_argument("--per_cell", type=int, help="rows per combination, with --balance")
  parser.add_argument("--split", help="split that texts are drawn from, with --balance (default: train)")
  parser.add_argument("--like", help="instead of --balance: copy text and attributes of each record of this split")
  parser.add_argument("--seed", type=int, default=0, help="decides every draw and the images' seeds")
  parser.add_argument("--out", required=True, help="CSV file to write; must not exist")
  args = parser.parse_args(argv)
  if (args.balance is None) == (args.like is None):
    raise InputError("give either --balance=ATTRIBUTES --per_cell=N or --like=SPLIT")
  if (args.per_cell is None) != (args.balance is None):
    raise InputError("--per_cell=N goes with --balance=ATTRIBUTES")
  if args.split is not None and args.balance is None:
    raise InputError("--split goes with --balance; --like names its own split")
  if args.seed < 0:
    raise InputError(f"--seed {args.seed} must not be negative")
  records = RecordSet(args.data)
  if args.like is not None:
    rows = copied_plan(records, args.like, args.seed)
    what = f"as in {args.data} {args.like}"
  else:
    attributes = [name.strip() for name in args.balance.split(",")]
    rows = balanced_plan(records, attributes, args.per_cell, args.split or "train", args.seed)
    what = f"{len(rows) // args.per_cell} cells x {args.per_cell}"
  write_plan(args.out, rows, records.schema)
  print(f"{args.out}: {len(rows)} rows, {what}")
