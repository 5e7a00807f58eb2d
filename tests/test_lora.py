"""LoRA against PEFT in diffusers: the same file, the same prediction, merged and not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_parity
from conftest import config_arguments
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from network_configs import SD21_BASE, TINY_MEMORY
from stand_in import batch_of, stand_in

from compdiff_jax import export, train
from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.additive import AdditiveConfig
from compdiff_jax.default_config import base
from compdiff_jax.interop.weights import save_weights
from compdiff_jax.models.lora import LoRA
from compdiff_jax.training.optimizer import make_optimizer
from compdiff_jax.training.state import TrainState
from compdiff_jax.training.step import make_train_step
from data_prep.phantom.population import SCHEMA

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
FIELDS = TINY_MEMORY["unet"]


def factors_of(lora, seed=0):
  rng = np.random.default_rng(seed)
  return {name: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32) for name, x in lora.shapes.items()}


def test_diffusers_loads_the_file_and_predicts_the_same(tmp_path):
  model = torch_parity.randomize(torch_parity.build_torch("unet", FIELDS))
  functional = torch_parity.build_jax("unet", FIELDS)
  lora = LoRA(functional.shapes, TARGETS, rank=2, scale=0.7)
  factors = factors_of(lora)
  inputs = torch_parity.unet_inputs(FIELDS, 8, 8, 5)
  params = torch_parity.params_of(model, functional)
  run = jax.jit(functional)
  ours = run(lora.merge(params, factors), *inputs)
  plain = run(params, *inputs)

  unscaled = {f"unet.{name}": x for name, x in lora.unscaled(factors).items()}
  save_weights(tmp_path, "pytorch_lora_weights", unscaled)
  state, alphas = StableDiffusionPipeline.lora_state_dict(tmp_path)
  StableDiffusionPipeline.load_lora_into_unet(state, alphas, model)
  with torch.no_grad():
    loaded = torch_parity.nhwc(torch_parity.call_torch_unet(model, *inputs))
    model.fuse_lora()
    fused = torch_parity.nhwc(torch_parity.call_torch_unet(model, *inputs))
  size = float(np.abs(loaded).max())
  np.testing.assert_allclose(ours, loaded, atol=3e-4 * size)
  np.testing.assert_allclose(ours, fused, atol=3e-4 * size)
  assert np.abs(np.asarray(plain) - loaded).max() > 0.05 * size


def test_layers_of_stable_diffusion():
  """Sixteen transformer blocks with two attentions of four maps each."""
  functional = torch_parity.build_jax("unet", SD21_BASE["unet"])
  lora = LoRA(functional.shapes, TARGETS, rank=4, scale=1.0)
  assert len(lora.shapes) == 16 * 2 * 4 * 2
  assert all(".attn" in name for name in lora.shapes)
  name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
  assert lora.shapes[f"{name}.lora_A.kernel"].shape == (1024, 4)
  assert lora.shapes[f"{name}.lora_B.kernel"].shape == (4, 1280)


def test_training_starts_from_the_network_as_it_is():
  shapes = {"a.to_q.kernel": jax.ShapeDtypeStruct((8, 6), jnp.float32)}
  lora = LoRA(shapes, ("to_q",), rank=3, scale=2.0)
  factors = lora.init(jax.random.key(0))
  assert not np.any(factors["a.to_q.lora_B.kernel"])
  assert 0.8 * 8**-0.5 < float(jnp.abs(factors["a.to_q.lora_A.kernel"]).max()) <= 8**-0.5
  network = {"a.to_q.kernel": jnp.ones([8, 6])}
  np.testing.assert_array_equal(lora.merge(network, factors)["a.to_q.kernel"], network["a.to_q.kernel"])


def test_a_step_trains_the_factors_and_leaves_the_unet():
  def unet(params, noisy, timesteps, context, *_):
    return noisy + (jnp.mean(context, axis=1) @ params["a.to_q.kernel"])[:, None, None]

  model = stand_in(unet, AdditiveConfig(d_node=8, d_ctx=8, aux_hidden_dim=0), SCHEMA)
  shapes = {"a.to_q.kernel": jax.ShapeDtypeStruct((8, 3), jnp.float32)}
  lora = LoRA(shapes, ("to_q",), rank=2, scale=1.0)
  model = dataclasses.replace(model, lora=lora, trained=("lora", "conditioner"))
  config = base("additive")
  config.train.update(warmup_steps=0, learning_rate=1e-2)
  optimizer = make_optimizer(config.train)
  params = {name: model.component(name).init(jax.random.key(0)) for name in model.trained}
  frozen = {"unet": {"a.to_q.kernel": jnp.ones([8, 3])}}
  step = jax.jit(make_train_step(model, config, optimizer, jnp.zeros(77, jnp.int32)))
  state, _ = step(TrainState.create(params, optimizer), frozen, batch_of(SCHEMA, 8), 0)
  assert set(state.params) == set(state.ema) == {"lora", "conditioner"}
  assert np.any(state.params["lora"]["a.to_q.lora_B.kernel"])
  whole = model.assemble({**frozen, **state.params})
  assert set(whole) == {"unet", "conditioner"}
  change = state.params["lora"]["a.to_q.lora_A.kernel"] @ state.params["lora"]["a.to_q.lora_B.kernel"]
  np.testing.assert_allclose(whole["unet"]["a.to_q.kernel"], 1 + change, rtol=1e-6)


@pytest.mark.parametrize(
  ("targets", "rank", "scale", "words"),
  [
    (("to_p",), 2, 1.0, "no linear layer is called 'to_p'"),
    (("to_q",), 7, 1.0, "from 1 to 6"),
    (("to_q",), -1, 1.0, "from 1 to 6"),
    ((), 2, 1.0, "targets is empty"),
    (("to_q",), 2, 0.0, "scale is 0"),
  ],
)
def test_refused(targets, rank, scale, words):
  with pytest.raises(InputError, match=f"lora.*{words}"):
    LoRA({"a.to_q.kernel": jax.ShapeDtypeStruct((8, 6), jnp.float32)}, targets, rank, scale)


def test_train_export_and_load_in_diffusers(workspace, trained, tmp_path):
  """A run that trains factors on top of another run: its two exports are one network, which is not the first run's."""
  export.main([f"--workdir={trained}", f"--out={tmp_path / 'base'}"])
  overrides = {
    "weights.unet": tmp_path / "base" / "unet",
    "weights.text_encoder": tmp_path / "base" / "text_encoder",
    "lora.rank": 2,
    "train.steps": 3,
    "train.warmup_steps": 0,
    "train.learning_rate": 0.05,
  }
  options = [f"--config.{key}={value}" for key, value in overrides.items()]
  train.main([*config_arguments(workspace), *options, f"--workdir={tmp_path / 'run'}"])
  export.main([f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'merged'}"])
  export.main([f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'lora'}", "--lora"])
  base_unet, unet, merged = (
    UNet2DConditionModel.from_pretrained(tmp_path / name, subfolder="unet") for name in ("base", "base", "merged")
  )
  StableDiffusionPipeline.load_lora_into_unet(*StableDiffusionPipeline.lora_state_dict(tmp_path / "lora"), unet)
  side, width = unet.config.sample_size, unet.config.cross_attention_dim
  rng = torch.Generator().manual_seed(0)
  latents, context = torch.randn([2, 4, side, side], generator=rng), torch.randn([2, 81, width], generator=rng)
  with torch.no_grad():
    before, loaded, whole = (network(latents, 500, context).sample for network in (base_unet, unet, merged))
  size = float(whole.abs().max())
  np.testing.assert_allclose(loaded, whole, atol=1e-5 * size)
  assert float((whole - before).abs().max()) > 1e-2 * size
