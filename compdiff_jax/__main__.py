"""`compdiff <verb>` = `python -m compdiff_jax <verb>`."""

import importlib
import sys
import traceback

from compdiff_jax import cli

# verb -> (module with main(argv), one line for --help). Modules are imported only when their verb is called.
VERBS = {
  "train": ("compdiff_jax.train", "train the UNet and the conditioner from a config"),
  "train-vae": ("compdiff_jax.train_vae", "train or fine-tune the autoencoder on a data set"),
  "compile": (
    "compdiff_jax.compile",
    "does a training step or the sampler fit TPUs, GPUs or this machine, and how fast could it be",
  ),
  "plan": ("compdiff_jax.plan", "write a sampling plan, for example balanced over intersections"),
  "sample": ("compdiff_jax.sample", "generate images for a plan"),
  "evaluate": ("compdiff_jax.evaluate", "compare a synthetic set with real images"),
  "import": ("compdiff_jax.import_weights", "read a diffusers directory or a checkpoint of the reference"),
  "export": ("compdiff_jax.export", "write a run as a diffusers directory"),
}


def main(argv: list[str]) -> None:
  usage = "usage: compdiff <verb> [options]\n\n" + "\n".join(f"  {verb:<11}{text}" for verb, (_, text) in VERBS.items())
  if not argv or argv[0] in ("-h", "--help"):
    print(f"{usage}\n\ncompdiff <verb> --help lists a verb's options")
    return
  if argv[0] not in VERBS:
    raise cli.InputError(f"unknown verb {argv[0]!r}{cli.nearest(argv[0], VERBS)}")
  importlib.import_module(VERBS[argv[0]][0]).main(argv[1:])


def console() -> int:
  prog = "compdiff" if len(sys.argv) < 2 or sys.argv[1] not in VERBS else f"compdiff {sys.argv[1]}"
  try:
    status = cli.run(main, prog)
  except Exception:
    traceback.print_exc()
    status = 1
  if status and "jax" in sys.modules:
    from compdiff_jax import distributed

    distributed.leave(status)
  return status


if __name__ == "__main__":
  sys.exit(console())
