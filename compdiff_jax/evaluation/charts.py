"""The report's two charts as inline SVG: intervals per group, and distance against training share."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

_WIDTH, _LABELS, _ROW, _RIGHT = 860, 250, 22, 96
_HELD_OUT_SIDE = 60


def number(value: float) -> str:
  """A number for readers: about three significant digits, no exponent unless it is very small."""
  size = abs(value)
  if not size:
    return "0"
  if size >= 100:
    return f"{value:.0f}"
  if size >= 10:
    return f"{value:.1f}"
  if size >= 1:
    return f"{value:.2f}"
  if size >= 0.0005:
    return f"{value:.4f}" if size < 0.1 else f"{value:.3f}"
  return f"{value:.1e}"


def ticks(low: float, high: float) -> list[float]:
  """About five round numbers that cover [low, high]."""
  step = (high - low) / 5
  power = 10 ** math.floor(math.log10(step))
  step = next(m * power for m in (1, 2, 5, 10) if m * power >= step)
  return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def intervals(rows: Sequence[Mapping[str, Any]], axis: str) -> str:
  """Per row a dot with its interval over the grey real-versus-real band; a row without a value is hatched.

  Rows: {label, held_out, note} and either {value, lo, hi, null_lo, null_hi (may be None)} or {refusal}.
  """
  known = [row for row in rows if "value" in row]
  ends = [row[k] for row in known for k in ("lo", "hi", "value", "null_lo", "null_hi") if row[k] is not None]
  low, high = min([0.0, *ends]), max([0.0, *ends])
  margin = (high - low or 1.0) * 0.04
  low, high = low - margin, high + margin
  height = _ROW * len(rows) + 44
  right = _WIDTH - _RIGHT

  def x(value: float) -> float:
    return _LABELS + (value - low) / (high - low) * (right - _LABELS)

  parts = [_open(_WIDTH, height, axis)]
  bottom = _ROW * len(rows) + 4
  for tick in ticks(low, high):
    parts.append(f'<line x1="{x(tick):.1f}" y1="2" x2="{x(tick):.1f}" y2="{bottom}" class="gridline"/>')
    parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 15}" class="tick" text-anchor="middle">{number(tick)}</text>')
  parts.append(f'<line x1="{x(0):.1f}" y1="2" x2="{x(0):.1f}" y2="{bottom}" class="zero"/>')
  for i, row in enumerate(rows):
    y = _ROW * i + _ROW / 2 + 2
    kind = "held" if row["held_out"] else "synth"
    label = html.escape(row["label"]) + (" ◆" if row["held_out"] else "")
    parts.append(f'<text x="{_LABELS - 10}" y="{y + 4}" text-anchor="end" class="label {kind}-text">{label}</text>')
    if "value" in row:
      if row["null_lo"] is not None:
        width = max(x(row["null_hi"]) - x(row["null_lo"]), 1)
        parts.append(f'<rect x="{x(row["null_lo"]):.1f}" y="{y - 7}" width="{width:.1f}" height="14" class="null"/>')
      parts.append(f'<line x1="{x(row["lo"]):.1f}" y1="{y}" x2="{x(row["hi"]):.1f}" y2="{y}" class="bar {kind}"/>')
      parts.append(f'<circle cx="{x(row["value"]):.1f}" cy="{y}" r="4" class="dot {kind}"/>')
      note = row["note"]
    else:
      parts.append(f'<rect x="{_LABELS}" y="{y - 6}" width="{right - _LABELS}" height="12" fill="url(#hatch)"/>')
      note = "not evaluable"
    parts.append(f'<text x="{right + 10}" y="{y + 4}" class="tick">{html.escape(note)}</text>')
  middle = (_LABELS + right) / 2
  parts.append(
    f'<text x="{middle}" y="{height - 6}" class="tick" text-anchor="middle">{html.escape(axis)}</text></svg>'
  )
  return "".join(parts)


def share_scatter(points: Sequence[Mapping[str, Any]], total: int, axis: str) -> str:
  """Distance with interval against the group's share of the training images (log scale); unseen groups at the left.

  Points: {label, held_out, n_train, value, lo, hi}; `total` is the number of training images.
  """
  height, left, top, bottom, right = 340, 70, 14, 44, 20
  ends = [p[k] for p in points for k in ("lo", "hi")]
  low, high = min([0.0, *ends]), max([0.0, *ends])
  margin = (high - low or 1.0) * 0.06
  low, high = low - margin, high + margin
  seen = [p["n_train"] / total for p in points if p["n_train"]]
  first = math.log10(min(seen, default=0.01)) - 0.1
  last = math.log10(max(seen, default=1.0)) + 0.1
  start = left + _HELD_OUT_SIDE

  def x(share: float) -> float:
    if not share:
      return left + _HELD_OUT_SIDE / 2
    return start + (math.log10(share) - first) / (last - first) * (_WIDTH - right - start)

  def y(value: float) -> float:
    return height - bottom - (value - low) / (high - low) * (height - bottom - top)

  parts = [_open(_WIDTH, height, axis)]
  for tick in ticks(low, high):
    parts.append(f'<line x1="{left}" y1="{y(tick):.1f}" x2="{_WIDTH - right}" y2="{y(tick):.1f}" class="gridline"/>')
    parts.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" class="tick" text-anchor="end">{number(tick)}</text>')
  parts.append(f'<line x1="{left}" y1="{y(0):.1f}" x2="{_WIDTH - right}" y2="{y(0):.1f}" class="zero"/>')
  parts.append(f'<line x1="{start}" y1="{top}" x2="{start}" y2="{height - bottom}" class="gridline"/>')
  base = height - bottom + 16
  parts.append(f'<text x="{x(0)}" y="{base}" class="tick held-text" text-anchor="middle">0 (unseen)</text>')
  for power in range(math.floor(first), math.ceil(last) + 1):
    for share in (10.0**power * m for m in (1, 2, 5)):
      if first <= math.log10(share) <= last:
        text = f"{100 * share:g} %"
        parts.append(f'<text x="{x(share):.1f}" y="{base}" class="tick" text-anchor="middle">{text}</text>')
  for p in points:
    at, kind = x(p["n_train"] / total), "held" if p["held_out"] else "synth"
    title = html.escape(f"{p['label']}: {number(p['value'])} ({number(p['lo'])} to {number(p['hi'])})")
    parts.append(f'<g><title>{title}</title><line x1="{at:.1f}" y1="{y(p["lo"]):.1f}" x2="{at:.1f}"')
    parts.append(f' y2="{y(p["hi"]):.1f}" class="bar {kind}"/>')
    parts.append(f'<circle cx="{at:.1f}" cy="{y(p["value"]):.1f}" r="4" class="dot {kind}"/></g>')
  middle = (start + _WIDTH - right) / 2
  parts.append(f'<text x="{middle}" y="{height - 8}" class="tick" text-anchor="middle">share of training images</text>')
  side = (height - bottom + top) / 2
  parts.append(
    f'<text transform="translate(16 {side}) rotate(-90)" class="tick" text-anchor="middle">{html.escape(axis)}</text>'
  )
  return "".join([*parts, "</svg>"])


def _open(width: int, height: int, title: str) -> str:
  hatch = (
    '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="6" height="6" fill="#f4f4f4"/><line x1="0" y1="0" x2="0" y2="6" stroke="#cfcfcf" stroke-width="2"/>'
    "</pattern></defs>"
  )
  return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">{hatch}'
