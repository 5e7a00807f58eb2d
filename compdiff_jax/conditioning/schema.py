"""The attribute schema: which demographic or clinical attributes a data set has, and how they are encoded.

A batch of attributes is a dict `{name: array [B]}`: categorical attributes are int32 indices into `values`, continuous
ones float32 in their unit. Unknown is a value of its own: `UNKNOWN_INDEX` (-1) or NaN. This module needs NumPy only,
so that data preparation can use it without an accelerator library.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compdiff_jax.cli import InputError, nearest

UNKNOWN_INDEX = -1
_UNKNOWN_TEXTS = frozenset({"", "unknown", "nan", "none", "na", "n/a"})

# A cell is one combination of levels: {"age": 3, "sex": 1}. Levels are category indices or bin indices.
Cell = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Attribute:
  """One attribute. `values` belongs to categorical ones; `low`, `high`, `bins` and `unit` to continuous ones.

  Attributes:
    name: column name, used in parameter names, plans, reports.
    kind: "categorical" or "continuous".
    values: the category names, in index order.
    low: smallest accepted number; high: largest accepted number (both inclusive).
    bins: inner edges; level i holds `bins[i-1] <= x < bins[i]`.
    unit: unit of a continuous attribute, for example "year".
  """

  name: str
  kind: str
  values: tuple[str, ...] = ()
  low: float = 0.0
  high: float = 0.0
  bins: tuple[float, ...] = ()
  unit: str = ""

  def __post_init__(self):
    object.__setattr__(self, "values", tuple(self.values))
    object.__setattr__(self, "bins", tuple(self.bins))
    if not self.name.isidentifier():
      raise InputError(f"attribute name {self.name!r} must be an identifier (letters, digits, underscore)")
    if self.kind == "categorical":
      if len(self.values) < 2 or len(set(self.values)) != len(self.values):
        raise InputError(f"attribute {self.name}: needs at least two different values")
      unusable = [value for value in self.values if value.strip().lower() in _UNKNOWN_TEXTS]
      if unusable:
        raise InputError(f"attribute {self.name}: the value {unusable[0]!r} already stands for unknown; rename it")
    elif self.kind == "continuous":
      if not self.low < self.high:
        raise InputError(f"attribute {self.name}: needs low < high")
      edges = (self.low, *self.bins, self.high)
      if any(a >= b for a, b in itertools.pairwise(edges)):
        raise InputError(f"attribute {self.name}: bins {list(self.bins)} must rise between low and high")
    else:
      raise InputError(f"attribute {self.name}: kind {self.kind!r} must be 'categorical' or 'continuous'")

  @property
  def num_levels(self) -> int:
    return len(self.values) if self.kind == "categorical" else len(self.bins) + 1

  @property
  def level_names(self) -> tuple[str, ...]:
    """Category names, or bin names such as "0-18", "18-40", "80+"."""
    if self.kind == "categorical":
      return self.values
    edges = [self.low, *self.bins]
    closed = [f"{a:g}-{b:g}" for a, b in itertools.pairwise(edges)]
    return (*closed, f"{edges[-1]:g}+")

  @property
  def unknown(self) -> int | float:
    return UNKNOWN_INDEX if self.kind == "categorical" else math.nan

  @property
  def dtype(self) -> np.dtype:
    return np.dtype(np.int32 if self.kind == "categorical" else np.float32)

  def encode(self, text: Any) -> int | float:
    """The encoded value of one table cell. Raises `ValueError` saying why a value is not accepted."""
    text = "" if text is None else str(text).strip()
    if text.lower() in _UNKNOWN_TEXTS:
      return self.unknown
    if self.kind == "categorical":
      if text not in self.values:
        raise ValueError(f"{self.name} {text!r} is not one of {', '.join(self.values)}")
      return self.values.index(text)
    try:
      number = float(text)
    except ValueError:
      raise ValueError(f"{self.name} {text!r} is not a number") from None
    if not self.low <= number <= self.high:
      raise ValueError(f"{self.name} {text} is outside {self.low:g} to {self.high:g}")
    return number

  def decode(self, value: int | float) -> str:
    """The table text of an encoded value; the empty string when it is unknown."""
    if not self.is_known(value):
      return ""
    return self.values[int(value)] if self.kind == "categorical" else f"{float(value):g}"

  def is_known(self, values):
    """Boolean mask, elementwise; works on NumPy and JAX arrays and on Python numbers."""
    return values >= 0 if self.kind == "categorical" else values == values  # NaN is the only x != x

  def levels(self, values: np.ndarray) -> np.ndarray:
    """Level index of each encoded value, int32 [B]; -1 where unknown."""
    values = np.asarray(values)
    if self.kind == "categorical":
      return values.astype(np.int32)
    index = np.searchsorted(np.asarray(self.bins), np.nan_to_num(values), side="right")
    return np.where(np.isnan(values), UNKNOWN_INDEX, index).astype(np.int32)

  def representative(self, level: int) -> int | float:
    """An encoded value inside a level: the index itself, or the middle of the bin (rounded)."""
    if self.kind == "categorical":
      return level
    edges = (self.low, *self.bins, self.high)
    return float(round((edges[level] + edges[level + 1]) / 2))


@dataclasses.dataclass(frozen=True)
class Schema:
  """An ordered set of attributes. It travels with the data set, the checkpoint and the export.

  Plain Stable Diffusion has an empty one.
  """

  attributes: tuple[Attribute, ...]

  def __post_init__(self):
    object.__setattr__(self, "attributes", tuple(self.attributes))
    if len(set(self.names)) != len(self.names):
      raise InputError(f"schema needs unique names, got {list(self.names)}")

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(attribute.name for attribute in self.attributes)

  def __iter__(self) -> Iterator[Attribute]:
    return iter(self.attributes)

  def __getitem__(self, name: str) -> Attribute:
    for attribute in self.attributes:
      if attribute.name == name:
        return attribute
    raise InputError(f"the schema has no attribute {name!r}{nearest(name, self.names)}")

  def subset(self, names: Sequence[str]) -> "Schema":
    """The schema of some attributes, in this schema's order."""
    for name in names:
      self[name]
    return Schema(tuple(a for a in self.attributes if a.name in names))

  def unknown(self, batch: int) -> dict[str, np.ndarray]:
    """A batch in which every attribute is unknown."""
    return {a.name: np.full([batch], a.unknown, a.dtype) for a in self}

  def cells(self) -> list[dict[str, int]]:
    """Every full combination of levels, first attribute slowest."""
    ranges = [range(a.num_levels) for a in self]
    return [dict(zip(self.names, levels)) for levels in itertools.product(*ranges)]

  def cell_name(self, cell: Cell) -> str:
    """For example "age=60-80,sex=female"; `parse_cell` is its inverse."""
    return ",".join(f"{name}={self[name].level_names[level]}" for name, level in cell.items())

  def parse_cell(self, text: str) -> dict[str, int]:
    """Reads "age=60-80,sex=female" into level indices; some attributes may be left out."""
    cell = {}
    for part in text.split(","):
      name, _, level = (piece.strip() for piece in part.partition("="))
      names = self[name].level_names
      if name in cell:
        raise InputError(f"cell {text!r} names {name} twice")
      if level not in names:
        raise InputError(f"cell {text!r}: {name} has no level {level!r}{nearest(level, names)}")
      cell[name] = names.index(level)
    return cell

  def in_cell(self, attributes: Mapping[str, np.ndarray], cell: Cell) -> np.ndarray:
    """Boolean mask [B] of the examples that lie in the (possibly partial) cell."""
    masks = [self[name].levels(attributes[name]) == level for name, level in cell.items()]
    return np.logical_and.reduce(masks)

  def to_json(self) -> list[dict[str, Any]]:
    """Plain data: for each attribute the fields that belong to its kind."""
    fields = {"categorical": ("values",), "continuous": ("low", "high", "bins", "unit")}
    return [{k: getattr(a, k) for k in ("name", "kind", *fields[a.kind])} for a in self]

  @classmethod
  def from_json(cls, data: Sequence[Mapping[str, Any]]) -> "Schema":
    try:
      return cls(tuple(Attribute(**dict(entry)) for entry in data))
    except TypeError as error:
      raise InputError(f"malformed attribute schema: {error}") from None

  def save(self, path: str | Path) -> None:
    Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n")

  @classmethod
  def load(cls, path: str | Path) -> "Schema":
    try:
      return cls.from_json(json.loads(Path(path).read_text()))
    except FileNotFoundError:
      raise InputError(f"{path} is missing; is this a directory written by data_prep?") from None
    except json.JSONDecodeError as error:
      raise InputError(f"{path} is not valid JSON ({error})") from None
