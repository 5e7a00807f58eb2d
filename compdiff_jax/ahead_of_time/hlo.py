"""What a compiled program does, read from its HLO text: collectives, bytes in loops, calls that have no cost."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_INSTRUCTION = re.compile(r"^ *(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)")
_COLLECTIVE = re.compile(rf"({'|'.join(_KINDS)}|send)(-start)?")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_LIMIT = re.compile(r"= s(?:32|64)\[\][^ ]* constant\((\d+)\)")
_DEVICES = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")
# Between slices a TPU program sends through the host.
_BETWEEN_SLICES = "xla_megascale"
# Instructions that run other computations, of which a fusion is one instruction to the memory.
_CALLERS = ("while", "conditional", "call", "async-start")
# They move nothing: names for parts of other arrays, and ends of what is counted at its start.
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
  *("copy-done", "slice-done", "async-done", "async-update", "send-done", "recv-done", "recv", *_CALLERS),
}


class Collective(NamedTuple):
  """One collective operation.

  Attributes:
    kind: all-reduce, all-gather, …; "send" is one between slices.
    size: bytes of the array before it is scattered or after it is gathered, on one device.
    times: how often it runs in one call of the program.
    between_slices: whether it crosses the network between slices (DCN) and not the chips' own links (ICI, NVLink).
    group: devices that take part together.
  """

  kind: str
  size: int
  times: int
  between_slices: bool
  group: int = 1

  @property
  def sent(self) -> float:
    """Bytes that each device has to send: an all-reduce is a reduce-scatter and an all-gather, in rings."""
    rounds = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1}.get(self.kind)
    return self.size * self.times * (rounds * (1 - 1 / self.group) if rounds else 1)


class Program:
  """A module's computations, from `jax.stages.Compiled.as_text()`. Loops of known length are multiplied out."""

  def __init__(self, text: str):
    self._bodies: dict[str, list[str]] = {}
    self._entry = name = ""
    self._devices = math.prod(int(number) for number in _DEVICES.findall(text.partition("\n")[0]))
    for line in text.splitlines():
      header = _COMPUTATION.match(line)
      if header:
        name = header.group(1)
        self._bodies[name] = []
        self._entry = name if line.startswith("ENTRY") else self._entry
      elif name:
        self._bodies[name].append(line)
    lines = (_INSTRUCTION.match(line) for body in self._bodies.values() for line in body)
    self._sizes = {found[1]: _shape_bytes(found[2]) for found in lines if found}
    # A sum of which a device keeps its part: how the TPU compiler writes a reduce-scatter.
    roots = (_INSTRUCTION.match(line) for body in self._bodies.values() for line in body if "ROOT" in line)
    self._scattered = {root[4].split(",")[0].split("%")[-1] for root in roots if root and root[3] == "dynamic-slice"}

  def collectives(self) -> list[Collective]:
    """Every collective once.

    One that runs beside other work is a chain of fusions to the TPU compiler, of which each names the whole collective.
    """
    found, chains = [], set()
    for line, (name, shape, opcode, operands), times in self._instructions((*_CALLERS, "fusion")):
      operation, chain = _COLLECTIVE.fullmatch(opcode), _CHAIN.search(line)
      if operation and chain:
        if chain[1] in chains:
          continue
        chains.add(chain[1])
      if operation and (operation[1] != "send" or _BETWEEN_SLICES in line):
        kind, group = operation[1], _group_size(line, self._devices)
        size = _collective_bytes(shape, kind, operands.count("%") if operation[2] else 0, group)
        kind = "reduce-scatter" if kind == "all-reduce" and name in self._scattered else kind
        found.append(Collective(kind, size, times, kind == "send", group))
    return found

  def bytes_accessed(self) -> tuple[int, int]:
    """Bytes that instructions read and write: (with loops multiplied out, every instruction once).

    Coarser than the compiler's own count, which knows what part of an array a fusion reads, but takes a loop once. The
    ratio of the two numbers says how that count is to be extended.
    """
    total = once = 0
    for _, instruction, times in self._instructions(_CALLERS):
      size = self._bytes(instruction)
      total, once = total + size * times, once + size
    return total, once

  def custom_calls(self, target: str) -> list[tuple[int, int]]:
    """(bytes of operands and results, times it runs) of every call of a target, such as "tpu_custom_call"."""
    return [
      (self._bytes(instruction), times)
      for line, instruction, times in self._instructions(_CALLERS)
      if f'custom_call_target="{target}"' in line
    ]

  def _bytes(self, instruction: tuple[str, str, str, str]) -> int:
    _, shape, opcode, operands = instruction
    if opcode in _FREE:
      return 0
    read = sum(self._sizes.get(name, 0) for name in re.findall(r"%([\w.\-]+)", operands))
    # The result of an asynchronous start names its operands, too.
    return _shape_bytes(shape) + (0 if opcode.endswith("-start") else read)

  def _instructions(self, callers: Sequence[str], name: str = "", times: int = 1) -> Iterator[tuple[str, Any, int]]:
    """(line, (name, shape, opcode, operands), how often it runs), going into what `callers` run."""
    for line in self._bodies.get(name or self._entry, ()):
      match = _INSTRUCTION.match(line)
      if not match:
        continue
      yield line, match.groups(), times
      if match[3] in callers:
        branches = [name for found in _BRANCHES.findall(line) for name in re.findall(r"[\w.\-]+", found)]
        for called in _CALLED.findall(line) + branches:
          yield from self._instructions(callers, called, times * (self._trips(line) if match[3] == "while" else 1))

  def _trips(self, line: str) -> int:
    """The length of a loop. Where the compiler does not state it: the one constant in the loop's condition."""
    known = _TRIPS.search(line)
    if known:
      return int(known[1])
    condition = _CONDITION.search(line)
    limits = [m[1] for test in self._bodies.get(condition[1], ()) if (m := _LIMIT.search(test))] if condition else []
    return int(limits[0]) if len(limits) == 1 else 1


def _shape_bytes(shape: str) -> int:
  return sum(_array_bytes(*array) for array in _ARRAY.findall(shape))


def _collective_bytes(shape: str, kind: str, started: int, group: int) -> int:
  """`started` is the number of operands where the operation is an asynchronous start, else 0."""
  arrays = [_array_bytes(*array) for array in _ARRAY.findall(shape)]
  if kind == "send":  # (data, context, token)
    return arrays[0]
  if started and kind in ("all-gather", "collective-permute", "reduce-scatter"):  # (operands, results, contexts)
    return sum(arrays[:started] if kind == "reduce-scatter" else arrays[started : 2 * started])
  size = sum(arrays)
  return size * group if kind == "reduce-scatter" else size


def _array_bytes(kind: str, dimensions: str) -> int:
  bits = 8 if kind == "pred" else int(re.search(r"\d+", kind).group())
  return math.prod(int(d) for d in dimensions.split(",") if d) * bits // 8


def _group_size(line: str, devices: int) -> int:
  """How many of a module's devices take part together.

  Groups are written as "{{0,1},{2,3}}", as "[2,4]<=[8]" (two of four) or as axes of a mesh, "mesh['a'=2,'b'=4] {'b'}",
  or parts of axes, "{'a':(1)2}"; "{}" is one group of all devices.
  """
  if "replica_groups={}" in line:
    return devices
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
  if listed:
    return listed[1].count(",") + 1
  tiled = re.search(r"replica_groups=\[\d+,(\d+)\]<=", line)
  if tiled:
    return int(tiled[1])
  named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line)
  if named:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
    return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2]))
  return 1
