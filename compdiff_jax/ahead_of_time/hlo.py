"""Collectives of a compiled program, read from its HLO text."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_OP = re.compile(rf"= (.*?) ({'|'.join(_KINDS)}|send)(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALL = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
# Between slices a TPU program sends through the host.
_BETWEEN_SLICES = "xla_megascale"


class Collective(NamedTuple):
  """One collective operation.

  Attributes:
    kind: all-reduce, all-gather, …; "send" is one between slices.
    size: bytes of the array before it is scattered or after it is gathered, on one device.
    times: how often it runs in one call of the program.
    between_slices: whether it crosses the network between slices (DCN) and not the chips' own links (ICI, NVLink).
  """

  kind: str
  size: int
  times: int
  between_slices: bool


def collectives(text: str) -> list[Collective]:
  """Every collective of a module, `jax.stages.Compiled.as_text()`; loops with a known trip count are multiplied out."""
  bodies: dict[str, list[str]] = {}
  entry = name = ""
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      name = header.group(1)
      bodies[name] = []
      entry = name if line.startswith("ENTRY") else entry
    elif name:
      bodies[name].append(line)
  return list(_walk(bodies, entry, 1))


def _walk(bodies: dict[str, list[str]], name: str, times: int) -> Iterator[Collective]:
  for line in bodies.get(name, ()):
    operation = _OP.search(line)
    if operation:
      shape, kind, started = operation.groups()
      if kind != "send" or _BETWEEN_SLICES in line:
        yield Collective(kind, _bytes(shape, kind, bool(started), line), times, kind == "send")
        continue
    trips = _TRIPS.search(line) if " while(" in line else None
    for called in _CALL.findall(line):
      yield from _walk(bodies, called, times * (int(trips.group(1)) if trips else 1))


def _bytes(shape: str, kind: str, started: bool, line: str) -> int:
  arrays = [_array_bytes(*array) for array in _ARRAY.findall(shape)]
  if kind == "send":  # (data, context, token)
    return arrays[0]
  if started and kind in ("all-gather", "collective-permute"):  # (operands, results, contexts)
    return max(arrays)
  size = sum(arrays)
  return size * _group_size(line) if kind == "reduce-scatter" else size


def _array_bytes(kind: str, dimensions: str) -> int:
  bits = 8 if kind == "pred" else int(re.search(r"\d+", kind).group())
  return math.prod(int(d) for d in dimensions.split(",") if d) * bits // 8


def _group_size(line: str) -> int:
  """Devices that take part together: of "replica_groups={{0,1},{2,3}}" or "[2,4]<=[8]"."""
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
  if listed:
    return listed.group(1).count(",") + 1
  tiled = re.search(r"replica_groups=\[\d+,(\d+)\]<=", line)
  return int(tiled.group(1)) if tiled else 1
