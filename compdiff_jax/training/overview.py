"""What a run puts where: a table of parameters, shapes, shardings and bytes, printed once at start-up."""

import dataclasses
import itertools
import math
import sys
from collections.abc import Mapping
from typing import Any

import jax
from clu import parameter_overview
from jax.sharding import Mesh

from compdiff_jax.sharding import bytes_per_device


@dataclasses.dataclass(frozen=True)
class _Row:
  """One parameter. The fields are the table's columns."""

  parameter: str
  shape: tuple[int, ...]
  sharding: str
  bytes_a_device: int


@dataclasses.dataclass(frozen=True)
class _Group:
  """The parameters of one component that are placed alike."""

  component: str
  sharding: str
  tensors: int
  parameters: int
  bytes_a_device: int


def _rows(component: str, shapes: Mapping[str, Any], shardings: Mapping[str, Any]) -> list[_Row]:
  def axes(spec):
    return "x".join(axis or "-" for axis in spec) if any(spec) else "whole"

  return [
    _Row(f"{component}.{name}", leaf.shape, axes(shardings[name].spec), bytes_per_device(leaf, shardings[name]))
    for name, leaf in shapes.items()
  ]


def _groups(component: str, rows: list[_Row]) -> list[_Group]:
  alike = lambda row: row.sharding  # noqa: E731
  groups = []
  for sharding, members in itertools.groupby(sorted(rows, key=alike), alike):
    members = list(members)
    count = sum(math.prod(row.shape) for row in members)
    groups.append(_Group(component, sharding, len(members), count, sum(row.bytes_a_device for row in members)))
  return groups


def print_overview(abstract: Any, shardings: Any, mesh: Mesh, every_parameter: bool = False) -> None:
  """Prints the mesh, the trained parameters with their shardings, and the size of the training state, on stderr.

  Args:
    abstract: the training state as `ShapeDtypeStruct`s.
    shardings: its shardings.
    mesh: the device mesh.
    every_parameter: one row a parameter; otherwise one for those of a component that are placed alike.
  """
  show = lambda *words: print(*words, file=sys.stderr)  # noqa: E731
  device = mesh.devices.flat[0]
  processes = len({device.process_index for device in mesh.devices.flat})
  show(f"mesh {dict(mesh.shape)} on {mesh.size} {device.platform} device(s) of {processes} process(es)")
  groups = []
  for component, shapes in abstract.params.items():
    rows = _rows(component, shapes, shardings.params[component])
    groups += _groups(component, rows)
    if every_parameter:
      show(parameter_overview.make_table(rows))
  show(parameter_overview.make_table(groups))
  whole = sum(group.bytes_a_device for group in groups if group.sharding == "whole")
  if mesh.shape["fsdp"] > 1 and whole:
    show(f"  not split over fsdp, because no axis is divisible or a rule says so: {whole / 2**20:,.1f} MiB")
  leaves = jax.tree.leaves(abstract)
  total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves) / 2**20
  mebibytes = bytes_per_device(abstract, shardings) / 2**20
  show(f"  training state (parameters, EMA, optimizer): {mebibytes:,.1f} MiB a device, {total:,.1f} MiB in all")
