"""A sampling job: plan rows in, PNG files and a manifest out. Every piece is written whole or not at all.

Several processes compute each batch together, and one of them writes.
"""

import contextlib
import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from PIL import Image, PngImagePlugin

from compdiff_jax import __version__, distributed, sharding
from compdiff_jax.cli import InputError, write_whole, writing
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.config import differences
from compdiff_jax.data.prompts import format_prompt
from compdiff_jax.data.tokenizer import Tokenizer
from compdiff_jax.diffusion.samplers import Table
from compdiff_jax.latent_diffusion import LatentDiffusion
from compdiff_jax.sampling.guidance import Guidance
from compdiff_jax.sampling.plan import PlanRow
from compdiff_jax.sampling.sampler import make_sampler, padded_batch

# (texts, attributes {name: [n]}, seeds [n], negative prompts) -> images uint8 [n, S, S, 3]
Generate = Callable[[Sequence[str], Mapping[str, np.ndarray], np.ndarray, Sequence[str]], np.ndarray]


def make_generate(
  model: LatentDiffusion,
  tokenizer: Tokenizer,
  *,
  prompt_attributes: Sequence[str],
  table: Table,
  guidance: Guidance,
  guidance_rescale: float,
  batch_size: int,
  mesh: Mesh,
) -> Callable[..., np.ndarray]:
  """Returns (params, texts, attributes, seeds, negatives) -> images for any number of rows.

  Rows are put through the compiled sampler in batches of one padded shape, split over `mesh`, where the parameters are.
  """
  batch_size = padded_batch(batch_size, mesh.size)
  sampler = make_sampler(model, table, guidance_rescale)

  def generate(params, texts, attributes, seeds, negatives):
    images = []
    for start in range(0, len(texts), batch_size):
      # The last batch repeats its last row: one shape, one program.
      index = np.minimum(np.arange(start, start + batch_size), len(texts) - 1)
      prompts = [
        format_prompt(texts[i], {k: v[i] for k, v in attributes.items()}, model.schema, prompt_attributes)
        for i in index
      ]
      rows = (
        tokenizer(prompts),
        tokenizer([negatives[i] for i in index]),
        {name: np.asarray(values)[index] for name, values in attributes.items()},
        np.asarray(seeds, np.uint32)[index],
      )
      out = sampler(params, *sharding.place(rows, sharding.batch_sharding(mesh)), guidance)
      images.append(sharding.fetch(out)[: len(texts) - start])
    return np.concatenate(images)

  return generate


def run_job(
  out: Path,
  rows: Sequence[PlanRow],
  schema: Schema,
  generate: Generate,
  settings: Mapping[str, Any],
  batch_size: int,
) -> Iterator[int]:
  """Samples every plan row into `out`, yielding the number finished: first what is already there, then each batch's.

  Args:
    out: directory for `000000.png` …, `manifest.csv`, `schema.json` and `job.json`.
    settings: what every image shares (checkpoint_step, model_sha256, weights, sampler and its options, guidance);
      stands in the manifest. A directory begun with other settings or another plan is refused.
  """
  job = {"settings": dict(settings), "plan": _plan_hash(rows, schema), "rows": len(rows)}
  columns = ["file", "sha256", "id", "text", *schema.names, "seed", "negative", *settings]
  done = distributed.from_writer(lambda: _open_output(out, job, columns, schema))
  yield done
  with contextlib.ExitStack() as resources:
    if distributed.is_writer():
      file = resources.enter_context((out / "manifest.csv").open("a", newline=""))
      manifest = csv.writer(file)
    for start in range(done, len(rows), batch_size):
      chunk = rows[start : start + batch_size]
      attributes = {a.name: np.asarray([row.attributes[a.name] for row in chunk], a.dtype) for a in schema}
      seeds = np.asarray([row.seed for row in chunk], np.uint32)
      images = generate([row.text for row in chunk], attributes, seeds, [row.negative for row in chunk])
      for index, (row, image) in enumerate(zip(chunk, images), start=start):
        if not distributed.is_writer():
          break
        values = {a.name: a.decode(row.attributes[a.name]) for a in schema}
        facts = {"id": row.id, "text": row.text, "attributes": values, "seed": row.seed, "negative": row.negative}
        data = _encode_png(image, {**settings, **facts})
        name = f"{index:06d}.png"
        with writing(out):
          (out / f".{name}").write_bytes(data)
          (out / f".{name}").replace(out / name)
          digest = hashlib.sha256(data).hexdigest()
          own = (row.id, row.text, *values.values(), row.seed, row.negative)
        manifest.writerow([name, digest, *own, *settings.values()])
      if distributed.is_writer():
        file.flush()
      yield start + len(chunk)


def _plan_hash(rows: Sequence[PlanRow], schema: Schema) -> str:
  digest = hashlib.sha256()
  for row in rows:
    values = [schema[name].decode(row.attributes[name]) for name in schema.names]
    digest.update(json.dumps([row.id, row.text, values, row.seed, row.negative]).encode())
  return digest.hexdigest()


def _open_output(out: Path, job: Mapping[str, Any], columns: Sequence[str], schema: Schema) -> int:
  """Starts the directory, or checks what an interrupted job left there; returns how many rows are finished."""
  description = out / "job.json"
  if description.exists():
    changed = differences(json.loads(description.read_text()), json.loads(json.dumps(job)))
    if changed:
      raise InputError(
        f"{out} was begun with another plan, checkpoint or settings ({'; '.join(changed[:4])}); give a new directory"
      )
  elif out.exists() and (not out.is_dir() or any(path.name != ".job.json.part" for path in out.iterdir())):
    raise InputError(f"{out} is not an empty directory and holds no sampling job (no job.json); give a new directory")
  with writing(out):
    out.mkdir(parents=True, exist_ok=True)
    # First and whole: from here on the directory is the job's, whatever a kill leaves of the rest.
    write_whole(description, json.dumps(job, indent=2) + "\n")
    schema.save(out / "schema.json")
    kept = _finished_rows(out, columns)
    table = io.StringIO(newline="")
    csv.writer(table).writerows([columns, *kept])
    write_whole(out / "manifest.csv", table.getvalue())
  return len(kept)


def _finished_rows(out: Path, columns: Sequence[str]) -> list[list[str]]:
  """The rows of the manifest up to the first that a kill cut short or whose image is not whole."""
  if not (out / "manifest.csv").exists():
    return []
  with (out / "manifest.csv").open(newline="") as file:
    entries = list(csv.reader(file))[1:]
  kept = []
  for index, entry in enumerate(entries):
    path = out / f"{index:06d}.png"
    whole = len(entry) == len(columns) and entry[0] == path.name and path.exists()
    if not whole or hashlib.sha256(path.read_bytes()).hexdigest() != entry[1]:
      break
    kept.append(entry)
  return kept


def _encode_png(image: np.ndarray, provenance: Mapping[str, Any]) -> bytes:
  """PNG bytes with the provenance of a generated image as text chunks."""
  chunks = PngImagePlugin.PngInfo()
  chunks.add_itxt("Synthetic", "YES")
  chunks.add_itxt("Software", f"compdiff-jax {__version__}")
  chunks.add_itxt("Generation", json.dumps(provenance))
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "PNG", pnginfo=chunks)
  return buffer.getvalue()
