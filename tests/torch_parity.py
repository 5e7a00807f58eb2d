"""What the parity tests share: torch models with telling random weights beside ours, and arrays in both layouts."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKL as TorchAutoencoderKL
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig as TorchCLIPTextConfig
from transformers import CLIPTextModel as TorchCLIPTextModel

from compdiff_jax.models import (
  AutoencoderKL,
  CLIPTextConfig,
  CLIPTextModel,
  Functional,
  UNet2DCondition,
  UNetConfig,
  VAEConfig,
)
from tests import torch_states

# Tiny models on few cores: waiting for a second thread takes longer than the arithmetic.
torch.set_num_threads(1)


def build_torch(component: str, fields: Mapping[str, Any]) -> torch.nn.Module:
  """The torch model of a config.json for "unet", "vae" or "text_encoder"."""
  fields = {name: value for name, value in fields.items() if not name.startswith("_")}
  if component == "text_encoder":
    return TorchCLIPTextModel(TorchCLIPTextConfig(**fields))
  return {"unet": UNet2DConditionModel, "vae": TorchAutoencoderKL}[component](**fields)


def build_jax(component: str, fields: Mapping[str, Any], dtype=jnp.float32) -> Functional:
  """Our model of the same."""
  config_class, module = {
    "unet": (UNetConfig, UNet2DCondition),
    "vae": (VAEConfig, AutoencoderKL),
    "text_encoder": (CLIPTextConfig, CLIPTextModel),
  }[component]
  config = config_class.from_dict(fields)
  return Functional(lambda rngs: module(config, dtype, rngs=rngs))


def depends_on(component: str, fields: Mapping[str, Any], name: str, value: Any, call: Callable) -> bool:
  """Whether torch's model of `fields` has other parameters, another output or none with another value of one field.

  `call(model)` returns the output, a tensor.
  """
  changed_fields = {**fields, name: value}
  try:
    with torch.device("meta"):
      shapes, changed_shapes = (
        {key: parameter.shape for key, parameter in build_torch(component, some).named_parameters()}
        for some in (fields, changed_fields)
      )
    if changed_shapes != shapes:
      return True
    with torch.no_grad():
      output, expected = (call(randomize(build_torch(component, some))) for some in (changed_fields, fields))
  except (IndexError, RuntimeError, ValueError):
    return True
  return output.shape != expected.shape or float((output - expected).abs().max()) > 1e-3


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
  """Draws wide weights: default initialisation is so narrow that a wrong GELU, gate or bias stays below 1e-4."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if parameter.ndim > 1:
        parameter.copy_(noise * parameter[0].numel() ** -0.5)
      else:
        parameter.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))
  return module.eval()


def make_faint(module: torch.nn.Module, layers: str, factor: float = 3e-3) -> torch.nn.Module:
  """Shrinks the maps whose name matches `layers`, so that the variance under a later norm is about its epsilon."""
  with torch.no_grad():
    for name, layer in module.named_modules():
      if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)) and re.search(layers, name):
        for parameter in layer.parameters():
          parameter.mul_(factor)
  return module


def params_of(module: torch.nn.Module, functional) -> dict[str, jnp.ndarray]:
  """The parameters of a torch model as those of `functional`."""
  state = {name: value.detach().numpy() for name, value in module.state_dict().items()}
  return {key: jnp.asarray(value) for key, value in torch_states.from_torch(state, functional.shapes).items()}


def relative_errors(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
  """|ours - theirs| / |theirs| of each entry, in the Euclidean norm."""
  return {
    name: float(np.linalg.norm(np.asarray(ours[name]) - value) / np.linalg.norm(value))
    for name, value in theirs.items()
  }


def unet_inputs(fields: Mapping[str, Any], height: int, width: int, tokens: int) -> tuple[np.ndarray, ...]:
  """Two latents, their times and their contexts."""
  sample = normal(1, 2, height, width, fields.get("in_channels", 4))
  return sample, np.array([7, 981]), normal(2, 2, tokens, fields["cross_attention_dim"])


def call_torch_unet(model, sample, timesteps, context) -> torch.Tensor:
  return model(nchw(sample), torch.from_numpy(timesteps), torch.from_numpy(context)).sample


def unet_outputs(model, functional, inputs) -> tuple[np.ndarray, np.ndarray]:
  """Our prediction and torch's."""
  ours = jax.jit(functional)(params_of(model, functional), *inputs)
  with torch.no_grad():
    return np.asarray(ours), nhwc(call_torch_unet(model, *inputs))


def unet_gradients(model, functional, inputs) -> tuple[dict[str, Any], dict[str, Any]]:
  """Gradients of a denoising loss in every parameter, the context and a vector added to the time embedding."""
  sample, timesteps, context = inputs
  model.zero_grad()
  target = normal(3, *sample.shape[:3], model.config.out_channels)
  vector = normal(4, 2, model.time_embedding.linear_2.out_features)

  def loss(params, context, vector):
    return jnp.mean((functional(params, sample, timesteps, context, vector) - target) ** 2)

  params, *others = jax.jit(jax.grad(loss, (0, 1, 2)))(params_of(model, functional), context, vector)
  ours = params | dict(zip(("context", "time vector"), others))

  leaves = [torch.from_numpy(array).requires_grad_() for array in (context, vector)]
  hook = model.time_embedding.register_forward_hook(lambda module, args, output: output + leaves[1])
  output = model(nchw(sample), torch.from_numpy(timesteps), leaves[0]).sample
  hook.remove()
  torch.nn.functional.mse_loss(output, nchw(target)).backward()
  state = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
  theirs = torch_states.from_torch(state, functional.shapes)
  return ours, theirs | dict(zip(("context", "time vector"), (leaf.grad.numpy() for leaf in leaves)))


def vae_inputs(fields: Mapping[str, Any], height: int, width: int) -> np.ndarray:
  """Two images in [-1, 1]."""
  return np.tanh(normal(1, 2, height, width, fields.get("in_channels", 3)))


def vae_outputs(model, functional, images) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Ours and torch's: the posterior moments, and the images decoded from a posterior sample."""
  with torch.no_grad():
    posterior = model.encode(nchw(images)).latent_dist
    moments = nhwc(torch.cat([posterior.mean, posterior.logvar], dim=1))
    noise = normal(2, *posterior.mean.permute(0, 2, 3, 1).shape)
    decoded = nhwc(model.decode(posterior.mean + posterior.std * nchw(noise)).sample)
  our_images, our_moments = jax.jit(functional)(params_of(model, functional), images, noise)
  return {"moments": (np.asarray(our_moments), moments), "decode": (np.asarray(our_images), decoded)}


def text_inputs(fields: Mapping[str, Any], length: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, fields["vocab_size"], (2, length))


def text_outputs(model, functional, ids) -> tuple[np.ndarray, np.ndarray]:
  """Our last hidden state and torch's."""
  ours = jax.jit(functional)(params_of(model, functional), ids)
  with torch.no_grad():
    return np.asarray(ours), model(torch.from_numpy(ids), return_dict=True).last_hidden_state.numpy()


def normal(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def nchw(array) -> torch.Tensor:
  return torch.from_numpy(np.ascontiguousarray(np.asarray(array).transpose(0, 3, 1, 2)))


def nhwc(tensor: torch.Tensor) -> np.ndarray:
  return tensor.detach().numpy().transpose(0, 2, 3, 1)
