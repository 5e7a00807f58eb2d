"""The record format: TFDS-described ArrayRecord shards that Grain reads without TensorFlow.

A data set directory holds `dataset_info.json`, `features.json` (TFDS), `schema.json` (attributes) and per split one or
more shards and `attributes-<split>.npz`, the attribute columns of all its records. Each record has

  key         unique name of the example inside the data set
  patient     salted hash of the patient id; no patient is in two splits
  image       encoded PNG or JPEG bytes
  text        clinical text without demographics
  attributes  one typed column per schema attribute (int32 index, float32, or int8 per label; -1 or NaN when unknown)
  findings    JSON object {finding: "positive" | "negative" | "uncertain"}; unmentioned findings are absent
  factors     JSON object of everything a phantom drew; "{}" for real images

A latent set (`data_prep.encode_latents`) has `latents.json` beside them, and instead of the image

  moments     the VAE's posterior mean and log-variance: bfloat16, little-endian, in the shape that latents.json gives
  input_ids   token ids of the prompt, int32, as many as the tokenizer pads to: 77 for CLIP's
"""

import copy
import io
import itertools
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from google.protobuf.message import DecodeError
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from compdiff_jax.cli import InputError, nearest
from compdiff_jax.conditioning.schema import Schema

SPLITS = ("train", "val", "test")
# What Pillow raises where bytes are no image that it knows.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_FORMAT = "array_record"
_LATENT_KEYS = ("vae", "tokenizer", "shape", "image_size", "prompt_attributes")


class Shard(NamedTuple):
  """What a shard holds: number of records and of bytes before framing."""

  records: int
  num_bytes: int


def features(schema: Schema, latents: bool = False) -> tfds.features.FeaturesDict:
  """The TFDS feature description of one record. Bytes live in `Text`: TFDS writes those without TensorFlow."""
  text = tfds.features.Text
  picture = (
    {"moments": text(), "input_ids": tfds.features.Tensor(shape=(None,), dtype=np.int32)}
    if latents
    else {"image": text()}
  )
  return tfds.features.FeaturesDict(
    {
      "key": text(),
      "patient": text(),
      **picture,
      "text": text(),
      "attributes": {a.name: tfds.features.Tensor(shape=a.shape, dtype=a.dtype) for a in schema},
      "findings": text(),
      "factors": text(),
    }
  )


def shard_name(name: str, split: str, shard: int, num_shards: int) -> str:
  return f"{name}-{split}.{_FORMAT}-{shard:05d}-of-{num_shards:05d}"


def write_shard(path: Path, description: tfds.features.FeaturesDict, records: Iterable[Mapping[str, Any]]) -> Shard:
  """Writes records under a temporary name and renames the file, so that `path` is whole or not there."""
  # One record a group: random access reads exactly the record it asks for. Encoded images and moments do not get
  # smaller by compression, and reading them without it is three times as fast.
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
  count = num_bytes = 0
  for record in records:
    example = tf_example_pb2.Example.FromString(description.serialize_example(record))
    data = example.SerializeToString(deterministic=True)  # TFDS leaves the order of the fields to chance
    writer.write(data)
    count += 1
    num_bytes += len(data)
  writer.close()
  temporary.replace(path)
  return Shard(count, num_bytes)


def split_info(directory: Path, name: str, split: str, shards: Sequence[Shard]) -> tfds.core.SplitInfo:
  """The entry of a split in `dataset_info.json`."""
  template = tfds.core.ShardedFileTemplate(
    data_dir=str(directory), dataset_name=name, split=split, filetype_suffix=_FORMAT
  )
  return tfds.core.SplitInfo(
    name=split,
    shard_lengths=[shard.records for shard in shards],
    num_bytes=sum(shard.num_bytes for shard in shards),
    filename_template=template,
  )


def write_split(
  directory: Path, name: str, split: str, schema: Schema, records: Sequence[Mapping[str, Any]], num_shards: int = 1
) -> tfds.core.SplitInfo:
  """Writes one split; record i goes to shard i * num_shards // len(records), so the order is kept."""
  bounds = [round(i * len(records) / num_shards) for i in range(num_shards + 1)]
  columns = {a.name: [] for a in schema}

  def noted(records):
    for record in records:
      for attribute, values in columns.items():
        values.append(record["attributes"][attribute])
      yield record

  shards = [
    write_shard(directory / shard_name(name, split, i, num_shards), features(schema), noted(records[start:end]))
    for i, (start, end) in enumerate(itertools.pairwise(bounds))
  ]
  write_attributes(directory, split, schema, columns)
  return split_info(directory, name, split, shards)


def write_attributes(directory: Path, split: str, schema: Schema, columns: Mapping[str, Sequence]) -> None:
  """Writes the attribute columns of a split, in record order, so that sampling by cell need not read every record."""
  np.savez(directory / _attributes_name(split), **{a.name: np.asarray(columns[a.name], a.dtype) for a in schema})


def _attributes_name(split: str) -> str:
  return f"attributes-{split}.npz"


def write_description(
  directory: Path,
  name: str,
  schema: Schema,
  splits: Iterable[tfds.core.SplitInfo],
  description: str,
  latents: Mapping[str, Any] | None = None,
  licence: str = "",
) -> None:
  """Writes `dataset_info.json`, `features.json` and `schema.json` beside the shards, and the `latents.json` given.

  `licence` holds for all records; TFDS keeps it in `dataset_info.json` and in a file `LICENSE`.
  """
  identity = tfds.core.dataset_info.DatasetIdentity(
    name=name, version=tfds.core.Version("1.0.0"), data_dir=str(directory), module_name="data_prep"
  )
  info = tfds.core.DatasetInfo(
    builder=identity, features=features(schema, latents is not None), description=description, license=licence
  )
  info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
  info.set_splits(tfds.core.SplitDict(list(splits)))
  info.write_to_directory(str(directory))
  schema.save(directory / "schema.json")
  if latents is not None:
    (directory / "latents.json").write_text(json.dumps(latents, indent=2) + "\n")


class RecordSet:
  """A data set directory opened for reading.

  Attributes:
    path: the directory; name: the data set's name; schema: its attributes.
    description, licence: of the whole data set, as `write_description` was given them.
    splits: {split: number of records}.
    held_out: cells absent from the training split, as `Schema.cell_name` texts (from `holdout.json`).
    latents: for a latent set the content of `latents.json`, else None: `vae` and `tokenizer` (content hashes),
      `shape` of the moments, `image_size`, `prompt_attributes`.
  """

  def __init__(self, path: str | Path):
    self.path = Path(path)
    if not (self.path / "dataset_info.json").exists():
      raise InputError(
        f"{self.path} is not a prepared data set (no dataset_info.json); make one with python -m data_prep.phantom or"
        " data_prep.table"
      )
    info = _read_object(self.path / "dataset_info.json", ("name", "splits"))
    self.name = info["name"]
    self.description = info.get("description", "")
    self.licence = info.get("redistributionInfo", {}).get("license", "")
    self.schema = Schema.load(self.path / "schema.json")
    self._shards = {s["name"]: [int(n) for n in s["shardLengths"]] for s in info["splits"]}
    self.splits = {split: sum(lengths) for split, lengths in self._shards.items()}
    holdout = self.path / "holdout.json"
    self.held_out = tuple(_read_object(holdout, ("cells",))["cells"]) if holdout.exists() else ()
    latents = self.path / "latents.json"
    self.latents = _read_object(latents, _LATENT_KEYS) if latents.exists() else None

  def split(self, name: str) -> "RecordSource":
    """The records of one split by random access; an absent or empty split is an `InputError`."""
    if name not in self.splits:
      raise InputError(f"{self.path} has no split {name!r}{nearest(name, self.splits)}")
    if not self.splits[name]:
      raise InputError(f"{self.path}: split {name!r} is empty; prepare more data or choose another split")
    return RecordSource(self.shard_paths(name), self._shards[name], self.schema, self.latents is not None)

  def shard_paths(self, split: str) -> list[Path]:
    count = len(self._shards[split])
    return [self.path / shard_name(self.name, split, i, count) for i in range(count)]

  def shard_lengths(self, split: str) -> list[int]:
    return list(self._shards[split])

  def attributes(self, split: str) -> dict[str, np.ndarray]:
    """The attribute columns of a split in record order, {name: [N]}, without reading the records."""
    path = self.path / _attributes_name(split)
    try:
      with np.load(path) as file:
        columns = {a.name: file[a.name] for a in self.schema}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
      raise InputError(f"{path} cannot be read ({error}); prepare the data set again") from None
    wrong = [name for name, values in columns.items() if len(values) != self.splits[split]]
    if wrong:
      raise InputError(f"{path}: column {wrong[0]!r} has not {self.splits[split]} values; prepare the data set again")
    return columns


def _read_object(path: Path, keys: Sequence[str]) -> dict[str, Any]:
  """The JSON object of a file that describes the data set; it must have `keys`."""
  try:
    data = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise InputError(f"{path} is not valid JSON ({error}); prepare the data set again") from None
  missing = [key for key in keys if not isinstance(data, dict) or key not in data]
  if missing:
    raise InputError(f"{path} has no {missing[0]!r}; prepare the data set again")
  return data


class RecordSource:
  """Random access to records as dicts. Picklable, so worker processes can reopen it; threads may share it."""

  def __init__(self, paths: Sequence[Path], lengths: Sequence[int], schema: Schema, latents: bool = False):
    self._paths = [str(path) for path in paths]
    self._starts = np.cumsum([0, *lengths])
    self._schema = schema
    self._parse = ExampleParser(features(schema, latents))
    self._readers: list[ArrayRecordReader | None] = [None] * len(paths)
    with ThreadPoolExecutor(16) as pool:
      list(pool.map(self._check, range(len(paths)), lengths))

  def _check(self, shard: int, length: int) -> None:
    path = self._paths[shard]
    if not Path(path).exists():
      raise InputError(f"{path} is missing; prepare the data set again")
    try:
      found = self._reader(shard).num_records()
    except Exception as error:  # array_record raises plain RuntimeErrors and ValueErrors of its own
      raise InputError(f"{path} cannot be read ({error}); prepare the data set again") from None
    if found != length:
      raise InputError(f"{path} holds {found} records, dataset_info.json says {length}; prepare the data set again")

  def _reader(self, shard: int) -> ArrayRecordReader:
    if self._readers[shard] is None:
      self._readers[shard] = ArrayRecordReader(self._paths[shard], "readahead_buffer_size:0,max_parallelism:0")
    return self._readers[shard]

  @classmethod
  def join(cls, sources: Sequence["RecordSource"]) -> "RecordSource":
    """Several sources of equal features, one after the other."""
    joined = copy.copy(sources[0])
    joined._paths = [path for source in sources for path in source._paths]
    joined._readers = [reader for source in sources for reader in source._readers]
    joined._starts = np.cumsum([0, *(length for source in sources for length in np.diff(source._starts))])
    return joined

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.read([index])[0]

  def read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Several records in the order asked for, with one call per shard; each must fit the schema."""
    indices = np.asarray(indices, np.int64)
    if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
      raise IndexError(f"{indices.min()} to {indices.max()}")
    shards = np.searchsorted(self._starts, indices, side="right") - 1
    records: list[dict[str, Any]] = [{}] * len(indices)
    for shard in np.unique(shards):
      places = np.flatnonzero(shards == shard)
      for place, data in zip(places, self._read_shard(shard, indices[places])):
        try:
          records[place] = self._parse(data)
        except (ValueError, DecodeError) as error:
          raise self._bad_record(indices[place], "does not fit schema.json", error) from None
    self._check_attributes(records, shards)
    return records

  def _read_shard(self, shard: int, indices: np.ndarray) -> list[bytes]:
    inside = (indices - self._starts[shard]).tolist()
    try:
      return self._reader(shard).read(inside)
    except (RuntimeError, ValueError):
      for index, number in zip(indices, inside):  # once more, to name the record
        try:
          self._reader(shard).read([number])
        except (RuntimeError, ValueError) as error:
          raise self._bad_record(index, "cannot be read", error) from None
      raise

  def decode(
    self, index: int, record: Mapping[str, Any], size: int | None = None, out: np.ndarray | None = None
  ) -> np.ndarray:
    """`decode_image` of what `read` gave for `index`; an image that is none is an `InputError`."""
    try:
      return decode_image(record["image"], size, out)
    except UNREADABLE as error:
      raise self._bad_record(index, "has an image that cannot be decoded", error) from None

  def _bad_record(self, index: int, what: str, error: Exception) -> InputError:
    shard = np.searchsorted(self._starts, index, side="right") - 1
    reason = " ".join(str(error).split())
    return InputError(
      f"{self._paths[shard]}: record {index - self._starts[shard]} {what} ({reason}); prepare the data set again"
    )

  def _check_attributes(self, records: Sequence[Mapping[str, Any]], shards: np.ndarray) -> None:
    columns = {a.name: np.array([record["attributes"][a.name] for record in records]) for a in self._schema}
    try:
      self._schema.check_batch(columns, "")
    except InputError:
      for record, shard in zip(records, shards):  # once more, to name the record
        values = {name: np.asarray(value)[None] for name, value in record["attributes"].items()}
        self._schema.check_batch(values, f"{Path(self._paths[shard]).name} record {record['key']}")
      raise

  def __getstate__(self):
    return {**self.__dict__, "_readers": [None] * len(self._paths)}


class ExampleParser:
  """Bytes of one record to a dict: the values of TFDS's `deserialize_example_np` in an eighth of its time.

  Texts are decoded, the JSON objects parsed, attributes nested; `image` and `moments` stay bytes.
  """

  _LISTS: ClassVar = {"O": "bytes_list", "U": "bytes_list", "S": "bytes_list", "f": "float_list", "i": "int64_list"}

  def __init__(self, description: tfds.features.FeaturesDict):
    flat = dict(description.get_tensor_info())
    flat |= {f"attributes/{name}": info for name, info in flat.pop("attributes").items()}
    self._fields = [
      (name, self._LISTS[np.dtype(info.np_dtype).kind], [-1 if n is None else n for n in info.shape], info.np_dtype)
      for name, info in flat.items()
    ]

  def __call__(self, data: bytes) -> dict[str, Any]:
    found = tf_example_pb2.Example.FromString(data).features.feature
    record: dict[str, Any] = {"attributes": {}}
    for name, kind, shape, dtype in self._fields:
      values = getattr(found[name], kind).value
      if not values:
        raise ValueError(f"{name} is missing or of another type")
      value = np.array(values, dtype).reshape(shape) if shape else values[0]
      if name.startswith("attributes/"):
        record["attributes"][name.removeprefix("attributes/")] = value
      else:
        record[name] = value
    for field in ("key", "patient", "text"):
      record[field] = record[field].decode()
    for field in ("findings", "factors"):
      record[field] = json.loads(record[field])
    return record


def decode_image(data: bytes, size: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
  """Encoded bytes to uint8 [H, W, 3]; resized to `size` x `size` (antialiased bicubic) when it differs.

  With `out` the pixels are written there, which saves a batch its copies.
  """
  image = Image.open(io.BytesIO(data))
  if image.mode != "L":  # grey values are repeated below, which is faster than a conversion
    image = image.convert("RGB")
  if size is not None and image.size != (size, size):
    image = image.resize((size, size), Image.Resampling.BICUBIC)
  pixels = np.asarray(image)
  out = np.empty([*pixels.shape[:2], 3], np.uint8) if out is None else out
  if pixels.ndim == 2:
    for channel in range(3):  # plane by plane: a broadcast along the last axis takes five times as long
      out[:, :, channel] = pixels
  else:
    out[...] = pixels
  return out
