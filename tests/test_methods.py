"""Every config of a method: one compiled step at toy size, shapes at full size, and what is refused."""

import ast
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conditioner_parity import AGE, CHEST, SEX, race
from conftest import REPOSITORY
from network_configs import SD21_BASE
from stand_in import batch_of, stand_in

from compdiff_jax import methods
from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.family import config_from_dict
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.config import differences, load_config, to_plain
from compdiff_jax.latent_diffusion import LatentDiffusion
from compdiff_jax.models.functional import Functional
from compdiff_jax.training.fairness import make_fairness
from compdiff_jax.training.optimizer import make_optimizer
from compdiff_jax.training.state import TrainState
from compdiff_jax.training.step import make_train_step
from data_prep.phantom.population import SCHEMA as PHANTOM

METHODS = tuple(methods.CONDITIONERS)
TOKENS = {"baseline": 0, "fairdiffusion": 0, "flat": 1, "hcn": 1, "compdiff": 4, "coind": 3, "additive": 1}
TERMS = {
  "baseline": set(),
  "fairdiffusion": {"fair_sigma_mean"},
  "flat": {"aux_age", "acc_group"},
  "hcn": {"kl", "composition", "aux_sex", "acc_group"},
  "compdiff": {"kl", "composition", "aux_joint", "acc_joint", "mae_age"},
  "coind": {"coind", "aux_age"},
  "additive": {"interaction", "aux_age"},
}


def unet(params, noisy, timesteps, context, *_):
  """Reads everything that the real one reads, through one matrix."""
  said = jnp.mean(context, axis=1) @ params["mix.kernel"]
  return noisy * params["gain"] + said[:, None, None]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
  ("path", "schema"), [("phantom_", PHANTOM), ("chest/", CHEST), ("fundus/", Schema((AGE, SEX, race(3))))]
)
def test_one_compiled_step(path, schema, name):
  sizes = {"d_node": 8, "d_ctx": 8, "aux_hidden_dim": 8}
  config = load_config(
    str(REPOSITORY / "configs" / f"{path}{name}.py"),
    ["--config.train.warmup_steps=0", "--config.train.weight_decay=0.0"],
  )
  config.conditioner.update({field: size for field, size in sizes.items() if field in config.conditioner})
  model = stand_in(unet, config_from_dict(config.conditioner.to_dict()), schema)
  fairness = make_fairness(config, schema)
  optimizer = make_optimizer(config.train)
  rng = np.random.default_rng(0)
  random = lambda shape: jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32)  # noqa: E731
  params = {
    "unet": {"gain": jnp.ones([]), "mix.kernel": random([8, 3])},
    "conditioner": {key: random(leaf.shape) for key, leaf in model.conditioner.shapes.items()},
  }
  step = jax.jit(make_train_step(model, config, optimizer, jnp.zeros(77, jnp.int32), fairness))
  state = TrainState.create(params, optimizer, fairness.create() if fairness else None)
  after, metrics = step(state, {}, batch_of(schema, 16), 0)
  terms = {term.replace("group", schema.names[2]) for term in TERMS[name]}
  assert terms <= set(metrics) and all(np.isfinite(value) for value in metrics.values())
  assert int(after.step) == 1
  for part in params:
    for key, before in params[part].items():
      assert np.all(np.isfinite(after.params[part][key]))
      if key.endswith("kernel"):  # rows of tables and nulls need their value in the batch
        assert np.any(after.params[part][key] != before), key


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
  """The config files of Stable Diffusion 2.1-base, without weights."""
  directory = tmp_path_factory.mktemp("sd")
  for part in ("unet", "vae", "text_encoder"):
    (directory / part).mkdir()
    (directory / part / "config.json").write_text(json.dumps(SD21_BASE[part]))
  return directory


def at_full_size(name, directory):
  config = load_config(str(REPOSITORY / "configs" / "chest" / f"{name}.py"))
  config.weights.update({part: str(directory / part) for part in ("unet", "vae", "text_encoder")})
  return config


@pytest.fixture(scope="module")
def full_model(stable_diffusion):
  return LatentDiffusion.from_config(at_full_size("compdiff", stable_diffusion), CHEST)


def abstract(shapes):
  return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}


@pytest.mark.parametrize("name", METHODS)
def test_conditions_at_full_size(name, full_model, stable_diffusion):
  """Tokens join 77 text tokens of the UNet's width; the networks beside the conditioner are the same for all."""
  config = at_full_size(name, stable_diffusion)
  assert not differences(to_plain(config)["weights"], to_plain(at_full_size("compdiff", stable_diffusion))["weights"])
  own = config_from_dict(config.conditioner.to_dict())
  model = dataclasses.replace(
    full_model, conditioner_config=own, conditioner=Functional(lambda rngs: own.build(CHEST, rngs))
  )
  attributes = {a.name: jax.ShapeDtypeStruct([6], a.dtype) for a in CHEST}
  text = jax.ShapeDtypeStruct([6, 77, 1024], jnp.bfloat16)
  params = {"conditioner": abstract(model.conditioner.shapes)}
  context, _ = jax.eval_shape(model.join_context, params, text, attributes)
  assert context.encoder_hidden_states.shape == (6, 77 + TOKENS[name], 1024)
  assert context.encoder_hidden_states.dtype == jnp.bfloat16


def test_the_unet_at_full_size(full_model):
  """865,910,724 parameters as Stable Diffusion 2.1's, and a prediction of the latents' shape from 81 tokens."""
  model = full_model
  assert sum(math.prod(leaf.shape) for leaf in model.unet.shapes.values()) == 865_910_724
  latents = jax.ShapeDtypeStruct([2, *model.latent_shape], jnp.float32)
  context = jax.ShapeDtypeStruct([2, 81, 1024], jnp.bfloat16)
  times = jax.ShapeDtypeStruct([2], jnp.int32)
  assert jax.eval_shape(model.unet, abstract(model.unet.shapes), latents, times, context).shape == (2, 64, 64, 4)
  assert "text_encoder" not in model.trained and set(model.trained) == {"unet", "conditioner"}


@pytest.mark.parametrize("name", METHODS)
def test_fundus_differs_from_chest_in_data_and_batch_alone(name):
  chest, fundus = (to_plain(load_config(str(REPOSITORY / f"configs/{data}/{name}.py"))) for data in ("chest", "fundus"))
  changed = {difference.split(":")[0] for difference in differences(chest, fundus)}
  assert changed == {"data.path", "train.batch_size", "sample.text"}
  three = Schema((AGE, SEX, race(3)))
  own = config_from_dict(methods.fundus(name).conditioner.to_dict())
  Functional(lambda rngs: own.build(three, rngs))


# What the docstring of a phantom config says about the keys in which it differs from its chest twin.
_DECLARED = {
  "small networks and pictures": ("unet", "vae", "text_encoder", "conditioner", "data.image_size"),
  "all from random weights": ("weights",),
  "the text encoder is trained": ("train_text_encoder",),
  "budget (steps, batch, rate, warm-up, average)": (
    *("train.steps", "train.batch_size", "train.learning_rate", "train.warmup_steps", "train.ema_decay"),
    *("vae_training", "logging"),
  ),
  "a smaller KL term": ("loss.kl", "loss.kl_anneal_steps"),
  "float32": ("compute_dtype",),
  "samples of 20 steps with guidance 2.": ("sample.num_steps", "sample.guidance", "sample.batch_size"),
  "on phantoms": ("data.path", "prompt_attributes", "conditioner.attributes"),
}


@pytest.mark.parametrize("name", METHODS)
def test_docstrings_declare_what_differs(name):
  read = lambda path: " ".join(ast.get_docstring(ast.parse((REPOSITORY / path).read_text())).split())  # noqa: E731
  text = read(f"configs/phantom_{name}.py")
  chest, phantom = to_plain(methods.chest(name)), to_plain(methods.phantom(name))
  for difference in differences(chest, phantom):
    key = difference.split(":")[0]
    words = next(words for words, keys in _DECLARED.items() if f"{key}.".startswith(tuple(f"{k}." for k in keys)))
    # Without a latent the weight of its KL term has no meaning.
    assert words in text or (key.startswith("loss.kl") and "kl" not in TERMS[name]), key
  for data, config in (("chest", methods.chest(name)), ("fundus", methods.fundus(name))):
    text = read(f"configs/{data}/{name}.py")
    assert f"global batch {config.train.batch_size} " in text
    if "Hyper-parameters of the reference" in text:
      assert ("guidance has the tokens of the nulls; there zero tokens" in text) == bool(TOKENS[name])
      assert ("the composition loss reads the pass that made the tokens" in text) == ("composition" in TERMS[name])
      assert ("standard deviation of 0.5; there 0.02" in text) == (name == "compdiff")
      assert ("the VAE computes in bfloat16" in text) == (config.compute_dtype == "bfloat16" and not config.upcast)


def test_hyper_parameters_of_the_reference():
  """Appendix of the method: optimizer, schedule and loss weights, and what each method writes into the prompt."""
  for name in METHODS:
    config = methods.chest(name)
    train = config.train
    assert (train.learning_rate, train.b1, train.b2, train.eps, train.weight_decay) == (1e-5, 0.9, 0.999, 1e-8, 1e-2)
    assert (train.schedule, train.warmup_steps, train.steps, train.clip_norm) == ("cosine", 500, 30_000, 1.0)
    assert config.seed == 42 and not config.train_text_encoder
    # Dropout is on, where the reference has none.
    for own in (config, methods.fundus(name), methods.phantom(name)):
      assert own.dropout.to_dict() == {"text": 0.1, "attribute": 0.1, "all_attributes": 0.1}
  loss = methods.chest("compdiff").loss
  assert (loss.kl, loss.kl_anneal_steps, loss.composition, loss.auxiliary) == (0.005, 5000, 0.1, 1.0)
  assert methods.chest("fairdiffusion").loss.input_perturbation == 0.1
  prompts = {name: tuple(methods.chest(name).prompt_attributes) for name in METHODS}
  everything = ("age", "sex", "race")
  assert prompts == {
    **dict.fromkeys(METHODS, ()), "baseline": everything, "fairdiffusion": everything, "hcn": ("age",)
  }  # fmt: skip


def test_phantom_methods_share_budget_and_data_order():
  configs = {name: to_plain(methods.phantom(name)) for name in METHODS}
  for name, config in configs.items():
    for part in ("train", "data", "seed", "unet", "vae_training", "dropout", "sample", "weights"):
      assert config[part] == configs["compdiff"][part], (name, part)


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    (["--config.prompt_attributes=('age',)"], "age is in prompt_attributes and in the conditioner"),
    (["--config.prompt_attributes=('ages',)"], "did you mean 'age'"),
    (["--config.conditioner.attributes=('age','sexx')"], "did you mean 'sex'"),
    (["--config.conditioner.d_ctx=768"], "must be equal: their tokens share one context"),
    (["--config.conditioner.d_time_emb=320"], r"4 \* 320 = 1280"),
    (["--config.conditioner.film_channels=(320,)"], r"the widths of the UNet's residual blocks, .*320, 320, 640"),
    (["--config.conditioner.num_registers=1", "--config.conditioner.multi_token=False"], "registers need multi_token"),
  ],
)
def test_configs_whose_parts_exclude_each_other_are_refused(overrides, words, stable_diffusion, monkeypatch):
  monkeypatch.setattr("compdiff_jax.latent_diffusion.Functional", lambda build: None)  # nothing is built before checks
  directories = [f"--config.weights.{part}={stable_diffusion / part}" for part in ("unet", "vae", "text_encoder")]
  config = load_config(str(REPOSITORY / "configs/chest/compdiff.py"), [*directories, *overrides])
  with pytest.raises(InputError, match=words):
    LatentDiffusion.from_config(config, CHEST)


def test_unknown_method_is_named():
  with pytest.raises(InputError, match="did you mean 'compdiff'"):
    methods.method("compdif")
