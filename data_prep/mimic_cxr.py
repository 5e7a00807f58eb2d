"""MIMIC-CXR as PhysioNet distributes it: `python -m data_prep.mimic_cxr --source DIR --out DIR --help`.

DIR holds, gzipped or not,

  mimic-cxr-2.0.0-metadata.csv, -split.csv, -chexpert.csv or -negbio.csv            from MIMIC-CXR-JPG
  files/p10/p10000032/s50414267/<dicom_id>.jpg or .dcm                              from MIMIC-CXR-JPG or MIMIC-CXR
  mimic-cxr-reports/files/p10/p10000032/s50414267.txt, files/..., or the zip file   from MIMIC-CXR
  hosp/patients.csv, hosp/admissions.csv                                            from MIMIC-IV, or --mimic_iv

With --csv FILE it reads the prepared table of the CompDiff reference instead (method E.1): study_id, subject_id,
gender, anchor_age, ethnicity, the fourteen labels, image, final_sentence, split.
"""

import functools
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compdiff_jax import cli
from compdiff_jax.cli import InputError
from data_prep import builder
from data_prep.demographics import age_at, agreed_race, encode, parse_race, parse_sex, recorded_races
from data_prep.images import FolderImages
from data_prep.prompts import split_prompt
from data_prep.reports import impression
from data_prep.rows import RowError
from data_prep.schemas import CHEST_RACES, CHEXPERT_LABELS, demographic_schema
from data_prep.tables import TableRow, find_table, known, read_lookup, read_rows

_PROG = "python -m data_prep.mimic_cxr"
_RELEASE = "mimic-cxr-2.0.0"
_SPLITS = {"train": "train", "validate": "val", "val": "val", "test": "test"}
_LICENCE = (
  "PhysioNet Credentialed Health Data License 1.5.0: its data use agreement holds for the images, this data set and"
  " what is trained from it."
)


class MimicCxr:
  """The official layout: metadata, split and label tables, report texts, demographics of MIMIC-IV."""

  name = "mimic_cxr"
  description = "Chest radiographs of MIMIC-CXR with the impression of their report."
  licence = _LICENCE

  def __init__(self, options: builder.Options, mimic_iv: Path | None, views: tuple[str, ...], labels: str):
    self._options = options
    source = options.source
    find = functools.partial(find_table, [source])
    self._splits = _read_splits(find([f"{_RELEASE}-split.csv"]))
    self._labels = read_lookup(find([f"{_RELEASE}-{labels}.csv"]), "study_id", CHEXPERT_LABELS)
    columns = ("dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate")
    table = list(read_rows(find([f"{_RELEASE}-metadata.csv"]), columns))
    self._rows = [row for row in table if row.fault or not views or row.values["ViewPosition"] in views]
    self.selected = f"{len(self._rows)} of {len(table)} images selected (view {' or '.join(views) or 'any'})."
    if not self._rows:
      raise InputError(f"no image has the view {' or '.join(views)}; change --views")
    self._people = _people(mimic_iv or source, {row.values["subject_id"] for row in self._rows})
    self._reports = _Reports(source)
    self.schema = demographic_schema(CHEST_RACES, {race for *_, race in self._people.values()})
    self.encode = FolderImages(str(source), options.images)

  def __len__(self) -> int:
    return len(self._rows)

  def __iter__(self) -> Iterator[dict[str, Any]]:
    def table():
      for row in self._rows:
        folder = _study_folder(row.values["subject_id"], row.values["study_id"])
        yield f"{folder}/{row.values['dicom_id']}", row.number, functools.partial(self._row, row, folder)

    return builder.rows(table())

  def _row(self, row: TableRow, folder: str) -> dict[str, Any]:
    if row.fault:
      raise RowError(row.fault)
    values = row.values
    subject, study, dicom = (values[name] for name in ("subject_id", "study_id", "dicom_id"))
    if not (subject.isdigit() and study.isdigit() and re.fullmatch(r"[\w-]+", dicom)):
      raise RowError(f"bad id: {folder}/{dicom} is no place in MIMIC-CXR")
    if dicom not in self._splits:
      raise RowError(f"no split: {dicom} is not in {_RELEASE}-split.csv")
    text = self._options.text(self._reports.impression(folder))
    if not text:
      raise RowError("no text: the report has neither an impression nor findings")
    return {
      "image": tuple(f"{folder}/{dicom}{suffix}" for suffix in (".jpg", ".dcm", ".png")),
      "patient": subject,
      "text": text,
      "attributes": self._attributes(subject, values["StudyDate"]),
      "findings": builder.chexpert_findings(self._labels[study].values) if study in self._labels else {},
      **self._options.splits(self._splits[dicom]),
    }

  def _attributes(self, subject: str, study_date: str) -> dict[str, int | float]:
    age, year, sex, race = self._people.get(subject, ("", "", "", ""))
    if age:
      try:
        age = age_at(age, year, int(study_date[:4]))
      except ValueError as error:
        raise RowError(f"bad attribute value: {error} (StudyDate {study_date!r}, anchor {age!r} in {year!r})") from None
    return {a.name: encode(a, text) for a, text in zip(self.schema, (age, sex, race))}


class PreparedTable:
  """The prepared table of the reference. Columns give the demographics, `final_sentence` gives the text alone."""

  name = "mimic_cxr"
  description = "Chest radiographs of MIMIC-CXR in the selection of the CompDiff reference."
  licence = _LICENCE

  def __init__(self, options: builder.Options, csv: Path):
    self._options = options
    columns = ("study_id", "subject_id", "gender", "anchor_age", "ethnicity", *CHEXPERT_LABELS)
    self._rows = list(read_rows(csv, (*columns, "image", "final_sentence", "split")))
    self.selected = f"{len(self._rows)} rows of {csv.name}."
    self.schema = demographic_schema(CHEST_RACES, recorded_races(row.values["ethnicity"] for row in self._rows))
    self.encode = FolderImages(str(options.source), options.images)

  def __len__(self) -> int:
    return len(self._rows)

  def __iter__(self) -> Iterator[dict[str, Any]]:
    # An absolute path is allowed as long as it lies in the source folder.
    home = f"{self._options.source.absolute()}/"
    table = ((row.values["image"].removeprefix(home), row) for row in self._rows)
    return builder.rows((file, row.number, functools.partial(self._row, row, file)) for file, row in table)

  def _row(self, row: TableRow, file: str) -> dict[str, Any]:
    values = row.values
    if row.fault:
      raise RowError(row.fault)
    if not values["subject_id"] or not file:
      raise RowError(f"no {'patient id' if file else 'image file'}: the column is empty")
    if values["split"] not in _SPLITS:
      raise RowError(f"bad split: {values['split']!r} is not train, val or test")
    try:
      text = split_prompt(values["final_sentence"])["text"]
      sex, race = parse_sex(values["gender"]), parse_race(values["ethnicity"])
    except ValueError as error:
      raise RowError(f"bad value: {error}") from None
    return {
      "image": file,
      "patient": values["subject_id"],
      "text": self._options.text(text),
      "attributes": {a.name: encode(a, text) for a, text in zip(self.schema, (values["anchor_age"], sex, race))},
      "findings": builder.chexpert_findings(values),
      **self._options.splits(_SPLITS[values["split"]]),
    }


def _study_folder(subject: str, study: str) -> str:
  return f"files/p{subject[:2]}/p{subject}/s{study}"


def _read_splits(path: Path) -> dict[str, str]:
  """{dicom_id: split} of the official split table."""
  splits = {}
  for dicom, row in read_lookup(path, "dicom_id", ("split",)).items():
    if row.values["split"] not in _SPLITS:
      raise InputError(
        f"{path}, row {row.number}: split {row.values['split']!r} is not train, validate or test; fetch the file again"
      )
    splits[dicom] = _SPLITS[row.values["split"]]
  return splits


def _people(folder: Path, subjects: set[str]) -> dict[str, tuple[str, str, str, str]]:
  """{subject_id: (anchor_age, anchor_year, sex, race)} of MIMIC-IV; who is not there is unknown in everything."""
  places = [folder, folder / "hosp", folder / "core", folder / "mimiciv" / "hosp"]
  patients_path = find_table(places, ["patients.csv"], "--mimic_iv")
  patients = read_lookup(patients_path, "subject_id", ("gender", "anchor_age", "anchor_year"))
  recorded: dict[str, set[str]] = {}
  admissions_path = find_table(places, ["admissions.csv"], "--mimic_iv")
  # MIMIC-IV 1.0 calls the column ethnicity.
  for number, values, _ in read_rows(admissions_path, ("subject_id",), ("race", "ethnicity")):
    if values["subject_id"] in subjects:
      race = known(parse_race, values["race"] or values["ethnicity"], admissions_path, number)
      recorded.setdefault(values["subject_id"], set()).add(race)
  people = {}
  for subject in subjects & patients.keys():
    row = patients[subject]
    sex = known(parse_sex, row.values["gender"], patients_path, row.number)
    race = agreed_race(recorded.get(subject, set()))
    people[subject] = (row.values["anchor_age"], row.values["anchor_year"], sex, race)
  return people


class _Reports:
  """Report texts of a folder or of the zip file; a study is read once for all of its images."""

  def __init__(self, source: Path):
    archive = source / "mimic-cxr-reports.zip"
    folders = [folder for folder in (source / "mimic-cxr-reports", source) if (folder / "files").is_dir()]
    self._folders = folders
    try:
      self._zip = zipfile.ZipFile(archive) if archive.is_file() else None
    except (OSError, zipfile.BadZipFile) as error:
      raise InputError(f"cannot read {archive}: {error}; fetch it again") from None
    self.impression = functools.lru_cache(16)(self._impression)

  def _impression(self, folder: str) -> str:
    try:
      return impression(self._read(f"{folder}.txt").decode("utf-8", "replace"))
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
      raise RowError(f"unreadable report: {' '.join(str(error).split())}") from None

  def _read(self, name: str) -> bytes:
    for folder in self._folders:
      if (folder / name).is_file():
        return (folder / name).read_bytes()
    if self._zip and name in self._zip.NameToInfo:
      return self._zip.read(name)
    raise RowError(f"no report: {name}")


def main(argv: list[str]) -> None:
  parser = builder.parser(_PROG, "MIMIC-CXR (JPG or DICOM, reports, MIMIC-IV demographics) as a data set.")
  builder.add_text_arguments(parser)
  parser.add_argument("--mimic_iv", type=Path, help="folder of patients.csv.gz and admissions.csv.gz; default --source")
  parser.add_argument("--views", default="PA,AP", help="ViewPosition values to keep; empty keeps all")
  parser.add_argument("--labels", default="chexpert", choices=("chexpert", "negbio"), help="labeller of the findings")
  parser.add_argument("--csv", type=Path, help="prepared table of the CompDiff reference, instead of the official ones")
  args = parser.parse_args(argv)
  options = builder.options(args)
  if args.csv:
    source = PreparedTable(options, args.csv)
  else:
    views = tuple(view.strip() for view in args.views.split(",") if view.strip())
    source = MimicCxr(options, args.mimic_iv, views, args.labels)
  builder.write(_PROG, source, args, argv)


if __name__ == "__main__":
  sys.exit(cli.run(main, _PROG))
