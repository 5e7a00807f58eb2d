"""From a diffusers or transformers config.json to a frozen dataclass and back; nothing in it is silently ignored."""

import dataclasses
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from compdiff_jax.cli import InputError, nearest


def parse(
  cls: type, values: Mapping[str, Any], *, source: str, fixed: Mapping[str, Any], ignored: Collection[str] = ()
):
  """An instance of the dataclass `cls` from the entries of a config.json.

  Args:
    cls: a frozen dataclass whose fields and defaults are those of the torch class.
    values: the JSON object. Keys with a leading underscore are bookkeeping of diffusers and have no meaning here.
    source: the file, for error messages.
    fixed: fields of the torch class that are understood, but supported with this value only. A list that repeats it for
      every level means the same.
    ignored: fields that cannot change what the network computes.

  Raises:
    InputError: a field is unknown, has the wrong type, or asks for something unsupported.
  """
  hints = typing.get_type_hints(cls)
  known = {}
  for name, value in values.items():
    if name in hints:
      try:
        known[name] = _convert(value, hints[name])
      except TypeError:
        raise InputError(f"{source}: field {name} is {value!r}; it must be {_describe(hints[name])}") from None
    elif name in fixed:
      levels = value if isinstance(value, (list, tuple)) and value else [value]
      if any(level != fixed[name] for level in levels):
        raise InputError(f"{source}: field {name} is {value!r}; only {fixed[name]!r} is supported")
    elif not name.startswith("_") and name not in ignored:
      raise InputError(f"{source}: unknown field {name}{nearest(name, [*hints, *fixed])}")
  try:
    return cls(**known)
  except InputError as error:
    raise InputError(f"{source}: {error}") from None


def check_positive(config, *names: str) -> None:
  """Raises an `InputError` that names the field when a size or count, or one of a list of them, is not positive."""
  for name in names:
    value = getattr(config, name)
    if min(value if isinstance(value, tuple) else (value,), default=0) <= 0:
      raise InputError(f"field {name} is {list(value) if isinstance(value, tuple) else value}; it must be positive")


def to_json(config) -> dict[str, Any]:
  """The fields of a config dataclass as JSON values: the inverse of `parse`."""
  fields = dataclasses.asdict(config)
  return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _convert(value: Any, hint: Any) -> Any:
  """`value` as the annotated type; a list becomes a tuple, an int a float, and a bool is never a number."""
  if typing.get_origin(hint) is types.UnionType:
    for option in typing.get_args(hint):
      try:
        return _convert(value, option)
      except TypeError:
        continue
  elif typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
    return tuple(_convert(item, typing.get_args(hint)[0]) for item in value)
  elif hint is float and type(value) is int:
    return float(value)
  elif type(value) is hint:
    return value
  raise TypeError


def _describe(hint: Any) -> str:
  """An annotation in words: `int | tuple[int, ...]` is "int or list of int"."""
  if typing.get_origin(hint) is types.UnionType:
    return " or ".join(map(_describe, typing.get_args(hint)))
  if typing.get_origin(hint) is tuple:
    return f"list of {_describe(typing.get_args(hint)[0])}"
  return "null" if hint is types.NoneType else hint.__name__
