"""Frontal chest X-rays with free-text notes, in the layout of the public COVID-19 chest X-ray collection.

    python -m data_prep.table --csv chest_xray/metadata.csv --images chest_xray/images \
        --config configs/data/chest_xray.py --out DIR

Columns: image, patient_id, sex (M/F), age, view, finding, licence, url, clinical_notes. Needs no accelerator; 198
images take about three seconds. `--config.size=128` changes the resolution.
"""

import ml_collections

from data_prep import scrub

# The notes tell age and sex, and the view. The text must not: the attributes carry them, and a hold-out of a
# combination would leak through the text.
_REPLACE = (
  # Case reports put the picture after the history and before the discussion.
  (r"^.*\bimaging (?:notes|findings):", ""),
  (r"\bdiscussion:.*$", ""),
  (r"\bpresentation:", ""),
  *scrub.ALL,
  (r"\b(?:an? |the )?(?:AP|PA|(?:antero|postero)[-\s]?(?:posterior|anterior)|supine|(?:semi)?[-\s]?erect)\b", ""),
  (r"\b(patient)(?:[\s,]+(?:the )?patient)+\b", r"\1"),
)


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.name = "chest_xray"
  config.description = (
    "Frontal chest X-rays with findings, notes, age, sex and view, from the public COVID-19 chest X-ray collection of"
    " Cohen et al. (2020). Toy scale: no clinical claim can rest on it."
  )
  config.licence = ""
  config.size = 64
  config.resize = "pad"
  config.jpeg_quality = 0
  config.image = "image"
  config.patient = "patient_id"
  config.unknown = ("todo",)
  config.attributes = (
    {
      "name": "age",
      "column": "age",
      "kind": "continuous",
      # The collection holds adults, 25 to 85 years old: a bin below 18 would be an empty row of every table.
      "low": 18,
      "high": 100,
      "bins": (40, 60, 80),
      "unit": "year",
    },
    {
      "name": "sex",
      "column": "sex",
      "kind": "categorical",
      "values": ("male", "female"),
      "mapping": {"M": "male", "F": "female"},
    },
    {"name": "view", "column": "view", "kind": "categorical", "values": ("PA", "AP", "AP Supine")},
  )
  config.text = ml_collections.ConfigDict()
  config.text.parts = ("Chest X-ray.", "{finding}.", "{clinical_notes}")
  config.text.replace = _REPLACE
  config.text.max_words = 40
  config.findings = ml_collections.ConfigDict()
  config.findings.columns = ("finding",)
  config.findings.separator = ","
  config.attribution = ("licence", "url")
  return config
