"""FlowMatchEulerDiscreteScheduler, the scheduler of diffusers' rectified flows."""

from typing import Any

from ml_collections import ConfigDict

from dancegrpo_jax import published
from dancegrpo_jax.diffusion import schedules

FILE = "scheduler/scheduler_config.json"
# The grid is that of diffusers' FlowMatchEulerDiscreteScheduler, and so are the defaults.
SCHEDULER = published.Keys(
  used={
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "time_shift_type": "exponential",
  },
  neutral={
    "shift_terminal": (None, False),
    "invert_sigmas": (False, None),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "stochastic_sampling": (False, None),
  },
)


def schedule(config: dict, checkpoint_shift: float, steps: int, shift: float) -> schedules.Schedule:
  """The schedule with a time shift, or with the checkpoint's own where `shift` is 0."""
  return schedules.flow_schedule(steps, shift or checkpoint_shift, config["num_train_timesteps"])


def diffusers_scheduler(shift: float) -> str:
  """The expression for diffusers' scheduler with a time shift, see `base.DiffusersCall`; "" for the
  folder's own, where `shift` is 0.
  """
  if not shift:
    return ""
  changes = f"shift={shift!r}, use_dynamic_shifting=False"
  scheduler = "FlowMatchEulerDiscreteScheduler.from_config"
  return f"{scheduler}(\n  pipeline.scheduler.config, {changes}\n)"


def true_guidance(config: ConfigDict) -> dict[str, Any]:
  """The arguments of diffusers' pipelines of guidance-distilled models for two forward passes a
  step; {} where a run makes one.
  """
  if config.sampler.guidance_scale == 1:
    return {}
  return {
    "negative_prompt": config.data.negative_prompt,
    "true_cfg_scale": config.sampler.guidance_scale,
  }


def read_scheduler(given: dict) -> dict:
  """The values of a scheduler_config.json that the grid is made of.

  Raises:
    ValueError: a key or a value that is not implemented.
  """
  scheduler = published.read(FILE, given, SCHEDULER)
  if not scheduler["_class_name"].startswith("FlowMatch"):
    raise ValueError(
      f"{FILE}: {scheduler['_class_name']} is of a diffusion model; this family is a"
      " rectified flow, whose scheduler is FlowMatchEulerDiscreteScheduler"
    )
  return scheduler


def scheduler_shift(config: dict, tokens: int) -> float:
  """The time shift of a FlowMatchEulerDiscreteScheduler, which is constant or dynamic.

  Args:
    config: of `read_scheduler`.
    tokens: the number of a sample's image tokens, which a dynamic shift depends on.

  Raises:
    ValueError: an unknown kind of shift.
  """
  if not config["use_dynamic_shifting"]:
    return config["shift"]
  return schedules.resolution_shift(
    tokens,
    base_tokens=config["base_image_seq_len"],
    max_tokens=config["max_image_seq_len"],
    base_shift=config["base_shift"],
    max_shift=config["max_shift"],
    kind=config["time_shift_type"],
  )
