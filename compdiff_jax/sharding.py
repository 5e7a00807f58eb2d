"""Where arrays live: a (data, fsdp, tensor) mesh and regex rules from parameter names to PartitionSpecs.

All axes are `AxisType.Auto`, so the compiler inserts the collectives. The batch is split over (data, fsdp). Only the
data axis crosses slices, which are joined by a slower network.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from compdiff_jax.cli import InputError, nearest

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = AXES[:2]
# Every device has all parameters and its share of the rows.
DATA_PARALLEL = {"data": -1, "fsdp": 1, "tensor": 1}
Rules = Sequence[tuple[str, Sequence[str | None]]]


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """The device mesh. `sizes` maps each of `AXES` to a size; one of them may be -1, "all the remaining devices".

  Neighbours on the inner axes are neighbours in the hardware. Several TPU slices share the data axis; GPU hosts do too
  where their number divides it, else the processes' order decides.
  """
  devices = jax.devices() if devices is None else list(devices)
  shape = [sizes[axis] for axis in AXES]
  fixed = math.prod(size for size in shape if size != -1)
  if shape.count(-1) > 1 or fixed < 1 or len(devices) % fixed:
    raise InputError(f"mesh {dict(sizes)} does not divide {len(devices)} devices; one axis may be -1")
  shape = [len(devices) // fixed if size == -1 else size for size in shape]
  if math.prod(shape) != len(devices):
    raise InputError(f"mesh {dict(zip(AXES, shape))} needs {math.prod(shape)} devices, {len(devices)} are present")
  auto = (AxisType.Auto,) * 3
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices > 1 and shape[0] % slices == 0:
    within, between = [shape[0] // slices, *shape[1:]], [slices, 1, 1]
    grid = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=auto)
  if slices > 1 and devices[0].platform == "tpu":
    raise InputError(
      f"mesh {dict(zip(AXES, shape))}: data must be a multiple of the {slices} slices; only that axis may cross them"
    )
  # Not jax.make_mesh, which splits the sides of a slice on v5e alone: 16x16 chips have no side of 4 to be fsdp.
  grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(grid, AXES, axis_types=auto)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis of a batch over every data-parallel device."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
  """The rows of a global batch that this host's devices hold, in rising order; the hosts together hold every row."""
  places = sharding.addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in places]))


def place(tree: Any, shardings: Any) -> Any:
  """Host arrays onto the devices; every process gives the whole arrays, and its devices take their parts.

  `shardings` is one sharding for all, or a tree like `tree`.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)
  if isinstance(shardings, NamedSharding):
    shardings = jax.tree.map(lambda _: shardings, tree)

  def put(leaf, sharding):
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      return jax.device_put(leaf, sharding)
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

  return jax.tree.map(put, tree, shardings)


def fetch(array: jax.Array) -> np.ndarray:
  """The whole array on the host, on every process: all of them must call this."""
  return multihost_utils.process_allgather(array, tiled=True) if jax.process_count() > 1 else np.asarray(array)


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
  """Every device must get the same number of rows in every micro-batch."""
  ways = mesh.shape["data"] * mesh.shape["fsdp"] * accumulation
  if batch_size % ways:
    raise InputError(
      f"batch_size {batch_size} is not divisible by data x fsdp x accumulation = {ways}; choose a multiple of {ways}"
    )


def parameter_spec(name: str, shape: Sequence[int], rules: Rules, mesh: Mesh) -> PartitionSpec:
  """The first rule whose regex matches the whole name; else the largest axis divisible by fsdp; else replicated."""
  for rule in rules:
    if not isinstance(rule, tuple) or len(rule) != 2:
      raise InputError(f"sharding rule {rule!r} must be a pair: a regular expression and a tuple of mesh axes")
    pattern, axes = rule
    try:
      matches = re.fullmatch(pattern, name)
    except re.error as error:
      raise InputError(f"sharding rule {pattern!r} is no regular expression ({error})") from None
    if matches:
      spec = PartitionSpec(*axes)
      for axis in axes:
        if axis is not None and axis not in mesh.shape:
          raise InputError(f"sharding rule {pattern!r}: no mesh axis {axis!r}{nearest(str(axis), AXES)}")
      for dimension, axis in zip(shape, axes):
        if axis is not None and dimension % mesh.shape[axis]:
          raise InputError(f"sharding rule {pattern!r}: {name} {tuple(shape)} is not divisible by {axis}")
      named = [axis for axis in axes if axis is not None]
      if len(set(named)) < len(named):
        raise InputError(f"sharding rule {pattern!r} names a mesh axis twice: {tuple(axes)}")
      if len(axes) > len(shape):
        raise InputError(f"sharding rule {pattern!r} has more axes than {name} {tuple(shape)}")
      return spec
  fsdp = mesh.shape["fsdp"]
  divisible = [i for i, dimension in enumerate(shape) if dimension % fsdp == 0]
  if fsdp == 1 or not divisible:
    return PartitionSpec()
  largest = max(divisible, key=lambda i: shape[i])
  return PartitionSpec(*[None] * largest, "fsdp")


def tree_shardings(tree: Any, rules: Rules, mesh: Mesh) -> Any:
  """Shardings for a pytree of arrays whose innermost dict keys are parameter names.

  Optimizer moments and EMA hold trees of the same keys as the parameters, so they get the parameters' shardings;
  leaves that are not below a parameter name (counters, the state of FairDiffusion) are replicated.
  """

  def sharding(path, leaf):
    keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    name = ".".join(map(str, keys[-2:]))
    spec = parameter_spec(name, leaf.shape, rules, mesh) if leaf.ndim and keys else PartitionSpec()
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(sharding, tree)


def bytes_per_device(tree: Any, shardings: Any) -> int:
  """Bytes of `tree` that one device holds under `shardings`."""
  sizes = jax.tree.map(
    lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize,
    tree,
    shardings,
  )
  return sum(jax.tree.leaves(sizes))
