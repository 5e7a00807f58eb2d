"""Looking for what fits: which batch, sharding and recomputation to try, in the order of the speed to expect.

What must be on a device whatever happens, state and gradients, is known without compiling. What activations take is
learned from each program that was compiled, so that few are.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from compdiff_jax import sharding
from compdiff_jax.ahead_of_time.program import TrainingStep, trace_sampler
from compdiff_jax.conditioning.schema import Schema

Changes = Mapping[str, Any]

# How much longer a step takes, and the share of the activations that is kept. Rough: they order what is tried.
_REMAT_TIME = {"none": 1.0, "matmuls": 1.12, "blocks": 1.33}
_REMAT_KEPT = {"none": 1.0, "matmuls": 0.5, "blocks": 0.25}
_FSDP_TIME = 1.02  # for each doubling: parameters are gathered
_ACCUMULATION_TIME = 1.04  # for each doubling: smaller products
# A prediction that is above the memory by less than this is worth a compile.
_TOLERANCE = 1.15
MAX_COMPILES = 6


class Candidate(NamedTuple):
  """Changes to a config, and what is known about them before they are compiled.

  Attributes:
    changes: {config key: value}.
    time: of a step, relative.
    held: bytes of state and gradients on a device.
    activations: their size, relative.
  """

  changes: Changes
  time: float
  held: int
  activations: float


def changed(config: ml_collections.ConfigDict, changes: Changes) -> ml_collections.ConfigDict:
  result = config.copy_and_resolve_references()
  result.update_from_flattened_dict(changes)
  return result


def as_arguments(changes: Changes) -> str:
  return " ".join(f"--config.{key}={value}" for key, value in changes.items())


def candidates(
  program: str, config: ml_collections.ConfigDict, schema: Schema, devices: Sequence[Any], inputs: str
) -> list[Candidate]:
  """What may be tried, the fastest first."""
  if program == "sample":
    return _sampling(config, devices, trace_sampler(config, schema, devices).state_bytes)
  return _training(config, schema, devices, inputs)


def _training(
  config: ml_collections.ConfigDict, schema: Schema, devices: Sequence[Any], inputs: str
) -> list[Candidate]:
  """Every meaningful choice of remat, mesh.fsdp and train.accumulation for the config's global batch, fastest first.

  A batch that the devices do not divide is rounded up to whole rows a device. `mesh.tensor` stays as it is.
  """
  step = TrainingStep(config, schema, inputs)
  fixed = math.prod(size for size in config.mesh.values() if size != -1)
  own = {axis: len(devices) // max(fixed, 1) if size == -1 else size for axis, size in config.mesh.items()}
  ways = len(devices) // max(own["tensor"], 1)
  batch = -(-config.train.batch_size // ways) * ways
  rows = batch // ways
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  found = []
  for fsdp in (2**n for n in range(ways.bit_length()) if ways // slices % 2**n == 0):
    sizes = {"data": -1, "fsdp": fsdp, "tensor": own["tensor"]}
    mesh = sharding.make_mesh(sizes, devices)
    held = sum(step.bytes_per_device(mesh))
    for accumulation, remat in itertools.product([n for n in range(1, rows + 1) if rows % n == 0], _REMAT_TIME):
      wanted = {"train.batch_size": batch, "train.accumulation": accumulation, "remat": remat}
      if fsdp != own["fsdp"]:
        wanted |= {f"mesh.{axis}": size for axis, size in sizes.items()}
      changes = {key: value for key, value in wanted.items() if _get(config, key) != value}
      time = _REMAT_TIME[remat] * _FSDP_TIME ** math.log2(fsdp) * _ACCUMULATION_TIME ** math.log2(accumulation)
      found.append(Candidate(changes, time, held, rows / accumulation * _REMAT_KEPT[remat]))
  return sorted(found, key=lambda one: one.time)


def _sampling(config: ml_collections.ConfigDict, devices: Sequence[Any], held: int) -> list[Candidate]:
  """Fewer images a batch: all that sampling can vary. The largest batch is the fastest."""
  rows = -(-config.sample.batch_size // len(devices))
  smaller = {math.ceil(rows / 2**n) for n in range(rows.bit_length() + 1)}
  return [
    Candidate({} if r == rows else {"sample.batch_size": r * len(devices)}, 1 / r, held, r)
    for r in sorted(smaller, reverse=True)
  ]


def _get(config: ml_collections.ConfigDict, key: str) -> Any:
  for part in key.split("."):
    config = config[part]
  return config


def search(
  options: Sequence[Candidate], compile_with: Callable[[Changes], dict[str, Any]], memory: int | None
) -> Iterator[dict[str, Any]]:
  """Compiles candidates in turn until one fits, skipping those that cannot; yields each one's report.

  Args:
    options: the fastest first.
    compile_with: makes the report of the config with some changes.
    memory: bytes of a device; None where nothing is known, and anything fits.
  """
  each = 0.0  # bytes of activations of relative size 1, as far as seen
  compiled = 0
  for candidate in options:
    expected = candidate.held + each * candidate.activations
    if memory is not None and (candidate.held > memory or expected > memory * _TOLERANCE):
      continue
    if compiled == MAX_COMPILES:
      return
    facts = compile_with(candidate.changes)
    compiled += 1
    yield facts
    if facts["fits"]:
      return
    wanted = facts["memory"].get("peak")
    # A compiler that does not say what it wanted, wanted more than there is.
    wanted = max(wanted or 0, memory or 0)
    each = max(each, (wanted - candidate.held) / candidate.activations)


def likely(options: Sequence[Candidate], wanted: int, memory: int) -> Candidate | None:
  """The fastest candidate that should fit a device, where the config as it is wants `wanted` bytes of `memory`."""
  own = next((one for one in options if not one.changes), None)
  if own is None:
    return None
  each = max(wanted - own.held, 0) / own.activations
  return next((one for one in options if one.held + each * one.activations <= memory), None)
