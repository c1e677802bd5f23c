"""GRPO post-training for image and video generators in JAX: DanceGRPO (arXiv 2505.07818).

The package is a set of commands, and a library for a model of one's own:

    import dancegrpo_jax as dg

    schedule = dg.flow_schedule(steps=10)
    policy = dg.Policy(kind="dance", noise_level=0.7, prediction="velocity", steps=10)

docs/library.md goes through it, and examples/library.py is a whole training in one file. Names are
imported when they are first asked for: commands answer their flags, and settle what JAX reads from
the environment, before JAX is there.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from dancegrpo_jax.diffusion.guidance import classifier_free
  from dancegrpo_jax.diffusion.schedules import Schedule, diffusion_schedule, flow_schedule
  from dancegrpo_jax.diffusion.transitions import Transition
  from dancegrpo_jax.rl import advantages, dppo, grpo, optimize, rng, state, trajectories
  from dancegrpo_jax.rl.rollout import Policy, Rollout, distribution, log_prob, rollout
  from dancegrpo_jax.types import Conditioning

__version__ = "0.2.0"

__all__ = [
  "Conditioning",
  "Policy",
  "Rollout",
  "Schedule",
  "Transition",
  "advantages",
  "classifier_free",
  "diffusion_schedule",
  "distribution",
  "dppo",
  "flow_schedule",
  "grpo",
  "log_prob",
  "optimize",
  "rng",
  "rollout",
  "state",
  "trajectories",
]

# Modules whose names say what their functions are about, as `grpo.algorithm`.
_MODULES = ("advantages", "dppo", "grpo", "optimize", "rng", "state", "trajectories")
# Where everything else is.
_HOMES = {
  "Conditioning": "types",
  "Policy": "rl.rollout",
  "Rollout": "rl.rollout",
  "Schedule": "diffusion.schedules",
  "Transition": "diffusion.transitions",
  "classifier_free": "diffusion.guidance",
  "diffusion_schedule": "diffusion.schedules",
  "distribution": "rl.rollout",
  "flow_schedule": "diffusion.schedules",
  "log_prob": "rl.rollout",
  "rollout": "rl.rollout",
}


def __getattr__(name: str) -> Any:
  """A name of `__all__`, imported now (PEP 562)."""
  if name in _MODULES:
    value = importlib.import_module(f"{__name__}.rl.{name}")
  elif name in _HOMES:
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
  else:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  globals()[name] = value  # the next look-up finds it without this function
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
