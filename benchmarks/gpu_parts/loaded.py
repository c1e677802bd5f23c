"""A run's programs with arrays to call them with, as `main` would have them: shapes are the
inventory's, weights are drawn."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dancegrpo_jax import programs
from dancegrpo_jax.data import prompts
from dancegrpo_jax.devices import program_cache, sharding
from dancegrpo_jax.plan import inventory, planning
from dancegrpo_jax.rl import lanes
from dancegrpo_jax.rl.state import init_state
from dancegrpo_jax.settings import checks
from gpu_parts import cuts, drawing


class Loaded(NamedTuple):
  """What a part calls.

  Attributes:
    config: of the run.
    mesh: of one device.
    inventory: of it.
    calls: by the first word of a program's name.
    state: the TrainState, which an update consumes.
    examples: prompts.
  """

  config: Any
  mesh: Any
  inventory: inventory.Inventory
  calls: dict[str, inventory.Call]
  state: Any
  examples: int

  def counts(self, names: list[str]) -> dict[str, float]:
    """FLOPs of a call of the named programs, as `plan` counts them."""
    full = {name: self.calls[name].name for name in names}
    found = planning.counts(self.config, self.mesh, self.examples, 0, list(full.values()))
    return {name: found[full[name]].total for name in names}


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
  calls = {call.name.split()[0]: call for call in taken.calls}
  return Loaded(config, mesh, taken, calls, state(config, taken, examples, calls), examples)


def state(config, taken: inventory.Inventory, examples: int, calls: dict) -> Any:
  """The TrainState before the first iteration."""
  abstract = calls["update"].arguments[0]
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


def score_arguments(loaded: Loaded, given: Feed, pixels: jax.Array) -> tuple:
  """Of the first reward's program."""
  params, _, features, _ = loaded.calls["score"].arguments
  drawn = {name: placed(tree) for name, tree in params.items()}
  features = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), features)
  return drawn, pixels, features, given.chunk // loaded.config.rollout.samples_per_prompt


def update_rest(loaded: Loaded, given: Feed, rollout: Any) -> tuple:
  """Of the update, without the state; each chunk's trajectories are the same."""
  arguments = loaded.calls["update"].arguments
  advantage, weight, chosen = arguments[6:9]
  values = (
    jax.device_put(jnp.where(jnp.arange(advantage.shape[0]) % 2, 1.0, -1.0), advantage.sharding),
    jax.device_put(jnp.ones(weight.shape), weight.sharding),
    jax.device_put(jnp.arange(chosen.shape[0], dtype=jnp.int32), chosen.sharding),
  )
  rollouts = (rollout,) * len(arguments[5])
  return given.frozen, None, given.conditioning, given.ids, rollouts, *values, given.number
