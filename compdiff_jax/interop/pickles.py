"""The one door to pickled torch files, through torch's loader that accepts nothing but tensors."""

import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from compdiff_jax.cli import InputError


def read_pickle(path: Path) -> dict[str, np.ndarray]:
  """The tensors of a `.bin` file by name. Those of a file in today's format, a zip, are read when they are used.

  Raises:
    InputError: torch is not installed, or the file holds anything but a flat dict of tensors.
  """
  try:
    import torch
  except ImportError:
    raise InputError(f"{path} is a torch pickle and torch is not installed; install it, or convert the file") from None
  try:
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
  except Exception as error:  # pickle, zip and runtime errors: whichever part of the file is wrong decides the type
    reason = " ".join(str(error).split())[:200]
    raise InputError(f"{path} is not a whole file of tensors ({type(error).__name__}: {reason})") from None
  if not isinstance(state, dict) or not all(
    isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
  ):
    raise InputError(f"{path} holds something else than tensors by name; give the state_dict of the model")
  return {name: _array(value.detach(), torch) for name, value in state.items()}


def _array(tensor, torch) -> np.ndarray:
  """The array on the tensor's own memory; NumPy has bfloat16 by way of its bits only."""
  if tensor.dtype == torch.bfloat16:
    return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
  return tensor.numpy()
