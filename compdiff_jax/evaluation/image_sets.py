"""Image sets: a split of a prepared data set, or a directory of PNGs with `manifest.csv`, read for evaluation.

Real and synthetic images go through one preprocessing function, `preprocess`. Every file that a manifest lists is
checked against its SHA-256; a missing, altered or unreadable image is an error that names it, never a blank picture.
"""

import csv
import dataclasses
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from compdiff_jax.cli import InputError, nearest
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.data.records import UNREADABLE, RecordSet, decode_image

MANIFEST = "manifest.csv"
PREPROCESSING = "decode, convert to 8-bit RGB, antialiased bicubic resize to {size}x{size} px where the size differs"


@dataclasses.dataclass(frozen=True)
class ImageSet:
  """Images with their attributes, ordered by key, so that the order of a manifest never matters.

  Attributes:
    name: the data set's name, or the directory's for a manifest.
    split: the split's name; empty for a manifest.
    schema: the attributes in `attributes`.
    keys: unique name of each image, [N], rising.
    patients: patient of each image, [N]; the image's own key where there is no patient.
    texts: clinical text of each image, [N].
    attributes: encoded values, {name: [N]}.
    images: uint8 [N, H, W, 3].
    source_sizes: {"64x64 L": count} of the files before preprocessing.
    total: number of images in the set; N is smaller when `limit` cut it.
    content: SHA-256 over the sorted (key, SHA-256 of the encoded image) of the N images.
    held_out: cells absent from training, as `Schema.cell_name` texts.
    sampling: the settings that `compdiff sample` made the set with, model_sha256 among them; empty for other sets.
  """

  name: str
  split: str
  schema: Schema
  keys: np.ndarray
  patients: np.ndarray
  texts: np.ndarray
  attributes: Mapping[str, np.ndarray]
  images: np.ndarray
  source_sizes: Mapping[str, int]
  total: int
  content: str
  held_out: tuple[str, ...] = ()
  sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __len__(self) -> int:
    return len(self.keys)

  def take(self, index: np.ndarray) -> "ImageSet":
    """The set of some rows; `index` is a mask or positions."""
    rows = np.arange(len(self))[index]
    columns = {name: values[rows] for name, values in self.attributes.items()}
    arrays = {name: getattr(self, name)[rows] for name in ("keys", "patients", "texts", "images")}
    return dataclasses.replace(self, attributes=columns, **arrays)


@dataclasses.dataclass(frozen=True)
class _Row:
  key: str
  patient: str
  text: str
  attributes: Mapping[str, Any]
  read: Callable[[], bytes]
  where: str


def preprocess(data: bytes, size: int, where: str) -> np.ndarray:
  """Encoded bytes to uint8 [size, size, 3] (`PREPROCESSING`). The one path of real and synthetic images."""
  try:
    return decode_image(data, size)
  except UNREADABLE as error:
    raise InputError(f"{where}: the image cannot be read ({error}); replace it or remove its row") from None


def open_records(path: str | Path) -> RecordSet:
  """A prepared data set in which no patient is in two splits.

  Raises:
    InputError: not a data set, or a patient occurs in two splits.
  """
  records = RecordSet(path)
  owner: dict[str, str] = {}
  for split in records.splits:
    if not records.splits[split]:
      continue
    source = records.split(split)
    for i in range(len(source)):
      patient = source[i]["patient"]
      if patient and owner.setdefault(patient, split) != split:
        raise InputError(
          f"{path}: patient {patient} is in the splits {owner[patient]!r} and {split!r}; split the data by patient"
        )
  return records


def load(
  path: str | Path,
  split: str = "",
  *,
  size: int | None = None,
  reduce_to: int | None = None,
  limit: int | None = None,
  seed: int = 0,
  schema: Schema | None = None,
) -> ImageSet:
  """Reads a data set's split or a manifest directory.

  Args:
    path: a directory with `dataset_info.json` (a prepared data set) or with `manifest.csv`.
    split: the split of a prepared data set; ignored for a manifest.
    size: common size in pixels; the images' own when None (they must then all be square and of one size).
    reduce_to: images are reduced to this size after preprocessing, when `size` is larger.
    limit: at most so many images, drawn by hash of (seed, key): the draw depends on neither order nor file layout.
    seed: seed of that draw.
    schema: attributes of a manifest that has no `schema.json` of its own.

  Raises:
    InputError: anything missing, altered, unreadable or unknown; the message names file and row.
  """
  path = Path(path)
  if not is_manifest(path):
    records = RecordSet(path)
    name, schema, held_out, rows = records.name, records.schema, records.held_out, list(_record_rows(records, split))
    sampling = {}
  else:
    if (path / "schema.json").exists():
      schema = Schema.load(path / "schema.json")
    elif schema is None:
      raise InputError(f"{path}/schema.json is missing; copy it from the data set the model was trained on")
    name, split, held_out, rows = path.name, "", (), _manifest_rows(path, schema)
    sampling = _job(path).get("settings", {})
  rows.sort(key=lambda row: row.key)
  total = len(rows)
  if limit is not None and total > limit:
    rows = [rows[i] for i in drawn([row.key for row in rows], limit, seed)]
  images, sizes, content = _read_images(rows, size, reduce_to)
  return ImageSet(
    name=name,
    split=split,
    schema=schema,
    keys=np.array([row.key for row in rows]),
    patients=np.array([row.patient or row.key for row in rows]),
    texts=np.array([row.text for row in rows]),
    attributes={a.name: np.array([row.attributes[a.name] for row in rows], a.dtype) for a in schema},
    images=images,
    source_sizes=sizes,
    total=total,
    content=content,
    held_out=tuple(held_out),
    sampling=sampling,
  )


def is_manifest(path: Path) -> bool:
  """Whether `path` is a manifest directory rather than a prepared data set."""
  if (path / "dataset_info.json").exists():
    return False
  if not (path / MANIFEST).exists():
    raise InputError(f"{path} holds neither {MANIFEST} nor dataset_info.json; give an image set or a data set")
  return True


def drawn(keys: Sequence[str], limit: int, seed: int) -> np.ndarray:
  """Positions of `limit` keys drawn by the hash of (seed, key), rising: independent of order and of other draws."""
  order = sorted(range(len(keys)), key=lambda i: hashlib.sha256(f"{seed}/{keys[i]}".encode()).digest())
  return np.sort(np.asarray(order[:limit], np.int64))


def square_size(path: str | Path, split: str = "") -> int:
  """Side in pixels of the first image of a set; used to choose the common size before the images are read."""
  path = Path(path)
  row = next(iter(_manifest_rows(path, None) if is_manifest(path) else _record_rows(RecordSet(path), split)))
  width, height, _ = _header(row.read(), row.where)
  if width != height:
    raise InputError(f"{row.where}: the image is {width}x{height}; give --size=PIXELS to resize to a square")
  return width


def _record_rows(records: RecordSet, split: str) -> Iterator[_Row]:
  if records.latents is not None:
    raise InputError(f"{records.path} holds moments, not images; give the data set that they were encoded from")
  source = records.split(split)

  def row(index: int) -> _Row:
    record = source[index]
    return _Row(
      key=record["key"],
      patient=record["patient"],
      text=record["text"],
      attributes=record["attributes"],
      read=lambda: source[index]["image"],
      where=f"{records.path} split {split}, record {record['key']}",
    )

  yield from map(row, range(len(source)))


def _manifest_rows(path: Path, schema: Schema | None) -> list[_Row]:
  """The rows of `manifest.csv`; with a schema, its columns are required and decoded."""
  manifest = path / MANIFEST
  names = schema.names if schema else ()
  rows, first = [], {}
  try:
    with open(manifest, newline="", encoding="utf-8") as file:
      reader = csv.DictReader(file)
      columns = reader.fieldnames or []
      for column in ("file", "sha256", "text", *names):
        if column not in columns:
          raise InputError(f"{manifest} has no column {column!r}{nearest(column, columns)}")
      for line in reader:
        where = f"{manifest} row {reader.line_num}"
        if None in line or any(line[c] is None for c in columns):
          raise InputError(f"{where}: it has not {len(columns)} columns; write the manifest again")
        name = line["file"]
        if name in first:
          raise InputError(f"{where}: {name} is listed twice, first in row {first[name]}; remove one")
        first[name] = reader.line_num
        rows.append(_manifest_row(path, line, where, schema))
  except UnicodeDecodeError as error:
    raise InputError(f"{manifest} is not UTF-8 text ({error})") from None
  except csv.Error as error:
    raise InputError(f"{manifest} row {reader.line_num}: {error}") from None
  if not rows:
    raise InputError(f"{manifest} lists no image; sample a set first")
  planned = _job(path).get("rows", len(rows))
  if planned != len(rows):
    raise InputError(f"{path} holds {len(rows)} of {planned} planned images; finish it with the same compdiff sample")
  return rows


def _job(path: Path) -> dict[str, Any]:
  """What a sampling job says about its set (`sampling.job`); empty for a set that no job of ours made."""
  try:
    return dict(json.loads((path / "job.json").read_text()))
  except FileNotFoundError:
    return {}
  except (ValueError, TypeError) as error:
    raise InputError(f"{path}/job.json cannot be read ({error}); sample the set again") from None


def _manifest_row(path: Path, line: Mapping[str, str], where: str, schema: Schema | None) -> _Row:
  try:
    attributes = {a.name: a.encode(line[a.name]) for a in schema or ()}
  except ValueError as error:
    raise InputError(f"{where}: {error}") from None
  file = path / line["file"]

  def read() -> bytes:
    try:
      data = file.read_bytes()
    except OSError as error:
      reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
      raise InputError(f"{file} {reason} ({where}); restore it or write the manifest again") from None
    if hashlib.sha256(data).hexdigest() != line["sha256"]:
      raise InputError(f"{file} was altered: its SHA-256 is not the one in {where}; restore the file")
    return data

  return _Row(line["file"], "", line["text"], attributes, read, str(file))


def _header(data: bytes, where: str) -> tuple[int, int, str]:
  try:
    with Image.open(io.BytesIO(data)) as image:
      return (*image.size, image.mode)
  except UNREADABLE as error:
    raise InputError(f"{where}: the image cannot be read ({error}); replace it or remove its row") from None


def _read_images(
  rows: Sequence[_Row], size: int | None, reduce_to: int | None
) -> tuple[np.ndarray, dict[str, int], str]:
  """Images uint8 [N, S, S, 3], the count of each file size and mode, and the content hash."""
  images, sizes, content = None, Counter(), hashlib.sha256()
  for i, row in enumerate(rows):
    data = row.read()
    width, height, mode = _header(data, row.where)
    if size is None:
      if width != height:
        raise InputError(f"{row.where}: the image is {width}x{height}; give --size=PIXELS to resize to a square")
      size = width
    image = preprocess(data, size, row.where)
    if reduce_to is not None and reduce_to < size:
      image = reduced(image, reduce_to)
    if images is None:
      images = np.empty([len(rows), *image.shape], np.uint8)
    images[i] = image
    sizes[f"{width}x{height} {mode}"] += 1
    content.update(f"{row.key}\0{hashlib.sha256(data).hexdigest()}\n".encode())
  return images, dict(sorted(sizes.items())), content.hexdigest()


def reduced(image: np.ndarray, size: int) -> np.ndarray:
  """uint8 [H, W, 3] reduced to [size, size, 3], antialiased bicubic."""
  if image.shape[:2] == (size, size):
    return image
  return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def unlisted(path: str | Path) -> list[str]:
  """PNG and JPEG files of a manifest directory that its manifest does not list (galleries written beside it apart)."""
  path = Path(path)
  if not is_manifest(path):
    return []
  listed = {row.key for row in _manifest_rows(path, None)}
  found = {file.relative_to(path).as_posix() for end in ("png", "jpg", "jpeg") for file in path.rglob(f"*.{end}")}
  return sorted(found - listed - {"grid.png", "sheet.png"})
