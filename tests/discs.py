"""A data set of discs, samples of it, and `compdiff evaluate` on the two."""

import csv
import hashlib
import io
import json

import numpy as np
from PIL import Image

from compdiff_jax import cli, evaluate
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.data import records

SIDE = 32
SCHEMA = Schema(
  (
    Attribute("age", "continuous", low=0, high=100, bins=(50,), unit="year"),
    Attribute("sex", "categorical", ("male", "female")),
  )
)
HELD_OUT = "age=50+,sex=female"


def draw_image(rng, age, sex):
  """A disc on noise: its brightness is the age, its side the sex."""
  image = rng.normal(60, 8, (SIDE, SIDE))
  rows, columns = np.mgrid[:SIDE, :SIDE]
  image[np.hypot(rows - 16, columns - (10 if sex else 22)) < 7] += 1.2 * age
  return np.clip(image, 0, 255).astype(np.uint8)


def encode(image):
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "PNG")
  return buffer.getvalue()


def people(rng, count, held_out):
  """Ages and sexes; without the held-out cell when `held_out` is false."""
  while count:
    age, sex = float(rng.integers(20, 90)), int(rng.integers(2))
    if held_out or not (age >= 50 and sex == 1):
      count -= 1
      yield age, sex


def write_real(path, *, shared_patient=False):
  rng, splits = np.random.default_rng(0), []
  path.mkdir()
  for split, count in (("train", 90), ("val", 4), ("test", 120)):
    rows = []
    for i, (age, sex) in enumerate(people(rng, count, held_out=split == "test")):
      rows.append(
        {
          "key": f"{split}-{i:03d}",
          "patient": "p" if shared_patient else f"{split}-p{i // 2}",
          "image": encode(draw_image(rng, age, sex)),
          "text": "A disc.",
          "attributes": {"age": np.float32(age), "sex": np.int32(sex)},
          "findings": "{}",
          "factors": "{}",
        }
      )
    splits.append(records.write_split(path, "discs", split, SCHEMA, rows))
  records.write_description(path, "discs", SCHEMA, splits, "discs")
  (path / "holdout.json").write_text(json.dumps({"cells": [HELD_OUT]}))
  return path


def write_manifest(path, rows):
  with open(path / "manifest.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)


def write_synthetic(path, count=110):
  rng, rows = np.random.default_rng(1), []
  path.mkdir()
  SCHEMA.save(path / "schema.json")
  for i, (age, sex) in enumerate(people(rng, count, held_out=True)):
    data = encode(np.repeat(draw_image(rng, age, sex)[..., None], 3, axis=-1))
    (path / f"{i:03d}.png").write_bytes(data)
    row = {"file": f"{i:03d}.png", "sha256": hashlib.sha256(data).hexdigest(), "text": "A <disc>."}
    rows.append({**row, "age": f"{age:g}", "sex": SCHEMA["sex"].decode(sex), "seed": i})
  rows[0]["age"] = ""  # unknown
  write_manifest(path, rows)
  Image.new("RGB", (40, 20)).save(path / "grid.png")
  return path


def read_manifest(path):
  with open(path / "manifest.csv", newline="") as file:
    return list(csv.DictReader(file))


def run(real, synthetic, out, *options):
  argv = [f"--real={real}", f"--synthetic={synthetic}", f"--out={out}", "--extractors=radiomics", *options]
  return cli.run(evaluate.main, "compdiff evaluate", argv)
