"""Accelerators by name: what their vendors state."""

import dataclasses
import os
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
  """Vendor figures of one chip.

  Attributes:
    flops: dense bfloat16 operations per second.
    hbm_bytes: device memory.
    hbm_bandwidth: bytes per second.
    ici_bandwidth: bytes per second that it can send to its neighbours, over all links together; 0: not stated.
    dcn_bandwidth: its share of the host's network cards, bytes per second; 0: not stated.
    vmem_limit: KiB of the fast memory on the chip that one instruction may use; None: the compiler's choice.
  """

  flops: float
  hbm_bytes: int
  hbm_bandwidth: float
  ici_bandwidth: float = 0.0
  dcn_bandwidth: float = 0.0
  vmem_limit: int | None = None


_GIB = 2**30

# By the names that `device_kind` gives; the first that it begins with counts. Links of TPUs are from the pages v4, v5e,
# v5p and v6e of the Cloud TPU documentation, half of the bidirectional figure (v4: all-reduce bandwidth of a pod, 1.1
# PB/s, over its 4,096 chips). Networks: v5e two cards of 100 Gbit/s for eight chips, v5p 50 Gbit/s a chip, both from
# there; v6e four cards of 200 Gbit/s for eight chips, general knowledge; v4 is not stated. The limit of v5p is that of
# MaxDiffusion's guide; by the compiler's estimate more than the default gains little on v5e and costs time on v6e
# (docs/benchmarks.md).
CHIPS = {
  "TPU v4": Chip(275e12, 32 * _GIB, 1.2e12, 270e9),
  "TPU v5 lite": Chip(197e12, 16 * _GIB, 0.82e12, 200e9, 3.125e9),
  "TPU v5": Chip(459e12, 95 * _GIB, 2.77e12, 600e9, 6.25e9, 65536),  # v5p
  "TPU v6 lite": Chip(918e12, 32 * _GIB, 1.64e12, 400e9, 12.5e9),
  "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * _GIB, 1.6e12),
  "NVIDIA A100-PCIE-40GB": Chip(312e12, 40 * _GIB, 1.6e12),
  "NVIDIA A100": Chip(312e12, 80 * _GIB, 2.0e12),
  "NVIDIA H100 PCIe": Chip(756e12, 80 * _GIB, 2.0e12),
  "NVIDIA H100 NVL": Chip(835e12, 94 * 10**9, 3.9e12),
  "NVIDIA H100 80GB HBM3": Chip(989e12, 80 * _GIB, 3.35e12),
  "NVIDIA H200 NVL": Chip(835e12, 141 * 10**9, 4.8e12),
  "NVIDIA H200": Chip(989e12, 141 * 10**9, 4.8e12),
}

_VMEM_LIMIT = "xla_tpu_scoped_vmem_limit_kib"


def chip(device: Any) -> Chip | None:
  """The figures of a device, or None where they are not known."""
  return chip_by_name(device.device_kind)


def chip_by_name(kind: str) -> Chip | None:
  """The figures of devices of that `device_kind`, or None where they are not known."""
  return next((figures for name, figures in CHIPS.items() if kind.startswith(name)), None)


def usable_memory(device: Any) -> int | None:
  """Bytes that a program may take of a device: on a GPU, the share that JAX reserves for itself."""
  figures = chip(device)
  if figures is None:
    return None
  share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")) if device.platform == "gpu" else 1.0
  return int(figures.hbm_bytes * share)


def compiler_options(device: Any) -> dict[str, str]:
  """Options of the compiler for a training step on this kind of device, as `jax.jit` takes them.

  What `LIBTPU_INIT_ARGS` says of the same option goes before it.
  """
  figures = chip(device)
  if figures is None or figures.vmem_limit is None or _VMEM_LIMIT in os.environ.get("LIBTPU_INIT_ARGS", ""):
    return {}
  return {_VMEM_LIMIT: str(figures.vmem_limit)}
