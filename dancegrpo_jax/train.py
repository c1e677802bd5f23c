"""The training loop: prompts -> rollout -> rewards -> advantages -> update. Read `run` from top to
bottom.
"""

import contextlib
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.devices import accelerator, out_of_memory, sharding
from dancegrpo_jax.devices.preemption import Preemption
from dancegrpo_jax.programs import update as update_calls
from dancegrpo_jax.report import metrics, page
from dancegrpo_jax.report.clock import Clock
from dancegrpo_jax.rl.state import TrainState
from dancegrpo_jax.training import tracing
from dancegrpo_jax.training.collecting import Experience, collect
from dancegrpo_jax.training.outcome import Pending, flush, give_up, what_is_left
from dancegrpo_jax.training.session import Session, checked, prepare, resumed_config
from dancegrpo_jax.training.showing import save_extremes, show


def run(config: ConfigDict, workdir: Path, given: Collection[str] = ()) -> None:
  """Trains, or goes on training what the workdir holds. SIGTERM ends it as of the last whole
  iteration, saved, after the program call or the few chunks that it comes upon.

  Args:
    config: of the run.
    workdir: where it is kept.
    given: fields of the config that the user has set by hand; see `stored_config.as_stored`.

  Raises:
    ConfigError: a mistake in the config, the prompts or the workdir, before anything is written.
    RunError: too many non-finite steps or failed rewards.
    OutOfMemory: a program, or the model itself, is too large for the devices.
  """
  config = resumed_config(config, workdir, given)
  examples, first = checked(config, workdir)
  if first >= config.iterations:
    print(
      f"{workdir}: already finished, {first} iterations;"
      f" {metrics.last_line(workdir, workdir / page.FILE)}"
    )
    return
  if jax.process_index() == 0:
    accelerator.say_share(jax.default_backend())
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
      stack.callback(tracing.end_trace)
    meta, pending, clock = {"config": config.to_dict()}, None, None
    for iteration in range(first, config.iterations):
      done = iteration + 1
      last = done == config.iterations
      save = last or is_due(done, config.checkpoint.every)
      shown = last or is_due(done, config.evaluation.every)
      clock = Clock(clock_thread, before=clock)

      tracing.start_profile(config, workdir, iteration)
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
      flush(config, workdir, pending, writer, progress)
      pending = None
      # Scores -> advantages within each prompt's group -> optimizer steps. The host is chunks
      # ahead; a signal that comes during these is to be heard before the update.
      jax.block_until_ready(seen)
      after = None
      if seen is not None and not preemption.reached(wait=True):
        after = update(session, state, seen, iteration, clock, preemption.reached)
      if after is None:
        give_up(saver, workdir, state, iteration, first, meta, progress)
        break
      state, values = after
      tracing.stop_profile(config, iteration, values)
      pending = Pending(iteration=iteration, values=values, clock=clock)

      if shown:
        pending = pending._replace(
          values=pending.values | show(session, done, state, progress.warning)
        )
      # A state is saved only after its numbers were read and found sound.
      if save or shown:
        flush(config, workdir, pending, writer, progress)
        pending = None
      if save:
        saver.save(done, state, meta | {"iteration": done})
      if shown:
        save_extremes(session, done, seen)
  if jax.process_index() == 0:
    print(metrics.last_line(workdir, page.write(workdir)))


def update(
  session: Session,
  before: TrainState,
  seen: Experience,
  iteration: int,
  clock: Clock,
  stop: Callable[[], bool],
) -> tuple[TrainState, dict[str, jax.Array]] | None:
  """Scores -> advantages -> optimizer steps.

  Args:
    session: of the run.
    before: the state; it stays valid where None is returned.
    seen: what the iteration has collected; its trajectories are taken out of it, so that they are
      freed as soon as they lie in lanes.
    iteration: number of the iteration.
    clock: of the iteration.
    stop: asked between two calls of a program; True gives the iteration up.

  Returns:
    The state after, and metrics; None where the iteration was given up.
  """
  config, model, run = session.config, session.model, session.programs
  advantage, weight, chosen, stats, reward_metrics = run.advantages(
    seen.scores, seen.ids, before.prompt_stats
  )
  clock.phase("reward", advantage)
  dealt = run.update["deal"](
    before.trainable,
    tuple(seen.rollouts),
    seen.ids,
    advantage,
    weight,
    chosen,
    np.int32(iteration),
  )
  seen.rollouts.clear()
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
  return state, reward_metrics | update_metrics


def is_due(done: int, every: int) -> bool:
  """Whether something that happens each `every` iterations (0 = never) happens after `done` of
  them.
  """
  return every > 0 and done % every == 0
