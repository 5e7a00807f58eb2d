"""Colour fundus photographs of both eyes, graded for diabetic retinopathy and maculopathy in one class column.

    python -m data_prep.table --csv fundus/metadata.csv --images fundus/images --config configs/data/fundus.py --out DIR

Columns: image, patient_id, eye (L/R), class. Needs no accelerator; 300 images take about two seconds. The side of the
eye is visible (the optic disc lies on the nasal side), so `--holdout 'eye=left,grade=moderate,maculopathy=present'`
gives a compositional test whose result can be checked by looking.
"""

import ml_collections

# class name -> (grade, maculopathy). Without retinopathy there is no diabetic maculopathy; ADED (advanced diabetic eye
# disease) is graded without saying whether the macula is involved.
_CLASSES = {
  "1 - No DR": ("no DR", "absent"),
  "2 - Mild DR without maculopathy": ("mild", "absent"),
  "3 - Mild DR with maculopathy": ("mild", "present"),
  "4 - Moderate DR without maculopathy": ("moderate", "absent"),
  "5 - Moderate DR with maculopathy": ("moderate", "present"),
  "6 - Severe DR without maculopathy": ("severe", "absent"),
  "7 - Severe DR with maculopathy": ("severe", "present"),
  "8 - PDR without maculopathy": ("proliferative", "absent"),
  "9 - PDR with maculopathy": ("proliferative", "present"),
  "10 - ADED": ("advanced", ""),
}


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.name = "fundus"
  config.description = (
    "Colour fundus photographs of both eyes, graded for diabetic retinopathy and maculopathy (DR-image-dataset)."
    " Toy scale: no clinical claim can rest on it."
  )
  config.licence = "Academic use with attribution (github.com/SRahimDR/DR-image-dataset)."
  config.size = 64
  config.resize = "pad"
  config.jpeg_quality = 0
  config.image = "image"
  config.patient = "patient_id"
  config.unknown = ()
  config.attributes = (
    {
      "name": "eye",
      "column": "eye",
      "kind": "categorical",
      "values": ("left", "right"),
      "mapping": {"L": "left", "R": "right"},
    },
    {
      "name": "grade",
      "column": "class",
      "kind": "categorical",
      "values": ("no DR", "mild", "moderate", "severe", "proliferative", "advanced"),
      "mapping": {name: grade for name, (grade, _) in _CLASSES.items()},
    },
    {
      "name": "maculopathy",
      "column": "class",
      "kind": "categorical",
      "values": ("absent", "present"),
      "mapping": {name: maculopathy for name, (_, maculopathy) in _CLASSES.items()},
    },
  )
  config.text = ml_collections.ConfigDict()
  config.text.parts = ("Colour fundus photograph.",)
  config.text.replace = ()
  config.text.max_words = 40
  config.findings = ml_collections.ConfigDict()
  config.findings.columns = ()
  config.findings.separator = ","
  config.attribution = ()
  return config
