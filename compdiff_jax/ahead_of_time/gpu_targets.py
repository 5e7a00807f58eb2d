"""NVIDIA GPUs to compile for where there are none: what XLA would ask the driver about them."""

import os
from typing import Any, NamedTuple

from jax.experimental import topologies

from compdiff_jax.cli import InputError

MAX_GPUS = 8  # of one host, which NVLink joins
# Triton's matrix products are chosen by timing them. Without a GPU some have no tiles at all; cuBLAS takes every shape.
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


class _Target(NamedTuple):
  """A GPU as its architecture's white paper and `deviceQuery` describe it; sizes in bytes.

  Attributes:
    kind: the name that the driver gives it.
    capability: compute capability, major and minor.
    multiprocessors, cores: streaming multiprocessors, and float32 units in each.
    shared_memory, block_memory: shared memory of a multiprocessor, and the most that one block may have of it.
    l2_cache: of the whole GPU.
    clock_ghz: of the processors, at most.
  """

  kind: str
  capability: tuple[int, int]
  multiprocessors: int
  cores: int
  shared_memory: int
  block_memory: int
  l2_cache: int
  clock_ghz: float


_KIB, _MIB = 2**10, 2**20
_HOPPER = ((9, 0), 132, 128, 228 * _KIB, 227 * _KIB, 50 * _MIB, 1.98)
GPUS = {
  "a100": _Target("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164 * _KIB, 163 * _KIB, 40 * _MIB, 1.41),
  "h100": _Target("NVIDIA H100 80GB HBM3", *_HOPPER),
  "h200": _Target("NVIDIA H200", *_HOPPER),
}


def gpu_devices(name: str, layout: str, memory: int, bandwidth: float) -> list[Any]:
  """GPUs of one host, `layout` being their number, to compile for; the compiler needs neither a GPU nor its driver.

  `memory` and `bandwidth` are those of one GPU, in bytes and bytes per second.

  Without a GPU it tunes no kernel: a program's memory is nearly what it will be, its speed is not known.
  """
  if not (layout.isdecimal() and 1 <= int(layout) <= MAX_GPUS):
    raise InputError(f"--topology {name}:{layout} must be GPUs of one host, {name}:1 to {name}:{MAX_GPUS}")
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # which asks the driver for its GPUs
  target = _description(GPUS[name], memory, bandwidth)
  try:
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{layout}").devices
  except NotImplementedError:  # no such compiler
    raise InputError(
      f"--topology {name}:{layout} needs the compiler for NVIDIA GPUs: pip install 'jax[cuda13]' (no GPU is needed)"
    ) from None


def _description(target: _Target, memory: int, bandwidth: float) -> str:
  """XLA's GpuTargetConfigProto, as text; what is written out is the same for all of them."""
  major, minor = target.capability
  return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024
      threads_per_warp: 32
      threads_per_core_limit: 2048
      shared_memory_per_block: {48 * _KIB}
      shared_memory_per_block_optin: {target.block_memory}
      shared_memory_per_core: {target.shared_memory}
      registers_per_block_limit: 65536
      registers_per_core_limit: 65536
      block_dim_limit_x: {2**31 - 1}
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
      core_count: {target.multiprocessors}
      fpus_per_core: {target.cores}
      clock_rate_ghz: {target.clock_ghz}
      l2_cache_size: {target.l2_cache}
      memory_bandwidth: {bandwidth:.0f}
      device_memory_size: {memory}
      cuda_compute_capability {{ major: {major} minor: {minor} }}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 8 }}
    runtime_version {{ major: 12 minor: 8 }}
    device_description_str: "{target.kind}"
  """
