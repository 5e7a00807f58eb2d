"""`make pods`: configs/chest/compdiff.py compiled at full size for TPU slices that are not here; writes docs/pods.md.

Each slice is one `compdiff compile`, whose report is kept in docs/pods/NAME.json; a slice that has one is not compiled
again, so the command resumes. A compile takes 14 to 32 minutes of two cores and up to 14 GB, two slices 19 GB. Needs
the `libtpu` wheel.
`--only v5e-16,v6e-16` compiles these alone, `--only ''` none; the page is written from whatever reports there are.
"""

import argparse
import datetime
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.tables import machine, table
from compdiff_jax.ahead_of_time.chips import CHIPS
from compdiff_jax.ahead_of_time.topologies import is_torus

CONFIG = "configs/chest/compdiff.py"
PAGE, REPORTS = Path("docs/pods.md"), Path("docs/pods")
TEXT = """# TPU pods

Written by `make pods` (`python -m benchmarks.pods`). Nothing here was measured on a TPU: memory, work and traffic are
the TPU compiler's, which needs no TPU; times are **estimates**.

## The chest config at full size

Stable Diffusion 2.1-base at 512 px with the CompDiff-2 conditioner, `configs/chest/compdiff.py`: cached moments, frozen
text encoder, average of the weights, bfloat16 compute. Its batch of 48 is no multiple of 64 or 256 chips, so there are
8 or 16 images a chip. Names are the vendor's: v5p-8 has 4 chips (8 cores), v5e-16 and v6e-16 have 16; v5e-16x2 are two
slices v5e-16. Neither data nor weights are needed: `compdiff compile` takes age, sex and race and the sizes of Stable
Diffusion 2.1-base where they are missing.

```
{commands}
```

{figures}

{beaten}{missing}{machine}

- *TFLOP* are matrix products and convolutions, with what is recomputed. Inside kernels (attention) they are counted in
  the kernel's own program, as the compiler does not look into it.
- *Alone* is what one resource takes at the vendor's peak while the others are idle. A step takes at least what products
  and links do. The memory sets no such bound: among the compiler's bytes are those that never leave the fast memory on
  the chip.
- *The compiler's estimate* is its sum over all instructions, with kernels and repeated loops added. It knows nothing of
  padding to the matrix units (320 channels take 384), nor of waiting for other chips.
- *MFU* divides the operations of the plain step (nothing recomputed) by estimate and peak.
- Compiling was slowed by other work on the machine for all but v5e-256.
- The programs for v5p have the compiler option that the training step asks for there (`compiler_options` in
  `ahead_of_time/chips.py`); without it v5p-8 took 239 GB and 0.168 s.
- *Idle* is the autoencoder. A run keeps it on every device for its samples, while a step on moments does not read it.
  The compiler does not see it; it is in the peak.
- The reports of one slice are of four bins of age instead of five, with 4,104 parameters less in the joint head, and
  *idle* was added to them afterwards. That of two slices was compiled twice, 32 and 37 minutes, with the same figures.
- A v5e with 16 GB keeps parameters, two moments and the average (13.9 GB in float32) on eight chips together.

Compiling takes long; `JAX_OPTIMIZATION_LEVEL=O1` and `JAX_MEMORY_FITTING_LEVEL=O0` (options of JAX, O0 to O3) ask the
compiler for less effort. What that changes in these programs has not been examined, and no figure here used them.
`compdiff compile --suggest` finds remat, `mesh.fsdp` and `train.accumulation` for a slice by compiling the fastest
first, and then larger batches; at most six in all. What cannot fit by its state alone is not compiled. On v5p-8 with 64
images it took the plain step at once (818 s of one core, 2026-11-26, before it tried larger batches).

The sampler at full size, `compdiff compile --config=configs/chest/compdiff.py --topology=v5e:4x4 --program=sample
--config.sample.batch_size=128`: DDPM with 75 steps and guidance, decoding included, takes 7.4 of 16 GiB (0.13 of them
the encoder, which is there and not read) and by the compiler's estimate 7.2 s a batch, 1.12 images/s a chip. Chips send
nothing to each other: guidance puts the variants of a row next to each other (joined end to end they took 0.24 GiB a
chip, and 7.6 s a batch). 1,234 s to compile beside other work; 2026-11-27, libtpu 0.0.42.

## From 8 to 256 chips and two slices

An estimate, with a fixed number of images a chip: a step's own time does not change with the number of chips, what is
sent does. For slices in the table above it is what their programs send. Inside each of two slices that have no program
of their own it is what one of them sends; for the others it is *on paper*. Paper is below the programs, by a quarter on
v5e-16, so that rows without a program look better than they are. All of {parameters} M parameters are trained. The
compiler sends them and their gradients in bfloat16, in which they are {gradient} GB.

- Inside a slice, with `mesh.fsdp` f of n chips: parameters are gathered for the forward and the backward pass and
  gradients scattered, 3 (f − 1)/f of {gradient} GB; the copies are summed, 2 (1 − f/n) of an f-th of it. The program
  for v5e-16 gathers 2.99 GB (on paper 3.05), but sums most gradients whole: 3.28 GB, on paper 1.74. That is the
  compiler's choice: with the gradients constrained to the parameters' sharding a small UNet on v5e:2x4 compiles to the
  same collectives, byte for byte. For two such slices the compiler scatters most gradients (1.41 GB) and sums the rest
  (0.47 GB), and sends less: 5.15 GB, on paper 4.80.
- Between slices: each chip has an n-th of the summed gradients to exchange, whatever f is, and sends it as often as a
  ring of the slices takes, 2 (s − 1)/s times. The program for two slices v5e-16 sends 0.113 GB, on paper 0.109: the
  gradients and little else. What fsdp gathers stays inside a slice.
- Links: {mfu} of the peak is assumed for the step where nothing was compiled ({image} TFLOP an image). A slice whose
  sides do not close into rings (below 16 chips a side on v5e and v6e, below 4 on v5p) carries half.

{links}

Links are from the Cloud TPU documentation (pages v5e, v5p, v6e, read in November 2026): half of the bidirectional
bandwidth a chip. Networks: v5e two cards of 100 Gbit/s for eight chips and v5p 50 Gbit/s a chip, from the same pages;
v6e four cards of 200 Gbit/s for eight chips is general knowledge.

{scaling}

*Efficiency* is against a chip alone, with nothing of the traffic hidden behind the step. With all of it hidden it would
be 100 % in every row: nowhere does the traffic take longer than the step. The TPU compiler overlaps gathering and
reducing with the products beside them, so a run should lie between the two. A longer step, as the bytes of v6e would
have it (†), loses less.

What limits it:

- Inside a slice the traffic hardly grows with the number of chips: (n − 1)/n is 0.88 for 8 and 1.00 for 256. Larger
  slices even gain, because their links close into rings.
- The ratio of work to traffic is images a chip × {image} TFLOP to 3 × {gradient} GB. Twice the images a chip halve the
  loss; `train.accumulation` spares the sum of gradients, not the gathering. The ratio is worst on v6e, whose links grew
  less than its peak.
- Between slices the gradients of a small slice are the bottleneck: with two of 16 chips, a chip exchanges sixteen times
  as much as with two of 256. Large slices before many.
- The global batch: 256 chips × 8 images are 2,048, forty times the reference's 48. How far the batch may grow before it
  costs quality is a question of training, which no compiler answers.
"""


class Slice(NamedTuple):
  """What is compiled.

  Attributes:
    kind: the first words of the chip's `device_kind`.
    topology: as `compdiff compile` has it.
    chips: of one slice.
    rows: images a chip and step.
    fsdp: chips that share parameters, moments and average.
    remat: what is recomputed.
    slices: how many.
  """

  kind: str
  topology: str
  chips: int
  rows: int
  fsdp: int
  remat: str
  slices: int = 1

  def command(self) -> list[str]:
    batch = self.rows * self.chips * self.slices
    settings = {"train.batch_size": batch, "mesh.fsdp": self.fsdp, "remat": self.remat}
    return [
      *("compile", f"--config={CONFIG}", f"--topology={self.topology}"),
      *([f"--slices={self.slices}"] if self.slices > 1 else []),
      *("--inputs=moments", *(f"--config.{key}={value}" for key, value in settings.items())),
    ]


# v5e has 16 GB, so the state is spread and activations are recomputed; v5p has 95 GB and needs neither.
SLICES = {
  "v5e-16": Slice("TPU v5 lite", "v5e:4x4", 16, 8, 8, "matmuls"),
  "v5e-256": Slice("TPU v5 lite", "v5e:16x16", 256, 8, 8, "matmuls"),
  "v5e-16x2": Slice("TPU v5 lite", "v5e:4x4", 16, 8, 8, "matmuls", slices=2),
  "v5p-8": Slice("TPU v5", "v5p:2x2x1", 4, 16, 1, "none"),
  "v5p-128": Slice("TPU v5", "v5p:4x4x4", 64, 16, 1, "none"),
  "v6e-16": Slice("TPU v6 lite", "v6e:4x4", 16, 8, 4, "none"),
  "v6e-256": Slice("TPU v6 lite", "v6e:16x16", 256, 8, 4, "none"),
}

# Layouts of the scaling table, and how many such slices.
SCALING = {
  "v5e": (("2x4", 1), ("4x4", 1), ("8x8", 1), ("16x16", 1), ("4x4", 2), ("16x16", 2)),
  "v5p": (("2x2x1", 1), ("2x2x2", 1), ("2x2x4", 1), ("4x4x4", 1), ("4x8x8", 1), ("2x2x4", 2), ("4x8x8", 2)),
  "v6e": (("2x4", 1), ("4x4", 1), ("8x8", 1), ("16x16", 1), ("4x4", 2), ("16x16", 2)),
}
# Where a generation has no compiled program yet.
ASSUMED_MFU = 0.35
# The config's UNet and conditioner, and an image's operations (tests/test_pods.py counts both).
PARAMETERS = 865_910_724 + 6_315_567
IMAGE_FLOPS = 2.459e12
_BFLOAT16 = 2


def traffic(chips: int, slices: int, fsdp: int, parameters: int = PARAMETERS) -> tuple[float, float]:
  """Bytes that a chip sends in a step, (ICI, DCN): parameters are gathered twice, gradients summed, in bfloat16.

  In a ring of n, a sum over n costs 2 (n - 1) / n of the array, gathering or scattering it half of that. A slice sums
  its gradients first, so that each chip has 1 / chips of them to exchange with the other slices.

  Args:
    chips: of one slice.
    slices: how many.
    fsdp: chips that share the state; the others of a slice hold copies.
    parameters: that are trained.
  """
  size = _BFLOAT16 * parameters
  copies = chips // fsdp
  ici = size * 3 * (1 - 1 / fsdp) + size / fsdp * 2 * (1 - 1 / copies)
  return ici, size / chips * 2 * (1 - 1 / slices)


def compile_slice(name: str) -> None:
  """Runs `compdiff compile` in a process of its own; one that does not fit leaves a report, too."""
  out = REPORTS / f"{name}.json"
  command = [sys.executable, "-m", "compdiff_jax", *SLICES[name].command(), f"--out={out}"]
  done = subprocess.run(command, check=False)
  if not out.exists():
    raise SystemExit(f"{name}: compdiff compile ended with status {done.returncode} and no report")
  facts = json.loads(out.read_text())
  out.write_text(
    json.dumps({**facts, "date": datetime.date.today().isoformat(), "machine": machine("jax", "libtpu")}, indent=2)
    + "\n"
  )


def _sent(facts: Mapping[str, Any], network: str) -> float:
  """GB that a chip sends over "ICI" or "DCN"."""
  return sum(row["sent_bytes"] for row in facts["collectives"] if row["network"] == network) / 1e9


def _beaten(facts: Mapping[str, Any]) -> bool:
  """Whether the compiler expects a step to take less than its bytes do at the vendor's peak."""
  return facts.get("estimated_seconds", math.inf) < facts.get("memory_bound_seconds", 0.0)


def figures(reports: Mapping[str, Mapping[str, Any]]) -> str:
  """The table of what was compiled, one column a slice."""
  gib = lambda facts, part: f"{facts['memory'][part] / 2**30:.2f}" if part in facts["memory"] else ""  # noqa: E731
  sent = lambda facts, network: f"{_sent(facts, network):.2f}" if "collectives" in facts else ""  # noqa: E731
  number = lambda facts, name, unit=1.0: f"{facts[name] / unit:.3g}" if name in facts else ""  # noqa: E731
  marked = lambda facts, name: number(facts, name) + (" †" if _beaten(facts) else "")  # noqa: E731
  slices = lambda facts: f" × {facts['slices']}" if facts["slices"] > 1 else ""  # noqa: E731
  lines = {
    "topology, chips": lambda f: f"`{f['topology']}`{slices(f)}, {f['devices']}",
    "images a chip, fsdp, remat": lambda f: f"{f['batch_size'] // f['devices']}, {f['mesh']['fsdp']}, {f['remat']}",
    "fits": lambda f: "yes" if f["fits"] else "**no**",
    "arguments (GiB a chip)": lambda f: gib(f, "arguments"),
    "temporaries": lambda f: gib(f, "temporaries"),
    "idle": lambda f: gib(f, "idle"),
    "peak": lambda f: gib(f, "peak"),
    "of": lambda f: gib(f, "available"),
    "TFLOP a chip": lambda f: number(f, "flops", 1e12),
    "of them in kernels": lambda f: number(f, "kernel_flops", 1e12),
    "GB read and written a chip": lambda f: number(f, "bytes_accessed", 1e9),
    "GB sent over ICI a chip": lambda f: sent(f, "ICI"),
    "over DCN": lambda f: sent(f, "DCN") if f["slices"] > 1 else "",
    "ICI alone (s)": lambda f: number(f, "ici_seconds"),
    "DCN alone (s)": lambda f: number(f, "dcn_seconds"),
    "products alone (s)": lambda f: number(f, "compute_bound_seconds"),
    "memory alone (s)": lambda f: number(f, "memory_bound_seconds"),
    "compiler's estimate (s)": lambda f: marked(f, "estimated_seconds"),
    "images/s a chip": lambda f: marked(f, "estimated_images_per_second_a_chip"),
    "MFU": lambda f: f"{f['estimated_mfu']:.0%}" if "estimated_mfu" in f else "",
    "compiling took (s)": lambda f: f"{f['compile_seconds']:.0f}" if "compile_seconds" in f else "",
  }
  return table(["", *reports], [[name, *(value(facts) for facts in reports.values())] for name, value in lines.items()])


def scaling(reports: Mapping[str, Mapping[str, Any]]) -> str:
  """Expected efficiency by generation and size: from the slice's own report, where there is one."""
  rows = []
  for generation, layouts in SCALING.items():
    one = next(one for one in SLICES.values() if one.topology.startswith(f"{generation}:"))
    for layout, slices in layouts:
      topology = f"{generation}:{layout}"
      chips = math.prod(int(side) for side in layout.split("x"))
      own = _compiled(topology, slices, reports)
      inside = own or _compiled(topology, 1, reports)
      seconds, source = _step_seconds(one, inside or _compiled(one.topology, 1, reports))
      chip = CHIPS[one.kind]
      ici, dcn = traffic(chips, slices, one.fsdp)
      ici_seconds = ici / chip.ici_bandwidth * (1 if is_torus(topology) else 2)
      dcn_seconds = dcn / chip.dcn_bandwidth
      cells = [f"`{topology}`{f' × {slices}' if slices > 1 else ''}", str(chips * slices), f"{seconds:.3f} ({source})"]
      if inside:
        ici_seconds = inside["ici_seconds"]
      cells += [f"{_sent(inside, 'ICI'):.2f}" if inside else "", f"{ici / 1e9:.2f}", f"{1000 * ici_seconds:.0f}"]
      if slices > 1:
        dcn_seconds = own["dcn_seconds"] if own else dcn_seconds
        cells += [f"{_sent(own, 'DCN'):.3f}" if own else "", f"{dcn / 1e9:.3f}", f"{1000 * dcn_seconds:.0f}"]
      else:
        cells += [""] * 3
      rows.append([*cells, f"{seconds / (seconds + ici_seconds + dcn_seconds):.0%}"])
  return table(
    [
      *("slice", "chips", "step alone (s)", "ICI (GB)", "on paper", "ICI (ms)", "DCN (GB)", "on paper", "DCN (ms)"),
      "efficiency, nothing hidden",
    ],
    rows,
  )


def _compiled(topology: str, slices: int, reports: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
  """The report of so many slices, if there is one with an estimate."""
  names = [name for name, one in SLICES.items() if (one.topology, one.slices) == (topology, slices)]
  return next((reports[name] for name in names if "estimated_seconds" in reports.get(name, {})), None)


def _step_seconds(one: Slice, facts: Mapping[str, Any] | None) -> tuple[float, str]:
  """What a chip takes for its images without the others."""
  if facts:
    return facts["estimated_seconds"], "compiled †" if _beaten(facts) else "compiled"
  return one.rows * IMAGE_FLOPS / CHIPS[one.kind].flops / ASSUMED_MFU, "assumed"


def _footnote(reports: Mapping[str, Mapping[str, Any]]) -> str:
  """What the bytes say of the estimates that are below what they take."""
  speeds = [
    f"{facts['batch_size'] / facts['devices'] / facts['memory_bound_seconds']:.0f} ({name})"
    for name, facts in reports.items()
    if _beaten(facts)
  ]
  if not speeds:
    return ""
  return f"† Below what memory alone takes; by that, images/s a chip are {', '.join(speeds)}.\n\n"


def page(reports: Mapping[str, Mapping[str, Any]]) -> str:
  missing = [name for name in SLICES if name not in reports]
  compiled = figures(reports) if reports else "None of the slices below has been compiled yet."
  dates = {f"{facts['machine']}" for facts in reports.values()}
  return TEXT.format(
    figures=compiled,
    machine=" ".join(sorted(dates)),
    missing=f"Not compiled yet: {', '.join(missing)}; `make pods` goes on with them.\n\n" if missing else "",
    beaten=_footnote(reports),
    commands="\n".join(f"{shlex.join(['compdiff', *one.command()])}   # {name}" for name, one in SLICES.items()),
    scaling=scaling(reports),
    links=table(
      ["chip", "links, all together (GB/s)", "network, a chip's share (GB/s)", "peak (TFLOP/s)", "memory (TB/s)"],
      [
        [
          chip,
          *(f"{v:.4g}" for v in (c.ici_bandwidth / 1e9, c.dcn_bandwidth / 1e9, c.flops / 1e12, c.hbm_bandwidth / 1e12)),
        ]
        for chip, c in CHIPS.items()
        if c.dcn_bandwidth
      ],
    ),
    parameters=f"{PARAMETERS / 1e6:,.0f}",
    gradient=f"{_BFLOAT16 * PARAMETERS / 1e9:.2f}",
    image=f"{IMAGE_FLOPS / 1e12:.3f}",
    mfu=f"{ASSUMED_MFU:.0%}",
  )


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", default=",".join(SLICES), help="which to compile, where they have no report")
  args = parser.parse_args(argv)
  names = [name for name in args.only.split(",") if name]
  unknown = [name for name in names if name not in SLICES]
  if unknown:
    parser.error(f"--only {unknown[0]!r}; known: {', '.join(SLICES)}")
  REPORTS.mkdir(parents=True, exist_ok=True)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  for name in names:
    if not (REPORTS / f"{name}.json").exists():
      print(f"---- {name}", flush=True)
      compile_slice(name)
  found = {name: REPORTS / f"{name}.json" for name in SLICES}
  PAGE.write_text(page({name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}))
  print(PAGE)


if __name__ == "__main__":
  main()
