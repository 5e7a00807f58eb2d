"""The attributes of the public data sets: one table for all builders."""

from compdiff_jax.conditioning.demographics import AGE, RACE, SEX
from compdiff_jax.conditioning.schema import Attribute, Schema

VIEW = Attribute("view", "categorical", values=("PA", "AP"))
CHEST_RACES = RACE.values
FUNDUS_RACES = ("white", "black", "asian")
OTHER = "other"

# The fourteen labels of CheXpert, in the column order of MIMIC-CXR and of the reference's table.
CHEXPERT_LABELS = (
  "Atelectasis",
  "Cardiomegaly",
  "Consolidation",
  "Edema",
  "Enlarged Cardiomediastinum",
  "Fracture",
  "Lung Lesion",
  "Lung Opacity",
  "No Finding",
  "Pleural Effusion",
  "Pleural Other",
  "Pneumonia",
  "Pneumothorax",
  "Support Devices",
)


def demographic_schema(races: tuple[str, ...], found: set[str]) -> Schema:
  """Age, sex and race. `races` keep their order; "other" follows as a value of its own where the data have it.

  A level without any image would be an untrained embedding and an empty row of every table, so it is not added.
  """
  values = (*races, OTHER) if OTHER in found else races
  return Schema((AGE, SEX, Attribute("race", "categorical", values=values)))
