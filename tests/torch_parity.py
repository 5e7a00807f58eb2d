"""What the parity tests share: torch models with telling random weights, and arrays in both layouts."""

import re

import jax.numpy as jnp
import numpy as np
import torch

from compdiff_jax.interop import keys


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
  """Draws wide weights: default initialisation is so narrow that a wrong GELU, gate or bias stays below 1e-4."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if parameter.ndim > 1:
        parameter.copy_(noise * parameter[0].numel() ** -0.5)
      else:
        parameter.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))
  return module.eval()


def make_faint(module: torch.nn.Module, layers: str, factor: float = 3e-3) -> torch.nn.Module:
  """Shrinks the maps whose name matches `layers`, so that the variance under a later norm is about its epsilon."""
  with torch.no_grad():
    for name, layer in module.named_modules():
      if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)) and re.search(layers, name):
        for parameter in layer.parameters():
          parameter.mul_(factor)
  return module


def params_of(module: torch.nn.Module, functional) -> dict[str, jnp.ndarray]:
  """The parameters of a torch model as those of `functional`."""
  state = {name: value.detach().numpy() for name, value in module.state_dict().items()}
  return {key: jnp.asarray(value) for key, value in keys.from_torch(state, functional.shapes).items()}


def normal(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def nchw(array) -> torch.Tensor:
  return torch.from_numpy(np.ascontiguousarray(np.asarray(array).transpose(0, 3, 1, 2)))


def nhwc(tensor: torch.Tensor) -> np.ndarray:
  return tensor.detach().numpy().transpose(0, 2, 3, 1)
