"""The training loop. An iteration, read top to bottom in `run`: prompts -> rollout -> rewards -> advantages -> update."""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax import loading, programs
from dancegrpo_jax.data import prompts
from dancegrpo_jax.loading import Model
from dancegrpo_jax.rl.rollout import Rollout
from dancegrpo_jax.rl.state import TrainState
from dancegrpo_jax.runtime import checkpoint, metrics, report
from dancegrpo_jax.runtime import config as configs
from dancegrpo_jax.runtime import mesh as meshes
from dancegrpo_jax.runtime.clock import Clock
from dancegrpo_jax.runtime.config import ConfigError
from dancegrpo_jax.types import Conditioning, Example, Media, PyTree


class RunError(ConfigError):
  """A run that had to stop: the message says why, and what is left."""


class Session(NamedTuple):
  """What stays the same over a run.

  Attributes:
    config, workdir: as asked.
    examples: the prompt data set.
    batches: `batches[iteration]` is that iteration's examples.
    model: without its trainable weights, which the state owns.
    programs: compiled functions.
    reference: trainable weights that a KL penalty holds to, or None.
    features: device rewards' features of every prompt, by reward.
  """

  config: ConfigDict
  workdir: Path
  examples: list[Example]
  batches: Any
  model: Model
  programs: programs.Programs
  reference: PyTree | None
  features: dict[str, PyTree]


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
  """Trains, or goes on training what the workdir holds.

  Raises:
    ConfigError: a mistake in the config, the prompts or the workdir, before anything is written.
    RunError: too many non-finite steps or failed rewards.
  """
  examples = read_examples(config)
  configs.validate(config, num_devices=jax.device_count(), num_examples=len(examples))
  first = iterations_done(config, workdir)
  if first >= config.iterations:
    print(f"{workdir}: already finished, {first} iterations; {metrics.last_line(workdir, workdir / report.FILE)}")
    return
  mesh = meshes.make_mesh(config.mesh)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    clock_thread = stack.enter_context(ThreadPoolExecutor(1))
    reward_threads = stack.enter_context(ThreadPoolExecutor(8))
    session, state = prepare(config, workdir, examples, mesh, first)
    saver = stack.enter_context(checkpoint.Saver(workdir / "checkpoints", config.checkpoint.keep))
    writer = stack.enter_context(metrics.Writer(workdir, config, first))
    progress = stack.enter_context(metrics.Progress(config.iterations, first))
    if first == 0:
      show(session, 0, state, progress.message)
    if config.logging.profile_steps:
      stack.callback(end_trace)
    pending = clock = None
    for iteration in range(first, config.iterations):
      done = iteration + 1
      last = done == config.iterations
      save, shown = last or is_due(done, config.checkpoint.every), last or is_due(done, config.evaluation.every)
      clock = Clock(clock_thread, before=clock)

      start_profile(config, workdir, iteration)
      # Prompts, rollout, decode and rewards, chunk by chunk.
      seen = collect(session, state.trainable, iteration, clock, reward_threads, progress.message, keep_pixels=shown)
      # Scores -> advantages within each prompt's group.
      advantage, weight, chosen, stats, reward_metrics = session.programs.advantages(seen.scores, seen.ids, state.prompt_stats)
      clock.phase("reward", advantage)
      # Read the last iteration's numbers, now that this one's work is queued; then update.
      saver.wait()  # so that a run that must stop knows its last checkpoint
      flush(config, workdir, pending, writer, progress)
      state, update_metrics = session.programs.update(
        state._replace(prompt_stats=stats), session.model.frozen, session.reference, seen.conditioning, seen.ids,
        seen.rollouts, advantage, weight, chosen, np.int32(iteration),
      )  # fmt: skip
      clock.phase("update", update_metrics)
      stop_profile(config, iteration, update_metrics)
      pending = Pending(iteration, reward_metrics | update_metrics, clock)

      # A state is saved only after its numbers were read and found sound.
      if save or shown:
        pending = flush(config, workdir, pending, writer, progress)
      if save:
        saver.save(done, state, {"config": config.to_dict(), "iteration": done})
      if shown:
        show(session, done, state, progress.message)
        save_extremes(session, done, seen)
  if jax.process_index() == 0:
    print(metrics.last_line(workdir, report.write(workdir)))


def read_examples(config: ConfigDict) -> list[Example]:
  """The training prompts. ConfigError naming the file and the remedy."""
  try:
    return prompts.read_prompts(config.data.prompts, config.data.negative_prompt)
  except ValueError as error:
    raise ConfigError(str(error)) from error


def iterations_done(config: ConfigDict, workdir: Path) -> int:
  """Iterations already done in the workdir: 0, or where to resume. Says which harmless fields differ.

  Raises:
    ConfigError: the workdir belongs to a run that differs in what may not change, field by field.
  """
  folder = workdir / "checkpoints"
  done = checkpoint.latest(folder)
  if done is None:
    return 0
  allowed, refused = configs.differences(checkpoint.read_meta(folder)["config"], config)
  if refused:
    lines = "\n".join(map(str, refused))
    raise ConfigError(f"{workdir} holds a run with another config; use another --workdir, or undo these changes:\n{lines}")
  for difference in allowed:
    print(f"resuming with {difference}")
  return done


def prepare(
  config: ConfigDict, workdir: Path, examples: list[Example], mesh: jax.sharding.Mesh, first: int
) -> tuple[Session, TrainState]:
  """Model, rewards, programs and the state to start from; writes config.json and environment.json when all is loaded."""
  if config.logging.compilation_cache:
    jax.config.update("jax_compilation_cache_dir", config.logging.compilation_cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  pipeline, rewards = loading.build_pipeline(config), loading.build_rewards(config)
  model = loading.load(config, pipeline, rewards, mesh)
  shardings = loading.state_shardings(config, model, len(examples), mesh)
  compiled = programs.build(config, pipeline, rewards, mesh, shardings)
  reference = jax.tree.map(jnp.copy, model.trainable) if config.objective.kl.weight else None
  make_state = programs.init_state(config, len(examples), shardings)
  if first:
    shapes = jax.eval_shape(make_state, model.trainable)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    state = checkpoint.restore(workdir / "checkpoints", abstract).state
  else:
    state = make_state(model.trainable)
  batches = prompts.prompt_batches(examples, config.data.prompts_per_iteration, config.seed, config.data.shuffle)
  features = loading.reward_features(model, compiled.features, examples, config.data.prompts_per_iteration)
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(configs.to_json(config))
    report.save_environment(workdir)
  model = model._replace(trainable=None)
  return Session(config, workdir, examples, batches, model, compiled, reference, features), state


def collect(
  session: Session, trainable: PyTree, iteration: int, clock: Clock, threads: ThreadPoolExecutor, say: Callable, keep_pixels: bool
) -> Experience:
  """Prompts -> conditioning -> rollout -> pixels -> scores. Chunks reuse one program each and bound the memory: a chunk's
  pixels are freed when they are scored. Host rewards run in threads and overlap with the next chunk.
  """
  config, model, run = session.config, session.model, session.programs
  batch, group = session.batches[iteration], config.rollout.samples_per_prompt
  ids = np.array([example.id for example in batch], np.int32)
  conditioning = loading.conditioning(config, model, run.encode, batch)
  clock.phase("encode", conditioning)
  rows = {name: jax.tree.map(lambda x: x[ids], features) for name, features in session.features.items()}

  rollouts, results, kept = [], [], []
  for chunk in np.arange(len(batch) * group, dtype=np.int32).reshape(-1, config.rollout.chunk):
    rollout = run.rollout(trainable, model.frozen, conditioning, ids, chunk, np.int32(iteration))
    clock.phase("rollout", rollout)
    pixels = run.decode(model.frozen, rollout.sample)
    clock.phase("decode", pixels)
    owners = chunk // group
    for name, reward in model.rewards.items():
      if reward.kind == "device":
        results.append(run.score[name](model.reward_params[name], pixels, rows[name], owners))
        clock.phase("reward", results[-1])
      else:
        results.append(threads.submit(host_scores, reward, pixels, [batch[owner] for owner in owners], say))
    rollouts.append(rollout)
    if keep_pixels and len(kept) * len(chunk) < group:  # a group may be larger than a chunk
      kept.append(np.asarray(pixels))
  first_group = np.concatenate(kept)[:group] if kept else None
  return Experience(ids, conditioning, tuple(rollouts), as_groups(results, len(batch)), first_group)


def host_scores(reward: Any, pixels: Any, examples: list[Example], say: Callable[[str], None]) -> dict[str, np.ndarray]:
  """A host reward of one chunk. A failure is NaN for the chunk's samples, and a line."""
  try:
    return reward.score(Media(np.asarray(pixels)), examples)
  except Exception as error:  # the user's own function: whatever it raises must not end the run
    say(f"reward {reward.name} failed for {len(examples)} samples: {type(error).__name__}: {error}")
    return {reward.name: np.full(len(examples), np.nan, np.float32)}


def as_groups(results: list, prompts: int) -> dict[str, jax.Array]:
  """Every term's chunks joined, `[prompts, samples]`; waits for the host rewards."""
  chunks: dict[str, list] = {}
  for result in results:
    for term, value in (result.result() if isinstance(result, Future) else result).items():
      chunks.setdefault(term, []).append(value)
  return {term: jnp.concatenate([jnp.asarray(x) for x in values]).reshape(prompts, -1) for term, values in chunks.items()}


def flush(
  config: ConfigDict, workdir: Path, pending: Pending | None, writer: metrics.Writer, progress: metrics.Progress
) -> None:
  """Writes and shows an iteration's numbers, which waits until it is done. RunError where the run can't go on."""
  if pending is None:
    return
  times = pending.clock.read()
  images = config.data.prompts_per_iteration * config.rollout.samples_per_prompt
  values = {**jax.device_get(pending.values), **times, "images_per_second": images / times["time/total"]}
  row = writer.write(pending.iteration, values)
  progress.update(pending.iteration, row)
  last = checkpoint.latest(workdir / "checkpoints")
  left = f"the last good checkpoint is that of iteration {last}" if last is not None else "no checkpoint was saved yet"
  if row["optimizer/skipped_total"] > config.optimizer.max_skipped:
    raise RunError(
      f"stopped at iteration {pending.iteration + 1}: {row['optimizer/skipped_total']:.0f} optimizer steps had a non-finite loss"
      f" or gradient, more than optimizer.max_skipped = {config.optimizer.max_skipped}; {left}; lower"
      f" optimizer.learning_rate = {config.optimizer.learning_rate}"
    )
  if row["reward/failed"] > config.reward.max_failed:
    raise RunError(
      f"stopped at iteration {pending.iteration + 1}: {row['reward/failed']:.0%} of the rewards failed, more than"
      f" reward.max_failed = {config.reward.max_failed}; {left}"
    )


def is_due(done: int, every: int) -> bool:
  """Whether something that happens each `every` iterations (0 = never) happens after `done` of them."""
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
  """Ends a trace if one is running: a resumed run may have missed its start, a run that stops early its end."""
  with contextlib.suppress(RuntimeError):
    jax.profiler.stop_trace()


def show(session: Session, iteration: int, state: TrainState, say: Callable[[str], None]) -> None:
  """A column of the report's grid: the first prompts with fixed noise and the deterministic sampler, scored."""
  config, model, run = session.config, session.model, session.programs
  shown = session.examples[: config.evaluation.prompts]
  width = -(-len(shown) // config.mesh.lanes) * config.mesh.lanes
  padded = shown + [shown[-1]] * (width - len(shown))
  rows = np.arange(width, dtype=np.int32)
  ids = np.array([example.id for example in padded])
  weights = state.trainable if state.ema is None else state.ema
  conditioning = loading.conditioning(config, model, run.encode, padded)
  pixels = run.decode(model.frozen, run.sample(weights, model.frozen, conditioning, rows, rows, config.evaluation.seed))
  total = np.zeros(width, np.float32)
  for name, reward in model.rewards.items():
    if reward.kind == "device":
      features = jax.tree.map(lambda x: x[ids], session.features[name])
      scores = run.score[name](model.reward_params[name], pixels, features, rows)
    else:
      scores = host_scores(reward, pixels, padded, say)
    total = total + sum(weight * np.asarray(scores[term]) for term, weight in config.reward.terms if term in scores)
  if jax.process_index() == 0:
    texts = [example.prompt for example in shown]
    report.save_samples(session.workdir, iteration, np.asarray(pixels)[: len(shown)], texts, total[: len(shown)])
    report.write(session.workdir)


def save_extremes(session: Session, iteration: int, seen: Experience) -> None:
  """The best and the worst sample of the first group."""
  total = sum(weight * np.asarray(seen.scores[term])[0] for term, weight in session.config.reward.terms)
  if jax.process_index() == 0 and np.isfinite(total).any():
    best, worst = int(np.nanargmax(total)), int(np.nanargmin(total))
    prompt, pair = session.examples[int(seen.ids[0])].prompt, (float(total[best]), float(total[worst]))
    report.save_extremes(session.workdir, iteration, seen.pixels[best], seen.pixels[worst], prompt, *pair)
