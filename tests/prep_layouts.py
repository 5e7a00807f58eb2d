"""Public data sets in miniature: exactly their file layout and column names, invented patients, phantoms as pictures.

Each function writes one data set below `folder` and returns what a reader must find: {file named in the record's place:
{"patient", "age", "sex", "race", "text", "findings", "split"}}, written down independently of the builders.
"""

import csv
import gzip
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from test_dicom import write_dicom

from data_prep.phantom.draw import draw
from data_prep.phantom.population import sample_factors


def columns(names: str) -> list[str]:
  return names.split(",")


LABELS = columns(
  "Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,Fracture,Lung Lesion,Lung Opacity,"
  "No Finding,Pleural Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices"
)
STATES = {"1.0": "positive", "0.0": "negative", "-1.0": "uncertain"}
REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with cough, seen by Dr. ___ at 10:45.

 COMPARISON:  Chest radiograph ___.

 FINDINGS:

 Lungs are well expanded.

 {heading}:

 {text}

 NOTIFICATION:  Discussed with Dr. Smith by telephone on 3/14/2150 at 2:30 PM.
"""


def phantom(index: int, size: tuple[int, int] = (24, 20)) -> np.ndarray:
  """A drawn chest, uint8 [H, W], not square."""
  pixels = np.uint8(np.clip(draw(sample_factors(0, index)[-1], 32), 0, 1) * 255)
  return pixels[: size[0], : size[1]]


def write_table(path: Path, header, rows) -> None:
  """CSV as the archives write it; gzipped when the name says so."""
  path.parent.mkdir(parents=True, exist_ok=True)
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerows([header, *rows])
  data = text.getvalue().encode()
  path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def save(path: Path, pixels: np.ndarray) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path)


# race in MIMIC-IV (one entry an admission) -> race of the record
MIMIC_RACES = {
  ("WHITE",): "white",
  ("WHITE - RUSSIAN", "WHITE"): "white",
  ("BLACK/AFRICAN AMERICAN",): "black",
  ("BLACK/CAPE VERDEAN", "UNKNOWN"): "black",
  ("ASIAN - CHINESE",): "asian",
  ("HISPANIC/LATINO - PUERTO RICAN",): "hispanic",
  ("HISPANIC OR LATINO",): "hispanic",
  ("OTHER",): "other",
  ("PORTUGUESE",): "other",
  ("UNKNOWN", "PATIENT DECLINED TO ANSWER"): "",
  ("WHITE", "ASIAN"): "",  # two records that contradict each other
  (): "",  # no admission
}


def mimic_cxr(folder: Path, *, dicom: bool = False, zipped: bool = False, suffix: str = ".csv.gz") -> dict[str, dict]:
  """MIMIC-CXR-JPG 2.1 (or the DICOM tree), report texts, MIMIC-IV's hosp tables; 48 frontal and 12 lateral images."""
  rng = np.random.default_rng(0)
  truth, metadata, splits, labels, patients, admissions, reports = {}, [], [], [], [], [], {}
  for i in range(24):
    subject = str(10_000_032 + 7 * i)
    sex, anchor_age = "MF"[i % 2], 91 if i == 5 else 20 + 3 * i
    patients.append([subject, sex, anchor_age, 2150, "2011 - 2013", ""])
    races = list(MIMIC_RACES)[i % len(MIMIC_RACES)]
    for n, race in enumerate(races):
      times = ["2151-01-01 10:00:00", "2151-01-03 10:00:00", ""]
      admissions.append([subject, 2 * i + n, *times, "EW EMER.", "P1", "A", "HOME", "Other", "?", "", race, "", "", 0])
    split = ("train", "train", "validate", "test")[i % 4]
    for visit in range(2):
      study = str(50_414_267 + 10 * i + visit)
      values = {label: ("1.0", "0.0", "-1.0", "")[rng.integers(4)] for label in LABELS}
      labels.append([subject, study, *values.values()])
      text = ("Small left pleural effusion.", "No acute cardiopulmonary process.")[visit]
      heading = "IMPRESSION" if i % 3 else "FINDINGS AND IMPRESSION"
      reports[f"files/p{subject[:2]}/p{subject}/s{study}.txt"] = REPORT.format(heading=heading, text=f"{text} ___")
      for view in ["PA", "LATERAL"][: 2 if visit and i % 2 else 1]:
        name = f"{rng.integers(16**8):08x}-{rng.integers(16**8):08x}-{i:08x}-{visit:08x}-{len(view):08x}"
        place = f"files/p{subject[:2]}/p{subject}/s{study}/{name}"
        view = "AP" if view == "PA" and visit else view
        metadata.append([name, subject, study, "CHEST (PA AND LAT)", view, 20, 24, 21500101 + 10_000 * visit, 1015.5])
        metadata[-1] += ["CHEST (PA AND LAT)", view.lower(), "Erect"]
        splits.append([name, study, subject, split])
        if dicom:
          (folder / place).parent.mkdir(parents=True, exist_ok=True)
          write_dicom(folder / f"{place}.dcm", phantom(i).astype(np.uint16) * 16, photometric=f"MONOCHROME{1 + i % 2}")
        else:
          save(folder / f"{place}.jpg", phantom(i))
        if view != "LATERAL":
          truth[place] = {
            "patient": subject,
            "age": 91.0 if anchor_age + visit > 89 else float(anchor_age + visit),  # grouped above 89
            "sex": {"M": "male", "F": "female"}[sex],
            "race": MIMIC_RACES[races],
            "text": text,
            "findings": {label: STATES[v] for label, v in values.items() if v},
            "split": {"validate": "val"}.get(split, split),
          }
  release = "mimic-cxr-2.0.0"
  write_table(
    folder / f"{release}-metadata{suffix}",
    columns(
      "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime,"
      "ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,PatientOrientationCodeSequence_CodeMeaning"
    ),
    metadata,
  )
  write_table(folder / f"{release}-split{suffix}", columns("dicom_id,study_id,subject_id,split"), splits)
  for labeller in ("chexpert", "negbio"):
    write_table(folder / f"{release}-{labeller}{suffix}", ["subject_id", "study_id", *LABELS], labels)
  write_table(
    folder / f"hosp/patients{suffix}",
    columns("subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod"),
    patients,
  )
  write_table(
    folder / f"hosp/admissions{suffix}",
    columns(
      "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,admit_provider_id,admission_location,"
      "discharge_location,insurance,language,marital_status,race,edregtime,edouttime,hospital_expire_flag"
    ),
    admissions,
  )
  if zipped:
    with zipfile.ZipFile(folder / "mimic-cxr-reports.zip", "w", zipfile.ZIP_DEFLATED) as archive:
      for name, report in reports.items():
        archive.writestr(name, report)
  else:
    for name, report in reports.items():
      path = folder / "mimic-cxr-reports" / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(report)
  return truth


def prepared_csv(folder: Path) -> dict[str, dict]:
  """The table that the reference's prepare_chest_dataset.py reads (method E.1) and its JPGs."""
  truth, rows = {}, []
  races = {"White": "white", "Black": "black", "Asian": "asian", "Hispanic": "hispanic", "Other": "other"}
  for i in range(40):
    subject, study = str(11_000_000 + i // 2), str(51_000_000 + i)
    file = f"files/p11/p{subject}/s{study}/{i:08x}-aa.jpg"
    save(folder / file, phantom(i))
    sex, age, race = ("male", "female")[i // 2 % 2], 25 + i, list(races)[i // 2 % 5]
    values = [("1.0", "0.0", "-1.0", "")[(i + n) % 4] for n in range(14)]
    text = f"Right basal opacity, {i % 7} cm. Unchanged."
    prompt = f"{age} year old {race} {sex}. {text}"
    split = ("train", "train", "val", "test")[i // 2 % 4]
    rows.append([study, subject, sex, age, race, *values, file, prompt, split])
    truth[file] = {"patient": subject, "age": float(age), "sex": sex, "race": races[race], "text": text, "split": split}
    truth[file] |= {"findings": {label: STATES[v] for label, v in zip(LABELS, values) if v}, "prompt": prompt}
  header = ["study_id", "subject_id", "gender", "anchor_age", "ethnicity", *LABELS, "image", "final_sentence", "split"]
  write_table(folder / "split_data.csv", header, rows)
  return truth


def nih_cxr14(folder: Path, *, old: bool = False, rows: list[list[str]] | None = None) -> dict[str, dict]:
  """The 2020 table with images/, or the first release: ages "058Y", a trailing comma, images_001/images/."""
  header = columns(
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
  )
  if rows is None:
    labels = ("No Finding", "Cardiomegaly|Effusion", "Pleural_Thickening", "Mass")
    views = ("PA", "AP")
    sizes = [2682, 2749, 0.143, 0.143]
    rows = [
      [
        f"{i // 2:08d}_{i % 2:03d}.png",
        labels[i % 4],
        i % 2,
        i // 2 + 1,
        30 + i,
        "MF"[i // 2 % 2],
        views[i % 2],
        *sizes,
      ]
      for i in range(48)
    ]
  truth = {}
  for i, row in enumerate(rows):
    place = ("images_001/images", "images_012/images")[i % 2] if old else "images"
    save(folder / place / row[0], phantom(i))
    names = [name.replace("_", " ") for name in row[1].split("|")]
    truth[row[0]] = {
      "patient": str(row[3]),
      "age": float(row[4]),
      "sex": {"M": "male", "F": "female"}[row[5]],
      "view": row[6],
      "text": " ".join(f"{name}." for name in names),
      "findings": dict.fromkeys(names, "positive"),
      "split": "test" if int(row[3]) % 4 == 0 else "train or val",
    }
  if old:
    rows = [[*row[:4], f"{int(row[4]):03d}Y", *row[5:], ""] for row in rows]
    write_table(folder / "Data_Entry_2017.csv", [*header, ""], rows)
  else:
    write_table(folder / "Data_Entry_2017_v2020.csv", header, rows)
  for name, here in (("train_val_list.txt", "train or val"), ("test_list.txt", "test")):
    (folder / name).write_text("\n".join(file for file, row in truth.items() if row["split"] == here))
  return truth


def chexpert(folder: Path) -> dict[str, dict]:
  """CheXpert-v1.0-small with its two tables, and the table of demographics as CSV."""
  home = folder / "CheXpert-v1.0-small"
  labels = columns(
    "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,"
    "Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
  )
  header = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *labels]
  races = {
    ("White, non-Hispanic", "Non-Hispanic/Non-Latino"): "white",
    ("Black or African American", "Unknown"): "black",
    ("Asian", "Non-Hispanic/Non-Latino"): "asian",
    ("White", "Hispanic/Latino"): "hispanic",
    ("Other", "Non-Hispanic/Non-Latino"): "other",
    ("Race and Ethnicity Unknown", "Unknown"): "",
  }
  truth, tables, people = {}, {"train": [], "valid": []}, []
  for i in range(32):
    table = "valid" if i >= 28 else "train"
    patient, sex, age = f"patient{i:05d}", ("Male", "Female")[i % 2], 18 + 2 * i
    race = list(races)[i % 6]
    people.append([patient, sex, age, *race])
    for view in ("frontal", "lateral")[: 1 + i % 2]:
      file = f"CheXpert-v1.0-small/{table}/{patient}/study1/view{1 if view == 'frontal' else 2}_{view}.jpg"
      values = [("1.0", "", "0.0", "-1.0")[(i + n) % 4] for n in range(14)]
      tables[table].append([file, sex, age, view.capitalize(), "AP" if view == "frontal" else "", *values])
      save(folder / file, phantom(i))
      if view == "frontal":
        findings = {label: STATES[v] for label, v in zip(labels, values) if v}
        truth[file] = {"patient": patient, "age": float(age), "sex": sex.lower(), "race": races[race]}
        truth[file] |= {"findings": findings, "split": "val" if table == "valid" else "any"}
        truth[file]["text"] = {f"{name}." for name, state in findings.items() if state == "positive"}
  for table, rows in tables.items():
    write_table(home / f"{table}.csv", header, rows)
  write_table(folder / "demographics.csv", ["PATIENT", "GENDER", "AGE_AT_CXR", "PRIMARY_RACE", "ETHNICITY"], people)
  return truth


def fairgenmed(folder: Path, *, lower: bool = False) -> dict[str, dict]:
  """FairGenMed: data_summary.csv and npz files in Training/ or training/; every third array is stored transposed."""
  header = columns(
    "filename,age,gender,race,ethnicity,language,maritalstatus,glaucoma,md,md_severity,cdr_status,rnflt_status,"
    "near_vision_refraction_stage,use"
  )
  words = {"positive": "hyperopia", "neutral": "emmetropia", "negative": "myopia"}
  truth, rows = {}, []
  for i in range(40):
    use = ("training", "training", "validation", "test")[i % 4]
    file, sex, age = f"data_{i:05d}.npz", ("Male", "Female")[i % 2], 40.25 + i
    race, cup, refraction = (
      ("White", "Black", "Asian")[i % 3],
      ("normal", "borderline", "abnormal")[i % 3],
      list(words)[i % 3],
    )
    glaucoma, severity = ("yes", "no")[i % 2], ("normal", "mild", "moderate")[i % 3]
    rows.append([file, age, sex, race, "non-hispanic", "english", "single", glaucoma, -1.5, severity, cup, "normal"])
    rows[-1] += [refraction, use]
    place = folder / (use.lower() if lower else use.capitalize())
    place.mkdir(parents=True, exist_ok=True)
    image = np.stack([phantom(i), phantom(i + 1), phantom(i + 2)], -1)
    image = image.astype(np.float32) / 255 if i % 2 else image
    np.savez_compressed(
      place / file, slo_fundus=np.moveaxis(image, -1, 0) if i % 3 == 0 else image, md=np.float64(-1.5)
    )
    text = ", ".join([
      "glaucoma" if glaucoma == "yes" else "non-glaucoma",
      "normal vision" if severity == "normal" else f"{severity} vision loss",
      f"{cup} cup-disc ratio",
      words[refraction],
    ])  # fmt: skip
    truth[file] = {"patient": file, "age": age, "sex": sex.lower(), "race": race.lower(), "text": text}
    truth[file] |= {"split": {"training": "train", "validation": "val"}.get(use, use), "image": image}
    truth[file]["findings"] = {
      "glaucoma": "positive" if glaucoma == "yes" else "negative",
      "vision loss": "negative" if severity == "normal" else "positive",
      "abnormal cup-disc ratio": {"normal": "negative", "borderline": "uncertain", "abnormal": "positive"}[cup],
      "hyperopia": "positive" if refraction == "positive" else "negative",
      "myopia": "positive" if refraction == "negative" else "negative",
    }
  write_table(folder / "data_summary.csv", header, rows)
  return truth


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
  info = tarfile.TarInfo(name)
  info.size = len(data)
  tar.addfile(info, io.BytesIO(data))


def reference_tars(folder: Path, kind: str = "chest") -> dict[str, dict]:
  """The reference's WebDataset shards (method E.4): pickled float32 tensors; keys restart in every tar."""
  truth = {}
  for split, place in (("train", "training_data"), ("val", "val_data"), ("test", "test_data")):
    (folder / place).mkdir(parents=True, exist_ok=True)
    for shard in range(2):
      name = f"{split}_{shard}.tar"
      with tarfile.open(folder / place / name, "w") as tar:
        for i in range(4):
          index = len(truth)
          key, sex, age = f"{i + 1:06d}", ("male", "female")[index % 2], 30 + index
          patient = f"{12_000_000 + index}"
          pixels = phantom(index).astype(np.float32) / 255
          if kind == "chest":
            text, race = f"Opacity number {index}.", ("WHITE", "BLACK", "ASIAN", "HISPANIC", "OTHER")[index % 5]
            prompt = f"{age} year old {race.capitalize()} {sex}. {text}"
            labels = [(1.0, 0.0, -1.0)[(index + n) % 3] for n in range(14)]
            extra = {"disease_labels": labels, "study_id": "s1", "subject_id": patient}
            findings = {label: {1.0: "positive", 0.0: "negative"}.get(v) for label, v in zip(LABELS, labels) if v >= 0}
          else:
            pixels = np.stack([pixels, pixels / 2, pixels / 4])
            text, race = (
              "glaucoma, normal vision, normal cup-disc ratio, myopia",
              ("white", "black", "asian")[index % 3],
            )
            prompt = (
              f"SLO fundus image of a {race.capitalize()}, {sex.capitalize()}, {age} years old patient with the"
              f" following conditions: {text}"
            )
            conditions = {"glaucoma": "yes", "cdr_status": "normal", "near_vision_refraction_stage": "negative"}
            extra = {
              "condition_labels": {**conditions, "rnflt_status": "x"},
              "filename": patient,
              "md_severity": "normal",
            }
            findings = {"glaucoma": "positive", "vision loss": "negative", "abnormal cup-disc ratio": "negative"}
            findings |= {"hyperopia": "negative", "myopia": "positive"}
          metadata = {**extra, "age": age, "age_bin": 1, "sex": sex, "sex_idx": index % 2, "race": race, "race_idx": 0}
          add_member(tar, f"{key}.pt_image", pickle.dumps(torch.from_numpy(pixels)))
          add_member(tar, f"{key}.prompt_metadata", prompt.encode())
          add_member(tar, f"{key}.validation_metadata", json.dumps(metadata).encode())
          truth[f"{place}/{name}::{key}"] = {
            "patient": patient,
            "age": float(age),
            "sex": sex,
            "race": race.lower(),
            "text": text,
            "findings": findings,
            "split": split,
            "image": pixels,
          }
      (folder / place / f"{split}_{shard}_size.txt").write_text("4")
  return truth
