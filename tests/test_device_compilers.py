"""Programs compiled for TPUs and GPUs that are not here, by their own compilers where these are installed.

`make test` runs some of those for TPUs, `make test-tpu` all; those for GPUs run where JAX's CUDA plugin is.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY, config_arguments

from compdiff_jax import cli, sharding
from compdiff_jax.ahead_of_time.chips import chip
from compdiff_jax.ahead_of_time.topologies import is_torus, topology_devices

_TPU = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu"
)
_GPU = pytest.mark.skipif(
  not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
  reason="needs the compiler for NVIDIA GPUs: pip install 'jax[cuda13]' (no GPU is needed)",
)


@_TPU
def test_unknown_layout_is_named():
  with pytest.raises(cli.InputError, match=r"knows no such one; of about that size: v5e:4x4, v5e:4x8, v5e:2x4$"):
    topology_devices("v5e:3x7", 1)


@_TPU
@pytest.mark.parametrize("generation", ["v4", "v5e", "v5p", "v6e"])
def test_every_generation_up_to_256_chips_and_two_slices(generation):
  """One device a chip, a known chip, and a mesh of all of them."""
  flat = generation in ("v5e", "v6e")
  for layout, count in (("2x2" if flat else "2x2x1", 4), ("16x16" if flat else "4x8x8", 256)):
    for slices in (1, 2):
      devices = topology_devices(f"{generation}:{layout}", slices)
      assert len(devices) == slices * count and chip(devices[0]).ici_bandwidth
      mesh = sharding.make_mesh({"data": -1, "fsdp": 4, "tensor": 1}, devices)
      assert dict(mesh.shape) == {"data": slices * count // 4, "fsdp": 4, "tensor": 1}
  assert is_torus(f"{generation}:{layout}") and not is_torus(f"{generation}:{'4x4' if flat else '2x2x2'}")


def _compile(workspace, *options):
  """In a process of its own: the compiler's logs go to stderr."""
  command = [
    sys.executable,
    "-m",
    "compdiff_jax",
    "compile",
    *config_arguments(workspace),
    "--inputs=moments",
    *options,
  ]
  return subprocess.run(command, cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True, check=False)


@_TPU
def test_two_tpu_slices_exchange_gradients_and_nothing_else(workspace, tmp_path):
  """The gradients are what crosses the slower network."""
  # Wide enough that the compiler hardly pads: it sends tiles of 8 x 128.
  widths = {"text_encoder.hidden_size": 128, "conditioner.d_ctx": 128, "unet.cross_attention_dim": 128}
  widths["unet.block_out_channels"] = (128,)
  options = ["--topology=v5e:2x2", "--slices=2", "--config.mesh.fsdp=2", f"--out={tmp_path / 'report.json'}"]
  done = _compile(workspace, *options, *(f"--config.{name}={value}" for name, value in widths.items()))
  assert done.returncode == 0, done.stderr
  facts = json.loads((tmp_path / "report.json").read_text())
  assert facts["devices"] == 8 and facts["slices"] == 2 and facts["device_kind"] == "TPU v5 lite"
  assert facts["fits"] and facts["memory"]["available"] == 16 * 2**30
  assert facts["memory_bound_seconds"] > facts["compute_bound_seconds"] > 0
  # Without the second that the compiler takes off for each call in which nothing is computed.
  assert 0 < facts["estimated_seconds"] < 0.1
  assert facts["ici_seconds"] > 0 and facts["dcn_seconds"] > 0
  assert {row["network"] for row in facts["collectives"]} == {"ICI", "DCN"}
  crossing = sum(row["sent_bytes"] for row in facts["collectives"] if row["network"] == "DCN")
  # A chip holds half of the gradients; it sends one of the four quarters of its slice to the other slice, and metrics.
  assert 1 < crossing / (facts["memory"]["gradients"] / 2) < 1.05


@_TPU
def test_a_v5p_takes_the_step_s_compiler_options(workspace, tmp_path):
  done = _compile(workspace, "--topology=v5p:2x2x1", "--config.mesh.fsdp=4", f"--out={tmp_path / 'report.json'}")
  assert done.returncode == 0, done.stderr
  facts = json.loads((tmp_path / "report.json").read_text())
  assert facts["device_kind"] == "TPU v5" and facts["compiler_options"] == {"xla_tpu_scoped_vmem_limit_kib": "65536"}


@_TPU
def test_a_step_that_is_too_large_ends_in_one_line_of_advice(workspace):
  done = _compile(workspace, "--topology=v5e:2x2", "--config.train.batch_size=1048576")
  assert done.returncode == 1 and "Traceback" not in done.stderr
  last = done.stderr.strip().splitlines()[-1]
  assert (
    "does not fit v5e:2x2: it takes" in last and "--suggest tries" in last and json.loads(done.stdout)["fits"] is False
  )


@_TPU
def test_kernel_compiled_for_tpus_never_writes_the_scores():
  """In a process of its own: the compiler's logs go to stderr. The scores of a row are 2 heads x 1024^2 float32."""
  code = """if True:
    import jax, jax.numpy as jnp
    from compdiff_jax import sharding
    from compdiff_jax.ahead_of_time.topologies import topology_devices
    from compdiff_jax.models.attention_backends import attention
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 1}, topology_devices("v5e:2x2", 1))
    x = jax.ShapeDtypeStruct((32, 1024, 2, 64), jnp.bfloat16, sharding=sharding.batch_sharding(mesh))
    gradient = jax.grad(lambda q, k, v: attention(q, k, v).astype(jnp.float32).sum(), (0, 1, 2))
    compiled = jax.jit(gradient).trace(x, x, x).lower().compile()
    print(compiled.as_text().count("tpu_custom_call"), compiled.memory_analysis().temp_size_in_bytes)
  """
  command = [sys.executable, "-c", code]
  done = subprocess.run(command, cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  kernels, temporaries = map(int, done.stdout.split()[-2:])
  assert kernels >= 2
  rows = 32 / 4
  assert temporaries < rows * 2 * 1024**2 * 4


@_GPU
def test_a_step_compiled_for_gpus_attends_by_cudnn(workspace, tmp_path):
  """Trained on texts of 77 tokens, an odd number, by eight GPUs that share the parameters."""
  options = ["--topology=h100:8", "--config.mesh.fsdp=8", "--config.compute_dtype=bfloat16"]
  done = _compile(workspace, *options, f"--out={tmp_path / 'report.json'}")
  assert done.returncode == 0, done.stderr
  facts = json.loads((tmp_path / "report.json").read_text())
  assert facts["devices"] == 8 and facts["device_kind"] == "NVIDIA H100 80GB HBM3" and facts["fits"]
  assert facts["memory"]["available"] == 60 * 2**30  # what JAX reserves of 80
  assert facts["flops"] > facts["kernel_flops"] > 0 and facts["memory_bound_seconds"] > 0
  gathered = sum(row["bytes"] for row in facts["collectives"] if row["kind"] == "all-gather")
  assert gathered > facts["memory"]["gradients"]
  assert {row["network"] for row in facts["collectives"]} == {"links"}
  done = _compile(workspace, *options, "--config.attention=xla")
  assert json.loads(done.stdout)["kernel_flops"] == 0, done.stderr


@_GPU
def test_cudnn_s_attention_is_counted_by_hand():
  """As the TPU's kernel is, by test_program_costs; 77 tokens are filled up to 78."""
  code = """if True:
    import functools, jax, jax.numpy as jnp
    from compdiff_jax.ahead_of_time.flops import count_jaxpr
    from compdiff_jax.models.attention_backends import attention
    query, key = (jax.ShapeDtypeStruct((2, length, 3, 64), jnp.bfloat16) for length in (512, 77))
    loss = lambda *inputs: attention(*inputs).astype(jnp.float32).sum()
    product = 2 * 2 * 3 * 512 * 78 * 64
    for function, products in ((attention, 2), (jax.grad(loss, (0, 1, 2)), 7)):
      jaxpr = jax.make_jaxpr(function)(query, key, key).jaxpr
      assert count_jaxpr(jaxpr, "cuda") == count_jaxpr(jaxpr, "cuda", kernels_only=True) == products * product
      assert count_jaxpr(jaxpr, kernels_only=True) == 0 < count_jaxpr(jaxpr)
  """
  env = os.environ | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
