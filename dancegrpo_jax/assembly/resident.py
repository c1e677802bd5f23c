"""Whether the arrays that stay on a device during training fit there, before weights are read.

This is a lower bound: activations, trajectories and what the compiler adds come on top of it.
`dancegrpo_jax.plan` counts those too.
"""

from typing import Any

import jax
from ml_collections import ConfigDict

from dancegrpo_jax.assembly import loading
from dancegrpo_jax.assembly.loading import Model
from dancegrpo_jax.devices import chips
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.rl.state import TrainState


def require_room(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  model: Model,
  state: TrainState,
  without: tuple[str, ...] = (),
) -> None:
  """Refuses a run whose weights and optimizer alone are too large for its devices.

  It passes where the memory of a device is not known, as on a CPU.

  Args:
    config: validated.
    mesh: the devices.
    model: with abstract parameters, of `loading.outline`.
    state: abstract, of `loading.abstract_state`.
    without: components that will not be in memory.

  Raises:
    ConfigError: they are too large. The message says what a device would have to hold, how much
      memory it has, and what to change.
  """
  memory = chips.chip_of(mesh.local_devices[0]).memory
  if not memory:
    return
  parts = device_bytes(config, model, state, without)
  if (total := sum(parts.values())) <= memory:
    return
  sizes = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items() if size)
  where = "the only device" if mesh.size == 1 else f"each of the {mesh.size} devices"
  adapters = "" if config.lora.rank else ", or a lora.rank above 0"
  raise ConfigError(
    f"config.mesh.fsdp = {config.mesh.fsdp}: an update keeps {total / 2**30:.2f} GiB at least on"
    f" {where}, which has {memory / 2**30:.2f} ({sizes}); use more devices along mesh.fsdp, now"
    f" {mesh.shape['fsdp']}, with mesh.rules that split (a preset such as :8gpu){adapters}"
  )


def device_bytes(
  config: ConfigDict, model: Model, state: TrainState, without: tuple[str, ...] = ()
) -> dict[str, int]:
  """Bytes that stay on a device during an update, by what they are for.

  Args:
    config, model, state, without: as for `require_room`.
  """
  trained = _bytes(state.trainable)
  # The reference of a KL penalty is a copy of the weights before training; LoRA needs none.
  has_copy = config.objective.kl.weight and not config.lora.rank
  frozen = {name: tree for name, tree in model.frozen.items() if name not in without}
  before = trained + _bytes(state.opt_state) + _bytes(state.ema)
  return {
    "trained weights": trained,
    "optimizer": _bytes(state.opt_state),
    "gradients": trained,  # of all microbatches together; those of one are added piece by piece
    "average": _bytes(state.ema),
    "KL reference": trained if has_copy else 0,
    # The state before stays until the last optimizer step, so that an iteration can be given up.
    "state before": before if config.optimizer.updates_per_iteration > 1 else 0,
    "frozen weights": _bytes(frozen),
    "rewards": _bytes(model.reward_params),
  }


def _bytes(tree: Any) -> int:
  return sum(map(loading.device_bytes, jax.tree.leaves(tree)))
