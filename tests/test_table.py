"""data_prep.table: a CSV with every kind of bad row and bad argument, image preparation, and the real X-rays."""

import csv
import gzip
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compdiff_jax import cli
from compdiff_jax.data import csv_file
from compdiff_jax.data.records import RecordSet, decode_image
from data_prep import dataset, table

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("COMPDIFF_SHARED", ROOT.parent / "shared")) / "data"
CHEST = str(ROOT / "configs/data/chest_xray.py")
COLUMNS = ("image", "patient_id", "sex", "age", "view", "finding", "licence", "url", "clinical_notes")


def row(i: int, **changes) -> dict[str, str]:
  values = (f"{i}.png", f"p{i}", "MF"[i % 2], str(20 + i % 60), "PA", "COVID-19", "CC BY 4.0", "u", "Opacity.")
  return {**dict(zip(COLUMNS, values)), **changes}


@pytest.fixture
def source(tmp_path):
  """A folder with 60 images; `write_csv` beside it makes the table."""
  (tmp_path / "images").mkdir()
  rng = np.random.default_rng(0)
  for i in range(60):
    pixels = rng.integers(0, 256, (20, 30), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"images/{i}.png")
  return tmp_path


def write_csv(path: Path, rows, columns=COLUMNS, delimiter=",", encoding="utf-8") -> None:
  with open(path, "w", newline="", encoding=encoding) as file:
    writer = csv.DictWriter(file, columns, delimiter=delimiter, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)


def run(source, *options, config=CHEST, meta="meta.csv", images="images"):
  argv = ["--csv", str(source / meta), "--images", str(source / images), "--config", config]
  return cli.run(table.main, "table", [*argv, "--out", str(source / "out"), *options])


def stored(path, meta="meta.csv") -> dict[str, dict]:
  """{image file of the table: record}; keys are hashes, so the files are found through the table."""
  opened = RecordSet(path)
  sources = [opened.split(split) for split in opened.splits]
  records = {source[i]["key"]: source[i] for source in sources for i in range(len(source))}
  files = {
    cells[0]: dataset.key_hash(cells[0], f"compdiff-jax/{opened.name}")
    for _, cells in csv_file.iterate_csv(path.parent / meta)[1]
  }
  assert set(records) <= set(files.values())
  return {file: records[key] for file, key in files.items() if key in records}


def error_line(source, capsys, *options, **places) -> str:
  """Runs, expects exit status 2, one line on stderr and no data set; returns the line."""
  capsys.readouterr()
  assert run(source, *options, **places) == 2
  line = capsys.readouterr().err
  assert line.startswith("table: error: ") and line.count("\n") == 1 and line.endswith("\n")
  assert not (source / "out").exists()
  return line


def test_good_table(source):
  rows = [row(i) for i in range(60)]
  rows[0].update(age="", view="todo")
  write_csv(source / "meta.csv", rows)
  assert run(source, "--config.size=16") == 0
  records = stored(source / "out")
  assert len(records) == 60
  first = records["0.png"]["attributes"]
  assert np.isnan(first["age"]) and first["sex"] == 0 and first["view"] == -1
  assert records["1.png"]["attributes"] == {"age": 21, "sex": 1, "view": 0}
  assert records["1.png"]["text"] == "Chest X-ray. COVID-19. Opacity."
  assert records["1.png"]["findings"] == {"COVID-19": "positive"}
  assert decode_image(records["1.png"]["image"]).shape == (16, 16, 3)
  with open(source / "out/attribution.csv") as file:
    licences = {line["key"]: line["licence"] for line in csv.DictReader(file)}
  assert licences == {record["key"]: "CC BY 4.0" for record in records.values()}


# what is wrong -> (changes to one row, reason in rejected.csv)
BAD_ROWS = {
  "missing image": ({"image": "nowhere.png"}, "missing image file"),
  "no image name": ({"image": ""}, "no image file"),
  "truncated image": ({"image": "cut.png"}, "unreadable image"),
  "not an image": ({"image": "text.png"}, "unreadable image"),
  "empty file": ({"image": "empty.png"}, "unreadable image"),
  "unknown value": ({"sex": "X"}, "bad attribute value: sex 'X' is not one of M, F"),
  "unknown value without mapping": ({"view": "oblique"}, "bad attribute value: view 'oblique'"),
  "age as text": ({"age": "old"}, "bad attribute value: age 'old' is not a number"),
  "negative age": ({"age": "-3"}, "bad attribute value: age -3 is outside 18 to 100"),
  "age out of range": ({"age": "140"}, "bad attribute value: age 140 is outside"),
  "infinite age": ({"age": "inf"}, "bad attribute value: age inf is outside"),
  "duplicate key": ({"image": "3.png"}, "duplicate key: 3.png was first seen in row 5"),
  "parent folder": ({"image": "../meta.csv"}, "path outside the image folder"),
  "hidden parent folder": ({"image": "a/../../meta.csv"}, "path outside the image folder"),
  "absolute path": ({"image": "/etc/hostname"}, "path outside the image folder"),
  "no patient": ({"patient_id": " "}, "no patient id"),
}


@pytest.fixture
def damaged(source):
  data = (source / "images/0.png").read_bytes()
  (source / "images/cut.png").write_bytes(data[: len(data) // 2])
  (source / "images/text.png").write_text("no picture")
  (source / "images/empty.png").touch()
  return source


def test_every_bad_row_is_listed_and_the_rest_goes_on(damaged, capsys):
  good = [row(i) for i in range(60)]
  bad = []
  for i, (changes, _) in enumerate(BAD_ROWS.values()):
    Image.new("L", (5, 5)).save(damaged / f"images/b{i}.png")  # each bad row has one fault only
    bad.append({**row(0), "image": f"b{i}.png", "patient_id": f"b{i}", **changes})
  write_csv(damaged / "meta.csv", [*good, *bad])
  assert run(damaged, "--max_rejected", "0.5") == 0
  with open(damaged / "out/rejected.csv") as file:
    rejected = {int(line["row"]): line for line in csv.DictReader(file)}
  assert sorted(rejected) == list(range(62, 62 + len(bad)))
  for number, r, (_, reason) in zip(range(62, 100), bad, BAD_ROWS.values()):
    assert rejected[number]["reason"].startswith(reason), rejected[number]
    assert rejected[number]["file"] == r["image"].strip()
  assert sorted(stored(damaged / "out")) == sorted(r["image"] for r in good)
  assert f"{60 + len(bad)} rows in = 60 written + {len(bad)} rejected" in capsys.readouterr().out


@pytest.mark.parametrize("name", BAD_ROWS)
def test_too_many_bad_rows_stop_the_run(damaged, capsys, name):
  write_csv(damaged / "meta.csv", [*(row(i) for i in range(9)), row(9, **BAD_ROWS[name][0])])
  line = error_line(damaged, capsys)
  assert "of 10 rows rejected" in line and "limit 5.0%" in line and "out.rejected.csv" in line
  assert BAD_ROWS[name][1].split(":")[0] in (damaged / "out.rejected.csv").read_text()


def test_ragged_row_is_rejected(source):
  write_csv(source / "meta.csv", [row(i) for i in range(60)])
  text = (source / "meta.csv").read_text()
  (source / "meta.csv").write_text(text + "59.png,p59,M\n" + "58.png,p58,M,30,PA,x,CC,u,a,b\n")
  assert run(source) == 0
  lines = (source / "out/rejected.csv").read_text().splitlines()
  assert lines[1:] == [
    "59.png,62,wrong number of columns: 3 instead of 9",
    "58.png,63,wrong number of columns: 10 instead of 9",
  ]


@pytest.mark.parametrize(
  ("delimiter", "encoding"), [(";", "utf-8-sig"), ("\t", "utf-8"), (",", "latin-1"), (",", "utf-8-sig")]
)
def test_separators_and_encodings(source, delimiter, encoding):
  rows = [row(i, clinical_notes='Épanchement, left; "small"\nsecond line') for i in range(60)]
  write_csv(source / "meta.csv", rows, delimiter=delimiter, encoding=encoding)
  assert run(source) == 0
  assert stored(source / "out")["5.png"]["text"].endswith('Épanchement, left; "small" second line')


def test_windows_1252_is_read_and_said(source, capsys):
  """Python's codec gives no letter to 0x81; the first byte that is not UTF-8 is the dash in line 3."""
  rows = [row(i, clinical_notes="Opacity – “ground glass”.") for i in range(60)]
  write_csv(source / "meta.csv", rows, encoding="cp1252")
  text = (source / "meta.csv").read_bytes()
  (source / "meta.csv").write_bytes(text.replace(b"\r\n", b"\r\n\r\n", 1).replace(b"ground", b"\x81", 1))
  assert run(source) == 0
  assert "meta.csv is not UTF-8 (byte 0x96 in line 3) and is read as Windows-1252;" in capsys.readouterr().err
  records = stored(source / "out")
  assert records["1.png"]["text"] == "Chest X-ray. COVID-19. Opacity – “ground glass”."
  assert records["0.png"]["text"] == "Chest X-ray. COVID-19. Opacity – “� glass”."


def test_blank_lines_are_counted(source):
  write_csv(source / "meta.csv", [row(i) for i in range(60)])
  lines = (source / "meta.csv").read_text().splitlines()
  (source / "meta.csv").write_text("\n".join([lines[0], "", *lines[1:4], "", "", *lines[4:], "nowhere.png,p1"]))
  assert run(source) == 0
  with open(source / "out/rejected.csv") as file:
    (rejected,) = csv.DictReader(file)
  assert rejected["row"] == str(1 + 60 + 3 + 1)


def test_bad_input_of_the_whole_run(source, capsys):
  write_csv(source / "meta.csv", [row(i) for i in range(60)])
  write_csv(source / "few.csv", [row(0)])
  write_csv(source / "column.csv", [row(0)], columns=("image", "patient", *COLUMNS[2:]))
  write_csv(source / "header.csv", [])
  (source / "empty.csv").touch()
  (source / "binary.csv").write_bytes(b"PK\x03\x04\0\0")
  (source / "twice.csv").write_text("image,image\n1,2\n")
  assert "no column 'patient_id'" in error_line(source, capsys, meta="column.csv")
  assert "did you mean 'patient'" in error_line(source, capsys, meta="column.csv")
  assert "no data rows" in error_line(source, capsys, meta="header.csv")
  assert "no data rows" in error_line(source, capsys, meta="empty.csv")
  assert "not a text table" in error_line(source, capsys, meta="binary.csv")
  assert "'image' occurs twice" in error_line(source, capsys, meta="twice.csv")
  assert "No such file" in error_line(source, capsys, meta="none.csv")
  assert "image folder" in error_line(source, capsys, images="pictures")
  assert "split would be empty" in error_line(source, capsys, meta="few.csv")
  assert "did you mean 'size'" in error_line(source, capsys, "--config.sise=32")
  assert "'pad' or 'crop'" in error_line(source, capsys, "--config.resize=stretch")
  assert "--fractions" in error_line(source, capsys, "--fractions=1,1,1")
  assert "--max_rejected" in error_line(source, capsys, "--max_rejected=7")
  assert "unknown argument '--sise=3'" in error_line(source, capsys, "--sise=3")
  assert "no level 'men'" in error_line(source, capsys, "--holdout=sex=men")
  assert "does not exist" in error_line(source, capsys, config=str(source / "none.py"))


def test_taken_output(source, capsys):
  write_csv(source / "meta.csv", [row(i) for i in range(60)])
  (source / "out").mkdir()
  (source / "out/precious").write_text("data")
  assert run(source) == 2
  assert capsys.readouterr().err.count("\n") == 1
  assert (source / "out/precious").read_text() == "data" and len(list((source / "out").iterdir())) == 1


@pytest.mark.parametrize("bad", ["values", "mapping", "pattern", "field", "key", "nested", "text", "column"])
def test_config_mistakes(source, capsys, bad):
  text = Path(CHEST).read_text()
  change = {
    "values": ('("PA", "AP", "AP Supine")', '("PA", "none")'),
    "mapping": ('"F": "female"', '"F": "femal"'),
    "pattern": (r'(r"\bdiscussion:.*$"', r'(r"\bdiscussion(:.*$"'),
    "field": ('"unit": "year"', '"units": "year"'),
    "key": ('  config.licence = ""\n', ""),
    "nested": ("  config.text.replace = _REPLACE\n", ""),
    "text": ("  return config", "  config.text = None\n  return config"),
    "column": ('"{finding}."', '"{finding}. {}"'),
  }[bad]
  assert change[0] in text
  (source / "config.py").write_text(text.replace(*change))
  write_csv(source / "meta.csv", [row(i) for i in range(60)])
  expected = "no column ''" if bad == "column" else "config."
  assert expected in error_line(source, capsys, config=str(source / "config.py"))


def test_names_and_values_of_any_kind(source):
  """Column names that a format string would read as more than a name, numbers in the mapping and among the unknown."""
  columns = [name.replace("finding", "Finding: All.Labels[0]") for name in COLUMNS]
  rows = [{**row(i, sex=str(i % 2)), "Finding: All.Labels[0]": "{Edema}" if i else "-1"} for i in range(60)]
  write_csv(source / "meta.csv", rows, columns=columns)
  text = Path(CHEST).read_text().replace('{"M": "male", "F": "female"}', '{0: "male", 1: "female"}')
  text = text.replace('("todo",)', '("todo", -1)').replace("{finding}", "{Finding: All.Labels[0]}")
  (source / "config.py").write_text(text.replace('("finding",)', '("Finding: All.Labels[0]",)'))
  assert run(source, config=str(source / "config.py")) == 0
  records = stored(source / "out")
  assert [records[f"{i}.png"]["attributes"]["sex"] for i in range(4)] == [0, 1, 0, 1]
  assert records["0.png"]["text"] == "Chest X-ray. Opacity."
  assert records["1.png"]["text"] == "Chest X-ray. {Edema}. Opacity."


def test_ages_as_people_write_them(source):
  ages = ["058Y", ">89", "90+", "", "155", "204M", "030M"]
  write_csv(source / "meta.csv", [row(i, **({"age": ages[i]} if i < len(ages) else {})) for i in range(60)])
  assert run(source, "--max_rejected", "0.1") == 0
  records = stored(source / "out")
  assert [records[f"{i}.png"]["attributes"]["age"] for i in (0, 1, 2)] == [58, 90, 90]
  assert np.isnan(records["3.png"]["attributes"]["age"]) and len(records) == 57
  with open(source / "out/rejected.csv") as file:
    reasons = {line["file"]: line["reason"] for line in csv.DictReader(file)}
  assert reasons == {
    "4.png": "bad attribute value: age 155 is outside 18 to 100",
    "5.png": "bad attribute value: age 17 is outside 18 to 100",
    "6.png": "bad attribute value: age 2.5 is outside 18 to 100",
  }


def test_gzipped_table(source, capsys):
  write_csv(source / "meta.csv", [row(i) for i in range(60)])
  data = gzip.compress((source / "meta.csv").read_bytes())
  (source / "meta.csv.gz").write_bytes(data)
  assert run(source, meta="meta.csv.gz") == 0
  assert len(stored(source / "out")) == 60
  shutil.rmtree(source / "out")
  damaged = bytearray(data)
  damaged[len(data) // 2] ^= 255
  for content in (data[:-9], data[:20], bytes(damaged)):
    (source / "meta.csv.gz").write_bytes(content)
    assert "damaged gzip file" in error_line(source, capsys, meta="meta.csv.gz")


def test_parquet_table(source, capsys, monkeypatch):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  rows = [row(i, age=20 + i % 60, finding=None if i == 7 else "COVID-19") for i in range(60)]
  rows[4]["age"] = None
  columns = {name: [r[name] for r in rows] for name in COLUMNS}
  parquet.write_table(pyarrow.table(columns), source / "meta.parquet", row_group_size=7)
  write_csv(source / "meta.csv", rows)
  assert run(source, meta="meta.parquet") == 0
  records = stored(source / "out")
  assert len(records) == 60 and np.isnan(records["4.png"]["attributes"]["age"])
  assert records["5.png"]["attributes"]["age"] == 25 and records["7.png"]["findings"] == {}
  shutil.rmtree(source / "out")
  (source / "bad.parquet").write_bytes((source / "meta.parquet").read_bytes()[:200])
  assert "give a Parquet file" in error_line(source, capsys, meta="bad.parquet")
  data = bytearray((source / "meta.parquet").read_bytes())
  data[4:3000] = bytes(2996)  # pages; the description at the end is whole
  (source / "bad.parquet").write_bytes(data)
  assert "bad.parquet is damaged (" in error_line(source, capsys, meta="bad.parquet")
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  assert "pip install pyarrow" in error_line(source, capsys, meta="meta.parquet")


# Written for the test, independently of the config's replacements.
LEAK = re.compile(
  r"\b(\d+[- ]*(years?|yrs?|y)[- ]*old|years of age|(twen|thir|for|fif|six|seven|eigh|nine)ty|elderly|young"
  r"|middle[- ]aged|wom[ae]n|m[ae]n|s?he|his|hers?|him|(fe)?males?|lady|gentleman|boy|girl|breasts?|prostate"
  r"|pregnan\w+|husband|wife|AP|PA|supine|anteroposterior|posteroanterior)\b",
  re.IGNORECASE,
)


@pytest.mark.parametrize(
  "notes",
  [
    "A 72-year-old woman admitted with cough. Nodule.",
    "54 years old male, smoker. Nodule.",
    "A sixty-five-year-old man. Her husband was ill. Nodule.",
    "This middle aged lady in her early forties. Nodule.",
    "63M with fever, aged 63. He was supine: AP view. Nodule.",
    "Elderly patient, 81 y/o. PA film. Nodule.",
  ],
)
def test_text_keeps_no_age_sex_or_view(source, notes):
  write_csv(source / "meta.csv", [row(i, clinical_notes=notes) for i in range(60)])
  assert LEAK.search(notes)
  assert run(source) == 0
  text = stored(source / "out")["0.png"]["text"]
  assert not LEAK.search(text) and not re.search(r"\d\d", text.replace("COVID-19", "")), text
  assert text.startswith("Chest X-ray. COVID-19.") and text.endswith("Nodule.")


def test_text_parts_and_length(source):
  notes = "Presentation: Fever. Imaging Notes: Left effusion. Discussion: a young male patient."
  rows = [row(i, finding="todo", clinical_notes=notes) for i in range(60)]
  rows[1].update(finding="A, B", clinical_notes="")
  rows[2].update(clinical_notes="word " * 100)
  write_csv(source / "meta.csv", rows)
  assert run(source) == 0
  records = stored(source / "out")
  assert records["0.png"]["text"] == "Chest X-ray. Left effusion." and records["0.png"]["findings"] == {}
  assert records["1.png"]["text"] == "Chest X-ray. A, B."
  assert records["1.png"]["findings"] == {"A": "positive", "B": "positive"}
  assert len(records["2.png"]["text"].split()) == 40


needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"real data absent: {SHARED} (set COMPDIFF_SHARED)")


@needs_shared
def test_real_chest_xrays(tmp_path):
  folder = SHARED / "chest_xray"
  assert run(tmp_path, meta=folder / "metadata.csv", images=folder / "images") == 0
  records = stored(tmp_path / "out", folder / "metadata.csv")
  with open(folder / "metadata.csv", newline="", encoding="utf-8-sig") as file:
    rows = {line["image"]: line for line in csv.DictReader(file)}
  assert len(rows) == len(records) == 198
  patients = {}
  for key, line in rows.items():
    attributes = records[key]["attributes"]
    assert attributes["age"] == float(line["age"]) and "MF"[attributes["sex"]] == line["sex"]
    assert ("PA", "AP", "AP Supine")[attributes["view"]] == line["view"]
    assert not LEAK.search(records[key]["text"]), records[key]["text"]
    assert "todo" not in records[key]["text"] and "todo" not in records[key]["findings"]
    patients.setdefault(line["patient_id"], set()).add(records[key]["patient"])
    pixels = decode_image(records[key]["image"]).astype(float)[:, :, 0]
    with Image.open(folder / "images" / key) as image:
      block = np.asarray(image.convert("L"), float).reshape(64, 4, 64, 4).mean((1, 3))
    assert pixels.shape == (64, 64) and np.abs(pixels - block).mean() < 4  # area mean: an independent resize
  assert all(len(hashes) == 1 for hashes in patients.values()) and len(patients) == 111


@needs_shared
def test_real_fundus_photographs_with_a_held_out_combination(tmp_path):
  folder = SHARED / "fundus"
  cell = "eye=left,grade=moderate,maculopathy=present"
  config = str(ROOT / "configs/data/fundus.py")
  assert run(tmp_path, "--holdout", cell, config=config, meta=folder / "metadata.csv", images=folder / "images") == 0
  opened, records = RecordSet(tmp_path / "out"), stored(tmp_path / "out", folder / "metadata.csv")
  assert opened.held_out == (cell,) and len(records) == 300
  with open(folder / "metadata.csv", newline="", encoding="utf-8-sig") as file:
    rows = list(csv.DictReader(file))
  held = {r["patient_id"] for r in rows if r["eye"] == "L" and r["class"].startswith("5 - ")}
  source = opened.split("train")
  train = {source[i]["key"] for i in range(len(source))}
  assert held and not train & {records[r["image"]]["key"] for r in rows if r["patient_id"] in held}
  maculopathy = {r["image"]: records[r["image"]]["attributes"]["maculopathy"] for r in rows}
  for r in rows:
    expected = -1 if "ADED" in r["class"] else int("with mac" in r["class"])
    assert maculopathy[r["image"]] == expected
  assert len({records[r["image"]]["attributes"]["grade"] for r in rows}) == 6
  assert (decode_image(records["0000.png"]["image"]).std(axis=2) > 5).any()  # colour survives
