"""Preparing and reading data, side by side with Pillow and WebDataset: `python -m benchmarks.data --metadata CSV`.

Prints JSON. Everything is drawn, except for the attributes of the long epoch: CSV is the public metadata of NIH
ChestX-ray14 (112,120 rows). Rates "per core" divide by the processor time of the process, all threads together, so they
do not depend on what else the machine does; rates "per second" are what a clock says. Needs about 3 GB of disk.
"""

import argparse
import contextlib
import dataclasses
import gc
import io
import json
import pickle
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import webdataset
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image, ImageFilter

from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.data.csv_file import iterate_csv
from compdiff_jax.data.input_pipeline import training_batches
from compdiff_jax.data.records import (
  RecordSet,
  Shard,
  features,
  shard_name,
  split_info,
  write_attributes,
  write_description,
  write_shard,
)
from data_prep.dataset import write_dataset
from data_prep.images import FolderImages, ImageOptions

SCHEMA = Schema(
  (
    Attribute("age", "continuous", low=0, high=100, bins=(18, 40, 60, 80), unit="year"),
    Attribute("sex", "categorical", values=("male", "female")),
  )
)
SIZE = 512
NATIVE = (3056, 2544)  # height and width of a typical radiograph
TRAINING_GOAL = 128 * 8  # images/s of a host with eight GPUs
BATCH = 32
FILES = 64


def per_core(count: int, work: Callable[[], Any]) -> tuple[float, float]:
  """(things per second of processor time, things per second) of `work`, which handles `count` things."""
  gc.collect()
  cpu, clock = time.process_time(), time.perf_counter()
  work()
  return count / (time.process_time() - cpu), count / (time.perf_counter() - clock)


def best(rounds: int, count: int, **works: Callable[[], Any]) -> dict[str, dict[str, float]]:
  """The best of some rounds for each of the works, which take turns."""
  results: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
  for _ in range(rounds):
    for name, work in works.items():
      results[name].append(per_core(count, work))
  return {
    name: {"per_core": round(max(r[0] for r in rows), 1), "per_second": round(max(r[1] for r in rows), 1)}
    for name, rows in results.items()
  }


def radiograph(seed: int, height: int, width: int) -> Image.Image:
  """A grey picture with the smoothness and grain of a radiograph, so that decoders work as hard as on a real one."""
  rng = np.random.default_rng(seed)
  coarse = Image.fromarray(rng.integers(0, 256, [24, 20], np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
  grain = Image.fromarray(rng.integers(0, 24, [height, width], np.uint8)).filter(ImageFilter.GaussianBlur(0.8))
  return Image.fromarray(np.clip(np.int16(coarse) + np.int16(grain) - 12, 0, 255).astype(np.uint8))


def png(image: Image.Image) -> bytes:
  data = io.BytesIO()
  image.save(data, "PNG")
  return data.getvalue()


def record(i: int, **picture: Any) -> dict[str, Any]:
  attributes = {"age": float(i % 100), "sex": i % 2}
  text = "No acute cardiopulmonary abnormality. The heart is of normal size."
  return {
    "key": f"{i:08d}",
    "patient": f"{i // 3:016x}",
    "text": text,
    "attributes": attributes,
    "findings": "{}",
    "factors": "{}",
  } | picture


def write_set(
  path: Path, shards: list[Shard], columns: dict[str, np.ndarray], latents: dict | None = None
) -> RecordSet:
  """Describes the shards that lie in `path` already."""
  write_attributes(path, "train", SCHEMA, columns)
  write_description(path, "bench", SCHEMA, [split_info(path, "bench", "train", shards)], "benchmark", latents)
  return RecordSet(path)


def columns_of(count: int) -> dict[str, np.ndarray]:
  return {"age": np.arange(count) % 100.0, "sex": np.arange(count) % 2}


def drain(batches: Iterator[Any], count: int) -> None:
  for _ in range(-(-count // BATCH)):
    next(batches)
  batches.close()


# ---- Preparing


def preparing(work: Path, count: int) -> dict[str, Any]:
  """`write_dataset` on a folder of JPEG files against decode, resize and encode with Pillow alone."""
  folder = work / "jpeg"
  folder.mkdir()
  for i in range(FILES):
    radiograph(i, 1536, 1280).save(folder / f"{i}.jpg", quality=90)
  outs = iter(range(1000))

  def name(i: int) -> str:
    return f"{i % FILES}.jpg"

  def ours():
    rows = ({"file": f"{i}.jpg", **record(i), "findings": {}, "factors": {}, "image": name(i)} for i in range(count))
    rows = ({key: value for key, value in row.items() if key != "key"} for row in rows)
    write_dataset(
      work / f"prepared{next(outs)}",
      name="bench",
      schema=SCHEMA,
      examples=rows,
      description="benchmark",
      size=SIZE,
      command="benchmark",
      encode=FolderImages(str(folder), ImageOptions(SIZE)),
      fractions=(1, 0, 0),
    )

  def pillow():
    for i in range(count):
      with Image.open(folder / name(i)) as image:
        png(image.convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS))

  result = best(2, count, ours=ours, pillow=pillow)
  return {**result, "ratio": ratio(result, "ours", "pillow"), "target": 0.8, "images": count}


def ratio(result: dict[str, dict[str, float]], ours: str, theirs: str) -> float:
  return round(result[ours]["per_core"] / result[theirs]["per_core"], 2)


# ---- Reading images


def reading_images(work: Path, count: int, natives: int) -> dict[str, Any]:
  """Batches of uint8 [B, 512, 512, 3] from PNG records against WebDataset, one thread each.

  The reference's shards hold pickled float32 tensors of native size, which its loader pads and resizes every time it
  reads them; `natives` of these fit on the disk and are read over and over.
  """
  path = work / "images"
  path.mkdir()
  encoded = [png(radiograph(i, SIZE, SIZE)) for i in range(count)]
  rows = (record(i, image=data) for i, data in enumerate(encoded))
  shard = write_shard(path / shard_name("bench", "train", 0, 1), features(SCHEMA), rows)
  records = write_set(path, [shard], columns_of(count))

  with tarfile.open(work / "png.tar", "w") as tar:
    for i, data in enumerate(encoded):
      add(tar, f"{i:06d}.png", data)
  with tarfile.open(work / "pickled.tar", "w") as tar:
    for i in range(natives):
      tensor = torch.tensor(np.asarray(radiograph(i, *NATIVE))).float() / 255
      add(tar, f"{i:06d}.pt_image", pickle.dumps(tensor))

  def ours():
    drain(iter(training_batches([(records, 1.0)], batch_size=BATCH, image_size=SIZE, seed=0, threads=0)), count)

  def webdataset_png():
    dataset = webdataset.WebDataset(str(work / "png.tar"), shardshuffle=False).shuffle(1000).decode("rgb8")
    collect(image for (image,) in dataset.to_tuple("png"))

  def collect(images):
    batch = []
    for image in images:
      batch.append(image)
      if len(batch) == BATCH:
        np.stack(batch)
        batch = []

  def reference():
    dataset = webdataset.WebDataset(str(work / "pickled.tar"), shardshuffle=False).shuffle(1000)
    batch = []
    for (data,) in dataset.to_tuple("pt_image"):
      image = pickle.loads(data)[None, None]
      height, width = image.shape[2:]
      missing = abs(height - width)
      sides = (missing // 2, missing - missing // 2)
      image = torch.nn.functional.pad(image, (*sides, 0, 0) if height > width else (0, 0, *sides))
      image = torch.nn.functional.interpolate(image, (SIZE, SIZE), mode="bilinear", antialias=True)
      batch.append((image[0].expand(3, -1, -1) - 0.5) / 0.5)
    torch.stack(batch)

  torch.set_num_threads(1)
  result = best(3, count, ours=ours, webdataset_png=webdataset_png)
  result |= best(2, natives, webdataset_pickled=reference)
  return {
    **result,
    "ratio_to_pickled": ratio(result, "ours", "webdataset_pickled"),
    "target_to_pickled": 2.0,
    "ratio_to_png": ratio(result, "ours", "webdataset_png"),
    "target_to_png": 1.0,
    "images": count,
    "png_bytes": sum(map(len, encoded)) // count,
  }


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
  info = tarfile.TarInfo(name)
  info.size = len(data)
  tar.addfile(info, io.BytesIO(data))


# ---- Reading moments


def reading_moments(work: Path, count: int) -> dict[str, Any]:
  """Records of 64x64x8 bfloat16 moments and stored token ids, as training reads them."""
  path = work / "moments"
  path.mkdir()
  rng = np.random.default_rng(0)
  shape = (64, 64, 8)

  def rows():
    for i in range(count):
      moments = rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16).tobytes()
      yield record(i, moments=moments, input_ids=rng.integers(0, 49408, 77, np.int32))

  shard = write_shard(path / shard_name("bench", "train", 0, 1), features(SCHEMA, latents=True), rows())
  latents = {"vae": "", "tokenizer": "bench", "prompt_attributes": [], "image_size": SIZE, "shape": shape}
  records = write_set(path, [shard], columns_of(count), latents)

  def read(threads):
    options = {"batch_size": BATCH, "image_size": SIZE, "seed": 0, "tokenizer": StoredIds(), "threads": threads}
    drain(iter(training_batches([(records, 1.0)], **options)), 4 * count)

  result = best(3, 4 * count, alone=lambda: read(0), ahead=lambda: read(2))
  two_cores = max(result["ahead"]["per_second"], result["alone"]["per_second"])
  return {
    **result,
    "per_second_on_this_machine": two_cores,
    "target_on_two_cores": 4000,
    "sixteen_cores": round(16 * result["alone"]["per_core"]),
    "target_sixteen_cores": 2 * TRAINING_GOAL,
    "records": count,
  }


class StoredIds:
  """Stands for the tokenizer whose ids the records hold."""

  def content_hash(self) -> str:
    return "bench"


# ---- Starting


def starting(work: Path, count: int, num_shards: int) -> dict[str, Any]:
  """Seconds from opening a set of `count` records to the first balanced batch, in a fresh process."""
  path = work / "many"
  path.mkdir()
  (path / "one").mkdir()
  data = png(Image.new("L", (16, 16)))
  one = path / "one" / "shard"
  write_shard(one, features(SCHEMA), [record(0, image=data)])
  from array_record.python.array_record_module import ArrayRecordReader

  (serialized,) = ArrayRecordReader(str(one)).read_all()
  shards = []
  for i in range(num_shards):
    writer = ArrayRecordWriter(str(path / shard_name("bench", "train", i, num_shards)), "group_size:1,uncompressed")
    for _ in range(count // num_shards):
      writer.write(serialized)
    writer.close()
    shards.append(Shard(count // num_shards, len(serialized) * (count // num_shards)))
  write_set(path, shards, columns_of(count))
  code = f"""
import time; start = time.perf_counter()
from compdiff_jax.data.input_pipeline import training_batches
from compdiff_jax.data.records import RecordSet
imported = time.perf_counter()
batches = iter(training_batches(
  [(RecordSet({str(path)!r}), 1.0)], batch_size={BATCH}, image_size=16, seed=0, balance=("age", "sex"),
  balance_tau=0.5))
next(batches)
print(imported - start, time.perf_counter() - imported)
batches.close()
"""
  runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True) for _ in range(2)]
  imports, opening = min((tuple(map(float, run.stdout.split())) for run in runs), key=sum)
  return {
    "seconds_with_imports": round(imports + opening, 2),
    "seconds_of_it_imports": round(imports, 2),
    "target_seconds": 5.0,
    "records": count,
    "shards": num_shards,
  }


# ---- A long epoch


@dataclasses.dataclass(frozen=True)
class Drawn:
  """An `encode` that draws a tiny image from its number."""

  def __call__(self, number: int) -> bytes:
    return png(Image.fromarray(np.random.default_rng(number).integers(0, 256, [16, 16], np.uint8)))


def nih_rows(metadata: Path) -> Iterator[dict[str, Any]]:
  header, lines = iterate_csv(metadata)
  for image, (number, cells) in enumerate(lines):
    row = dict(zip(header, cells))
    yield {
      "file": row["Image Index"],
      "row": number,
      "patient": row["Patient ID"],
      "image": image,
      "text": row["Finding Labels"].replace("|", ", "),
      "attributes": {"age": min(float(row["Patient Age"]), 100.0), "sex": "MF".index(row["Patient Gender"])},
      "findings": {},
      "factors": {},
    }


def long_epoch(work: Path, metadata: Path) -> dict[str, Any]:
  """Resident memory over one epoch of every row of the NIH metadata, all in the training split."""
  seconds = time.perf_counter()
  write_dataset(
    work / "nih",
    name="nih",
    schema=SCHEMA,
    examples=nih_rows(metadata),
    description="benchmark",
    size=16,
    command="benchmark",
    encode=Drawn(),
    fractions=(1, 0, 0),
    shard_mib=4,
  )
  written = time.perf_counter() - seconds
  records = RecordSet(work / "nih")
  count = records.splits["train"]
  batches = iter(training_batches([(records, 1.0)], batch_size=BATCH, image_size=16, seed=0, threads=2))
  samples = []
  seconds = time.perf_counter()
  for step in range(count // BATCH):
    next(batches)
    if step % (count // BATCH // 10) == 0:
      samples.append(resident_mib())
  batches.close()
  return {
    "records": count,
    "prepared_per_second": round(count / written),
    "read_per_second": round(count / (time.perf_counter() - seconds)),
    "resident_mib": samples,
    "growth_after_first_tenth_mib": samples[-1] - samples[1],
    "shards": len(records.shard_lengths("train")),
  }


def resident_mib() -> int:
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  return round(pages * resource.getpagesize() / 2**20)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--metadata", required=True, type=Path, help="CSV of NIH ChestX-ray14, may be gzip-compressed")
  parser.add_argument("--records", type=int, default=400_000, help="of the start-up measurement")
  args = parser.parse_args()
  results = {}
  measurements = {
    "preparing": lambda work: preparing(work, 384),
    "reading_images": lambda work: reading_images(work, 256, 24),
    "reading_moments": lambda work: reading_moments(work, 2048),
    "starting": lambda work: starting(work, args.records, 80),
    "long_epoch": lambda work: long_epoch(work, args.metadata),
  }
  for name, measure in measurements.items():
    # Standard output is for the JSON alone.
    with tempfile.TemporaryDirectory(prefix="compdiff_bench_") as directory, contextlib.redirect_stdout(sys.stderr):
      results[name] = measure(Path(directory))
    print(name, "done", file=sys.stderr)
  print(json.dumps(results, indent=2))


if __name__ == "__main__":
  main()
