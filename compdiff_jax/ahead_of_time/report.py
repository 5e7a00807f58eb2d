"""What is known about a program before it runs: memory, work, traffic, and how fast that lets it be."""

import collections
import importlib.metadata
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections

from compdiff_jax.ahead_of_time.chips import Chip, chip, compiler_options, usable_memory
from compdiff_jax.ahead_of_time.flops import count_jaxpr
from compdiff_jax.ahead_of_time.gpu_targets import COMPILER_OPTIONS as GPU_OPTIONS
from compdiff_jax.ahead_of_time.hlo import Program as Compiled
from compdiff_jax.ahead_of_time.program import Program, model_flops, trace
from compdiff_jax.ahead_of_time.topologies import is_torus
from compdiff_jax.conditioning.schema import Schema

# How the TPU compiler says what it wanted, in gibibytes and the like: "(20.00G) exceeds", "Used 23.41G of 15.75G hbm".
_WANTED = re.compile(r"(?:\(|Used )([\d.]+)([KMGT]?)\)? (?:exceeds available|of [\d.]+[KMGT]? hbm)")
_AVAILABLE = re.compile(r"(?:available HBM \(|of )([\d.]+)([KMGT]?)(?:\)| hbm)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# The packages that a compiler comes with; of the second kind one is installed.
_COMPILERS = {"tpu": ("libtpu",), "gpu": ("jax-cuda12-pjrt", "jax-cuda13-pjrt")}
# Calls without which nothing is computed, to which the TPU compiler's estimate gives the time of -1 s.
_COSTLESS_CALLS = ("ConcatBitcast", "ZeroCrop", "SliceId")


def report(
  program: str,
  config: ml_collections.ConfigDict,
  schema: Schema,
  devices: Sequence[Any],
  topology: str,
  inputs: str,
  memory_bytes: int | None = None,
) -> dict[str, Any]:
  """Compiles the program and returns what is known about it, ready for JSON.

  Args:
    program: "train" or "sample".
    config: the run's config.
    schema: attributes of the data.
    devices: those of `topology`.
    inputs: what the data set holds, "images" or "moments".
    memory_bytes: of a device; None: what its kind has to offer.

  `fits` is False, and what follows from a compiled program is missing, where the compiler ran out of device memory.
  """
  figures = chip(devices[0])
  traced = trace(program, config, schema, devices, inputs)
  facts = _question(program, config, devices, topology, inputs, traced)
  sized = config.copy_and_resolve_references()
  if program == "sample":
    sized.sample.batch_size = traced.images  # rounded up
  facts["model_flops"] = model_flops(sized, schema, inputs, program)
  facts["memory"] = {"state": traced.state_bytes, "gradients": traced.gradient_bytes}
  available = memory_bytes or usable_memory(devices[0])
  if available:
    facts["memory"]["available"] = available
  started = time.monotonic()
  try:
    options = GPU_OPTIONS if topology != "local" and devices[0].platform == "gpu" else {}
    compiled = traced.traced.lower().compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return facts | out_of_memory(str(error), facts["memory"])
  facts["compile_seconds"] = round(time.monotonic() - started, 1)
  facts["memory"] |= memory(compiled, traced.idle_bytes)
  facts["fits"] = available is None or facts["memory"]["peak"] <= available
  text = Compiled(compiled.as_text())
  facts |= work(compiled.cost_analysis() or {}, text, traced, devices[0].platform, figures)
  facts |= _speed(facts, figures)
  facts["collectives"] = _collectives(text, "ICI" if devices[0].platform == "tpu" else "links")
  detour = 2 if ":" in topology and devices[0].platform == "tpu" and not is_torus(topology) else 1
  facts |= _network_seconds(facts["collectives"], figures, detour)
  return facts


def _question(
  program: str,
  config: ml_collections.ConfigDict,
  devices: Sequence[Any],
  topology: str,
  inputs: str,
  traced: Program,
) -> dict[str, Any]:
  libraries = ("jax", *_COMPILERS.get(devices[0].platform, ()))
  facts: dict[str, Any] = {
    "program": program,
    "topology": topology,
    "slices": len({getattr(device, "slice_index", 0) for device in devices}),
    "devices": traced.mesh.size,
    "device_kind": devices[0].device_kind,
    "mesh": dict(traced.mesh.shape),
    "batch_size": traced.images,
    "compute_dtype": config.compute_dtype,
    "libraries": {name: version for name in libraries if (version := _version(name))},
  }
  if program == "sample":
    return facts | {"steps": config.sample.num_steps, "sampler": config.sample.sampler}
  facts |= {"inputs": inputs, "accumulation": config.train.accumulation, "remat": config.remat}
  return facts | {"compiler_options": compiler_options(devices[0])}


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def out_of_memory(message: str, memory: Mapping[str, int]) -> dict[str, Any]:
  """What to report when the compiler ran out of device memory: its message, and `memory` with what it wanted."""
  text = " ".join(message.split())
  found = {name: _size(pattern, text) for name, pattern in (("peak", _WANTED), ("available", _AVAILABLE))}
  known = {name: size for name, size in found.items() if size}
  return {"fits": False, "memory": {**memory, **known}, "compiler": text.removeprefix("RESOURCE_EXHAUSTED: ")[:200]}


def _size(pattern: re.Pattern[str], text: str) -> int | None:
  found = pattern.search(text)
  return int(float(found[1]) * _UNITS[found[2]]) if found else None


def memory(compiled: Any, idle: int = 0) -> dict[str, int]:
  """Bytes of one device, with the `idle` ones of what a run keeps there and the program does not take.

  Donated arguments and the results that take their place are counted once.
  """
  stats = compiled.memory_analysis()
  sizes = {
    "arguments": stats.argument_size_in_bytes,
    "results": stats.output_size_in_bytes - stats.alias_size_in_bytes,
    "temporaries": stats.temp_size_in_bytes,
    "code": stats.generated_code_size_in_bytes,
    "idle": idle,
  }
  return {**sizes, "peak": sum(sizes.values())}


def work(
  costs: Mapping[str, float], text: Compiled, traced: Program, platform: str, figures: Chip | None
) -> dict[str, float]:
  """Operations, bytes and the compiler's time of one device and call.

  Operations are counted in the traced program: recomputation, loops and kernels are in them. The compiler's bytes and
  time know neither how often a loop runs nor what is inside a kernel. Both are added: loops by the share of the traffic
  that is inside, kernels by what their operands and operations take at the peak of the chip. A compiler that states
  nothing, as that for GPUs without a GPU, leaves bytes by whole operands and no time.
  """
  jaxpr, devices = traced.traced.jaxpr.jaxpr, traced.mesh.size
  lowered = "cuda" if platform == "gpu" else platform
  kernels = text.custom_calls("tpu_custom_call")
  kernel_bytes = sum(size * times for size, times in kernels)
  total, once = text.bytes_accessed()
  loops = (total - kernel_bytes) / max(once - sum(size for size, _ in kernels), 1)
  found = {
    "flops": count_jaxpr(jaxpr, lowered) / devices,
    "kernel_flops": count_jaxpr(jaxpr, lowered, kernels_only=True) / devices,
    "bytes_accessed": float(costs.get("bytes accessed", once)) * loops + kernel_bytes,
  }
  seconds = costs.get("optimal_seconds", 0.0) + sum(len(text.custom_calls(target)) for target in _COSTLESS_CALLS)
  if figures is not None and seconds > 0:
    inside = max(found["kernel_flops"] / figures.flops, kernel_bytes / figures.hbm_bandwidth)
    found["estimated_seconds"] = float(seconds) * loops + inside
  return found


def _speed(facts: Mapping[str, Any], figures: Chip | None) -> dict[str, float]:
  """Estimates, not measurements: what follows from the compiler's time, and what the vendor's figures say.

  Products take at least `compute_bound_seconds`. A step may take less than `memory_bound_seconds`: among the compiler's
  bytes are those that never leave the fast memory on the chip.
  """
  speed = {}
  if figures is not None:
    speed["compute_bound_seconds"] = facts["flops"] / figures.flops
    speed["memory_bound_seconds"] = facts["bytes_accessed"] / figures.hbm_bandwidth
  if "estimated_seconds" in facts:
    seconds = facts["estimated_seconds"]
    speed["estimated_images_per_second_a_chip"] = facts["batch_size"] / facts["devices"] / seconds
    speed["estimated_mfu"] = facts["model_flops"] / facts["devices"] / seconds / figures.flops
  return speed


def _collectives(text: Compiled, links: str) -> list[dict[str, Any]]:
  """Operations and bytes of one device and call by kind and network, the largest first.

  `bytes` is the size of the arrays, `sent_bytes` what the device sends of them.
  """
  totals = collections.defaultdict(lambda: [0, 0, 0.0])
  for one in text.collectives():
    total = totals[one.kind, "DCN" if one.between_slices else links]
    total[0] += one.times
    total[1] += one.times * one.size
    total[2] += one.sent
  ranked = sorted(totals.items(), key=lambda item: -item[1][1])
  return [
    {"kind": kind, "network": network, "count": count, "bytes": size, "sent_bytes": round(sent)}
    for (kind, network), (count, size, sent) in ranked
  ]


def _network_seconds(rows: Sequence[Mapping[str, Any]], figures: Chip | None, detour: int) -> dict[str, float]:
  """What the collectives take alone, at the speed of all links together; `detour` is 2 where they form no rings."""
  seconds = {}
  for network, speed in (("ICI", figures and figures.ici_bandwidth), ("DCN", figures and figures.dcn_bandwidth)):
    sent = sum(row["sent_bytes"] for row in rows if row["network"] == network)
    if sent and speed:
      seconds[f"{network.lower()}_seconds"] = sent / speed * (detour if network == "ICI" else 1)
  return seconds
