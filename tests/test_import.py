"""`compdiff import`: every layout that PyTorch users have, read without loss into a run that needs nothing else."""

import json
import shutil

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import toy_models
from conftest import REPOSITORY
from safetensors.torch import load_file
from toy_models import FLAT, HCN, REFERENCE_SCHEMA, TYPED

from compdiff_jax import export, import_weights, sample, train
from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.training import step as training_step
from compdiff_jax.workdir import open_run


@pytest.fixture(scope="module")
def models():
  return toy_models.networks()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return toy_models.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer, models):
  """Stable Diffusion in float32."""
  return toy_models.stable_diffusion(tmp_path_factory.mktemp("models") / "sd", tokenizer, models)


def run_import(source, workdir, *options):
  import_weights.main([f"--source={source}", f"--workdir={workdir}", *map(str, options)])
  return open_run(workdir)


@pytest.mark.parametrize(
  ("dtype", "saving", "options"),
  [
    (torch.float32, {}, ()),
    (torch.float16, {"variant": "fp16"}, ()),
    (torch.bfloat16, {"max_shard_size": "20KB"}, ()),
    (torch.bfloat16, {"safe_serialization": False}, ("--allow_pickle",)),
  ],
  ids=["float32", "fp16 variant", "bfloat16 shards", "pickles"],
)
def test_stable_diffusion(tmp_path, tokenizer, dtype, saving, options):
  models = {name: model.to(dtype) for name, model in toy_models.networks().items()}
  source = toy_models.stable_diffusion(tmp_path / "sd", tokenizer, models, **saving)
  if "safe_serialization" in saving and list(source.rglob("*.safetensors")):
    for name in models:  # what transformers no longer writes itself
      for path in (source / name).glob("*.safetensors"):
        stem = "pytorch_model" if name == "text_encoder" else path.stem
        torch.save(load_file(path), path.with_name(f"{stem}.bin"))
        path.unlink()
  run = run_import(source, tmp_path / "run", *options)
  shutil.rmtree(source)
  step, params = run.load_params("ema")
  assert step == 0 and set(params) == set(models)
  for name, model in models.items():
    toy_models.assert_params(params[name], model.state_dict())
  assert run.model.schedule.prediction_type == "v_prediction" and run.config.sample.sampler == "pndm"
  assert (run.model.image_size, run.model.schema.names) == (32, ())
  stored = json.loads((tmp_path / "run" / "config.json").read_text())
  assert "sample" in stored and not {"train", "vae_training"} & stored.keys()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_training_checkpoint_of_the_reference(tmp_path, base, models, suffix, fails):
  """model, model_1, model_2 in the order UNet, text encoder, conditioner; what it lacks comes from --base."""
  checkpoint = tmp_path / "checkpoint-1200"
  states = [
    {name: value + 0.5 for name, value in models[component].state_dict().items()}
    for component in ("unet", "text_encoder")
  ]
  states.append(toy_models.conditioner_state(TYPED))
  pickled = suffix == "bin"
  for number, state in enumerate(states):
    name = f"model_{number}" if number else "model"
    toy_models.save_state(checkpoint / f"{'pytorch_' if pickled else ''}{name}.{suffix}", state)
  (checkpoint / "random_states_0.pkl").write_bytes(b"anything")
  if pickled:
    message = fails(import_weights.main, f"--source={checkpoint}", f"--workdir={tmp_path / 'no'}", f"--base={base}")
    assert "--allow_pickle" in message and not (tmp_path / "no").exists()
  run = run_import(checkpoint, tmp_path / "run", f"--base={base}", *(["--allow_pickle"] if pickled else []))
  step, params = run.load_params("raw")
  assert step == 1200
  states.append(models["vae"].state_dict())
  for name, state in zip(("unet", "text_encoder", "conditioner", "vae"), states):
    toy_models.assert_params(params[name], state)
  assert run.model.conditioner_config == TYPED and run.model.schema == REFERENCE_SCHEMA
  assert "--base" in fails(import_weights.main, f"--source={checkpoint}", f"--workdir={tmp_path / 'no'}")


def released(directory, base, config, folder="hcn"):
  shutil.copytree(base, directory)
  toy_models.save_state(directory / folder / "model.safetensors", toy_models.conditioner_state(config))
  return directory


def test_released_hcn(tmp_path, base, models):
  """Age stands in the prompt; the trained text encoder is the one beside the original."""
  source = released(tmp_path / "release", base, HCN)
  shutil.copytree(base / "text_encoder", source / "text_encoder_and_tokenizer")
  trained = {name: value * 2 for name, value in models["text_encoder"].state_dict().items()}
  toy_models.save_state(source / "text_encoder_and_tokenizer" / "model.safetensors", trained)
  run = run_import(source, tmp_path / "run")
  params = run.load_params("ema")[1]
  toy_models.assert_params(params["text_encoder"], trained)
  toy_models.assert_params(params["conditioner"], toy_models.conditioner_state(HCN))
  assert run.model.conditioner_config == HCN and tuple(run.config.prompt_attributes) == ("age",)


def test_released_flat_with_a_schema_of_ones_own(tmp_path, base, fails):
  source = released(tmp_path / "release", base, FLAT, "demographic_encoder")
  own = [dict(entry) for entry in REFERENCE_SCHEMA.to_json()]
  own[1]["values"] = ["M", "F"]
  Schema.from_json(own).save(tmp_path / "schema.json")
  run = run_import(source, tmp_path / "run", f"--schema={tmp_path / 'schema.json'}")
  assert run.model.conditioner_config == FLAT and run.model.schema["sex"].values == ("M", "F")
  own[2]["values"] = ["White", "Black"]
  Schema.from_json(own).save(tmp_path / "schema.json")
  arguments = (f"--source={source}", f"--workdir={tmp_path / 'no'}", f"--schema={tmp_path / 'schema.json'}")
  assert "emb_race.weight (file [4, 8], model [2, 8])" in fails(import_weights.main, *arguments)


@pytest.fixture(scope="module")
def imported(tmp_path_factory, base):
  """A CompDiff-2 release, imported, its source gone and the workdir moved."""
  directory = tmp_path_factory.mktemp("imported")
  source = released(directory / "source", base, TYPED)
  toy_models.edit_json(source / "model_index.json", hcn=["hcn", "CompDiff2Conditioner"], safety_checker=["x", "Y"])
  run_import(source, directory / "first")
  shutil.rmtree(source)
  (directory / "first").rename(directory / "run")
  return directory / "run"


def test_an_imported_model_is_sampled(imported, tmp_path, fails):
  (tmp_path / "plan.csv").write_text("text,age,sex,race\nEffusion.,64,female,Asian\nEffusion.,,,\n")
  out = tmp_path / "samples"
  sample.main([f"--workdir={imported}", f"--plan={tmp_path / 'plan.csv'}", f"--out={out}", "--num_steps=2"])
  assert len(list(out.glob("*.png"))) == 2
  # The reference never trains its nulls.
  (tmp_path / "plan.csv").write_text("text,age,sex,race\nEffusion.,,female,Asian\n")
  arguments = [f"--workdir={imported}", f"--plan={tmp_path / 'plan.csv'}", f"--out={tmp_path / 'partial'}"]
  assert "plan.csv row 2: age left out, and this model has no learned nulls" in fails(sample.main, *arguments)
  assert not (tmp_path / "partial").exists()


@pytest.fixture(scope="module")
def exported(imported, tmp_path_factory):
  directory = tmp_path_factory.mktemp("exported")
  for dtype in ("float32", "float16"):
    export.main([f"--workdir={imported}", f"--out={directory / dtype}", f"--dtype={dtype}"])
  return directory


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_round_trip_is_bit_identical(exported, tmp_path, dtype):
  """export -> import -> export gives the same files; stored in half precision, once rounded is rounded for good."""
  run = run_import(exported / dtype, tmp_path / "run")
  assert run.model.conditioner_config == TYPED and run.model.schema == REFERENCE_SCHEMA
  export.main([f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'second'}", f"--dtype={dtype}"])
  first, second = toy_models.contents(exported / dtype), toy_models.contents(tmp_path / "second")
  assert first.pop("README.md") != second.pop("README.md")  # they say where each came from
  assert first == second


def test_torch_loads_what_was_imported_and_exported(exported, models):
  """So import -> export loses nothing either."""
  pipe = diffusers.DiffusionPipeline.from_pretrained(exported / "float32", trust_remote_code=True)
  assert type(pipe.scheduler) is diffusers.PNDMScheduler
  for name, model in models.items():
    for key, value in getattr(pipe, name).state_dict().items():
      assert torch.equal(value, model.state_dict()[key]), f"{name} {key}"
  state = toy_models.conditioner_state(TYPED)
  assert all(torch.equal(value, state[key]) for key, value in pipe.conditioner.state_dict().items())
  card = (exported / "float32" / "README.md").read_text()
  assert "imported from source (CompDiff release)" in card and "Give all of age, sex, race, or none of them" in card
  with pytest.raises(ValueError, match="no learned nulls: give age too"):
    pipe("Effusion.", sex="female", race="Asian")


@pytest.fixture
def idle_step(monkeypatch):
  """Training changes nothing; compiling the real step takes longer than the rest of a run."""

  def idle(state, frozen, batch, seed):
    return state._replace(step=state.step + 1), {"loss": jnp.ones([]), "grad_norm": jnp.ones([])}

  monkeypatch.setattr(training_step, "make_train_step", lambda *_: idle)


def start_from(origin, workspace, config="tests/hcn_config.py"):
  """Arguments of one step that starts from another run."""
  return [
    f"--config={REPOSITORY / config}",
    f"--config.data.path={workspace / 'data'}",
    f"--config.init={origin}",
    "--config.data.image_size=32",
    "--config.weights.vae=",
    "--config.weights.tokenizer=",
    f"--config.conditioner.d_ctx={toy_models.WIDTH}",
    "--config.conditioner.d_node=8",
    "--config.train_text_encoder=False",
    "--config.train.steps=1",
    "--config.train.warmup_steps=0",
    "--config.train.batch_size=8",
    "--config.logging.log_every=1",
    "--config.logging.checkpoint_every=1",
  ]


def test_training_starts_from_an_imported_model(workspace, base, tmp_path, fails, idle_step):
  """The parameters of the new run are those of the imported one."""
  run = run_import(base, tmp_path / "imported")
  arguments = start_from(tmp_path / "imported", workspace)
  for _ in range(2):  # the second time resumes
    train.main([*arguments, f"--workdir={tmp_path / 'tuned'}"])
  tuned = open_run(tmp_path / "tuned")
  step, params = tuned.load_params("raw")
  assert step == 1 and tuned.model.conditioner_config.kind != "none"
  for name, component in run.load_params("raw")[1].items():
    for key, value in component.items():
      np.testing.assert_array_equal(params[name][key], value, err_msg=f"{name} {key}")
  assert json.loads((tmp_path / "tuned" / "config.json").read_text())["scheduler"]["prediction_type"] == "v_prediction"
  # Not into the imported model itself, and not beside other weights.
  message = fails(train.main, *arguments, f"--workdir={tmp_path / 'imported'}")
  assert f"--config.init={tmp_path / 'imported'}" in message
  arguments.append("--config.weights.unet=somewhere")
  assert "config.weights.unet" in fails(train.main, *arguments, f"--workdir={tmp_path / 'no'}")


@pytest.mark.parametrize(
  ("config", "field", "without", "learned"),
  [
    ("tests/hcn_config.py", "learned_nulls", False, True),
    ("configs/phantom_flat.py", "unconditional", "zeros", "nulls"),
  ],
)
def test_training_goes_on_with_nulls_or_without(workspace, base, tmp_path, idle_step, config, field, without, learned):
  """Nulls that the first run lacks start as in a new conditioner, all else as it was; another run drops them."""
  run_import(base, tmp_path / "0")
  params = []
  for number, value in enumerate((without, learned, without), start=1):
    arguments = start_from(tmp_path / str(number - 1), workspace, config)
    train.main([*arguments, f"--config.conditioner.{field}={value}", f"--workdir={tmp_path / str(number)}"])
    run = open_run(tmp_path / str(number))
    assert run.config.conditioner[field] == value
    params.append(run.load_params("raw")[1]["conditioner"])
  first, tuned, last = params
  nulls = {name: np.asarray(tuned[name]) for name in tuned.keys() - first.keys()}
  assert nulls.keys() == {"null_age", "null_sex", "null_group"} and last.keys() == first.keys()
  assert all(0.005 < value.std() < 0.05 for value in nulls.values())
  for name, value in first.items():
    np.testing.assert_array_equal(tuned[name], value, err_msg=name)
    np.testing.assert_array_equal(last[name], value, err_msg=name)


def test_training_keeps_the_imported_conditioner(imported):
  """Its attributes must be those of the data."""
  run = open_run(imported)
  config = run.config.copy_and_resolve_references()
  config.weights.update(dict.fromkeys(config.weights, ""))
  started = run.start(config, REFERENCE_SCHEMA)
  assert started.conditioner.to_dict() == {**TYPED.to_dict(), "attributes": ["age", "sex", "race"]}
  assert started.weights.vae == str(imported / "vae") and started.weights.unet == ""
  config.conditioner.unconditional = "nulls"  # what the reference does not train, this run may
  assert run.start(config, REFERENCE_SCHEMA).conditioner.unconditional == "nulls"
  with pytest.raises(InputError, match=r"was made for race of White, Black, Asian, Hispanic, and the data"):
    run.start(config, REFERENCE_SCHEMA.subset(("age", "sex")))
  config.lora.rank = 2
  with pytest.raises(InputError, match="does not go together with a LoRA"):
    run.start(config, REFERENCE_SCHEMA)
  config.lora.rank = 0
  config.conditioner.kind = "hcn"
  with pytest.raises(InputError, match="has a conditioner of kind 'typed', the config one of 'hcn'"):
    run.start(config, REFERENCE_SCHEMA)


def test_training_starts_from_a_run_that_trained_its_text_encoder(imported, tmp_path):
  shutil.copytree(imported, tmp_path / "run")
  (tmp_path / "run" / "source.json").unlink()
  run = open_run(tmp_path / "run")
  text = run.model.text_config.to_dict()
  values = json.loads((tmp_path / "run" / "config.json").read_text())
  values |= {"train_text_encoder": True, "text_encoder": text}
  values["weights"]["text_encoder"] = ""
  (tmp_path / "run" / "config.json").write_text(json.dumps(values))
  run = open_run(tmp_path / "run")
  config = run.config.copy_and_resolve_references()
  config.weights.update(dict.fromkeys(config.weights, ""))
  started = run.start(config, REFERENCE_SCHEMA)
  assert started.text_encoder.to_dict() == text and started.weights.text_encoder == ""
  config.train_text_encoder = False
  with pytest.raises(InputError, match=r"trained its text encoder; set config\.train_text_encoder=True"):
    run.start(config, REFERENCE_SCHEMA)
