"""Reads a pickled torch tensor without torch and without running anything that the pickle names.

`pickle.dumps(tensor)`, with protocol 3 or later, is a call of `torch._utils._rebuild_tensor_v2` on a storage, which is
itself a call of `torch.storage._load_from_bytes` on bytes in torch's older file format. Both are replaced by functions
of this module that only cut arrays out of bytes; every other name in the pickle is refused before it is looked up.
"""

import collections
import io
import math
import pickle
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# What starts torch's older file format: the magic number and the protocol version, each pickled.
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_DTYPES = {
  "FloatStorage": np.dtype("<f4"),
  "DoubleStorage": np.dtype("<f8"),
  "HalfStorage": np.dtype("<f2"),
  "ByteStorage": np.dtype("u1"),
}


class UnsafePickle(Exception):
  """The pickle is no tensor, or asks for something that a tensor does not need."""


def load_tensor(data: bytes) -> np.ndarray:
  """The array of a pickled tensor of floats or bytes.

  Raises:
    UnsafePickle: `data` is anything else, damaged ones included.
  """
  allowed = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch.storage", "_load_from_bytes"): _load_storage,
    ("collections", "OrderedDict"): collections.OrderedDict,
  }
  tensor = _load(io.BytesIO(data), allowed)
  if not isinstance(tensor, np.ndarray):
    raise UnsafePickle(f"a {type(tensor).__name__}, not a tensor")
  return tensor


def _load(file: io.BytesIO, allowed: Mapping[tuple[str, str], Any], persistent: Callable | None = None) -> Any:
  try:
    return _Unpickler(file, allowed, persistent).load()
  except UnsafePickle:
    raise
  except Exception as error:  # a damaged pickle can raise anything
    raise UnsafePickle(f"damaged: {type(error).__name__}: {error}") from None


class _Unpickler(pickle.Unpickler):
  def __init__(self, file: io.BytesIO, allowed: Mapping[tuple[str, str], Any], persistent: Callable | None):
    super().__init__(file)
    self._allowed = allowed
    self._persistent = persistent

  def find_class(self, module: str, name: str) -> Any:
    try:
      return self._allowed[module, name]
    except KeyError:
      raise UnsafePickle(f"it asks for {module}.{name}, which no tensor needs") from None

  def persistent_load(self, pid: Any) -> Any:
    if self._persistent is None:
      raise UnsafePickle("it refers to data outside of itself")
    return self._persistent(pid)


def _load_storage(data: bytes) -> np.ndarray:
  """The numbers of one storage: magic, protocol, machine, description, keys, length and bytes follow each other."""
  file = io.BytesIO(data)
  if (_load(file, {}), _load(file, {})) != (_MAGIC, _PROTOCOL):
    raise UnsafePickle("its storage is not in torch's file format")
  machine = _load(file, {})
  if not (isinstance(machine, dict) and machine.get("little_endian") is True):
    raise UnsafePickle("its storage was written by a big-endian machine")
  kinds = {("torch", name): dtype for name, dtype in _DTYPES.items()}
  described = _load(file, kinds, persistent=lambda pid: pid)
  keys = _load(file, {})
  match described:
    case ("storage", np.dtype() as dtype, str() as key, str(), int() as count, *_) if keys == [key]:
      pass
    case _:
      raise UnsafePickle("its storage is described in an unknown way")
  head = file.read(8)
  if len(head) != 8 or struct.unpack("<q", head)[0] != count or count < 0:
    raise UnsafePickle("its storage is cut short")
  body = file.read()
  if len(body) != count * dtype.itemsize:
    raise UnsafePickle("its storage is cut short")
  return np.frombuffer(body, dtype)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
  """The strided view [*size] of a storage, copied; it must lie inside, and no element may be shared."""
  numbers = (offset, *size, *stride)
  if not isinstance(storage, np.ndarray) or storage.ndim != 1 or len(size) != len(stride):
    raise UnsafePickle("its tensor is described in an unknown way")
  if not all(type(number) is int and number >= 0 for number in numbers):
    raise UnsafePickle("its tensor is described in an unknown way")
  last = offset + sum((length - 1) * step for length, step in zip(size, stride))
  if math.prod(size) > len(storage) or (math.prod(size) and last >= len(storage)):
    raise UnsafePickle("its tensor reaches beyond its storage")
  strides = [step * storage.itemsize for step in stride]
  return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False).copy()
