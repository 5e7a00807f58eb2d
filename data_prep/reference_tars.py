"""The WebDataset shards of the CompDiff reference (method E.4): `python -m data_prep.reference_tars --help`.

DIR holds training_data/, val_data/ and test_data/ with train_0.tar, ...; each sample has a pickled tensor `.pt_image`,
a `.prompt_metadata` and a `.validation_metadata`. Tensors pass the restricted reader of data_prep/tensors.py; nothing
that a pickle names is run. The metadata give the demographics. The text of a chest sample is what follows the fixed
template in its prompt, that of a fundus sample is worded from its condition labels.
"""

import dataclasses
import functools
import json
import re
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from compdiff_jax import cli
from compdiff_jax.cli import InputError
from data_prep import builder
from data_prep.demographics import encode, parse_age, parse_race, parse_sex, recorded_races
from data_prep.fairgenmed import conditions
from data_prep.images import ImageOptions, check_pixels, encode_image
from data_prep.prompts import split_prompt
from data_prep.rows import RowError
from data_prep.schemas import CHEST_RACES, CHEXPERT_LABELS, FUNDUS_RACES, demographic_schema
from data_prep.tensors import UnsafePickle, load_tensor

_PROG = "python -m data_prep.reference_tars"
_FOLDERS = {"training_data": "train", "val_data": "val", "test_data": "test"}
_IMAGE, _PROMPT, _METADATA = "pt_image", "prompt_metadata", "validation_metadata"
_STATES = {1: "positive", 0: "negative"}


class Sample(NamedTuple):
  """One key of one tar: where its tensor lies, and its two texts (None where the member is absent)."""

  tar: str
  key: str
  number: int
  span: tuple[int, int] | None
  prompt: str | None
  metadata: str | None
  fault: str


class ReferenceTars:
  name = "reference"
  description = "The samples of CompDiff's WebDataset shards."
  licence = "The terms of the data set that the shards were made from."

  def __init__(self, options: builder.Options):
    self._options = options
    tars = [path for folder in _FOLDERS for path in sorted((options.source / folder).glob("*.tar"), key=_natural)]
    if not tars:
      raise InputError(f"{options.source} has no {'/*.tar, '.join(_FOLDERS)}/*.tar; check --source")
    self._samples = [sample for path in tars for sample in _read_tar(options.source, path)]
    self.selected = f"{len(self._samples)} samples of {len(tars)} tars."
    metadata = [_metadata(sample) for sample in self._samples]
    kinds = {kind for kind, _ in metadata if kind}
    if len(kinds) != 1:
      raise InputError(f"{options.source} holds {' and '.join(sorted(kinds)) or 'no readable'} samples; give one kind")
    self.free_text = kinds == {"chest"}
    races = recorded_races(str(values.get("race") or "") for _, values in metadata)
    self.schema = demographic_schema(CHEST_RACES if self.free_text else FUNDUS_RACES, races)
    self.encode = TarImages(str(options.source), options.images)

  def __len__(self) -> int:
    return len(self._samples)

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return builder.rows((f"{s.tar}::{s.key}", s.number, functools.partial(self._row, s)) for s in self._samples)

  def _row(self, sample: Sample) -> dict[str, Any]:
    if sample.fault:
      raise RowError(sample.fault)
    for name, value in ((_IMAGE, sample.span), (_PROMPT, sample.prompt), (_METADATA, sample.metadata)):
      if value is None:
        raise RowError(f"incomplete sample: no {name}")
    kind, metadata = _metadata(sample)
    if kind is None:
      raise RowError("bad metadata: neither disease_labels nor condition_labels")
    try:
      prompt = split_prompt(sample.prompt)
    except ValueError as error:
      raise RowError(f"bad value: {error}") from None
    # Metadata win; the strict template fills what they lack.
    age, sex, race = (str(prompt[n] if metadata.get(n) is None else metadata[n]) for n in ("age", "sex", "race"))
    patient = str(metadata.get("subject_id" if kind == "chest" else "filename") or "")
    if not patient:
      raise RowError("no patient id: the metadata give neither subject_id nor filename")
    try:
      attributes = (parse_age(age), parse_sex(sex), parse_race(race))
    except ValueError as error:
      raise RowError(f"bad attribute value: {error}") from None
    if kind == "chest":
      text, findings = self._options.text(prompt["text"]), _chest_findings(metadata["disease_labels"])
    else:
      text, findings = _conditions(metadata)
    return {
      "image": (sample.tar, *sample.span),
      "patient": patient,
      "text": text,
      "attributes": {a.name: encode(a, text) for a, text in zip(self.schema, attributes)},
      "findings": findings,
      **self._options.splits(_FOLDERS[sample.tar.partition("/")[0]]),
    }


def _natural(path: Path) -> list[int | str]:
  return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _read_tar(source: Path, path: Path) -> Iterator[Sample]:
  """The samples of one tar, its tensors unread. A tar that breaks off gives one more sample that says so."""
  name = path.relative_to(source).as_posix()
  members: dict[str, dict[str, Any]] = {}
  fault = ""
  try:
    with tarfile.open(path, "r:") as tar:
      for member in tar:
        key, _, kind = member.name.rpartition(".")
        if member.isreg() and kind in (_IMAGE, _PROMPT, _METADATA):
          content = (member.offset_data, member.size) if kind == _IMAGE else tar.extractfile(member).read()
          members.setdefault(key, {})[kind] = content
  except (OSError, EOFError, ValueError, tarfile.TarError) as error:
    fault = f"damaged tar: {error}"
  for number, (key, parts) in enumerate(members.items(), start=1):
    texts = [parts[kind].decode("utf-8", "replace") if kind in parts else None for kind in (_PROMPT, _METADATA)]
    yield Sample(name, key, number, parts.get(_IMAGE), *texts, fault="")
  counted = path.with_name(f"{path.stem}_size.txt")
  expected = counted.read_text().strip() if counted.is_file() else str(len(members))
  # Samples that _size.txt promises and the tar lacks are rejected one by one, so that totals tell what was lost.
  missing = max(int(expected) - len(members) if expected.isdigit() else 0, 1 if fault else 0)
  for number in range(len(members) + 1, len(members) + 1 + max(missing, 1 if fault else 0)):
    yield Sample(
      name, str(number), number, None, None, None, fault or f"missing sample: {counted.name} says {expected}"
    )


def _metadata(sample: Sample) -> tuple[str | None, Mapping[str, Any]]:
  """("chest" | "fundus" | None, the validation metadata)."""
  try:
    values = json.loads(sample.metadata or "null")
  except ValueError:
    return None, {}
  if not isinstance(values, dict):
    return None, {}
  labels, conditions_of = values.get("disease_labels"), values.get("condition_labels")
  if isinstance(labels, list) and len(labels) == len(CHEXPERT_LABELS):
    return "chest", values
  return ("fundus", values) if isinstance(conditions_of, dict) else (None, {})


def _chest_findings(labels: list[Any]) -> dict[str, str]:
  """1 and 0; -1 covers uncertain and unmentioned alike there, so it says nothing."""
  return {
    label: _STATES[value]
    for label, value in zip(CHEXPERT_LABELS, labels)
    if isinstance(value, int | float) and value in _STATES
  }


def _conditions(metadata: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
  """Text and findings of a fundus sample, worded as data_prep.fairgenmed words them."""
  given = {**metadata["condition_labels"], "md_severity": metadata.get("md_severity")}
  names = ("glaucoma", "md_severity", "cdr_status", "near_vision_refraction_stage")
  return conditions(*("" if given.get(name) is None else str(given[name]) for name in names))


@dataclasses.dataclass(frozen=True)
class TarImages:
  """Encodes the tensor at (tar, offset, length): float32 in [0, 1], [H, W], [1, H, W] or [3, H, W]."""

  root: str
  options: ImageOptions

  def files(self, place: tuple[str, int, int]) -> list[Path]:
    return [Path(self.root) / place[0]]

  def __call__(self, place: tuple[str, int, int]) -> bytes:
    tar, offset, length = place
    try:
      with open(Path(self.root) / tar, "rb") as file:
        file.seek(offset)
        values = load_tensor(file.read(length))
    except OSError as error:
      raise RowError(f"unreadable image: {error.strerror}") from None
    except UnsafePickle as error:
      raise RowError(f"refused pickle: {' '.join(str(error).split())}") from None
    return encode_image(_to_image(values), self.options)


def _to_image(values: np.ndarray) -> Image.Image:
  if values.ndim == 3 and values.shape[0] == 1:
    values = values[0]
  if not values.size or values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[0] != 3):
    raise RowError(f"bad image shape: {values.shape} is neither (H, W) nor (1, H, W) nor (3, H, W)")
  check_pixels(values.size)
  if not (values.min() >= 0 and values.max() <= 1):  # NaN fails too
    raise RowError("bad image values: outside 0 to 1")
  if values.ndim == 2:
    return Image.fromarray(np.float32(values) * 255)
  return Image.fromarray(np.uint8(np.round(np.float64(np.moveaxis(values, 0, -1)) * 255)))


def main(argv: list[str]) -> None:
  parser = builder.parser(_PROG, "The WebDataset shards of the CompDiff reference as a data set.")
  builder.add_text_arguments(parser)
  args = parser.parse_args(argv)
  source = ReferenceTars(builder.options(args))
  if not source.free_text and (args.scrub or args.max_words != parser.get_default("max_words")):
    raise InputError("--scrub and --max_words are for free text; fundus samples are worded from labels: leave them out")
  builder.write(_PROG, source, args, argv)


if __name__ == "__main__":
  sys.exit(cli.run(main, _PROG))
