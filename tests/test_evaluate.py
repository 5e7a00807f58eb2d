"""`compdiff evaluate` end to end on sets this file draws, and what it says to bad input."""

import csv
import hashlib
import html.parser
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from compdiff_jax import cli, evaluate
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.data import records
from compdiff_jax.evaluation import alignment, features, image_sets, neighbours, page
from compdiff_jax.evaluation import report as reports
from compdiff_jax.evaluation.phantom_factors import FactorReader

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


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
  root = tmp_path_factory.mktemp("sets")
  return write_real(root / "real"), write_synthetic(root / "synthetic")


@pytest.fixture
def synthetic(sets, tmp_path):
  """A copy that a test may damage."""
  return shutil.copytree(sets[1], tmp_path / "synthetic")


def run(real, synthetic, out, *options):
  argv = [f"--real={real}", f"--synthetic={synthetic}", f"--out={out}", "--extractors=radiomics", *options]
  return cli.run(evaluate.main, "compdiff evaluate", argv)


def load_report(out):
  report = json.loads((out / "report.json").read_text())
  run_block = report.pop("run")
  return report, run_block


class Links(html.parser.HTMLParser):
  """Collects everything a browser would fetch, and scripts."""

  def __init__(self):
    super().__init__()
    self.fetched, self.scripts, self.pictures = [], 0, 0

  def handle_starttag(self, tag, attrs):
    self.scripts += tag == "script"
    for name, value in attrs:
      if name in ("src", "href", "srcset", "data"):
        self.pictures += value.startswith("data:image/png;base64,")
        self.fetched += [] if value.startswith("data:") else [value]


def test_report_of_a_good_set(sets, tmp_path, capsys):
  real, synthetic = sets
  picture = tmp_path / "reconstructions.png"
  Image.new("RGB", (64, 32)).save(picture)
  out = tmp_path / "report"
  options = ("--extractors=radiomics,random-conv", f"--vae_reconstructions={picture}")
  assert run(real, synthetic, out, *options) == 0
  printed = capsys.readouterr().out
  assert "KID [radiomics-v1]" in printed
  assert f"report: {out / 'report.html'}" in printed

  report, run_block = load_report(out)
  assert "compdiff evaluate --real=" in run_block["command"]
  assert report["failures"] == []
  assert report["inputs"]["synthetic"]["unknown"] == {"age": 1, "sex": 0}
  assert report["inputs"]["real"]["patients"] == 60
  assert report["inputs"]["held_out"] == [HELD_OUT]
  assert report["inputs"]["synthetic"]["sampling"] == {}
  assert [e["name"] for e in report["extractors"]] == ["radiomics-v1", "random-conv4-256-seed0"]

  label = report["extractors"][0]["label"]
  groups = {g["group"]: g for g in report["groups"]}
  held = groups[HELD_OUT]
  assert (held["held_out"], held["n_train"]) == ("pair-unseen", 0)  # with two attributes the pair is the cell
  assert "held-out (pair-unseen)" in groups
  overall = groups["overall"]["fidelity"][label]
  assert overall["kid"]["lo"] < overall["kid"]["value"] < overall["kid"]["hi"]
  # Both sets come from one generator: the distance is that of real against real.
  assert overall["kid"]["share_inside_null"] > 0.8
  # The interval of real against real is at n*, and so is what stands beside it.
  matched = overall["kid"]["matched"]
  row = report["headline"][0]
  assert (row["group"], row["value"]) == ("overall", overall["kid"]["value"])
  at_n = f"real vs real (overall) at n={matched['n']}, where synthetic has {page.number(matched['mean'])}, "
  assert row["reference_name"].startswith(at_n) and at_n in printed
  assert overall["fd"]["n"] == 120
  assert overall["fd"]["m"] == 110
  assert report["alignment"]["status"] == "absent"
  assert report["neighbours"]["n_train"] == 90
  assert len(report["neighbours"]["pairs"]) == 8

  with open(out / "tables" / "fidelity.csv", newline="") as file:
    rows = [r for r in csv.DictReader(file) if r["metric"] == "kid" and r["extractor"] == label]
  assert {r["group"] for r in rows} == set(groups)
  (row,) = [r for r in rows if r["group"] == "overall"]
  assert float(row["value"]) == overall["kid"]["value"]

  text = (out / "report.html").read_text()
  links = Links()
  links.feed(text)
  assert links.fetched == []
  assert links.scripts == 0
  assert links.pictures >= 16 * 2 + 2 + 8 * 2
  assert "A &lt;disc&gt;." in text
  assert "A <disc>." not in text
  assert "This file holds real images of discs" in text.partition("<h2>")[0]
  assert "Every intersection" in text
  assert "reconstructions below" in text


def test_the_printed_table_says_why_a_value_does_not_rank():
  row = {"measure": "FD [x]", "group": "overall", "value": 9.13, "status": "rank deficient (d=59)"}
  blocks = dict.fromkeys(("warnings", "failures", "refused"), ())
  printed = reports.printed_table({"extractors": [{"label": "x"}], "headline": [row], **blocks})
  assert "9.13, rank deficient (d=59)" in printed


def test_the_report_names_the_model(sets, synthetic, tmp_path):
  settings = {"checkpoint_step": 8, "model_sha256": "ab" * 32, "sampler": "ddim", "guidance": 2.0, "guidance_parts": ""}
  (synthetic / "job.json").write_text(json.dumps({"settings": settings, "plan": "", "rows": 110}))
  assert run(sets[0], synthetic, tmp_path / "out") == 0
  assert load_report(tmp_path / "out")[0]["inputs"]["synthetic"]["sampling"] == settings
  text = (tmp_path / "out" / "report.html").read_text()
  assert f"checkpoint_step 8, model_sha256 {'ab' * 32}, sampler ddim, guidance 2.0." in text


def test_small_groups_carry_no_number(sets, tmp_path):
  assert run(*sets, tmp_path / "out", "--min_n=40") == 0
  report, _ = load_report(tmp_path / "out")
  held = next(g for g in report["groups"] if g["group"] == HELD_OUT)
  assert held["refusal"].startswith("not evaluable (n=")
  assert held["fidelity"] == {}
  assert HELD_OUT in report["refused"]
  assert HELD_OUT not in report["neighbours"]["below"]
  (copies,) = [r for r in read_table(tmp_path / "out", "copies.csv") if r["group"] == HELD_OUT]
  assert (copies["value"], copies["status"]) == ("", held["refusal"])
  assert "not evaluable (n=" in (tmp_path / "out" / "report.html").read_text()


def test_order_of_the_manifest_changes_nothing(sets, synthetic, tmp_path):
  rows = read_manifest(synthetic)
  write_manifest(synthetic, [rows[i] for i in np.random.default_rng(0).permutation(len(rows))])
  options = ("--max_images=100",)
  assert run(*sets, tmp_path / "one", *options) == 0
  assert run(sets[0], synthetic, tmp_path / "two", *options) == 0
  assert load_report(tmp_path / "one")[0] == load_report(tmp_path / "two")[0]
  for table in ("fidelity.csv", "alignment.csv", "copies.csv"):
    one, two = (tmp_path / name / "tables" / table for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_copies_of_training_images_are_flagged(sets, synthetic, tmp_path):
  rows = read_manifest(synthetic)
  train = image_sets.load(sets[0], "train")
  for i, row in enumerate(rows):
    # Half are copies of training images, half are upside down.
    image = train.images[i % 90] if i % 2 else np.asarray(Image.open(synthetic / row["file"]))[::-1]
    data = encode(np.ascontiguousarray(image))
    (synthetic / row["file"]).write_bytes(data)
    row["sha256"] = hashlib.sha256(data).hexdigest()
  write_manifest(synthetic, rows)
  assert run(sets[0], synthetic, tmp_path / "out") == 0
  report, _ = load_report(tmp_path / "out")
  assert report["neighbours"]["below"]["overall"]["value"] == pytest.approx(0.5, abs=0.05)
  assert report["neighbours"]["control"]["value"] == 1
  assert report["neighbours"]["real"]["count"] == 2  # of 120


def read_table(out, name):
  with open(out / "tables" / name, newline="") as file:
    return list(csv.DictReader(file))


@pytest.mark.parametrize(("cause", "status"), [("leak", "void: 0 of 20 planted"), ("few", "not evaluable (n=60 held")])
def test_a_copy_check_without_a_threshold_publishes_no_share(sets, tmp_path, capsys, monkeypatch, cause, status):
  """In the printed table, the page, the tables and what the model card is made of."""
  whole = neighbours.copy_check

  def check(synthetic, real, train, *rest):
    return whole(synthetic, real[:60] if cause == "few" else np.concatenate([train, train]), train, *rest)

  monkeypatch.setattr(neighbours, "copy_check", check)
  assert run(*sets, tmp_path / "out") == 0
  report, _ = load_report(tmp_path / "out")
  rows = [row for row in report["headline"] if row["measure"] == "share below the 1 % copy distance"]
  assert {row["group"] for row in rows} == {"overall", "held-out (pair-unseen)"}
  assert all(row["status"].startswith(status) and "value" not in row for row in rows)
  assert any(warning.startswith(f"copy check: {status}") for warning in report["warnings"])
  assert status in capsys.readouterr().out
  text = (tmp_path / "out" / "report.html").read_text()
  assert status in text.partition("<h2>Nearest training images</h2>")[2]
  assert ("Most similar pairs" in text) == (cause == "few")
  shares = [row for row in read_table(tmp_path / "out", "copies.csv") if row["metric"].startswith("share")]
  assert shares and all(row["value"] == "" and row["status"].startswith(status) for row in shares)


class DiscReader:
  """Reads the discs exactly as they were drawn."""

  def fit(self, images, attributes, schema):
    assert len(images) == len(attributes["sex"])
    return self

  def predict(self, images):
    grey = images.mean(-1)
    left, right = grey[:, 12:20, 6:12].mean((1, 2)), grey[:, 12:20, 20:26].mean((1, 2))
    age = np.clip((np.maximum(left, right) - 60) / 1.2, 0, 100).astype(np.float32)
    return {"sex": (left > right).astype(np.int32), "age": age}


def evaluated(sets, **changes):
  real = image_sets.load(sets[0], "test")
  train = image_sets.load(sets[0], "train")
  synthetic = image_sets.load(sets[1])
  for name, values in changes.items():
    synthetic.attributes[name][:] = values
  extractors = [features.extractor("radiomics")]
  return evaluate.evaluate_sets(real, synthetic, train, train, extractors=extractors, reader=DiscReader())


def test_alignment_stands_beside_the_real_figure(sets):
  block = evaluated(sets)["alignment"]
  assert block["status"] == "ok"
  overall = block["groups"][0]["measures"]
  assert overall["sex accuracy"]["synthetic"]["value"] == 1
  assert overall["sex accuracy"]["real"]["value"] == 1
  assert overall["sex accuracy"]["real"]["n"] == 120
  assert overall["age mean absolute error"]["synthetic"]["value"] < 5
  assert overall["age mean absolute error"]["synthetic"]["n"] == 109  # one age is unknown
  held = next(g for g in block["groups"] if g["kind"] == "held-out")
  assert held["measures"]["sex accuracy"]["synthetic"]["value"] == 1


def test_a_generator_that_ignores_sex_is_found(sets):
  asked = np.random.default_rng(0).integers(0, 2, 110)
  overall = evaluated(sets, sex=asked)["alignment"]["groups"][0]["measures"]
  assert overall["sex accuracy"]["real"]["value"] == 1
  assert 0.3 < overall["sex accuracy"]["synthetic"]["value"] < 0.7
  assert overall["sex accuracy"]["synthetic"]["lo"] < 0.5 < overall["sex accuracy"]["synthetic"]["hi"]


def test_a_reader_at_chance_voids_its_attribute(sets, monkeypatch):
  constant = {"sex": lambda n: np.zeros(n, np.int32), "age": lambda n: np.full(n, 30, np.float32)}
  monkeypatch.setattr(DiscReader, "predict", lambda self, x: {k: f(len(x)) for k, f in constant.items()})
  block = evaluated(sets)["alignment"]
  assert block["attributes"]["sex"]["status"].startswith("void")
  assert block["groups"][0]["measures"]["sex accuracy"]["synthetic"] == {"refusal": "void"}
  assert block["groups"][0]["measures"]["all attributes"]["synthetic"] == {"refusal": "void"}


def test_the_size_of_a_data_set_is_that_of_its_first_record(sets, monkeypatch):
  read, numbers = records.RecordSource.read, []
  monkeypatch.setattr(records.RecordSource, "read", lambda self, own: numbers.extend(own) or read(self, own))
  assert image_sets.square_size(sets[0], "test") == SIDE and set(numbers) == {0}


def test_only_the_phantom_has_a_reader():
  assert isinstance(alignment.reader_for("phantom"), FactorReader)
  assert alignment.reader_for("chest") is None


def test_a_failed_block_is_listed_and_the_rest_stands(sets, monkeypatch):
  def fail(self, x):
    raise ValueError("no discs")

  monkeypatch.setattr(DiscReader, "predict", fail)
  results = evaluated(sets)
  assert results["failures"] == [{"block": "alignment", "reason": "ValueError: no discs"}]
  assert results["alignment"]["status"] == "failed"
  assert results["fidelity"]


def test_a_data_set_can_be_the_synthetic_side(sets, tmp_path):
  assert run(sets[0], sets[0], tmp_path / "out", "--synthetic_split=test") == 0
  report, _ = load_report(tmp_path / "out")
  label = report["extractors"][0]["label"]
  assert report["fidelity"][label]["fd"]["value"] == pytest.approx(0, abs=1e-6)


# ---- Bad input: exit status 2, one line, nothing written


def refused(capsys, out, status):
  """The one line on stderr; nothing may be left of the output."""
  error = capsys.readouterr().err.strip()
  assert status == 2, error
  assert error.count("\n") == 0
  assert error.startswith("compdiff evaluate: error: ")
  assert not out.exists()
  assert not list(out.parent.glob(f".{out.name}.partial-*"))
  return error


def change_row(synthetic, index, **values):
  rows = read_manifest(synthetic)
  rows[index].update(values)
  write_manifest(synthetic, rows)


def damage_missing(synthetic):
  (synthetic / "005.png").unlink()


def damage_altered(synthetic):
  (synthetic / "005.png").write_bytes((synthetic / "006.png").read_bytes())


def damage_truncated(synthetic):
  data = (synthetic / "005.png").read_bytes()[:200]
  (synthetic / "005.png").write_bytes(data)
  change_row(synthetic, 5, sha256=hashlib.sha256(data).hexdigest())


def damage_column(synthetic):
  rows = read_manifest(synthetic)
  write_manifest(synthetic, [{k: v for k, v in row.items() if k != "sex"} for row in rows])


def damage_value(synthetic):
  change_row(synthetic, 5, sex="woman")


def damage_age(synthetic):
  change_row(synthetic, 5, age="-3")


def damage_twice(synthetic):
  change_row(synthetic, 6, file="005.png")


def damage_empty(synthetic):
  manifest = synthetic / "manifest.csv"
  manifest.write_text(manifest.read_text().splitlines()[0] + "\n")


def damage_unfinished(synthetic):
  (synthetic / "job.json").write_text(json.dumps({"rows": 500}))


def damage_schema(synthetic):
  data = json.loads((synthetic / "schema.json").read_text())
  data[0]["bins"] = [30]
  (synthetic / "schema.json").write_text(json.dumps(data))


def damage_grid(synthetic):
  (synthetic / "grid.png").write_bytes(b"no picture")


@pytest.mark.parametrize(
  ("damage", "words"),
  [
    (damage_missing, ("005.png is missing", "manifest.csv row 7")),
    (damage_altered, ("005.png was altered", "manifest.csv row 7")),
    (damage_truncated, ("005.png", "cannot be read")),
    (damage_column, ("manifest.csv has no column 'sex'",)),
    (damage_value, ("manifest.csv row 7", "sex 'woman' is not one of male, female")),
    (damage_age, ("manifest.csv row 7", "age -3 is outside 0 to 100")),
    (damage_twice, ("manifest.csv row 8", "005.png is listed twice, first in row 7")),
    (damage_empty, ("lists no image",)),
    (damage_unfinished, ("holds 110 of 500 planned images",)),
    (damage_schema, ("attribute 'age' is defined differently",)),
    (damage_grid, ("grid.png is not a readable picture",)),
  ],
)
def test_bad_synthetic_set(sets, synthetic, tmp_path, capsys, damage, words):
  damage(synthetic)
  error = refused(capsys, tmp_path / "out", run(sets[0], synthetic, tmp_path / "out"))
  assert all(word in error for word in words), error


@pytest.mark.parametrize(
  ("option", "words"),
  [
    ("--real_split=tset", "has no split 'tset'; did you mean 'test'?"),
    ("--real_split=train", "are both 'train'"),
    ("--extractors=radiomic", "unknown extractor 'radiomic'; did you mean 'radiomics'?"),
    ("--min_n=2", "must be at least 4"),
    ("--size=8", "must be at least 16"),
    ("--max_images=3", "must be at least --min_n"),
    ("--seed=-1", "--seed -1 must not be negative"),
    ("--vae_reconstructions=none.png", "none.png is not a readable picture"),
    ("--seeds=3", "unrecognized arguments: --seeds=3"),
  ],
)
def test_bad_option(sets, tmp_path, capsys, option, words):
  assert words in refused(capsys, tmp_path / "out", run(*sets, tmp_path / "out", option))


def test_output_that_is_taken_is_left_alone(sets, tmp_path, capsys):
  out = tmp_path / "out"
  out.mkdir()
  (out / "note.txt").write_text("mine")
  assert run(*sets, out) == 2
  assert "is not empty" in capsys.readouterr().err
  assert [file.name for file in out.iterdir()] == ["note.txt"]


def test_directories_of_the_wrong_kind(sets, tmp_path, capsys):
  error = refused(capsys, tmp_path / "out", run(sets[1], sets[1], tmp_path / "out"))
  assert "is not a prepared data set" in error
  empty = tmp_path / "empty"
  empty.mkdir()
  error = refused(capsys, tmp_path / "out", run(sets[0], empty, tmp_path / "out"))
  assert "holds neither manifest.csv nor dataset_info.json" in error


def test_a_patient_in_two_splits_is_refused(sets, tmp_path, capsys):
  real = write_real(tmp_path / "real", shared_patient=True)
  error = refused(capsys, tmp_path / "out", run(real, sets[1], tmp_path / "out"))
  assert "patient p is in the splits 'train' and 'val'" in error
