"""The figures of the data card as SVG: a histogram of each continuous attribute, and findings by attribute level."""

import html
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compdiff_jax.conditioning.schema import Attribute, Schema

_INK, _MUTED, _LINE, _BAR = "#1d2125", "#646b73", "#e2e5e9", (31, 95, 168)
_MAX_BARS, _MAX_FINDINGS = 30, 30
_CELL, _ROW = 64, 24

Rows = Sequence[Mapping[str, Any]]


def histogram(attribute: Attribute, values: np.ndarray) -> str:
  """Images by value of a continuous attribute; bars are one round step wide, unknown values are counted aside."""
  known = np.asarray(values, np.float64)[np.isfinite(values)]
  step = _step(attribute.high - attribute.low)
  edges = np.arange(math.floor(attribute.low / step), math.ceil(attribute.high / step) + 1) * step
  # The last bar is closed: a value at the upper end belongs to it.
  counts, _ = np.histogram(known, edges)
  left, top, plot_width, plot_height = 56, 12, 620, 180
  width, height = left + plot_width + 16, top + plot_height + 48
  tallest = max(int(counts.max(initial=0)), 1)
  bar = plot_width / len(counts)
  parts = [_open(width, height, f"images by {attribute.name}")]
  for share in (0, 0.5, 1):
    y = top + plot_height * (1 - share)
    parts.append(f'<line x1="{left}" x2="{left + plot_width}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_LINE}"/>')
    parts.append(_text(left - 8, y + 4, f"{share * tallest:g}", _MUTED, "end"))
  for i, count in enumerate(counts):
    size = plot_height * count / tallest
    parts.append(
      f'<rect x="{left + i * bar + 1:.1f}" y="{top + plot_height - size:.1f}" width="{bar - 2:.1f}" height="{size:.1f}"'
      f' fill="rgb{_BAR}"><title>{edges[i]:g}-{edges[i + 1]:g}: {count}</title></rect>'
    )
  for i in range(0, len(edges), max(1, len(edges) // 10)):
    parts.append(_text(left + i * bar, top + plot_height + 18, f"{edges[i]:g}", _MUTED, "middle"))
  unit = f" ({attribute.unit})" if attribute.unit else ""
  note = f"{attribute.name}{unit}; n = {len(known)}, unknown {len(values) - len(known)}"
  parts.append(_text(left + plot_width / 2, height - 8, note, _INK, "middle"))
  return "".join(parts) + "</svg>\n"


def heat_map(schema: Schema, rows: Rows) -> str:
  """Share of images with each finding, by attribute level; empty text when there are no findings.

  A cell says in how many of 100 images of the level the finding is positive; a level without images stays white.
  """
  findings = [json.loads(row["findings"]) for row in rows]
  totals = Counter(name for found in findings for name, state in found.items() if state == "positive")
  names = [name for name, _ in totals.most_common(_MAX_FINDINGS)]
  if not names:
    return ""
  positive = np.array([[found.get(name) == "positive" for name in names] for found in findings])
  columns = []
  for a in schema.grouping:
    levels = a.levels(np.array([row["attributes"][a.name] for row in rows], a.dtype))
    columns += [(a.name, level, positive[levels == i]) for i, level in enumerate(a.level_names)]
  left, top = 12 + 7 * max(map(len, names)), 64
  width, height = left + _CELL * len(columns) + 16, top + _ROW * len(names) + 16
  parts = [_open(width, height, "findings by attribute level, percent of images")]
  for i, (attribute, level, members) in enumerate(columns):
    x = left + _CELL * (i + 0.5)
    if not i or columns[i - 1][0] != attribute:
      parts.append(_text(x - _CELL / 2 + 2, 16, attribute, _INK))
    parts.append(_text(x, 36, _fit(level), _INK, "middle"))
    parts.append(_text(x, 54, f"n {len(members)}", _MUTED, "middle"))
    for j, name in enumerate(names):
      y = top + _ROW * j
      share = members[:, j].mean() if len(members) else None
      colour = "white" if share is None else _shade(share)
      where = html.escape(f"{name}, {attribute} {level}")
      parts.append(
        f'<rect x="{x - _CELL / 2 + 1:.1f}" y="{y + 1}" width="{_CELL - 2}" height="{_ROW - 2}" fill="{colour}"'
        f' stroke="{_LINE}"><title>{where}: {int(members[:, j].sum())} of {len(members)}</title></rect>'
      )
      if share is not None:
        ink = "white" if share > 0.55 else _INK
        parts.append(_text(x, y + 16, f"{100 * share:.0f}", ink, "middle"))
  parts += [_text(left - 8, top + _ROW * j + 16, name, _INK, "end") for j, name in enumerate(names)]
  return "".join(parts) + "</svg>\n"


def _step(span: float) -> float:
  """The smallest of 1, 2, 5 times a power of ten that needs at most 30 bars."""
  power = 10 ** math.floor(math.log10(span / _MAX_BARS))
  return next(m * power for m in (1, 2, 5, 10, 20) if span / (m * power) <= _MAX_BARS)


def _shade(share: float) -> str:
  return f"rgb{tuple(round(255 + (end - 255) * share) for end in _BAR)}"


def _fit(label: str) -> str:
  return label if len(label) <= 9 else label[:8] + "…"


def _open(width: float, height: float, title: str) -> str:
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}"'
    f' font-family="system-ui, DejaVu Sans, sans-serif" font-size="12" role="img"><title>{html.escape(title)}</title>'
    f'<rect width="100%" height="100%" fill="white"/>'
  )


def _text(x: float, y: float, text: str, colour: str, anchor: str = "start") -> str:
  return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{html.escape(str(text))}</text>'
