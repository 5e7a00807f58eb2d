"""Who is in the phantom data set, and how age, sex and group shape the anatomy that is drawn.

The joint distribution is imbalanced like MIMIC-CXR's: most patients are 40 to 80 years old, group A is two thirds of
them, groups are differently old. The groups are abstract and mean nothing outside this file. Anatomy is a sum of main
effects and pairwise interactions (age x sex, age x group, sex x group), never of a three-way one: an unseen triple can
be composed from the pairs.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from compdiff_jax.conditioning.schema import Attribute, Schema
from data_prep.phantom.draw import SIDES, ZONES, draw, encode_png, expose, lung_height, lung_top
from data_prep.phantom.report import write_report

SCHEMA = Schema(
  (
    Attribute("age", "continuous", low=18, high=100, bins=(40, 60, 80), unit="year"),
    Attribute("sex", "categorical", values=("male", "female")),
    Attribute("group", "categorical", values=("A", "B", "C", "D")),
  )
)
FINDINGS = ("cardiomegaly", "effusion_left", "effusion_right", "opacity", "pacemaker")
YOUNGEST, OLDEST = 18, 95

GROUP_SHARES = (0.65, 0.19, 0.08, 0.08)
FEMALE_SHARES = (0.46, 0.56, 0.44, 0.52)
AGE_MEAN_SD = ((64, 15), (58, 17), (61, 17), (57, 18))

# Main effects of the groups A, B, C, D.
_HALF_WIDTH = (0.655, 0.615, 0.700, 0.610)
_ASPECT = (1.14, 1.02, 1.28, 1.15)
_DIAPHRAGM = (0.37, 0.43, 0.31, 0.27)
_CLAVICLE = (10.0, 20.0, 2.0, 24.0)
_TISSUE = (0.590, 0.670, 0.530, 0.640)
# Interactions: sex x group (added for women), age x group (change per 20 years or factor on the age slope).
_FEMALE_HALF_WIDTH = (-0.030, -0.050, -0.005, -0.020)
_FEMALE_CLAVICLE = (0.0, 4.0, 3.0, -8.0)
_FEMALE_SHOULDER = (-0.090, -0.060, -0.120, -0.070)
_BREAST_SIZE = (0.26, 0.22, 0.29, 0.24)
_LUNG_SLOPE = (1.0, 1.3, 0.8, 0.6)
_TISSUE_SLOPE = (0.0, -0.016, 0.014, 0.008)


@dataclasses.dataclass(frozen=True)
class Person:
  """Attributes of one patient at one visit: age in years, sex and group as schema indices."""

  age: float
  sex: int
  group: int


def expected_anatomy(person: Person) -> dict[str, float]:
  """The mean of every attribute-dependent factor. `elderly` is 0 at 18 and 1 at 95 years."""
  elderly = (person.age - YOUNGEST) / (OLDEST - YOUNGEST)
  decades = (person.age - 60) / 20
  female, group = float(person.sex), person.group
  half = _HALF_WIDTH[group] + female * _FEMALE_HALF_WIDTH[group]
  # Bone loss is faster in women, and mostly after 50.
  bone_loss = elderly * (1 - 0.1 * female) + 0.25 * female * max(person.age - 50, 0) / 45
  diaphragm = _DIAPHRAGM[group] + 0.012 * decades
  return {
    "thorax_half_width": half,
    "thorax_aspect": _ASPECT[group],
    "diaphragm_right": diaphragm - 0.03,
    "diaphragm_left": diaphragm + 0.03,
    "shoulder_half_width": 0.93 + female * _FEMALE_SHOULDER[group],
    "clavicle_tilt": _CLAVICLE[group] + female * _FEMALE_CLAVICLE[group],
    "tissue_level": _TISSUE[group] + _TISSUE_SLOPE[group] * decades - 0.02 * female,
    "wall": 0.125 + 0.02 * female,
    "lung_level": 0.305 - 0.145 * elderly * _LUNG_SLOPE[group],
    "rib_contrast": 0.175 - 0.115 * bone_loss,
    "spine_contrast": 0.270 - 0.200 * bone_loss,
    "aortic_knob": 0.085 + (0.105 - 0.030 * female) * elderly,
    "heart_width_ratio": 0.420 + 0.060 * elderly + 0.01 * female,
    "breast_density": female * (0.220 - 0.075 * elderly),
    "breast_size": _BREAST_SIZE[group],
    "breast_level": 0.10 + 0.13 * elderly,
  }


# Standard deviation of each patient around the mean anatomy.
_SPREAD = {
  "thorax_half_width": 0.012,
  "thorax_aspect": 0.025,
  "diaphragm_right": 0.012,
  "diaphragm_left": 0.012,
  "shoulder_half_width": 0.015,
  "clavicle_tilt": 1.2,
  "tissue_level": 0.010,
  "wall": 0.008,
  "lung_level": 0.008,
  "rib_contrast": 0.009,
  "spine_contrast": 0.012,
  "aortic_knob": 0.005,
  "heart_width_ratio": 0.012,
  "breast_density": 0.012,
  "breast_size": 0.015,
  "breast_level": 0.020,
}
# Everything `draw` reads, in the order it is stored.
FACTORS = (
  *_SPREAD,
  "rib_phase",
  "vessel_phase",
  "arm_abduction",
  "shift_u",
  "shift_v",
  "rotation",
  "exposure",
  "blur",
  "noise",
  "effusion_left_height",
  "effusion_right_height",
  "opacity_u",
  "opacity_v",
  "opacity_radius",
  "opacity_density",
  "pacemaker",
)


def _generator(seed: int, stream: int, index: int) -> np.random.Generator:
  return np.random.default_rng([seed, stream, index])


# How four consecutive examples fall to patients: sizes and probabilities. About 30 % of the patients have several.
_VISITS = ((1, 1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 3), (2, 2), (4,))
_VISIT_SHARES = (0.40, 0.17, 0.17, 0.10, 0.10, 0.06)


def visit_of(seed: int, index: int) -> tuple[int, int]:
  """(first example of the same patient, number of earlier visits) of example `index`."""
  block, place = divmod(index, 4)
  sizes = _VISITS[_generator(seed, 0, block).choice(len(_VISITS), p=_VISIT_SHARES)]
  start = 0
  for size in sizes:
    if place < start + size:
      return 4 * block + start, place - start
    start += size
  raise AssertionError("the visits of a block add up to four")


def _first_visit(rng: np.random.Generator) -> Person:
  group = int(rng.choice(4, p=GROUP_SHARES))
  sex = int(rng.random() < FEMALE_SHARES[group])
  mean, sd = AGE_MEAN_SD[group]
  age = rng.normal(mean, sd)
  while not YOUNGEST <= age <= OLDEST:
    age = rng.normal(mean, sd)
  return Person(float(round(age)), sex, group)


def _logistic(x: float) -> float:
  return 1 / (1 + math.exp(-x))


def prevalence(person: Person) -> dict[str, float]:
  """Probability of each finding; it rises with age."""
  decades = (person.age - 60) / 20
  return {
    "cardiomegaly": 0.03 + 0.27 * _logistic(1.6 * decades),
    "effusion_left": 0.05 + 0.13 * _logistic(1.4 * decades),
    "effusion_right": 0.05 + 0.13 * _logistic(1.4 * decades),
    "opacity": 0.14 + 0.10 * _logistic(decades),
    "pacemaker": 0.005 + 0.18 * _logistic(2.4 * (decades - 0.6)),
  }


def draw_findings(
  f: dict[str, float], present: dict[str, bool], zone: tuple[str, str], rng: np.random.Generator
) -> None:
  """Changes the factors `f` in place so that the findings in `present` show; absent ones get neutral factors."""
  severity = {name: rng.uniform() for name in FINDINGS}
  if present["cardiomegaly"]:
    f["heart_width_ratio"] += 0.11 + 0.07 * severity["cardiomegaly"]
  for side in SIDES:
    name = f"effusion_{side}"
    f[f"{name}_height"] = present[name] * (0.28 + 0.22 * severity[name])
  side, level = zone
  across, down = ZONES[level]
  jitter = rng.normal(0, 0.02, 2)
  f["opacity_u"] = float(SIDES[side] * across * f["thorax_half_width"] + jitter[0])
  f["opacity_v"] = float(lung_top(f) + down * lung_height(f) + jitter[1])
  f["opacity_radius"] = 0.13 + 0.05 * severity["opacity"]
  f["opacity_density"] = present["opacity"] * (0.30 + 0.12 * severity["opacity"])
  f["pacemaker"] = float(present["pacemaker"])


def sample_factors(seed: int, index: int) -> tuple[Person, dict[str, bool], tuple[str, str], dict[str, float]]:
  """Person, findings present, zone of the opacity (side, level) and drawn factors of example `index`."""
  first, visit = visit_of(seed, index)
  patient = _generator(seed, 1, first)
  person = _first_visit(patient)
  later = int(sum(patient.integers(0, 4, size=3)[:visit]))
  person = dataclasses.replace(person, age=min(person.age + later, float(OLDEST)))
  residual = patient.normal(size=len(_SPREAD)).clip(-2.5, 2.5)
  mean = expected_anatomy(person)
  f = {name: mean[name] + sd * float(z) for (name, sd), z in zip(_SPREAD.items(), residual)}
  f["breast_density"] = max(f["breast_density"], 0.0) if person.sex else 0.0
  f["rib_phase"] = float(patient.uniform(0.0, 0.06))
  f["vessel_phase"] = float(patient.uniform(0, 2 * math.pi))

  image = _generator(seed, 2, index)
  f["arm_abduction"] = float(image.uniform(0.02, 0.14))
  f["shift_u"], f["shift_v"] = (float(x) for x in image.normal(0, 0.012, 2))
  f["rotation"] = float(image.normal(0, 0.7))
  f["exposure"] = float(image.normal(1, 0.012))
  f["blur"] = float(image.uniform(0.010, 0.018))
  f["noise"] = float(image.uniform(0.008, 0.016))
  present = {name: bool(image.random() < p) for name, p in prevalence(person).items()}
  zone = (tuple(SIDES)[image.integers(2)], tuple(ZONES)[image.integers(3)])
  draw_findings(f, present, zone, image)
  return person, present, zone, {name: f[name] for name in FACTORS}


def row(seed: int, index: int) -> dict:
  """Everything about example `index` but its pixels: a pure function of (seed, index)."""
  person, present, zone, f = sample_factors(seed, index)
  first, _ = visit_of(seed, index)
  text, findings = write_report(present, zone, _generator(seed, 3, index))
  return {
    "key": f"phantom-{index:06d}",
    "patient": f"P{first:06d}",
    "image": index,
    "text": text,
    "attributes": dataclasses.asdict(person),
    "findings": findings,
    "factors": f,
  }


@dataclasses.dataclass(frozen=True)
class PhantomImages:
  """Draws example `index` as PNG bytes: the `encode` of data_prep/rows.py."""

  seed: int
  size: int

  def __call__(self, index: int) -> bytes:
    _, present, zone, f = sample_factors(self.seed, index)
    rng = _generator(self.seed, 3, index)
    write_report(present, zone, rng)  # noise continues the stream of random numbers where the text ended
    return encode_png(expose(draw(f, self.size), f["noise"], rng))


def example(seed: int, index: int, size: int) -> dict:
  """Example `index` with its image: a pure function of (seed, index) and the image size."""
  return {**row(seed, index), "image": PhantomImages(seed, size)(index)}


def rows(seed: int, num: int) -> Iterator[dict]:
  """The first `num` rows, made one at a time."""
  return (row(seed, index) for index in range(num))
