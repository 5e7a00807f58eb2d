"""`report.html`: one file, readable without JavaScript, that asks nothing of the network."""

import base64
import html
import io
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from compdiff_jax.cli import InputError
from compdiff_jax.evaluation import charts
from compdiff_jax.evaluation.charts import number
from compdiff_jax.evaluation.image_sets import ImageSet

_SHOWN = 16
_SHOWN_SIDE = 128
_KEY = (
  '<p class="key"><i style="background:var(--synth)"></i>synthetic <i style="background:var(--held)"></i>synthetic,'
  ' combination held out of training ◆ <i style="background:var(--null);border-radius:0"></i>real against real</p>'
)


def render(
  results: Mapping[str, Any],
  real: ImageSet,
  synthetic: ImageSet,
  train: ImageSet,
  pictures: Mapping[str, str],
) -> str:
  """The whole page. `results` is what `report.json` holds; `pictures` are {heading: data URI} from `read_picture`."""
  title = f"{synthetic.name} against {real.name}"
  sections = [
    _opening(results, title),
    _headline(results),
    _pictures(results, real, synthetic, pictures),
    _groups(results),
    _alignment(results),
    _copies(results, synthetic, train),
    _inputs(results),
  ]
  template = string.Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
  return template.substitute(title=html.escape(title), body="\n".join(sections))


def _opening(results: Mapping[str, Any], title: str) -> str:
  inputs = results["inputs"]
  real, synthetic, train = inputs["real"], inputs["synthetic"], inputs["train"]
  lead = (
    f"{synthetic['images']:,} synthetic images compared with {real['images']:,} real images of {real['patients']:,}"
    f" patients (split {real['split']}, not seen in training) of the data set {real['name']}; the training split holds"
    f" {train['total']:,} images. Evaluated {results['run']['date'].replace('T', ' ').replace('+00:00', ' UTC')}."
  )
  real_images = (
    f"This file holds real images of {real['name']}, test and training images both. Do not publish it where the licence"
    " of these data forbids that."
  )
  parts = [f'<h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>']
  parts.append(f'<div class="warn">{html.escape(real_images)}</div>')
  refused = len(results["refused"])
  absent = [f"{refused} of {len(results['groups'])} groups have too few images and carry no number"] if refused else []
  if results["alignment"]["status"] != "ok":
    absent.append(f"attribute fidelity: {results['alignment']['reason']}")
  if absent:
    parts.append(f"<p>Not evaluated: {html.escape('; '.join(absent))}.</p>")
  for warning in results["warnings"]:
    parts.append(f'<div class="warn">{html.escape(warning)}</div>')
  for failure in results["failures"]:
    parts.append(f'<div class="warn">Failed: {html.escape(failure["block"])}: {html.escape(failure["reason"])}</div>')
  return "".join(parts)


def _headline(results: Mapping[str, Any]) -> str:
  rows = []
  for row in results["headline"]:
    if "value" in row:
      value = _cell(f"{number(row['value'])} {_bounds(row.get('lo'), row.get('hi'))}{_aside(row.get('status'))}")
    else:
      value = _cell(html.escape(row["status"]), "na")
    reference = html.escape(row.get("reference_name", ""))
    if "reference" in row:
      bounds = _bounds(row.get("reference_lo"), row.get("reference_hi"))
      reference = f'{number(row["reference"])} {bounds} <span class="ci">{reference}</span>'
    counts = [_cell(f"{row[key]:,}" if key in row else "", "n") for key in ("n_synthetic", "n_real")]
    rows.append([_cell(html.escape(row["measure"])), _cell(_held(row["group"])), value, _cell(reference), *counts])
  head = ("Measure", "Group", "Synthetic [95 % interval]", "Reference", "n synthetic", "n real")
  return (
    "<h2>Summary</h2>"
    + _table(head, rows, right=(4, 5))
    + '<p class="note">KID: unbiased squared MMD with a cubic kernel, 0 in expectation for equal distributions, so it'
    " may be negative; its interval comes from half-samples. FD: Fréchet distance; it grows as n falls, the reference"
    " says how much of it n alone explains (first order). An interval reflects sampling of images, not of training"
    " runs.</p>"
  )


def _pictures(results: Mapping[str, Any], real: ImageSet, synthetic: ImageSet, pictures: Mapping[str, str]) -> str:
  seed = results["inputs"]["seed"]
  parts = [
    f'<h2>Images</h2><p class="note">Drawn at random with seed {seed}, not selected; real ones from the split'
    f" {html.escape(real.split)}.</p>",
    _panels(real, synthetic, np.arange(len(real)), np.arange(len(synthetic)), seed, _SHOWN),
  ]
  cells = [real.schema.parse_cell(text) for text in results["inputs"]["held_out"]]
  if cells:
    rows = [
      np.flatnonzero(np.logical_or.reduce([real.schema.in_cell(s.attributes, c) for c in cells]))
      for s in (real, synthetic)
    ]
    names = "; ".join(results["inputs"]["held_out"])
    parts.append(f'<h3 class="held-text">Held out of training ◆ {html.escape(names)}</h3>')
    parts.append(_panels(real, synthetic, *rows, seed, _SHOWN // 2))
  for heading, uri in pictures.items():
    parts.append(f'<h3>{html.escape(heading)}</h3><img class="wide" src="{uri}" alt="{html.escape(heading)}">')
  return "".join(parts)


def _panels(
  real: ImageSet, synthetic: ImageSet, real_rows: np.ndarray, synthetic_rows: np.ndarray, seed: int, count: int
) -> str:
  panels = []
  for label, images, rows in (("Real", real, real_rows), ("Synthetic", synthetic, synthetic_rows)):
    shown = np.sort(np.random.default_rng(seed).permutation(rows)[:count])
    tiles = [_figure(images.images[i], _caption(images, i)) for i in shown]
    panels.append(f'<div><h3>{label}</h3><div class="sheet">{"".join(tiles) or "none"}</div></div>')
  return f'<div class="panels">{"".join(panels)}</div>'


def _caption(images: ImageSet, i: int) -> str:
  values = [f"{a.decode(images.attributes[a.name][i]) or '?'}" for a in images.schema]
  text = html.escape(str(images.texts[i]))
  return f'<b>{html.escape(", ".join(values))}</b><span class="clip" title="{text}">{text}</span>'


def _groups(results: Mapping[str, Any]) -> str:
  extractors = [e["label"] for e in results["extractors"]]
  if not extractors:
    return ""
  first, rows = extractors[0], results["groups"]
  parts = [
    "<h2>Fidelity by group and intersection</h2>",
    "<p>Groups of one kind are compared at one sample size n*, two fifths of the smallest evaluable group, at most one"
    " image a real patient. The grey band is what two draws of n* real images of different patients give. The cubic"
    " kernel is not translation invariant: a group far from the training mean shows a larger KID for the same defect."
    " FD is of all images of a group and grows as their number falls: it cannot be compared across groups.</p>",
  ]
  for kind, title in (("attribute", "Attribute values"), ("pair", "Pairs"), ("cell", "Full intersections")):
    of_kind = [row for row in rows if row["kind"] == kind]
    if not of_kind:
      continue
    evaluable = [row for row in of_kind if first in row["fidelity"]]
    size = results["matched_sizes"].get(kind)
    parts.append(f"<h3>{title}: {len(evaluable)} of {len(of_kind)} evaluable</h3>")
    if evaluable and kind != "pair":
      shown = of_kind if kind == "attribute" else evaluable
      chart = charts.intervals([_chart_row(row, first) for row in shown], f"KID [{first}] at n* = {size} images a side")
      parts.append(_KEY + chart)
    tables = "".join(f'<p class="note">{html.escape(label)}</p>{_group_table(of_kind, label)}' for label in extractors)
    summary = f"Table: {len(of_kind)} groups, {len(extractors)} extractors"
    parts.append(f"<details{' open' if kind == 'attribute' else ''}><summary>{summary}</summary>{tables}</details>")
  return "".join([*parts, _share_chart(results, first)])


def _share_chart(results: Mapping[str, Any], label: str) -> str:
  """KID against training share for the finest kind of group with at least three evaluable members."""
  for kind in ("cell", "pair", "attribute"):
    rows = [row for row in results["groups"] if row["kind"] == kind and label in row["fidelity"]]
    if len(rows) >= 3:
      points = []
      for row in rows:
        matched = row["fidelity"][label]["kid"]["matched"]
        point = {"label": row["group"], "held_out": row["held_out"], "n_train": row["n_train"]}
        points.append({**point, "value": matched["mean"], "lo": matched["lo"], "hi": matched["hi"]})
      total = results["inputs"]["train"]["images"]
      axis = f"KID at n* = {results['matched_sizes'][kind]}"
      title = {"cell": "full intersections", "pair": "pairs of attribute values", "attribute": "attribute values"}[kind]
      return f"<h3>Distance against training share, {title}</h3>{charts.share_scatter(points, total, axis)}"
  return '<p class="note">Fewer than three evaluable groups of a kind: no chart of distance against training share.</p>'


def _chart_row(row: Mapping[str, Any], label: str) -> dict[str, Any]:
  base = {"label": row["group"], "held_out": row["held_out"], "note": f"n {row['n_real']} | {row['n_synthetic']}"}
  if label not in row["fidelity"]:
    return {**base, "refusal": row["refusal"]}
  kid = row["fidelity"][label]["kid"]
  null = {f"null_{end}": kid["null"].get(end) for end in ("lo", "hi")}
  return {**base, "value": kid["matched"]["mean"], "lo": kid["matched"]["lo"], "hi": kid["matched"]["hi"], **null}


def _group_table(rows: Sequence[Mapping[str, Any]], label: str) -> str:
  lines = []
  for row in rows:
    line = [_cell(_held(row["group"], row["held_out"]))]
    line += [_cell(f"{row[key]:,}", "n") for key in ("n_real", "n_patients", "n_synthetic", "n_train")]
    scores = row["fidelity"].get(label)
    if scores is None:
      line.append(_cell(html.escape(row["refusal"] or "failed"), "na", span=4))
    else:
      kid, fd, null = scores["kid"], scores["fd"], scores["kid"]["null"]
      matched = f"{number(kid['matched']['mean'])} {_bounds(kid['matched']['lo'], kid['matched']['hi'])}"
      if "mean" in null:
        parent = "" if null["group"] == row["group"] else f' <span class="ci">of {html.escape(null["group"])}</span>'
        reference = f"{_bounds(null['lo'], null['hi'])}{parent}"
      else:
        reference = f'<span class="ci">{html.escape(null["reason"])}</span>'
      mark = _aside("rank deficient") if fd["rank_deficient"] else ""
      distance = f'{number(fd["value"])} <span class="ci">({number(fd["null_bias"])} from n)</span>{mark}'
      cells = (f"{number(kid['value'])} {_bounds(kid['lo'], kid['hi'])}", matched, reference, distance)
      line += [_cell(text) for text in cells]
    lines.append(line)
  head = ("Group", "real", "patients", "synthetic", "training", "KID [95 %]", "KID at n*", "real vs real at n*", "FD")
  return _table(head, lines, right=(1, 2, 3, 4))


def _alignment(results: Mapping[str, Any]) -> str:
  block = results["alignment"]
  if block["status"] != "ok":
    return f"<h2>Attribute fidelity</h2><p>Not evaluated: {html.escape(block['reason'])}.</p>"
  parts = [f"<h2>Attribute fidelity</h2><p>{html.escape(block['reader'])}. The figure on real test images is the"]
  parts.append(" reader's own ceiling. “All attributes” counts images in which every level is right at once.</p>")
  for name, attribute in block["attributes"].items():
    if attribute["status"] != "ok":
      parts.append(f'<div class="warn">{html.escape(name)}: {html.escape(attribute["status"])}</div>')
  kinds = (("overall", "held-out", "attribute"), ("pair",), ("cell",))
  for wanted, title in zip(kinds, ("Overall and by attribute value", "Pairs", "Full intersections")):
    rows = [row for row in block["groups"] if row["kind"] in wanted]
    if rows:
      opened = " open" if "overall" in wanted else ""
      parts.append(f"<details{opened}><summary>{title}</summary>{_alignment_table(rows)}</details>")
  return "".join(parts)


def _alignment_table(rows: Sequence[Mapping[str, Any]]) -> str:
  measures = list(rows[0]["measures"])
  lines = []
  for row in rows:
    line = [_cell(_held(row["group"], row["held_out"]))]
    for measure in measures:
      synthetic, real = (row["measures"][measure][side] for side in ("synthetic", "real"))
      real_text = number(real["value"]) if "value" in real else html.escape(real["refusal"])
      reference = f'<br><span class="ci">real: {real_text}{_n(real)}</span>'
      if "value" in synthetic:
        text = f"{number(synthetic['value'])} {_bounds(synthetic['lo'], synthetic['hi'])}{_n(synthetic)}"
        line.append(_cell(text + reference))
      else:
        line.append(_cell(html.escape(synthetic["refusal"]) + reference, "na"))
    lines.append(line)
  return _table(("Group", *measures), lines)


def _copies(results: Mapping[str, Any], synthetic: ImageSet, train: ImageSet) -> str:
  block = results["neighbours"]
  if not block:
    return ""
  if block["status"].startswith("void"):
    return f'<h2>Nearest training images</h2><div class="warn">{html.escape(block["status"])}</div>'
  names = {"0.01": "1 %", "0.05": "5 %", "0.5": "median"}
  rows = []
  for label, side, count in (("synthetic", "synthetic", "n_synthetic"), ("held-out real", "real", "n_real")):
    own = block["quantiles"][side]
    cells = [_cell(number(own[q]), "n") if q in own else _cell("too few images", "na") for q in names]
    rows.append([_cell(label), *cells, _cell(f"{block[count]:,}", "n")])
  below, real, control = block["below"].get("overall"), block["real"], block["control"]
  if below:
    shares = (
      f"{below['count']} of {below['n']:,} synthetic images are nearer to training than {number(block['threshold'])},"
      f" the distance under which 1 % of held-out real images fall ({real['count']} of {real['n']:,}). Of"
      f" {control['n']} planted copies of training images with light noise {control['count']} are under it."
    )
  else:
    shares = f"Share of copies: {block['status'] if block['status'] != 'ok' else results['groups'][0]['refusal']}."
  text = (
    f"Distance of each image to its nearest of {block['n_train']:,} training images, in {block['space']}. {shares} One"
    " space only: distance between pixels does not see a copy that is shifted or recoloured."
  )
  tiles = []
  by_key = [{key: i for i, key in enumerate(s.keys)} for s in (synthetic, train)]
  for pair in block["pairs"]:
    left, right = synthetic.images[by_key[0][pair["synthetic"]]], train.images[by_key[1][pair["train"]]]
    caption = f"<b>{number(pair['distance'])}</b> {html.escape(pair['synthetic'])} | {html.escape(pair['train'])}"
    tiles.append(
      f'<figure class="pair">{_image(left, "synthetic")}{_image(right, "training")}<figcaption>{caption}</figcaption>'
      "</figure>"
    )
  return (
    f"<h2>Nearest training images</h2><p>{html.escape(text)}</p>"
    + _table(("Set", *names.values(), "n"), rows, right=(1, 2, 3, 4))
    + "<h3>Most similar pairs, synthetic left, training right</h3>"
    + f'<div class="pairs">{"".join(tiles)}</div>'
  )


def _inputs(results: Mapping[str, Any]) -> str:
  inputs, run = results["inputs"], results["run"]
  rows = []
  for side in ("real", "synthetic", "train"):
    block = inputs[side]
    unknown = ", ".join(f"{name} {count}" for name, count in block["unknown"].items() if count) or "none"
    files = ", ".join(f"{size} ({count})" for size, count in block["files"].items())
    cells = (side, f"{block['name']} {block['split']}", f"{block['images']:,} of {block['total']:,}", files, unknown)
    rows.append([*(_cell(html.escape(text)) for text in cells), _cell(f"<code>{block['content_sha256'][:16]}</code>")])
  lines = [
    f"<h2>Inputs and methods</h2>{_table(('Set', 'Name', 'Images', 'Files', 'Unknown values', 'Content hash'), rows)}",
    f"<p>Preprocessing of every image: {html.escape(inputs['preprocessing'])}. Groups need {inputs['min_n']} images a"
    f" side and {inputs['min_n'] // 2} real patients. Seed {inputs['seed']}.</p>",
  ]
  sampling = ", ".join(f"{name} {value}" for name, value in inputs["synthetic"]["sampling"].items() if value != "")
  made = f"Made by compdiff sample: {sampling}." if sampling else "The synthetic set does not say which model made it."
  lines.append(f"<p>{html.escape(made)}</p>")
  table = [
    [_cell(html.escape(text)) for text in (e["label"], str(e["dimension"]), e["standardised_by"], e["note"])]
    for e in results["extractors"]
  ]
  lines.append(_table(("Extractor", "d", "Standardised by", "What it is"), table))
  times = ", ".join(f"{name} {seconds:g} s" for name, seconds in run["seconds"].items())
  versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
  for text in (run["command"], f"{versions}; {times}"):
    lines.append(f'<p class="note"><code>{html.escape(text)}</code></p>')
  return "".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
  names = "".join(f"<th{' class=n' if i in right else ''}>{html.escape(name)}</th>" for i, name in enumerate(head))
  lines = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
  return f"<table><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table>"


def _cell(content: str, kind: str = "", span: int = 1) -> str:
  return f"<td{f' class={kind}' if kind else ''}{f' colspan={span}' if span > 1 else ''}>{content}</td>"


def _bounds(low: float | None, high: float | None) -> str:
  return "" if low is None or high is None else f'<span class="ci">[{number(low)}, {number(high)}]</span>'


def _aside(text: str | None) -> str:
  return f' <span class="ci">{html.escape(text)}</span>' if text else ""


def _n(scores: Mapping[str, Any]) -> str:
  return f' <span class="ci">n={scores["n"]}</span>' if "n" in scores else ""


def _held(name: str, status: str = "") -> str:
  if status or name.startswith("held-out"):
    mark = f" ◆ {status}" if status and not name.startswith("held-out") else " ◆"
    return f'<span class="held-text">{html.escape(name)}{mark}</span>'
  return html.escape(name)


def _figure(image: np.ndarray, caption: str) -> str:
  return f"<figure>{_image(image, '')}<figcaption>{caption}</figcaption></figure>"


def _image(image: np.ndarray, alt: str) -> str:
  picture = Image.fromarray(image)
  if max(picture.size) > _SHOWN_SIDE:
    picture = picture.resize((_SHOWN_SIDE, _SHOWN_SIDE), Image.Resampling.BICUBIC)
  return f'<img src="{_data_uri(picture)}" alt="{alt}">'


def read_picture(path: Path) -> str:
  """A picture file as a data URI for `render`."""
  try:
    with Image.open(path) as picture:
      return _data_uri(picture.convert("RGB"))
  except (OSError, SyntaxError, ValueError) as error:
    raise InputError(f"{path} is not a readable picture ({error}); remove it or write it again") from None


def _data_uri(picture: Image.Image) -> str:
  buffer = io.BytesIO()
  picture.save(buffer, "PNG", optimize=True)
  return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
