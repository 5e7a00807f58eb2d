"""The exported diffusers directory: loaded by diffusers itself, called as a user calls it, compared with JAX."""

import dataclasses
import functools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.additive import AdditiveConfig
from compdiff_jax.conditioning.flat import FlatConfig
from compdiff_jax.conditioning.hcn import HCNConfig
from compdiff_jax.conditioning.none import NoConditionerConfig
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.conditioning.typed import TypedConfig
from compdiff_jax.data.prompts import format_prompt
from compdiff_jax.data.tokenizer import load_tokenizer
from compdiff_jax.diffusion import trajectory
from compdiff_jax.diffusion.guidance import composed_guidance
from compdiff_jax.diffusion.samplers import Sampler, make_table
from compdiff_jax.diffusion.schedule import NoiseSchedule
from compdiff_jax.interop import weights
from compdiff_jax.interop.export_directory import CONDITIONER_CLASSES
from compdiff_jax.interop.schedulers import to_diffusers
from compdiff_jax.interop.torch_files import conditioner as torch_conditioners
from compdiff_jax.interop.torch_files.pipeline import CompDiffPipeline
from tests import torch_states
from tests.toy_export import (
  SCHEDULE,
  SCHEMA,
  TEXT_PARAMS,
  TEXTS,
  UNET_PARAMS,
  VARIANTS,
  conditioner,
  export,
  load,
  make_tokenizer,
  text_encoder,
  unet,
)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
  directory = tmp_path_factory.mktemp("tokenizer")
  return make_tokenizer(directory)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer_dir):
  root = tmp_path_factory.mktemp("exports")
  return {variant: export(root / variant, tokenizer_dir, variant) for variant in VARIANTS}


@pytest.fixture(scope="module")
def pipes(exported):
  return {variant: load(directory) for variant, directory in exported.items()}


def test_timesteps_are_those_of_the_run(tmp_path, tokenizer_dir):
  """Stable Diffusion's own pipeline would add 1 to them."""
  scheduler = to_diffusers(NoiseSchedule(steps_offset=0), Sampler("ddim", timestep_spacing="leading"))
  pipe = load(export(tmp_path / "model", tokenizer_dir, "nulls", scheduler_config=scheduler))
  pipe.scheduler.set_timesteps(10)
  assert pipe.scheduler.timesteps.tolist() == list(range(900, -1, -100))


def test_guidance_may_end_on_the_way(pipes):
  """From half of the steps on the UNet has the conditional rows alone."""
  drawn = {}
  for ratio in (0.0, 0.5, 1.0):
    drawn[ratio] = pipes["time"](
      TEXTS[0], age=64, sex="female", race="asian", num_inference_steps=4, guidance_scale=4.0, output_type="latent",
      latents=torch.ones(1, 4, 8, 8), callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=ratio),
    ).images  # fmt: skip
  assert (drawn[0.5] - drawn[0.0]).abs().max() > 0.01 and (drawn[0.5] - drawn[1.0]).abs().max() > 0.01


# Compiling takes longer than running here; without LLVM's expensive passes it takes half as long.
@functools.partial(jax.jit, compiler_options={"xla_llvm_disable_expensive_passes": True})
def sample_jax(params, conditional, unconditional, ids, negative_ids, noise, scale):
  unet_params, text_params = params

  def context(ids, output):
    return jnp.concatenate([text_encoder(text_params, ids), output.tokens], axis=1), output.time_vector

  predict = composed_guidance(
    lambda sample, timesteps, context: unet(unet_params, sample, timesteps, *context),
    [context(negative_ids, unconditional), context(ids, conditional)],
    [(1, 0, scale)],
  )
  return trajectory.sample(predict, noise, None, make_table(Sampler(), SCHEDULE, 10))


@pytest.mark.parametrize("variant", VARIANTS)
def test_latents_equal_jax_after_ten_ddim_steps(variant, pipes, exported):
  """Attributes all set, one unknown, all unknown; classifier-free guidance with and without a negative prompt."""
  config, prompt_attributes = VARIANTS[variant]
  values = {"age": [64.0, None, None], "sex": ["female", "male", None], "race": ["asian", "black", None]}
  if variant == "time":  # without learned nulls all of a conditioner's attributes are given or none
    values["age"][1] = 30.0
  encoded = {
    name: np.asarray([SCHEMA[name].encode(value) for value in column], SCHEMA[name].dtype)
    for name, column in values.items()
  }
  prompts = [
    format_prompt(text, {name: encoded[name][i] for name in SCHEMA.names}, SCHEMA, prompt_attributes)
    for i, text in enumerate(TEXTS)
  ]
  tokenizer = load_tokenizer(exported[variant] / "tokenizer")
  model, params = conditioner(config)
  run = jax.jit(lambda params, attributes: model(params, attributes)._replace(regressions=None))
  conditional, unconditional = run(params, encoded), run(params, SCHEMA.unknown(3))
  noise = np.random.default_rng(5).normal(size=[3, 8, 8, 4]).astype(np.float32)
  latents = {}
  for negative_prompt in (None, "blurred"):
    negative_ids = tokenizer([negative_prompt or ""] * 3)
    ours = sample_jax(
      (UNET_PARAMS, TEXT_PARAMS), conditional, unconditional, tokenizer(prompts), negative_ids, noise, 4.0
    )
    theirs = pipes[variant](
      TEXTS,
      negative_prompt=negative_prompt,
      guidance_scale=4.0,
      num_inference_steps=10,
      latents=torch.from_numpy(noise.transpose(0, 3, 1, 2)),
      output_type="latent",
      **values,
    ).images
    latents[negative_prompt] = theirs.numpy().transpose(0, 2, 3, 1)
    difference = np.abs(latents[negative_prompt] - np.asarray(ours)).max()
    assert difference <= 1e-3, difference
  # The comparison means something: prompts, demographics and the negative prompt change the picture by far more.
  assert np.abs(latents[None] - latents["blurred"]).max() > 0.05
  plain = pipes[variant](
    TEXTS,
    guidance_scale=4.0,
    num_inference_steps=10,
    latents=torch.from_numpy(noise.transpose(0, 3, 1, 2)),
    output_type="latent",
  ).images.numpy()
  change = np.abs(plain.transpose(0, 2, 3, 1) - latents[None]).max(axis=(1, 2, 3))
  assert change[0] > 0.05 and change[1] > 0.05 and change[2] < 1e-4


def test_the_zero_null_takes_every_route():
  config = TypedConfig(d_node=16, d_ctx=24, aux_hidden_dim=0, d_time_emb=8, film_channels=(4, 6), film_hidden=8)
  fields = {name: value for name, value in config.to_dict().items() if name != "kind"}
  theirs = torch_conditioners.TypedConditioner(schema=SCHEMA.to_json(), **fields).eval()
  host = types.SimpleNamespace(conditioner=theirs)
  tokens, time_vector, modulation = CompDiffPipeline._unconditional(host, 2, "zeros")
  assert tokens.shape == (2, 4, 24) and not tokens.any()
  assert time_vector.shape == (2, 8) and not time_vector.any()
  assert [gamma.shape for gamma, _ in modulation] == [(2, 4), (2, 6)]
  assert all((gamma == 1).all() and not beta.any() for gamma, beta in modulation)
  tokens, time_vector, modulation = CompDiffPipeline._unconditional(host, 2, "learned")
  assert tokens.any() and time_vector.any() and all(beta.any() for _, beta in modulation)


def test_an_export_names_its_null(tmp_path, tokenizer_dir, exported, pipes):
  assert json.loads((exported["nulls"] / "model_index.json").read_text())["null"] == "learned"
  of_zeros = load(export(tmp_path / "zeros", tokenizer_dir, "nulls", null="zeros"))

  def draw(pipe, **options):
    options |= {"latents": torch.ones(1, 4, 8, 8), "num_inference_steps": 1, "output_type": "latent"}
    return pipe("x", age=64, **options).images

  zeros = draw(of_zeros)
  assert torch.equal(zeros, draw(pipes["nulls"], null="zeros"))
  assert torch.equal(draw(of_zeros, null="learned"), draw(pipes["nulls"]))
  assert (zeros - draw(pipes["nulls"])).abs().max() > 1e-3


FINDINGS = Attribute("findings", "multilabel", values=("Edema", "Effusion", "Fracture"))


@pytest.mark.parametrize("schema", [SCHEMA, Schema((*SCHEMA, FINDINGS))], ids=["no labels", "labels"])
@pytest.mark.parametrize(
  "config",
  [
    HCNConfig(d_node=16, d_ctx=24, aux_hidden_dim=8),
    HCNConfig(("sex", "race"), d_node=16, d_ctx=24, learned_nulls=False),
    HCNConfig(("age",), d_node=16, d_ctx=24, use_uncertainty=False),
    HCNConfig(d_node=16, d_ctx=24, aux_hidden_dim=8, ordinal_encoder=True, ordinal_loss="soft"),
    TypedConfig(d_node=16, d_ctx=24, num_registers=2, d_time_emb=8, freq_dim=10),
    TypedConfig(d_node=16, d_ctx=24, multi_token=False, use_uncertainty=False, unconditional="zeros"),
    TypedConfig(("age", "race"), d_node=16, d_ctx=24, composer="flat", flat_hidden=20, aux_hidden_dim=0),
    TypedConfig(("sex",), d_node=16, d_ctx=24, composer="flat", num_registers=1, multi_token=True),
    TypedConfig(d_node=16, d_ctx=24, composer="transformer", num_registers=2, d_time_emb=8),
    TypedConfig(d_node=16, d_ctx=24, composer="transformer", multi_token=False),
    FlatConfig(d_node=16, d_ctx=24),
    FlatConfig(d_node=16, d_ctx=24, heads="deep", aux_hidden_dim=8, unconditional="zeros"),
    FlatConfig(("race", "age"), d_node=16, d_ctx=24, mode="separate", heads="none"),
    AdditiveConfig(d_node=16, d_ctx=24),
    AdditiveConfig(d_node=16, d_ctx=24, interaction_of_all=False),
    AdditiveConfig(("sex",), d_node=16, d_ctx=24, aux_hidden_dim=0),
  ],
)
def test_conditioner_equals_jax_with_wide_weights(config, schema):
  model, params = conditioner(config, schema)
  torch_class = getattr(torch_conditioners, CONDITIONER_CLASSES[config.kind])
  fields = {name: value for name, value in config.to_dict().items() if name != "kind"}
  theirs = torch_class(schema=schema.to_json(), **fields).eval()
  state = torch_states.to_torch(params)
  theirs.load_state_dict({name: torch.tensor(value) for name, value in state.items()}, strict=True)
  values = {
    "age": [0, 17.99, "18", 39.9, 60, None, 100],
    "sex": ["male", None, "female", "male", "female", None, "male"],
    "race": ["white", "black", None, "hispanic", "asian", None, "white"],
    "findings": ["Edema", "unmentioned", "Fracture=uncertain;Edema=negative", None, "Effusion", "", "Fracture"],
  }
  values = {name: values[name] for name in schema.names}
  if not config.represents_unknown:  # all or nothing: row 1 becomes unknown, row 2 known
    values["age"][1] = values["race"][1] = None
    values["race"][2] = "asian"
    if "findings" in values and not config.attributes:
      values["findings"][1:4] = None, "Edema", "unmentioned"
  encoded = theirs.encode_batch(values, 7)
  arrays = {name: np.asarray(encoded[name], schema[name].dtype) for name in encoded}
  expected = {n: np.asarray([schema[n].encode(v) for v in values[n]], schema[n].dtype) for n in values}
  for name in values:
    np.testing.assert_array_equal(arrays[name], expected[name])
  with torch.no_grad():
    conditional, unconditional = theirs(encoded), theirs(theirs.unknown(7))
  run = jax.jit(lambda params, attributes: model(params, attributes)[:2])
  for (tokens, time_vector), attributes in ((conditional, expected), (unconditional, schema.unknown(7))):
    ours = run(params, attributes)
    np.testing.assert_allclose(tokens, ours[0], atol=1e-4, rtol=1e-5)
    assert (time_vector is None) == (ours[1] is None)
    if time_vector is not None:
      np.testing.assert_allclose(time_vector, ours[1], atol=1e-4, rtol=1e-5)


def test_export_with_labels(tmp_path, tokenizer_dir):
  """Findings reach the picture through diffusers' own loader, and the card says how to write them."""
  schema = Schema((*SCHEMA, FINDINGS))
  config = dataclasses.replace(VARIANTS["nulls"][0], attributes=())
  own = (config, conditioner(config, schema)[1], schema)
  pipe = load(export(tmp_path / "out", tokenizer_dir, "nulls", conditioner=own))

  def latents(**values):
    generator = torch.Generator().manual_seed(0)
    return pipe("x", age=50, num_inference_steps=1, output_type="latent", generator=generator, **values).images

  edema = latents(findings="Edema")
  assert torch.equal(edema, latents(findings="Edema=positive; Effusion=unmentioned"))
  assert all((edema - latents(findings=other)).abs().max() > 1e-3 for other in ("Edema=negative", "unmentioned", None))
  card = (tmp_path / "out" / "README.md").read_text()
  assert "findings='Edema; Effusion=negative'" in card
  assert "| findings | Edema, Effusion, Fracture, each negative, uncertain or positive | tokens |" in card
  for wrong in ("Edem", "Edema=absent", "Edema; Edema", "Edema;"):
    with pytest.raises(ValueError, match=f"findings='{wrong}' is not accepted: give labels such as"):
      latents(findings=wrong)


def test_prompts_equal_jax():
  names = ("age", "sex", "race")
  theirs = torch_conditioners.HierarchicalConditioner(
    schema=SCHEMA.to_json(), d_node=4, d_ctx=4, prompt_attributes=names
  )
  for values in ((54.4, 1, 0), (54.5, -1, 3), (math.nan, 0, 1), (math.nan, -1, -1)):
    encoded = dict(zip(names, values))
    assert theirs.format_prompt("Clear lungs.", encoded) == format_prompt("Clear lungs.", encoded, SCHEMA, names)


def test_a_user_calls_it(pipes):
  pipe = pipes["nulls"]

  def call(*args, seed=0, **options):
    seeds = seed if isinstance(seed, list) else [seed]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(*args, num_inference_steps=2, generator=generators, output_type="np", **options).images

  one = call("Effusion left.", age=64, sex="female", race="asian")
  assert one.shape == (1, 16, 16, 3) and 0 <= one.min() < one.max() <= 1
  # One text and lists of attributes: a batch, each image as if it were alone.
  three = call(
    "Effusion left.", seed=[7, 0, 7], age=[20, 64, None], sex="female", race=np.asarray(["white", "asian", ""])
  )
  assert three.shape == (3, 16, 16, 3)
  np.testing.assert_allclose(three[1], one[0], atol=1e-3)
  assert np.abs(three[0] - three[2]).max() > 0.01
  # Left out, None and a table's spelling of unknown are the same.
  unknown = [call("Effusion left.", sex="male", **more) for more in ({}, {"age": None, "race": "unknown"})]
  np.testing.assert_array_equal(*unknown)
  assert np.abs(unknown[0] - call("Effusion left.")).max() > 0.01
  # Options of Stable Diffusion, and no guidance at all.
  assert call("x", seed=[1, 2], age=5, num_images_per_prompt=2, height=24, width=16).shape == (2, 24, 16, 3)
  assert call("x", age=5, guidance_scale=1.0).shape == (1, 16, 16, 3)
  pil = pipe("x", age=torch.tensor(5.0), num_inference_steps=1).images[0]
  assert pil.size == (16, 16)


def test_a_swapped_scheduler(pipes):
  pipe = pipes["nulls"]
  original = pipe.scheduler
  assert isinstance(original, DDIMScheduler) and not original.config.clip_sample
  try:
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(original.config)
    image = pipe("x", sex="male", num_inference_steps=3, output_type="np").images
  finally:
    pipe.scheduler = original
  assert image.shape == (1, 16, 16, 3) and np.isfinite(image).all()


@pytest.mark.parametrize(
  "variant, options, message",
  [
    ("nulls", {"sex": "Male"}, "sex='Male' is not accepted: give one of male, female, or None"),
    ("nulls", {"sex": 1}, "sex=1 is not accepted"),
    ("nulls", {"age": -1}, "age=-1 is not accepted: give a number from 0 to 100 year"),
    ("nulls", {"age": 101}, "age=101"),
    ("nulls", {"age": "old"}, "age='old'"),
    ("nulls", {"age": True}, "age=True"),
    ("nulls", {"race": ["white", "other"]}, "race='other' is not accepted: give one of white, black, asian"),
    ("nulls", {"group": "A"}, "unknown attribute or option 'group'; this model's attributes are age, sex, race"),
    ("nulls", {"null": "zero"}, "null='zero' is not accepted: give 'learned' or 'zeros'"),
    ("nulls", {"prompt_embeds": None}, "unknown attribute or option 'prompt_embeds'"),
    ("nulls", {"age": [20, 30], "sex": ["male"] * 3}, "lists of different lengths: age 2, sex 3"),
    ("released", {"age": 20, "sex": "male"}, "no learned nulls: give race too, or leave all"),
  ],
)
def test_refused_values(variant, options, message, pipes):
  with pytest.raises(ValueError) as error:
    pipes[variant]("x", num_inference_steps=1, **options)
  assert message in str(error.value)


def test_demographics_that_are_words_stand_in_the_card(tmp_path, tokenizer_dir):
  """Nothing but the caller writes them into the prompt of a plain Stable Diffusion pipeline."""
  plain = (NoConditionerConfig(d_ctx=24), {}, SCHEMA)
  for names, prompt, template in (
    (("age", "sex"), "90 year old female. Effusion left.", "<age> year old <sex>. <text>"),
    ((), "Effusion left.", ""),
  ):
    out = tmp_path / f"of_{len(names)}"
    export(out, tokenizer_dir, "nulls", conditioner=plain, prompt_attributes=names)
    card = (out / "README.md").read_text()
    assert f"image = pipe({prompt!r}).images[0]" in card
    assert (f"    {template}\n" in card) == ("words of the prompt" in card) == bool(names)
  assert "words of the prompt" not in (export(tmp_path / "hcn", tokenizer_dir, "released") / "README.md").read_text()


def test_the_conditioner_cannot_be_lost(exported):
  directory = exported["nulls"]
  with pytest.raises(ValueError, match="trust_remote_code"):
    DiffusionPipeline.from_pretrained(directory)
  with pytest.raises(ValueError, match="trust_remote_code"):
    StableDiffusionPipeline.from_pretrained(directory)


def test_directory_contents(exported, pipes):
  directory = exported["nulls"]
  index = json.loads((directory / "model_index.json").read_text())
  assert index["_class_name"] == ["pipeline", "CompDiffPipeline"]
  assert index["conditioner"] == ["conditioner", "HierarchicalConditioner"]
  config = json.loads((directory / "conditioner/config.json").read_text())
  assert Schema.from_json(config["schema"]) == SCHEMA and config["attributes"] == ["age", "sex", "race"]
  card = (directory / "README.md").read_text()
  for part in ("| sex | male, female | tokens |", "| images | 12 |", "| steps | 3 |", "No metrics", "research only"):
    assert part in card
  assert "age enters" not in card and "0 to 100 year | prompt" in (exported["released"] / "README.md").read_text()
  assert sorted(path.name for path in directory.parent.iterdir()) == sorted(VARIANTS)
  assert pipes["nulls"].dtype == torch.float32
  for name in ("pipeline.py", "conditioner/conditioner.py"):
    assert "compdiff_jax" not in (directory / name).read_text()
  first = {name: (place / "README.md").read_text().split("diffusion with ")[1] for name, place in exported.items()}
  named = {name for name, text in first.items() if text.startswith("hierarchical demographic conditioning (CompDiff),")}
  assert named == {"nulls", "released", "time"} and first["transformer"].startswith("demographic conditioning,")


def test_saved_again_by_torch(tmp_path, pipes):
  pipes["nulls"].save_pretrained(tmp_path / "again")
  again = load(tmp_path / "again")
  options = {"age": 30, "race": "black", "num_inference_steps": 1, "output_type": "latent"}
  images = [pipe("x", generator=torch.Generator().manual_seed(0), **options).images for pipe in (pipes["nulls"], again)]
  assert torch.equal(*images)
  with pytest.raises(ValueError, match="trust_remote_code"):
    DiffusionPipeline.from_pretrained(tmp_path / "again")
  with pytest.raises(ValueError, match="upload"):
    again.save_pretrained(tmp_path / "hub", push_to_hub=True)


def test_half_precision(tmp_path, tokenizer_dir):
  directory = export(tmp_path / "half", tokenizer_dir, "nulls", dtype="float16")
  model, params = conditioner(VARIANTS["nulls"][0])
  stored = weights.load_component(directory / "conditioner", model)
  for name, value in params.items():
    np.testing.assert_array_equal(stored[name], value.astype(jnp.float16).astype(jnp.float32))
  pipe = load(directory, dtype=torch.bfloat16)
  image = pipe("x", age=59.9, sex="male", num_inference_steps=1, output_type="np").images
  assert np.isfinite(image).all() and pipe.conditioner.dtype == torch.bfloat16


def test_a_failed_export_leaves_nothing(tmp_path, tokenizer_dir):
  class FullDisk(dict):
    def items(self):
      raise OSError(28, "No space left on device")

  out = tmp_path / "out"
  with pytest.raises(InputError, match=r"cannot write .*out.*: No space left on device"):
    export(out, tokenizer_dir, "nulls", vae_params=FullDisk())
  assert list(tmp_path.iterdir()) == []
  out.mkdir()
  (out / "kept").touch()
  with pytest.raises(InputError, match="not empty"):
    export(out, tokenizer_dir, "nulls")
  assert (out / "kept").exists()


def test_refused_exports(tmp_path, tokenizer_dir):
  with pytest.raises(InputError, match="no attribute 'agee'; did you mean 'age'"):
    export(tmp_path / "a", tokenizer_dir, "nulls", prompt_attributes=("agee",))
  with pytest.raises(InputError, match=r"neither vocab\.json nor tokenizer\.json"):
    export(tmp_path / "b", tmp_path, "nulls")
  config, params, _ = VARIANTS["nulls"][0], {}, SCHEMA
  clash = Schema((Attribute("prompt", "categorical", values=("a", "b")), *SCHEMA))
  with pytest.raises(InputError, match="'prompt' is also an argument of the torch pipeline"):
    export(tmp_path / "c", tokenizer_dir, "nulls", conditioner=(config, params, clash))
