"""The whole chain on real chest X-rays at 64x64: the commands of configs/real_chest_toy.py, one after the other."""

import argparse
import json
import sys
from pathlib import Path

from launch.chain import step


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--source", type=Path, required=True, help="folder with metadata.csv and images/")
  parser.add_argument("--out", type=Path, default=Path("build/chest"))
  parser.add_argument("override", nargs="*", help="further --config.key=value, after a --")
  args = parser.parse_args()
  out = args.out
  config = [
    "--config=configs/real_chest_toy.py",
    f"--config.data.path={out / 'data'}",
    f"--config.weights.vae={out / 'vae'}",
    f"--config.weights.tokenizer={out / 'tokenizer'}",
    *args.override,
  ]
  data, run, plan, samples = out / "data", out / "run", out / "plan.csv", out / "samples"
  commands = {
    "data": ["python", "-m", "data_prep.table", "--csv", args.source / "metadata.csv", "--images",
             args.source / "images", "--config", "configs/data/chest_xray.py", "--fractions", "0.7,0.1,0.2",
             "--out", data],
    "vocabulary": ["python", "-m", "data_prep.vocabulary", "--data", data, "--out", out / "tokenizer"],
    "autoencoder": ["compdiff", "train-vae", f"--out={out / 'vae'}", *config],
    "training": ["compdiff", "train", f"--workdir={run}", *config],
    "plan": ["compdiff", "plan", f"--data={data}", "--balance=age,sex,view", "--per_cell=4", f"--out={plan}"],
    "sampling": ["compdiff", "sample", f"--workdir={run}", f"--plan={plan}", f"--out={samples}", "--grid"],
    "evaluation": ["compdiff", "evaluate", f"--real={data}", f"--synthetic={samples}", f"--out={out / 'report'}",
                   f"--vae_reconstructions={out / 'vae' / 'reconstructions.png'}"],
    "export": ["compdiff", "export", f"--workdir={run}", f"--out={out / 'export'}"],
  }  # fmt: skip
  seconds = {name: step(name, command) for name, command in commands.items()}
  print("\n" + json.dumps({**{k: round(v) for k, v in seconds.items()}, "total": round(sum(seconds.values()))}))
  print(f"look at {samples / 'grid.png'} and {out / 'report' / 'report.html'}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
