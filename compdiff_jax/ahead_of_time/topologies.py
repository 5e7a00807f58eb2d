"""Devices to compile for that are not here: slices of TPUs and hosts with GPUs, by name."""

import importlib.util
import itertools
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from compdiff_jax.ahead_of_time.chips import chip_by_name
from compdiff_jax.ahead_of_time.gpu_targets import GPUS, gpu_devices
from compdiff_jax.cli import InputError, nearest

# Generations, and how long a side of a slice must be for its links to close into a ring.
_GENERATIONS = {"v4": 4, "v5e": 16, "v5p": 4, "v6e": 16}
_MAX_CHIPS = 256


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
    figures = chip_by_name(GPUS[kind].kind)
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
