"""Flat JAX parameters to a torch state dict and back, from one table.

Module paths are the torch keys already; what differs is the name and the axis order of the leaf, and how other
releases of diffusers and transformers spell a few modules.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from compdiff_jax.cli import InputError

_MAX_NAMES = 8


class _Leaf(NamedTuple):
  torch_name: str
  torch_axes: tuple[int, ...]  # the torch tensor is the JAX array transposed by these axes


# (leaf name, rank) -> torch. A leaf that is not here, such as `bias` or `null_age`, is the same on both sides.
_LEAVES = {
  ("kernel", 2): _Leaf("weight", (1, 0)),  # linear: [in, out] -> [out, in]
  ("in_proj_kernel", 2): _Leaf("in_proj_weight", (1, 0)),  # q, k and v of torch.nn.MultiheadAttention, stacked
  ("kernel", 4): _Leaf("weight", (3, 2, 0, 1)),  # convolution: HWIO -> OIHW
  ("scale", 1): _Leaf("weight", (0,)),  # norms
  ("embedding", 2): _Leaf("weight", (0, 1)),
}

# Spellings of other releases: (pattern, replacement), each tried alone on torch keys that the model does not have.
_SPELLINGS = (
  # The autoencoder's attention before diffusers 0.13.
  (r"\.query\.(weight|bias)$", r".to_q.\1"),
  (r"\.key\.(weight|bias)$", r".to_k.\1"),
  (r"\.value\.(weight|bias)$", r".to_v.\1"),
  (r"\.proj_attn\.(weight|bias)$", r".to_out.0.\1"),
  # The text encoder in the memory of transformers 5.
  (r"^(?=embeddings\.|encoder\.|final_layer_norm\.)", r"text_model."),
)

# Constants that older releases stored beside the text encoder's parameters.
_CONSTANTS = re.compile(r"^(text_model\.)?embeddings\.position_ids$")


class Source(NamedTuple):
  """Where a parameter comes from: a key of the state dict and the shape to read it in."""

  name: str
  shape: tuple[int, ...]


def leaf_to_torch(key: str, value: Any) -> np.ndarray:
  """One parameter in torch's axis order, as a view that need not be contiguous."""
  array = np.asarray(value)
  return array.transpose(_leaf(key, array.ndim)[1])


def leaf_from_torch(key: str, tensor: np.ndarray) -> np.ndarray:
  """The inverse of `leaf_to_torch`, also a view."""
  return tensor.transpose(np.argsort(_leaf(key, tensor.ndim)[1]))


def torch_shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """{state dict key: shape in torch's axis order} of flat JAX parameters or their specs, in their order."""
  leaves = {key: (value.shape, _leaf(key, len(value.shape))) for key, value in params.items()}
  return {name: tuple(shape[axis] for axis in axes) for shape, (name, axes) in leaves.values()}


def slice_from_torch(key: str, tensor: Any, shape: Sequence[int], index: Sequence[slice]) -> np.ndarray:
  """A slice of a parameter, read from a stored tensor without reading the rest of it.

  Args:
    key: the parameter.
    tensor: anything that `tensor[slices]` reads a part of, in torch's axis order.
    shape: the shape in which it is read, `Source.shape`; the stored one may end in further axes of size 1.
    index: one slice for each axis of the parameter.

  Returns:
    The slice in our axis order, a view that need not be contiguous.
  """
  axes = _leaf(key, len(shape))[1]
  parts = tuple(index[axis] for axis in axes)
  value = tensor[parts]
  return leaf_from_torch(key, value.reshape(value.shape[: len(shape)]))


def match(found: Mapping[str, Sequence[int]], shapes: Mapping[str, Any], source: str) -> dict[str, Source]:
  """Finds every parameter of a model in a state dict, without reading it.

  Args:
    found: the keys and shapes of the state dict, in the spelling of any release.
    shapes: the parameters of the model, `Functional.shapes`.
    source: the file or model, for the error message.

  Returns:
    {parameter: its source}, in the order of `shapes`.

  Raises:
    InputError: keys are missing or left over, or have another shape; lists them.
  """
  targets = {name: (key, wanted) for key, (name, wanted) in zip(shapes, torch_shapes(shapes).items())}

  sources, unexpected, misshapen = {}, [], []
  for name, shape in found.items():
    key, wanted = targets.get(_spelled(name, targets), (None, None))
    if key is not None and key not in sources:
      # Old files store the linear maps of attention as 1x1 convolutions.
      if tuple(shape) not in (wanted, (*wanted, 1, 1)):
        misshapen.append(f"{name} (file {list(shape)}, model {list(wanted)})")
      sources[key] = Source(name, wanted)
    elif not is_constant(name):
      unexpected.append(name)
  missing = [name for name, (key, _) in targets.items() if key not in sources]

  differences = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
  parts = [f"{len(names)} {what}: {_listing(names)}" for what, names in differences.items() if names]
  if parts:
    raise InputError(f"{source} does not fit the model: {'; '.join(parts)}; give the config.json of these weights")
  return {key: sources[key] for key in shapes}


def is_constant(name: str) -> bool:
  """Whether a key of a state dict is no parameter but a constant that older releases stored."""
  return bool(_CONSTANTS.match(name))


def _leaf(key: str, ndim: int) -> tuple[str, tuple[int, ...]]:
  """The torch key of a parameter and the axes that lead to torch's order."""
  path, dot, name = key.rpartition(".")
  leaf = _LEAVES.get((name, ndim), _Leaf(name, tuple(range(ndim))))
  return path + dot + leaf.torch_name, leaf.torch_axes


def _spelled(name: str, targets: Collection[str]) -> str:
  """`name` as the model spells it, or `name` itself when no spelling leads to a key of the model."""
  spellings = (re.sub(pattern, replacement, name) for pattern, replacement in _SPELLINGS)
  return next((candidate for candidate in (name, *spellings) if candidate in targets), name)


def _listing(names: Sequence[str]) -> str:
  more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
  return ", ".join(names[:_MAX_NAMES]) + more
