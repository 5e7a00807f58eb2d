"""`python -m benchmarks.convert`: time and memory of export and import with the UNet of SD 2.1 at its true size.

Random values; beside the UNet stand a toy VAE and a text encoder of one layer. Three stages, each in a process of its
own, which prints one JSON line:

  export, float32   a run in memory -> a diffusers directory
  import            that directory -> a run: `compdiff import` from start to end
  export, float16   that run -> a diffusers directory

`beyond` is the peak of resident memory (VmHWM, mapped files count) above what the process held before: for the exports
that is the loaded checkpoint, for the import nothing. `of_unet` divides it by the size of the UNet in float32. Needs
Linux, 12 GB of disk and 10 GB of memory.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGES = ("export, float32", "import", "export, float16")
_WIDTH = 1024


def _status(field: str) -> int:
  """A line of /proc/self/status in bytes."""
  lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
  return int(lines[field].split()[0]) * 1024


def _measure(work: Callable[[], Any], unet_bytes: int) -> dict[str, Any]:
  before = _status("VmRSS")
  Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
  start = time.perf_counter()
  work()
  seconds = time.perf_counter() - start
  beyond = max(0, _status("VmHWM") - before)
  return {"seconds": round(seconds, 1), "beyond_GB": round(beyond / 1e9, 2), "of_unet": round(beyond / unet_bytes, 2)}


def _random_model() -> dict[str, Any]:
  """Arguments of `write_export`: the UNet of SD 2.1 and the smallest networks that go with it."""
  import jax.numpy as jnp
  import numpy as np

  from compdiff_jax.conditioning.none import NoConditionerConfig
  from compdiff_jax.conditioning.schema import Schema
  from compdiff_jax.data.tokenizer import SMALLEST_VOCABULARY
  from compdiff_jax.models import (
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextModel,
    Functional,
    UNet2DCondition,
    UNetConfig,
    VAEConfig,
  )

  unet = UNetConfig(
    sample_size=64,
    block_out_channels=(320, 640, 1280, 1280),
    attention_head_dim=(5, 10, 20, 20),
    cross_attention_dim=_WIDTH,
    use_linear_projection=True,
  )
  vae = VAEConfig(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(8,) * 4,
    norm_num_groups=4,
  )
  text = CLIPTextConfig(
    vocab_size=SMALLEST_VOCABULARY, hidden_size=_WIDTH, intermediate_size=_WIDTH, num_hidden_layers=1
  )
  networks = {
    "unet": (unet, Functional(lambda rngs: UNet2DCondition(unet, rngs=rngs))),
    "vae": (vae, Functional(lambda rngs: AutoencoderKL(vae, rngs=rngs))),
    "text": (text, Functional(lambda rngs: CLIPTextModel(text, rngs=rngs))),
  }
  generator = np.random.default_rng(0)
  arguments = {"conditioner": (NoConditionerConfig(d_ctx=_WIDTH), {}, Schema(())), "card": {}}
  for name, (config, network) in networks.items():
    arguments[f"{name}_config"] = config
    arguments[f"{name}_params"] = {
      key: jnp.asarray(0.02 * generator.standard_normal(spec.shape, np.float32)) for key, spec in network.shapes.items()
    }
  return arguments


def _unet_bytes(shapes: dict[str, Any]) -> int:
  return sum(4 * math.prod(leaf.shape) for leaf in shapes.values())


def _export_random(directory: Path) -> dict[str, Any]:
  import jax

  from compdiff_jax.data.tokenizer import SMALLEST_VOCABULARY, train_tokenizer
  from compdiff_jax.diffusion.samplers import Sampler
  from compdiff_jax.diffusion.schedule import NoiseSchedule
  from compdiff_jax.interop.export_directory import write_export
  from compdiff_jax.interop.schedulers import to_diffusers

  train_tokenizer(["No finding."], directory / "tokenizer", SMALLEST_VOCABULARY)
  arguments = jax.block_until_ready(_random_model())
  arguments |= {"tokenizer_dir": directory / "tokenizer", "scheduler_config": to_diffusers(NoiseSchedule(), Sampler())}
  return _measure(lambda: write_export(directory / "first", **arguments), _unet_bytes(arguments["unet_params"]))


def _import(directory: Path) -> dict[str, Any]:
  from compdiff_jax import import_weights
  from compdiff_jax.interop.weights import find_weights, stored_shapes

  shapes = stored_shapes(find_weights(directory / "first" / "unet"))
  arguments = [f"--source={directory / 'first'}", f"--workdir={directory / 'run'}"]
  return _measure(lambda: import_weights.main(arguments), sum(4 * math.prod(shape) for shape in shapes.values()))


def _export_again(directory: Path) -> dict[str, Any]:
  import jax

  from compdiff_jax.interop import weights
  from compdiff_jax.workdir import open_run

  run = open_run(directory / "run")
  params = jax.block_until_ready(run.load_params("raw")[1]["unet"])
  config = run.model.unet_config.to_dict()
  return _measure(
    lambda: weights.save_component(directory / "half", config, params, "UNet2DConditionModel", "float16", 2 * 10**9),
    _unet_bytes(params),
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--dir", type=Path, help="where the files go, and stay; a temporary directory if not given")
  parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.stage:
    work = dict(zip(STAGES, (_export_random, _import, _export_again)))[args.stage]
    print(json.dumps({"stage": args.stage, **work(args.dir)}))
    return
  with tempfile.TemporaryDirectory() as temporary:
    directory = args.dir or Path(temporary)
    directory.mkdir(exist_ok=True)
    for stage in STAGES:
      command = [sys.executable, "-m", "benchmarks.convert", "--stage", stage, "--dir", str(directory)]
      result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
      print(result.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
  main()
