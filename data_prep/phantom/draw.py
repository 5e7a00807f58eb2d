"""Draws one frontal chest radiograph from its factors.

Coordinates: u runs from -1 (image left, the patient's right) to 1 (image right, the patient's left), v from -1 (top) to
1 (bottom). Lengths are in these units, so a factor means the same at every image size. Edges are analytic ramps at
least one pixel wide, which antialiases without supersampling. Brightness 0 is black (air), 1 is white (metal).
"""

import functools
import io
import math
from collections.abc import Mapping

import numpy as np
from PIL import Image

AIR = 0.03
# Where an opacity sits: centre as fractions of the cage half-width and of the height from apex to diaphragm.
ZONES = {"upper": (0.52, 0.30), "mid": (0.62, 0.54), "lower": (0.60, 0.80)}
SIDES = {"right": -1.0, "left": 1.0}


@functools.cache
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
  centres = ((np.arange(size) + 0.5) * 2 / size - 1).astype(np.float32)
  return np.broadcast_to(centres, [size, size]), np.broadcast_to(centres[:, None], [size, size])


def _inside(distance: np.ndarray, width: float) -> np.ndarray:
  """0 outside (distance < -width), 1 inside (distance > width), a smooth ramp between."""
  t = np.clip(distance * (0.5 / width) + 0.5, 0.0, 1.0)
  return t * t * (3 - 2 * t)


def _bump(x: np.ndarray, width: float) -> np.ndarray:
  """A smooth bell around 0 that ends at |x| = width."""
  t = np.clip(1 - np.square(x * (1 / width)), 0.0, 1.0)
  return t * t


def _bar(u, v, start: tuple[float, float], end: tuple[float, float]) -> np.ndarray:
  """Distance to the segment from `start` to `end`."""
  du, dv = end[0] - start[0], end[1] - start[1]
  t = np.clip(((u - start[0]) * du + (v - start[1]) * dv) / (du * du + dv * dv), 0.0, 1.0)
  return np.hypot(u - start[0] - t * du, v - start[1] - t * dv)


def _ellipse(u, v, centre: tuple[float, float], radii: tuple[float, float]) -> np.ndarray:
  """Approximate signed distance to an ellipse, positive inside."""
  r = np.hypot((u - centre[0]) * (1 / radii[0]), (v - centre[1]) * (1 / radii[1]))
  return (1 - r) * min(radii)


def lung_height(f: Mapping[str, float]) -> float:
  """Apex to mean diaphragm dome: cage width / thorax_aspect."""
  return 2 * f["thorax_half_width"] / f["thorax_aspect"]


def lung_top(f: Mapping[str, float]) -> float:
  return (f["diaphragm_right"] + f["diaphragm_left"]) / 2 - lung_height(f)


def draw(f: Mapping[str, float], size: int) -> np.ndarray:
  """The noise-free radiograph.

  Args:
    f: every key of `population.FACTORS`.
    size: pixels a side.

  Returns:
    float32 [size, size] in [0, 1].
  """
  gu, gv = _grid(size)
  cos, sin = math.cos(math.radians(f["rotation"])), math.sin(math.radians(f["rotation"]))
  u = cos * (gu - f["shift_u"]) + sin * (gv - f["shift_v"])
  v = cos * (gv - f["shift_v"]) - sin * (gu - f["shift_u"])
  edge = max(2.0 / size, f["blur"])
  left_side = u > 0
  side_u = np.abs(u)

  half = f["thorax_half_width"]
  top = lung_top(f)
  dome = np.where(left_side, np.float32(f["diaphragm_left"]), np.float32(f["diaphragm_right"]))

  tissue = _soft_tissue(f, u, v, side_u, half, edge)
  cage = _cage(v, side_u, half, top, edge)
  # The dome is highest a little medial of the middle and falls to the costophrenic angle at the chest wall.
  across = (side_u - 0.42 * half) * (1 / half)
  floor = dome + 0.20 * np.square(across) + 1.15 * np.clip(across - 0.22, 0, 1) ** 2
  above = _inside(floor - v, edge * 1.2)
  heart, mediastinum = _mediastinum(f, u, v, half, top, edge)
  solid = np.maximum(heart, mediastinum)
  fluid = _fluid(f, v, side_u, left_side, half, edge)
  air = cage * above * (1 - solid) * (1 - fluid)

  # Lung brightness: a little brighter at the hilum, where vessels are dense, and at the base.
  depth = np.clip((v - top) * (1 / lung_height(f)), 0, 1)
  hilum_u, hilum_v = side_u - 0.21, v - (top + 0.52 * lung_height(f))
  radius = np.hypot(hilum_u, hilum_v * 0.8)
  vessels = _vessels(f, hilum_u, hilum_v, radius, left_side)
  lung = f["lung_level"] + 0.05 * depth + 0.16 * _bump(radius, 0.26) + vessels

  below = (1 - _inside(dome + 0.02 - v, 0.12)) * _inside(half + 0.10 - side_u, 0.12)
  liver = 0.18 * below * np.where(left_side, np.float32(0.75), np.float32(1.0))
  stomach = 0.22 * below * _inside(_ellipse(u, v, (0.42 * half, f["diaphragm_left"] + 0.20), (0.2, 0.09)), 0.05)
  body = tissue * (1 + liver) + (0.14 * heart + 0.07 * mediastinum + 0.06 * fluid * cage) * (1 - below)
  body = body - stomach * (0.35 + 0.4 * _bump(u - 0.4 * half, 0.2))
  image = body + air * (lung - body)

  image += _bones(f, u, v, side_u, half, top, cage, solid, below, dome, edge)
  image += _breasts(f, v, side_u, half, edge) * (1 - 0.55 * below)
  # Consolidation and metal lie inside the chest; both only brighten.
  zone = (f["opacity_u"], f["opacity_v"])
  spread = np.hypot(u - zone[0], (v - zone[1]) * 1.15)
  image += f["opacity_density"] * _bump(spread, 1.35 * f["opacity_radius"]) * cage * (1 - 0.7 * solid)
  image = (1.14 * f["exposure"]) * np.maximum(image, 0) ** np.float32(1.22)  # contrast of a chest film
  image /= (1 + np.square(np.square(image))) ** np.float32(0.25)  # film shoulder: linear below 0.6, saturates at 1
  if f["pacemaker"]:
    image = _pacemaker(f, image, u, v, half, top, edge)
  return np.clip(image, 0, 1)


def _soft_tissue(f, u, v, side_u, half, edge):
  """Body outline, neck, shoulders and arms over air; brightness by thickness."""
  shoulder = f["shoulder_half_width"]
  slope = np.clip((v + 1.00) * (1 / 0.56), 0, 1)
  shoulders = 0.24 + (shoulder - 0.24) * (slope * (2 - slope)) ** np.float32(0.85)
  flank = half + f["wall"] + 0.05 * np.square(v - 0.1)
  taper = _inside(v + 0.10, 0.34)
  outline = shoulders + taper * (flank - shoulders)
  body = _inside(outline - side_u, edge * 1.2)
  thick = np.sqrt(np.clip(1.12 - np.square(side_u / outline), 0.12, 1.0))
  tissue = f["tissue_level"]
  image = AIR + body * (tissue * (0.62 + 0.38 * thick) - AIR)
  # The trapezius and the neck are thinner than the trunk.
  image = image * (1 - 0.22 * (1 - _inside(v + 0.72, 0.25)) * body)
  arm = _bar(side_u, v, (shoulder - 0.10, -0.48), (shoulder + f["arm_abduction"], 0.95))
  arms = _inside(0.13 - arm, edge * 1.2)
  image = np.maximum(image, AIR + arms * (0.80 * tissue - AIR))
  humerus = _inside(0.045 - arm, 0.03) + 0.6 * _inside(_ellipse(side_u, v, (shoulder - 0.10, -0.5), (0.1, 0.1)), 0.04)
  return image + 0.9 * f["rib_contrast"] * np.minimum(humerus, 1)


def _cage(v, side_u, half, top, edge):
  """The inside of the rib cage: rounded apices, almost straight walls."""
  bend = top + 0.62
  up = np.clip((bend - v) * (1 / (bend - top)), 0, 2)
  middle = 0.45 * half
  reach = np.where(side_u > middle, np.float32(half - middle), np.float32(middle - 0.03))
  across = np.abs(side_u - middle) / reach
  radius = (np.sqrt(across) * across * across + up * up * np.sqrt(up)) ** np.float32(0.4)
  return _inside((1 - radius) * 0.28, edge)


def _mediastinum(f, u, v, half, top, edge):
  """Masks of the heart and of the band above it with the aortic knob; patient's left is u > 0."""
  width = 2 * half * f["heart_width_ratio"]
  base = (f["diaphragm_left"] + f["diaphragm_right"]) / 2
  centre_v = base - 0.10
  # The left border is two thirds of the width away from the midline; the axis leans towards the left base.
  lean = 0.30 * (v - centre_v)
  heart = _inside(_ellipse(u - lean, v, (width / 6, centre_v), (width / 2, 0.29)), edge * 1.3)
  knob = f["aortic_knob"]
  knob_v = top + 0.40
  narrow = 0.105 + 0.10 * np.clip((v - knob_v) * 0.9, 0, 0.5) + 0.10 * np.clip(top + 0.16 - v, 0, 1)
  band = _inside(narrow - np.abs(u - 0.01), edge)
  arch = _inside(knob - np.hypot(u - 0.085, v - knob_v), edge)
  descending = _inside(0.11 + 0.35 * knob - np.abs(u), edge * 2) * _inside(v - knob_v, 0.05) * (u > 0)
  return heart, np.maximum(np.maximum(band, arch), descending)


def _fluid(f, v, side_u, left_side, half, edge):
  """Pleural effusion: a fluid level that rises to the chest wall (meniscus)."""
  height = np.where(left_side, np.float32(f["effusion_left_height"]), np.float32(f["effusion_right_height"]))
  base = np.where(left_side, np.float32(f["diaphragm_left"]), np.float32(f["diaphragm_right"])) + 0.24
  meniscus = base - height * (0.62 + 0.55 * np.square(side_u / half))
  return _inside(v - meniscus, edge * 1.6) * np.minimum(height * 20, 1)


def _vessels(f, hilum_u, hilum_v, radius, left_side):
  """Branching vessels: bright spokes around the hilum that thin out towards the wall."""
  angle = np.arctan2(hilum_v, hilum_u)
  phase = np.where(left_side, np.float32(f["vessel_phase"]), np.float32(f["vessel_phase"] + 2.1))
  spokes = (
    np.maximum(np.cos(5 * angle + phase + 9 * radius * np.cos(angle + phase)), 0) ** 4
    + 0.6 * np.maximum(np.cos(13 * angle - 2 * phase - 14 * radius * np.sin(angle)), 0) ** 4
  )
  return 0.055 * spokes * np.clip(1 - radius * 1.6, 0, 1) * np.minimum(radius * 8, 1)


def _bones(f, u, v, side_u, half, top, cage, solid, below, dome, edge):
  """Ribs, clavicles, scapulae, spine and trachea, as brightness to add."""
  x = side_u * (1 / half)
  spacing = 0.205
  drop = 0.36 * x * x - 0.15 * x
  fade = _inside(dome + 0.16 - v, 0.14)
  ribs = _rib_band((v - drop - top - f["rib_phase"]) * (1 / spacing), 0.46, edge / spacing)
  front = _rib_band((v + 0.34 * x - top - f["rib_phase"] - 0.1) * (1 / spacing), 0.36, edge / spacing)
  in_cage = cage * fade * _inside(x - 0.1, 0.1)
  added = f["rib_contrast"] * in_cage * (1 - 0.55 * solid) * (ribs + 0.42 * front * _inside(x - 0.42, 0.2))

  # The clavicle runs from the sternum to the shoulder; a positive tilt lifts its outer end.
  length = 0.70 * f["shoulder_half_width"] - 0.08
  rise = math.tan(math.radians(f["clavicle_tilt"])) * length
  inner = (0.09, top + 0.24 + 0.35 * rise)
  clavicle = _bar(side_u, v, inner, (0.09 + length, inner[1] - rise))
  added += (0.06 + 0.85 * f["rib_contrast"]) * _inside(0.036 - clavicle, edge)
  scapula = np.abs(side_u - (half + 0.05 - 0.16 * np.clip(v + 0.05, -0.6, 0)))
  added += 0.35 * f["rib_contrast"] * _inside(0.02 - scapula, 0.03) * _inside(0.2 - np.abs(v + 0.25), 0.08)

  # Vertebrae and discs alternate; the column shows through the mediastinum and below the diaphragm.
  discs = 0.80 + 0.20 * np.cos((v + 0.02) * (2 * math.pi / 0.17))
  visible = 0.55 + 0.45 * below
  column = _inside(0.085 - side_u, 0.03)
  added += f["spine_contrast"] * column * discs * visible
  trachea = _inside(0.04 - np.abs(u + 0.01), 0.03) * _inside(top + 0.46 - v, 0.08) * _inside(v - top + 0.1, 0.1)
  return added - 0.14 * trachea


def _rib_band(phase, duty, softness):
  """Periodic bands: 1 inside a rib, with a thin bright cortex at its margins."""
  offset = np.abs(phase - np.floor(phase) - 0.5)
  margin = duty / 2 - offset
  return 0.8 * _inside(margin, max(softness, 0.06)) + 0.2 * _bump(margin - 0.05, 0.12)


def _breasts(f, v, side_u, half, edge):
  """Breast shadows: brightest along the lower crescent, fading upwards."""
  centre_v = f["breast_level"]
  size = f["breast_size"]
  inside = _inside(_ellipse(side_u, v, (0.60 * half, centre_v), (1.05 * size, size)), max(edge, 0.05))
  weight = np.clip(0.72 + 0.55 * (v - centre_v) * (1 / size), 0, 1.2)
  return f["breast_density"] * inside * weight


def _pacemaker(f, image, u, v, half, top, edge):
  """A generator below the left clavicle and a lead down to the right ventricle."""
  centre = (0.66 * half, top + 0.42)
  du, dv = np.abs(u - centre[0]), np.abs(v - centre[1])
  can = _inside(0.105 - np.hypot(du, dv * 1.15), edge)
  apex = (0.22, (f["diaphragm_left"] + f["diaphragm_right"]) / 2 - 0.05)
  lead = np.minimum(
    _bar(u, v, (centre[0] - 0.08, centre[1] - 0.03), (-0.03, top + 0.35)),
    np.minimum(_bar(u, v, (-0.03, top + 0.35), (-0.06, apex[1] - 0.16)), _bar(u, v, (-0.06, apex[1] - 0.16), apex)),
  )
  wire = 0.55 * _inside(0.012 - lead, max(edge * 0.8, 0.008))
  image = image + wire * (0.95 - image)
  return image + can * (0.97 - image)


def expose(image: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
  """Adds quantum noise of standard deviation `noise` and rounds to uint8 [size, size]."""
  noisy = image + noise * rng.standard_normal(image.shape, dtype=np.float32)
  return np.round(np.clip(noisy, 0, 1) * 255).astype(np.uint8)


def encode_png(image: np.ndarray) -> bytes:
  """8-bit grey PNG bytes of uint8 [size, size]."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "PNG")
  return buffer.getvalue()
