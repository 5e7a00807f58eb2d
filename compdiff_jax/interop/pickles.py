"""The one door to pickled torch files, through torch's loader that accepts nothing but tensors."""

from pathlib import Path

import numpy as np

from compdiff_jax.cli import InputError


def read_pickle(path: Path) -> dict[str, np.ndarray]:
  """The tensors of a `.bin` file by name, bfloat16 as float32.

  Raises:
    InputError: torch is not installed, or the file holds anything but a flat dict of tensors.
  """
  try:
    import torch
  except ImportError:
    raise InputError(f"{path} is a torch pickle and torch is not installed; install it, or convert the file") from None
  try:
    state = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # pickle, zip and runtime errors: whichever part of the file is wrong decides the type
    reason = " ".join(str(error).split())[:200]
    raise InputError(f"{path} is not a whole file of tensors ({type(error).__name__}: {reason})") from None
  if not isinstance(state, dict) or not all(
    isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
  ):
    raise InputError(f"{path} holds something else than tensors by name; give the state_dict of the model")
  return {
    name: (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy() for name, value in state.items()
  }
