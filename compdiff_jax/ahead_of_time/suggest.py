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
from compdiff_jax.ahead_of_time.program import TrainingProgram, trace_sampler
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.sampling.sampler import padded_batch

Changes = Mapping[str, Any]

# How much longer an image takes, and the share of the activations that is kept. Rough: they order what is tried.
_REMAT_TIME = {"none": 1.0, "matmuls": 1.12, "blocks": 1.33}
_REMAT_KEPT = {"none": 1.0, "matmuls": 0.5, "blocks": 0.25}
_FSDP_TIME = 1.02  # for each doubling: parameters are gathered
_ACCUMULATION_TIME = 1.04  # for each doubling: smaller products
_BATCH_TIME = 0.97  # for each doubling: larger products, fewer updates
_DOUBLINGS = 3  # of the batch
# In a report: what the compiler expects, where it does.
_SPEED = "estimated_images_per_second_a_chip"
# A prediction that is above the memory by less than this is worth a compile.
_TOLERANCE = 1.15
MAX_COMPILES = 6


class Candidate(NamedTuple):
  """Changes to a config, and what is known about them before they are compiled.

  Attributes:
    changes: {config key: value}.
    time: of an image, relative.
    held: bytes of state and gradients on a device.
    activations: their size, relative.
    own_batch: whether the batch is the config's, as near as the devices divide it.
  """

  changes: Changes
  time: float
  held: int
  activations: float
  own_batch: bool = True


def changed(config: ml_collections.ConfigDict, changes: Changes) -> ml_collections.ConfigDict:
  result = config.copy_and_resolve_references()
  result.update_from_flattened_dict(changes)
  return result


def as_arguments(changes: Changes) -> str:
  return " ".join(f"--config.{key}={value}" for key, value in changes.items())


def candidates(
  program: str, config: ml_collections.ConfigDict, schema: Schema, devices: Sequence[Any], inputs: str
) -> list[Candidate]:
  """What may be tried: with the config's batch the fastest first, then with other batches the fastest first."""
  if program == "sample":
    return _sampling(config, devices, trace_sampler(config, schema, devices).state_bytes)
  return _training(config, schema, devices, inputs)


def _training(
  config: ml_collections.ConfigDict, schema: Schema, devices: Sequence[Any], inputs: str
) -> list[Candidate]:
  """Every meaningful choice of remat, mesh.fsdp and train.accumulation; `mesh.tensor` stays as it is.

  Batches are `whole_batch`, its halves down to one row a device and its doubles; of these only the first accumulates.
  """
  program = TrainingProgram(config, schema, inputs)
  own, ways = _mesh_sizes(config, devices), _ways(config, devices)
  rows = whole_batch(config, devices) // ways
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  found = []
  for fsdp in _divisors(ways // slices):
    sizes = {"data": -1, "fsdp": fsdp, "tensor": own["tensor"]}
    mesh = sharding.make_mesh(sizes, devices)
    held = sum(program.bytes_per_device(mesh))
    doubles = {rows * 2**n for n in range(_DOUBLINGS + 1)}
    for each, remat in itertools.product(sorted(_halves(rows) | doubles), _REMAT_TIME):
      for accumulation in _divisors(rows) if each == rows else (1,):
        wanted = {"train.batch_size": each * ways, "train.accumulation": accumulation, "remat": remat}
        if fsdp != own["fsdp"]:
          wanted |= {f"mesh.{axis}": size for axis, size in sizes.items()}
        changes = {key: value for key, value in wanted.items() if _get(config, key) != value}
        time = _REMAT_TIME[remat] * _FSDP_TIME ** math.log2(fsdp) * _ACCUMULATION_TIME ** math.log2(accumulation)
        time *= _BATCH_TIME ** math.log2(each / rows)
        found.append(Candidate(changes, time, held, each / accumulation * _REMAT_KEPT[remat], each == rows))
  return sorted(found, key=lambda one: (not one.own_batch, one.time))


def whole_batch(config: ml_collections.ConfigDict, devices: Sequence[Any]) -> int:
  """`train.batch_size`, raised to as many rows on every device in every micro-batch."""
  return padded_batch(config.train.batch_size, _ways(config, devices) * config.train.accumulation)


def _ways(config: ml_collections.ConfigDict, devices: Sequence[Any]) -> int:
  """The devices over which rows are split, whatever `mesh.fsdp` is."""
  return max(len(devices) // max(_mesh_sizes(config, devices)["tensor"], 1), 1)


def _mesh_sizes(config: ml_collections.ConfigDict, devices: Sequence[Any]) -> dict[str, int]:
  """`config.mesh` with the number of devices in the place of -1."""
  fixed = math.prod(size for size in config.mesh.values() if size != -1)
  return {axis: len(devices) // max(fixed, 1) if size == -1 else size for axis, size in config.mesh.items()}


def _divisors(number: int) -> list[int]:
  return [n for n in range(1, number + 1) if number % n == 0]


def _halves(rows: int) -> set[int]:
  """`rows`, and half as often as it goes."""
  return {math.ceil(rows / 2**n) for n in range(rows.bit_length() + 1)}


def _sampling(config: ml_collections.ConfigDict, devices: Sequence[Any], held: int) -> list[Candidate]:
  """Fewer images a batch: all that sampling can vary. The largest batch is the fastest."""
  rows = padded_batch(config.sample.batch_size, len(devices)) // len(devices)
  return [
    Candidate({} if r == rows else {"sample.batch_size": r * len(devices)}, 1 / r, held, r)
    for r in sorted(_halves(rows), reverse=True)
  ]


def _get(config: ml_collections.ConfigDict, key: str) -> Any:
  for part in key.split("."):
    config = config[part]
  return config


def search(
  options: Sequence[Candidate], compile_with: Callable[[Changes], dict[str, Any]], memory: int | None
) -> Iterator[dict[str, Any]]:
  """Compiles candidates in turn until one fits, then faster ones of a larger batch until one does, too.

  Those that cannot fit are skipped. Yields each one's report. Without an estimate of the speed nothing is known to be
  gained by a larger batch, and the first that fits is the last.

  Args:
    options: in the order of `candidates`.
    compile_with: makes the report of the config with some changes.
    memory: bytes of a device; None where nothing is known, and anything fits.
  """
  each = 0.0  # bytes of activations of relative size 1, as far as seen
  compiled = 0
  fitting = None
  for candidate in options:
    expected = candidate.held + each * candidate.activations
    if memory is not None and (candidate.held > memory or expected > memory * _TOLERANCE):
      continue
    if fitting and candidate.time >= fitting.time:
      continue
    if compiled == MAX_COMPILES:
      return
    facts = compile_with(candidate.changes)
    compiled += 1
    yield facts
    if facts["fits"]:
      if fitting or _SPEED not in facts:
        return
      fitting = candidate
    wanted = facts["memory"].get("peak") or 0
    # A compiler that does not say what it wanted, wanted more than there is.
    wanted = wanted if facts["fits"] else max(wanted, memory or 0)
    each = max(each, (wanted - candidate.held) / candidate.activations)


def best(tried: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
  """Of the reports of `search` the fastest that fits; the last where none does."""
  return max((facts for facts in tried if facts["fits"]), key=lambda facts: facts.get(_SPEED, 0.0), default=tried[-1])


def likely(options: Sequence[Candidate], changes: Changes, wanted: int, memory: int) -> Candidate | None:
  """The first candidate that should fit a device, where that with these changes wants `wanted` bytes of `memory`."""
  own = next((one for one in options if one.changes == changes), None)
  if own is None:
    return None
  each = max(wanted - own.held, 0) / own.activations
  return next((one for one in options if one.held + each * one.activations <= memory), None)
