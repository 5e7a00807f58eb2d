"""`compdiff train`: trains the UNet and the conditioner from a config. The same command resumes, bit for bit."""

import argparse
import contextlib
import functools
import json
import sys
from pathlib import Path

import jax
import ml_collections

from compdiff_jax import cli, distributed, sharding
from compdiff_jax.ahead_of_time.chips import chip
from compdiff_jax.ahead_of_time.program import TrainingProgram, model_flops
from compdiff_jax.checkpoint import Checkpoints
from compdiff_jax.config import load_config, to_plain
from compdiff_jax.data.identity import data_identity
from compdiff_jax.data.input_pipeline import batch_keys, check_vae, device_batches, open_training_sets, training_batches
from compdiff_jax.data.tokenizer import load_tokenizer
from compdiff_jax.diffusion.samplers import make_table
from compdiff_jax.latent_diffusion import LatentDiffusion
from compdiff_jax.metrics import MetricWriter, Progress, mean_over_steps
from compdiff_jax.sampling.gallery import sample_grid
from compdiff_jax.sampling.guidance import parse_guidance
from compdiff_jax.sampling.job import make_generate
from compdiff_jax.sampling.sampler import sampler_from_config
from compdiff_jax.training import streams
from compdiff_jax.training.checks import (
  check_finite,
  check_intervals,
  check_metric,
  out_of_memory_advice,
  warn_of_empty_levels,
)
from compdiff_jax.training.health import Heartbeat, Preemption
from compdiff_jax.training.optimizer import learning_rate_schedule
from compdiff_jax.training.overview import print_overview
from compdiff_jax.training.speed import Profile, StepClock, describe, parse_profile
from compdiff_jax.training.state import TrainState
from compdiff_jax.training.step import TrainingStep
from compdiff_jax.workdir import claim, content_hash, open_run


def main(argv: list[str]) -> None:
  parser = cli.parser("compdiff train", __doc__)
  parser.add_argument("--config", required=True, help="config file; override keys with --config.key=value")
  parser.add_argument("--workdir", type=Path, required=True, help="directory of this run, new or to be resumed")
  parser.add_argument("--dry_run", action="store_true", help="print config, parameters, mesh and memory, and stop")
  parser.add_argument("--profile", default="", metavar="START:STOP", help="trace these steps into WORKDIR/profile")
  parser.add_argument("--accept_changes", action="store_true", help="resume with another config or data set")
  parser.add_argument("--stopped_status", type=int, default=0, help="exit status of a run that SIGTERM stopped")
  distributed.add_arguments(parser)
  args, overrides = parser.parse_known_args(argv)
  config = load_config(args.config, overrides)
  with distributed.session(args), Preemption() as preemption:
    finished = train(config, args, preemption)
  if not finished and args.stopped_status:
    sys.exit(args.stopped_status)


def train(config: ml_collections.ConfigDict, args: argparse.Namespace, preemption: Preemption) -> bool:
  """Trains in `args.workdir`, from its latest checkpoint on; returns whether the last step was reached."""
  # ---- Data and networks (nothing is allocated before the arguments are known to fit together)
  check_intervals(config.logging)
  profiled = parse_profile(args.profile, config.train.steps)
  sets = open_training_sets(config.data)
  schema = sets[0][0].schema
  warn_of_empty_levels([records for records, _ in sets])
  origin = open_run(config.init) if config.init else None
  if origin:
    config = origin.start(config, schema)
  model = LatentDiffusion.from_config(config, schema)
  tokenizer = load_tokenizer(config.weights.tokenizer)
  if tokenizer.vocab_size > model.text_config.vocab_size:
    raise cli.InputError(
      f"{config.weights.tokenizer} has {tokenizer.vocab_size} tokens, text_encoder.vocab_size is"
      f" {model.text_config.vocab_size}; set it to at least {tokenizer.vocab_size}"
    )
  if tokenizer.length > model.text_config.max_position_embeddings:
    raise cli.InputError(
      f"{config.weights.tokenizer} gives {tokenizer.length} tokens a text, text_encoder.max_position_embeddings is"
      f" {model.text_config.max_position_embeddings}; set it to at least that, or train the vocabulary with --length"
    )
  sampler_table = make_table(sampler_from_config(config.sample), model.schedule, config.sample.num_steps)
  guidance = parse_guidance(config.sample.guidance, config.sample.guidance_parts, config.sample.null, model)
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch(config.train.batch_size, config.train.accumulation, mesh)
  training = TrainingStep(model, config, tokenizer.empty_ids)
  inputs = "images" if sets[0][0].latents is None else "moments"
  if config.logging.keep_best:
    check_metric(config.logging.keep_best, TrainingProgram(config, schema, inputs).metrics())
  shardings = training.shardings(mesh)
  if distributed.is_writer():
    print_overview(training.state_shapes, shardings, mesh, every_parameter=args.dry_run)
  if args.dry_run:
    print(json.dumps(to_plain(config), indent=2))
    return True

  # ---- Frozen networks and the run's directory
  frozen = model.load_frozen(config.weights)
  hashes = {name: content_hash(params) for name, params in frozen.items()}
  check_vae(sets, hashes["vae"], config.weights.vae)
  hashes["tokenizer"] = tokenizer.content_hash()
  identity = {str(i): data_identity(records.path) for i, (records, _) in enumerate(sets)}
  claimed = functools.partial(claim, args.workdir, config, schema, hashes, identity, accept_changes=args.accept_changes)
  distributed.from_writer(claimed)
  if not distributed.is_writer():
    claimed(write=False)

  # ---- State: the latest checkpoint of this workdir, else pretrained weights, else random
  keep = config.logging.keep_checkpoints, config.logging.keep_every, config.logging.keep_best
  checkpoints = Checkpoints(args.workdir / "checkpoints", *keep, trains=True)
  start = checkpoints.latest()
  with out_of_memory_advice(config, "the training state"):
    frozen = sharding.place(frozen, sharding.replicated(mesh))
    if start is not None:
      target = jax.tree.map(lambda x, s: x.update(sharding=s), training.state_shapes, shardings)
      state = TrainState.from_parts(checkpoints.restore(target.parts(), start)[1])
    else:
      start = 0
      given = origin.load_trained("ema", mesh)[1] if origin else None
      key = jax.random.fold_in(jax.random.key(config.seed), streams.INITIAL)
      params = model.initial_params(key, config.weights, given)
      params = sharding.place(params, shardings.params)
      state = jax.jit(training.create, out_shardings=shardings, donate_argnums=0)(params)
      del given, params  # the devices would keep a second copy as long as the run lasts

  # ---- Batches from this step on, and the compiled step
  placement = sharding.batch_sharding(mesh)
  order = {
    "batch_size": config.train.batch_size,
    "seed": config.seed,
    "balance": config.data.balance,
    "balance_tau": config.data.balance_tau,
  }
  keys = lambda step: batch_keys(sets, step=step - 1, **order)  # noqa: E731
  batches = training_batches(
    sets,
    **order,
    image_size=config.data.image_size,
    tokenizer=tokenizer,
    prompt_attributes=tuple(config.prompt_attributes),
    rows=sharding.local_rows(placement, config.train.batch_size),
    first_step=start,
    threads=config.data.threads,
    workers=config.data.workers,
  )
  batches = device_batches(batches, placement, config.train.batch_size)
  step_fn = training.jit(mesh)
  learning_rate = learning_rate_schedule(config.train)
  generate = make_generate(
    model,
    tokenizer,
    prompt_attributes=tuple(config.prompt_attributes),
    table=sampler_table,
    guidance=guidance,
    guidance_rescale=config.sample.guidance_rescale,
    batch_size=config.sample.batch_size,
    mesh=mesh,
  )

  # ---- The loop: step, report, checkpoint, sample
  final = config.train.steps
  figures = chip(mesh.devices.flat[0])
  clock = StepClock(config.train.batch_size, mesh.size, figures and figures.flops)
  heartbeat = Heartbeat(
    args.workdir / "heartbeat" / f"{jax.process_index()}.json", start, final, config.logging.stall_seconds
  )
  with contextlib.ExitStack() as resources:
    resources.enter_context(heartbeat)
    resources.enter_context(checkpoints)
    resources.enter_context(contextlib.closing(batches))
    if distributed.is_writer():
      writer = resources.enter_context(contextlib.closing(MetricWriter(args.workdir, start)))
      progress = resources.enter_context(contextlib.closing(Progress(final, start, "step")))
    traces = args.workdir / "profile"
    if jax.process_count() > 1:
      traces /= str(jax.process_index())  # those of one host would take the same name
    profile = resources.enter_context(contextlib.closing(Profile(profiled, traces, clock)))
    # A run that SIGTERM stopped between two reports goes on with the first part of its report.
    rows = checkpoints.note(start).get("report", []) if start else []
    pending = []
    step = start
    ending = preemption.reached()  # SIGTERM while the networks were loaded
    while step < final and not ending:
      step += 1
      profile.before(step)
      batch = clock.next(batches)
      if step == start + 1:
        clock.flops = model_flops(config, schema, inputs, traced=step_fn.trace(state, frozen, batch, config.seed))
        distributed.compile_together(step_fn, state, frozen, batch, config.seed)
      with out_of_memory_advice(config), jax.profiler.StepTraceAnnotation("train", step_num=step):
        state, metrics = step_fn(state, frozen, batch, config.seed)
        clock.started(metrics)
      if training.fairness is not None and training.fairness.due(step - 1):
        state = state._replace(fairness=training.fairness.search(state.fairness, config.seed, step - 1))
      pending.append(metrics)
      report = step % config.logging.log_every == 0 or step == final
      ending = step == final or preemption.reached()

      values = None
      if report or ending:
        clock.drain()
        rows += [{name: float(value) for name, value in row.items()} for row in jax.device_get(pending)]
        pending = []
        check_finite(rows, step - len(rows) + 1, keys, args.workdir / "nonfinite.json")
      if report:
        values = mean_over_steps(rows)
        position = {"learning_rate": float(learning_rate(step - 1)), "images": step * config.train.batch_size}
        speed = clock.report()
        if distributed.is_writer():
          writer.write(step, {**values, **position, **speed})
          progress.update(step, f"loss {values['loss']:.4f}  {describe(speed)}")
        rows = []

      if step % config.logging.checkpoint_every == 0 or ending:
        checkpoints.save(step, state.parts(), values, {"report": rows})

      if step % config.logging.sample_every == 0:
        heartbeat.disarm()  # the first time it compiles
        with clock.paused(), out_of_memory_advice(config, "sampling"):
          checkpoints.wait()  # a sampler that fails must not take this step's checkpoint with it
          text, negative = config.sample.text, config.sample.negative
          picture = sample_grid(
            functools.partial(generate, model.assemble({**frozen, **state.ema})),  # freed with the picture
            schema,
            text,
            config.seed,
            f"step {step}: {text}",
            negative,
          )
          if distributed.is_writer():
            (args.workdir / "samples").mkdir(exist_ok=True)
            picture.save(args.workdir / "samples" / f"step_{step:06d}.png")

      heartbeat.beat(step)
    if step < final:
      heartbeat.stopped()
  if distributed.is_writer():
    did = "trained to" if step >= final else "SIGTERM: stopped, to be resumed, at"
    print(f"{did} step {step}; checkpoints, metrics.jsonl and samples in {args.workdir}")
  return step >= final
