"""`make parity-full`: the networks of SD 2.1 at their true size against torch, once; writes docs/parity_full.md.

float32, random weights as torch draws them, one image of 512x512 pixels (64x64 latents), 81 context tokens. One network
at a time, with torch first: the UNet takes about 10 GiB. Nothing is asserted; `make parity` has the bounds.
"""

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch

from benchmarks.tables import machine, table
from tests import torch_parity
from tests.network_configs import SD21_BASE

PAGE = Path("docs/parity_full.md")
TEXT = """# Parity with PyTorch at full size

Written by `make parity-full` (`python -m benchmarks.parity_full`); small configurations, gradients and samplers are in
[parity.md](parity.md). {machine}

The networks of Stable Diffusion 2.1 in float32, with random weights as torch draws them: one image of 512×512 pixels,
64×64 latents, 81 context tokens. Times are of one call, with all cores; JAX's compilation is apart. Other programs that
run at the same time lengthen them.

{table}
"""
HEADER = ("network", "parameters", "output std", "max difference", "torch (s)", "JAX (s)", "JAX compile (s)")


def _torch_moments(model, images):
  posterior = model.encode(torch_parity.nchw(images)).latent_dist
  return torch_parity.nhwc(torch.cat([posterior.mean, posterior.logvar], dim=1))


def _measure(name: str, component: str, method: str, call_torch: Callable, *inputs: np.ndarray) -> list[str]:
  """One row of the table."""
  torch.manual_seed(0)
  model = torch_parity.build_torch(component, SD21_BASE[component]).eval()
  start = time.perf_counter()
  with torch.no_grad():
    theirs = call_torch(model, *inputs)
  torch_seconds = time.perf_counter() - start

  functional = torch_parity.build_jax(component, SD21_BASE[component])
  params = torch_parity.params_of(model, functional)
  del model
  gc.collect()
  start = time.perf_counter()
  program = jax.jit(lambda *arguments: functional(*arguments, method=method)).lower(params, *inputs).compile()
  compile_seconds = time.perf_counter() - start
  start = time.perf_counter()
  ours = np.asarray(program(params, *inputs))
  jax_seconds = time.perf_counter() - start

  count = sum(array.size for array in params.values())
  seconds = [f"{value:.1f}" for value in (torch_seconds, jax_seconds, compile_seconds)]
  row = [name, f"{count:,}", f"{theirs.std():.2f}", f"{np.abs(ours - theirs).max():.1e}", *seconds]
  print(*row, sep="  ", flush=True)
  return row


def main() -> None:
  torch.set_num_threads(os.cpu_count())
  sample, context = torch_parity.normal(1, 1, 64, 64, 4), torch_parity.normal(2, 1, 81, 1024)
  print(*HEADER, sep="  ")
  rows = [
    _measure(
      "UNet",
      "unet",
      "__call__",
      lambda model, *inputs: torch_parity.nhwc(torch_parity.call_torch_unet(model, *inputs)),
      *(sample, np.array([501]), context),
    ),
    _measure("VAE, encode", "vae", "encode", _torch_moments, np.tanh(torch_parity.normal(3, 1, 512, 512, 3))),
    _measure(
      "VAE, decode",
      "vae",
      "decode",
      lambda model, latents: torch_parity.nhwc(model.decode(torch_parity.nchw(latents)).sample),
      sample,
    ),
    _measure(
      "text encoder",
      "text_encoder",
      "__call__",
      lambda model, ids: model(torch.from_numpy(ids)).last_hidden_state.numpy(),
      np.random.default_rng(4).integers(0, 49408, (1, 77)),
    ),
  ]
  packages = machine("jax", "flax", "torch", "diffusers", "transformers")
  PAGE.write_text(TEXT.format(machine=packages, table=table(HEADER, rows)))
  print(f"wrote {PAGE}")


if __name__ == "__main__":
  main()
