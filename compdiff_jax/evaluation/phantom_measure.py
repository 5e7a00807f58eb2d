"""Measures on phantom radiographs what `data_prep.phantom` drew: edges, profiles and contrasts of regions.

Everything is found in the image itself; nothing is learned. Coordinates are the image's own: u from -1 (left) to 1
(right; the patient's left), v from -1 (top) to 1 (bottom).
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from compdiff_jax.cli import InputError

SIZE = 64  # every image is measured at this size
_STEP = 1 / SIZE
_CHUNK = 512  # images measured at once; bounds the memory
_RIB_SPACING = 0.205
_RIB_ARCH = (0.36, -0.15)  # a rib lies at v = first + 0.36 x^2 - 0.15 x, x = 1 at the chest wall
# Where opacities are looked for: share of the cage half-width and of the lung height below the apex.
_ZONES = {"upper": (0.52, 0.30), "mid": (0.62, 0.54), "lower": (0.60, 0.80)}


def brightness(images: np.ndarray) -> np.ndarray:
  """Grey images at the size of measurement.

  Args:
    images: uint8, or float in [0, 1]; [N, H, W] or [N, H, W, 3].

  Returns:
    float32 [N, 64, 64] in [0, 1]; larger images are smoothed before they are sampled.
  """
  images = np.asarray(images)
  if images.ndim not in (3, 4) or 0 in images.shape or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
    raise InputError(f"images have shape {list(images.shape)}; give [N, H, W] or [N, H, W, 3], at least one image")
  if images.dtype != np.uint8 and not (images.min() >= -0.01 and images.max() <= 1.01):
    raise InputError(f"float images reach from {images.min():g} to {images.max():g}; give 0 to 1, or uint8")
  scale = 255.0 if images.dtype == np.uint8 else 1.0
  grey = (images.mean(-1) if images.ndim == 4 else images).astype(np.float32) / np.float32(scale)
  height, width = grey.shape[1:]
  if (height, width) == (SIZE, SIZE):
    return grey
  shrink = [max(0.0, (n / SIZE - 1) / 2) for n in (height, width)]
  smooth = ndimage.gaussian_filter(grey, [0, *shrink])
  return ndimage.zoom(smooth, [1, SIZE / height, SIZE / width], order=1, mode="nearest", grid_mode=True)


def _sample(images: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Bilinear brightness at points u, v [N, ...] (broadcast against each other), clamped to the image."""
  u, v = np.broadcast_arrays(u, v)
  x = np.clip((u + 1) * (SIZE / 2) - 0.5, 0, SIZE - 1.001)
  y = np.clip((v + 1) * (SIZE / 2) - 0.5, 0, SIZE - 1.001)
  column, row = x.astype(np.int64), y.astype(np.int64)
  fx, fy = x - column, y - row
  image = np.arange(len(images)).reshape([-1] + [1] * (u.ndim - 1))
  above = images[image, row, column] * (1 - fx) + images[image, row, column + 1] * fx
  below = images[image, row + 1, column] * (1 - fx) + images[image, row + 1, column + 1] * fx
  return above * (1 - fy) + below * fy


def _box(images: np.ndarray, u: np.ndarray, v: np.ndarray, points: int = 7) -> np.ndarray:
  """Samples on a grid that spans the boxes u [N, 2] (from, to), v [N, 2]: [N, v, u]."""
  t = np.linspace(0, 1, points)
  us = u[:, :1] + (u[:, 1:] - u[:, :1]) * t
  vs = v[:, :1] + (v[:, 1:] - v[:, :1]) * t
  return _sample(images, us[:, None, :], vs[:, :, None])


def _step_up(profile: np.ndarray, position: np.ndarray, before: float, after: float) -> np.ndarray:
  """Where the profile [N, K] steps from dark to bright along the evenly spaced positions [K].

  The step is where the mean over the length `after` that follows exceeds the mean over the length `before` that leads
  up to it by most; it is then placed where the profile crosses the middle of the two means.
  """
  spacing = abs(position[1] - position[0])
  ahead, behind = max(2, round(before / spacing)), max(2, round(after / spacing))
  total = np.concatenate([np.zeros([len(profile), 1]), np.cumsum(profile, axis=1)], axis=1)
  at = np.arange(ahead, profile.shape[1] - behind)
  dark = (total[:, at] - total[:, at - ahead]) / ahead
  bright = (total[:, at + behind] - total[:, at]) / behind
  best = np.argmax(bright - dark, axis=1)
  rows = np.arange(len(profile))
  level = (dark[rows, best] + bright[rows, best]) / 2
  reach = round(0.06 / spacing)
  window = np.clip(at[best][:, None] + np.arange(-reach, reach + 1), 0, profile.shape[1] - 1)
  local = np.take_along_axis(profile, window, 1)
  last = np.where(local < level[:, None], np.arange(2 * reach + 1), 0).max(1)
  last = np.minimum(last, 2 * reach - 1)
  return _between(local, position[window], level, last)


def _first_below(profile: np.ndarray, position: np.ndarray, level: np.ndarray) -> np.ndarray:
  """Where the profile [N, K] falls below `level` [N] for the first time."""
  below = profile < level[:, None]
  first = np.where(below.any(1), np.argmax(below, axis=1), profile.shape[1] - 1)
  return _between(profile, position, level, np.maximum(first - 1, 0))


def _between(profile, position, level, index):
  rows = np.arange(len(profile))
  a, b = profile[rows, index], profile[rows, index + 1]
  step = b - a
  t = np.clip((level - a) / np.where(np.abs(step) < 1e-6, 1e-6, step), 0, 1)
  return position[rows, index] + t * (position[rows, index + 1] - position[rows, index])


def _frame(images: np.ndarray) -> dict[str, np.ndarray]:
  """Midline, half-width of the cage, lung apex and both diaphragm levels, each [N]."""
  rows = np.linspace(-0.46, -0.05, 28)
  reach = np.arange(0.36, 0.82, 0.5 * _STEP)
  walls = {}
  for side in (-1, 1):
    walls[side] = _step_up(_sample(images, side * reach[None, :, None], rows).mean(-1), reach, 0.14, 0.07)
  middle, half = (walls[1] - walls[-1]) / 2, (walls[1] + walls[-1]) / 2

  def columns(low: float, high: float, sides: Sequence[int]) -> np.ndarray:
    across = np.concatenate([side * np.linspace(low, high, 7) for side in sides])
    return middle[:, None, None] + half[:, None, None] * across

  up = np.arange(-0.53, -0.99, -0.5 * _STEP)
  top = _step_up(_sample(images, columns(0.34, 0.60, (-1, 1)), up[None, :, None]).mean(-1), up, 0.10, 0.06)
  down = np.arange(0.08, 0.72, 0.5 * _STEP)
  # On the left the heart hides the medial half of the diaphragm.
  right = _step_up(_sample(images, columns(0.40, 0.65, (-1,)), down[None, :, None]).mean(-1), down, 0.12, 0.08)
  left = _step_up(_sample(images, columns(0.66, 0.84, (1,)), down[None, :, None]).mean(-1), down, 0.12, 0.08)
  return {"middle": middle, "half": half, "top": top, "right": right, "left": left}


def measure(images: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
  """Measurements of phantom radiographs.

  Args:
    images: uint8, or float in [0, 1]; [N, H, W] or [N, H, W, 3]. Measured at 64 x 64.

  Returns:
    Names and float64 [N, F]. A name that is also a drawn factor measures that factor, up to a monotone scale;
    brightnesses are differences or means in [0, 1], lengths are in the units of u and v, `clavicle_tilt` is in degrees.
  """
  images = brightness(images)
  parts = [_measure(images[i : i + _CHUNK]) for i in range(0, len(images), _CHUNK)]
  columns = [np.concatenate([part[name] for part in parts]) for name in parts[0]]
  return tuple(parts[0]), np.stack(columns, axis=1).astype(np.float64)


def _measure(images: np.ndarray) -> dict[str, np.ndarray]:
  frame = _frame(images)
  middle, half, top = frame["middle"], frame["half"], frame["top"]
  # Fluid can only lift the visible floor of a lung, so the lower side counts; the left dome is 0.06 below the right.
  base = np.maximum(frame["right"] + 0.03, frame["left"] - 0.03)
  return {
    "thorax_half_width": half,
    "thorax_aspect": 2 * half / np.maximum(base - top, 0.2),
    "lung_top": top,
    "diaphragm_right": frame["right"],
    "diaphragm_left": frame["left"],
    **_mediastinal_edges(images, middle, half, top, base),
    **_outline(images, middle, half),
    **_levels(images, middle, half, top),
    **_clavicles(images, middle, half, top),
    **_findings(images, middle, half, top, base),
  }


def _region(images, middle, half, top, x, y, points=7):
  """Samples of a box in the thorax frame: x in cage half-widths from the midline, y below the apex in image units."""
  u = middle[:, None] + half[:, None] * np.asarray(x)
  return _box(images, u, top[:, None] + np.asarray(y), points)


def _mean(images, middle, half, top, x, y):
  return _region(images, middle, half, top, x, y).mean((1, 2))


def _mediastinal_edges(images, middle, half, top, base):
  """Heart width over cage width, and how far the aortic knob stands out."""
  rows = (base - 0.15)[:, None, None] + np.linspace(-0.07, 0.07, 8)
  width = 0.0
  for side, outer, inner in ((-1, 0.66, 0.08), (1, 0.96, 0.16)):
    inwards = np.arange(outer, inner, -0.02)
    u = middle[:, None, None] + side * half[:, None, None] * inwards[:, None]
    width = width + _step_up(_sample(images, u, rows).mean(-1), inwards, 0.10, 0.10)
  knob_rows = (top + 0.40)[:, None, None] + np.linspace(-0.05, 0.05, 5)
  reach = np.arange(0.06, 0.50, 0.5 * _STEP)
  profile = _sample(images, middle[:, None, None] + reach[:, None], knob_rows).mean(-1)
  level = (profile[:, :4].mean(1) + profile.min(1)) / 2
  knob = _first_below(profile, np.broadcast_to(reach, profile.shape), level)
  beside = middle[:, None, None] + np.linspace(0.14, 0.28, 8)
  window = _sample(images, beside, (top + 0.4)[:, None, None] + np.linspace(-0.14, 0.12, 9)[:, None])
  return {"heart_width_ratio": width / 2, "aortic_knob": knob, "aortic_shadow": window.mean((1, 2))}


def _outline(images, middle, half):
  """Half-width of the shoulders and of the body at the flank."""
  values = {}
  reach = np.arange(0.3, 1.0, _STEP)
  for name, low, high in (("shoulder_half_width", -0.60, -0.40), ("trapezius_width", -0.85, -0.70)):
    rows = np.linspace(low, high, 7)
    total = 0.0
    for side in (-1, 1):
      profile = _sample(images, middle[:, None, None] + side * reach[:, None], rows[None, None, :]).mean(-1)
      total = total + (profile > 0.14).mean(1) * (reach[-1] - reach[0]) + reach[0]
    values[name] = total / 2
  rows = np.linspace(0.75, 0.98, 8)
  beyond = middle[:, None, None] + half[:, None, None] * np.array([-1.0, 1.0])[:, None]
  values["flank_level"] = _sample(images, beyond, rows[None, None, :]).mean((1, 2))
  return values


def _levels(images, middle, half, top):
  """Brightness of tissue and lung, contrast of ribs, spine and breasts."""
  args = images, middle, half, top
  abdomen_right = _mean(*args, (-0.75, -0.35), (1.42, 1.62))
  abdomen_left = _mean(*args, (0.35, 0.75), (1.52, 1.66))
  wall = (_mean(*args, (-1.14, -1.06), (0.45, 0.85)) + _mean(*args, (1.06, 1.14), (0.45, 0.85))) / 2
  upper = np.stack([_mean(*args, x, (0.26, 0.52)) for x in ((-0.8, -0.45), (0.45, 0.8))])
  mid = np.stack([_mean(*args, x, (0.52, 0.74)) for x in ((-0.9, -0.55), (0.55, 0.9))])
  lower = np.stack([_mean(*args, x, (0.78, 1.06)) for x in ((-0.92, -0.55), (0.66, 0.92))])

  # Sampled along the arches, the ribs are one periodic profile; their contrast is its amplitude at the rib distance.
  x = np.concatenate([np.linspace(-0.9, -0.35, 10), np.linspace(0.35, 0.9, 10)])
  down = np.arange(0.20, 0.815, _STEP / 2)
  arches = top[:, None, None] + down[:, None] + _RIB_ARCH[0] * x * x + _RIB_ARCH[1] * np.abs(x)
  wave = np.median(_sample(images, middle[:, None, None] + half[:, None, None] * x, arches), axis=-1)
  wave = wave - ndimage.gaussian_filter1d(wave, 16, axis=1)
  ribs = 2 * np.abs((wave * np.exp(2j * np.pi * down / _RIB_SPACING)).mean(1))

  spine = _mean(*args, (-0.08, 0.08), (1.40, 1.72))
  beside = (_mean(*args, (-0.32, -0.20), (1.40, 1.72)) + _mean(*args, (0.20, 0.32), (1.58, 1.72))) / 2
  return {
    "tissue_level": (abdomen_right + abdomen_left) / 2,
    "wall_level": wall,
    "lung_level": upper.min(0),
    "mid_lung_level": mid.min(0),
    "rib_contrast": ribs,
    "spine_contrast": spine - beside,
    "breast_density": (lower - upper).min(0),
    "breast_mean": (lower - upper).mean(0),
  }


def _clavicles(images, middle, half, top):
  """Tilt in degrees of the bright bars near the apices, and their contrast: the best of many tried tilts."""
  angles = np.radians(np.arange(-10.0, 38.0, 2.0))
  heights = np.linspace(-0.05, 0.05, 5)
  along = np.arange(0.13, 0.56, 2 * _STEP)
  relief = images - ndimage.gaussian_filter1d(images, 3.0, axis=1)
  response = 0.0
  for side in (-1, 1):
    u = middle[:, None, None, None] + side * along
    v = top[:, None, None, None] + 0.24 + heights[:, None] - np.tan(angles)[:, None, None] * (along - 0.29)
    response = response + _sample(relief, u, v).mean(-1)  # [N, angle, height]
  best = response.max(2)
  strength = np.maximum(best.max(1, keepdims=True), 1e-3)
  weight = np.exp(np.clip((best - strength) / (0.05 * strength), -50, 0))
  tilt = np.degrees((weight * angles).sum(1) / weight.sum(1))
  return {"clavicle_tilt": tilt, "clavicle_contrast": best.max(1)}


def _findings(images, middle, half, top, base):
  """Fluid at the lung bases, one-sided densities by zone, and metal."""
  args = images, middle, half, top
  values = {}
  dark = np.minimum(_mean(*args, (-0.8, -0.45), (0.26, 0.52)), _mean(*args, (0.45, 0.8), (0.26, 0.52)))
  bright = _mean(*args, (-0.75, -0.35), (1.42, 1.62))
  fluid = {}
  for name, side in (("right", -1), ("left", 1)):
    u = middle[:, None, None] + side * half[:, None, None] * np.linspace(0.78, 0.94, 5)
    down = base[:, None, None] + np.linspace(-0.40, 0.25, 26)[:, None]
    strip = _sample(images, u, down).mean(-1)
    # Mean brightness between lung and abdomen: the part of the lateral strip that is filled.
    fluid[name] = ((strip - dark[:, None]) / np.maximum(bright - dark, 0.05)[:, None]).mean(1)
    values[f"effusion_{name}_height"] = fluid[name]
  values["effusion_difference"] = fluid["left"] - fluid["right"]
  length = np.maximum(base - top, 0.3)
  soft = ndimage.gaussian_filter(images, [0, 2.0, 2.0])
  for zone, (across, depth) in _ZONES.items():
    v = (top + depth * length)[:, None, None] + np.linspace(-0.06, 0.06, 5)[:, None]
    pair = [
      _sample(soft, middle[:, None, None] + side * half[:, None, None] * (across + np.linspace(-0.1, 0.1, 5)), v)
      for side in (-1, 1)
    ]
    values[f"opacity_{zone}"] = pair[1].mean((1, 2)) - pair[0].mean((1, 2))
  # The heart makes the lower zones unequal in everybody, so only the upper two speak for an opacity.
  values["opacity_density"] = np.max([np.abs(values[f"opacity_{zone}"]) for zone in ("upper", "mid")], axis=0)
  metal = _region(*args, (0.35, 0.95), (0.22, 0.62), points=20)
  values["pacemaker"] = metal.max((1, 2))
  return values
