"""The attribute schema: which demographic or clinical attributes a data set has, and how they are encoded.

A batch of attributes is a dict `{name: array}`: categorical attributes are int32 [B], indices into `values`; continuous
ones float32 [B] in their unit; multilabel ones int8 [B, L], for each label in `values` an index into `STATES`. Unknown
is a value of its own: `UNKNOWN_INDEX` (-1, for all labels together) or NaN.

Categories and bins are levels, and combinations of levels are the cells that plans balance and reports compare. A
multilabel attribute (the findings of a report) has no levels: `Schema.grouping` is the schema without it.

This module needs NumPy only, so that data preparation can use it without an accelerator library.
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
# What a report may say about a label. The texts of a table leave unmentioned labels out.
STATES = ("unmentioned", "negative", "uncertain", "positive")
_NOTHING_MENTIONED = "unmentioned"
_KINDS = ("categorical", "continuous", "multilabel")
_UNKNOWN_TEXTS = frozenset({"", "unknown", "nan", "none", "na", "n/a"})

# An encoded value: a category index, a number, or a state for each label.
Value = int | float | tuple[int, ...]

# A cell is one combination of levels: {"age": 3, "sex": 1}. Levels are category indices or bin indices.
Cell = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Attribute:
  """One attribute. `values` belongs to categories and labels; `low`, `high`, `bins` and `unit` to numbers.

  Attributes:
    name: column name, used in parameter names, plans, reports.
    kind: "categorical", "continuous" or "multilabel".
    values: names of the categories or labels, in index order.
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
      edges = np.asarray([self.low, *self.bins, self.high], self.dtype)  # as values are compared with them
      if not np.all(edges[:-1] < edges[1:]):
        raise InputError(f"attribute {self.name}: bins {list(self.bins)} must rise between low and high")
    elif self.kind == "multilabel":
      texts = [value.strip().lower() for value in self.values]
      if not texts or len(set(texts)) != len(texts):
        raise InputError(f"attribute {self.name}: needs at least one label, and all different")
      bad = [v for v, text in zip(self.values, texts) if set("=;") & set(v) or text in (*_UNKNOWN_TEXTS, *STATES)]
      if bad:
        raise InputError(
          f"attribute {self.name}: label {bad[0]!r} has a = or ; or stands for something else; rename it"
        )
    else:
      raise InputError(f"attribute {self.name}: kind {self.kind!r} must be one of {', '.join(map(repr, _KINDS))}")

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of one encoded value."""
    return (len(self.values),) if self.kind == "multilabel" else ()

  @property
  def num_levels(self) -> int:
    self._check_levels()
    return len(self.values) if self.kind == "categorical" else len(self.bins) + 1

  def _check_levels(self) -> None:
    if self.kind == "multilabel":
      raise InputError(f"attribute {self.name} is multilabel: it has no levels, so it forms no groups or cells")

  @property
  def level_names(self) -> tuple[str, ...]:
    """Category names, or bin names such as "0-18", "18-40", "80+"."""
    self._check_levels()
    if self.kind == "categorical":
      return self.values
    edges = [self.low, *self.bins]
    closed = [f"{a:g}-{b:g}" for a, b in itertools.pairwise(edges)]
    return (*closed, f"{edges[-1]:g}+")

  @property
  def unknown(self) -> Value:
    if self.kind == "multilabel":
      return (UNKNOWN_INDEX,) * len(self.values)
    return UNKNOWN_INDEX if self.kind == "categorical" else math.nan

  @property
  def dtype(self) -> np.dtype:
    return np.dtype({"categorical": np.int32, "continuous": np.float32, "multilabel": np.int8}[self.kind])

  def encode(self, text: Any) -> Value:
    """The encoded value of one table cell. Raises `ValueError` saying why a value is not accepted.

    A multilabel attribute is written "Edema; Effusion=negative; Fracture=uncertain": a label alone is positive, a label
    that is not there unmentioned. "unmentioned" means all of them, an empty cell that nothing is known.
    """
    text = "" if text is None else str(text).strip()
    if text.lower() in _UNKNOWN_TEXTS:
      return self.unknown
    if self.kind == "categorical":
      if text not in self.values:
        raise ValueError(f"{self.name} {text!r} is not one of {', '.join(self.values)}")
      return self.values.index(text)
    if self.kind == "multilabel":
      return self._encode_labels(text)
    try:
      number = float(text)
    except ValueError:
      raise ValueError(f"{self.name} {text!r} is not a number") from None
    if not self.low <= number <= self.high:
      raise ValueError(f"{self.name} {text} is outside {self.low:g} to {self.high:g}")
    return number

  def _encode_labels(self, text: str) -> tuple[int, ...]:
    states = dict.fromkeys(self.values, 0)
    for part in [] if text == _NOTHING_MENTIONED else text.split(";"):
      label, _, state = (piece.strip() for piece in part.partition("="))
      if label not in states:
        raise ValueError(f"{self.name}: {label!r} is not one of {', '.join(self.values)}")
      if (state or "positive") not in STATES:
        raise ValueError(f"{self.name}: {label} is {state!r}, not one of {', '.join(STATES)}")
      if states[label]:
        raise ValueError(f"{self.name} names {label} twice")
      states[label] = STATES.index(state or "positive")
    return tuple(states.values())

  def decode(self, value: Value) -> str:
    """The table text of an encoded value; the empty string when it is unknown."""
    if not self.is_known(value):
      return ""
    if self.kind == "multilabel":
      said = [f"{label}={STATES[int(state)]}" for label, state in zip(self.values, value) if state]
      return "; ".join(said).replace("=positive", "") or _NOTHING_MENTIONED
    return self.values[int(value)] if self.kind == "categorical" else f"{float(value):g}"

  def is_known(self, values):
    """Boolean mask, one entry a value; works on NumPy and JAX arrays and on single Python values."""
    if self.kind == "multilabel":
      return (values if hasattr(values, "ndim") else np.asarray(values))[..., 0] >= 0
    return values >= 0 if self.kind == "categorical" else values == values  # NaN is the only x != x

  def levels(self, values: np.ndarray | Sequence[Value]) -> np.ndarray:
    """Level index of each encoded value, int32 [B]; -1 where unknown.

    Numbers and edges are compared in float32, as they are stored and as the conditioners compare them: in float64 the
    stored 0.7 lies below the edge 0.7.
    """
    self._check_levels()
    values = np.asarray(values, self.dtype)
    if self.kind == "categorical":
      return values
    index = np.searchsorted(np.asarray(self.bins, self.dtype), np.nan_to_num(values), side="right")
    return np.where(np.isnan(values), UNKNOWN_INDEX, index).astype(np.int32)

  def representative(self, level: int) -> int | float:
    """An encoded value inside a level: the index itself, or the middle of the bin, rounded where that is inside."""
    self._check_levels()
    if self.kind == "categorical":
      return level
    low, high = (self.low, *self.bins, self.high)[level : level + 2]
    middle = (low + high) / 2
    rounded = float(round(middle))
    return rounded if low <= rounded < high else middle


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

  @property
  def grouping(self) -> "Schema":
    """The attributes that have levels; groups, cells and balanced plans are made of these."""
    return Schema(tuple(a for a in self.attributes if a.kind != "multilabel"))

  def unknown(self, batch: int) -> dict[str, np.ndarray]:
    """A batch in which every attribute is unknown."""
    return {a.name: np.full([batch, *a.shape], a.unknown, a.dtype) for a in self}

  def check_batch(self, attributes: Mapping[str, np.ndarray], where: str) -> None:
    """Raises an `InputError` that names attribute and value when a batch of NumPy arrays does not fit the schema.

    An index out of range would pick some other category's row of a table without a word.
    """
    for a in self:
      values = np.asarray(attributes.get(a.name))
      if values.dtype == object:
        raise InputError(f"{where} has no attribute {a.name}; the schema needs {', '.join(self.names)}")
      if values.shape[1:] != a.shape:
        raise InputError(f"{where}: {a.name} has shape {list(values.shape[1:])} an example, the schema {list(a.shape)}")
      if a.kind == "continuous":
        fits = np.isnan(values) | ((values >= np.float32(a.low)) & (values <= np.float32(a.high)))
        allowed = f"{a.low:g} to {a.high:g}, or NaN for unknown"
      else:
        last = len(STATES if a.kind == "multilabel" else a.values) - 1
        fits = (values >= UNKNOWN_INDEX) & (values <= last)
        allowed = f"0 to {last}, or -1 for unknown"
        if a.kind == "multilabel":
          fits &= (values == UNKNOWN_INDEX).all(-1, keepdims=True) | (values != UNKNOWN_INDEX)
      if not fits.all():
        position = np.argwhere(~fits)[0]
        raise InputError(
          f"{where}: {a.name} is {values[tuple(position)]:g} in example {position[0]}; the schema has {allowed};"
          " prepare the data set again"
        )

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
    fields = dict.fromkeys(("categorical", "multilabel"), ("values",)) | {"continuous": ("low", "high", "bins", "unit")}
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
    except OSError as error:
      raise InputError(f"{path} cannot be read: {error.strerror}; give the schema.json of a data set") from None
    except json.JSONDecodeError as error:
      raise InputError(f"{path} is not valid JSON ({error})") from None
