"""data_prep.verify finds what is wrong with a data set; repeated images and the card's figures are what was stored."""

import base64
import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from compdiff_jax import cli
from compdiff_jax.conditioning.schema import Attribute, Schema
from data_prep import checksums, dataset, verify

SCHEMA = Schema((
  Attribute("age", "continuous", low=0, high=100, bins=(40, 60), unit="year"),
  Attribute("sex", "categorical", values=("male", "female")),
))  # fmt: skip
NUM = 60


def png(value: int, size: int = 8) -> bytes:
  data = io.BytesIO()
  Image.new("L", (size, size), value).save(data, "PNG")
  return data.getvalue()


def example(i: int) -> dict:
  return {
    "key": f"k{i}",
    "patient": f"p{i // 2}",
    "image": png(i),
    "text": "Clear.",
    "attributes": {"age": float("nan") if i % 20 == 9 else float(i), "sex": i % 3 - 1},
    "findings": {"effusion": ("positive", "negative", "uncertain")[i % 3]} if i % 2 else {},
    "factors": {},
  }


def write(path: Path, rows, **options) -> Path:
  dataset.write_dataset(
    path, name="tiny", schema=SCHEMA, examples=rows, description="Tiny <b>set</b>.", size=8, command="test", **options
  )
  return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  return write(tmp_path_factory.mktemp("verify") / "set", [example(i) for i in range(NUM)])


@pytest.fixture
def copy(whole, tmp_path):
  return shutil.copytree(whole, tmp_path / "set")


def check(path, capsys) -> tuple[int, str]:
  capsys.readouterr()
  status = cli.run(verify.main, "verify", [str(path)])
  captured = capsys.readouterr()
  assert captured.err.count("\n") == (status != 0)
  return status, captured.out + captured.err


def test_a_good_data_set(whole, capsys):
  status, text = check(whole, capsys)
  assert status == 0 and f"{NUM} records, all hashes, records and counts are right" in text


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="sha256sum is not installed")
def test_hashes_in_the_format_of_sha256sum(whole):
  done = subprocess.run(["sha256sum", "-c", checksums.NAME], cwd=whole, capture_output=True, text=True)
  assert done.returncode == 0 and done.stdout.count(": OK") == len(list(whole.iterdir())) - 2  # itself, rejected.csv


def test_a_set_is_whole_without_its_rejected_rows(copy, capsys):
  sums = copy / checksums.NAME
  assert "rejected.csv" not in sums.read_text()
  sums.write_text(f"{checksums.sha256(copy / 'rejected.csv')}  rejected.csv\n{sums.read_text()}")  # earlier versions
  (copy / "rejected.csv").unlink()
  assert check(copy, capsys)[0] == 0


def shard(path: Path, split: str = "train") -> Path:
  return path / f"tiny-{split}.array_record-00000-of-00001"


def flip(path: Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 3] ^= 1
  path.write_bytes(data)


@pytest.mark.parametrize(
  ("damage", "expected"),
  [
    (lambda path: flip(shard(path)), "tiny-train.array_record-00000-of-00001: changed since it was written"),
    (
      lambda path: shard(path, "val").unlink(),
      "tiny-val.array_record-00000-of-00001: listed in SHA256SUMS, but missing",
    ),
    (lambda path: (path / "extra").touch(), "extra: not listed"),
    (lambda path: (path / checksums.NAME).unlink(), "SHA256SUMS is missing"),
    (lambda path: (path / "README.md").write_text("x"), "README.md: changed"),
  ],
)
def test_files_that_changed(copy, capsys, damage, expected):
  damage(copy)
  status, text = check(copy, capsys)
  assert status == 1 and expected in text


def test_no_data_set(tmp_path, capsys):
  assert check(tmp_path, capsys)[0] == 2
  assert check(tmp_path / "none", capsys)[0] == 2


def rewrite(path: Path, change, split: str = "train") -> None:
  """Replaces records by `change(number, record)` and makes the hashes fit again."""
  features = tfds.features.FeaturesDict.from_config(str(path))
  reader = ArrayRecordReader(str(shard(path, split)))
  records = [features.deserialize_example_np(data) for data in reader.read(range(reader.num_records()))]
  reader.close()
  writer = ArrayRecordWriter(str(shard(path, split)), "group_size:1")
  for number, record in enumerate(records):
    changed = change(number, record)
    if changed is not None:
      writer.write(features.serialize_example(features.encode_example(changed)))
  writer.close()
  checksums.write(path)


def other(**fields):
  return lambda number, record: {**record, **fields} if number == 3 else record


def attributes(**values):
  return lambda number, record: {**record, "attributes": {**record["attributes"], **values}} if number == 3 else record


@pytest.mark.parametrize(
  ("change", "expected"),
  [
    (lambda number, record: None if number == 3 else record, "records, dataset_info.json says"),
    (other(key=""), "no key"),
    (lambda number, record: {**record, "key": "same"}, "key occurs twice"),
    (attributes(age=200.0), "age is outside the schema"),
    (attributes(sex=2), "sex is outside the schema"),
    (attributes(age=99.0, sex=0), "count differs from the records"),
    (other(findings="[]"), "findings is no JSON object"),
    (other(findings='{"x": "perhaps"}'), "neither positive, negative nor uncertain"),
    (other(image=b"no image"), "image does not decode"),
    (other(image=png(1)[:-30]), "image does not decode"),
    (other(image=png(1, 16)), "images of 2 sizes"),
  ],
)
def test_records_that_are_wrong(copy, capsys, change, expected):
  rewrite(copy, change)
  status, text = check(copy, capsys)
  assert status == 1 and expected in text
  assert "changed since" not in text  # the hashes fit, so it was the records that told


def test_patient_in_two_splits(copy, capsys):
  features = tfds.features.FeaturesDict.from_config(str(copy))
  patient = features.deserialize_example_np(ArrayRecordReader(str(shard(copy))).read([0])[0])["patient"]
  rewrite(copy, lambda number, record: {**record, "patient": patient} if number == 0 else record, "test")
  status, text = check(copy, capsys)
  assert status == 1 and "patient is in two splits (1)" in text


def test_record_in_a_held_out_cell(copy, capsys):
  (copy / "holdout.json").write_text(json.dumps({"cells": ["sex=female"]}))
  checksums.write(copy)
  status, text = check(copy, capsys)
  assert status == 1 and "lies in a held-out cell" in text


@pytest.mark.parametrize("content", ['{"cells": ["sex=fem', "[]", "{}", '{"cells": ["sex=other"]}', '{"cells": [1]}'])
def test_damaged_holdout(copy, capsys, content):
  (copy / "holdout.json").write_text(content)
  checksums.write(copy)
  status, text = check(copy, capsys)
  assert status == 1 and "holdout.json: cannot be read (" in text


def test_moments_of_a_latent_set():
  values = np.linspace(-30, 30, 2 * 2 * 8).astype(ml_dtypes.bfloat16)
  record = {"key": "k", "patient": "p", "attributes": {"age": 3.0, "sex": -1}, "findings": "{}", "factors": "{}"}

  def found(moments):
    return list(verify._record_problems({**record, "moments": moments.tobytes()}, SCHEMA, set(), 32))

  assert found(values) == []
  for bad in (np.nan, np.inf, -np.inf):
    assert found(np.where(np.arange(32) == 7, bad, values).astype(ml_dtypes.bfloat16))
  assert found(values[:-1]) and found(values.astype(np.float32))


def test_repeated_images_are_reported(tmp_path, capsys):
  rows = [example(i) for i in range(NUM)]
  rows[5]["image"] = rows[4]["image"]  # the same patient
  rows[20]["image"] = rows[40]["image"] = rows[30]["image"]
  path = write(tmp_path / "set", rows)
  text = capsys.readouterr().out
  assert "3 images repeat an earlier one byte for byte" in text
  with open(path / "duplicates.csv", newline="") as file:
    lines = list(csv.DictReader(file))
  pairs = {frozenset((line["key"], line["same_as"])) for line in lines}
  assert frozenset(("k4", "k5")) in pairs and len(lines) == 3
  groups = {key for pair in pairs for key in pair}
  assert groups == {"k4", "k5", "k20", "k30", "k40"}
  where = {}
  for split in ("train", "val", "test"):
    features = tfds.features.FeaturesDict.from_config(str(path))
    reader = ArrayRecordReader(str(shard(path, split)))
    for data in reader.read(range(reader.num_records())):
      where[features.deserialize_example_np(data)["key"].decode()] = split
  for line in lines:
    assert line["split"] == where[line["key"]]
    assert (line["other_split"] == "yes") == (where[line["key"]] != where[line["same_as"]])
    assert line["other_patient"] == ("no" if line["key"] in ("k4", "k5") else "yes")
  assert "repeat an earlier one" in (path / "README.md").read_text()


def test_card_as_a_page_of_its_own(whole):
  page = (whole / "card.html").read_text()
  assert "<h1>tiny</h1>" in page and "Tiny &lt;b&gt;set&lt;/b&gt;." in page and "<table>" in page
  pictures = re.findall(r'src="data:(image/[a-z+]+);base64,([^"]+)"', page)
  assert [kind for kind, _ in pictures] == ["image/png", "image/svg+xml", "image/svg+xml"]
  assert base64.b64decode(pictures[0][1]) == (whole / "sheet.png").read_bytes()
  assert not re.findall(r'src="(?!data:)', page)
  versions = ("compdiff-jax", "Python", "numpy", "pillow", "array-record")
  assert all(re.search(rf"{name} \d", page) for name in versions)


def titles(path: Path) -> dict[str, str]:
  tree = ElementTree.parse(path)
  texts = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}title")]
  return dict(text.rsplit(": ", 1) for text in texts[1:])


def test_figures_show_the_counts(whole):
  rows = [example(i) for i in range(NUM)]
  ages = np.array([row["attributes"]["age"] for row in rows])
  bars = titles(whole / "histogram-age.svg")
  for span, count in bars.items():
    low, high = map(float, span.split("-"))
    assert int(count) == np.sum((ages >= low) & ((ages < high) | ((high == 100) & (ages == 100)))), span
  assert sum(map(int, bars.values())) == np.isfinite(ages).sum()
  cells = titles(whole / "findings.svg")
  women = [row for row in rows if row["attributes"]["sex"] == 1]
  positive = sum(row["findings"].get("effusion") == "positive" for row in women)
  assert cells["effusion, sex female"] == f"{positive} of {len(women)}"
  for name, low, high in (("0-40", 0, 40), ("40-60", 40, 60)):
    members = [row for row in rows if low <= row["attributes"]["age"] < high]
    positive = sum(row["findings"].get("effusion") == "positive" for row in members)
    assert cells[f"effusion, age {name}"] == f"{positive} of {len(members)}" and positive
