"""Multilabel attributes: their texts, their arrays, in every conditioner; batches and schemas that do not fit."""

import io
import itertools
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as torch_functional
from conditioner_parity import AGE, SEX, block, build, embed, linear, norm, torch_state, wide_params
from PIL import Image

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.additive import AdditiveConfig
from compdiff_jax.conditioning.dropout import drop_attributes
from compdiff_jax.conditioning.flat import FlatConfig
from compdiff_jax.conditioning.hcn import HCNConfig
from compdiff_jax.conditioning.losses import loss_terms
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.conditioning.typed import TypedConfig
from compdiff_jax.data.records import RecordSet
from compdiff_jax.evaluation import image_sets
from compdiff_jax.sampling.gallery import grid_attributes, sample_grid
from compdiff_jax.sampling.plan import balanced_plan, copied_plan, read_plan, write_plan
from compdiff_jax.training.checks import warn_of_empty_levels
from data_prep import dataset

FINDINGS = Attribute("findings", "multilabel", values=("Edema", "Effusion", "Fracture"))
SCHEMA = Schema((SEX, FINDINGS))
TEXTS = {
  "": (-1, -1, -1),
  "unknown": (-1, -1, -1),
  "unmentioned": (0, 0, 0),
  "Edema": (3, 0, 0),
  "Fracture = negative; Edema": (3, 0, 1),
  "Edema=uncertain; Effusion=positive; Fracture=unmentioned": (2, 3, 0),
}
SMALL = {"d_node": 16, "d_ctx": 24, "aux_hidden_dim": 12}
BATCH = {
  "sex": jnp.asarray([0, 1, 0, -1]),
  "findings": jnp.asarray([(0, 0, 0), (3, 1, 2), (-1, -1, -1), (0, 3, 0)], jnp.int8),
}


@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_labels(text):
  encoded = FINDINGS.encode(text)
  assert encoded == TEXTS[text]
  assert bool(FINDINGS.is_known(encoded)) == (encoded[0] >= 0)
  assert FINDINGS.encode(FINDINGS.decode(np.asarray(encoded, np.int8))) == encoded


def test_labels_are_written_briefly():
  assert FINDINGS.decode((3, 1, 0)) == "Edema; Effusion=negative"
  assert FINDINGS.decode((0, 0, 0)) == "unmentioned" and FINDINGS.decode((-1, -1, -1)) == ""


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("Oedema", "'Oedema' is not one of Edema, Effusion, Fracture"),
    ("Edema=maybe", "Edema is 'maybe', not one of unmentioned, negative, uncertain, positive"),
    ("Edema; Edema=negative", "names Edema twice"),
  ],
)
def test_bad_labels_are_refused(text, words):
  with pytest.raises(ValueError, match=words):
    FINDINGS.encode(text)


@pytest.mark.parametrize("values", [(), ("A", "a"), ("A=B",), ("A;",), ("positive",), ("none",)])
def test_bad_label_names_are_refused(values):
  with pytest.raises(InputError, match="attribute f: "):
    Attribute("f", "multilabel", values=values)


def test_the_schema_with_labels():
  assert Schema.from_json(SCHEMA.to_json()) == SCHEMA
  assert SCHEMA.grouping.names == ("sex",)
  unknown = SCHEMA.unknown(2)
  assert (
    unknown["findings"].shape == (2, 3) and unknown["findings"].dtype == np.int8 and (unknown["findings"] < 0).all()
  )
  for use in (lambda: SCHEMA.cells(), lambda: SCHEMA.parse_cell("findings=Edema"), lambda: FINDINGS.levels(BATCH)):
    with pytest.raises(InputError, match="findings is multilabel"):
      use()


def multihot(state, table: str) -> torch.Tensor:
  """The sum over labels of the row of each one's state, over sqrt(3); NaN where unknown."""
  rows = []
  for states in np.asarray(BATCH["findings"]).tolist():
    picked = [state[table][4 * label + said] for label, said in enumerate(states)]
    rows.append(sum(picked) / math.sqrt(3) if states[0] >= 0 else torch.full_like(picked[0], math.nan))
  return torch.stack(rows)


@pytest.mark.parametrize("config", [HCNConfig(**SMALL), TypedConfig(**SMALL), FlatConfig(**SMALL, heads="deep")])
def test_labels_in_the_conditioners(config):
  """One embedding of all labels' states that is composed like any other, and a classifier of each label's state."""
  model = build(config, SCHEMA)
  params = wide_params(model)
  output = jax.jit(model)(params, BATCH)
  state = torch_state(params)
  labels = multihot(state, "emb_findings.weight")
  labels = torch.where(labels.isnan(), state["null_findings"], labels)
  e = [embed(state, "sex", BATCH["sex"].tolist()), labels]
  both = torch.cat(e, 1)
  if config.kind == "flat":
    hidden = torch_functional.gelu(norm(state, "fusion.1", linear(state, "fusion.0", both)))
    tokens = linear(state, "fusion.3", hidden)[:, None]
    head = "cls_findings"
  else:
    h = block(state, "compose_sex_findings.net", both)
    mu = linear(state, "mu_head", h)
    nodes = {"ctx": mu}
    if config.kind == "typed":
      nodes = {n: block(state, f"ctx_{n}.net", torch.cat([x, h], 1)) for n, x in zip(SCHEMA.names, e)} | {"cls": mu}
    projected = [linear(state, f"proj_{n}.1", norm(state, f"proj_{n}.0", x)) for n, x in nodes.items()]
    tokens = torch.stack(projected, 1)
    head = "findings_classifier"
  np.testing.assert_allclose(output.tokens, tokens, atol=5e-4, rtol=5e-5)
  logits = block(state, head, tokens[:, 1 if config.kind == "typed" else 0]).reshape(4, 3, 4)
  np.testing.assert_allclose(output.logits["findings"], logits, atol=2e-3, rtol=5e-5)
  terms = loss_terms(output)
  known = torch.tensor([0, 1, 3])
  wanted = torch_functional.cross_entropy(
    logits[known].reshape(9, 4), torch.tensor(np.asarray(BATCH["findings"], int))[known].reshape(9)
  )
  values, weight = terms["aux_findings"]
  np.testing.assert_array_equal(weight, [1, 1, 0, 1])
  assert float(jnp.sum(values * weight) / 3) == pytest.approx(float(wanted), rel=1e-4)
  right = (np.asarray(logits.argmax(-1)) == np.asarray(BATCH["findings"]))[[0, 1, 3]].mean()
  assert float(jnp.sum(terms["acc_findings"][0] * weight) / 3) == pytest.approx(right)
  if config.kind == "typed":  # labels form no cells, so the joint head is over sex alone
    assert output.logits["joint"].shape == (4, 2)


def test_labels_in_the_additive_conditioner():
  model = build(AdditiveConfig(**SMALL), SCHEMA)
  params = wide_params(model)
  state = torch_state(params)
  nodes = torch.nan_to_num(multihot(state, "effect_findings.weight")) + state["base"]
  for i, sex in enumerate(BATCH["sex"].tolist()):
    if sex >= 0:
      nodes[i] += state["effect_sex.weight"][sex]
      states = BATCH["findings"][i].tolist()
      rows = [state["interaction_sex_findings.weight"][12 * sex + 4 * k + said] for k, said in enumerate(states)]
      nodes[i] += sum(rows) / math.sqrt(3) if states[0] >= 0 else 0
  tokens = jax.jit(model)(params, BATCH).tokens[:, 0]
  np.testing.assert_allclose(tokens, linear(state, "proj_ctx", nodes), atol=5e-4, rtol=5e-5)


def test_dropout_makes_all_labels_unknown_together():
  keys = jax.random.split(jax.random.key(0), 2000)
  batch = {"sex": jnp.ones([2000], int), "findings": jnp.ones([2000, 3], jnp.int8)}
  dropped = np.asarray(drop_attributes(batch, SCHEMA, keys, 0.3, 0.0)["findings"])
  unknown = (dropped == -1).all(1)
  assert unknown.mean() == pytest.approx(0.3, abs=0.04) and (dropped[~unknown] == 1).all() and dropped.dtype == np.int8


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A data set of 40 grey images with sex and findings, written by data_prep."""
  buffer = io.BytesIO()
  Image.new("L", (8, 8), 90).save(buffer, "PNG")
  texts = itertools.cycle(["", "unmentioned", "Edema", "Edema=uncertain; Fracture=negative"])
  examples = [
    {
      "key": f"{i:02d}.png",
      "patient": str(i),
      "image": buffer.getvalue(),
      "text": f"Report {i}.",
      "attributes": {"sex": i % 2, "findings": FINDINGS.encode(next(texts))},
      "findings": {},
      "factors": {},
    }
    for i in range(40)
  ]
  out = tmp_path_factory.mktemp("labels") / "data"
  dataset.write_dataset(
    out, name="labels", schema=SCHEMA, examples=examples, description="Grey.", size=8, command="test"
  )
  return out


def test_labels_through_records_plans_grids_and_evaluation(prepared, tmp_path):
  records = RecordSet(prepared)
  record = records.split("train")[0]
  number = int(record["key"].removesuffix(".png"))
  said = [(-1, -1, -1), (0, 0, 0), (3, 0, 0), (2, 0, 1)]
  assert tuple(record["attributes"]["findings"]) == said[number % 4]
  assert record["attributes"]["findings"].dtype == np.int8
  rows = copied_plan(records, "train")
  write_plan(tmp_path / "plan.csv", rows, records.schema)
  again = read_plan(tmp_path / "plan.csv", records.schema)
  assert [tuple(row.attributes["findings"]) for row in again] == [tuple(row.attributes["findings"]) for row in rows]
  assert {row.attributes["sex"] for row in balanced_plan(records, ["sex"], 2)} == {0, 1}
  with pytest.raises(InputError, match="findings is multilabel"):
    balanced_plan(records, ["sex", "findings"], 2)
  grid = grid_attributes(SCHEMA)
  assert grid["sex"].tolist() == [0, 1] and (grid["findings"] == -1).all() and grid["findings"].shape == (2, 3)
  loaded = image_sets.load(prepared, "train")
  assert loaded.attributes["findings"].shape == (len(loaded), 3)
  card = (prepared / "README.md").read_text()
  assert "Edema 20, Effusion 0, Fracture 10" in card and "10 (25.0%)" in card


@pytest.mark.parametrize("schema", [Schema((SCHEMA["findings"],)), Schema(())])
def test_a_grid_without_levels_is_one_picture(schema):
  image = np.random.default_rng(0).integers(0, 256, [1, 64, 64, 3], np.uint8)
  grid = sample_grid(lambda texts, *_: image[: len(texts)], schema, "clear", 0, "a title")
  np.testing.assert_array_equal(np.asarray(grid)[-66:-2, -66:-2], image[0])


def test_levels_without_data_are_named(prepared, monkeypatch, capsys):
  records = RecordSet(prepared)
  warn_of_empty_levels([records])
  assert capsys.readouterr().err == ""
  columns = records.attributes("train")
  monkeypatch.setattr(RecordSet, "attributes", lambda self, split: columns | {"sex": columns["sex"] * 0})
  warn_of_empty_levels([records, records])
  assert "no training image has sex=female;" in capsys.readouterr().err
  assert (prepared / "cells.csv").read_text().startswith("sex,train,val,test,total\n")


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"sex": np.asarray([0, 2])}, "sex is 2 in example 1; the schema has 0 to 1, or -1 for unknown"),
    ({"sex": np.asarray([-2, 0])}, "sex is -2 in example 0"),
    ({"age": np.asarray([50.0, 101.0])}, "age is 101 in example 1; the schema has 0 to 100, or NaN for unknown"),
    ({"age": np.asarray([np.inf, 1.0])}, "age is inf in example 0"),
    ({"findings": np.asarray([[0, 1, 2], [0, 4, 0]])}, "findings is 4 in example 1"),
    ({"findings": np.asarray([[0, -1, 2], [0, 0, 0]])}, "findings is -1 in example 0"),
    ({"findings": np.asarray([[0, 1], [0, 1]])}, r"findings has shape \[2\] an example, the schema \[3\]"),
    ({"sex": None}, "has no attribute sex; the schema needs age, sex, findings"),
  ],
)
def test_batches_that_do_not_fit_are_refused(change, words):
  schema = Schema((AGE, SEX, FINDINGS))
  good = {"age": np.asarray([np.nan, 100.0]), "sex": np.asarray([-1, 1]), "findings": np.asarray([[-1] * 3, [0, 1, 3]])}
  schema.check_batch(good, "x")
  bad = {name: values for name, values in (good | change).items() if values is not None}
  with pytest.raises(InputError, match=f"^the batch:? .*{words}"):
    schema.check_batch(bad, "the batch")


def test_a_schema_that_does_not_match_its_records_is_refused(prepared, tmp_path):
  """The schema of another table beside the shards: fewer categories than the records use, or another set of labels."""
  copy = tmp_path / "copy"
  shutil.copytree(prepared, copy)
  Schema((SEX, Attribute("findings", "multilabel", values=("Edema", "Effusion")))).save(copy / "schema.json")
  with pytest.raises(InputError, match=r"train.*record"):
    source = RecordSet(copy).split("train")
    [source[i] for i in range(len(source))]
  Schema((SEX, FINDINGS, AGE)).save(copy / "schema.json")
  with pytest.raises(InputError, match="age"):
    RecordSet(copy).split("train")[0]
