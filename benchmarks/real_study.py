"""The study on real pictures, toy scale: all methods on 300 fundus photographs or 198 chest X-rays.

  python -m benchmarks.real_study --data fundus --source FOLDER --out build/study_fundus
  python -m benchmarks.real_study --data chest  --source FOLDER --out build/study_chest

FOLDER holds metadata.csv and images/, as configs/data/fundus.py and configs/data/chest_xray.py describe them. Two cores
are enough. Real images to compare with are those of test patients and of the held-out cell; each run samples exactly
their texts and attributes. A model of this size memorises: look at its pictures, publish none.
"""

import dataclasses
import sys
from pathlib import Path

import ml_collections

from benchmarks import study_runs
from benchmarks.study_runs import Budget, Study
from compdiff_jax import cli
from compdiff_jax.config import load_config
from data_prep.dataset import parse_cells, write_dataset
from data_prep.table import TableReader

_MODULE = "benchmarks.real_study"
_SIZE = 64
# An autoencoder that halves three times, as Stable Diffusion's: 8 x 8 latents.
NETWORKS = {
  "data.image_size": _SIZE,
  "vae.sample_size": _SIZE,
  "vae.block_out_channels": (16, 32, 64, 64),
  "vae.down_block_types": ("DownEncoderBlock2D",) * 4,
  "vae.up_block_types": ("UpDecoderBlock2D",) * 4,
  "unet.sample_size": _SIZE // 8,
}
BUDGET = Budget(vae_steps=500, vae_batch_size=16, steps=300, batch_size=32, learning_rate=4e-3, min_n=10)
_GRADES = {"no DR": "no DR", "mild": "NPDR", "moderate": "NPDR", "severe": "NPDR"}  # the others: PDR


@dataclasses.dataclass(frozen=True)
class Case:
  """`config` of data_prep.table, the cell that is held out, and the attributes, first the one HCN v1 names in words."""

  config: str
  held_out: str
  attributes: tuple[str, ...]


CASES = {
  "fundus": Case("configs/data/fundus.py", "eye=left,grade=NPDR,maculopathy=present", ("grade", "eye", "maculopathy")),
  "chest": Case("configs/data/chest_xray.py", "age=40-60,sex=female,view=PA", ("age", "sex", "view")),
}


def main(argv: list[str]) -> None:
  parser = cli.parser(f"python -m {_MODULE}", __doc__.splitlines()[0])
  parser.add_argument("--data", required=True, choices=sorted(CASES), help="which data")
  parser.add_argument("--source", type=Path, required=True, help="folder with metadata.csv and images/")
  study_runs.add_arguments(parser)
  args = parser.parse_args(argv)
  study_runs.chosen_methods(args)
  case = CASES[args.data]
  study = Study(args.out, case.attributes, NETWORKS, study_runs.chosen_budget(args, BUDGET))
  if args.job:
    study_runs.run_job(study, args)
    return
  if not (args.out / "data" / "dataset_info.json").exists():
    prepare(args.out / "data", case, args.source)
  study_runs.run(study, _MODULE, argv, args, on_cpu=True, title=f"Study on real pictures: {args.data}")


def prepare(path: Path, case: Case, source: Path) -> None:
  """Writes the data set: three fifths of the patients train, the others and those of the held-out cell test."""
  config = load_config(case.config, [f"--config.size={_SIZE}"])
  with config.unlocked():
    config.attributes = tuple(_grouped(dict(entry)) for entry in config.attributes)
  reader = TableReader(source / "metadata.csv", source / "images", config)
  write_dataset(
    path,
    name=config.name,
    schema=reader.schema,
    examples=reader,
    encode=reader.encode,
    description=config.description,
    licence=config.licence,
    size=config.size,
    command=f"python -m {_MODULE}",
    held_out=parse_cells(case.held_out, reader.schema),
    fractions=(0.6, 0, 0.4),
  )


def _grouped(entry: dict) -> dict | ml_collections.ConfigDict:
  """The grade of retinopathy in three groups: none, non-proliferative (NPDR), proliferative and advanced (PDR)."""
  if entry["name"] != "grade":
    return entry
  mapping = {raw: _GRADES.get(grade, "PDR") for raw, grade in entry["mapping"].items()}
  return {**entry, "values": ("no DR", "NPDR", "PDR"), "mapping": mapping}


if __name__ == "__main__":
  sys.exit(cli.run(main, f"python -m {_MODULE}"))
