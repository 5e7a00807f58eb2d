"""Accelerators by name: what their vendors state, and topologies to compile for."""

import dataclasses
import importlib.util
import itertools
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from compdiff_jax.ahead_of_time.gpu_targets import GPUS, gpu_devices
from compdiff_jax.cli import InputError, nearest


@dataclasses.dataclass(frozen=True)
class Chip:
  """Vendor figures of one chip.

  Attributes:
    flops: dense bfloat16 operations per second.
    hbm_bytes: device memory.
    hbm_bandwidth: bytes per second.
    ici_bandwidth: bytes per second that it can send to its neighbours, over all links together; 0: not stated.
    dcn_bandwidth: its share of the host's network cards, bytes per second; 0: not stated.
    vmem_limit: KiB of the fast memory on the chip that one instruction may use; None: the compiler's choice.
  """

  flops: float
  hbm_bytes: int
  hbm_bandwidth: float
  ici_bandwidth: float = 0.0
  dcn_bandwidth: float = 0.0
  vmem_limit: int | None = None


_GIB = 2**30

# By the names that `device_kind` gives; the first that it begins with counts. Links of TPUs are from the pages v4, v5e,
# v5p and v6e of the Cloud TPU documentation, half of the bidirectional figure (v4: all-reduce bandwidth of a pod, 1.1
# PB/s, over its 4,096 chips). Networks: v5e two cards of 100 Gbit/s for eight chips, v5p 50 Gbit/s a chip, both from
# there; v6e four cards of 200 Gbit/s for eight chips, general knowledge; v4 is not stated. The limit of v5p is that of
# MaxDiffusion's guide; by the compiler's estimate more than the default gains little on v5e and costs time on v6e
# (docs/benchmarks.md).
CHIPS = {
  "TPU v4": Chip(275e12, 32 * _GIB, 1.2e12, 270e9),
  "TPU v5 lite": Chip(197e12, 16 * _GIB, 0.82e12, 200e9, 3.125e9),
  "TPU v5": Chip(459e12, 95 * _GIB, 2.77e12, 600e9, 6.25e9, 65536),  # v5p
  "TPU v6 lite": Chip(918e12, 32 * _GIB, 1.64e12, 400e9, 12.5e9),
  "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * _GIB, 1.6e12),
  "NVIDIA A100-PCIE-40GB": Chip(312e12, 40 * _GIB, 1.6e12),
  "NVIDIA A100": Chip(312e12, 80 * _GIB, 2.0e12),
  "NVIDIA H100 PCIe": Chip(756e12, 80 * _GIB, 2.0e12),
  "NVIDIA H100 NVL": Chip(835e12, 94 * 10**9, 3.9e12),
  "NVIDIA H100 80GB HBM3": Chip(989e12, 80 * _GIB, 3.35e12),
  "NVIDIA H200 NVL": Chip(835e12, 141 * 10**9, 4.8e12),
  "NVIDIA H200": Chip(989e12, 141 * 10**9, 4.8e12),
}

_VMEM_LIMIT = "xla_tpu_scoped_vmem_limit_kib"

# Generations, and how long a side of a slice must be for its links to close into a ring.
_GENERATIONS = {"v4": 4, "v5e": 16, "v5p": 4, "v6e": 16}
_MAX_CHIPS = 256


def chip(device: Any) -> Chip | None:
  """The figures of a device, or None where they are not known."""
  return _figures(device.device_kind)


def _figures(kind: str) -> Chip | None:
  return next((figures for name, figures in CHIPS.items() if kind.startswith(name)), None)


def usable_memory(device: Any) -> int | None:
  """Bytes that a program may take of a device: on a GPU, the share that JAX reserves for itself."""
  figures = chip(device)
  if figures is None:
    return None
  share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")) if device.platform == "gpu" else 1.0
  return int(figures.hbm_bytes * share)


def compiler_options(device: Any) -> dict[str, str]:
  """Options of the compiler for a training step on this kind of device, as `jax.jit` takes them.

  What `LIBTPU_INIT_ARGS` says of the same option goes before it.
  """
  figures = chip(device)
  if figures is None or figures.vmem_limit is None or _VMEM_LIMIT in os.environ.get("LIBTPU_INIT_ARGS", ""):
    return {}
  return {_VMEM_LIMIT: str(figures.vmem_limit)}


def topology_devices(name: str, slices: int) -> list[Any]:
  """The devices of "local", of one host with GPUs ("h100:8"), or of `slices` slices of a TPU topology ("v5p:2x2x4").

  The TPU compiler comes with the `libtpu` wheel and needs no TPU.
  """
  kind, _, layout = name.partition(":")
  if (name == "local" or kind in GPUS) and slices != 1:
    raise InputError("--slices needs a TPU topology")
  if name == "local":
    return jax.devices()
  if kind in GPUS:
    figures = _figures(GPUS[kind].kind)
    return gpu_devices(kind, layout, figures.hbm_bytes, figures.hbm_bandwidth)
  sides = _sides(name)
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(f"--topology {name} needs the TPU compiler: pip install 'jax[tpu]' (no TPU is needed)")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # this machine is no TPU VM to ask about
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is used, so several may compile at once
  # The two cores of a v4 chip work as one device, as they do by default where the hardware is.
  options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices, **options).devices
  except (jax.errors.JaxRuntimeError, ValueError, RuntimeError):
    close = ", ".join(_layouts(name.partition(":")[0], math.prod(sides)))
    raise InputError(
      f"--topology {name} with --slices {slices}: the TPU compiler knows no such one; of about that size: {close}"
    ) from None


def is_torus(name: str) -> bool:
  """Whether the links of every side of a slice close into rings, which doubles what they carry."""
  return all(side == 1 or side % _GENERATIONS[name.partition(":")[0]] == 0 for side in _sides(name))


def _sides(name: str) -> list[int]:
  """[4, 4] of "v5e:4x4"."""
  generation, _, layout = name.partition(":")
  dimensions, side = 3 if generation in ("v4", "v5p") else 2, r"[1-9]\d*"
  if generation not in _GENERATIONS or not re.fullmatch(rf"{side}(x{side}){{{dimensions - 1}}}", layout):
    unknown = generation not in _GENERATIONS
    known = nearest(generation, [*_GENERATIONS, *GPUS]) if unknown else _suggestion(generation, layout)
    raise InputError(f"--topology {name!r} must be local, GENERATION:LAYOUT as v5e:4x4 or v5p:2x2x4, or h100:8{known}")
  return [int(side) for side in layout.split("x")]


def _suggestion(generation: str, layout: str) -> str:
  """Of a chip count, "16", or of a layout with too many or too few sides."""
  numbers = [int(number) for number in re.findall(r"\d+", layout)]
  return f"; {generation} has {', '.join(_layouts(generation, math.prod(numbers) or 1))}"


def _layouts(generation: str, chips: int) -> list[str]:
  """Up to three layouts of about that many chips, at most 256; no side is more than twice another."""
  dimensions = 3 if generation in ("v4", "v5p") else 2
  sides = itertools.combinations_with_replacement([1, 2, 4, 8, 16], dimensions)
  known = [s for s in sides if s[-1] <= 2 * s[0] and 4 <= math.prod(s) <= _MAX_CHIPS]
  ranked = sorted(known, key=lambda s: (abs(math.log(math.prod(s) / chips)), s))
  # Written as the vendor does: a side of 1 comes last.
  return [f"{generation}:{'x'.join(map(str, sorted(s, key=lambda side: (side == 1, side))))}" for s in ranked[:3]]
