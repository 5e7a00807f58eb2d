"""`compdiff sample` and `compdiff export` on a run of a few steps."""

import argparse
import csv
import hashlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from compdiff_jax import default_config, export, plan, sample, sharding
from compdiff_jax.checkpoint import Checkpoints
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.diffusion.samplers import Sampler
from compdiff_jax.sampling.job import run_job
from compdiff_jax.sampling.sampler import sampler_from_config
from compdiff_jax.workdir import open_run


@pytest.fixture(scope="module")
def samples(trained, workspace):
  """Eleven rows of a balanced plan, sampled."""
  plan.main([f"--data={workspace / 'data'}", "--balance=sex,group", "--per_cell=2", f"--out={workspace / 'plan.csv'}"])
  lines = (workspace / "plan.csv").read_text().splitlines()
  (workspace / "plan.csv").write_text("\n".join(lines[:12]) + "\n")
  arguments = [f"--workdir={trained}", f"--plan={workspace / 'plan.csv'}", f"--out={workspace / 'samples'}"]
  sample.main([*arguments, "--grid"])
  return workspace / "samples", arguments


def _manifest(directory):
  with (directory / "manifest.csv").open(newline="") as file:
    return list(csv.DictReader(file))


def test_manifest_lists_every_image_with_its_hash_and_provenance(samples):
  rows = _manifest(samples[0])
  assert [row["file"] for row in rows] == [f"{i:06d}.png" for i in range(11)]
  for row in rows:
    data = (samples[0] / row["file"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == row["sha256"]
    image = Image.open(samples[0] / row["file"])
    assert image.size == (32, 32) and image.text["Synthetic"] == "YES"
    facts = json.loads(image.text["Generation"])
    assert facts["seed"] == int(row["seed"]) and facts["attributes"]["sex"] == row["sex"]
    assert (facts["checkpoint_step"], facts["weights"], facts["sampler"]) == (8, "ema", "ddim")
    assert (facts["null"], row["null"]) == ("learned", "learned")


def test_grid_holds_one_tile_per_cell(samples):
  grid = np.asarray(Image.open(samples[0] / "grid.png"))
  assert grid.shape[0] > 5 * 64 and grid.shape[1] > 8 * 64


def test_interrupted_job_resumes_with_the_same_images(samples):
  directory, arguments = samples
  before = {row["file"]: row["sha256"] for row in _manifest(directory)}
  # As a kill leaves it: a row cut short, images after it that no row names, one image half written.
  lines = (directory / "manifest.csv").read_text().splitlines(keepends=True)
  (directory / "manifest.csv").write_text("".join(lines[:6]) + lines[6][:20])
  (directory / "000004.png").write_bytes(b"half")
  sample.main(arguments)
  assert {row["file"]: row["sha256"] for row in _manifest(directory)} == before


def test_a_job_killed_while_it_begins_resumes(workspace, tmp_path):
  """Whatever is there of job.json, schema.json and manifest.csv when the kill comes."""
  schema = Schema.load(workspace / "data" / "schema.json")
  begin = lambda out: list(run_job(out, [], schema, None, {"step": 8}, 1))  # noqa: E731
  begin(tmp_path / "whole")
  files = {name: (tmp_path / "whole" / name).read_bytes() for name in ("job.json", "schema.json", "manifest.csv")}
  for number in range(4):
    out = tmp_path / str(number)
    out.mkdir()
    (out / ".job.json.part").write_text("{")
    for name in list(files)[:number]:
      (out / name).write_bytes(files[name])
    assert begin(out) == [0]
    assert {name: (out / name).read_bytes() for name in files} == files


def test_job_resumes_with_the_same_model_only(samples, trained, tmp_path, fails):
  directory, (_, *rest) = samples
  job = (directory / "job.json").read_text()
  rows, settings = _manifest(directory), json.loads(job)["settings"]
  assert {row["model_sha256"] for row in rows} == {settings["model_sha256"]}
  facts = json.loads(Image.open(directory / rows[0]["file"]).text["Generation"])
  assert facts["model_sha256"] == settings["model_sha256"]

  # The same run elsewhere is the same model; other weights, or another schedule, of the same step are not.
  shutil.copytree(trained, tmp_path / "moved")
  sample.main([f"--workdir={tmp_path / 'moved'}", *rest])
  assert _manifest(directory) == rows
  shutil.copytree(trained, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints"))
  step, ema = open_run(trained).load_trained("ema", sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}))
  ema["conditioner"] = {name: 1.01 * values for name, values in ema["conditioner"].items()}
  with Checkpoints(tmp_path / "other" / "checkpoints") as checkpoints:
    checkpoints.save(step, {"ema": ema})
  message = fails(sample.main, f"--workdir={tmp_path / 'other'}", *rest)
  assert "another plan, checkpoint or settings (settings.model_sha256: " in message
  config = json.loads((tmp_path / "moved" / "config.json").read_text())
  config["scheduler"]["beta_end"] *= 2
  (tmp_path / "moved" / "config.json").write_text(json.dumps(config))
  assert "(settings.model_sha256: " in fails(sample.main, f"--workdir={tmp_path / 'moved'}", *rest)

  # A job from before the model was recorded.
  settings.pop("model_sha256")
  (directory / "job.json").write_text(json.dumps({**json.loads(job), "settings": settings}))
  assert "(settings.model_sha256: null -> " in fails(sample.main, f"--workdir={trained}", *rest)
  (directory / "job.json").write_text(job)


def test_image_does_not_depend_on_its_batch(samples, trained, workspace, tmp_path):
  lines = (workspace / "plan.csv").read_text().splitlines()
  (tmp_path / "plan.csv").write_text("\n".join([lines[0], lines[4]]) + "\n")
  sample.main([f"--workdir={trained}", f"--plan={tmp_path / 'plan.csv'}", f"--out={tmp_path / 'one'}"])
  alone = np.asarray(Image.open(tmp_path / "one" / "000000.png")).astype(int)
  among = np.asarray(Image.open(samples[0] / "000003.png")).astype(int)
  assert np.abs(alone - among).max() <= 1  # reduction order may differ by a rounding
  assert among.std() > 1


def test_attributes_change_the_image_and_raw_weights_differ(samples, trained, tmp_path):
  (tmp_path / "plan.csv").write_text("text,age,sex,group,seed\nclear,50,male,A,3\nclear,50,female,A,3\nclear,,,,3\n")
  arguments = [f"--workdir={trained}", f"--plan={tmp_path / 'plan.csv'}"]
  sample.main([*arguments, f"--out={tmp_path / 'ema'}"])
  sample.main([*arguments, f"--out={tmp_path / 'raw'}", "--weights=raw"])
  hashes = [row["sha256"] for d in ("ema", "raw") for row in _manifest(tmp_path / d)]
  assert len(set(hashes)) == 6


def test_sampler_and_negative_prompt(trained, tmp_path):
  """The options of the command, the plan's own negative prompts, and a manifest that tells and repeats them."""
  (tmp_path / "plan.csv").write_text(
    "id,text,age,sex,group,seed,negative\nx1,clear,50,male,A,3,\n,clear,50,male,A,3,effusion\n"
  )
  options = ["--sampler=euler_ancestral", "--num_steps=3", "--timestep_spacing=trailing", "--guidance=4"]

  def run(name, plan_file, *more):
    arguments = [f"--workdir={trained}", f"--plan={plan_file}", f"--out={tmp_path / name}", *options, *more]
    sample.main(arguments)
    return _manifest(tmp_path / name)

  first = run("first", tmp_path / "plan.csv", "--guidance_rescale=0.5", "--negative=blurred")
  facts = {
    "sampler": "euler_ancestral", "steps": "3", "timestep_spacing": "trailing", "eta": "0.0", "karras": "False",
    "guidance": "4.0", "guidance_rescale": "0.5",
  }  # fmt: skip
  assert all(facts.items() <= row.items() for row in first)
  assert [row["negative"] for row in first] == ["blurred", "effusion"]
  assert [row["id"] for row in first] == ["x1", ""]
  own = json.loads(Image.open(tmp_path / "first" / "000000.png").text["Generation"])
  assert (own["id"], own["negative"]) == ("x1", "blurred")
  again = run("again", tmp_path / "first" / "manifest.csv", "--guidance_rescale=0.5")
  assert [row["sha256"] for row in again] == [row["sha256"] for row in first]
  plain = run("plain", tmp_path / "plan.csv")
  assert len({row["sha256"] for row in [*first, *plain]}) == 4


def test_another_sampler_leaves_the_options_of_the_runs(tmp_path):
  config = default_config.base().sample
  config.update({"sampler": "dpmpp_2m", "karras": True, "timestep_spacing": "leading", "num_steps": 20})
  parse = lambda **given: sample.resolve_options(config, argparse.Namespace(**{"sampler": None, **given}))  # noqa: E731
  assert sampler_from_config(parse()) == Sampler("dpmpp_2m", "leading", karras=True)
  assert sampler_from_config(parse(sampler="ddim", eta=0.5)) == Sampler("ddim", eta=0.5)
  assert parse(sampler="ddim", guidance=3.0).num_steps == 20 and config.sampler == "dpmpp_2m"


def test_bad_requests_are_refused(samples, trained, workspace, tmp_path, fails):
  _directory, arguments = samples
  assert "another plan, checkpoint or settings" in fails(sample.main, *arguments, "--guidance=1.5")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "x").touch()
  base = [f"--workdir={trained}", f"--plan={workspace / 'plan.csv'}"]
  assert "not an empty directory" in fails(sample.main, *base, f"--out={tmp_path / 'full'}")
  assert "not an empty directory" in fails(sample.main, *base, f"--out={tmp_path / 'full' / 'x'}")
  assert "no checkpoint of step 5" in fails(sample.main, *base, f"--out={tmp_path / 'a'}", "--step=5")
  assert "config.json is missing" in fails(sample.main, f"--workdir={tmp_path}", base[1], f"--out={tmp_path / 'b'}")
  (tmp_path / "bad.csv").write_text("text,age,sex,group\nclear,50,unclear,A\n")
  message = fails(sample.main, base[0], f"--plan={tmp_path / 'bad.csv'}", f"--out={tmp_path / 'c'}")
  assert "bad.csv" in message and "unclear" in message
  assert not (tmp_path / "c").exists()
  out = f"--out={tmp_path / 'd'}"
  assert "did you mean 'euler'" in fails(sample.main, *base, out, "--sampler=eular")
  assert "only ddim has eta" in fails(sample.main, *base, out, "--sampler=euler", "--eta=0.5")
  assert "steps 0 must lie in 1 to 999" in fails(sample.main, *base, out, "--num_steps=0")
  assert "did you mean 'age'" in fails(sample.main, *base, out, "--guidance_parts=ages=2")
  assert "unknown null 'zero'; did you mean 'zeros'" in fails(sample.main, *base, out, "--null=zero")
  assert "--guidance_rescale 2 must lie" in fails(sample.main, *base, out, "--guidance_rescale=2")


def test_exported_run_loads_in_diffusers_and_draws(samples, trained, tmp_path, fails):
  import torch
  from diffusers import DiffusionPipeline

  # A report about these samples is one about this model.
  inputs = {"synthetic": {"sampling": json.loads((samples[0] / "job.json").read_text())["settings"]}}
  (tmp_path / "report.json").write_text(json.dumps({"headline": [], "inputs": inputs}))
  export.main([f"--workdir={trained}", f"--out={tmp_path / 'export'}", "--ema", f"--report={tmp_path}"])
  assert "| images | sampler ddim, steps 2, " in (tmp_path / "export" / "README.md").read_text()
  pipe = DiffusionPipeline.from_pretrained(tmp_path / "export", trust_remote_code=True)
  pipe.set_progress_bar_config(disable=True)
  assert type(pipe.scheduler).__name__ == "DDIMScheduler"  # that of config.sample
  draw = lambda **attributes: np.asarray(  # noqa: E731
    pipe("clear", num_inference_steps=2, generator=torch.Generator().manual_seed(0), **attributes).images[0]
  )
  assert draw(age=50, sex="male").shape == (32, 32, 3)
  assert np.any(draw(age=50, sex="male") != draw(age=50, sex="female"))
  assert "not empty" in fails(export.main, f"--workdir={trained}", f"--out={tmp_path / 'export'}")
