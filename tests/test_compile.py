"""`compdiff compile`: reading compiled programs; reports for this machine, and for TPUs where libtpu is installed."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import REPOSITORY, config_arguments

from compdiff_jax import cli, compile, sharding
from compdiff_jax.ahead_of_time.chips import topology_devices
from compdiff_jax.ahead_of_time.hlo import collectives
from compdiff_jax.ahead_of_time.program import model_flops
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.config import load_config

_ROW = jax.P("data")


def _compiled(function, *shapes):
  mesh = sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
  mapped = jax.shard_map(function, mesh=mesh, in_specs=_ROW, out_specs=_ROW, check_vma=False)
  return jax.jit(mapped).lower(*[jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]).compile().as_text()


def test_collectives_are_counted_with_their_bytes_and_loops():
  """Each device holds [2, 16] float32, 128 bytes."""

  def program(x):
    x, _ = jax.lax.scan(lambda c, _: (jax.lax.psum(c, "data") * 0.5, None), x, None, length=7)
    whole = jax.lax.all_gather(x, "data")
    part = jax.lax.psum_scatter(whole, "data")
    return jax.lax.ppermute(part, "data", [(i, (i + 1) % 8) for i in range(8)])

  found = {one.kind: one for one in collectives(_compiled(program, (16, 16)))}
  assert (found["all-reduce"].times, found["all-reduce"].size) == (7, 128)
  assert (found["all-gather"].times, found["all-gather"].size) == (1, 8 * 128)
  assert (found["reduce-scatter"].times, found["reduce-scatter"].size) == (1, 8 * 128)
  assert found["collective-permute"].size == 128
  assert not any(one.between_slices for one in found.values())


def test_asynchronous_and_slice_crossing_forms():
  text = """HloModule m
%loop (p: f32[8]) -> f32[8] {
  %ag = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %rs = bf16[4]{0} reduce-scatter(%x), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = f32[8] while(%t), condition=%c, body=%loop, backend_config={"known_trip_count":{"n":"3"}}
  %s = (f32[64]{0}, u32[], token[]) send(%b), frontend_attributes={_handler_name="xla_megascale_runtime"}
  %t = (f32[64]{0}, u32[], token[]) send(%b), is_host_transfer=true
}
"""
  assert [tuple(one) for one in collectives(text)] == [
    ("all-gather", 128, 3, False),
    ("reduce-scatter", 32, 3, False),
    ("send", 256, 1, True),
  ]


@pytest.fixture(scope="module")
def setting(workspace):
  path, *overrides = config_arguments(workspace)
  config = load_config(path.removeprefix("--config="), overrides)
  return config, Schema.load(workspace / "data" / "schema.json")


def test_model_flops_count_the_batch_once_whatever_is_recomputed(setting):
  config, schema = setting
  count = functools.partial(model_flops, schema=schema, inputs="moments")
  base = count(config)
  changed = config.copy_and_resolve_references()
  changed.remat, changed.train.accumulation = "blocks", 2
  assert count(changed) == base
  changed.train.batch_size *= 2
  # The optimizer's share does not grow.
  assert 1.8 * base < count(changed) < 2 * base
  assert model_flops(config, schema, "images") > base


def test_report_for_this_machine(workspace, setting, tmp_path, capsys):
  arguments = [*config_arguments(workspace), "--topology=local", "--config.mesh.fsdp=4", "--inputs=moments"]
  compile.main([*arguments, f"--out={tmp_path / 'report.json'}"])
  printed = capsys.readouterr()
  facts = json.loads(printed.out)
  assert facts == json.loads((tmp_path / "report.json").read_text())
  assert facts["fits"] and facts["devices"] == 8 and facts["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
  config, schema = setting
  from compdiff_jax.latent_diffusion import LatentDiffusion

  model = LatentDiffusion.from_config(config, schema)
  leaves = [leaf.size for name in model.trained for leaf in model.component(name).shapes.values()]
  # Parameters, EMA and two moments, between a quarter and the whole of each; the rows of a batch are small beside them.
  assert 16 * sum(leaves) / 4 < facts["memory"]["arguments"] < 16 * sum(leaves)
  memory = facts["memory"]
  assert memory["peak"] == memory["arguments"] + memory["results"] + memory["temporaries"] + memory["code"]
  kinds = {row["kind"] for row in facts["collectives"]}
  assert "all-gather" in kinds and kinds & {"all-reduce", "reduce-scatter"}
  assert "fits" in printed.err and "DOES NOT" not in printed.err


def test_options_are_tried_from_cheap_to_expensive(setting):
  config = setting[0].copy_and_resolve_references()
  config.train.batch_size = 64
  found = compile.options(config, 8)
  assert found[:3] == [{"remat": "matmuls"}, {"remat": "blocks"}, {"mesh.fsdp": 2, "mesh.data": -1}]
  assert {"train.accumulation": 8, "remat": "blocks"} in found and not any(o.get("mesh.fsdp") == 16 for o in found)
  config.remat = "blocks"
  assert "remat" not in compile.options(config, 8)[0]


@pytest.mark.parametrize(
  ("options", "words"),
  [
    (["--topology=v7:4x4"], "must be local or GENERATION:LAYOUT"),
    (["--topology=v5e:16"], "must be local or GENERATION:LAYOUT"),
    (["--topology=v5ee:4x4"], "did you mean 'v5e'"),
    (["--topology=local", "--slices=2"], "needs a TPU topology"),
    (["--topology=local", "--slices=0"], "must be at least 1"),
    (["--topology=local", "--config.mesh.data=3"], "does not divide 8 devices"),
    (["--topology=local", "--config.train.batch_size=9"], "not divisible"),
    (["--topology=local", "--schema=nowhere.json"], "nowhere.json"),
  ],
)
def test_bad_requests_are_refused(workspace, fails, options, words):
  assert words in fails(compile.main, *config_arguments(workspace), *options)


_TPU = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu"
)


@_TPU
def test_unknown_layout_is_named():
  with pytest.raises(cli.InputError, match="knows no such one"):
    topology_devices("v5e:3x7", 1)


@_TPU
def test_two_tpu_slices_exchange_gradients_and_nothing_else(workspace, tmp_path):
  """In a process of its own: the compiler's logs go to stderr. The gradients are what crosses the slower network."""
  command = [sys.executable, "-m", "compdiff_jax", "compile", *config_arguments(workspace), "--inputs=moments"]
  command += ["--topology=v5e:2x2", "--slices=2", "--config.mesh.fsdp=4", f"--out={tmp_path / 'report.json'}"]
  done = subprocess.run(command, cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  facts = json.loads((tmp_path / "report.json").read_text())
  assert facts["devices"] == 8 and facts["slices"] == 2 and facts["device_kind"] == "TPU v5 lite"
  assert facts["fits"] and facts["memory"]["hbm"] == 16 * 2**30
  # The compiler has no estimate for programs that cross slices; the vendor's figures give two bounds.
  assert facts["memory_bound_seconds"] > facts["compute_bound_seconds"] > 0
  networks = {row["network"] for row in facts["collectives"]}
  assert networks == {"within a slice", "between slices"}
