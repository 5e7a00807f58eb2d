"""Writes the report: `report.json`, `tables/*.csv` in long format and the self-contained `report.html`."""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compdiff_jax.cli import writing
from compdiff_jax.evaluation import page
from compdiff_jax.evaluation.image_sets import ImageSet

COLUMNS = (
  "metric",
  "extractor",
  "split",
  "group",
  "kind",
  "held_out",
  "value",
  "lo",
  "hi",
  "n_real",
  "n_synthetic",
  "n_train",
  "null_mean",
  "null_lo",
  "null_hi",
  "null_group",
  "status",
)
_DIGITS = 7


def write(
  directory: Path,
  results: Mapping[str, Any],
  *,
  real: ImageSet,
  synthetic: ImageSet,
  train: ImageSet,
  pictures: Mapping[str, str],
) -> dict[str, Any]:
  """Writes everything into `directory` and returns the results as written: rounded, with the `headline` block.

  Args:
    directory: an existing directory.
    results: blocks of `evaluate.evaluate_sets` plus `run`.
    real, synthetic, train: the sets, for the pictures; `train` may be the reduced one of the copy check.
    pictures: further pictures to show, {heading: data URI}.
  """
  results = rounded({**results, "headline": headline(results)})
  with writing(directory):
    (directory / "report.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (directory / "tables").mkdir()
    for name, rows in (("fidelity", _fidelity_rows(results)), ("alignment", _alignment_rows(results))):
      _write_table(directory / "tables" / f"{name}.csv", rows)
    _write_table(directory / "tables" / "copies.csv", _copy_rows(results))
    html = page.render(results, real, synthetic, train, pictures)
    (directory / "report.html").write_text(html, encoding="utf-8")
  return results


def rounded(value: Any) -> Any:
  """Plain data with floats to 7 significant digits, so that a report does not show reduction order."""
  if isinstance(value, Mapping):
    return {key: rounded(entry) for key, entry in value.items()}
  if isinstance(value, (list, tuple)):
    return [rounded(entry) for entry in value]
  if isinstance(value, float):
    if not math.isfinite(value):
      raise ValueError("a result is not finite")
    return float(f"{value:.{_DIGITS}g}")
  return value


def headline(results: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The short table: measure, group, value with interval, reference with interval and what it is, n, status."""
  rows = []
  labels = [e["label"] for e in results["extractors"]]
  groups = [g for g in results["groups"] if g["kind"] in ("overall", "held-out")]
  for label in labels:
    for group in groups:
      rows.append(_headline_kid(label, group))
      if group["kind"] == "overall":
        rows.append(_headline_fd(label, group))
  if results["alignment"]["status"] == "ok":
    for group in results["alignment"]["groups"]:
      if group["kind"] in ("overall", "held-out"):
        rows += [_headline_alignment(name, group["group"], sides) for name, sides in group["measures"].items()]
  copies = results["neighbours"]
  if copies:
    rows += [_headline_copies(copies, group) for group in groups]
  return rows


def _headline_row(
  distance: str, label: str, group: Mapping[str, Any]
) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
  """The row of a distance in a group, and its figures; without figures the row says why."""
  row = {"measure": f"{distance.upper()} [{label}]", "group": group["group"]}
  row.update(n_real=group["n_real"], n_synthetic=group["n_synthetic"])
  scores = group["fidelity"].get(label, {}).get(distance)
  if scores is None:
    row["status"] = group["refusal"] or "failed"
  return row, scores


def _headline_kid(label: str, group: Mapping[str, Any]) -> dict[str, Any]:
  row, scores = _headline_row("kid", label, group)
  if scores is None:
    return row
  row.update(value=scores["value"], lo=scores["lo"], hi=scores["hi"])
  null, matched = scores["null"], scores["matched"]
  if "mean" in null:
    row.update(reference=null["mean"], reference_lo=null["lo"], reference_hi=null["hi"])
    mean, low, high = (page.number(matched[end]) for end in ("mean", "lo", "hi"))
    row["reference_name"] = (
      f"real vs real ({null['group']}) at n={null['n']}, where synthetic has {mean}, {low} to {high}"
    )
  else:
    row["reference_name"] = null["reason"]
  return row


def _headline_fd(label: str, group: Mapping[str, Any]) -> dict[str, Any]:
  row, scores = _headline_row("fd", label, group)
  if scores is None:
    return row
  row.update(value=scores["value"], reference=scores["null_bias"], reference_name="expected from n alone")
  if scores["rank_deficient"]:
    row["status"] = f"rank deficient (d={scores['d']})"
  return row


def _headline_alignment(name: str, group: str, sides: Mapping[str, Any]) -> dict[str, Any]:
  synthetic, real = sides["synthetic"], sides["real"]
  row = {"measure": name, "group": group}
  if "value" in synthetic:
    row.update(value=synthetic["value"], lo=synthetic["lo"], hi=synthetic["hi"], n_synthetic=synthetic["n"])
  else:
    row["status"] = synthetic["refusal"]
  if "value" in real:
    row.update(reference=real["value"], reference_lo=real["lo"], reference_hi=real["hi"], n_real=real["n"])
    row["reference_name"] = "same reader, real test images"
  else:
    row["reference_name"] = f"real: {real['refusal']}"
  return row


def _headline_copies(copies: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
  row = {"measure": "share below the 1 % copy distance", "group": group["group"]}
  row.update(n_real=copies["n_real"], n_synthetic=group["n_synthetic"])
  refusal = _copy_refusal(copies, group)
  if refusal:
    return {**row, "status": refusal}
  share = copies["below"][group["group"]]["value"]
  return {**row, "value": share, "reference": copies["real"]["value"], "reference_name": "held-out real images"}


def _copy_refusal(copies: Mapping[str, Any], group: Mapping[str, Any]) -> str:
  """Why a group has no share of copies, else ""."""
  return group["refusal"] if copies["status"] == "ok" else copies["status"]


def printed_table(results: Mapping[str, Any]) -> str:
  """The headline of the ranking extractor as aligned text."""
  other = [e["label"] for e in results["extractors"][1:]]
  lines = [("measure", "group", "value", "95 % interval", "reference")]
  for row in results["headline"]:
    if any(label in row["measure"] for label in other):
      continue
    if "value" in row:
      value = ", ".join(filter(None, (page.number(row["value"]), row.get("status"))))
      interval = f"{page.number(row['lo'])} to {page.number(row['hi'])}" if "lo" in row else ""
    else:
      value, interval = row["status"], ""
    reference = row.get("reference_name", "")
    if "reference_lo" in row:
      bounds = f"{page.number(row['reference_lo'])} to {page.number(row['reference_hi'])}"
      reference = f"{page.number(row['reference'])} ({bounds}; {reference})"
    elif "reference" in row:
      reference = f"{page.number(row['reference'])} ({reference})"
    lines.append((row["measure"].split("@")[0] + ("]" if "@" in row["measure"] else ""), row["group"], value))
    lines[-1] += (interval, reference)
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
  counts = f"{len(results['warnings'])} warnings, {len(results['failures'])} failures"
  return "\n".join([*text, f"{len(results['refused'])} groups not evaluable, {counts}"])


def _fidelity_rows(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
  for label in [e["label"] for e in results["extractors"]]:
    for group in results["groups"]:
      row = {k: group[k] for k in ("group", "kind", "held_out", "n_real", "n_synthetic", "n_train")}
      row.update(extractor=label, split=results["inputs"]["real"]["split"])
      scores = group["fidelity"].get(label)
      if scores is None:
        yield from ({**row, "metric": metric, "status": group["refusal"] or "failed"} for metric in ("kid", "fd"))
        continue
      kid, matched, fd = scores["kid"], scores["kid"]["matched"], scores["fd"]
      yield {**row, "metric": "kid", **{k: kid[k] for k in ("value", "lo", "hi")}, "status": "ok"}
      null = {f"null_{k}": kid["null"].get(k, "") for k in ("mean", "lo", "hi", "group")}
      bounds = {"value": matched["mean"], "lo": matched["lo"], "hi": matched["hi"]}
      yield {**row, "metric": f"kid at n={matched['n']}", **bounds, **null, "status": kid["null"].get("reason", "ok")}
      status = f"rank deficient (d={fd['d']})" if fd["rank_deficient"] else "ok"
      yield {**row, "metric": "fd", "value": fd["value"], "null_mean": fd["null_bias"], "status": status}


def _alignment_rows(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
  """One row a side: `split` is "synthetic" or the real split, and the n of that side is filled in."""
  if results["alignment"]["status"] != "ok":
    return
  for group in results["alignment"]["groups"]:
    for metric, sides in group["measures"].items():
      for side, scores in sides.items():
        row = {"metric": metric, "group": group["group"], "kind": group["kind"], "held_out": group["held_out"]}
        row["split"] = "synthetic" if side == "synthetic" else results["inputs"]["real"]["split"]
        row["status"] = scores.get("refusal", "ok")
        row.update({k: scores[k] for k in ("value", "lo", "hi") if k in scores})
        if "n" in scores:
          row[f"n_{side}"] = scores["n"]
        yield row


def _copy_rows(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
  copies = results["neighbours"]
  if not copies:
    return
  base = {"extractor": copies["space"], "n_real": copies["n_real"], "n_train": copies["n_train"]}
  for group in results["groups"]:
    row = {**base, "metric": "share below the 1 % distance of real", "split": "synthetic"}
    row.update({k: group[k] for k in ("group", "kind", "held_out", "n_synthetic")})
    refusal = _copy_refusal(copies, group)
    if refusal:
      row["status"] = refusal
    else:
      share = copies["below"][group["group"]]["value"]
      row.update(value=share, null_mean=copies["real"]["value"], status="ok")
    yield row
  for side, quantiles in copies["quantiles"].items():
    split = "synthetic" if side == "synthetic" else results["inputs"]["real"]["split"]
    for quantile, value in quantiles.items():
      row = {**base, "metric": f"distance to training, quantile {quantile}", "split": split, "group": "overall"}
      yield {**row, "value": value, "n_synthetic": copies["n_synthetic"], "status": "ok"}


def _write_table(path: Path, rows: Iterator[dict[str, Any]]) -> None:
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
