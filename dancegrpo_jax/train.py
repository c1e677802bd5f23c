"""The training loop. An iteration, read top to bottom in `run`: prompts -> rollout -> rewards ->
advantages -> update.
"""

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax import programs, scoring
from dancegrpo_jax.assembly import encoding, loading, resident, reward_builders
from dancegrpo_jax.assembly.loading import Model
from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.compilation import ahead, calls
from dancegrpo_jax.data import prompts
from dancegrpo_jax.data.prompts import read_examples, read_held_out
from dancegrpo_jax.devices import accelerator, out_of_memory, processes, program_cache, sharding
from dancegrpo_jax.devices.preemption import Preemption
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.programs import update as update_calls
from dancegrpo_jax.report import metrics, page
from dancegrpo_jax.report.clock import Clock
from dancegrpo_jax.rl import lanes
from dancegrpo_jax.rl.rollout import Rollout
from dancegrpo_jax.rl.state import TrainState, init_state
from dancegrpo_jax.settings import checks, command_line, stored_config
from dancegrpo_jax.types import Conditioning, Example, PyTree


class RunError(ConfigError):
  """A run that had to stop: the message says why, and what is left."""


class Session(NamedTuple):
  """What stays the same over a run.

  Attributes:
    config, workdir: as asked.
    examples: the prompt data set.
    shown: prompts that evaluation.every samples with fixed noise: of the data set, and held out.
    batches: `batches[iteration]` is that iteration's examples.
    model: without its trainable weights, which the state owns.
    programs: compiled functions of an iteration.
    shown_programs: the same at the shapes of an evaluation inside training.
    encode: `texts -> rows` of an iteration's prompts: by the text encoders, or from the cache.
    encode_shown: the same for the shown prompts.
    reference: in the place of the trained weights what a KL penalty holds to, or None. {} under
      LoRA: the base has no adapters.
    features: device rewards' features of every prompt, by reward.
    shown_features: of the shown ones.
  """

  config: ConfigDict
  workdir: Path
  examples: list[Example]
  shown: tuple[list[Example], list[Example]]
  batches: Any
  model: Model
  programs: programs.Programs
  shown_programs: programs.Programs
  encode: Callable[[list[str]], PyTree]
  encode_shown: Callable[[list[str]], PyTree]
  reference: PyTree | None
  features: dict[str, PyTree]
  shown_features: dict[str, PyTree]


class Experience(NamedTuple):
  """An iteration's trajectories and scores.

  Attributes:
    ids: of the P prompts.
    conditioning: one row a prompt.
    rollouts: one a chunk.
    scores: `{term: f32[P, G]}`, NaN where failed.
    pixels: of the first group, on the host, where asked for.
  """

  ids: np.ndarray
  conditioning: Conditioning
  rollouts: tuple[Rollout, ...]
  scores: dict[str, jax.Array]
  pixels: np.ndarray | None


class Pending(NamedTuple):
  """An iteration that is dispatched and whose numbers have not been read."""

  iteration: int
  values: dict
  clock: Clock


def run(config: ConfigDict, workdir: Path) -> None:
  """Trains, or goes on training what the workdir holds. SIGTERM ends it as of the last whole
  iteration, saved, after the program call or the few chunks that it comes upon.

  Raises:
    ConfigError: a mistake in the config, the prompts or the workdir, before anything is written.
    RunError: too many non-finite steps or failed rewards.
    OutOfMemory: a program, or the model itself, is too large for the devices.
  """
  examples = read_examples(config)
  device = jax.devices()[0]
  facts = checks.device_facts(device)
  checks.validate(config, num_devices=jax.device_count(), num_examples=len(examples), **facts)
  command_line.require_writable(f"--workdir={workdir}", workdir)
  first = iterations_done(config, workdir)
  processes.require_same(
    first, f"--workdir={workdir}: iterations done differ", "all hosts must see the same folder"
  )
  processes.require_shared(workdir)
  if first >= config.iterations:
    print(
      f"{workdir}: already finished, {first} iterations;"
      f" {metrics.last_line(workdir, workdir / page.FILE)}"
    )
    return
  if jax.process_index() == 0:
    accelerator.say_share(device.platform)
  mesh = sharding.make_mesh(config.mesh)
  with contextlib.ExitStack() as stack:
    stack.enter_context(out_of_memory.explained(config, lambda: what_is_left(workdir)))
    stack.enter_context(jax.set_mesh(mesh))
    preemption = stack.enter_context(Preemption(mesh))
    clock_thread = stack.enter_context(ThreadPoolExecutor(1))
    reward_threads = stack.enter_context(ThreadPoolExecutor(8))
    progress = stack.enter_context(metrics.Progress(config.iterations, first))
    session, state = prepare(config, workdir, examples, mesh, first, progress)
    saver = stack.enter_context(store.Saver(workdir / "checkpoints", config.checkpoint.keep))
    writer = stack.enter_context(metrics.Writer(workdir, config, first))
    if first == 0:
      show(session, 0, state, progress.warning)
    if config.logging.profile_steps:
      stack.callback(end_trace)
    meta, pending, clock = {"config": config.to_dict()}, None, None
    for iteration in range(first, config.iterations):
      done = iteration + 1
      last = done == config.iterations
      save = last or is_due(done, config.checkpoint.every)
      shown = last or is_due(done, config.evaluation.every)
      clock = Clock(clock_thread, before=clock)

      start_profile(config, workdir, iteration)
      # Prompts, rollout, decode and rewards, chunk by chunk.
      seen = collect(
        session,
        state.trainable,
        iteration,
        clock,
        reward_threads,
        progress.warning,
        shown,
        preemption.reached,
      )
      # Read the last iteration's numbers, now that this one's work is queued. Wait for its
      # checkpoint, so that a run that must stop knows the last one.
      saver.wait()
      pending = flush(config, workdir, pending, writer, progress)
      # Scores -> advantages within each prompt's group -> optimizer steps. The host is chunks
      # ahead; a signal that comes during these is to be heard before the update.
      jax.block_until_ready(seen)
      after = None
      if seen is not None and not preemption.reached(wait=True):
        after = update(session, state, seen, iteration, clock, preemption.reached)
      if after is None:
        give_up(saver, workdir, state, iteration, first, meta, progress)
        break
      state, values, seen = after
      stop_profile(config, iteration, values)
      pending = Pending(iteration=iteration, values=values, clock=clock)

      if shown:
        pending = pending._replace(
          values=pending.values | show(session, done, state, progress.warning)
        )
      # A state is saved only after its numbers were read and found sound.
      if save or shown:
        pending = flush(config, workdir, pending, writer, progress)
      if save:
        saver.save(done, state, meta | {"iteration": done})
      if shown:
        save_extremes(session, done, seen)
  if jax.process_index() == 0:
    print(metrics.last_line(workdir, page.write(workdir)))


def iterations_done(config: ConfigDict, workdir: Path) -> int:
  """Iterations already done in the workdir: 0, or where to resume. Says which harmless fields
  differ.

  Raises:
    ConfigError: the workdir belongs to a run that differs in what may not change, field by field.
  """
  folder = workdir / "checkpoints"
  done = store.latest(folder)
  if done is None:
    return 0
  allowed, refused = stored_config.differences(store.read_meta(folder)["config"], config)
  if refused:
    lines = "\n".join(map(str, refused))
    raise ConfigError(
      f"{workdir} holds a run with another config; use another --workdir, or undo these"
      f" changes:\n{lines}"
    )
  for difference in allowed:
    print(f"resuming with {difference}")
  return done


@out_of_memory.named("loading")
def prepare(
  config: ConfigDict,
  workdir: Path,
  examples: list[Example],
  mesh: jax.sharding.Mesh,
  first: int,
  progress: metrics.Progress,
) -> tuple[Session, TrainState]:
  """Model, rewards, programs and the state to start from; writes config.json and environment.json
  when all is loaded.

  The programs are compiled in threads while the weights are read: both need no more than the
  config.json files to begin.
  """
  program_cache.use(config.logging.compilation_cache)
  pipeline, rewards = loading.build_pipeline(config), reward_builders.build_rewards(config)
  held_out, cached = read_held_out(config), None
  without = pipeline.encoders if config.data.cache_embeddings else ()
  outline = loading.outline(config, pipeline, rewards, mesh)
  abstract = loading.abstract_state(config, outline, mesh, len(examples))
  resident.require_room(config, mesh, outline, abstract, without)
  if config.data.cache_embeddings:
    cached = encoding.cached_encoder(config, workdir, pipeline, examples + held_out, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  jitted = programs.build(config, pipeline, rewards, mesh, shardings)
  listed = calls.of_run(config, outline, abstract, jitted, len(examples), len(held_out)).listed
  if cached:
    listed = [call for call in listed if call.name != "encode"]
  with ahead.compilers() as pool:
    compiling = ahead.start(listed, mesh, pool)
    model = loading.load(config, pipeline, rewards, mesh, without)
    compiled, shown_programs = ahead.ready(compiling, jitted, progress)
  compiled = out_of_memory.guarded(compiled)
  shown_programs = out_of_memory.guarded(shown_programs, calls.SHOW)
  reference = reference_of(config, model)
  make_state = init_state(config, len(examples), shardings)
  state = (
    store.restore(workdir / "checkpoints", abstract).state if first else make_state(model.trainable)
  )
  batches = prompts.prompt_batches(
    examples, config.data.prompts_per_iteration, config.seed, config.data.shuffle
  )
  shown = examples[: config.evaluation.prompts], held_out[: config.evaluation.prompts]
  params, rows = model.reward_params, config.data.prompts_per_iteration
  features = scoring.reward_features(rewards, params, compiled.features, examples, rows)
  shown_features = scoring.reward_features(rewards, params, compiled.features, sum(shown, []), rows)
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(stored_config.to_json(config))
    page.save_environment(workdir)
  model = model._replace(trainable=None)
  encode = cached or encoding.encoder(model, compiled.encode)
  session = Session(
    config=config,
    workdir=workdir,
    examples=examples,
    shown=shown,
    batches=batches,
    model=model,
    programs=compiled,
    shown_programs=shown_programs,
    encode=encode,
    encode_shown=cached or encoding.encoder(model, shown_programs.encode),
    reference=reference,
    features=features,
    shown_features=shown_features,
  )
  return session, state


def reference_of(config: ConfigDict, model: Model) -> PyTree | None:
  """What a KL penalty holds to: a copy of the weights before training, or the frozen base itself,
  which LoRA leaves as it is.
  """
  if not config.objective.kl.weight:
    return None
  return {} if config.lora.rank else jax.tree.map(jnp.copy, model.trainable)


def collect(
  session: Session,
  trainable: PyTree,
  iteration: int,
  clock: Clock,
  threads: ThreadPoolExecutor,
  say: Callable,
  keep_pixels: bool = False,
  stop: Callable[[], bool] = lambda: False,
) -> Experience | None:
  """Prompts -> conditioning -> rollout -> pixels -> scores. Chunks reuse one program each and bound
  the memory: a chunk's pixels are freed when they are scored. Host rewards run in threads and
  overlap with the next chunk.

  `stop` is asked before each chunk; where it says True the iteration is given up: None.
  """
  config, model, run = session.config, session.model, session.programs
  batch, group = session.batches[iteration], config.rollout.samples_per_prompt
  ids = np.array([example.id for example in batch], np.int32)
  conditioning = encoding.conditioning(config, session.encode, batch)
  clock.phase("encode", conditioning)
  rows = {
    name: jax.tree.map(lambda x: x[ids], features) for name, features in session.features.items()
  }

  rollouts, scores, waiting, kept = [], {}, [], {}
  chunks = lanes.deal(len(batch) * group, config.rollout.chunk, config.mesh.lanes)
  for chunk in chunks:
    if len(rollouts) > 1:  # bounds what is queued on the devices, and the pixels that it holds
      jax.block_until_ready(rollouts[-2])
    if stop():
      return None
    rollout = run.rollout(trainable, model.frozen, conditioning, ids, chunk, np.int32(iteration))
    clock.phase("rollout", rollout)
    pixels = run.decode(model.frozen, rollout.sample)
    shards = sharding.own_shards(pixels)
    clock.phase("decode", pixels)
    owners = chunk // group
    for name, reward in model.rewards.items():
      if reward.kind == "device":
        result = run.score[name](model.reward_params[name], pixels, rows[name], owners)
        clock.phase("reward", result)
        for term, value in result.items():
          scores.setdefault(term, []).append(value)
      else:
        waiting.append(
          (
            name,
            chunk,
            threads.submit(scoring.own_scores, reward, shards, [batch[o] for o in owners], say),
          )
        )
    rollouts.append(rollout)
    if keep_pixels and chunk.min() < group:
      kept |= {
        number: image
        for number, image in zip(chunk.tolist(), sharding.to_host(pixels))
        if number < group
      }
  first_group = np.stack([kept[number] for number in range(group)]) if kept else None
  order = np.argsort(chunks.reshape(-1)).astype(np.int32)
  scores |= scoring.from_host(config, waiting, chunks)
  return Experience(ids, conditioning, tuple(rollouts), run.join(scores, order), first_group)


def update(
  session: Session,
  before: TrainState,
  seen: Experience,
  iteration: int,
  clock: Clock,
  stop: Callable[[], bool],
) -> tuple[TrainState, dict[str, jax.Array], Experience] | None:
  """Scores -> advantages -> optimizer steps.

  Args:
    session: of the run.
    before: the state; it stays valid where None is returned.
    seen: what the iteration has collected. The caller's own reference to it should be replaced by
      the one returned, which holds no trajectories: they are freed as soon as they lie in lanes.
    iteration: number of the iteration.
    clock: of the iteration.
    stop: asked between two calls of a program; True gives the iteration up.

  Returns:
    The state after, metrics and `seen`; None where the iteration was given up.
  """
  config, model, run = session.config, session.model, session.programs
  advantage, weight, chosen, stats, reward_metrics = run.advantages(
    seen.scores, seen.ids, before.prompt_stats
  )
  clock.phase("reward", advantage)
  dealt = run.update["deal"](
    before.trainable,
    seen.rollouts,
    seen.ids,
    advantage,
    weight,
    chosen,
    np.int32(iteration),
  )
  seen = seen._replace(rollouts=())
  after = update_calls.run(
    run.update,
    before._replace(prompt_stats=stats),
    model.frozen,
    session.reference,
    seen.conditioning,
    dealt,
    config.optimizer.microbatches_per_call,
    stop,
  )
  if after is None:
    return None
  state, update_metrics = after
  clock.phase("update", update_metrics)
  return state, reward_metrics | update_metrics, seen


def give_up(
  saver: store.Saver,
  workdir: Path,
  state: TrainState,
  iteration: int,
  first: int,
  meta: dict,
  progress: metrics.Progress,
) -> None:
  """Ends a run that was asked to stop: saves the state as of the last whole iteration, and says so.

  Args:
    saver: of the workdir.
    workdir: of the run.
    state: before the iteration that is given up.
    iteration: its number, and so that of whole iterations.
    first: the iteration that this process began with, whose state is saved already.
    meta: saved beside the state.
    progress: where it is said.
  """
  if iteration > first:
    saver.save(iteration, state, meta | {"iteration": iteration})
    saver.wait()
  message = f"stopped by SIGTERM: {iteration} iterations are saved in {workdir}"
  progress.message(f"{message}; the same command goes on from there")


def flush(
  config: ConfigDict,
  workdir: Path,
  pending: Pending | None,
  writer: metrics.Writer,
  progress: metrics.Progress,
) -> None:
  """Writes and shows an iteration's numbers, which waits until it is done. RunError where the run
  can't go on.
  """
  if pending is None:
    return
  times = pending.clock.read()
  images = config.data.prompts_per_iteration * config.rollout.samples_per_prompt
  values = {
    **jax.device_get(pending.values),
    **times,
    "images_per_second": images / times["time/total"],
  }
  row = writer.write(pending.iteration, values)
  progress.update(pending.iteration, row)
  left = what_is_left(workdir)
  if row["optimizer/skipped_total"] > config.optimizer.max_skipped:
    raise RunError(
      f"stopped at iteration {pending.iteration + 1}: {row['optimizer/skipped_total']:.0f}"
      " optimizer steps had a non-finite loss"
      f" or gradient, more than optimizer.max_skipped = {config.optimizer.max_skipped}; {left};"
      " lower"
      f" optimizer.learning_rate = {config.optimizer.learning_rate}"
    )
  if row["reward/failed"] > config.reward.max_failed:
    raise RunError(
      f"stopped at iteration {pending.iteration + 1}: {row['reward/failed']:.0%} of the rewards"
      " failed, more than"
      f" reward.max_failed = {config.reward.max_failed}; {left}"
    )


def what_is_left(workdir: Path) -> str:
  """What a run that has to stop leaves to go on from, in words."""
  last = store.latest(workdir / "checkpoints")
  if last is None:
    return "no checkpoint was saved yet"
  return f"the last good checkpoint is that of iteration {last}"


def is_due(done: int, every: int) -> bool:
  """Whether something that happens each `every` iterations (0 = never) happens after `done` of
  them.
  """
  return every > 0 and done % every == 0


def start_profile(config: ConfigDict, workdir: Path, iteration: int) -> None:
  """Starts a trace into <workdir>/profile before the first of logging.profile_steps."""
  if config.logging.profile_steps and iteration == config.logging.profile_steps[0]:
    jax.profiler.start_trace(str(workdir / "profile"))


def stop_profile(config: ConfigDict, iteration: int, result: PyTree) -> None:
  """Ends the trace when the last of logging.profile_steps is done."""
  if config.logging.profile_steps and iteration == config.logging.profile_steps[1]:
    jax.block_until_ready(result)
    end_trace()


def end_trace() -> None:
  """Ends a trace if one is running: a resumed run may have missed its start, a run that stops early
  its end.
  """
  with contextlib.suppress(RuntimeError):
    jax.profiler.stop_trace()


def show(
  session: Session, iteration: int, state: TrainState, say: Callable[[str], None]
) -> dict[str, float]:
  """A column of the report's grid: the first prompts, and held-out ones, with fixed noise and the
  deterministic sampler.

  Returns:
    Mean scores as metrics, and the gap: what training prompts are ahead of held-out ones.
  """
  config, model, run = session.config, session.model, session.shown_programs
  examples = sum(session.shown, [])
  (row,) = scoring.chunks(len(examples), len(examples) + config.mesh.lanes, config.mesh.lanes)
  weights = state.trainable if state.ema is None else state.ema
  conditioning = encoding.conditioning(config, session.encode_shown, [examples[i] for i in row])
  numbers = np.arange(len(row), dtype=np.int32)
  latents = run.sample(
    weights, model.frozen, conditioning, numbers, numbers, np.int32(config.evaluation.seed)
  )
  pixels = sharding.to_host(run.decode(model.frozen, latents))[: len(examples)]
  owners, features = np.arange(len(examples), dtype=np.int32), session.shown_features
  scores = scoring.score_all(
    model.rewards,
    model.reward_params,
    run.score,
    pixels,
    features,
    owners,
    examples,
    row[None],
    say,
  )
  total = sum(weight * scores[term] for term, weight in config.reward.terms)
  trained, held_out = np.split(total, [len(session.shown[0])])
  if jax.process_index() == 0:
    texts = [example.prompt for example in session.shown[0]]
    page.save_samples(session.workdir, iteration, pixels[: len(trained)], texts, trained, held_out)
    page.write(session.workdir)
  found = {"evaluation/score": float(np.mean(trained))}
  if len(held_out):
    found["evaluation/held_out"] = float(np.mean(held_out))
    found["evaluation/gap"] = found["evaluation/score"] - found["evaluation/held_out"]
  return found


def save_extremes(session: Session, iteration: int, seen: Experience) -> None:
  """The best and the worst sample of the first group."""
  total = sum(
    weight * np.asarray(seen.scores[term])[0] for term, weight in session.config.reward.terms
  )
  if jax.process_index() == 0 and np.isfinite(total).any():
    best, worst = int(np.nanargmax(total)), int(np.nanargmin(total))
    prompt, pair = (
      session.examples[int(seen.ids[0])].prompt,
      (float(total[best]), float(total[worst])),
    )
    page.save_extremes(
      session.workdir, iteration, seen.pixels[best], seen.pixels[worst], prompt, *pair
    )
