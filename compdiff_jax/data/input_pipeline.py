"""The Grain pipeline: records to batches, on the host or on the devices. Nothing here needs TensorFlow."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import jax
import ml_collections
import ml_dtypes
import numpy as np
from absl import flags
from jax.sharding import NamedSharding

from compdiff_jax.cli import InputError, nearest
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.data.order import BatchNumbers, Group, RecordOrder, balanced_groups
from compdiff_jax.data.prompts import format_prompt
from compdiff_jax.data.records import RecordSet, RecordSource
from compdiff_jax.data.tokenizer import Tokenizer
from compdiff_jax.sharding import local_rows

# Batches that wait on the host and on the devices: enough to hide reading behind the step.
_PREFETCH = 2


def data_sets(data: ml_collections.ConfigDict) -> list[tuple[str, float]]:
  """The directories of `config.data` with their weights: `path` (weight 1), then `mix`."""
  sets = [(data.path, 1.0)]
  for entry in data.mix:
    pair = isinstance(entry, Sequence) and [type(part) for part in entry] in ([str, float], [str, int])
    if not pair or not entry[1] > 0:
      raise InputError(f"config.data.mix: {entry!r} is not (path, weight) with a weight above 0")
    sets.append((entry[0], float(entry[1])))
  return sets


def open_training_sets(data: ml_collections.ConfigDict) -> list[tuple[RecordSet, float]]:
  """The data sets of `config.data` with their weights. They must fit together."""
  sets = [(RecordSet(path), weight) for path, weight in data_sets(data)]
  first = sets[0][0]
  for other, _ in sets[1:]:
    if other.schema != first.schema:
      raise InputError(
        f"config.data.mix: {other.path} has other attributes than {first.path}; prepare it with the same"
      )
    if other.latents != first.latents:
      raise InputError(
        f"config.data.mix: {other.path} and {first.path} must both hold images, or moments of one VAE, one size, one"
        " tokenizer and the same prompt attributes"
      )
  for name in data.balance:
    if name not in first.schema.names:
      raise InputError(f"config.data.balance: no attribute {name!r}{nearest(name, first.schema.names)}")
  for records, _ in sets:
    check_image_size(data.image_size, records)
  return sets


def check_vae(sets: Sequence[tuple[RecordSet, float]], vae_hash: str, vae_path: str) -> None:
  """Moments serve only the VAE that made them."""
  for records, _ in sets:
    if records.latents is not None and records.latents["vae"] != vae_hash:
      raise InputError(
        f"{records.path} holds moments of another VAE than {vae_path} (content hash differs); set weights.vae to that"
        " one or encode again"
      )


def check_image_size(image_size: int, records: RecordSet) -> None:
  """The first training image must not be smaller than what training asks for: enlarging it is never silent."""
  if records.latents is not None:
    side = records.latents["image_size"]
    if side != image_size:
      raise InputError(
        f"{records.path} holds moments of {side} px images, data.image_size is {image_size}; set it to {side} or encode"
        " again"
      )
    return
  source = records.split("train")
  side = min(source.decode(0, source[0]).shape[:2])
  if side < image_size:
    raise InputError(f"{records.path} holds {side} px images, data.image_size is {image_size}; prepare larger")


def training_batches(
  sets: Sequence[tuple[RecordSet, float]],
  *,
  batch_size: int,
  image_size: int,
  seed: int,
  tokenizer: Tokenizer | None = None,
  prompt_attributes: tuple[str, ...] = (),
  balance: Sequence[str] = (),
  balance_tau: float = 0.0,
  rows: Sequence[int] | None = None,
  first_step: int = 0,
  threads: int = 2,
  workers: int = 0,
) -> grain.IterDataset:
  """Endless shuffled batches of the split "train", read ahead of their use; see `order` for which records they hold.

  Args:
    sets: data sets and how often their records are drawn, relative to each other.
    batch_size: of the global batch.
    image_size: images are resized to this.
    seed: of the order.
    tokenizer: for `input_ids`; None leaves them out.
    prompt_attributes: attributes that precede the text in the prompt.
    balance: attributes whose cells are sampled in balance, inside each set; `balance_tau` as in `balanced_groups`.
    rows: the rows of the global batch to read; None for all.
    first_step: the step of the first batch.
    threads: threads that decode images beside the one that reads ahead; 0 reads when asked, without any thread.
    workers: processes that make whole batches in turn; 0 for none. Neither number changes the batches.

  Returns:
    Batches {"images": uint8 [b, S, S, 3] or "moments": bfloat16 [b, s, s, 2c], "attributes": {name: [b]}} and, with a
    tokenizer, "input_ids" int32 [b, 77]. Batches cross epochs, so no record is dropped.
  """
  source, order = _source_and_order(sets, seed, balance, balance_tau)
  read = _BatchReader(source, sets[0][0].schema, sets[0][0].latents, image_size, tokenizer, prompt_attributes, threads)
  rows = range(batch_size) if rows is None else rows
  numbers = BatchNumbers(order, batch_size, rows, first_step)
  ahead = grain.ReadOptions(num_threads=min(threads, 1), prefetch_buffer_size=_PREFETCH if threads else 0)
  batches = grain.MapDataset.source(numbers).map(read).to_iter_dataset(ahead)
  if not workers:
    return batches
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain's worker processes read flags of their own, which this program does not offer
  return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


def batch_keys(
  sets: Sequence[tuple[RecordSet, float]],
  *,
  step: int,
  batch_size: int,
  seed: int,
  balance: Sequence[str] = (),
  balance_tau: float = 0.0,
) -> list[str]:
  """The keys of the records in the global batch of a step, row by row; arguments as in `training_batches`."""
  source, order = _source_and_order(sets, seed, balance, balance_tau)
  return [record["key"] for record in source.read(BatchNumbers(order, batch_size, range(batch_size), step)[0])]


def _source_and_order(
  sets: Sequence[tuple[RecordSet, float]], seed: int, balance: Sequence[str], balance_tau: float
) -> tuple[RecordSource, RecordOrder]:
  """The training records of all sets, one after the other, and the order in which training draws them."""
  sources, groups = [], []
  offset = 0
  for records, weight in sets:
    sources.append(records.split("train"))
    count = len(sources[-1])
    if balance:
      members = balanced_groups(records.attributes("train"), records.schema, balance, balance_tau)
    else:
      members = [Group(np.arange(count), 1.0)]
    groups += [Group(offset + group.numbers, weight * group.weight) for group in members]
    offset += count
  return RecordSource.join(sources), RecordOrder(groups, seed)


def device_batches(batches: grain.IterDataset, sharding: NamedSharding, batch_size: int) -> grain.DatasetIterator:
  """Global arrays on the devices, transferred in the background while the step before them runs.

  `batches` hold the rows `sharding.local_rows(sharding, batch_size)` on every host.
  """
  rows = local_rows(sharding, batch_size)

  def put(array: np.ndarray) -> jax.Array:
    def shard(index):
      wanted = np.arange(batch_size)[index[0]]
      start = int(np.searchsorted(rows, wanted[0]))
      return array[start : start + len(wanted)]

    return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, shard)

  placed = batches.map(lambda batch: jax.tree.map(put, batch))
  return iter(grain.experimental.ThreadPrefetchIterDataset(placed, prefetch_buffer_size=_PREFETCH))


class _BatchReader:
  """Record numbers to one batch. Picklable, for worker processes."""

  def __init__(
    self,
    source: RecordSource,
    schema: Schema,
    latents: Mapping[str, Any] | None,
    image_size: int,
    tokenizer: Tokenizer | None,
    prompt_attributes: tuple[str, ...],
    threads: int,
  ):
    self._source = source
    self._schema = schema
    self._latents = latents
    self._image_size = image_size
    self._tokenizer = tokenizer
    self._prompt_attributes = tuple(prompt_attributes)
    self._threads = threads
    self._pool: ThreadPoolExecutor | None = None
    # Stored ids serve when this run would make the same ones; otherwise the text is tokenized again.
    self._stored_ids = (
      latents is not None
      and tokenizer is not None
      and latents["tokenizer"] == tokenizer.content_hash()
      and tuple(latents["prompt_attributes"]) == self._prompt_attributes
    )

  def __call__(self, numbers: np.ndarray) -> dict[str, Any]:
    records = self._source.read(numbers)
    batch: dict[str, Any] = {
      "attributes": {a.name: np.array([r["attributes"][a.name] for r in records], a.dtype) for a in self._schema}
    }
    if self._latents is not None:
      moments = b"".join(record["moments"] for record in records)
      batch["moments"] = np.frombuffer(moments, ml_dtypes.bfloat16).reshape(len(records), *self._latents["shape"])
    else:
      batch["images"] = np.empty([len(records), self._image_size, self._image_size, 3], np.uint8)
      list(self._map(self._decode, numbers, records, batch["images"]))
    if self._stored_ids:
      batch["input_ids"] = np.stack([record["input_ids"] for record in records])
    elif self._tokenizer is not None:
      batch["input_ids"] = self._tokenizer(
        [format_prompt(r["text"], r["attributes"], self._schema, self._prompt_attributes) for r in records]
      )
    return batch

  def _decode(self, number: int, record: Mapping[str, Any], out: np.ndarray) -> None:
    self._source.decode(number, record, self._image_size, out)

  def _map(self, function, *arguments):
    if self._threads < 2:
      return map(function, *arguments)
    if self._pool is None:
      self._pool = ThreadPoolExecutor(self._threads)
    return self._pool.map(function, *arguments)

  def __getstate__(self):
    return {**self.__dict__, "_pool": None}
