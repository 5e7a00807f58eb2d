"""`compdiff compile`: reports for this machine, and for TPUs and GPUs where their compilers are installed."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from conftest import REPOSITORY, config_arguments

from compdiff_jax import cli, compile, sharding
from compdiff_jax.ahead_of_time import suggest
from compdiff_jax.ahead_of_time.chips import chip, compiler_options, is_torus, topology_devices
from compdiff_jax.ahead_of_time.flops import count_flops
from compdiff_jax.ahead_of_time.program import model_flops
from compdiff_jax.ahead_of_time.report import out_of_memory
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.config import load_config
from compdiff_jax.latent_diffusion import LatentDiffusion


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
  assert count(changed) == 2 * base
  assert model_flops(config, schema, "images") > base


def test_report_for_this_machine(workspace, setting, tmp_path, capsys):
  arguments = [*config_arguments(workspace), "--topology=local", "--config.mesh.fsdp=4", "--inputs=moments"]
  compile.main([*arguments, f"--out={tmp_path / 'report.json'}"])
  printed = capsys.readouterr()
  facts = json.loads(printed.out)
  assert facts == json.loads((tmp_path / "report.json").read_text())
  assert facts["fits"] and facts["devices"] == 8 and facts["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
  config, schema = setting
  model = LatentDiffusion.from_config(config, schema)
  leaves = [leaf.size for name in model.trained for leaf in model.component(name).shapes.values()]
  # Parameters, EMA and two moments, between a quarter and the whole of each; the rows of a batch are small beside them.
  assert 16 * sum(leaves) / 4 < facts["memory"]["arguments"] < 16 * sum(leaves)
  memory = facts["memory"]
  assert memory["peak"] == memory["arguments"] + memory["results"] + memory["temporaries"] + memory["code"]
  kinds = {row["kind"] for row in facts["collectives"]}
  assert "all-gather" in kinds and kinds & {"all-reduce", "reduce-scatter"}
  assert "fits" in printed.err and "DOES NOT" not in printed.err


def test_a_run_to_start_from_brings_its_networks(workspace, trained, monkeypatch, capsys):
  """As in `compdiff train --dry_run`."""
  seen = []
  monkeypatch.setattr(compile, "report", lambda program, config, *_: seen.append(config) or {"fits": True})
  monkeypatch.setattr(compile, "print_report", lambda facts: None)
  arguments = ["--config.weights.vae=", "--config.weights.tokenizer=", f"--config.init={trained}", "--topology=local"]
  compile.main([*config_arguments(workspace), *arguments, "--config.unet.block_out_channels=(32,)"])
  assert json.loads(capsys.readouterr().out)["fits"]
  assert seen[0].weights.vae == str(workspace / "vae") and tuple(seen[0].unet.block_out_channels) == (16,)


def test_a_sampler_is_as_many_networks_as_its_steps(setting):
  config, schema = setting
  model = LatentDiffusion.from_config(config, schema)

  def flops(steps):
    changed = suggest.changed(config, {"sample.num_steps": steps, "sample.batch_size": 6})
    return model_flops(changed, schema, "images", "sample")

  shape = jax.ShapeDtypeStruct
  params = {name: model.component(name).shapes for name in ("unet", "vae", "text_encoder", "conditioner")}
  ids = shape((12, model.text_config.max_position_embeddings), jnp.int32)
  latents = shape((12, *model.latent_shape), jnp.float32)
  contexts = lambda params, ids: model.context(params, ids, model.schema.unknown(12))[0]  # noqa: E731
  context = jax.eval_shape(contexts, params, ids)
  unet = count_flops(model.unet, params["unet"], latents, shape((12,), jnp.float32), *context)
  text = count_flops(contexts, params, ids)
  decoder = count_flops(model.decode, params, shape((6, *model.latent_shape), jnp.float32))
  # Twice as many rows as pictures: with and without the condition.
  assert flops(5) == text + 5 * unet + decoder


def test_report_of_the_sampler(workspace, capsys):
  compile.main([*config_arguments(workspace), "--program=sample", "--topology=local", "--config.sample.batch_size=9"])
  facts = json.loads(capsys.readouterr().out)
  assert facts["fits"] and facts["program"] == "sample" and facts["steps"] == 2
  assert facts["batch_size"] == 16  # two rows on each of eight devices
  assert facts["flops"] * 8 == facts["model_flops"] and facts["memory"]["gradients"] == 0


def test_suggestion_end_to_end(workspace, setting, capsys):
  """With a little less memory than the plain step takes on eight devices, splitting the state over two is enough."""
  arguments = [*config_arguments(workspace), "--topology=local", "--inputs=moments"]
  compile.main(arguments)
  peak = json.loads(capsys.readouterr().out)["memory"]["peak"]
  limited = [*arguments, f"--memory_gib={(peak - 1000) / 2**30}"]

  assert cli.run(compile.main, "compile", limited) == 1
  printed = capsys.readouterr()
  last = printed.err.strip().splitlines()[-1]
  assert "does not fit local: it takes" in last and "--config.mesh.fsdp=2 should fit; --suggest tries" in last
  assert json.loads(printed.out)["fits"] is False

  compile.main([*limited, "--suggest"])
  printed = capsys.readouterr()
  facts = json.loads(printed.out)
  assert printed.err.strip().endswith("the best that fits: --config.mesh.fsdp=2")
  assert facts["fits"] and facts["memory"]["peak"] < peak - 1000 and facts["changes"] == {"mesh.fsdp": 2}
  assert [one["fits"] for one in facts["tried"]] == [False, True]


def test_candidates_from_fast_to_slow(setting):
  config = suggest.changed(setting[0], {"train.batch_size": 30, "remat": "blocks"})
  found = suggest.candidates("train", config, setting[1], jax.devices(), "images")
  # 30 rows become 4 on each device. The fastest recomputes nothing and gathers nothing.
  assert found[0].changes == {"train.batch_size": 32, "remat": "none"}
  assert found[1].changes == {"train.batch_size": 32, "remat": "none", "mesh.fsdp": 2}
  assert len(found) == 4 * 3 * 3 and [one.time for one in found] == sorted(one.time for one in found)
  held = {one.changes.get("mesh.fsdp", 1): one.held for one in found}
  assert held[1] > held[2] > held[4] > held[8] > held[1] / 8
  smallest = min(one.activations for one in found)
  assert smallest == 0.25  # one row, all blocks recomputed
  # An axis of "all the remaining devices" is compared by its size.
  for mesh, own in (({"mesh.data": 1, "mesh.fsdp": -1}, 8), ({"mesh.fsdp": 2, "mesh.data": 2, "mesh.tensor": -1}, 2)):
    found = suggest.candidates("train", suggest.changed(config, mesh), setting[1], jax.devices(), "images")
    meshes = [sharding.make_mesh(suggest.changed(config, {**mesh, **one.changes}).mesh).shape for one in found]
    assert [m["fsdp"] for m, one in zip(meshes, found) if one.changes.keys() == {"train.batch_size"}] == [own]
    assert {m["fsdp"] for m in meshes} == {2**n for n in range(4) if 2**n * meshes[0]["tensor"] <= 8}
  rows = suggest.candidates("sample", config, setting[1], jax.devices(), "images")
  assert [one.changes for one in rows] == [{}]
  rows = suggest.candidates("sample", suggest.changed(config, {"sample.batch_size": 40}), setting[1], jax.devices(), "")
  assert [one.changes.get("sample.batch_size", 40) for one in rows] == [40, 24, 16, 8]


def test_search_compiles_few_and_learns_from_each():
  """A machine whose truth is: 10 held, 8 for each unit of activations; 40 are there."""
  options = [
    suggest.Candidate({"n": n}, n, held, activations)
    for n, (held, activations) in enumerate(
      [(50, 1.0), (10, 9.0), (10, 8.0), (10, 6.0), (10, 4.0), (10, 3.0), (10, 1.0)]
    )
  ]
  compiled = []

  def compile_with(changes):
    one = options[changes["n"]]
    compiled.append(changes["n"])
    peak = one.held + 8 * one.activations
    return {"fits": peak <= 40, "memory": {"peak": peak}}

  reports = list(suggest.search(options, compile_with, 40))
  # 0 cannot fit; 1 is tried; 2 and 3 are then known not to; 4 is near enough to try.
  assert compiled == [1, 4, 5] and reports[-1]["fits"]
  assert suggest.likely([*options[1:], suggest.Candidate({}, 9, 10, 8.0)], 10 + 8 * 8, 40) == options[5]
  compiled.clear()
  list(suggest.search(options, compile_with, None))
  assert compiled[0] == 0


@pytest.mark.parametrize(
  ("message", "peak", "available"),
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.00G) exceeds"
      " available HBM (15.75G).",
      20 * 2**30,
      15.75 * 2**30,
    ),
    (
      "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\nUsed 512.50M of 0.25G hbm. Exceeded hbm capacity by"
      " 256.5M.",
      512.5 * 2**20,
      2**28,
    ),
    ("RESOURCE_EXHAUSTED: out of something", None, 7),
  ],
)
def test_what_a_compiler_without_memory_says(message, peak, available):
  facts = out_of_memory(message, {"state": 5, "available": 7})
  assert facts["fits"] is False and "\n" not in facts["compiler"] and facts["compiler"].startswith(("Ran", "out"))
  assert facts["memory"].get("peak") == peak and facts["memory"]["available"] == available


@pytest.mark.parametrize(
  ("options", "words"),
  [
    (["--topology=v7:4x4"], "must be local, GENERATION:LAYOUT"),
    (["--topology=v5e:16"], "must be local, GENERATION:LAYOUT"),
    (["--topology=v5ee:4x4"], "did you mean 'v5e'"),
    (["--topology=v5e:256"], "v5e has v5e:16x16"),
    (["--topology=v5p:4x4"], "v5p has v5p:2x2x4"),
    (["--topology=v6e:4x4x4"], "v6e has v6e:8x8"),
    (["--topology=v5e:0x4"], "must be local, GENERATION:LAYOUT"),
    (["--topology=local", "--memory_gib=0"], "must be positive"),
    (["--topology=local", "--program=sample", "--config.sample.batch_size=0"], "at least 1"),
    (["--topology=local", "--slices=2"], "needs a TPU topology"),
    (["--topology=h100:8", "--slices=2"], "needs a TPU topology"),
    (["--topology=h100:9"], "must be GPUs of one host, h100:1 to h100:8"),
    (["--topology=h100"], "must be GPUs of one host, h100:1 to h100:8"),
    (["--topology=h20:8"], "did you mean 'h200'"),
    (["--topology=local", "--slices=0"], "must be at least 1"),
    (["--topology=local", "--config.mesh.data=3"], "does not divide 8 devices"),
    (["--topology=local", "--config.train.batch_size=9"], "not divisible"),
    (["--topology=local", "--schema=nowhere.json"], "nowhere.json"),
    (["--topology=local", "--schema=tests"], "tests cannot be read: Is a directory"),
  ],
)
def test_bad_requests_are_refused(workspace, fails, options, words):
  assert words in fails(compile.main, *config_arguments(workspace), *options)


_TPU = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu"
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
  widths["unet.block_out_channels"] = (256,)
  options = ["--topology=v5e:2x2", "--slices=2", "--config.mesh.fsdp=4", f"--out={tmp_path / 'report.json'}"]
  done = _compile(workspace, *options, *(f"--config.{name}={value}" for name, value in widths.items()))
  assert done.returncode == 0, done.stderr
  facts = json.loads((tmp_path / "report.json").read_text())
  assert facts["devices"] == 8 and facts["slices"] == 2 and facts["device_kind"] == "TPU v5 lite"
  assert facts["fits"] and facts["memory"]["available"] == 16 * 2**30
  assert facts["memory_bound_seconds"] > facts["compute_bound_seconds"] > 0
  # Such small programs have calls that the compiler gives no time; then there is no estimate, and no wrong one.
  assert 0 < facts.get("estimated_seconds", 0.5) < 1
  assert facts["ici_seconds"] > 0 and facts["dcn_seconds"] > 0
  assert {row["network"] for row in facts["collectives"]} == {"ICI", "DCN"}
  crossing = sum(row["sent_bytes"] for row in facts["collectives"] if row["network"] == "DCN")
  # Each chip sends its quarter of the gradients to the other slice, and metrics.
  assert 1 < crossing / facts["memory"]["gradients"] < 1.05


@pytest.mark.parametrize(
  ("kind", "flags", "options"),
  [
    ("TPU v5", "", {"xla_tpu_scoped_vmem_limit_kib": "65536"}),
    ("TPU v5", "--xla_a=1", {"xla_tpu_scoped_vmem_limit_kib": "65536"}),
    ("TPU v5", "--xla_tpu_scoped_vmem_limit_kib=32768", {}),
    ("TPU v5 lite", "", {}),
    ("TPU v6 lite", "", {}),
    ("NVIDIA H200", "", {}),
    ("cpu", "", {}),
  ],
)
def test_own_flags_go_before_the_step_s_compiler_options(monkeypatch, kind, flags, options):
  monkeypatch.setenv("LIBTPU_INIT_ARGS", flags)
  assert compiler_options(types.SimpleNamespace(device_kind=kind)) == options


@_TPU
def test_a_v5p_takes_the_step_s_compiler_options(workspace, tmp_path):
  done = _compile(workspace, "--topology=v5p:2x2x1", "--config.mesh.fsdp=4", f"--out={tmp_path / 'report.json'}")
  assert done.returncode == 0, done.stderr
  facts = json.loads((tmp_path / "report.json").read_text())
  assert facts["device_kind"] == "TPU v5" and facts["compiler_options"] == {"xla_tpu_scoped_vmem_limit_kib": "65536"}


_GPU = pytest.mark.skipif(
  not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
  reason="needs the compiler for NVIDIA GPUs: pip install 'jax[cuda13]' (no GPU is needed)",
)


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


@_TPU
def test_a_step_that_is_too_large_ends_in_one_line_of_advice(workspace):
  done = _compile(workspace, "--topology=v5e:2x2", "--config.train.batch_size=1048576")
  assert done.returncode == 1 and "Traceback" not in done.stderr
  last = done.stderr.strip().splitlines()[-1]
  assert (
    "does not fit v5e:2x2: it takes" in last and "--suggest tries" in last and json.loads(done.stdout)["fits"] is False
  )
