"""`compdiff compile`: does it fit, how fast could it be? Compiles a run's program for machines that are not here.

The program is the step of `compdiff train` or the sampler of `compdiff sample`, made from shapes alone: of pretrained
networks only config.json is read, of the data only schema.json. Where a directory does not exist, age, sex and race and
the sizes of Stable Diffusion 2.1-base stand in, and a batch that the devices do not divide is raised; the report names
it. Estimates are the compiler's; nothing is measured.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from compdiff_jax import cli
from compdiff_jax.ahead_of_time import stand_ins, suggest
from compdiff_jax.ahead_of_time.chips import usable_memory
from compdiff_jax.ahead_of_time.report import report
from compdiff_jax.ahead_of_time.topologies import topology_devices
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.config import load_config
from compdiff_jax.workdir import open_run


def main(argv: list[str]) -> None:
  parser = cli.parser("compdiff compile", __doc__)
  parser.add_argument("--config", required=True, help="config file; override keys with --config.key=value")
  parser.add_argument(
    "--program", choices=("train", "sample"), default="train", help="the training step or the sampler"
  )
  parser.add_argument("--topology", required=True, help="v5e:4x4, v5p:2x2x1, v6e:4x4, …, h100:8, h200:1, … or local")
  parser.add_argument("--slices", type=int, default=1, help="how many such slices, joined by the data-centre network")
  parser.add_argument("--inputs", choices=("images", "moments"), default="images", help="what the data set holds")
  parser.add_argument("--schema", type=Path, default=None, help="schema.json of the data; default: config.data.path's")
  parser.add_argument("--memory_gib", type=float, default=None, help="of a device; default: what its kind offers")
  parser.add_argument("--suggest", action="store_true", help="try batch, remat, fsdp, accumulation; report the best")
  parser.add_argument("--out", type=Path, default=None, help="write the report there as JSON, too")
  args, overrides = parser.parse_known_args(argv)
  config = load_config(args.config, overrides)
  if args.slices < 1:
    raise cli.InputError(f"--slices {args.slices} must be at least 1")
  if args.memory_gib is not None and not args.memory_gib > 0:
    raise cli.InputError(f"--memory_gib {args.memory_gib:g} must be positive")
  if args.topology != "local" and not jax.config.jax_platforms:
    jax.config.update("jax_platforms", "cpu")  # the compiler's wheel is there, its hardware need not be
  devices = topology_devices(args.topology, args.slices)
  memory = int(args.memory_gib * 2**30) if args.memory_gib else usable_memory(devices[0])
  with tempfile.TemporaryDirectory() as directory:
    config, schema, missing = _complete(config, args.schema, Path(directory))
    raised = _raised_batch(config, devices) if args.program == "train" else {}
    if raised:
      size, whole = config.train.batch_size, raised["train.batch_size"]
      missing.append(f"train.batch_size {size} is not divisible by data x fsdp x accumulation: {whole} stands in")
    for sentence in missing:
      print(sentence, file=sys.stderr)

    def compile_with(changes: suggest.Changes) -> dict[str, Any]:
      if changes:
        print(f"trying {suggest.as_arguments(changes)}", file=sys.stderr)
      changed = suggest.changed(config, changes)
      facts = report(args.program, changed, schema, devices, args.topology, args.inputs, memory)
      print_report(facts)
      return {**facts, "changes": dict(changes), "stand_ins": missing}

    def options() -> list[suggest.Candidate]:
      return suggest.candidates(args.program, config, schema, devices, args.inputs)

    if args.suggest:
      tried = list(suggest.search(options(), compile_with, memory))
      if not tried:
        raise cli.RunError(
          f"{args.config} fits {args.topology} in no way: its state alone is larger than a device's memory"
        )
      facts = {**suggest.best(tried), "tried": [_attempt(one) for one in tried]}
    else:
      facts = compile_with(raised)
    if not facts["fits"]:
      facts["nearest"] = None if args.suggest else _nearest(options(), facts)
  text = json.dumps(facts, indent=2)
  print(text)
  if args.out:
    with cli.writing(args.out):
      cli.write_whole(args.out, text + "\n")
  if args.suggest and facts["fits"]:
    print(f"the best that fits: {suggest.as_arguments(facts['changes']) or 'the config as it is'}", file=sys.stderr)
  elif not facts["fits"]:
    advice = "nothing that was tried fits: give more devices"
    if facts["nearest"] is not None:
      advice = f"{suggest.as_arguments(facts['nearest'])} should fit; --suggest tries"
    elif not args.suggest:
      advice = "no smaller batch, remat or mesh.fsdp should help: give more devices"
    raise cli.RunError(f"{args.config} does not fit {args.topology}: {_overflow(facts['memory'])}; {advice}")


def _complete(
  config: ml_collections.ConfigDict, schema_file: Path | None, directory: Path
) -> tuple[ml_collections.ConfigDict, Schema, list[str]]:
  """Config and schema with stand-ins, kept in `directory`, for what does not exist, and a sentence for each."""
  schema, missing = (Schema.load(schema_file), []) if schema_file else stand_ins.schema_of(config)
  if config.init:
    config = open_run(config.init).start(config, schema)
  config, networks = stand_ins.with_networks(config, directory)
  return config, schema, missing + networks


def _raised_batch(config: ml_collections.ConfigDict, devices: Sequence[Any]) -> suggest.Changes:
  batch = suggest.whole_batch(config, devices)
  return {} if batch == config.train.batch_size else {"train.batch_size": batch}


def _attempt(facts: dict[str, Any]) -> dict[str, Any]:
  names = ("changes", "fits", "estimated_images_per_second_a_chip", "compile_seconds", "compiler")
  return {name: facts[name] for name in names if name in facts} | {"peak": facts["memory"].get("peak")}


def _overflow(memory: dict[str, int]) -> str:
  if not {"peak", "available"} <= set(memory):
    return "the compiler ran out of a device's memory"
  return f"it takes {_in_words(memory['peak'])} of a device's {_in_words(memory['available'])}"


def _nearest(options: list[suggest.Candidate], facts: dict[str, Any]) -> dict[str, Any] | None:
  """Changes with which it should fit. What a program takes that the compiler gave up on is at least what there is."""
  available = facts["memory"].get("available", 0)
  found = suggest.likely(options, facts["changes"], facts["memory"].get("peak", available), available)
  return found and dict(found.changes)


def _in_words(size: float) -> str:
  return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.2f} MiB"


def print_report(facts: dict[str, Any]) -> None:
  """The report in a few lines, on stderr."""
  show = lambda *words: print(*words, file=sys.stderr)  # noqa: E731
  settings = [f"batch {facts['batch_size']}"]
  settings += [f"{name} {facts[name]}" for name in ("accumulation", "remat", "sampler", "steps") if name in facts]
  name = "training step" if facts["program"] == "train" else "sampling a batch"
  slices = f" on {facts['slices']} slices" if facts["slices"] > 1 else ""
  show(f"{name}, {facts['topology']}: {facts['devices']} x {facts['device_kind']}{slices}, mesh {facts['mesh']},")
  show(f"  {', '.join(settings)}, {facts['compute_dtype']}, {facts['model_flops'] / 1e12:,.4g} TFLOP")
  show(f"  memory of a device: {', '.join(f'{part} {_in_words(size)}' for part, size in facts['memory'].items())}")
  if "flops" in facts:
    show(
      f"  work of a device: {facts['flops'] / 1e12:,.4g} TFLOP, in kernels {facts['kernel_flops'] / 1e12:,.4g};"
      f" {facts['bytes_accessed'] / 1e9:,.4g} GB read and written"
    )
  for row in facts.get("collectives", ()):
    sizes = f"{_in_words(row['bytes'])}, of which it sends {_in_words(row['sent_bytes'])}"
    show(f"  {row['kind']}, {row['network']}: {row['count']} operations, {sizes}")
  bounds = {
    "products": "compute_bound_seconds",
    "memory": "memory_bound_seconds",
    "ICI": "ici_seconds",
    "DCN": "dcn_seconds",
  }
  alone = [f"{part} {facts[name]:.3g} s" for part, name in bounds.items() if name in facts]
  if alone:
    show(f"  each alone, at the vendor's peak: {', '.join(alone)}")
  if "estimated_seconds" in facts:
    show(
      f"  compiler's estimate, not measured: {facts['estimated_seconds']:.4g} s,"
      f" {facts['estimated_images_per_second_a_chip']:.4g} images/s a chip, MFU {facts['estimated_mfu']:.0%}"
    )
  show("  fits" if facts["fits"] else f"  DOES NOT FIT: {facts.get('compiler', 'peak exceeds the device memory')}")
