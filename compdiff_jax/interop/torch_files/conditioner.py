"""The demographic conditioner of this model: attributes -> tokens that follow the text tokens in cross-attention.

Needs torch and diffusers only; diffusers loads it together with the pipeline. For evaluation: the model was trained
elsewhere, so dropout and the latent's noise are left out. `config.json` says which of the classes it is.
"""

import itertools
import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

_UNKNOWN_TEXTS = ("", "unknown", "nan", "none", "na", "n/a")
# What can be said of a label. The index of a state is its place among the label's rows of a table.
_STATES = ("unmentioned", "negative", "uncertain", "positive")


def _block(d_in, d_hidden, d_out):
  # The identity keeps the place of the dropout, which the parameter names count.
  return nn.Sequential(
    nn.LayerNorm(d_in), nn.Linear(d_in, d_hidden), nn.SiLU(), nn.Identity(), nn.Linear(d_hidden, d_out)
  )


class _Composer(nn.Module):
  def __init__(self, d_in, d_hidden, d_out):
    super().__init__()
    self.net = _block(d_in, d_hidden, d_out)

  def forward(self, *nodes):
    return self.net(torch.cat(nodes, dim=-1))


def _number_encoder(num_features, d_out):
  return nn.Sequential(nn.Linear(num_features, d_out), nn.SiLU(), nn.Linear(d_out, d_out))


def _sum_rows(table, rows):
  """Table [N, d] and rows [B, k] to [B, d]: their sum over sqrt(k); some vector where a row is -1."""
  return table[rows.clamp(min=0)].sum(dim=1) / math.sqrt(rows.shape[1])


def _projection(d_in, d_out):
  return nn.Sequential(nn.LayerNorm(d_in), nn.Linear(d_in, d_out))


class _Film(nn.Module):
  """A node to the gamma and beta of each residual block of the UNet."""

  def __init__(self, d_node, d_hidden, channels):
    super().__init__()
    self.shared_encoder = nn.Sequential(
      nn.LayerNorm(d_node), nn.Linear(d_node, d_hidden), nn.SiLU(), nn.Linear(d_hidden, d_hidden), nn.SiLU()
    )
    self.gamma_heads = nn.ModuleList(nn.Linear(d_hidden, width) for width in channels)
    self.beta_heads = nn.ModuleList(nn.Linear(d_hidden, width) for width in channels)

  def forward(self, node):
    hidden = self.shared_encoder(node)
    return [(gamma(hidden), beta(hidden)) for gamma, beta in zip(self.gamma_heads, self.beta_heads)]


class _Conditioner(ModelMixin, ConfigMixin):
  """What all conditioners do with a user's values: check them, encode them, put them in front of a prompt."""

  # Whether a single unknown attribute has a learned representation. If not, all are given or none.
  represents_unknown = True

  def __getattr__(self, name):
    # diffusers reads attributes from the config first, but `composer` is a module as well, into which it loads weights.
    modules = self.__dict__.get("_modules", {})
    return modules[name] if name in modules else super().__getattr__(name)

  def _read_schema(self, schema, attributes):
    self.schema = {attribute["name"]: attribute for attribute in schema}
    self.names = [name for name in self.schema if name in attributes or not attributes]

  def _kind(self, name):
    return self.schema[name]["kind"]

  def _num_levels(self, name):
    """Categories or bins; labels have none, so they form no cells."""
    attribute = self.schema[name]
    return len(attribute["bins"]) + 1 if self._kind(name) == "continuous" else len(attribute["values"])

  def _num_rows(self, name):
    """Rows of an attribute's table and outputs of its classifier: one a level, or one for each state of each label."""
    return self._num_levels(name) * (len(_STATES) if self._kind(name) == "multilabel" else 1)

  def describe(self, name):
    """The values an attribute accepts, in words."""
    attribute = self.schema[name]
    if self._kind(name) == "continuous":
      unit = f" {attribute['unit']}" if attribute["unit"] else ""
      return f"a number from {attribute['low']:g} to {attribute['high']:g}{unit}, or None for unknown"
    values = ", ".join(attribute["values"])
    if self._kind(name) == "categorical":
      return f"one of {values}, or None for unknown"
    return f"labels such as 'A; B=negative; C=uncertain' out of {values}, 'unmentioned', or None for unknown"

  def encode(self, name, value):
    """One value as a category index, a number or the state of each label. `ValueError` for a value not accepted.

    Unknown is -1, NaN, or -1 for each label.
    """
    attribute, kind = self.schema[name], self._kind(name)
    text = "" if value is None else str(value).strip()
    if text.lower() in _UNKNOWN_TEXTS:
      return {"categorical": -1, "continuous": math.nan, "multilabel": (-1,) * len(attribute.get("values", ()))}[kind]
    if kind == "categorical" and text in attribute["values"]:
      return attribute["values"].index(text)
    if kind == "continuous" and not isinstance(value, bool):
      try:
        number = float(value)
      except (TypeError, ValueError):
        number = math.nan
      if attribute["low"] <= number <= attribute["high"]:
        return number
    if kind == "multilabel":
      said = [[piece.strip() for piece in part.partition("=")] for part in text.split(";") if text != _STATES[0]]
      states = {label: state or "positive" for label, _, state in said}
      allowed = states.keys() <= set(attribute["values"]) and set(states.values()) <= set(_STATES)
      if allowed and len(states) == len(said):  # no label twice
        return tuple(_STATES.index(states.get(label, _STATES[0])) for label in attribute["values"])
    raise ValueError(f"{name}={value!r} is not accepted: give {self.describe(name)}")

  @staticmethod
  def is_list(values):
    """Whether a user's value holds one entry for each sample: a list, a tuple, an array or a column of a table."""
    return isinstance(values, (list, tuple)) or getattr(values, "ndim", 0) > 0

  def is_known(self, name, encoded):
    first = encoded[0] if self._kind(name) == "multilabel" else encoded
    return first >= 0  # NaN is not

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
    if not self.represents_unknown:
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
      if self._kind(name) == "categorical":
        phrases.append(attribute["values"][value])
      else:
        years = attribute["unit"] == "year"
        phrases.append(f"{value:.0f} year old" if years else f"{value:g} {attribute['unit']}")
    return f"{' '.join(phrases)}. {text}" if phrases else text

  def _rows(self, name, encoded):
    """The rows of a table that make up encoded values, int64 [B, k]; -1 where unknown.

    One a sample, its category or bin; of labels one for each, its state.
    """
    if self._kind(name) == "continuous":
      values = self._numbers(encoded)
      edges = torch.tensor(self.schema[name]["bins"], dtype=torch.float32, device=self.device)
      level = torch.searchsorted(edges, torch.nan_to_num(values), right=True)
      return torch.where(torch.isnan(values), -1, level)[:, None]
    rows = torch.tensor(encoded, dtype=torch.int64, device=self.device).reshape(len(encoded), -1)
    first = len(_STATES) * torch.arange(rows.shape[1], device=self.device)  # 0 for the one row of a category
    return torch.where(rows >= 0, first + rows, -1)

  def _numbers(self, encoded):
    # float32 whatever the weights are: 59.99 years must not become 60.
    return torch.tensor(encoded, dtype=torch.float32, device=self.device)

  def _encode_number(self, encoder, encoded):
    """Sinusoids of numbers in their own unit, cosines first, through `encoder`: [B] -> [B, d]; anything where NaN."""
    half = encoder[0].in_features // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=self.device) / half)
    angles = torch.nan_to_num(self._numbers(encoded))[:, None] * frequencies
    return encoder(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.dtype))

  def _add_tables(self, d_node):
    for name in self.names:
      setattr(self, f"emb_{name}", nn.Embedding(self._num_rows(name), d_node))
      if self.represents_unknown:
        setattr(self, f"null_{name}", nn.Parameter(torch.zeros(d_node)))

  def _embed_rows(self, encoded, ordinal=False):
    """{name: [B, d]} from rows of a table or the null; and bool [B], where a sample has a representation."""
    embeddings, known = {}, []
    for name in self.names:
      rows = self._rows(name, encoded[name])
      own = rows[:, 0] >= 0
      known.append(own | self.represents_unknown)
      table = getattr(self, f"emb_{name}").weight
      table = table.cumsum(dim=0) if ordinal and self._kind(name) == "continuous" else table
      embeddings[name] = _sum_rows(table, rows)
      if self.represents_unknown:
        embeddings[name] = torch.where(own[:, None], embeddings[name], getattr(self, f"null_{name}"))
    return embeddings, torch.stack(known).all(dim=0)

  def _add_pairs(self, d_node):
    self.pairs = list(itertools.combinations(self.names, 2))
    for first, second in self.pairs:
      setattr(self, f"compose_{first}_{second}", _Composer(2 * d_node, 2 * d_node, d_node))
    if len(self.pairs) > 1:
      self.compose_all = _Composer(len(self.pairs) * d_node, 2 * d_node, d_node)

  def _compose_pairs(self, embeddings):
    if not self.pairs:
      return embeddings[self.names[0]]
    nodes = [getattr(self, f"compose_{a}_{b}")(embeddings[a], embeddings[b]) for a, b in self.pairs]
    return nodes[0] if len(nodes) == 1 else self.compose_all(*nodes)

  def modulation(self, encoded):
    """(gamma, beta) [B, C] of each residual block of the UNet, or None where the model has no such route."""
    return None

  def unknown(self, batch):
    """Encoded lists of a batch in which every attribute is unknown."""
    return self.encode_batch({}, batch)


class HierarchicalConditioner(_Conditioner):
  """HCN: an embedding for each attribute, a node for each pair of attributes, one latent, one token.

  Args:
    schema: the attributes, in order: {"name", "kind": "categorical" or "multilabel", "values"} or {"name", "kind":
      "continuous", "low", "high", "bins", "unit"}.
    attributes: names the network uses; empty means all. Others may still be put in front of the prompt.
    d_node, d_ctx: widths of the nodes and of the text encoder's hidden states.
    dropout: rate used in training, kept for the record.
    use_uncertainty: whether the latent has its own mean and standard deviation.
    aux_hidden_dim: hidden width of the auxiliary classifiers (read in training only); 0: there are none.
    ordinal_encoder: whether the embedding of a number's bin is the sum of the table's rows up to it.
    ordinal_loss, soft_sigma: of training, kept for the record.
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
    ordinal_encoder: bool = False,
    ordinal_loss: str = "cross_entropy",
    soft_sigma: float = 0.75,
    learned_nulls: bool = True,
    prompt_attributes: list = (),
  ):
    super().__init__()
    self._read_schema(schema, attributes)
    self.represents_unknown = learned_nulls
    self._add_tables(d_node)
    self._add_pairs(d_node)
    if aux_hidden_dim:
      for name in self.names:
        setattr(self, f"{name}_classifier", _block(d_ctx, aux_hidden_dim, self._num_rows(name)))
    if use_uncertainty:
      self.mu_head, self.logsigma_head = nn.Linear(d_node, d_node), nn.Linear(d_node, d_node)
    self.proj_ctx = _projection(d_node, d_ctx)

  def forward(self, encoded):
    """Encoded lists {name: [B]} to tokens [B, 1, d_ctx] (zeros where unknown values have no learned null), and None."""
    embeddings, known = self._embed_rows(encoded, self.config.ordinal_encoder)
    h = self._compose_pairs(embeddings)
    token = self.proj_ctx(self.mu_head(h) if self.config.use_uncertainty else h)
    return torch.where(known[:, None], token, 0)[:, None], None


class TypedConditioner(_Conditioner):
  """CompDiff-2: tables for categories, sinusoids for numbers, one node of the whole and one of each attribute.

  Args:
    schema, attributes, d_node, d_ctx, dropout, use_uncertainty, aux_hidden_dim, prompt_attributes: as in
      HierarchicalConditioner.
    composer: "hierarchical", "transformer" or "flat".
    multi_token, num_registers: whether each attribute has a token beside the one of the whole; further tokens.
    tokens: whether the tokens are handed to the UNet.
    d_time_emb: width of the vector that is added to the UNet's time embedding; 0: there is none.
    film_channels: widths of the UNet's residual blocks, which are modulated; empty: they are not.
    film_hidden: inner width of that network.
    freq_dim: number of sinusoids of a number.
    flat_hidden, transformer_layers, transformer_heads: sizes of the composers.
    unconditional: whether a sample of which nothing is known gets the tokens of the learned "nulls", or "zeros"; then
      the nulls are untrained, and all attributes are given or none.
  """

  @register_to_config
  def __init__(
    self,
    schema: list,
    attributes: list = (),
    d_node: int = 256,
    d_ctx: int = 1024,
    composer: str = "hierarchical",
    multi_token: bool = True,
    num_registers: int = 0,
    tokens: bool = True,
    d_time_emb: int = 0,
    film_channels: list = (),
    film_hidden: int = 512,
    freq_dim: int = 128,
    flat_hidden: int = 664,
    transformer_layers: int = 2,
    transformer_heads: int = 4,
    dropout: float = 0.1,
    use_uncertainty: bool = True,
    aux_hidden_dim: int = 512,
    unconditional: str = "nulls",
    prompt_attributes: list = (),
  ):
    super().__init__()
    self.represents_unknown = unconditional == "nulls"
    self._read_schema(schema, attributes)
    width = len(self.names) * d_node
    for name in self.names:
      number = self._kind(name) == "continuous"
      if number:
        setattr(self, f"{name}_encoder", _number_encoder(freq_dim, d_node))
      else:
        setattr(self, f"emb_{name}", nn.Embedding(self._num_rows(name), d_node))
      setattr(self, f"null_{name}", nn.Parameter(torch.zeros(d_node)))
      if multi_token:
        setattr(self, f"proj_{name}", _projection(d_node, d_ctx))
      if multi_token and composer == "hierarchical":
        setattr(self, f"ctx_{name}", _Composer(2 * d_node, 2 * d_node, d_node))
      if aux_hidden_dim:
        head = f"{name}_{'regressor' if number else 'classifier'}"
        setattr(self, head, _block(d_ctx, aux_hidden_dim, 1 if number else self._num_rows(name)))
    levels = [self._num_levels(name) for name in self.names if self._kind(name) != "multilabel"]
    if aux_hidden_dim and levels:
      self.joint_classifier = _block(d_ctx, aux_hidden_dim, math.prod(levels))
    if composer == "hierarchical":
      self._add_pairs(d_node)
    elif composer == "flat":
      self.flat_stage1 = _Composer(width, flat_hidden, width)
      self.flat_stage2 = _Composer(width, flat_hidden, d_node)
      if multi_token:
        self.flat_stage3 = _Composer(width + d_node, flat_hidden, width)
    else:
      self.cls_token = nn.Parameter(torch.zeros(d_node))
      self.type_emb = nn.Parameter(torch.zeros(len(self.names) + 1 + num_registers, d_node))
      layer = nn.TransformerEncoderLayer(
        d_node, transformer_heads, 2 * d_node, dropout, nn.functional.gelu, batch_first=True, norm_first=True
      )
      self.composer = nn.TransformerEncoder(layer, transformer_layers, enable_nested_tensor=False)
    if num_registers:
      self.register_tokens = nn.Parameter(torch.zeros(num_registers, d_node))
      self.proj_reg = _projection(d_node, d_ctx)
    if use_uncertainty:
      self.mu_head, self.logsigma_head = nn.Linear(d_node, d_node), nn.Linear(d_node, d_node)
    self.proj_cls = _projection(d_node, d_ctx)
    if d_time_emb:
      self.time_proj = nn.Linear(d_node, d_time_emb)
    if film_channels:
      self.film = _Film(d_node, film_hidden, film_channels)

  def _embed(self, name, encoded):
    rows = self._rows(name, encoded)
    if self._kind(name) == "continuous":
      embedding = self._encode_number(getattr(self, f"{name}_encoder"), encoded)
    else:
      embedding = _sum_rows(getattr(self, f"emb_{name}").weight, rows)
    return torch.where(rows[:, :1] >= 0, embedding, getattr(self, f"null_{name}"))

  def _compose(self, embeddings):
    """{name: [B, d]} to the whole [B, d], {name: context [B, d]} and the registers [B, R, d] (None: learned ones)."""
    parts, multi = list(embeddings.values()), self.config.multi_token
    if self.config.composer == "hierarchical":
      h = self._compose_pairs(embeddings)
      return h, {name: getattr(self, f"ctx_{name}")(e, h) for name, e in embeddings.items() if multi}, None
    if self.config.composer == "flat":
      h = self.flat_stage2(self.flat_stage1(*parts))
      contexts = self.flat_stage3(*parts, h).chunk(len(parts), dim=-1) if multi else ()
      return h, dict(zip(self.names, contexts)), None
    shared = [self.cls_token, *(self.register_tokens if self.config.num_registers else [])]
    sequence = torch.stack([*parts, *(vector.expand_as(parts[0]) for vector in shared)], dim=1)
    out = self.composer(sequence + self.type_emb)
    contexts = out.unbind(1) if multi else ()
    return out[:, len(parts)], dict(zip(self.names, contexts)), out[:, len(parts) + 1 :]

  def _latent(self, encoded):
    """The latent [B, d], {name: context} and the registers."""
    h, *rest = self._compose({name: self._embed(name, encoded[name]) for name in self.names})
    return (self.mu_head(h) if self.config.use_uncertainty else h, *rest)

  def _conditioned(self, encoded):
    """bool [B]: where the sample is not one of which nothing is known and that gets zeros."""
    known = torch.stack([self._rows(name, encoded[name])[:, 0] >= 0 for name in self.names]).any(dim=0)
    return known | (self.config.unconditional != "zeros")

  def modulation(self, encoded):
    if not self.config.film_channels:
      return None
    known = self._conditioned(encoded)[:, None]
    pairs = self.film(self._latent(encoded)[0])
    return [(torch.where(known, gamma, 1), torch.where(known, beta, 0)) for gamma, beta in pairs]

  def forward(self, encoded):
    """Encoded lists {name: [B]} to tokens [B, T, d_ctx] and the time vector [B, d_time_emb] or None."""
    z, contexts, registers = self._latent(encoded)
    tokens = [getattr(self, f"proj_{name}")(context) for name, context in contexts.items()]
    tokens = torch.stack([*tokens, self.proj_cls(z)], dim=1)
    if self.config.num_registers:
      registers = self.register_tokens.expand(len(z), -1, -1) if registers is None else registers
      tokens = torch.cat([tokens, self.proj_reg(registers)], dim=1)
    time_vector = self.time_proj(z) if self.config.d_time_emb else None
    known = self._conditioned(encoded)
    tokens = torch.where(known[:, None, None], tokens, 0)
    time_vector = None if time_vector is None else torch.where(known[:, None], time_vector, 0)
    return tokens if self.config.tokens else tokens[:, :0], time_vector


class FlatConditioner(_Conditioner):
  """FLAT: embeddings of all attributes, one projection.

  Args:
    schema, attributes, d_node, d_ctx, dropout, aux_hidden_dim, prompt_attributes: as in HierarchicalConditioner.
    mode: "single" (one token of all attributes) or "separate" (one for each).
    heads: auxiliary classifiers (read in training only): "shallow", "deep" or "none".
    unconditional: whether unknown values have learned "nulls"; with "zeros" all are given or none.
  """

  @register_to_config
  def __init__(
    self,
    schema: list,
    attributes: list = (),
    d_node: int = 256,
    d_ctx: int = 1024,
    mode: str = "single",
    heads: str = "shallow",
    aux_hidden_dim: int = 512,
    dropout: float = 0.1,
    unconditional: str = "nulls",
    prompt_attributes: list = (),
  ):
    super().__init__()
    self._read_schema(schema, attributes)
    self.represents_unknown = unconditional == "nulls"
    self._add_tables(d_node)
    for name in self.names:
      outputs = self._num_rows(name)
      if mode == "separate":
        setattr(self, f"proj_{name}", nn.Linear(d_node, d_ctx))
      if heads != "none":
        head = nn.Linear(d_ctx, outputs) if heads == "shallow" else _block(d_ctx, aux_hidden_dim, outputs)
        setattr(self, f"cls_{name}", head)
    if mode == "single":
      width = 2 * d_node
      self.fusion = nn.Sequential(
        nn.Linear(len(self.names) * d_node, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, d_ctx)
      )

  def forward(self, encoded):
    """Encoded lists {name: [B]} to tokens [B, T, d_ctx] (zeros where unknown values have no learned null), and None."""
    embeddings, known = self._embed_rows(encoded)
    if self.config.mode == "single":
      tokens = self.fusion(torch.cat(list(embeddings.values()), dim=-1))[:, None]
    else:
      tokens = torch.stack([getattr(self, f"proj_{name}")(e) for name, e in embeddings.items()], dim=1)
    return torch.where(known[:, None, None], tokens, 0), None


class AdditiveConditioner(_Conditioner):
  """A token that is the sum of a base, main effects, the interaction of each pair and, of three or more, of all.

  Args:
    schema, attributes, d_node, d_ctx, dropout, aux_hidden_dim, prompt_attributes: as in HierarchicalConditioner.
    freq_dim: number of sinusoids of a number.
    interaction_of_all: whether there is a table of all attributes together.
    interaction_penalty: strength of the shrinkage in training, kept for the record.
  """

  @register_to_config
  def __init__(
    self,
    schema: list,
    attributes: list = (),
    d_node: int = 256,
    d_ctx: int = 1024,
    freq_dim: int = 128,
    interaction_of_all: bool = True,
    interaction_penalty: float = 0.01,
    aux_hidden_dim: int = 512,
    dropout: float = 0.1,
    prompt_attributes: list = (),
  ):
    super().__init__()
    self._read_schema(schema, attributes)
    self.base = nn.Parameter(torch.zeros(d_node))
    for name in self.names:
      rows, number = self._num_rows(name), self._kind(name) == "continuous"
      setattr(self, f"effect_{name}", _number_encoder(freq_dim, d_node) if number else nn.Embedding(rows, d_node))
      if aux_hidden_dim:
        setattr(self, f"{name}_classifier", _block(d_ctx, aux_hidden_dim, rows))
    self.interactions = {f"interaction_{a}_{b}": (a, b) for a, b in itertools.combinations(self.names, 2)}
    if interaction_of_all and len(self.names) > 2:
      self.interactions["interaction_all"] = tuple(self.names)
    for table, parts in self.interactions.items():
      setattr(self, table, nn.Embedding(math.prod(self._num_rows(name) for name in parts), d_node))
    self.proj_ctx = nn.Linear(d_node, d_ctx)

  def forward(self, encoded):
    """Encoded lists {name: [B]} to tokens [B, 1, d_ctx], and None. An unknown value adds nothing."""
    rows = {name: self._rows(name, encoded[name]) for name in self.names}
    known = {name: own[:, :1] >= 0 for name, own in rows.items()}
    node = self.base
    for name, own in rows.items():
      effect, number = getattr(self, f"effect_{name}"), self._kind(name) == "continuous"
      vectors = self._encode_number(effect, encoded[name]) if number else _sum_rows(effect.weight, own)
      node = node + torch.where(known[name], vectors, 0)
    for table, parts in self.interactions.items():
      combined = rows[parts[0]]
      for name in parts[1:]:
        combined = (combined[:, :, None] * self._num_rows(name) + rows[name][:, None, :]).flatten(1)
      vectors = _sum_rows(getattr(self, table).weight, combined)
      node = node + torch.where(torch.stack([known[name] for name in parts]).all(dim=0), vectors, 0)
    return self.proj_ctx(node)[:, None], None
