"""The training loop: prompts -> rollout -> rewards -> advantages -> update.

Read `run` from top to bottom.
"""

import contextlib
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax import buckets
from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.devices import accelerator, out_of_memory, sharding
from dancegrpo_jax.devices.preemption import Preemption
from dancegrpo_jax.programs import update_calls
from dancegrpo_jax.report import metrics, page, status
from dancegrpo_jax.report.clock import Clock
from dancegrpo_jax.report.progress import Progress, phase
from dancegrpo_jax.rl import algorithms
from dancegrpo_jax.rl.state import TrainState
from dancegrpo_jax.settings import named_objects
from dancegrpo_jax.training import tracing
from dancegrpo_jax.training.collecting import Experience, collect
from dancegrpo_jax.training.outcome import Numbers, Pending, give_up, what_is_left
from dancegrpo_jax.training.recording import recorded
from dancegrpo_jax.training.session import Session, checked, prepare, resumed_config
from dancegrpo_jax.training.showing import described, save_extremes, show


def run(config: ConfigDict, workdir: Path, given: Collection[str] = ()) -> int:
  """Trains, or goes on with the run that the workdir holds.

  SIGTERM and Ctrl-C end the run after the program call, or the few chunks, that are on the devices.
  The state after the last finished iteration is then saved.

  Args:
    config: of the run.
    workdir: the folder for everything that the run writes. No other run may use it, see
      `workdir_lock.held`.
    given: fields of the config that the user has set by hand; see `stored_config.as_stored`.

  Returns:
    The exit code: 130 after Ctrl-C, else 0.

  Raises:
    ConfigError: a mistake in the config, the prompts or the workdir, before anything is written.
    RunError: too many non-finite steps or failed rewards.
    OutOfMemory: a program, or the model itself, is too large for the devices.
  """
  config = resumed_config(config, workdir, given)
  found, first = checked(config, workdir)
  if first >= config.iterations:
    summary = metrics.last_line(workdir, workdir / page.FILE)
    print(f"{buckets.behind(workdir)}: already finished, {first} iterations; {summary}")
    return 0
  if jax.process_index() == 0:
    accelerator.say_share(jax.default_backend())
  mesh = sharding.make_mesh(config.mesh)
  with contextlib.ExitStack() as stack:
    enter = stack.enter_context
    enter(recorded(workdir))
    enter(out_of_memory.explained(config, lambda: what_is_left(workdir)))
    enter(jax.set_mesh(mesh))
    preemption = enter(Preemption(mesh))
    clock_thread, reward_threads = enter(ThreadPoolExecutor(1)), enter(ThreadPoolExecutor(8))
    progress = enter(Progress(config.iterations, first))
    session, state = prepare(
      config, workdir, found.examples, mesh, first, progress, found.summaries
    )
    status.begin(workdir, config)
    saver = enter(store.Saver(store.folder_of(workdir), config.checkpoint.keep))
    writer = enter(metrics.Writer(workdir, config, first))
    if config.logging.profile_steps:
      stack.callback(tracing.end_trace)
    behaviour = algorithms.kind_of(config).behaviour
    numbers, clock = Numbers(config, workdir, writer, progress), None
    modules = named_objects.folders(config)
    meta = {"config": config.to_dict(), "prompts": found.identity, "modules": modules}
    if first == 0:
      with phase("evaluating the base model"):
        shown = show(session, 0, state, progress.warning)
      writer.show(0, shown.values, shown.pixels, shown.prompts, shown.scores)
      progress.message(described(0, shown))
    enter(preemption.catching_interrupts())  # from here on there is something to save

    for iteration in range(first, config.iterations):
      done = iteration + 1
      is_last = done == config.iterations
      saves = is_last or is_due(done, config.checkpoint.every)
      shows = is_last or is_due(done, config.evaluation.every)
      keeps = shows or done == 1  # with which the report compares later samples
      clock = Clock(clock_thread, before=clock)
      tracing.start_profile(config, workdir, iteration)

      # Prompts -> samples -> scores, chunk by chunk.
      seen = collect(
        session=session,
        trainable=behaviour(state),
        iteration=iteration,
        clock=clock,
        threads=reward_threads,
        warn=progress.warning,
        keep_pixels=keeps,
        stop=preemption.reached,
      )
      # This iteration is queued on the devices by now, so there is time to read the numbers of the
      # one before. Its checkpoint is awaited too: a run that has to stop names the last one.
      with phase("saving the checkpoint"):
        saver.wait()
      numbers.read()

      # Scores -> advantages -> optimizer steps. A signal that comes while the devices finish the
      # chunks has to be noticed before the update.
      jax.block_until_ready(seen)
      after = None
      if seen is not None and not preemption.reached(wait=True):
        after = update(session, state, seen, iteration, clock, preemption.reached)
      if seen is None or after is None:
        give_up(saver, workdir, state, iteration, first, meta, progress, preemption.name)
        break
      state, values, samples = after
      tracing.stop_profile(config, iteration, values)

      if shows:
        with phase("evaluating"):
          shown = show(session, done, state, progress.warning)
        values |= shown.values
      values |= seen.metrics
      numbers.add(Pending(iteration=iteration, values=values, clock=clock, samples=samples))
      # A state is saved only after its numbers have been read: `read` raises where they are bad.
      if saves or shows:
        numbers.read()
      if saves:
        saver.save(done, state, meta | {"iteration": done})
      if shows:
        writer.show(done, shown.values, shown.pixels, shown.prompts, shown.scores)
        progress.message(described(done, shown))
      if keeps:
        save_extremes(session, done, seen)
    with phase("saving the checkpoint"):
      saver.wait()
  if jax.process_index() == 0:
    print(metrics.last_line(workdir, page.write(workdir)))
  return preemption.exit_code


def update(
  session: Session,
  before: TrainState,
  seen: Experience,
  iteration: int,
  clock: Clock,
  stop: Callable[[], bool],
) -> tuple[TrainState, dict[str, jax.Array], dict[str, jax.Array]] | None:
  """Scores -> advantages -> optimizer steps.

  Args:
    session: of the run.
    before: the state before the iteration. It stays valid where None is returned.
    seen: what the iteration has collected. Its trajectories are removed from it, so that they are
      freed as soon as the update has its own arrangement of them.
    iteration: its number.
    clock: of the iteration.
    stop: asked between two calls of a program; True gives the iteration up.

  Returns:
    The state after the iteration, metrics, and the scores and advantages of the samples. None where
    the iteration was given up.
  """
  config, model, compiled = session.config, session.model, session.programs
  advantage, weight, chosen, prompt_stats, reward_metrics = compiled.advantages(
    seen.scores, seen.ids, before.prompt_stats
  )
  clock.phase("reward", advantage)
  number = np.int32(iteration)
  dealt = compiled.update["deal"](
    before.trainable, tuple(seen.rollouts), seen.ids, advantage, weight, chosen, number
  )
  seen.rollouts.clear()
  after = update_calls.run(
    programs=compiled.update,
    before=before._replace(prompt_stats=prompt_stats),
    inputs=update_calls.Inputs(model.frozen, session.reference, seen.conditioning),
    dealt=dealt,
    most=config.optimizer.microbatches_per_call,
    stop=stop,
  )
  if after is None:
    return None
  state, update_metrics = after
  clock.phase("update", update_metrics)
  samples = {"advantage": advantage, **seen.scores}
  return state, reward_metrics | update_metrics, samples


def is_due(done: int, every: int) -> bool:
  """Whether what happens after every `every` iterations (0: never) happens after `done` of them."""
  return every > 0 and done % every == 0
