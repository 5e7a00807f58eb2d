"""`compdiff export`: its options, the reference's layout, the model card, and what happens when it fails."""

import json
import re
import resource
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import toy_models
from safetensors.torch import load_file
from toy_models import FLAT, HCN, REFERENCE_SCHEMA, TYPED

from compdiff_jax import default_config, export, import_weights, sharding
from compdiff_jax.checkpoint import Checkpoints
from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.additive import AdditiveConfig
from compdiff_jax.conditioning.hcn import HCNConfig
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.conditioning.typed import TypedConfig
from compdiff_jax.config import to_plain
from compdiff_jax.interop import keys, recognition, reference, safetensors_file, weights
from compdiff_jax.models.functional import Functional
from compdiff_jax.workdir import open_run


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
  directory = tmp_path_factory.mktemp("imported")
  source = toy_models.stable_diffusion(
    directory / "sd", toy_models.tokenizer(directory / "tokenizer"), toy_models.networks()
  )
  toy_models.save_state(source / "hcn" / "model.safetensors", toy_models.conditioner_state(TYPED))
  import_weights.main([f"--source={source}", f"--workdir={directory / 'run'}"])
  return directory / "run"


@pytest.fixture(scope="module")
def run(imported, tmp_path_factory):
  """The directory of a training run at step 7; its averaged parameters are twice the last ones."""
  directory = tmp_path_factory.mktemp("runs") / "run"
  shutil.copytree(imported, directory)
  (directory / "source.json").unlink()
  shutil.rmtree(directory / "checkpoints")
  config = to_plain(default_config.base("typed")) | json.loads((directory / "config.json").read_text())
  config["sample"]["null"] = "zeros"
  config["data"].update(path="datasets/chest", mix=[["datasets/synthetic", 0.25]])
  (directory / "config.json").write_text(json.dumps(config))
  rows = [{"step": 5, "loss": 0.75}, {"step": 7, "loss": 0.5}]
  (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  params = {name: open_run(imported).load_params("raw")[1][name] for name in ("unet", "conditioner")}
  with Checkpoints(directory / "checkpoints") as checkpoints:
    checkpoints.save(7, {"params": params, "ema": jax.tree.map(lambda x: 2 * x, params)})
  return directory


def _export(run, out, *options):
  export.main([f"--workdir={run}", f"--out={out}", *options])
  return out


def _stored(directory):
  """The tensors of a component, from one file or from shards."""
  return {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize(("options", "factor"), [((), 2), (("--ema",), 2), (("--raw",), 1)])
def test_averaged_or_last_parameters(run, tmp_path, options, factor):
  out = _export(run, tmp_path / "out", *options)
  expected = toy_models.conditioner_state(TYPED)
  stored = _stored(out / "conditioner")
  assert stored.keys() == expected.keys()
  assert all(torch.equal(value, factor * expected[name]) for name, value in stored.items())
  assert json.loads((out / "model_index.json").read_text())["null"] == "zeros"  # that of config.sample


def test_shards_in_half_precision(imported, tmp_path):
  """torch loads them, and the values are torch's rounding."""
  out = _export(imported, tmp_path / "out", "--dtype=bfloat16", "--max_shard_size=20KB")
  files = list((out / "unet").glob("diffusion_pytorch_model-*-of-*.safetensors"))
  assert len(files) > 3
  for path in files:
    tensors = load_file(path)
    assert len(tensors) == 1 or sum(2 * value.numel() for value in tensors.values()) <= 20_000
  pipe = diffusers.DiffusionPipeline.from_pretrained(out, trust_remote_code=True, dtype=torch.bfloat16)
  for name, model in toy_models.networks().items():
    state = model.to(torch.bfloat16).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in getattr(pipe, name).state_dict().items()), name
  values = {"age": 70, "sex": "male", "race": "Asian"}
  assert pipe("x", **values, num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)


def test_shard_sizes():
  sizes = {"5GB": 5 * 10**9, "200 MB": 2 * 10**8, "1.5GiB": 3 * 2**29, "1KB": 1000}
  assert {text: safetensors_file.parse_size(text) for text in sizes} == sizes


@pytest.mark.parametrize("size", ["5", "0GB", "-1GB", "5GB5"])
def test_a_wrong_shard_size(imported, tmp_path, fails, size):
  message = fails(export.main, f"--workdir={imported}", f"--out={tmp_path / 'out'}", f"--max_shard_size={size}")
  assert f"size '{size}' is not a positive number" in message and not (tmp_path / "out").exists()


def test_values_beyond_half_precision(tmp_path):
  params = {"conv.bias": jnp.asarray([1.0, 1e6])}
  with pytest.raises(InputError, match=r"conv\.bias of .* not finite in float16; store them as float32 or bfloat16"):
    weights.save_component(tmp_path / "component", {}, params, "UNet2DConditionModel", "float16")
  assert not (tmp_path / "component").exists()


def test_reference_layout(imported, tmp_path):
  """Plain Stable Diffusion for everyone, and the reference's folder with its keys and its config beside it."""
  out = _export(imported, tmp_path / "out", "--layout=reference")
  assert not (out / "pipeline.py").exists() and not (out / "conditioner").exists()
  pipe = diffusers.DiffusionPipeline.from_pretrained(out)
  assert type(pipe) is diffusers.StableDiffusionPipeline
  state, expected = load_file(out / "hcn" / "model.safetensors"), toy_models.conditioner_state(TYPED)
  assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
  # The reference's class takes exactly these (method, C.1).
  names = "num_sex num_race num_age_bins d_node d_ctx d_time_emb max_age age_freq_dim composer multi_token route_b"
  names += " num_registers attr_dropout_prob full_dropout_prob use_uncertainty use_aux_loss aux_hidden_dim dropout"
  names += " transformer_layers transformer_heads flat_hidden"
  config = json.loads((out / "hcn" / "config.json").read_text())
  assert config.keys() == set(names.split())
  assert (config["num_race"], config["d_node"], config["route_b"], config["age_freq_dim"]) == (4, 8, False, 6)
  # What the README says makes the reference's pickle.
  card = (out / "README.md").read_text()
  (command,) = re.findall(r'python -c "(.*)"', card)
  exec(command.replace("hcn/", f"{out}/hcn/"), {})
  pickled = torch.load(out / "hcn" / "pytorch_model.bin", weights_only=True)
  assert all(torch.equal(value, state[name]) for name, value in pickled.items())
  assert "draws without demographics" in card.replace("\n", " ")
  # And it comes back.
  import_weights.main([f"--source={out}", f"--workdir={tmp_path / 'again'}"])
  again, first = open_run(tmp_path / "again"), open_run(imported)
  assert again.model.conditioner_config == TYPED
  for ours, theirs in zip(jax.tree.leaves(again.load_params("ema")[1]), jax.tree.leaves(first.load_params("ema")[1])):
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
  "config",
  [
    HCN,
    HCNConfig(("age", "sex", "race"), d_node=8, d_ctx=16, aux_hidden_dim=0, learned_nulls=False, use_uncertainty=False),
    FLAT,
    TypedConfig(("age", "sex", "race"), d_node=8, d_ctx=16, multi_token=False, d_time_emb=32, unconditional="zeros"),
    TypedConfig(("age", "sex", "race"), d_node=8, d_ctx=16, composer="flat", flat_hidden=10, unconditional="zeros"),
    TypedConfig(
      ("age", "sex", "race"),
      d_node=8,
      d_ctx=16,
      composer="transformer",
      num_registers=2,
      transformer_heads=2,
      transformer_layers=1,
      unconditional="zeros",
    ),
  ],
)
def test_the_references_configs_are_read_back(config):
  shapes = keys.torch_shapes(Functional(lambda rngs: config.build(REFERENCE_SCHEMA, rngs)).shapes)
  prompts = reference.prompt_attributes(config)
  fields = reference.conditioner_config(config, REFERENCE_SCHEMA, prompts, shapes)
  assert recognition.infer_conditioner(shapes, fields) == (config, REFERENCE_SCHEMA)


_OTHER_RACES = Schema((*REFERENCE_SCHEMA.attributes[:2], Attribute("race", "categorical", values=("A", "B", "C", "D"))))
_OTHER_NAMES = Schema((*REFERENCE_SCHEMA.attributes[:2], Attribute("view", "categorical", values=("PA", "AP"))))


@pytest.mark.parametrize(
  ("config", "schema", "prompts", "message"),
  [
    (AdditiveConfig(d_node=8, d_ctx=16), REFERENCE_SCHEMA, (), "no conditioner of kind 'additive'"),
    (HCNConfig(d_node=8, d_ctx=16), REFERENCE_SCHEMA, (), "no learned nulls"),
    (TypedConfig(d_node=8, d_ctx=16), _OTHER_NAMES, (), "this model's are age, sex, view"),
    (TypedConfig(d_node=8, d_ctx=16), _OTHER_RACES, (), "its race is White, Black, Asian, Hispanic"),
    (TypedConfig(d_node=8, d_ctx=16, num_registers=1), REFERENCE_SCHEMA, (), "hierarchical composer has no registers"),
    (TypedConfig(d_node=8, d_ctx=16), REFERENCE_SCHEMA, ("age",), "this model was trained with age"),
    (HCN, REFERENCE_SCHEMA, (), "it puts age in front of the text"),
  ],
)
def test_what_the_reference_cannot_hold(config, schema, prompts, message):
  shapes = keys.torch_shapes(Functional(lambda rngs: config.build(schema, rngs)).shapes)
  with pytest.raises(InputError, match="--layout reference: the reference cannot hold this model") as error:
    reference.conditioner_config(config, schema, prompts, shapes)
  assert message in str(error.value)


def test_model_card(run, tmp_path, fails):
  rows = [
    {"measure": "KID [x]", "group": "overall", "value": 0.0123, "lo": 0.01, "hi": 0.02, "n_real": 9, "n_synthetic": 8,
     "reference": 0.001, "reference_lo": -0.02, "reference_hi": 0.03, "reference_name": "y"},
    {"measure": "KID [x]", "group": "age=80+", "n_real": 2, "n_synthetic": 8, "status": "n < 50"},
    {"measure": "FD [x]", "group": "overall", "value": 9.13, "status": "rank deficient (d=59)"},
  ]  # fmt: skip
  report = tmp_path / "report"
  report.mkdir()
  trained = open_run(run)
  settings = {"sampler": "ddim", "steps": 50, "guidance": 2.0, "guidance_parts": "", "null": "learned"}
  settings |= {"checkpoint_step": 7, "weights": "ema"}
  settings["model_sha256"] = trained.identity(
    trained.load_trained("ema", sharding.make_mesh(sharding.DATA_PARALLEL))[1]
  )

  def write_report(sampling):
    contents = {"headline": rows, "inputs": {"synthetic": {"sampling": sampling}}}
    (report / "report.json").write_text(json.dumps(contents))

  write_report(settings)
  card = (_export(run, tmp_path / "out", f"--report={report}") / "README.md").read_text()
  for line in (
    "| set | chest, synthetic (weight 0.25) |",
    "pipe('No acute cardiopulmonary abnormality.', age=90, sex='female', race=",
    "| steps | 7 |",
    "| weights | ema |",
    "| learning rate | 1e-05 |",
    "| training loss | 0.5 |",
    "| sex | male, female | tokens |",
    "| KID [x], overall | 0.0123 (0.01 to 0.02), 8 synthetic and 9 real images; reference 0.001 (-0.02 to 0.03), y |",
    "| images | sampler ddim, steps 50, guidance 2.0, null learned |",
    "| FD [x], overall | 9.13; rank deficient (d=59) |",
    "| KID [x], age=80+ | n < 50 |",
    "For research only.",
  ):
    assert line in card
  assert "No metrics were recorded" in (_export(run, tmp_path / "plain", "--raw") / "README.md").read_text()
  # The last parameters are another model.
  raw = (f"--workdir={run}", f"--out={tmp_path / 'no'}", "--raw", f"--report={report}")
  message = fails(export.main, *raw)
  assert f"{report} is about images of another model (step 7, ema; its model_sha256 is" in message
  assert settings["model_sha256"][:12] in message and not (tmp_path / "no").exists()
  write_report({})
  nameless = (_export(run, tmp_path / "nameless", "--raw", f"--report={report}") / "README.md").read_text()
  assert "| images | not made by compdiff sample: the report does not say by which model |" in nameless
  arguments = (f"--workdir={run}", f"--out={tmp_path / 'no'}", f"--report={tmp_path}")
  assert "give as --report the --out of compdiff evaluate" in fails(export.main, *arguments)
  (report / "report.json").write_text("{}")
  assert "is not a report" in fails(export.main, *arguments[:2], f"--report={report}")
  assert "--lora writes no model card" in fails(export.main, *arguments, "--lora")


def test_a_full_disk(imported, tmp_path, fails, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=300_000)
  with monkeypatch.context() as patch:
    patch.setattr(shutil, "disk_usage", lambda _: usage)
    message = fails(export.main, f"--workdir={imported}", f"--out={tmp_path / 'out'}")
  assert f"{tmp_path / 'out'} needs 0.0 GB and its disk has 0.0 GB free" in message and not list(tmp_path.iterdir())
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
  try:
    message = fails(export.main, f"--workdir={imported}", f"--out={tmp_path / 'out'}")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert f"cannot write {tmp_path / 'out'}" in message and "File too large" in message
  assert not list(tmp_path.iterdir())


def test_an_interrupted_export(imported, tmp_path, monkeypatch):
  """Ctrl-C in the middle of the third file."""
  files = []

  def write(path, *arguments):
    files.append(path)
    if len(files) == 3:
      path.write_bytes(b"half")
      raise KeyboardInterrupt
    whole(path, *arguments)

  whole = safetensors_file.write
  monkeypatch.setattr(safetensors_file, "write", write)
  with pytest.raises(KeyboardInterrupt):
    _export(imported, tmp_path / "out")
  assert len(files) == 3 and not list(tmp_path.iterdir())
