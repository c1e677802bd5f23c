"""Everything that a run does before it reads a weight, check by check, and nothing else.

The steps are those of `train.run` and `session.load_and_compile`: the same functions on the same
config. Only the networks have no weights, so that a checkpoint that is still to be fetched doesn't
keep the other checks from being made. Nothing is trained, and nothing is written into the workdir.
"""

import functools
from collections.abc import Collection
from math import prod
from pathlib import Path

import jax
from ml_collections import ConfigDict

from dancegrpo_jax import buckets
from dancegrpo_jax.assembly import cut_prompts, loading, reward_builders, reward_trial
from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.compilation import ahead, inventory
from dancegrpo_jax.compilation.inventory import Inventory
from dancegrpo_jax.devices import chips, program_cache, sharding
from dancegrpo_jax.dry_run import access, disk, memory
from dancegrpo_jax.dry_run.access import Access
from dancegrpo_jax.dry_run.findings import NOTE, OK, PROBLEM, Finding, attempt, table, verdict
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.pipelines.base import Pipeline
from dancegrpo_jax.report.progress import Progress, phase
from dancegrpo_jax.rewards import kinds
from dancegrpo_jax.rewards.base import Reward
from dancegrpo_jax.settings import checks, command_line
from dancegrpo_jax.training import first_line, run_prompts, session, starting
from dancegrpo_jax.training.run_prompts import RunPrompts


def run(
  config: ConfigDict, workdir: Path, given: Collection[str] = (), free: disk.Free = disk.free_bytes
) -> int:
  """Prints a table of all checks, and a line that says whether the run can begin.

  Args:
    config, workdir, given: as for `train.run`.
    free: tells how much of a file system is free.

  Returns:
    The exit code: 0 where the run can begin, else 2.

  Raises:
    ConfigError: there are several processes.
  """
  if jax.process_count() > 1:
    raise ConfigError("--dry-run: is for one process; leave out --coordinator and the like")
  found: list[Finding] = []
  resumed = attempt(found, "config", lambda: session.resumed_config(config, workdir, given))
  with Progress():
    found += _checked(resumed or config, workdir, free, found)
  print(table(found))
  print(verdict(found))
  return 2 if any(row.mark == PROBLEM for row in found) else 0


def _checked(
  config: ConfigDict, workdir: Path, free: disk.Free, before: list[Finding]
) -> list[Finding]:
  """The rows after those of `before`."""
  found = [_devices()]
  with phase("reading the prompts"):
    read = attempt(found, "prompts", lambda: run_prompts.read(config))
  if read:
    found += [Finding("prompts", OK, line) for line in read.summaries]
  valid = not before and _settings(config, workdir, found, read)
  noted: dict[str, Access] = {}
  limits: dict[str, cut_prompts.Limit] = {}
  with phase("looking for the files of the model and of the rewards"):
    _files(config, noted, limits, found)
    rewards = _rewards(config, noted, limits, found)
  found += [
    Finding("files", PROBLEM if each.problem else OK, each.problem or f"{each.field}: {each.text}")
    for each in noted.values()
  ]
  if read:
    groups = {"prompts": read.examples, "held-out prompts": read.held_out}
    cut = attempt(found, "prompts", lambda: cut_prompts.lines(config, limits, groups)) or []
    found += [Finding("prompts", NOTE, line) for line in cut]
  if valid and read:
    _networks(config, workdir, read, rewards, noted, found, free)
  else:
    text = "attention, memory, disk and rewards need a valid config and prompts"
    found.append(Finding("not checked", NOTE, text))
  return found


def _devices() -> Finding:
  devices = jax.devices()
  limit = chips.chip_of(devices[0]).memory
  room = f"{limit / memory.GIB:.2f} GiB each"
  if not limit:
    room = f"memory isn't known; the machine has {ahead.free_memory() / memory.GIB:.1f} GiB free"
  return Finding("devices", OK, f"{first_line.devices(devices)}, {devices[0].platform}; {room}")


def _settings(
  config: ConfigDict, workdir: Path, found: list[Finding], read: RunPrompts | None
) -> bool:
  """Whether the config is valid, and the workdir one for it."""
  if read is None:  # the settings can be wrong as well
    facts = checks.device_facts(jax.devices()[0])
    check = functools.partial(checks.validate, config, num_devices=jax.device_count(), **facts)
    attempt(found, "config", check)
    return False

  def act() -> int:
    name = buckets.behind(workdir)
    command_line.require_writable(f"--workdir={name}", workdir, remote=True)
    return session.checked(config, workdir)[1]

  first = attempt(found, "config", act)
  if first is None:
    return False
  begun = f"resuming after iteration {first} of {config.iterations}" if first else "a new run"
  if first >= config.iterations:
    begun = f"finished, {first} iterations; there is nothing left to do"
  found.append(Finding("config", OK, f"{config.name}: valid; {workdir}: {begun}"))
  return True


def _files(
  config: ConfigDict,
  noted: dict[str, Access],
  limits: dict[str, cut_prompts.Limit],
  found: list[Finding],
) -> None:
  """Looks for the model, and notes the limits of its tokenizers where it is here."""

  def act() -> None:
    folder, layout = access.checked_folder(noted), loading.family_of(config).layout
    folder("model.checkpoint", config.model.checkpoint, layout, config.model.variant)
    loading.build_pipeline(config)
    limits.update(cut_prompts.of_model(config))

  attempt(found, "files", act)


def _rewards(
  config: ConfigDict,
  noted: dict[str, Access],
  limits: dict[str, cut_prompts.Limit],
  found: list[Finding],
) -> dict[str, Reward]:
  """The rewards whose files are here, by name."""
  ready: dict[str, Reward] = {}
  files = cut_prompts.noting_files(limits, access.files(noted))
  for name in dict.fromkeys(map(kinds.reward_of, kinds.scored(config))):
    before, alone = len(noted), _with_reward(config, name)
    build = functools.partial(reward_builders.build_rewards, alone, files)
    built = attempt(found, "rewards", build)
    if built and not any(each.problem for each in list(noted.values())[before:]):
      ready |= built
  return ready


def _with_reward(config: ConfigDict, name: str) -> ConfigDict:
  """The config with one of its rewards alone, so that a mistake in it hides no other one."""
  with (alone := config.copy_and_resolve_references()).unlocked():
    terms = tuple(pair for pair in config.reward.terms if kinds.reward_of(pair[0]) == name)
    watched = tuple(term for term in config.reward.watch if kinds.reward_of(term) == name)
    alone.reward.update(terms=terms, watch=watched)
  return alone.lock()


def _networks(
  config: ConfigDict,
  workdir: Path,
  read: RunPrompts,
  rewards: dict[str, Reward],
  noted: dict[str, Access],
  found: list[Finding],
  free: disk.Free,
) -> None:
  """What depends on the networks, whose weights need not be here: memory, disk and rewards."""
  mesh = sharding.make_mesh(config.mesh)

  def taken_of() -> Inventory:
    with phase("listing the programs"):
      plain = inventory.without_weights(config)
      return inventory.take(plain, mesh, len(read.examples), len(read.held_out))

  taken = attempt(found, "memory", taken_of)
  if taken is None:
    return
  model = taken.model
  if store.latest(store.folder_of(workdir)) is None:
    attempt(found, "config", lambda: starting.require_fitting(config, model, mesh))
  program_cache.use(config.logging.compilation_cache)
  attempt(found, "memory", lambda: found.extend(memory.rows(config, taken, mesh)))
  shape = model.pipeline.sample_shape
  download = sum(each.download for each in noted.values())
  found += disk.rows(config, workdir, memory.state_bytes(taken), prod(shape), download, free)
  _trial(rewards, model.pipeline, read, found)


def _trial(
  rewards: dict[str, Reward], pipeline: Pipeline, read: RunPrompts, found: list[Finding]
) -> None:
  """Tries the rewards that are functions on the host; those that are networks need weights."""
  attempt(
    found, "rewards", lambda: reward_builders.require_scorable(rewards, pipeline.sample_shape)
  )
  with phase("trying the rewards on two blank pictures"):
    for name, reward in rewards.items():
      said: list[str] = []
      check = functools.partial(
        reward_trial.require_usable, {name: reward}, pipeline, read.examples, said.append
      )
      before = len(found)
      attempt(found, "rewards", check)
      how = "a network; its files are here"
      if reward.kind == "host":
        how = "scored two blank pictures"
      if said:
        found += [Finding("rewards", NOTE, line) for line in said]
      elif len(found) == before:
        found.append(Finding("rewards", OK, f"{name}: {how}"))
