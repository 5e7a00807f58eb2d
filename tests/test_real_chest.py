"""The whole chain on real chest X-rays with a handful of steps, from the table to the export."""

import json
import os
from pathlib import Path

import pytest
from conftest import REPOSITORY, TINY

from compdiff_jax import evaluate, export, plan, sample, train, train_vae
from compdiff_jax.data.records import RecordSet
from data_prep import table, vocabulary

_SOURCE = Path(os.environ.get("COMPDIFF_SHARED", REPOSITORY.parent / "shared")) / "data" / "chest_xray"


@pytest.mark.skipif(not _SOURCE.is_dir(), reason=f"real X-rays are not at {_SOURCE}; set COMPDIFF_SHARED")
def test_whole_chain_on_real_chest_xrays(tmp_path):
  data, run, samples = tmp_path / "data", tmp_path / "run", tmp_path / "samples"
  mapping = REPOSITORY / "configs" / "data" / "chest_xray.py"
  table.main([
    *["--csv", str(_SOURCE / "metadata.csv"), "--images", str(_SOURCE / "images"), "--config", str(mapping)],
    *["--out", str(data), "--fractions", "0.7,0.1,0.2", "--config.size=32"],
  ])  # fmt: skip
  record_set = RecordSet(data)
  assert sum(record_set.splits.values()) == 198
  patients = {split: {record["patient"] for record in record_set.split(split)} for split in record_set.splits}
  assert sum(map(len, patients.values())) == len(set.union(*patients.values())) == 111
  vocabulary.main(["--data", str(data), "--out", str(tmp_path / "tokenizer")])
  config = [
    f"--config={REPOSITORY / 'configs' / 'real_chest_toy.py'}",
    f"--config.data.path={data}",
    f"--config.weights.vae={tmp_path / 'vae'}",
    f"--config.weights.tokenizer={tmp_path / 'tokenizer'}",
    *TINY,
    "--config.train.steps=4",
  ]
  train_vae.main([f"--out={tmp_path / 'vae'}", *config])
  train.main([f"--workdir={run}", *config])
  plan.main([f"--data={data}", "--balance=sex,view", "--per_cell=4", f"--out={tmp_path / 'plan.csv'}"])
  sample.main([f"--workdir={run}", f"--plan={tmp_path / 'plan.csv'}", f"--out={samples}", "--grid"])
  evaluate.main([f"--real={data}", f"--synthetic={samples}", f"--out={tmp_path / 'report'}"])
  export.main([f"--workdir={run}", f"--out={tmp_path / 'export'}"])

  report = json.loads((tmp_path / "report" / "report.json").read_text())
  assert report["inputs"]["real"]["images"] == record_set.splits["test"]
  assert report["inputs"]["synthetic"]["images"] == 24
  assert not report["failures"] and report["fidelity"]
  assert report["alignment"]["status"] == "absent"
  assert (samples / "grid.png").stat().st_size and (tmp_path / "export" / "model_index.json").exists()
  # Nothing that leaves this chain names a source file's patient.
  assert "patient_id" not in (samples / "manifest.csv").read_text()
