"""Stable Diffusion with demographic conditioning: `pipe("text", age=64, sex="female")`.

Needs torch, diffusers and transformers only. Load it with
`DiffusionPipeline.from_pretrained(directory, trust_remote_code=True)`.
"""

import contextlib
import inspect
import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

# Options of StableDiffusionPipeline that keep their meaning here. Those not listed would go round the conditioner.
_OPTIONS = (
  "height",
  "width",
  "timesteps",
  "sigmas",
  "eta",
  "num_images_per_prompt",
  "guidance_rescale",
  "cross_attention_kwargs",
  "return_dict",
  "callback_on_step_end",
  "callback_on_step_end_tensor_inputs",
)


def _last(rows, output):
  """As many rows as the UNet has: a callback that ends guidance leaves it the conditional half, which is the last."""
  return rows[-len(output) :]


class CompDiffPipeline(StableDiffusionPipeline):
  """A Stable Diffusion pipeline whose context is the text tokens followed by demographic tokens."""

  model_cpu_offload_seq = "conditioner->text_encoder->image_encoder->unet->vae"
  # Small, and its tables are read outside of the modules that hold them, where sequential offloading has no weights.
  _exclude_from_cpu_offload = ("safety_checker", "conditioner")

  def __init__(
    self,
    vae,
    text_encoder,
    tokenizer,
    unet,
    scheduler,
    conditioner,
    safety_checker=None,
    feature_extractor=None,
    image_encoder=None,
    requires_safety_checker: bool = False,
    null: str = "learned",
  ):
    config = scheduler.config
    super().__init__(
      vae=vae,
      text_encoder=text_encoder,
      tokenizer=tokenizer,
      unet=unet,
      scheduler=scheduler,
      safety_checker=safety_checker,
      feature_extractor=feature_extractor,
      image_encoder=image_encoder,
      requires_safety_checker=requires_safety_checker,
    )
    # Stable Diffusion's pipeline sets `steps_offset` to 1, whatever the model was trained and sampled with.
    scheduler._internal_dict = config
    self.register_modules(conditioner=conditioner)
    self.register_to_config(null=null)

  def _split_keywords(self, keywords):
    """Keywords to (attributes, options). An attribute of the model wins over an option of the same name."""
    attributes, options = {}, {}
    for name, value in keywords.items():
      if name in self.conditioner.schema:
        attributes[name] = value
      elif name in _OPTIONS:
        options[name] = value
      else:
        known = ", ".join(self.conditioner.schema)
        raise ValueError(f"unknown attribute or option {name!r}; this model's attributes are {known}")
    return attributes, options

  def _batch_size(self, **inputs):
    sizes = {name: len(value) for name, value in inputs.items() if self.conditioner.is_list(value)}
    if len(set(sizes.values())) > 1:
      raise ValueError(f"lists of different lengths: {', '.join(f'{name} {size}' for name, size in sizes.items())}")
    return next(iter(sizes.values()), 1)

  def _unconditional(self, batch, null):
    """Tokens, time vector and modulation of samples of which nothing is known; with "zeros" the UNet sees none."""
    unknown = self.conditioner.unknown(batch)
    (tokens, time_vector), modulation = self.conditioner(unknown), self.conditioner.modulation(unknown)
    if null == "zeros":
      tokens = torch.zeros_like(tokens)
      time_vector = None if time_vector is None else torch.zeros_like(time_vector)
      if modulation is not None:
        modulation = [(torch.ones_like(gamma), torch.zeros_like(beta)) for gamma, beta in modulation]
    return tokens, time_vector, modulation

  @torch.no_grad()
  def __call__(
    self,
    prompt="",
    negative_prompt=None,
    guidance_scale=7.5,
    num_inference_steps=50,
    generator=None,
    latents=None,
    output_type="pil",
    null=None,
    **attributes,
  ):
    """Generates images.

    Args:
      prompt: text without demographics, or a list. A single text serves a list of attribute values.
      negative_prompt: text or list of the unconditional branch; the empty prompt if not given.
      guidance_scale: 1 is no guidance.
      num_inference_steps: steps of the scheduler.
      generator: torch generator, or one for each image.
      latents: initial noise [N, channels, height / 8, width / 8]; drawn from the generator if not given.
      output_type: "pil", "np", "pt" or "latent".
      null: demographics of the unconditional branch, "learned" nulls or "zeros"; as the model was sampled if not given.
      **attributes: the model's attributes by name, one value or one for each prompt; None or left out is unknown.
        Options of StableDiffusionPipeline such as `height` and `num_images_per_prompt` are taken here too.

    Returns:
      A StableDiffusionPipelineOutput with `images`.
    """
    null = self.config.null if null is None else null
    if null not in ("learned", "zeros"):
      raise ValueError(f"null={null!r} is not accepted: give 'learned' or 'zeros'")
    values, options = self._split_keywords(attributes)
    batch = self._batch_size(prompt=prompt, negative_prompt=negative_prompt, **values)
    encoded = self.conditioner.encode_batch(values, batch)
    prompts = [prompt] * batch if isinstance(prompt, str) else list(prompt)
    prompts = [
      self.conditioner.format_prompt(text, {name: column[i] for name, column in encoded.items()})
      for i, text in enumerate(prompts)
    ]
    negative = "" if negative_prompt is None else negative_prompt
    negatives = [negative] * batch if isinstance(negative, str) else list(negative)

    guided = guidance_scale > 1
    text, negative_text = self.encode_prompt(prompts, self._execution_device, 1, guided, negatives)
    tokens, time_vector = self.conditioner(encoded)
    context, negative_context, time_vectors = torch.cat([text, tokens.to(text)], dim=1), None, [time_vector]
    modulations = [self.conditioner.modulation(encoded)]
    if guided:
      tokens, time_vector, modulation = self._unconditional(batch, null)
      negative_context = torch.cat([negative_text, tokens.to(text)], dim=1)
      time_vectors.insert(0, time_vector)  # diffusers runs the negative half of the batch first
      modulations.insert(0, modulation)
    copies = options.get("num_images_per_prompt", 1)
    with self._time_vectors(time_vectors, copies), self._modulated(modulations, copies):
      return super().__call__(
        prompt_embeds=context,
        negative_prompt_embeds=negative_context,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        generator=generator,
        latents=latents,
        output_type=output_type,
        **options,
      )

  @contextlib.contextmanager
  def _time_vectors(self, vectors, num_images_per_prompt):
    """Adds vectors [B, D] to the UNet's time embedding within the block; None where the model has none."""
    if vectors[0] is None:
      yield
      return
    added = torch.cat([vector.repeat_interleave(num_images_per_prompt, dim=0) for vector in vectors])
    hook = self.unet.time_embedding.register_forward_hook(
      lambda module, inputs, output: output + _last(added, output).to(output)
    )
    try:
      yield
    finally:
      hook.remove()

  @contextlib.contextmanager
  def _modulated(self, modulations, num_images_per_prompt):
    """Within the block the output h of each residual block of the UNet is gamma h + beta."""
    hooks = []
    if modulations[0] is not None:
      blocks = [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]
      for resnet, *pairs in zip([resnet for block in blocks for resnet in block.resnets], *modulations):
        gamma, beta = (
          torch.cat([vector.repeat_interleave(num_images_per_prompt, dim=0) for vector in vectors])[:, :, None, None]
          for vectors in zip(*pairs)
        )
        hooks.append(
          resnet.register_forward_hook(
            lambda module, inputs, output, gamma=gamma, beta=beta: (
              _last(gamma, output).to(output) * output + _last(beta, output).to(output)
            )
          )
        )
    try:
      yield
    finally:
      for hook in hooks:
        hook.remove()

  def save_pretrained(self, save_directory, **options):
    """As in diffusers, together with the two source files, so that the directory loads again."""
    if options.get("push_to_hub"):
      raise ValueError("save to a directory and upload that: push_to_hub would leave out the source files")
    super().save_pretrained(save_directory, **options)
    root = Path(save_directory)
    shutil.copyfile(inspect.getfile(type(self)), root / "pipeline.py")
    shutil.copyfile(inspect.getfile(type(self.conditioner)), root / "conditioner" / "conditioner.py")
    index = json.loads((root / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", type(self).__name__]
    index["conditioner"] = ["conditioner", type(self.conditioner).__name__]
    (root / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
