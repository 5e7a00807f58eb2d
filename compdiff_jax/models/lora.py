"""Low-rank adaptation (LoRA, Hu et al. 2022): the kernel W of some layers becomes W + scale A B.

The adapted network is the network itself with other parameters, so nothing in it knows about LoRA. A starts as torch's
linear layers do and B at zero: training starts from the network as it is. Parameter names, `<layer>.lora_A.kernel` and
`<layer>.lora_B.kernel`, become those of PEFT by the same rules as all others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from compdiff_jax.cli import InputError, nearest
from compdiff_jax.models.layers import torch_uniform

Params = Mapping[str, Any]


class LoRA:
  """The factors for some layers of a network.

  Attributes:
    shapes: {parameter name: jax.ShapeDtypeStruct}, as `Functional.shapes`.
    scale: what A B is multiplied by; PEFT's alpha / rank.
  """

  def __init__(self, network: Mapping[str, jax.ShapeDtypeStruct], targets: Sequence[str], rank: int, scale: float):
    """`network`: shapes of the whole network; `targets`: ends of layer names such as "to_q" and "to_out.0".

    Raises InputError for targets that no layer has, a rank that does not fit, and where nothing would be trained.
    """
    if not targets:
      raise InputError(
        "lora.targets is empty, so nothing would be trained; name layers such as 'to_q', or set lora.rank=0"
      )
    if not scale:
      raise InputError("lora.scale is 0, so nothing would be trained; set it to 1, for example, or set lora.rank=0")
    self.scale = scale
    self.shapes: dict[str, jax.ShapeDtypeStruct] = {}
    matrices = {name.removesuffix(".kernel"): x.shape for name, x in network.items() if len(x.shape) == 2}
    for target in targets:
      chosen = [layer for layer in matrices if f".{layer}".endswith(f".{target}")]
      if not chosen:
        raise InputError(f"lora.targets: no linear layer is called {target!r}{nearest(target, _ends(matrices))}")
      for layer in chosen:
        d_in, d_out = matrices[layer]
        if not 0 < rank <= min(d_in, d_out):
          raise InputError(f"lora.rank {rank} must be from 1 to {min(d_in, d_out)}, the smaller side of {layer}")
        self.shapes[f"{layer}.lora_A.kernel"] = jax.ShapeDtypeStruct((d_in, rank), jnp.float32)
        self.shapes[f"{layer}.lora_B.kernel"] = jax.ShapeDtypeStruct((rank, d_out), jnp.float32)

  def init(self, key: jax.Array) -> dict[str, jax.Array]:
    """Fresh factors, a pure function of the random key."""
    rngs = nnx.Rngs(key)
    return {
      name: torch_uniform(rngs, x.shape, x.shape[0])[...] if ".lora_A." in name else jnp.zeros(x.shape)
      for name, x in self.shapes.items()
    }

  def merge(self, network: Params, factors: Params) -> dict[str, Any]:
    """The parameters of the adapted network from those of the network and the factors."""
    merged = dict(network)
    for name in self.shapes:
      layer, suffix, _ = name.partition(".lora_A.")
      if suffix:
        change = factors[name] @ factors[f"{layer}.lora_B.kernel"]
        merged[f"{layer}.kernel"] = network[f"{layer}.kernel"] + self.scale * change
    return merged

  def unscaled(self, factors: Params) -> dict[str, Any]:
    """The factors of the same change for a reader that takes the scale to be 1."""
    return {name: self.scale * x if ".lora_B." in name else x for name, x in factors.items()}


def _ends(layers: Mapping[str, Any]) -> list[str]:
  return sorted({layer.split(".")[-1] for layer in layers})
