"""`compdiff evaluate` end to end on the sets of discs.py; what it says to bad input: test_evaluate_errors.py."""

import csv
import hashlib
import html.parser
import json

import numpy as np
import pytest
from discs import HELD_OUT, SIDE, encode, read_manifest, run, write_manifest
from PIL import Image

from compdiff_jax import evaluate
from compdiff_jax.data import records
from compdiff_jax.evaluation import alignment, features, image_sets, neighbours, page
from compdiff_jax.evaluation import report as reports
from compdiff_jax.evaluation.phantom_factors import FactorReader


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


def test_report_of_a_good_set(disc_sets, tmp_path, capsys):
  real, synthetic = disc_sets
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
  # Both disc_sets come from one generator: the distance is that of real against real.
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


def test_the_report_names_the_model(disc_sets, synthetic, tmp_path):
  settings = {"checkpoint_step": 8, "model_sha256": "ab" * 32, "sampler": "ddim", "guidance": 2.0, "guidance_parts": ""}
  (synthetic / "job.json").write_text(json.dumps({"settings": settings, "plan": "", "rows": 110}))
  assert run(disc_sets[0], synthetic, tmp_path / "out") == 0
  assert load_report(tmp_path / "out")[0]["inputs"]["synthetic"]["sampling"] == settings
  text = (tmp_path / "out" / "report.html").read_text()
  assert f"checkpoint_step 8, model_sha256 {'ab' * 32}, sampler ddim, guidance 2.0." in text


def test_small_groups_carry_no_number(disc_sets, tmp_path):
  assert run(*disc_sets, tmp_path / "out", "--min_n=40") == 0
  report, _ = load_report(tmp_path / "out")
  held = next(g for g in report["groups"] if g["group"] == HELD_OUT)
  assert held["refusal"].startswith("not evaluable (n=")
  assert held["fidelity"] == {}
  assert HELD_OUT in report["refused"]
  assert HELD_OUT not in report["neighbours"]["below"]
  (copies,) = [r for r in read_table(tmp_path / "out", "copies.csv") if r["group"] == HELD_OUT]
  assert (copies["value"], copies["status"]) == ("", held["refusal"])
  assert "not evaluable (n=" in (tmp_path / "out" / "report.html").read_text()


def test_order_of_the_manifest_changes_nothing(disc_sets, synthetic, tmp_path):
  rows = read_manifest(synthetic)
  write_manifest(synthetic, [rows[i] for i in np.random.default_rng(0).permutation(len(rows))])
  options = ("--max_images=100",)
  assert run(*disc_sets, tmp_path / "one", *options) == 0
  assert run(disc_sets[0], synthetic, tmp_path / "two", *options) == 0
  assert load_report(tmp_path / "one")[0] == load_report(tmp_path / "two")[0]
  for table in ("fidelity.csv", "alignment.csv", "copies.csv"):
    one, two = (tmp_path / name / "tables" / table for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_copies_of_training_images_are_flagged(disc_sets, synthetic, tmp_path):
  rows = read_manifest(synthetic)
  train = image_sets.load(disc_sets[0], "train")
  for i, row in enumerate(rows):
    # Half are copies of training images, half are upside down.
    image = train.images[i % 90] if i % 2 else np.asarray(Image.open(synthetic / row["file"]))[::-1]
    data = encode(np.ascontiguousarray(image))
    (synthetic / row["file"]).write_bytes(data)
    row["sha256"] = hashlib.sha256(data).hexdigest()
  write_manifest(synthetic, rows)
  assert run(disc_sets[0], synthetic, tmp_path / "out") == 0
  report, _ = load_report(tmp_path / "out")
  assert report["neighbours"]["below"]["overall"]["value"] == pytest.approx(0.5, abs=0.05)
  assert report["neighbours"]["control"]["value"] == 1
  assert report["neighbours"]["real"]["count"] == 2  # of 120


def read_table(out, name):
  with open(out / "tables" / name, newline="") as file:
    return list(csv.DictReader(file))


@pytest.mark.parametrize(("cause", "status"), [("leak", "void: 0 of 20 planted"), ("few", "not evaluable (n=60 held")])
def test_a_copy_check_without_a_threshold_publishes_no_share(disc_sets, tmp_path, capsys, monkeypatch, cause, status):
  """In the printed table, the page, the tables and what the model card is made of."""
  whole = neighbours.copy_check

  def check(synthetic, real, train, *rest):
    return whole(synthetic, real[:60] if cause == "few" else np.concatenate([train, train]), train, *rest)

  monkeypatch.setattr(neighbours, "copy_check", check)
  assert run(*disc_sets, tmp_path / "out") == 0
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


def evaluated(disc_sets, **changes):
  real = image_sets.load(disc_sets[0], "test")
  train = image_sets.load(disc_sets[0], "train")
  synthetic = image_sets.load(disc_sets[1])
  for name, values in changes.items():
    synthetic.attributes[name][:] = values
  extractors = [features.extractor("radiomics")]
  return evaluate.evaluate_sets(real, synthetic, train, train, extractors=extractors, reader=DiscReader())


def test_alignment_stands_beside_the_real_figure(disc_sets):
  block = evaluated(disc_sets)["alignment"]
  assert block["status"] == "ok"
  overall = block["groups"][0]["measures"]
  assert overall["sex accuracy"]["synthetic"]["value"] == 1
  assert overall["sex accuracy"]["real"]["value"] == 1
  assert overall["sex accuracy"]["real"]["n"] == 120
  assert overall["age mean absolute error"]["synthetic"]["value"] < 5
  assert overall["age mean absolute error"]["synthetic"]["n"] == 109  # one age is unknown
  held = next(g for g in block["groups"] if g["kind"] == "held-out")
  assert held["measures"]["sex accuracy"]["synthetic"]["value"] == 1


def test_a_generator_that_ignores_sex_is_found(disc_sets):
  asked = np.random.default_rng(0).integers(0, 2, 110)
  overall = evaluated(disc_sets, sex=asked)["alignment"]["groups"][0]["measures"]
  assert overall["sex accuracy"]["real"]["value"] == 1
  assert 0.3 < overall["sex accuracy"]["synthetic"]["value"] < 0.7
  assert overall["sex accuracy"]["synthetic"]["lo"] < 0.5 < overall["sex accuracy"]["synthetic"]["hi"]


def test_a_reader_at_chance_voids_its_attribute(disc_sets, monkeypatch):
  constant = {"sex": lambda n: np.zeros(n, np.int32), "age": lambda n: np.full(n, 30, np.float32)}
  monkeypatch.setattr(DiscReader, "predict", lambda self, x: {k: f(len(x)) for k, f in constant.items()})
  block = evaluated(disc_sets)["alignment"]
  assert block["attributes"]["sex"]["status"].startswith("void")
  assert block["groups"][0]["measures"]["sex accuracy"]["synthetic"] == {"refusal": "void"}
  assert block["groups"][0]["measures"]["all attributes"]["synthetic"] == {"refusal": "void"}


def test_the_size_of_a_data_set_is_that_of_its_first_record(disc_sets, monkeypatch):
  read, numbers = records.RecordSource.read, []
  monkeypatch.setattr(records.RecordSource, "read", lambda self, own: numbers.extend(own) or read(self, own))
  assert image_sets.square_size(disc_sets[0], "test") == SIDE and set(numbers) == {0}


def test_only_the_phantom_has_a_reader():
  assert isinstance(alignment.reader_for("phantom"), FactorReader)
  assert alignment.reader_for("chest") is None


def test_a_failed_block_is_listed_and_the_rest_stands(disc_sets, monkeypatch):
  def fail(self, x):
    raise ValueError("no discs")

  monkeypatch.setattr(DiscReader, "predict", fail)
  results = evaluated(disc_sets)
  assert results["failures"] == [{"block": "alignment", "reason": "ValueError: no discs"}]
  assert results["alignment"]["status"] == "failed"
  assert results["fidelity"]


def test_a_data_set_can_be_the_synthetic_side(disc_sets, tmp_path):
  assert run(disc_sets[0], disc_sets[0], tmp_path / "out", "--synthetic_split=test") == 0
  report, _ = load_report(tmp_path / "out")
  label = report["extractors"][0]["label"]
  assert report["fidelity"][label]["fd"]["value"] == pytest.approx(0, abs=1e-6)
