"""Writes safetensors files tensor by tensor: beside the model, memory holds one tensor at a time.

The format: the header's length in 8 bytes, the header as JSON {name: {dtype, shape, data_offsets}}, and the raw data.
The library's own writer wants all tensors in torch's axis order and the stored type at once, which is a second model.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from compdiff_jax.cli import InputError

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

Shapes = Mapping[str, Sequence[int]]


def parse_size(text: str) -> int:
  """Bytes of "5GB", "200MB" or "1.5GiB": decimal units as in diffusers, or binary ones."""
  match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)", text.strip())
  size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
  if size < 1:
    raise InputError(f"size {text!r} is not a positive number with one of the units {', '.join(_UNITS)}, such as 5GB")
  return size


def write(path: Path, shapes: Shapes, dtype: str, read: Callable[[str], np.ndarray]) -> None:
  """Writes one file.

  Args:
    path: the file.
    shapes: names and shapes of the tensors, in the order in which they are stored.
    dtype: their type, a key of `DTYPES`.
    read: returns a tensor by name; called once for each, in order.
  """
  itemsize = jnp.dtype(dtype).itemsize
  # Transformers refuses a file whose metadata does not name a framework.
  header, offset = {"__metadata__": {"format": "pt"}}, 0
  for name, shape in shapes.items():
    end = offset + math.prod(shape) * itemsize
    header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
    offset = end
  encoded = json.dumps(header, separators=(",", ":")).encode()
  encoded += b" " * (-len(encoded) % 8)  # the data begin at a multiple of eight
  with path.open("wb") as file:
    file.write(len(encoded).to_bytes(8, "little"))
    file.write(encoded)
    for name, shape in shapes.items():
      tensor = np.ascontiguousarray(read(name), jnp.dtype(dtype))
      if tensor.shape != tuple(shape):
        raise ValueError(f"{name} has shape {tensor.shape}, its header says {tuple(shape)}")
      file.write(tensor.reshape(-1).view(np.uint8))


def write_shards(
  directory: Path, stem: str, shapes: Shapes, dtype: str, read: Callable[[str], np.ndarray], max_bytes: int | None
) -> None:
  """Writes `<stem>.safetensors`, or shards and the index that diffusers and transformers read.

  Args:
    directory: where the files go.
    stem: their name without the suffix.
    shapes, dtype, read: see `write`.
    max_bytes: the most data in one file; a larger tensor has one of its own. None: a single file.
  """
  itemsize = jnp.dtype(dtype).itemsize
  shards, size = [[]], 0
  for name, shape in shapes.items():
    own = math.prod(shape) * itemsize
    if max_bytes is not None and shards[-1] and size + own > max_bytes:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += own
  if len(shards) == 1:
    write(directory / f"{stem}.safetensors", shapes, dtype, read)
    return
  weight_map = {}
  for number, names in enumerate(shards, start=1):
    file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
    write(directory / file, {name: shapes[name] for name in names}, dtype, read)
    weight_map |= dict.fromkeys(names, file)
  total = sum(math.prod(shape) for shape in shapes.values()) * itemsize
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
