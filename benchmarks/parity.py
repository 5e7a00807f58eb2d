"""`make parity`: every network and sampler against torch, at toy size; writes docs/parity.md.

float32 on both sides. The networks have wide random weights, so that a wrong epsilon, gate or activation shows; the
tests hold the same comparisons to the bounds that the page states.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests import torch_parity
from tests.network_configs import TEXT_ENCODERS, UNETS, VAES

PAGE = Path("docs/parity.md")

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


def networks() -> Iterator[list[str]]:
  """Rows of the networks' table."""
  for name, height, width, tokens in UNET_CASES:
    fields = UNETS[name]
    model = torch_parity.randomize(torch_parity.build_torch("unet", fields))
    functional = torch_parity.build_jax("unet", fields)
    inputs = torch_parity.unet_inputs(fields, height, width, tokens)
    size = f"{height}×{width} latents, {tokens} tokens"
    yield ["UNet", name, size, "output", _difference(*torch_parity.unet_outputs(model, functional, inputs)), "1e-4"]
    errors = torch_parity.relative_errors(*torch_parity.unet_gradients(model, functional, inputs))
    yield ["UNet", name, size, "gradients, relative", f"{max(errors.values()):.1e}", "1e-3"]
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
