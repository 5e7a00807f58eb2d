"""Feature extractors that need no downloaded weights, and the standardisation that every metric shares.

A registry entry has a name that says what it is, a hash of everything that defines its output, and a function from
uint8 images [N, H, W, 3] to float64 features [N, d]. Features are z-scored by the real training split, so that each
counts alike and the scale is the data's, not the metric's (FRD does the same, without our limit).
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from compdiff_jax.cli import InputError, nearest

# Everything that defines the radiomics vector; its JSON is hashed into the extractor's name.
RADIOMICS = {
  "version": 1,
  "percentiles": [5, 25, 50, 75, 95],
  "histogram_bins": 32,
  "glcm_levels": 16,
  "glcm_distances": [1, 4],
  "log_sigmas": [1.0, 2.0, 4.0],
  "haar_levels": 3,
  "spectrum_bands": 8,
  "map_side": 4,
  "log_floor": 1e-8,
}
RANDOM_CONV = {"seed": 0, "kernel": 3, "stride": 2, "channels": [32, 64, 128, 256]}
LIMIT = 5.0
_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Extractor:
  """`name` with version and sizes, `sha256` of its definition or weights, a `note` for readers, and the function."""

  name: str
  sha256: str
  note: str
  extract: Callable[[np.ndarray], np.ndarray]

  @property
  def label(self) -> str:
    """For example "radiomics-v1@sha256:1a2b3c4d": the subscript of every metric computed with it."""
    return f"{self.name}@sha256:{self.sha256[:8]}"


@dataclasses.dataclass(frozen=True)
class Standardisation:
  """z-scores by the training split's mean and standard deviation, softly limited: z -> L tanh(z / L), L = 5.

  Constant features are dropped and counted. Without the limit one feature far outside the real range (the finest
  texture of a slightly blurred image lies dozens of standard deviations off) decides the cubic kernel alone.
  """

  mean: np.ndarray
  sd: np.ndarray
  kept: np.ndarray
  n: int

  @classmethod
  def fit(cls, train: np.ndarray) -> "Standardisation":
    mean, sd = train.mean(0), train.std(0, ddof=1)
    kept = sd > 1e-6 * np.maximum(np.abs(mean), 1e-3)
    if not kept.any():
      raise ValueError("every feature is constant on the training images")
    return cls(mean, sd, kept, len(train))

  def __call__(self, features: np.ndarray) -> np.ndarray:
    scores = (features[:, self.kept] - self.mean[self.kept]) / self.sd[self.kept]
    return LIMIT * np.tanh(scores / LIMIT)

  def moved(self, features: np.ndarray) -> int:
    """How many of the dropped features are not the training split's constant here; they would go unseen."""
    far = np.abs(features - self.mean) > 0.01 * np.maximum(np.abs(self.mean), 1)
    return int((far.any(0) & ~self.kept).sum())


def extractor(name: str) -> Extractor:
  """The registry entry `name`."""
  if name not in REGISTRY:
    raise InputError(f"unknown extractor {name!r}{nearest(name, REGISTRY)}")
  return REGISTRY[name]()


def in_batches(function: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
  """Rows of `function` over batches of one fixed shape; the last is padded, so one program serves all."""
  rows = []
  for start in range(0, len(images), _BATCH):
    batch = images[start : start + _BATCH]
    padding = _BATCH - len(batch)
    padded = np.concatenate([batch, np.repeat(batch[-1:], padding, axis=0)]) if padding else batch
    rows.append(np.asarray(function(padded), np.float64)[: len(batch)])
  return np.concatenate(rows)


def _radiomics() -> Extractor:
  return Extractor(
    name=f"radiomics-v{RADIOMICS['version']}",
    sha256=hashlib.sha256(json.dumps(RADIOMICS, sort_keys=True).encode()).hexdigest(),
    note="hand-crafted: intensity statistics, grey-level co-occurrence, LoG and Haar energies, radial spectrum, coarse"
    " intensity map, colour; no learned weights",
    extract=lambda images: in_batches(radiomics, images),
  )


def radiomics(images: np.ndarray) -> np.ndarray:
  """Deterministic texture and intensity features, float64 [N, 63].

  Args:
    images: uint8 [N, H, W, 3], H = W >= 16. Luminance (ITU-R BT.601) in [0, 1] feeds all but the colour features.
  """
  rgb = images.astype(np.float64) / 255
  grey = rgb @ np.array([0.299, 0.587, 0.114])
  red_green, blue_yellow = rgb[..., 0] - rgb[..., 1], rgb[..., 2] - rgb[..., :2].mean(-1)
  colour = [channel.reshape(len(rgb), -1) for channel in (red_green, blue_yellow)]
  parts = [
    _first_order(grey),
    _co_occurrence(grey),
    _laplacian_of_gaussian(grey),
    _haar(grey),
    _spectrum(grey),
    _coarse_map(grey),
    np.stack([stat for c in colour for stat in (c.mean(1), c.std(1))], axis=1),
  ]
  return np.concatenate(parts, axis=1)


def _log(values: np.ndarray) -> np.ndarray:
  return np.log10(values + RADIOMICS["log_floor"])


def _first_order(grey: np.ndarray) -> np.ndarray:
  """Mean, sd, skewness, kurtosis, percentiles, histogram entropy in bits: [N, 10]."""
  flat = grey.reshape(len(grey), -1)
  mean, sd = flat.mean(1), flat.std(1)
  z = (flat - mean[:, None]) / np.maximum(sd, 1e-6)[:, None]
  bins = np.minimum((flat * RADIOMICS["histogram_bins"]).astype(np.int64), RADIOMICS["histogram_bins"] - 1)
  share = _counts(bins, RADIOMICS["histogram_bins"]) / flat.shape[1]
  percentiles = np.percentile(flat, RADIOMICS["percentiles"], axis=1)
  return np.stack([mean, sd, (z**3).mean(1), (z**4).mean(1), *percentiles, _entropy(share)], axis=1)


def _co_occurrence(grey: np.ndarray) -> np.ndarray:
  """Haralick's contrast, correlation, energy, homogeneity, entropy per distance, over four directions: [N, 10]."""
  levels = RADIOMICS["glcm_levels"]
  quantised = np.minimum((grey * levels).astype(np.int64), levels - 1)
  height, width = grey.shape[1:]
  row, column = np.meshgrid(np.arange(levels), np.arange(levels), indexing="ij")
  parts = []
  for distance in RADIOMICS["glcm_distances"]:
    counts = 0
    for down, right in ((0, distance), (distance, 0), (distance, distance), (distance, -distance)):
      rows, left = height - down, max(0, -right)
      here = quantised[:, :rows, left : width - max(0, right)]
      there = quantised[:, down:, left + right : width + min(0, right)]
      counts = counts + _counts((here * levels + there).reshape(len(grey), -1), levels * levels)
    share = counts.reshape(len(grey), levels, levels)
    share = share + share.transpose(0, 2, 1)
    share = share / share.sum((1, 2), keepdims=True)
    mean = (share * row).sum((1, 2))
    variance = (share * row**2).sum((1, 2)) - mean**2
    covariance = (share * row * column).sum((1, 2)) - mean**2
    parts += [
      (share * (row - column) ** 2).sum((1, 2)),
      np.where(variance > 1e-9, covariance / np.maximum(variance, 1e-9), 1.0),
      (share**2).sum((1, 2)),
      (share / (1 + np.abs(row - column))).sum((1, 2)),
      _entropy(share.reshape(len(grey), -1)),
    ]
  return np.stack(parts, axis=1)


def _laplacian_of_gaussian(grey: np.ndarray) -> np.ndarray:
  """log10 mean square and skewness of the response at each sigma (pixels of a 64 px image): [N, 6]."""
  parts = []
  for sigma in RADIOMICS["log_sigmas"]:
    widths = (0, *[sigma * side / 64 for side in grey.shape[1:]])
    response = sum(ndimage.gaussian_filter(grey, widths, order=order) for order in ((0, 2, 0), (0, 0, 2)))
    response = response.reshape(len(grey), -1)
    centred = response - response.mean(1, keepdims=True)
    parts += [_log((response**2).mean(1)), (centred**3).mean(1) / np.maximum(centred.std(1), 1e-4) ** 3]
  return np.stack(parts, axis=1)


def _haar(grey: np.ndarray) -> np.ndarray:
  """log10 energy of the horizontal, vertical and diagonal Haar bands of each level: [N, 9]."""
  parts, low = [], grey
  for _ in range(RADIOMICS["haar_levels"]):
    low = low[:, : low.shape[1] // 2 * 2, : low.shape[2] // 2 * 2]
    a, b, c, d = low[:, ::2, ::2], low[:, ::2, 1::2], low[:, 1::2, ::2], low[:, 1::2, 1::2]
    parts += [_log((band**2).mean((1, 2)) / 4) for band in (a - b + c - d, a + b - c - d, a - b - c + d)]
    low = (a + b + c + d) / 2
  return np.stack(parts, axis=1)


def _spectrum(grey: np.ndarray) -> np.ndarray:
  """log10 mean power of the Hann-windowed image in rings of equal log width, 1 cycle an image to Nyquist: [N, 8]."""
  size = grey.shape[1]
  window = np.hanning(size)[:, None] * np.hanning(size)
  power = np.abs(np.fft.fft2((grey - grey.mean((1, 2), keepdims=True)) * window)) ** 2 / size**2
  frequency = np.fft.fftfreq(size) * size
  radius = np.hypot(frequency[:, None], frequency)
  edges = np.geomspace(1, size / 2, RADIOMICS["spectrum_bands"] + 1)
  edges[-1] = np.inf
  rings = [(radius >= low) & (radius < high) for low, high in itertools.pairwise(edges)]
  # At small sizes the first rings may hold no frequency; they are then constant and the standardisation drops them.
  return np.stack([_log(power[:, ring].mean(1)) if ring.any() else np.zeros(len(grey)) for ring in rings], axis=1)


def _coarse_map(grey: np.ndarray) -> np.ndarray:
  """Mean intensity of a 4 x 4 grid: where things are, [N, 16]."""
  side = RADIOMICS["map_side"]
  edges = np.linspace(0, grey.shape[1], side + 1).round().astype(int)
  tiles = [grey[:, a:b, c:d].mean((1, 2)) for a, b in itertools.pairwise(edges) for c, d in itertools.pairwise(edges)]
  return np.stack(tiles, axis=1)


def _counts(codes: np.ndarray, size: int) -> np.ndarray:
  """Histogram of each row of integer codes [N, P] in [0, size): float64 [N, size]."""
  offsets = np.arange(len(codes))[:, None] * size
  return np.bincount((codes + offsets).ravel(), minlength=len(codes) * size).reshape(len(codes), size).astype(float)


def _entropy(share: np.ndarray) -> np.ndarray:
  """Shannon entropy of each row in bits."""
  return -(share * np.log2(np.where(share > 0, share, 1))).sum(1)


def _random_conv() -> Extractor:
  weights = _random_weights()
  digest = hashlib.sha256(b"".join(w.tobytes() for w in weights)).hexdigest()
  layers = "-".join(str(c) for c in RANDOM_CONV["channels"])
  program = jax.jit(_convolve)
  return Extractor(
    name=f"random-conv{len(RANDOM_CONV['channels'])}-{RANDOM_CONV['channels'][-1]}-seed{RANDOM_CONV['seed']}",
    sha256=digest,
    note=f"untrained 3x3 convolutions of stride 2, {layers} channels, He-normal weights, ReLU, spatial mean: a smoke"
    " metric that notices gross differences, not for claims",
    extract=lambda images: in_batches(lambda batch: program(weights, batch), images),
  )


def _random_weights() -> list[np.ndarray]:
  """He-normal kernels HWIO, float32, from NumPy's generator: the same on every platform."""
  rng, kernel, fan = np.random.default_rng(RANDOM_CONV["seed"]), RANDOM_CONV["kernel"], 3
  weights = []
  for channels in RANDOM_CONV["channels"]:
    scale = np.sqrt(2 / (kernel * kernel * fan))
    weights.append((rng.standard_normal((kernel, kernel, fan, channels)) * scale).astype(np.float32))
    fan = channels
  return weights


def _convolve(weights: list[jax.Array], images: jax.Array) -> jax.Array:
  """uint8 [N, H, W, 3] to float32 [N, channels[-1]]: strided convolutions, ReLU, spatial mean."""
  x = images.astype(jnp.float32) / 127.5 - 1
  stride = (RANDOM_CONV["stride"],) * 2
  for kernel in weights:
    x = jax.nn.relu(
      jax.lax.conv_general_dilated(
        x,
        kernel,
        stride,
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
      )
    )
  return x.mean((1, 2))


REGISTRY: dict[str, Callable[[], Extractor]] = {"radiomics": _radiomics, "random-conv": _random_conv}
