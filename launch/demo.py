"""`make demo`: phantoms -> vocabulary -> autoencoder -> training -> sampling -> evaluation -> export, on a laptop.

Every step is a documented command; nothing is downloaded. Delete the output directory to start over.
"""

import argparse
import json
import sys
from pathlib import Path

from compdiff_jax.metrics import read_metrics
from launch.chain import step

# Common enough for a few dozen test images, and all its pairs remain in training.
HELD_OUT = "age=40-60,sex=female,group=B"


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=Path, default=Path("build/demo"))
  out = parser.parse_args().out
  if out.exists() and any(out.iterdir()):
    print(f"{out} is not empty; remove it to run the demo again", file=sys.stderr)
    return 2
  config = [
    "--config=configs/demo.py",
    f"--config.data.path={out / 'data'}",
    f"--config.weights.vae={out / 'vae'}",
    f"--config.weights.tokenizer={out / 'tokenizer'}",
  ]
  seconds = {}

  def run(name: str, *command) -> None:
    seconds[name] = step(name, command)

  run("data", "python", "-m", "data_prep.phantom", "--out", out / "data", "--num", 1600, "--holdout", HELD_OUT)
  run("vocabulary", "python", "-m", "data_prep.vocabulary", "--data", out / "data", "--out", out / "tokenizer",
      "--length", 40)  # fmt: skip
  run("autoencoder", "compdiff", "train-vae", f"--out={out / 'vae'}", *config)
  run("training", "compdiff", "train", f"--workdir={out / 'run'}", *config)
  run("plan", "compdiff", "plan", f"--data={out / 'data'}", "--like=test", f"--out={out / 'plan.csv'}")
  run("sampling", "compdiff", "sample", f"--workdir={out / 'run'}", f"--plan={out / 'plan.csv'}",
      f"--out={out / 'samples'}", "--grid")  # fmt: skip
  run("evaluation", "compdiff", "evaluate", f"--real={out / 'data'}", f"--synthetic={out / 'samples'}",
      f"--out={out / 'report'}", f"--vae_reconstructions={out / 'vae' / 'reconstructions.png'}")  # fmt: skip
  run("export", "compdiff", "export", f"--workdir={out / 'run'}", f"--out={out / 'export'}")
  print_summary(out, seconds)
  return 0


def print_summary(out: Path, seconds: dict[str, float]) -> None:
  """The table at the end: what was reached, how long it took, where the pictures are."""
  report = json.loads((out / "report" / "report.json").read_text())
  last = read_metrics(out / "run")[-1]
  print("\n== Result (toy scale: phantoms, 64 px)")
  print(f"  {'denoising loss, training':<70}{last['diffusion']:.4f}")
  for row in report["headline"]:
    value = f"{row['value']:.4g}" if "value" in row else ""
    print(f"  {row['measure'] + ', ' + row['group']:<70}{', '.join(filter(None, (value, row.get('status'))))}")
  print("  " + "  ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
  print(f"  {'total':<66}{sum(seconds.values()) / 60:.1f} min")
  for name, path in (("grid", "samples/grid.png"), ("report", "report/report.html"), ("export", "export")):
    print(f"  {name:<8}{out / path}")


if __name__ == "__main__":
  sys.exit(main())
