"""The Grain pipeline: records to batches of NumPy arrays. The order is a pure function of (seed, epoch)."""

from typing import Any

import grain
import numpy as np

from compdiff_jax.cli import InputError
from compdiff_jax.data.prompts import format_prompt
from compdiff_jax.data.records import RecordSet, decode_image
from compdiff_jax.data.tokenizer import Tokenizer

# Grain's own threads decode ahead of the step; a batch in flight hides decoding without holding much memory.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=64)


def check_image_size(image_size: int, record_set: RecordSet, split: str) -> None:
  """The first image of the split must not be smaller than what training asks for: enlarging it is never silent."""
  side = min(decode_image(record_set.split(split)[0]["image"]).shape[:2])
  if side < image_size:
    raise InputError(f"{record_set.path} holds {side} px images, data.image_size is {image_size}; prepare larger")


def training_batches(
  record_set: RecordSet,
  split: str,
  *,
  batch_size: int,
  image_size: int,
  seed: int,
  tokenizer: Tokenizer | None = None,
  prompt_attributes: tuple[str, ...] = (),
) -> grain.DatasetIterator:
  """An endless, shuffled, checkpointable iterator of batches.

  Each batch is {"images": uint8 [B, S, S, 3], "attributes": {name: [B]}} and, with a tokenizer, "input_ids" int32
  [B, 77]. Each epoch has its own order; batches cross epoch boundaries, so no record is dropped.
  """
  schema = record_set.schema

  def parse(record: dict[str, Any]) -> dict[str, Any]:
    example = {
      "images": decode_image(record["image"], image_size),
      "attributes": {a.name: np.asarray(record["attributes"][a.name], a.dtype) for a in schema},
    }
    if tokenizer is not None:
      prompt = format_prompt(record["text"], record["attributes"], schema, prompt_attributes)
      example["input_ids"] = tokenizer([prompt])[0]
    return example

  source = record_set.split(split)
  dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat().map(parse).batch(batch_size)
  return iter(dataset.to_iter_dataset(_READ))
