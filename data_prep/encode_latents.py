"""Encodes the images of a data set once: `python -m data_prep.encode_latents --data DIR --weights DIR --out DIR`.

The result is a data set of the same records in the same order and shards, with VAE moments (bfloat16 mean and
log-variance) and token ids in place of the images; `compdiff train` reads it like the other. The posterior is sampled
in the training step, so nothing of the method changes. The same command resumes at the first missing shard.
"""

import functools
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compdiff_jax import cli, sharding
from compdiff_jax.data.prompts import format_prompt
from compdiff_jax.data.records import (
  RecordSet,
  RecordSource,
  Shard,
  features,
  shard_name,
  split_info,
  write_attributes,
  write_description,
  write_shard,
)
from compdiff_jax.data.tokenizer import Tokenizer, load_tokenizer
from compdiff_jax.interop.weights import load_component, read_config
from compdiff_jax.latent_diffusion import DTYPES
from compdiff_jax.metrics import Progress
from compdiff_jax.models.functional import Functional
from compdiff_jax.models.vae import AutoencoderKL, VAEConfig, normalize_pixels
from compdiff_jax.workdir import content_hash
from data_prep import checksums

# Files of the data set that describe its records, not its images.
_COPIED = ("holdout.json", "holdout_images.csv", "holdout_leaks.csv", "cells.csv", "attribution.csv")


def encoder(directory: str | Path, dtype: str, batch_size: int) -> tuple[Callable[[np.ndarray], np.ndarray], str, int]:
  """(encode, content hash of the VAE, downsampling).

  `encode` maps images uint8 [N, S, S, 3], N <= `batch_size`, to moments bfloat16 [N, s, s, 2c]. Every call runs the
  same program on a full batch split over all devices, so the moments of an image do not depend on its neighbours.
  """
  config = VAEConfig.from_dict(read_config(directory, "AutoencoderKL"))
  vae = Functional(lambda rngs: AutoencoderKL(config, dtype=jnp.dtype(dtype), rngs=rngs))
  mesh = sharding.make_mesh(sharding.DATA_PARALLEL)
  sharding.check_batch(batch_size, 1, mesh)
  params = load_component(directory, vae)
  vae_hash = content_hash(params)
  params = jax.device_put(params, sharding.replicated(mesh))

  @functools.partial(jax.jit, out_shardings=sharding.batch_sharding(mesh))
  def moments(params, images):
    return vae(params, normalize_pixels(images), method="encode").astype(jnp.bfloat16)

  def encode(images: np.ndarray) -> np.ndarray:
    padded = np.concatenate([images, np.zeros([batch_size - len(images), *images.shape[1:]], np.uint8)])
    return np.asarray(moments(params, jax.device_put(padded, sharding.batch_sharding(mesh))))[: len(images)]

  return encode, vae_hash, config.downsampling


def encoded_records(
  source: RecordSource,
  numbers: Sequence[int],
  encode: Callable[[np.ndarray], np.ndarray],
  tokenizer: Tokenizer,
  records: RecordSet,
  latents: dict[str, Any],
  batch_size: int,
) -> Iterator[dict[str, Any]]:
  """The records of a latent set for the given ones of an image set."""
  for start in range(0, len(numbers), batch_size):
    indices = numbers[start : start + batch_size]
    batch = source.read(indices)
    moments = encode(np.stack([source.decode(i, record, latents["image_size"]) for i, record in zip(indices, batch)]))
    if not np.isfinite(moments.astype(np.float32)).all():
      raise cli.RunError(f"the VAE gives values that are no numbers for records of {records.path}; use --dtype float32")
    prompts = [format_prompt(r["text"], r["attributes"], records.schema, latents["prompt_attributes"]) for r in batch]
    for record, own, ids in zip(batch, moments, tokenizer(prompts)):
      kept = {field: record[field] for field in ("key", "patient", "text", "attributes")}
      json_fields = {field: json.dumps(record[field], sort_keys=True) for field in ("findings", "factors")}
      yield {**kept, **json_fields, "moments": own.tobytes(), "input_ids": ids}


def main(argv: list[str]) -> None:
  parser = cli.parser("python -m data_prep.encode_latents", "Encodes images to VAE moments and texts to token ids.")
  parser.add_argument("--data", required=True, help="data set directory of images")
  parser.add_argument("--weights", required=True, type=Path, help="directory with vae/ and tokenizer/, as in diffusers")
  parser.add_argument("--out", required=True, type=Path, help="data set directory to make; new or empty")
  parser.add_argument("--image_size", type=int, help="resize to this many pixels; default: as stored")
  parser.add_argument("--prompt_attributes", default="", help="config.prompt_attributes of the runs, e.g. age,sex")
  parser.add_argument("--batch_size", type=int, default=16, help="images in one call, over all devices together")
  parser.add_argument("--dtype", choices=DTYPES, default="float32", help="the encoder computes in this")
  args = parser.parse_args(argv)

  if args.batch_size < 1:
    raise cli.InputError(f"--batch_size {args.batch_size}: give a positive number")
  cli.check_free(args.out)
  records = RecordSet(args.data)
  if records.latents is not None:
    raise cli.InputError(f"{args.data} already holds moments; give a data set of images")
  sources = {split: records.split(split) for split, count in records.splits.items() if count}
  names = tuple(name for name in args.prompt_attributes.split(",") if name)
  for name in names:
    if name not in records.schema.names:
      raise cli.InputError(f"--prompt_attributes: no attribute {name!r}{cli.nearest(name, records.schema.names)}")
  source = next(iter(sources.values()))
  first = source.decode(0, source[0])
  size = args.image_size or min(first.shape[:2])
  if size > min(first.shape[:2]):
    raise cli.InputError(f"{args.data} holds {min(first.shape[:2])} px images, --image_size is {size}; prepare larger")
  tokenizer = load_tokenizer(args.weights / "tokenizer")
  encode, vae_hash, downsampling = encoder(args.weights / "vae", args.dtype, args.batch_size)
  if size < 1 or size % downsampling:
    raise cli.InputError(f"image size {size} must be a multiple of the VAE's downsampling {downsampling}")
  latents = {
    "vae": vae_hash,
    "tokenizer": tokenizer.content_hash(),
    "prompt_attributes": list(names),
    "image_size": size,
    "shape": list(encode(np.zeros([1, size, size, 3], np.uint8)).shape[1:]),
    "computed_in": args.dtype,
  }
  job = {"latents": latents, "batch_size": args.batch_size, "devices": jax.device_count(), "data": _data_hash(records)}

  progress = Progress(sum(map(len, sources.values())), 0, "image")
  done = 0
  with cli.resumable_directory(args.out, job) as (directory, notes), cli.writing(args.out):
    infos = []
    for split, source in sources.items():
      shards, start, lengths = [], 0, records.shard_lengths(split)
      for i, length in enumerate(lengths):
        path = directory / shard_name(records.name, split, i, len(lengths))
        finished = notes / f"{path.name}.json"
        if not finished.exists():
          made = encoded_records(
            source, range(start, start + length), encode, tokenizer, records, latents, args.batch_size
          )
          cli.write_whole(finished, json.dumps(write_shard(path, features(records.schema, latents=True), made)))
        shards.append(Shard(*json.loads(finished.read_text())))
        start += length
        done += length
        progress.update(done, f"{split} shard {i + 1} of {len(lengths)}")
      write_attributes(directory, split, records.schema, records.attributes(split))
      infos.append(split_info(directory, records.name, split, shards))
    for name in _COPIED:
      if (records.path / name).exists():
        shutil.copyfile(records.path / name, directory / name)
    text = f"VAE moments and token ids of the data set {records.name} (see its own data card)."
    write_description(directory, records.name, records.schema, infos, text, latents, records.licence)
    checksums.write(directory)
  progress.close()
  print(f"{args.out}: {done} records of {'x'.join(map(str, latents['shape']))} moments from VAE {vae_hash[:12]}")


def _data_hash(records: RecordSet) -> str:
  """Tells data sets apart by their descriptions: counts, bytes and names of the shards."""
  digest = hashlib.sha256(str(records.path.absolute()).encode())
  for split in records.splits:
    for path in records.shard_paths(split):
      digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
  return digest.hexdigest()


if __name__ == "__main__":
  sys.exit(cli.run(main, "python -m data_prep.encode_latents"))
