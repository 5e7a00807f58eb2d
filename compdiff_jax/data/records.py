"""The record format: TFDS-described ArrayRecord shards that Grain reads without TensorFlow.

A data set directory holds `dataset_info.json`, `features.json` (TFDS), `schema.json` (attributes) and one or more
shards per split. Each record has

  key         unique name of the example inside the data set
  patient     salted hash of the patient id; no patient is in two splits
  image       encoded PNG or JPEG bytes
  text        clinical text without demographics
  attributes  one typed column per schema attribute (int32 index, float32, or int8 per label; -1 or NaN when unknown)
  findings    JSON object {finding: "positive" | "negative" | "uncertain"}; unmentioned findings are absent
  factors     JSON object of everything a phantom drew; "{}" for real images
"""

import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from compdiff_jax.cli import InputError, nearest
from compdiff_jax.conditioning.schema import Schema

SPLITS = ("train", "val", "test")
_FORMAT = "array_record"


def features(schema: Schema) -> tfds.features.FeaturesDict:
  """The TFDS feature description of one record. Bytes live in `Text`: TFDS writes those without TensorFlow."""
  text = tfds.features.Text
  return tfds.features.FeaturesDict(
    {
      "key": text(),
      "patient": text(),
      "image": text(),
      "text": text(),
      "attributes": {a.name: tfds.features.Tensor(shape=a.shape, dtype=a.dtype) for a in schema},
      "findings": text(),
      "factors": text(),
    }
  )


def _shard_name(name: str, split: str, shard: int, num_shards: int) -> str:
  return f"{name}-{split}.{_FORMAT}-{shard:05d}-of-{num_shards:05d}"


def write_split(
  directory: Path, name: str, split: str, schema: Schema, records: Sequence[Mapping[str, Any]], num_shards: int = 1
) -> tfds.core.SplitInfo:
  """Writes one split; record i goes to shard i * num_shards // len(records), so the order is kept."""
  description = features(schema)
  bounds = [round(i * len(records) / num_shards) for i in range(num_shards + 1)]
  num_bytes = 0
  for shard in range(num_shards):
    # One record a group: random access reads exactly the record it asks for.
    writer = ArrayRecordWriter(str(directory / _shard_name(name, split, shard, num_shards)), "group_size:1")
    for record in records[bounds[shard] : bounds[shard + 1]]:
      data = description.serialize_example(description.encode_example(record))
      num_bytes += len(data)
      writer.write(data)
    writer.close()
  template = tfds.core.ShardedFileTemplate(
    data_dir=str(directory), dataset_name=name, split=split, filetype_suffix=_FORMAT
  )
  lengths = [b - a for a, b in itertools.pairwise(bounds)]
  return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template)


def write_description(
  directory: Path, name: str, schema: Schema, splits: Iterable[tfds.core.SplitInfo], description: str
) -> None:
  """Writes `dataset_info.json`, `features.json` and `schema.json` beside the shards."""
  identity = tfds.core.dataset_info.DatasetIdentity(
    name=name, version=tfds.core.Version("1.0.0"), data_dir=str(directory), module_name="data_prep"
  )
  info = tfds.core.DatasetInfo(builder=identity, features=features(schema), description=description)
  info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
  info.set_splits(tfds.core.SplitDict(list(splits)))
  info.write_to_directory(str(directory))
  schema.save(directory / "schema.json")


class RecordSet:
  """A data set directory opened for reading.

  Attributes:
    path: the directory; name: the data set's name; schema: its attributes.
    splits: {split: number of records}.
    held_out: cells absent from the training split, as `Schema.cell_name` texts (from `holdout.json`).
  """

  def __init__(self, path: str | Path):
    self.path = Path(path)
    try:
      info = json.loads((self.path / "dataset_info.json").read_text())
    except FileNotFoundError:
      raise InputError(
        f"{self.path} is not a prepared data set (no dataset_info.json); make one with python -m data_prep.phantom or"
        " data_prep.table"
      ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
      raise InputError(f"{self.path}/dataset_info.json is not valid JSON ({error})") from None
    self.name = info["name"]
    self.schema = Schema.load(self.path / "schema.json")
    self._shards = {s["name"]: [int(n) for n in s["shardLengths"]] for s in info["splits"]}
    self.splits = {split: sum(lengths) for split, lengths in self._shards.items()}
    holdout = self.path / "holdout.json"
    self.held_out = tuple(json.loads(holdout.read_text())["cells"]) if holdout.exists() else ()

  def split(self, name: str) -> "RecordSource":
    """The records of one split by random access; an absent or empty split is an `InputError`."""
    if name not in self.splits:
      raise InputError(f"{self.path} has no split {name!r}{nearest(name, self.splits)}")
    if not self.splits[name]:
      raise InputError(f"{self.path}: split {name!r} is empty; prepare more data or choose another split")
    count = len(self._shards[name])
    paths = [self.path / _shard_name(self.name, name, i, count) for i in range(count)]
    return RecordSource(paths, self._shards[name], self.schema)


class RecordSource:
  """Random access to records as dicts; what Grain calls a data source. Picklable, so worker processes can reopen it."""

  def __init__(self, paths: Sequence[Path], lengths: Sequence[int], schema: Schema):
    for path, length in zip(paths, lengths):
      if not path.exists():
        raise InputError(f"{path} is missing; prepare the data set again")
      try:
        found = ArrayRecordReader(str(path)).num_records()
      except Exception as error:  # array_record raises plain RuntimeErrors and ValueErrors of its own
        raise InputError(f"{path} cannot be read ({error}); prepare the data set again") from None
      if found != length:
        raise InputError(f"{path} holds {found} records, dataset_info.json says {length}; prepare the data set again")
    self._paths = [str(path) for path in paths]
    self._starts = np.cumsum([0, *lengths])
    self._schema = schema
    self._description = features(schema)
    self._readers: list[ArrayRecordReader | None] = [None] * len(paths)

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, index: int) -> dict[str, Any]:
    index = int(index)
    if not 0 <= index < len(self):
      raise IndexError(index)
    shard = int(np.searchsorted(self._starts, index, side="right")) - 1
    if self._readers[shard] is None:
      self._readers[shard] = ArrayRecordReader(self._paths[shard])
    (data,) = self._readers[shard].read([index - int(self._starts[shard])])
    try:
      record = self._description.deserialize_example_np(data)
    except (KeyError, ValueError) as error:
      raise InputError(
        f"{self._paths[shard]}: record {index} does not fit schema.json ({' '.join(str(error).split())}); prepare the"
        " data set again"
      ) from None
    for field in ("key", "patient", "text"):
      record[field] = record[field].decode()
    for field in ("findings", "factors"):
      record[field] = json.loads(record[field])
    values = {name: np.asarray(value)[None] for name, value in record["attributes"].items()}
    self._schema.check_batch(values, f"{Path(self._paths[shard]).name} record {record['key']}")
    return record

  def __getstate__(self):
    return {**self.__dict__, "_readers": [None] * len(self._paths)}


def decode_image(data: bytes, size: int | None = None) -> np.ndarray:
  """Encoded bytes to uint8 [H, W, 3]; resized to `size` x `size` (antialiased bicubic) when it differs."""
  image = Image.open(io.BytesIO(data)).convert("RGB")
  if size is not None and image.size != (size, size):
    image = image.resize((size, size), Image.Resampling.BICUBIC)
  return np.asarray(image)
