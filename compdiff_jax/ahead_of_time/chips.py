"""Accelerators by name: what their vendors state, and TPU topologies to compile for."""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from compdiff_jax.cli import InputError, nearest


@dataclasses.dataclass(frozen=True)
class Chip:
  """Vendor figures of one chip.

  Attributes:
    flops: dense bfloat16 operations per second.
    hbm_bytes: device memory.
    hbm_bandwidth: bytes per second.
  """

  flops: float
  hbm_bytes: int
  hbm_bandwidth: float


_GIB = 2**30

# By the names that `device_kind` gives; the first that it begins with counts.
CHIPS = {
  "TPU v4": Chip(275e12, 32 * _GIB, 1.2e12),
  "TPU v5 lite": Chip(197e12, 16 * _GIB, 0.82e12),
  "TPU v5": Chip(459e12, 95 * _GIB, 2.77e12),  # v5p
  "TPU v6 lite": Chip(918e12, 32 * _GIB, 1.64e12),
  "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * _GIB, 1.6e12),
  "NVIDIA A100": Chip(312e12, 80 * _GIB, 2.0e12),
  "NVIDIA H100": Chip(989e12, 80 * _GIB, 3.35e12),
  "NVIDIA H200": Chip(989e12, 141 * 10**9, 4.8e12),
}

_GENERATIONS = ("v4", "v5e", "v5p", "v6e")


def chip(device: Any) -> Chip | None:
  """The figures of a device, or None where they are not known."""
  return next((figures for kind, figures in CHIPS.items() if device.device_kind.startswith(kind)), None)


def topology_devices(name: str, slices: int) -> list[Any]:
  """The devices of "local", or of `slices` slices of a TPU topology such as "v5e:4x4" or "v5p:2x2x4".

  The TPU compiler comes with the `libtpu` wheel and needs no TPU.
  """
  if name == "local":
    if slices != 1:
      raise InputError("--slices needs a TPU topology")
    return jax.devices()
  generation, _, layout = name.partition(":")
  if generation not in _GENERATIONS or not re.fullmatch(r"\d+(x\d+){1,2}", layout):
    known = "" if generation in _GENERATIONS else nearest(generation, _GENERATIONS)
    raise InputError(f"--topology {name!r} must be local or GENERATION:LAYOUT, for example v5e:4x4, v5p:2x2x4{known}")
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(f"--topology {name} needs the TPU compiler: pip install 'jax[tpu]' (no TPU is needed)")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # this machine is no TPU VM to ask about
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is used, so several may compile at once
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices).devices
  except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
    reason = " ".join(str(error).split())[:200]
    raise InputError(
      f"--topology {name} with --slices {slices}: the TPU compiler knows no such one ({reason})"
    ) from None
