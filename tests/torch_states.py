"""Whole state dicts in memory, by the table that `interop.weights` reads and writes files with."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from compdiff_jax.interop import keys


def to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The torch state dict of flat JAX parameters, as contiguous NumPy arrays."""
  named = zip(keys.torch_shapes(params), params.items())
  return {name: np.ascontiguousarray(keys.leaf_to_torch(key, value)) for name, (key, value) in named}


def from_torch(state: Mapping[str, np.ndarray], shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The flat JAX parameters of a torch state dict; `shapes` are the model's, `Functional.shapes`."""
  matched = keys.match({name: tensor.shape for name, tensor in state.items()}, shapes, "state dict")
  return {key: keys.leaf_from_torch(key, state[name].reshape(shape)) for key, (name, shape) in matched.items()}
