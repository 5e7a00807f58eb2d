"""`compdiff compile`: does it fit, how fast could it be? Compiles a training step for machines that are not here.

The step is that of `compdiff train`, made from shapes alone: of pretrained networks only config.json is read, of the
data only schema.json. Estimates are the compiler's; nothing is measured.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import ml_collections

from compdiff_jax import cli
from compdiff_jax.ahead_of_time.chips import topology_devices
from compdiff_jax.ahead_of_time.program import report
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.config import load_config


def main(argv: list[str]) -> None:
  parser = cli.parser("compdiff compile", __doc__)
  parser.add_argument("--config", required=True, help="config file; override keys with --config.key=value")
  parser.add_argument("--topology", required=True, help="v5e:4x4, v5e:16x16, v5p:2x2x1, v6e:4x4, … or local")
  parser.add_argument("--slices", type=int, default=1, help="how many such slices, joined by the data-centre network")
  parser.add_argument("--inputs", choices=("images", "moments"), default="images", help="what the data set holds")
  parser.add_argument("--schema", type=Path, default=None, help="schema.json of the data; default: config.data.path's")
  parser.add_argument("--suggest", action="store_true", help="if it does not fit, try remat, fsdp and accumulation")
  parser.add_argument("--out", type=Path, default=None, help="write the report there as JSON, too")
  args, overrides = parser.parse_known_args(argv)
  config = load_config(args.config, overrides)
  if args.slices < 1:
    raise cli.InputError(f"--slices {args.slices} must be at least 1")
  if args.topology != "local" and not jax.config.jax_platforms:
    jax.config.update("jax_platforms", "cpu")  # the compiler's wheel is there, its hardware need not be
  devices = topology_devices(args.topology, args.slices)
  schema = Schema.load(args.schema or Path(config.data.path) / "schema.json")

  facts = {"topology": args.topology, **report(config, schema, devices, args.inputs)}
  print_report(facts)
  tried = [facts]
  if args.suggest and not facts["fits"]:
    for changes in options(config, len(devices)):
      print(f"trying {_as_arguments(changes)}", file=sys.stderr)
      facts = {"topology": args.topology, **report(_changed(config, changes), schema, devices, args.inputs)}
      facts["changes"] = changes
      print_report(facts)
      tried.append(facts)
      if facts["fits"]:
        break
  result = {**tried[0], "tried": tried[1:]} if args.suggest else facts
  text = json.dumps(result, indent=2)
  print(text)
  if args.out:
    with cli.writing(args.out):
      args.out.write_text(text + "\n")
  if not tried[0]["fits"]:
    found = f"; {_as_arguments(facts['changes'])} fits" if facts["fits"] else ""
    advice = found or "; give remat=blocks, a larger mesh.fsdp, train.accumulation or a smaller train.batch_size"
    raise cli.RunError(f"{args.config} does not fit {args.topology}{advice}")


def options(config: ml_collections.ConfigDict, devices: int) -> list[dict[str, Any]]:
  """What to change, from the cheapest to the most expensive: recomputing, sharding the state, smaller micro-batches."""
  found = []
  policies = ["none", "matmuls", "blocks"]
  for policy in policies[policies.index(config.remat) + 1 :]:
    found.append({"remat": policy})
  fsdp = config.mesh.fsdp
  rest = devices // max(config.mesh.tensor, 1)
  for size in (2, 4, 8, 16, 32):
    if size > fsdp and rest % size == 0:
      found += [{"mesh.fsdp": size, "mesh.data": -1}, {"mesh.fsdp": size, "mesh.data": -1, "remat": "blocks"}]
  rows = config.train.batch_size // rest
  accumulation = config.train.accumulation
  for factor in (2, 4, 8):
    if rows and rows % (accumulation * factor) == 0:
      found.append({"train.accumulation": accumulation * factor, "remat": "blocks"})
  return found


def _changed(config: ml_collections.ConfigDict, changes: dict[str, Any]) -> ml_collections.ConfigDict:
  changed = config.copy_and_resolve_references()
  changed.update_from_flattened_dict(changes)
  return changed


def _as_arguments(changes: dict[str, Any]) -> str:
  return " ".join(f"--config.{key}={value}" for key, value in changes.items())


def print_report(facts: dict[str, Any]) -> None:
  """The report in a few lines, on stderr."""
  show = lambda *words: print(*words, file=sys.stderr)  # noqa: E731
  gib = lambda size: f"{size / 2**30:,.2f} GiB"  # noqa: E731
  show(f"training step for {facts['topology']}: {facts['devices']} x {facts['device_kind']}, mesh {facts['mesh']},")
  show(
    f"  batch {facts['batch_size']}, accumulation {facts['accumulation']}, remat {facts['remat']},"
    f" {facts['compute_dtype']}, {facts['model_flops'] / 1e12:,.4g} TFLOP a step"
  )
  if "memory" in facts:
    sizes = ", ".join(f"{name} {gib(size)}" for name, size in facts["memory"].items())
    show(f"  memory of a device: {sizes}")
    for row in facts["collectives"]:
      show(f"  {row['kind']}, {row['network']}: {row['count']} operations, {gib(row['bytes'])} a device and step")
  if "estimated_seconds" in facts:
    mfu = f", MFU {facts['estimated_mfu']:.0%}" if "estimated_mfu" in facts else ""
    show(
      f"  compiler's estimate, not measured: {facts['estimated_seconds']:.4g} s a step,"
      f" {facts['estimated_images_per_second_a_chip']:.4g} images/s a chip{mfu}"
    )
  elif "compute_bound_seconds" in facts:
    compute, memory = facts["compute_bound_seconds"], facts["memory_bound_seconds"]
    show(f"  no estimate of the compiler; operations alone take {compute:.3g} s a step, memory traffic {memory:.3g} s")
  show("  fits" if facts["fits"] else f"  DOES NOT FIT: {facts.get('compiler', 'peak exceeds the device memory')}")
