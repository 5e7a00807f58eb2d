"""`compdiff compile` on this machine: reports, what is suggested, refused. Others: test_device_compilers.py."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import pytest
from conditioner_parity import CHEST
from conftest import REPOSITORY, config_arguments

from compdiff_jax import cli, compile, sharding
from compdiff_jax.ahead_of_time import stand_ins, suggest
from compdiff_jax.ahead_of_time.chips import compiler_options
from compdiff_jax.ahead_of_time.flops import count_flops
from compdiff_jax.ahead_of_time.program import model_flops, trace
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
  parts = [memory[part] for part in ("arguments", "results", "temporaries", "code", "idle")]
  assert memory["peak"] == sum(parts) and facts["stand_ins"] == []
  # A run has everything on the device that its state counts, whether the compiler takes it or not; rows are small.
  assert 0 < memory["arguments"] + memory["idle"] - memory["state"] < 5000
  kinds = {row["kind"] for row in facts["collectives"]}
  assert "all-gather" in kinds and kinds & {"all-reduce", "reduce-scatter"}
  assert "fits" in printed.err and "DOES NOT" not in printed.err


def test_idle_parameters(setting):
  """Of the autoencoder a step on moments reads nothing, one on images the encoder, and the sampler the decoder."""
  config, schema = suggest.changed(setting[0], {"train.accumulation": 2, "train.batch_size": 16}), setting[1]
  shapes = LatentDiffusion.from_config(config, schema).vae.shapes
  size = lambda *parts: sum(4 * leaf.size for name, leaf in shapes.items() if name.startswith(parts))  # noqa: E731
  idle = lambda *what: trace(what[0], config, schema, jax.devices(), what[1]).idle_bytes  # noqa: E731
  encoder, decoder = size("encoder", "quant_conv"), size("decoder", "post_quant_conv")
  assert idle("train", "moments") == encoder + decoder == size("")
  assert idle("train", "images") == decoder
  assert idle("sample", "") == encoder


def test_nothing_but_the_config_needs_to_be_there(workspace, tmp_path, capsys, monkeypatch):
  """What is missing is named, as is a batch that the devices do not divide; the program is traced, not compiled."""

  def traced(program, config, schema, devices, topology, inputs, memory):
    return {"fits": True, "batch_size": trace(program, config, schema, devices, inputs).images}

  monkeypatch.setattr(compile, "report", traced)
  monkeypatch.setattr(compile, "print_report", lambda facts: None)
  missing = [f"--config.{key}={tmp_path / 'none'}" for key in ("data.path", "weights.vae", "weights.tokenizer")]
  batch = ["--config.train.batch_size=9", "--config.train.accumulation=2"]
  compile.main([*config_arguments(workspace), *missing, *batch, "--topology=local"])
  printed = capsys.readouterr()
  facts = json.loads(printed.out)
  data, vae, size = facts["stand_ins"]
  assert (
    "age, sex, race, group (of 4 levels) stand in" in data
    and "weights.vae" in vae
    and "config.vae" in vae
    and " 9 " in size
  )
  assert all(sentence in printed.err.splitlines() for sentence in facts["stand_ins"])
  assert facts["batch_size"] == 16 and facts["changes"] == {"train.batch_size": 16}


def test_the_published_sizes_stand_in_for_weights_that_are_missing(tmp_path):
  config = load_config(str(REPOSITORY / "configs" / "chest" / "compdiff.py"))
  config.data.path = str(tmp_path / "none")
  config.weights.update({name: str(tmp_path / "none" / name) for name in config.weights})
  completed, sentences = stand_ins.with_networks(config, tmp_path)
  schema, said = stand_ins.schema_of(config)
  assert schema == CHEST and len(said) == 1 and len(sentences) == 3
  model = LatentDiffusion.from_config(completed, schema)
  count = lambda name: sum(leaf.size for leaf in model.component(name).shapes.values())  # noqa: E731
  assert [count(name) for name in ("unet", "vae", "text_encoder")] == [865_910_724, 83_653_863, 340_387_840]


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
  facts = json.loads(printed.out)
  assert facts["fits"] is False and facts["nearest"] == {"mesh.fsdp": 2}

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
  own = [one for one in found if one.own_batch]
  for part in (own, found[len(own) :]):
    assert [one.time for one in part] == sorted(one.time for one in part)
  # Every mesh, batch, accumulation and remat once: all accumulations of 4 rows, other numbers of rows at once.
  everything = {
    (fsdp, rows, accumulation, remat)
    for fsdp in (1, 2, 4, 8)
    for rows in (1, 2, 4, 8, 16, 32)
    for accumulation in (1, 2, 4)
    for remat in ("none", "matmuls", "blocks")
    if rows == 4 or accumulation == 1
  }
  defaults = {"mesh.fsdp": 1, "train.batch_size": 30, "train.accumulation": 1, "remat": "blocks"}
  tried = [tuple((defaults | one.changes)[key] for key in defaults) for one in found]
  assert sorted(tried) == sorted((f, 8 * rows, a, remat) for f, rows, a, remat in everything)
  assert {batch for (_, batch, _, _), one in zip(tried, found) if one.own_batch} == {32}
  held = {one.changes.get("mesh.fsdp", 1): one.held for one in found}
  assert held[1] > held[2] > held[4] > held[8] > held[1] / 8
  smallest = min(one.activations for one in found)
  assert smallest == 0.25  # one row, all blocks recomputed
  # Sizes that are no powers of two.
  six = suggest.changed(config, {"mesh.fsdp": 3, "train.batch_size": 18, "train.accumulation": 2})
  found = suggest.candidates("train", six, setting[1], jax.devices()[:6], "images")
  assert {one.changes.get("mesh.fsdp", 3) for one in found} == {1, 2, 3, 6}
  assert suggest.whole_batch(six, jax.devices()[:6]) == 24
  assert {one.changes["train.batch_size"] for one in found} == {6, 12, 24, 48, 96, 192}
  # An axis of "all the remaining devices" is compared by its size.
  for mesh, own in (({"mesh.data": 1, "mesh.fsdp": -1}, 8), ({"mesh.fsdp": 2, "mesh.data": 2, "mesh.tensor": -1}, 2)):
    found = suggest.candidates("train", suggest.changed(config, mesh), setting[1], jax.devices(), "images")
    meshes = [sharding.make_mesh(suggest.changed(config, {**mesh, **one.changes}).mesh).shape for one in found]
    unchanged = [m for m, one in zip(meshes, found) if one.own_batch and one.changes.keys() == {"train.batch_size"}]
    assert [m["fsdp"] for m in unchanged] == [own]
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
  assert suggest.likely(options[1:], {"n": 2}, 10 + 8 * 8, 40) == options[5]
  compiled.clear()
  list(suggest.search(options, compile_with, None))
  assert compiled[0] == 0


def test_larger_batches_are_tried_where_they_may_be_faster():
  """A machine whose truth is: 10 held, 8 for each unit of activations, 40 are there; 10 + rows images/s."""
  options = [
    suggest.Candidate({"rows": 4, "remat": "none"}, 1.0, 10, 4.0),
    suggest.Candidate({"rows": 4, "remat": "blocks"}, 1.3, 10, 1.0),
    suggest.Candidate({"rows": 16, "remat": "blocks"}, 1.1, 10, 5.0, own_batch=False),
    suggest.Candidate({"rows": 12, "remat": "blocks"}, 1.2, 10, 3.0, own_batch=False),
    suggest.Candidate({"rows": 8, "remat": "blocks"}, 1.25, 10, 2.0, own_batch=False),
    suggest.Candidate({"rows": 2, "remat": "none"}, 1.35, 10, 2.0, own_batch=False),
  ]

  def compile_with(changes, speed):
    one = next(one for one in options if one.changes == changes)
    peak = one.held + 8 * one.activations
    return {"fits": peak <= 40, "memory": {"peak": peak}, "changes": changes, **speed(changes["rows"])}

  def rows(speed):
    reports = list(suggest.search(options, functools.partial(compile_with, speed=speed), 40))
    return [one["changes"]["rows"] for one in reports], suggest.best(reports)["changes"]["rows"]

  # The config's batch fits with everything recomputed; 16 rows are known not to fit; the fewer are slower.
  assert rows(lambda n: {"estimated_images_per_second_a_chip": 10 + n}) == ([4, 4, 12], 12)
  assert rows(lambda n: {"estimated_images_per_second_a_chip": 10 - n}) == ([4, 4, 12], 4)
  assert rows(lambda n: {}) == ([4, 4], 4)


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
    (["--topology=local", "--schema=nowhere.json"], "nowhere.json"),
    (["--topology=local", "--config.data.path=tests"], "tests/schema.json is missing"),
    (["--topology=local", "--config.weights.vae=tests"], "config.json"),
    (["--topology=local", "--schema=tests"], "tests cannot be read: Is a directory"),
  ],
)
def test_bad_requests_are_refused(workspace, fails, options, words):
  assert words in fails(compile.main, *config_arguments(workspace), *options)


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
