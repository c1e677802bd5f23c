"""A run's programs with arrays to call them with, as `main` would have them: shapes are the
inventory's, weights are drawn."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dancegrpo_jax import programs
from dancegrpo_jax.compilation import inventory
from dancegrpo_jax.data import prompts
from dancegrpo_jax.devices import program_cache, sharding
from dancegrpo_jax.plan import planning
from dancegrpo_jax.programs import update_calls
from dancegrpo_jax.rl import lanes
from dancegrpo_jax.rl.state import init_state
from dancegrpo_jax.settings import checks
from dancegrpo_jax.types import Media
from gpu_parts import cuts, drawing


class Loaded(NamedTuple):
  """What a part calls.

  Attributes:
    config: of the run.
    mesh: of one device.
    inventory: of it.
    calls: the update's by name, the others by the first word of it.
    state: the TrainState, which an update consumes.
    examples: prompts.
  """

  config: Any
  mesh: Any
  inventory: inventory.Inventory
  calls: dict[str, inventory.Call]
  state: Any
  examples: int

  def update_calls(self) -> dict[str, inventory.Call]:
    """Of the programs of the update, by the names that `programs.update` has for them."""
    head = "update "
    return {
      name.removeprefix(head): call for name, call in self.calls.items() if name.startswith(head)
    }

  def counts(self, names: list[str]) -> dict[str, float]:
    """FLOPs of a call of the named programs, as `plan` counts them; of "update" those of all its
    calls in an iteration."""
    update = [call.name for call in self.update_calls().values()]
    full = {name: self.calls[name].name for name in names if name != "update"}
    wanted = [*full.values(), *update]
    found = planning.counts(self.config, self.mesh, self.examples, 0, wanted)
    rounds = {name: self.calls[name].times / self.config.iterations for name in update}
    whole = sum(found[name].total * rounds[name] for name in update)
    return {name: whole if name == "update" else found[full[name]].total for name in names}


def use_cache(context) -> None:
  """Compiled programs are kept in the folder that all parts share, as `main` would keep them."""
  program_cache.use(str(context.cache))


def load(context, **changes) -> Loaded:
  """The run of `context.argument` on the first device; `changes` as `cuts.load` takes them."""
  use_cache(context)
  config = inventory.without_weights(
    cuts.load(context.argument, context.tiny, context.folder, **changes)
  )
  examples = len(prompts.read_examples(config))
  devices = jax.devices()[:1]
  checks.validate(config, num_devices=1, num_examples=examples)
  context.say.device(devices[0].device_kind)
  mesh = sharding.make_mesh(config.mesh, devices)
  taken = inventory.take(config, mesh, examples, 0)
  calls = {
    call.name if call.name.startswith("update ") else call.name.split()[0]: call
    for call in taken.calls
  }
  return Loaded(config, mesh, taken, calls, state(config, taken, examples, calls), examples)


def state(config, taken: inventory.Inventory, examples: int, calls: dict) -> Any:
  """The TrainState before the first iteration."""
  abstract = calls["update step"].arguments[0]
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  if config.lora.rank:
    adapters = abstract.trainable["lora"]
    trainable = {"lora": programs.init_adapters(config, adapters, shardings.trainable["lora"])}
  else:
    trainable = {name: placed(tree) for name, tree in abstract.trainable.items()}
  return init_state(config, examples, shardings)(trainable)


def placed(tree: Any) -> Any:
  """Drawn parameters of the shapes and shardings of a tree of them."""
  return drawing.draw(tree, jax.tree.map(lambda x: x.sharding, tree))


def rows(tree: Any) -> Any:
  """What networks were told, at random: normal numbers."""
  return jax.tree.map(lambda x: drawing.normal(x.shape, x.dtype, 1.0, x.sharding, 7), tree)


class Feed(NamedTuple):
  """Arguments that stay the same from call to call."""

  frozen: Any
  conditioning: Any
  ids: np.ndarray
  chunk: np.ndarray
  number: np.int32


def feed(loaded: Loaded) -> Feed:
  """Draws the frozen networks and what they are told."""
  _, frozen, conditioning, ids, chunk, _ = loaded.calls["rollout"].arguments
  config = loaded.config
  samples = config.data.prompts_per_iteration * config.rollout.samples_per_prompt
  numbers = lanes.deal(samples, config.rollout.chunk, config.mesh.lanes)[0]
  drawn = {name: placed(tree) for name, tree in frozen.items()}
  return Feed(
    drawn, rows(conditioning), np.arange(ids.shape[0], dtype=np.int32), numbers, np.int32(0)
  )


def rollout_arguments(loaded: Loaded, given: Feed) -> tuple:
  """Of the rollout program."""
  return (
    loaded.state.trainable,
    given.frozen,
    given.conditioning,
    given.ids,
    given.chunk,
    given.number,
  )


def score_arguments(loaded: Loaded, given: Feed, media: Media) -> tuple:
  """Of the first reward's program."""
  params, _, features, _ = loaded.calls["score"].arguments
  drawn = {name: placed(tree) for name, tree in params.items()}
  features = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), features)
  return drawn, media, features, given.chunk // loaded.config.rollout.samples_per_prompt


class Update:
  """An update as a run makes it, call by call, on one rollout's trajectories.

  Args:
    loaded: whose state is consumed: each update begins with the state that the last one gave.
    given: what stays the same.
    rollout: the trajectories; each chunk's are the same.
    programs: compiled, in the place of the jitted ones; some or all of them, by name.
  """

  def __init__(self, loaded: Loaded, given: Feed, rollout: Any, programs: dict | None = None):
    _, rollouts, ids, advantage, weight, chosen, _ = loaded.calls["update deal"].arguments
    group = loaded.config.rollout.samples_per_prompt
    numbers = np.arange(len(ids) * group, dtype=np.int32).reshape(len(ids), group)
    numbers = numbers[:, : len(chosen) // len(ids)].reshape(-1)  # the first of each prompt
    self._given, self._most = given, loaded.config.optimizer.microbatches_per_call
    self.programs = {name: call.program for name, call in loaded.update_calls().items()}
    self.programs |= programs or {}
    self.state = loaded.state
    self.rollout, self._chunks = rollout, len(rollouts)
    self._values = (
      jax.device_put(jnp.where(jnp.arange(advantage.shape[0]) % 2, 1.0, -1.0), advantage.sharding),
      jax.device_put(jnp.ones(weight.shape), weight.sharding),
      jax.device_put(numbers, chosen.sharding),
    )

  def __call__(self) -> dict:
    """One update; its metrics."""
    return self._run(self.programs)

  def parts(self) -> dict[str, list[float]]:
    """Seconds of each call of one update, by program. The host waits after each call."""
    times: dict[str, list[float]] = {}

    def timed(name: str, program: Callable) -> Callable:
      def call(*arguments):
        start = time.perf_counter()
        result = jax.block_until_ready(program(*arguments))
        times.setdefault(name, []).append(time.perf_counter() - start)
        return result

      return call

    self._run({name: timed(name, program) for name, program in self.programs.items()})
    return times

  def _run(self, programs: dict[str, Callable]) -> dict:
    given, rollouts = self._given, (self.rollout,) * self._chunks
    trained, rest = self.state.trainable, (*self._values, given.number)
    dealt = programs["deal"](trained, rollouts, given.ids, *rest)
    frozen, told = given.frozen, given.conditioning
    inputs = update_calls.Inputs(frozen=frozen, reference=None, conditioning=told)
    after = update_calls.run(programs, self.state, inputs, dealt, self._most)
    assert after is not None  # nobody stops it
    self.state, metrics = after
    return metrics
