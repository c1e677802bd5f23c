"""Single fields of a config: the names that a field may hold, and the limits of its value."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dancegrpo_jax import buckets
from dancegrpo_jax.diffusion import transitions, windows
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.models.video_tiles import TILINGS
from dancegrpo_jax.rl import advantages, algorithms, timesteps
from dancegrpo_jax.settings.suggestions import did_you_mean


class Limit(NamedTuple):
  """A condition on the value of one field.

  Attributes:
    holds: whether a value satisfies it.
    remedy: what the message says about a value that does not.
  """

  holds: Callable[[Any], Any]
  remedy: str


def _at_least(low: int | float) -> Limit:
  return Limit(lambda value: value >= low, f"must be at least {low}")


def _above(low: int | float) -> Limit:
  return Limit(lambda value: value > low, f"must be above {low}")


def _is_size(value: Any) -> bool:
  """Whether a value is a size of a batch. A config file may hold anything there."""
  return type(value) is int and value >= 1


_DTYPES = ("float32", "bfloat16", "float16")
_SIZE = Limit(_is_size, "must be a whole number of at least 1, auto, or auto:N for at most N")
_BELOW_ONE = Limit(lambda value: 0 <= value < 1, "must lie in [0, 1)")

CHOICES = {
  "model.dtype": _DTYPES,
  "model.frozen_dtype": _DTYPES,
  "model.attention": ("auto", "xla", "cudnn", "splash"),
  "model.matmul_precision": ("default", "highest"),
  "model.decode_tiling": TILINGS,
  "sampler.kind": transitions.STOCHASTIC_KINDS,
  "sampler.last_step": ("ode", "x0hat", "sde"),
  "sampler.window.mode": windows.MODES,
  "sampler.window.outside": ("ode", "dpm++"),
  "reward.combine": advantages.MODES,
  "advantage.ddof": (0, 1),
  "objective.kind": tuple(algorithms.KINDS),
  "objective.log_prob": ("mean", "sum"),
  "objective.old_log_prob": ("recompute", "rollout"),
  "objective.timesteps": timesteps.MODES,
  "objective.kl.mode": transitions.KL_MODES,
  "logging.wandb_mode": ("", "online", "offline", "disabled"),
}

LIMITS = {
  "iterations": _at_least(1),
  "model.variant": Limit(
    lambda value: re.fullmatch(r"\w*", value),
    "must be the variant in the names of the weight files, as 'fp16', or '' for none",
  ),
  "model.size": Limit(
    lambda size: len(size) == 2 and all(isinstance(side, int) and side >= 1 for side in size),
    "must be (height, width) in pixels, as (512, 512)",
  ),
  "model.frames": _at_least(1),
  "model.fps": _above(0),
  "model.decode_batch": _at_least(0),
  "model.text_length": _at_least(1),
  "data.prompts": Limit(bool, "must name a prompts file: .txt, .json, .jsonl, .csv or .tsv"),
  "data.prompts_per_iteration": _at_least(1),
  "sampler.steps": _at_least(1),
  "sampler.shift": Limit(
    lambda value: value >= 0, "must be above 0, or 0 for the shift of the checkpoint's scheduler"
  ),
  "sampler.embedded_guidance": _at_least(0),
  "sampler.guidance_scale": Limit(
    lambda value: value >= 1, "must be at least 1; 1 turns guidance off"
  ),
  "sampler.noise_level": Limit(
    lambda value: value > 0,
    "must be above 0; without noise the policy is deterministic and has no likelihood ratio",
  ),
  "rollout.samples_per_prompt": Limit(
    lambda value: value >= 2, "a group needs at least 2 samples to compare; 8 to 16 is usual"
  ),
  "rollout.chunk": _SIZE,
  "reward.max_failed": Limit(lambda value: 0 <= value <= 1, "must lie in [0, 1]"),
  "reward.failed_iterations": _at_least(1),
  "reward.slice": _at_least(0),
  "advantage.eps": _at_least(0),
  "advantage.clamp": _above(0),
  "advantage.min_spread": _at_least(0),
  "advantage.history.size": _at_least(0),
  "advantage.history.min_count": _at_least(1),
  "objective.clip_range": _above(0),
  "objective.dppo.tau": _above(0),
  "objective.timestep_fraction": Limit(lambda value: 0 < value <= 1, "must lie in (0, 1]"),
  "objective.kl.weight": _at_least(0),
  "optimizer.learning_rate": _above(0),
  "optimizer.warmup_steps": _at_least(0),
  "optimizer.b1": _BELOW_ONE,
  "optimizer.b2": _BELOW_ONE,
  "optimizer.eps": _above(0),
  "optimizer.weight_decay": _at_least(0),
  "optimizer.max_grad_norm": _above(0),
  "optimizer.updates_per_iteration": _at_least(1),
  "optimizer.microbatch": _SIZE,
  "optimizer.microbatches_per_call": _at_least(0),
  "optimizer.max_skipped": _at_least(0),
  "lora.rank": _at_least(0),
  "lora.alpha": _at_least(0),
  "ema.decay": _BELOW_ONE,
  "mesh.lanes": _SIZE,
  "checkpoint.every": _at_least(1),
  "checkpoint.keep": _at_least(1),
  "evaluation.every": _at_least(0),
  "evaluation.prompts": _at_least(1),
  "evaluation.steps": _at_least(1),
  "evaluation.samples": _at_least(1),
  "logging.wandb_project": Limit(bool, "must name a project of Weights & Biases"),
  "logging.profile_steps": Limit(
    lambda steps: not steps or (len(steps) == 2 and 0 <= steps[0] <= steps[1]),
    "must be () or (first, last) iteration, as (3, 4)",
  ),
}


# The last words of fields that may name something in a bucket, and of those that hold no path.
_IN_BUCKETS = (
  *("checkpoint", "tokenizer", "head", "init_from"),
  *("prompts", "held_out", "distractors", "compilation_cache"),
)
_NO_PATHS = ("url", "negative_prompt")


def urls(fields: dict[str, Any]) -> Iterator[str]:
  """What is wrong with URLs in the place of paths."""
  for field, value in fields.items():
    name = field.rpartition(".")[2]
    if name in _NO_PATHS:
      continue
    try:
      buckets.require_path(f"config.{field}", value, remote=name in _IN_BUCKETS)
    except ConfigError as error:
      yield str(error)


def problem(field: str, value: Any, remedy: str) -> str:
  """The message about a value that a field may not have: field, value and remedy in one line."""
  return f"config.{field} = {value!r}: {remedy}"


def problems(fields: dict[str, Any]) -> Iterator[str]:
  """What is wrong with single values.

  Args:
    fields: values by dotted path, with every field of `CHOICES` and `LIMITS`.
  """
  for field, choices in CHOICES.items():
    value = fields[field]
    if value not in choices:
      names = [str(choice) for choice in choices]
      hint = did_you_mean(str(value), names)
      yield problem(field, value, f"unknown; one of {', '.join(names)}{hint}")
  for field, limit in LIMITS.items():
    if not limit.holds(fields[field]):
      yield problem(field, fields[field], limit.remedy)
