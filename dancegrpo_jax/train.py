"""The training loop: one function, read top to bottom. An iteration is prompts -> rollout -> rewards -> advantages -> update."""

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax import loading, programs
from dancegrpo_jax.data import prompts
from dancegrpo_jax.loading import Model
from dancegrpo_jax.rl.state import TrainState
from dancegrpo_jax.runtime import checkpoint, metrics, report
from dancegrpo_jax.runtime import config as configs
from dancegrpo_jax.runtime import mesh as meshes
from dancegrpo_jax.runtime.config import ConfigError
from dancegrpo_jax.types import Example, Media


class RunError(ConfigError):
  """A run that had to stop: the message says why, and what is left."""


class Pending(NamedTuple):
  """An iteration whose programs are dispatched and whose numbers have not been read."""

  iteration: int
  values: dict
  clock: "Clock"


class Clock:
  """Seconds of each phase without holding up the loop: a thread waits for the phases' results, in order."""

  def __init__(self, pool: ThreadPoolExecutor):
    self._pool, self._last, self.seconds = pool, time.monotonic(), {}
    self._waits: list[Future] = []

  def phase(self, name: str, result) -> None:
    """Notes when `result` is ready; the time since the last phase's end is this one's. Donated arrays can't be waited for."""

    def wait():
      jax.block_until_ready(result)
      now = time.monotonic()
      self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
      self._last = now

    self._waits.append(self._pool.submit(wait))

  def read(self) -> dict[str, float]:
    """Seconds by phase, all of them done."""
    for wait in self._waits:
      wait.result()
    return {f"time/{name}": seconds for name, seconds in self.seconds.items()}


def read_examples(config: ConfigDict) -> list[Example]:
  """The training prompts. ConfigError naming the file and the remedy."""
  try:
    return prompts.read_prompts(config.data.prompts, config.data.negative_prompt)
  except ValueError as error:
    raise ConfigError(str(error)) from error


def check_workdir(config: ConfigDict, workdir: Path, say: Callable[[str], None]) -> int:
  """Iterations already done in the workdir: 0, or where to resume.

  Raises:
    ConfigError: the workdir belongs to a run that differs in what may not change, field by field.
  """
  folder = workdir / "checkpoints"
  done = checkpoint.latest(folder)
  if done is None:
    return 0
  allowed, refused = configs.differences(checkpoint.read_meta(folder)["config"], config)
  if refused:
    lines = "\n".join(f"{difference}" for difference in refused)
    raise ConfigError(f"{workdir} holds a run with another config; use another --workdir, or undo these:\n{lines}")
  for difference in allowed:
    say(f"resuming with {difference}")
  return done


def host_scores(reward, pixels: jax.Array, examples: list[Example], say: Callable[[str], None]) -> dict[str, np.ndarray]:
  """A host reward of one chunk, in a thread. A failure is NaN for the chunk's samples, and a line."""
  try:
    return reward.score(Media(np.asarray(pixels)), examples)
  except Exception as error:  # the user's own function: whatever it raises must not end the run
    say(f"reward {reward.name} failed for {len(examples)} samples: {type(error).__name__}: {error}")
    return {reward.name: np.full(len(examples), np.nan, np.float32)}


def check_metrics(config: ConfigDict, row: dict[str, float], folder: Path) -> None:
  """Raises RunError where the run can't go on: too many skipped steps, or too many failed rewards."""
  last = checkpoint.latest(folder)
  left = f"the last good checkpoint is iteration {last}" if last is not None else "no checkpoint was saved yet"
  skipped, failed = row["optimizer/skipped_total"], row["reward/failed"]
  if skipped > config.optimizer.max_skipped:
    raise RunError(
      f"stopped: {skipped:.0f} optimizer steps had a non-finite loss or gradient (optimizer.max_skipped ="
      f" {config.optimizer.max_skipped}); {left}; lower optimizer.learning_rate = {config.optimizer.learning_rate}"
    )
  if failed > config.reward.max_failed:
    raise RunError(f"stopped: {failed:.0%} of the rewards failed (reward.max_failed = {config.reward.max_failed}); {left}")


def fixed_samples(config: ConfigDict, model: Model, run: programs.Programs, trainable, examples: list[Example]) -> tuple:
  """Pixels and scores of the first prompts with fixed noise, deterministic sampler: one column of the report's grid."""
  shown = examples[: config.evaluation.prompts]
  width = -(-len(shown) // config.mesh.lanes) * config.mesh.lanes
  padded = shown + [shown[-1]] * (width - len(shown))
  rows = np.arange(width, dtype=np.int32)
  conditioning = loading.conditioning(config, model, run.encode, padded)
  latents = run.sample(trainable, model.frozen, conditioning, rows, rows, config.evaluation.seed)
  pixels = run.decode(model.frozen, latents)
  total = np.zeros(width, np.float32)
  features = loading.reward_features(model, run.features, padded, width)
  weights = dict(config.reward.terms)
  for name, reward in model.rewards.items():
    if reward.kind == "device":
      scores = run.score[name](model.reward_params[name], pixels, features[name], rows)
    else:
      scores = host_scores(reward, pixels, padded, print)
    total = total + sum(weights[term] * np.asarray(value) for term, value in scores.items() if term in weights)
  return np.asarray(pixels)[: len(shown)], [float(x) for x in total[: len(shown)]], [e.prompt for e in shown]


def run(config: ConfigDict, workdir: Path) -> None:
  """Trains, or goes on training what the workdir holds.

  Raises:
    ConfigError: a mistake in the config, the prompts or the workdir, before anything is written.
    RunError: too many non-finite steps or failed rewards.
  """
  # What is asked, and whether it can be done.
  examples = read_examples(config)
  configs.validate(config, num_devices=jax.device_count(), num_examples=len(examples))
  first = check_workdir(config, workdir, print)
  if first >= config.iterations:
    print(f"{workdir} is finished: {first} of {config.iterations} iterations. {metrics.last_line(workdir, workdir / report.FILE)}")
    return
  if config.logging.compilation_cache:
    jax.config.update("jax_compilation_cache_dir", config.logging.compilation_cache)
  mesh = meshes.make_mesh(config.mesh)
  with jax.set_mesh(mesh), ThreadPoolExecutor(1) as clock_pool, ThreadPoolExecutor(8) as reward_pool:
    # Model, rewards, programs.
    pipeline, rewards = loading.build_pipeline(config), loading.build_rewards(config)
    model = loading.load(config, pipeline, rewards, mesh)
    shardings = loading.state_shardings(config, model, len(examples), mesh)
    compiled = programs.build(config, pipeline, rewards, mesh, shardings)
    reference = jax.tree.map(jnp.copy, model.trainable) if config.objective.kl.weight else None
    make_state = programs.init_state(config, len(examples), shardings)
    if first:
      abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(make_state, model.trainable), shardings
      )
      state = checkpoint.restore(workdir / "checkpoints", abstract).state
    else:
      state = make_state(model.trainable)
    model = model._replace(trainable=None)  # donated into the state

    # The workdir.
    meta = {"config": config.to_dict()}
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
      (workdir / "config.json").write_text(configs.to_json(config))
      report.save_environment(workdir)
    batches = prompts.prompt_batches(examples, config.data.prompts_per_iteration, config.seed, config.data.shuffle)
    features = loading.reward_features(model, compiled.features, examples, config.data.prompts_per_iteration)

    with contextlib.ExitStack() as stack:
      saver = stack.enter_context(checkpoint.Saver(workdir / "checkpoints", config.checkpoint.keep))
      writer = stack.enter_context(metrics.Writer(workdir, config, first))
      progress = stack.enter_context(metrics.Progress(config.iterations, first))

      def flush(pending: Pending | None) -> None:
        """Reads an iteration's numbers, which blocks until it is done."""
        if pending is None:
          return
        times = pending.clock.read()
        total = sum(times.values())
        row = writer.write(
          pending.iteration,
          {**jax.device_get(pending.values), **times, "images_per_second": group * len(batches[0]) / total, "time/total": total},
        )
        progress.update(pending.iteration, row)
        check_metrics(config, row, workdir / "checkpoints")

      def show(iteration: int, state: TrainState) -> None:
        """A column of the report's grid."""
        weights = state.trainable if state.ema is None else state.ema
        pixels, scores, texts = fixed_samples(config, model, compiled, weights, examples)
        if jax.process_index() == 0:
          report.save_samples(workdir, iteration, pixels, texts, scores)
          report.write(workdir)

      if first == 0:
        show(0, state)
      pending, group = None, config.rollout.samples_per_prompt
      for iteration in range(first, config.iterations):
        due = (iteration + 1) % config.checkpoint.every == 0 or iteration + 1 == config.iterations
        every = config.evaluation.every
        shown = iteration + 1 == config.iterations or (every and (iteration + 1) % every == 0)
        if config.logging.profile_steps and iteration == config.logging.profile_steps[0]:
          jax.profiler.start_trace(str(workdir / "profile"))
        clock = Clock(clock_pool)

        # Prompts and what they condition on.
        batch = batches[iteration]
        ids = np.array([example.id for example in batch], np.int32)
        conditioning = loading.conditioning(config, model, compiled.encode, batch)
        clock.phase("encode", conditioning)

        # Rollout, decode, reward: chunk by chunk; pixels are freed as soon as they are scored.
        numbers = np.arange(len(batch) * group, dtype=np.int32).reshape(-1, config.rollout.chunk)
        rollouts, scores, first_pixels = [], {}, None
        for chunk in numbers:
          rollout = compiled.rollout(state.trainable, model.frozen, conditioning, ids, chunk, np.int32(iteration))
          clock.phase("rollout", rollout)
          pixels = compiled.decode(model.frozen, rollout.sample)
          clock.phase("decode", pixels)
          owners = chunk // group
          for name, reward in rewards.items():
            if reward.kind == "device":
              rows = jax.tree.map(lambda x: x[ids], features[name])
              result = compiled.score[name](model.reward_params[name], pixels, rows, owners)
              clock.phase("reward", result)
            else:
              result = reward_pool.submit(host_scores, reward, pixels, [batch[p] for p in owners], progress.message)
            scores.setdefault(name, []).append(result)
          rollouts.append(rollout)
          if shown and first_pixels is None:
            first_pixels = np.asarray(pixels[:group])

        # Scores -> advantages.
        terms = {}
        for chunks in scores.values():
          for result in chunks:
            for term, value in (result.result() if isinstance(result, Future) else result).items():
              terms.setdefault(term, []).append(value)
        grouped = loading.scores_as_groups(terms, len(batch))
        advantage, weight, chosen, stats, reward_metrics = compiled.advantages(grouped, ids, state.prompt_stats)
        clock.phase("reward", advantage)

        # Update.
        flush(pending)
        state, update_metrics = compiled.update(
          state._replace(prompt_stats=stats), model.frozen, reference, conditioning, ids, tuple(rollouts), advantage, weight,
          chosen, np.int32(iteration),
        )  # fmt: skip
        clock.phase("update", update_metrics)
        pending = Pending(iteration, reward_metrics | update_metrics, clock)

        # What is kept. A state is saved only after its numbers were read and found sound.
        if due or shown:
          flush(pending)
          pending = None
        if due:
          saver.save(iteration + 1, state, {**meta, "iteration": iteration + 1})
        if shown:
          show(iteration + 1, state)
          save_extremes(config, workdir, iteration + 1, first_pixels, batch[0].prompt, grouped)
        if config.logging.profile_steps and iteration == config.logging.profile_steps[1]:
          jax.block_until_ready(state)
          jax.profiler.stop_trace()
      flush(pending)
    if jax.process_index() == 0:
      print(metrics.last_line(workdir, report.write(workdir)))


def save_extremes(config: ConfigDict, workdir: Path, iteration: int, pixels: np.ndarray, prompt: str, scores: dict) -> None:
  """The best and the worst sample of the first group."""
  total = sum(weight * np.asarray(scores[term])[0] for term, weight in config.reward.terms)
  if jax.process_index() == 0 and np.isfinite(total).any():
    best, worst = int(np.nanargmax(total)), int(np.nanargmin(total))
    report.save_extremes(workdir, iteration, pixels[best], pixels[worst], prompt, float(total[best]), float(total[worst]))

