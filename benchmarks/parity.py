"""`make parity`: every network and sampler against torch, at toy size; writes docs/parity.md.

float32 on both sides. The networks have wide random weights, so that a wrong epsilon, gate or activation shows; the
tests hold the same comparisons to the bounds that the page states.
"""

import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.tables import machine, table
from compdiff_jax.cli import InputError
from compdiff_jax.diffusion.samplers import DEFAULT_SPACINGS, SPACINGS, Sampler
from compdiff_jax.diffusion.schedule import NoiseSchedule
from tests import same_picture, torch_parity, toy_diffusion
from tests.network_configs import TEXT_ENCODERS, UNETS, VAES

PAGE = Path("docs/parity.md")
TEXT = """# Parity with PyTorch

Written by `make parity` (`python -m benchmarks.parity`); networks of the true size of Stable Diffusion 2.1 are in
[parity_full.md](parity_full.md). {machine}

Every number is the largest absolute difference between JAX and torch (diffusers, transformers) on the same inputs, in
float32; for gradients it is the largest relative difference of a parameter's gradient in the Euclidean norm, without
those that are 0 but for rounding, as that of a bias in front of a GroupNorm with one channel a group. The tests hold
these comparisons to the bounds.

## Networks

Two samples, wide random weights, odd sizes; the configurations are in
[tests/network_configs.py](../tests/network_configs.py).

{networks}

## Samplers

Final samples of a model in closed form, a mixture of two Gaussians
([tests/toy_diffusion.py](../tests/toy_diffusion.py)), by our sampler and by its scheduler in diffusers with the same
noise; bound 1e-4. ε, v and x₀ are what the model predicts; an empty field is a combination that diffusers lacks.

{samplers}

## The same picture

A toy model with all parts, exported, and drawn by its torch pipeline and by our sampler: three pictures (all attributes
set, one unknown, all unknown), guidance {guidance:g}, a negative prompt, {steps} steps, the same noise. Bounds: 1e-3
on latents, 2 of 255 on pixels.

{pictures}
"""

# (configuration, latent height, width, context tokens)
UNET_CASES = [
  ("SD 1 style", 8, 8, 77),
  ("SD 1 style", 11, 6, 78),
  ("SD 2 style", 9, 7, 83),
  ("SD 2 style", 16, 24, 81),
  ("options", 9, 5, 80),
]
# (configuration, image height, width)
VAE_CASES = [("SD style", 16, 24), ("SD style", 19, 13), ("one level", 6, 5), ("options", 9, 10)]
# (configuration, tokens)
TEXT_CASES = [("SD 1 style", 77), ("options", 77), ("options", 83)]


def _difference(ours: np.ndarray, theirs: np.ndarray) -> str:
  return f"{np.abs(ours - theirs).max():.1e}"


def _gradient_error(model, functional, inputs) -> float:
  """The largest relative error, without gradients that are 0 but for rounding."""
  ours, theirs = torch_parity.unet_gradients(model, functional, inputs)
  norms = {name: np.linalg.norm(value) for name, value in theirs.items()}
  total = np.linalg.norm(list(norms.values()))
  theirs = {name: value for name, value in theirs.items() if norms[name] > 1e-6 * total}
  return max(torch_parity.relative_errors(ours, theirs).values())


def networks() -> Iterator[list[str]]:
  """Rows of the networks' table."""
  for name, height, width, tokens in UNET_CASES:
    fields = UNETS[name]
    model = torch_parity.randomize(torch_parity.build_torch("unet", fields))
    functional = torch_parity.build_jax("unet", fields)
    inputs = torch_parity.unet_inputs(fields, height, width, tokens)
    size = f"{height}×{width} latents, {tokens} tokens"
    yield ["UNet", name, size, "output", _difference(*torch_parity.unet_outputs(model, functional, inputs)), "1e-4"]
    yield ["UNet", name, size, "gradients, relative", f"{_gradient_error(model, functional, inputs):.1e}", "1e-3"]
  for name, height, width in VAE_CASES:
    model = torch_parity.randomize(torch_parity.build_torch("vae", VAES[name]))
    images = torch_parity.vae_inputs(VAES[name], height, width)
    pairs = torch_parity.vae_outputs(model, torch_parity.build_jax("vae", VAES[name]), images)
    for quantity, pair in pairs.items():
      yield ["VAE", name, f"{height}×{width} pixels", quantity, _difference(*pair), "1e-4"]
  for name, length in TEXT_CASES:
    fields = TEXT_ENCODERS[name]
    model = torch_parity.randomize(torch_parity.build_torch("text_encoder", fields))
    pair = torch_parity.text_outputs(
      model, torch_parity.build_jax("text_encoder", fields), torch_parity.text_inputs(fields, length)
    )
    yield ["text encoder", name, f"{length} tokens", "last hidden state", _difference(*pair), "1e-4"]


# (heading, schedule, number of steps)
_V, _X0 = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
SAMPLER_COLUMNS = [
  *[(f"ε, {steps} steps", NoiseSchedule(), steps) for steps in (5, 20, 50)],
  *[("v, 20 steps", NoiseSchedule(**_V), 20), ("x₀, 20 steps", NoiseSchedule(**_X0), 20)],
  ("v, zero SNR, 12 steps", NoiseSchedule(**_V, rescale_betas_zero_snr=True), 12),
]
SAMPLERS = [
  *[Sampler(name, spacing) for name in DEFAULT_SPACINGS for spacing in SPACINGS],
  *[Sampler("ddim", spacing, eta=1.0) for spacing in SPACINGS],
  *[Sampler(name, karras=True) for name in ("dpmpp_2m", "euler", "unipc")],
]


def samplers() -> Iterator[list[str]]:
  """Rows of the samplers' table."""
  for sampler in SAMPLERS:
    differences = []
    for _, schedule, steps in SAMPLER_COLUMNS:
      try:
        sampler.check(schedule)
      except InputError:
        differences.append("")
        continue
      ours, theirs = (run(schedule, sampler, steps) for run in (toy_diffusion.sample_jax, toy_diffusion.sample_torch))
      differences.append(_difference(ours, theirs))
    yield [
      f"{sampler.name}{f', η = {sampler.eta:g}' if sampler.eta else ''}",
      "Karras" if sampler.karras else sampler.timestep_spacing,
      *differences,
    ]


def pictures() -> Iterator[list[str]]:
  """Rows of the table of pictures."""
  with tempfile.TemporaryDirectory() as directory:
    toy = same_picture.Pictures(Path(directory))
    for case in same_picture.CASES:
      (latents, pixels), (their_latents, their_pixels) = toy.jax(*case), toy.torch(*case)
      pixel_difference = f"{np.abs(pixels - their_pixels).max():.2f}"
      yield [same_picture.describe(*case), _difference(latents, their_latents), pixel_difference]


def _printed(rows: Iterator[list[str]]) -> list[list[str]]:
  kept = []
  for row in rows:
    print(*row, sep="  ", flush=True)
    kept.append(row)
  return kept


def main() -> None:
  logging.disable(logging.WARNING)
  warnings.simplefilter("ignore")
  text = TEXT.format(
    machine=machine("jax", "flax", "torch", "diffusers", "transformers"),
    guidance=same_picture.GUIDANCE,
    steps=same_picture.STEPS,
    samplers=table(["sampler", "spacing", *(column[0] for column in SAMPLER_COLUMNS)], _printed(samplers())),
    pictures=table(["sampler", "latents", "pixels"], _printed(pictures())),
    networks=table(["network", "configuration", "size", "quantity", "difference", "bound"], _printed(networks())),
  )
  PAGE.write_text(text)
  print(f"wrote {PAGE}")


if __name__ == "__main__":
  main()
