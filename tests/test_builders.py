"""Builders of public data sets on files of exactly their layout, and what they do with damaged input."""

import csv
import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import prep_layouts
import pytest
import torch
from PIL import Image

from compdiff_jax import cli
from compdiff_jax.data.csv_file import iterate_csv
from compdiff_jax.data.prompts import format_prompt
from compdiff_jax.data.records import RecordSet, decode_image
from data_prep import builder, chexpert, dataset, fairgenmed, mimic_cxr, nih_cxr14, reference_tars
from data_prep.images import ImageOptions

SHARED = Path(os.environ.get("COMPDIFF_SHARED", Path(__file__).parent.parent.parent / "shared")) / "data"


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
  header, rows = iterate_csv(path)
  return header, [cells for _, cells in rows]


def build(module, source, *options) -> int:
  argv = ["--source", str(source), "--out", str(source.parent / "out"), "--size", "16", *map(str, options)]
  return cli.run(module.main, "builder", argv)


def stored(source, files) -> dict[str, dict]:
  """{file: record with its split and decoded attributes}; keys are hashes of the files."""
  opened = RecordSet(source.parent / "out")
  found = {}
  for split in opened.splits:
    records = opened.split(split)
    for i in range(len(records)):
      record = records[i]
      known = {a.name: a.decode(record["attributes"][a.name]) for a in opened.schema}
      found[record["key"]] = {**record, "split": split, "attributes": known}
  keys = {file: dataset.key_hash(file, f"compdiff-jax/{opened.name}") for file in files}
  return {file: found[key] for file, key in keys.items() if key in found}


def check(source, truth, attributes=("age", "sex", "race")) -> dict[str, dict]:
  """Every record is what the layout says, whichever way the builder read it."""
  records = stored(source, truth)
  assert set(records) == set(truth) and sum(RecordSet(source.parent / "out").splits.values()) == len(truth)
  patients = {}
  for file, expected in truth.items():
    record = records[file]
    known = record["attributes"]
    assert float(known["age"]) == expected["age"]
    assert {name: known[name] for name in attributes[1:]} == {name: expected[name] for name in attributes[1:]}
    assert record["text"] == expected["text"] and record["findings"] == expected["findings"]
    assert record["split"] == expected["split"] or expected["split"] in ("any", "train or val")
    if expected["split"] == "train or val":
      assert record["split"] != "test"
    patients.setdefault(record["patient"], set()).add(expected["patient"])
    assert decode_image(record["image"]).shape == (16, 16, 3)
  assert all(len(originals) == 1 for originals in patients.values())
  assert len(patients) == len({row["patient"] for row in truth.values()})
  return records


def test_images_can_be_made_in_another_process(source):
  """What makes images is picklable, and what it gives depends on its argument alone."""
  for name, make in {
    "nih_cxr14": nih_cxr14.NihCxr14,
    "fairgenmed": fairgenmed.FairGenMed,
    "reference_tars": reference_tars.ReferenceTars,
  }.items():
    getattr(prep_layouts, name)(source / name)
    made = make(builder.Options(source / name, ImageOptions(16), official=True, max_words=60, rules=()))
    rows = pickle.loads(pickle.dumps(list(made)))
    encode = pickle.loads(pickle.dumps(made.encode))
    assert len(rows) == len(made) and repr(encode) == repr(made.encode)
    backwards = [encode(row["image"]) for row in rows[::-1]]
    assert backwards[::-1] == [made.encode(row["image"]) for row in rows] and len(set(backwards)) > 10


def error_line(module, source, capsys, *options) -> str:
  capsys.readouterr()
  assert build(module, source, *options) == 2
  line = capsys.readouterr().err
  assert line.startswith("builder: error: ") and line.count("\n") == 1
  assert not (source.parent / "out").exists()
  return line


def rejected(source) -> list[dict[str, str]]:
  with open(source.parent / "out/rejected.csv", newline="") as file:
    return list(csv.DictReader(file))


@pytest.fixture
def source(tmp_path):
  (tmp_path / "source").mkdir()
  return tmp_path / "source"


@pytest.mark.parametrize("layout", ["jpg", "dicom"])
def test_mimic_cxr(source, layout, capsys):
  dicom = layout == "dicom"
  truth = prep_layouts.mimic_cxr(source, dicom=dicom, zipped=dicom, suffix=".csv" if dicom else ".csv.gz")
  assert build(mimic_cxr, source, *(["--labels", "negbio"] if dicom else [])) == 0
  output = capsys.readouterr().out
  assert "48 of 60 images selected (view PA or AP)" in output and "48 rows in = 48 written + 0 rejected" in output
  records = check(source, truth)
  assert RecordSet(source.parent / "out").schema["race"].values == ("white", "black", "asian", "hispanic", "other")
  assert "## Licence\n\nPhysioNet Credentialed" in (source.parent / "out/README.md").read_text()
  assert {"", "other", "white"} <= {record["attributes"]["race"] for record in records.values()}
  # The drawn chest is there. DICOM: MONOCHROME1 (even patients) shows the same numbers inverted.
  for i, file in enumerate(truth):
    drawn = Image.fromarray(prep_layouts.phantom(i // 2)).resize((13, 16), Image.Resampling.BOX)
    found = np.corrcoef(np.ravel(drawn), np.ravel(decode_image(records[file]["image"])[:, 1:14, 0]))[0, 1]
    assert found * (-1 if dicom and i // 2 % 2 == 0 else 1) > 0.9


def test_nothing_stored_names_a_source(source):
  truth = prep_layouts.mimic_cxr(source)
  assert build(mimic_cxr, source) == 0
  forbidden = {row["patient"] for row in truth.values()}
  forbidden |= {part for file in truth for part in file.split("/")[3:]}  # study folders and image names
  for path in (source.parent / "out").iterdir():
    data = path.read_bytes()
    assert not [word for word in forbidden if word.encode() in data], path
  for record in stored(source, truth).values():
    assert "/" not in record["key"] + record["text"] and "Smith" not in record["text"]


def test_mimic_faults(source, capsys):
  truth = prep_layouts.mimic_cxr(source)
  files = list(truth)
  no_image, no_report, empty_report = files[0], files[2], files[4]
  (source / f"{no_image}.jpg").unlink()
  for file in (no_report, empty_report):
    report = source / "mimic-cxr-reports" / f"{os.path.dirname(file)}.txt"
    report.write_text("WET READ: ___\n a 40 year old man.\n") if file == empty_report else report.unlink()
  metadata = source / "mimic-cxr-2.0.0-metadata.csv.gz"
  header, rows = read_csv(metadata)
  lost = next(row for row in rows if row[0] in files[6])
  prep_layouts.write_table(metadata, header, [*(row for row in rows if row != lost), [*lost[:4], "PA", 1]])
  assert build(mimic_cxr, source, "--max_rejected", "0.2") == 0
  reasons = Counter(row["reason"].split(":")[0] for row in rejected(source))
  expected = ["missing image file", "no report", "no text", "wrong number of columns"]
  assert reasons == dict.fromkeys(expected, 1)
  assert "48 rows in = 44 written + 4 rejected" in capsys.readouterr().out
  (where,) = (row for row in rejected(source) if row["reason"].startswith("no report"))
  assert where["file"] == no_report and rows[int(where["row"]) - 2][0] in no_report


def test_mimic_tables_that_cannot_be_read(source, capsys):
  prep_layouts.mimic_cxr(source)
  split = source / "mimic-cxr-2.0.0-split.csv.gz"
  data = split.read_bytes()
  split.write_bytes(data[:-40])
  assert "is a damaged gzip file" in error_line(mimic_cxr, source, capsys)
  split.unlink()
  assert "mimic-cxr-2.0.0-split.csv (or .gz) is not in" in error_line(mimic_cxr, source, capsys)
  split.write_bytes(data)
  assert "no image has the view LL" in error_line(mimic_cxr, source, capsys, "--views", "LL")
  (source / "hosp/patients.csv.gz").rename(source / "patients.csv.gz")
  (source / "hosp/admissions.csv.gz").unlink()
  assert "admissions.csv (or .gz)" in error_line(mimic_cxr, source, capsys)
  assert "is not a folder" in error_line(mimic_cxr, source / "none", capsys)


def test_tables_with_values_that_fit_nowhere_are_named_by_row_not_by_patient(source, capsys):
  prep_layouts.mimic_cxr(source)
  prep_layouts.chexpert(source)
  demographics = ["--demographics", source / "demographics.csv"]
  for module, options, table, column, value, words in (
    (mimic_cxr, [], "hosp/admissions.csv.gz", "race", "MARTIAN", "race 'martian'"),
    (mimic_cxr, [], "hosp/patients.csv.gz", "gender", "X", "sex 'x'"),
    (mimic_cxr, [], "mimic-cxr-2.0.0-split.csv.gz", "split", "dev", "split 'dev'"),
    (chexpert, demographics, "demographics.csv", "PRIMARY_RACE", "Martian", "race 'martian'"),
  ):
    header, rows = read_csv(source / table)
    changed = [list(row) for row in rows]
    changed[4][header.index(column)] = value
    prep_layouts.write_table(source / table, header, changed)
    line = error_line(module, source, capsys, *options)
    assert f"{table}, row 6: {words}" in line and changed[4][0] not in line
    prep_layouts.write_table(source / table, header, [*rows, [rows[2][0], *rows[5][1:]]])
    if "admissions" not in table:
      line = error_line(module, source, capsys, *options)
      assert f"{table}, row {len(rows) + 2}: its {header[0]} is that of row 4, with" in line and rows[2][0] not in line
    prep_layouts.write_table(source / table, header, rows)


def test_options_of_free_text_are_only_where_there_is_some(source, capsys):
  (source / "rules.txt").write_text("effusion => fluid\n")
  options = ("--scrub", source / "rules.txt", "--max_words", "4")
  for module in (nih_cxr14, chexpert, fairgenmed):
    getattr(prep_layouts, module.__name__.rpartition(".")[2])(source)
    assert "--scrub" in error_line(module, source, capsys, *options)
  prep_layouts.reference_tars(source, "fundus")
  assert "fundus samples are worded from labels" in error_line(reference_tars, source, capsys, *options)
  truth = prep_layouts.mimic_cxr(source)
  assert build(mimic_cxr, source, *options) == 0
  texts = {record["text"] for record in stored(source, truth).values()}
  assert texts == {"Small left pleural fluid.", "No acute cardiopulmonary process."}


def test_prepared_table_of_the_reference(source):
  truth = prep_layouts.prepared_csv(source)
  assert build(mimic_cxr, source, "--csv", source / "split_data.csv") == 0
  check(source, truth)
  # The prompt of methods that name demographics is the reference's again; CLIP's tokenizer ignores case.
  opened = RecordSet(source.parent / "out")
  prompts = set()
  for split in opened.splits:
    for record in (opened.split(split)[i] for i in range(opened.splits[split])):
      prompts.add(format_prompt(record["text"], record["attributes"], opened.schema, ("age", "race", "sex")).lower())
  assert prompts == {row["prompt"].lower() for row in truth.values()}


def test_prepared_table_takes_nothing_from_prose(source, capsys):
  truth = prep_layouts.prepared_csv(source)
  header, rows = read_csv(source / "split_data.csv")
  column = {name: i for i, name in enumerate(header)}
  rows[0][column["final_sentence"]] = "Chest film of Jane Doe. Opacity."
  rows[1][column["ethnicity"]] = "Martian"
  rows[2][column["split"]] = "holdout"
  rows[3][column["Edema"]] = "2.0"
  rows[4][column["anchor_age"]] = "155"
  rows[5][column["image"]] = "../outside.jpg"
  rows[6][column["ethnicity"]] = ""
  rows[8][column["image"]] = str(source / rows[8][column["image"]])
  prep_layouts.write_table(source / "split_data.csv", header, rows)
  assert build(mimic_cxr, source, "--csv", source / "split_data.csv", "--max_rejected", "0.2") == 0
  reasons = {int(row["row"]): row["reason"] for row in rejected(source)}
  assert sorted(reasons) == [2, 3, 4, 5, 6, 7] and "Doe" not in str(reasons)
  for number, reason in zip(
    range(2, 8),
    ("bad value: the prompt follows", "bad value: race", "bad split", "bad label", "bad attribute", "path outs"),
  ):
    assert reasons[number].startswith(reason), reasons[number]
  assert stored(source, truth)[list(truth)[6]]["attributes"]["race"] == ""  # the prompt says one, the column does not
  assert "40 rows in = 34 written + 6 rejected" in capsys.readouterr().out


def test_own_splits_that_share_a_patient_are_refused(source, capsys):
  prep_layouts.prepared_csv(source)
  header, rows = read_csv(source / "split_data.csv")
  rows[0][-1], rows[1][-1] = "train", "test"
  prep_layouts.write_table(source / "split_data.csv", header, rows)
  table = source / "split_data.csv"
  assert "1 patients (first: hash" in error_line(mimic_cxr, source, capsys, "--csv", table)
  assert build(mimic_cxr, source, "--csv", table, "--split", "patient", "--fractions", "0.5,0.25,0.25") == 0


@pytest.mark.parametrize("old", [False, True])
def test_nih_cxr14(source, old):
  truth = prep_layouts.nih_cxr14(source, old=old)
  assert build(nih_cxr14, source) == 0
  records = check(source, truth, ("age", "sex", "view"))
  assert records[list(truth)[1]]["text"] == "Cardiomegaly. Effusion."


def test_nih_ages_and_lists(source, capsys):
  prep_layouts.nih_cxr14(source)
  header, rows = read_csv(source / "Data_Entry_2017_v2020.csv")
  for row, age in zip(rows, ("058Y", ">89", "", "155", "003M", "x")):
    row[4] = age
  prep_layouts.write_table(source / "Data_Entry_2017_v2020.csv", header, rows)
  assert build(nih_cxr14, source) == 0
  records = stored(source, [row[0] for row in rows])
  ages = [records[row[0]]["attributes"]["age"] for row in rows if row[0] in records][:4]
  assert ages == ["58", "90", "", "0.25"]
  assert [row["reason"] for row in rejected(source)] == [
    "bad attribute value: age 155 is outside 0 to 100",
    "bad attribute value: age 'x' is not a number",
  ]
  assert "48 rows in = 46 written + 2 rejected" in capsys.readouterr().out


def test_nih_without_lists(source, capsys):
  prep_layouts.nih_cxr14(source)
  (source / "test_list.txt").unlink()
  assert "use --split patient" in error_line(nih_cxr14, source, capsys)
  assert build(nih_cxr14, source, "--split", "patient") == 0


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"real data absent: {SHARED} (set COMPDIFF_SHARED)")
def test_nih_rows_as_published(source):
  header, rows = read_csv(SHARED / "nih_metadata.csv.gz")
  sizes = ["OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]"]
  assert header == [*nih_cxr14._COLUMNS[:2], "Follow-up #", *nih_cxr14._COLUMNS[2:], *sizes]
  assert len(rows) == 112_120 and {label for row in rows for label in row[1].split("|")} == set(nih_cxr14.LABELS)
  chosen = rows[:: len(rows) // 60]
  truth = prep_layouts.nih_cxr14(source, rows=chosen)
  assert build(nih_cxr14, source, "--fractions", "0.5,0.4,0.1") == 0
  check(source, truth, ("age", "sex", "view"))


def test_chexpert(source):
  truth = prep_layouts.chexpert(source)
  assert build(chexpert, source, "--demographics", source / "demographics.csv") == 0
  records = stored(source, truth)
  for file, record in records.items():  # the order of the labels differs from MIMIC's, so texts are compared as sets
    record["text"] = {f"{name}." for name in record["text"].removesuffix(".").split(". ")} - {"."}
    known, expected = record["attributes"], truth[file]
    assert (float(known["age"]), known["sex"], known["race"]) == tuple(expected[n] for n in ("age", "sex", "race"))
    assert record["text"] == expected["text"] and record["findings"] == expected["findings"]
    assert expected["split"] == "any" or record["split"] == "val"
  assert set(records) == set(truth)


@pytest.mark.parametrize("gzipped", [["train"], ["valid"], ["train", "valid"]])
def test_chexpert_with_gzipped_tables(source, gzipped):
  truth = prep_layouts.chexpert(source)
  for name in gzipped:
    path = source / "CheXpert-v1.0-small" / f"{name}.csv"
    path.with_name(f"{name}.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
  assert build(chexpert, source) == 0
  records = stored(source, truth)
  assert set(records) == set(truth)
  assert {row["split"] for file, row in records.items() if "/valid/" in file} == {"val"}


def test_chexpert_without_demographics_has_no_race(source):
  truth = prep_layouts.chexpert(source)
  home = source / "CheXpert-v1.0-small"
  argv = ["--source", str(home), "--out", str(source.parent / "out"), "--size", "16"]
  assert cli.run(chexpert.main, "builder", argv) == 0
  assert RecordSet(source.parent / "out").schema.names == ("age", "sex")
  assert set(stored(source, truth)) == set(truth)


@pytest.mark.parametrize("lower", [False, True])
def test_fairgenmed(source, lower):
  truth = prep_layouts.fairgenmed(source, lower=lower)
  assert build(fairgenmed, source) == 0
  records = check(source, truth)
  assert RecordSet(source.parent / "out").schema["race"].values == ("white", "black", "asian")
  for file, record in records.items():  # transposed or not, float or not: the colours are where they belong
    image = truth[file]["image"].astype(float)
    image = (image - image.min()) / np.ptp(image) * 255
    inside = decode_image(record["image"])[:, 1:14].astype(float).mean((0, 1))  # 24x20 becomes 16x13
    np.testing.assert_allclose(inside, image.mean((0, 1)), atol=8)


def test_fairgenmed_faults(source, capsys):
  truth = prep_layouts.fairgenmed(source)
  files = [source / "Training" / file for file, row in truth.items() if row["split"] == "train"][:6]
  huge = np.lib.format.header_data_from_array_1_0(np.zeros([1], np.uint8)) | {"shape": (10**6, 10**6, 3)}
  files[0].write_bytes(files[0].read_bytes()[:300])
  np.savez(files[1], slo_fundus=np.array([{"a": 1}], dtype=object))
  np.savez(files[2], other=np.zeros([4, 4, 3]))
  np.savez(files[3], slo_fundus=np.zeros([3, 8, 3]))
  np.savez(files[4], slo_fundus=np.full([4, 4, 3], np.nan))
  header = io.BytesIO()
  np.lib.format.write_array_header_1_0(header, huge)
  with zipfile.ZipFile(files[5], "w") as archive:
    archive.writestr("slo_fundus.npy", header.getvalue() + b"\0" * 100)
  assert build(fairgenmed, source, "--max_rejected", "0.2") == 0
  reasons = {row["file"]: row["reason"] for row in rejected(source)}
  expected = ["unreadable image", "unreadable image: slo_fundus holds object", 'unreadable image: "There is no item']
  expected += [
    "bad image shape: (3, 8, 3)",
    "unreadable image: it is empty or",
    "image too large: 3000000000000 pixels",
  ]
  for path, reason in zip(files, expected):
    assert reasons[path.name].startswith(reason), reasons[path.name]
  assert "40 rows in = 34 written + 6 rejected" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["chest", "fundus"])
def test_reference_tars(source, kind):
  truth = prep_layouts.reference_tars(source, kind)
  assert build(reference_tars, source) == 0
  records = check(source, truth)
  races = RecordSet(source.parent / "out").schema["race"].values
  assert races == (("white", "black", "asian", "hispanic", "other") if kind == "chest" else ("white", "black", "asian"))
  for file, record in records.items():
    image = truth[file]["image"] * 255.0
    expected = np.broadcast_to(image.mean((-1, -2)), 3)
    np.testing.assert_allclose(decode_image(record["image"])[:, 1:14].mean((0, 1)), expected, atol=8)


def test_reference_tars_faults(source, capsys):
  class Harm:
    def __reduce__(self):
      return os.mkdir, (str(source / "ran"),)

  prep_layouts.reference_tars(source)
  metadata = {"disease_labels": [-1.0] * 14, "subject_id": "9", "age": None, "sex": None, "race": None}
  with tarfile.open(source / "training_data/train_10.tar", "w") as tar:
    for i, (image, prompt, values) in enumerate((
      (pickle.dumps(torch.zeros(8, 8)), "61 year old Asian female. Edema.", metadata),
      (pickle.dumps(Harm()), "61 year old Asian female. Edema.", metadata),
      (pickle.dumps(torch.zeros(8)), "61 year old Asian female. Edema.", metadata),
      (pickle.dumps(torch.full([8, 8], 2.0)), "61 year old Asian female. Edema.", metadata),
      (pickle.dumps(torch.zeros(8, 8)), "An old man. Edema.", metadata),
      (pickle.dumps(torch.zeros(8, 8)), "61 year old Asian female. Edema.", {}),
    )):  # fmt: skip
      prep_layouts.add_member(tar, f"{i}.pt_image", image)
      prep_layouts.add_member(tar, f"{i}.prompt_metadata", prompt.encode())
      prep_layouts.add_member(tar, f"{i}.validation_metadata", json.dumps(values).encode())
    prep_layouts.add_member(tar, "6.prompt_metadata", b"61 year old Asian female. Edema.")
  whole = (source / "val_data/val_1.tar").read_bytes()
  (source / "val_data/val_1.tar").write_bytes(whole[:13_000])  # inside the third sample
  assert build(reference_tars, source, "--max_rejected", "0.5") == 0
  assert not (source / "ran").exists()
  reasons = {row["file"]: row["reason"] for row in rejected(source)}
  home = "training_data/train_10.tar::"
  for key, reason in enumerate(
    (
      "refused pickle: it asks for",
      "bad image shape",
      "bad image values",
      "bad value: the prompt",
      "bad metadata",
      "incomp",
    ),
    start=1,
  ):
    assert reasons.pop(f"{home}{key}").startswith(reason)
  assert len(reasons) == 2 and all("val_1.tar" in file for file in reasons)  # four promised, two left
  record = stored(source, [f"{home}0"])[f"{home}0"]
  assert record["attributes"] == {"age": "61", "sex": "female", "race": "asian"} and record["findings"] == {}
  assert "31 rows in = 23 written + 8 rejected" in capsys.readouterr().out
