"""The demographic conditioner of this model: attributes -> tokens that follow the text tokens in cross-attention.

Needs torch and diffusers only; diffusers loads it together with the pipeline. For evaluation: the model was trained
elsewhere, so dropout and the latent's noise are left out.
"""

import itertools
import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

_UNKNOWN_TEXTS = ("", "unknown", "nan", "none", "na", "n/a")


def _block(d_in, d_hidden, d_out):
  # The identity keeps the place of the dropout, which the parameter names count.
  return nn.Sequential(
    nn.LayerNorm(d_in), nn.Linear(d_in, d_hidden), nn.SiLU(), nn.Identity(), nn.Linear(d_hidden, d_out)
  )


class _Composer(nn.Module):
  def __init__(self, num_nodes, d_node):
    super().__init__()
    self.net = _block(num_nodes * d_node, 2 * d_node, d_node)

  def forward(self, *nodes):
    return self.net(torch.cat(nodes, dim=-1))


class HierarchicalConditioner(ModelMixin, ConfigMixin):
  """HCN: an embedding for each attribute, a node for each pair of attributes, one latent, one token.

  Args:
    schema: the attributes, in order: {"name", "kind": "categorical", "values"} or {"name", "kind": "continuous", "low",
      "high", "bins", "unit"}.
    attributes: names the network uses; empty means all. Others may still be put in front of the prompt.
    d_node: width of the nodes.
    d_ctx: width of the text encoder's hidden states.
    dropout: rate used in training, kept for the record.
    use_uncertainty: whether the latent has its own mean and standard deviation.
    aux_hidden_dim: hidden width of the auxiliary classifiers (read in training only); 0: there are none.
    learned_nulls: whether an unknown attribute has a learned embedding; if not, all are given or none.
    prompt_attributes: names put in front of the text, as in "54 year old. <text>".
  """

  @register_to_config
  def __init__(
    self,
    schema: list,
    attributes: list = (),
    d_node: int = 256,
    d_ctx: int = 1024,
    dropout: float = 0.1,
    use_uncertainty: bool = True,
    aux_hidden_dim: int = 512,
    learned_nulls: bool = True,
    prompt_attributes: list = (),
  ):
    super().__init__()
    self.schema = {attribute["name"]: attribute for attribute in schema}
    self.names = [name for name in self.schema if name in attributes or not attributes]
    self.pairs = list(itertools.combinations(self.names, 2))
    for name in self.names:
      setattr(self, f"emb_{name}", nn.Embedding(self._num_levels(name), d_node))
      if learned_nulls:
        setattr(self, f"null_{name}", nn.Parameter(torch.zeros(d_node)))
      if aux_hidden_dim:
        setattr(self, f"{name}_classifier", _block(d_ctx, aux_hidden_dim, self._num_levels(name)))
    for first, second in self.pairs:
      setattr(self, f"compose_{first}_{second}", _Composer(2, d_node))
    if len(self.pairs) > 1:
      self.compose_all = _Composer(len(self.pairs), d_node)
    if use_uncertainty:
      self.mu_head = nn.Linear(d_node, d_node)
      self.logsigma_head = nn.Linear(d_node, d_node)
    self.proj_ctx = nn.Sequential(nn.LayerNorm(d_node), nn.Linear(d_node, d_ctx))

  def _num_levels(self, name):
    attribute = self.schema[name]
    return len(attribute["values"]) if attribute["kind"] == "categorical" else len(attribute["bins"]) + 1

  def describe(self, name):
    """The values an attribute accepts, in words."""
    attribute = self.schema[name]
    if attribute["kind"] == "categorical":
      return f"one of {', '.join(attribute['values'])}, or None for unknown"
    unit = f" {attribute['unit']}" if attribute["unit"] else ""
    return f"a number from {attribute['low']:g} to {attribute['high']:g}{unit}, or None for unknown"

  def encode(self, name, value):
    """One value as a category index or a number; -1 or NaN stand for unknown. `ValueError` for any other value."""
    attribute = self.schema[name]
    categorical = attribute["kind"] == "categorical"
    text = "" if value is None else str(value).strip()
    if text.lower() in _UNKNOWN_TEXTS:
      return -1 if categorical else math.nan
    if categorical and text in attribute["values"]:
      return attribute["values"].index(text)
    if not categorical and not isinstance(value, bool):
      try:
        number = float(value)
      except (TypeError, ValueError):
        number = math.nan
      if attribute["low"] <= number <= attribute["high"]:
        return number
    raise ValueError(f"{name}={value!r} is not accepted: give {self.describe(name)}")

  @staticmethod
  def is_list(values):
    """Whether a user's value holds one entry for each sample: a list, a tuple, an array or a column of a table."""
    return isinstance(values, (list, tuple)) or getattr(values, "ndim", 0) > 0

  def is_known(self, name, encoded):
    return encoded >= 0 if self.schema[name]["kind"] == "categorical" else encoded == encoded

  def encode_batch(self, values, batch):
    """User values {name: scalar or list} to encoded lists {name: [batch]} of every attribute of the schema.

    A name that is left out is unknown; a scalar counts for the whole batch.
    """
    for name in values:
      if name not in self.schema:
        raise ValueError(f"unknown attribute {name!r}; this model has {', '.join(self.schema)}")
    encoded = {}
    for name in self.schema:
      given = values.get(name)
      given = list(given) if self.is_list(given) else [given] * batch
      if len(given) != batch:
        raise ValueError(f"{name} has {len(given)} values for a batch of {batch}; give one, or one for each prompt")
      encoded[name] = [self.encode(name, value) for value in given]
    if not self.config.learned_nulls:
      for i in range(batch):
        known = [name for name in self.names if self.is_known(name, encoded[name][i])]
        if 0 < len(known) < len(self.names):
          missing = ", ".join(name for name in self.names if name not in known)
          raise ValueError(f"this model has no learned nulls: give {missing} too, or leave all of its attributes out")
    return encoded

  def format_prompt(self, text, encoded):
    """`text` with the known `prompt_attributes` of one sample in front of it, as the model was trained."""
    phrases = []
    for name in self.config.prompt_attributes:
      attribute, value = self.schema[name], encoded[name]
      if not self.is_known(name, value):
        continue
      if attribute["kind"] == "categorical":
        phrases.append(attribute["values"][value])
      else:
        years = attribute["unit"] == "year"
        phrases.append(f"{value:.0f} year old" if years else f"{value:g} {attribute['unit']}")
    return f"{' '.join(phrases)}. {text}" if phrases else text

  def _levels(self, name, encoded):
    """Category or bin index of encoded values, int64 [B]; -1 where unknown."""
    attribute = self.schema[name]
    if attribute["kind"] == "categorical":
      return torch.tensor(encoded, dtype=torch.int64, device=self.device)
    # float32 whatever the weights are: 59.99 years must not become 60.
    values = torch.tensor(encoded, dtype=torch.float32, device=self.device)
    edges = torch.tensor(attribute["bins"], dtype=torch.float32, device=self.device)
    level = torch.searchsorted(edges, torch.nan_to_num(values), right=True)
    return torch.where(torch.isnan(values), -1, level)

  def forward(self, encoded):
    """Encoded lists {name: [B]} to tokens [B, 1, d_ctx]; the zero token where unknown values have no learned null."""
    levels = {name: self._levels(name, encoded[name]) for name in self.names}
    embeddings = {}
    for name, level in levels.items():
      embedding = getattr(self, f"emb_{name}")(level.clamp(min=0))
      if self.config.learned_nulls:
        embedding = torch.where((level >= 0)[:, None], embedding, getattr(self, f"null_{name}"))
      embeddings[name] = embedding
    if self.pairs:
      nodes = [getattr(self, f"compose_{a}_{b}")(embeddings[a], embeddings[b]) for a, b in self.pairs]
      h = nodes[0] if len(nodes) == 1 else self.compose_all(*nodes)
    else:
      h = embeddings[self.names[0]]
    token = self.proj_ctx(self.mu_head(h) if self.config.use_uncertainty else h)
    if not self.config.learned_nulls:
      known = torch.stack([level >= 0 for level in levels.values()]).all(dim=0)
      token = torch.where(known[:, None], token, 0)
    return token[:, None]

  def unknown(self, batch):
    """Encoded lists of a batch in which every attribute is unknown."""
    return self.encode_batch({}, batch)
