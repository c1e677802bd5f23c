"""What a config must satisfy, as lines for the user: field = value: what is wrong and what would
work.

`validate` is the entrance. Single values stand in the tables below; values that must agree have a
function each.
"""

import difflib
import re
from collections.abc import Iterator
from math import prod
from typing import Any

from ml_collections import ConfigDict

from dancegrpo_jax import errors
from dancegrpo_jax.devices.sharding import AXES, REST, axis_sizes
from dancegrpo_jax.diffusion import transitions, windows
from dancegrpo_jax.models.attention import capability_of
from dancegrpo_jax.pipelines.families import family_of
from dancegrpo_jax.rewards import kinds
from dancegrpo_jax.rl import advantages, algorithms, timesteps
from dancegrpo_jax.settings import stored_config

_DTYPES = ("float32", "bfloat16", "float16")
CHOICES = {
  "model.dtype": _DTYPES,
  "model.frozen_dtype": _DTYPES,
  "model.attention": ("auto", "xla", "cudnn", "splash"),
  "model.matmul_precision": ("default", "highest"),
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
}


def _at_least(low: int | float):
  return (lambda value: value >= low), f"must be at least {low}"


def _above(low: int | float):
  return (lambda value: value > low), f"must be above {low}"


def _within(low: int | float, high: int | float):
  return (lambda value: low <= value <= high), f"must lie in [{low}, {high}]"


def _below_one():
  return (lambda value: 0 <= value < 1), "must lie in [0, 1)"


LIMITS = {
  "model.variant": (
    (lambda value: re.fullmatch(r"\w*", value)),
    "must be the mark in file names, as 'fp16'; '' is none",
  ),
  "iterations": _at_least(1),
  "data.prompts_per_iteration": _at_least(1),
  "sampler.steps": _at_least(1),
  "model.text_length": _at_least(1),
  "sampler.shift": (
    (lambda value: value >= 0),
    "must be above 0, or 0 for what the checkpoint's scheduler says",
  ),
  "sampler.embedded_guidance": _at_least(0),
  "sampler.guidance_scale": ((lambda value: value >= 1), "must be at least 1; 1 is no guidance"),
  "sampler.noise_level": (
    (lambda value: value > 0),
    "must be above 0; without noise the policy is deterministic and has no likelihood ratio",
  ),
  "rollout.samples_per_prompt": (
    (lambda value: value >= 2),
    "a group needs at least 2 samples to compare; 8 to 16 is usual",
  ),
  "rollout.chunk": _at_least(1),
  "reward.max_failed": _within(0, 1),
  "advantage.eps": _at_least(0),
  "advantage.clamp": _above(0),
  "advantage.min_spread": _at_least(0),
  "advantage.history.size": _at_least(0),
  "advantage.history.min_count": _at_least(1),
  "objective.clip_range": _above(0),
  "objective.dppo.tau": _above(0),
  "objective.timestep_fraction": ((lambda value: 0 < value <= 1), "must lie in (0, 1]"),
  "objective.kl.weight": _at_least(0),
  "optimizer.learning_rate": _above(0),
  "optimizer.warmup_steps": _at_least(0),
  "optimizer.b1": _below_one(),
  "optimizer.b2": _below_one(),
  "optimizer.eps": _above(0),
  "optimizer.weight_decay": _at_least(0),
  "optimizer.max_grad_norm": _above(0),
  "optimizer.updates_per_iteration": _at_least(1),
  "optimizer.microbatch": _at_least(1),
  "optimizer.microbatches_per_call": _at_least(0),
  "optimizer.max_skipped": _at_least(0),
  "lora.rank": _at_least(0),
  "lora.alpha": _at_least(0),
  "ema.decay": _below_one(),
  "mesh.lanes": _at_least(1),
  "checkpoint.every": _at_least(1),
  "checkpoint.keep": _at_least(1),
  "evaluation.every": _at_least(0),
  "evaluation.prompts": _at_least(1),
  "evaluation.steps": _at_least(1),
  "evaluation.samples": _at_least(1),
}


# Fields from which batches follow.
_SIZES = {
  "data.prompts_per_iteration",
  "rollout.samples_per_prompt",
  "rollout.chunk",
  "advantage.best_of",
  "mesh.lanes",
  "sampler.steps",
  "sampler.last_step",
  "sampler.window.size",
  "objective.timesteps",
  "objective.timestep_fraction",
  "optimizer.updates_per_iteration",
  "optimizer.microbatch",
}


def device_facts(device: Any) -> dict[str, Any]:
  """What `validate` wants to know of a run's devices, from one of them."""
  return {"platform": device.platform, "capability": capability_of(device)}


def validate(
  config: ConfigDict,
  *,
  num_devices: int,
  num_examples: int | None = None,
  platform: str | None = None,
  capability: tuple[int, int] = (0, 0),
) -> None:
  """Checks every value and every pair of values that must agree, once, before any weight is loaded.

  Args:
    config: the whole config.
    num_devices: devices of the run, all processes together.
    num_examples: prompts in `data.prompts`, where they have been read.
    platform: of the devices, cpu, gpu or tpu; None where it isn't known and nothing is asked of it.
    capability: the compute capability of NVIDIA GPUs, as (9, 0); (0, 0) of other devices.

  Raises:
    ConfigError: all problems in one message, a line each.
  """
  lines = problems(config, num_devices=num_devices, num_examples=num_examples)
  if lines := [*lines, *_attention(config, platform, capability)]:
    raise errors.ConfigError("\n".join(lines))


def problems(config: ConfigDict, *, num_devices: int, num_examples: int | None = None) -> list[str]:
  """Every problem of a config, a line each; [] where it is sound. Arguments as `validate` takes
  them.
  """
  fields = stored_config.flatten(config)
  missing = [field for field in (*CHOICES, *LIMITS) if field not in fields]
  if missing:
    return [
      f"config.{field}: missing; start from configs/common.py, which has every field"
      for field in missing
    ]
  lines = [*_single_values(fields)]
  try:
    for check in (
      _family,
      _sampler,
      _window,
      _rewards,
      _advantage,
      _objective,
      _lora,
      lambda config: _data(config, num_examples),
      _mesh_rules,
      _logging,
    ):
      lines += check(config)
    wrong = {line.split(" ")[0].removeprefix("config.") for line in lines}
    lines += _sizes(config, num_devices, wrong)
  except (AttributeError, KeyError) as error:
    lines.append(
      f"config: {str(error).splitlines()[0]}; start from configs/common.py, which has every field"
    )
  return lines


def _line(field: str, value: Any, remedy: str) -> str:
  return f"config.{field} = {value!r}: {remedy}"


def _single_values(fields: dict[str, Any]) -> Iterator[str]:
  for field, known in CHOICES.items():
    value = fields[field]
    if value not in known:
      close = difflib.get_close_matches(str(value), [str(name) for name in known], n=1)
      hint = f"; did you mean {close[0]!r}?" if close else ""
      yield _line(field, value, f"unknown; one of {', '.join(map(str, known))}{hint}")
  for field, (holds, remedy) in LIMITS.items():
    if not holds(fields[field]):
      yield _line(field, fields[field], remedy)


def _attention(
  config: ConfigDict, platform: str | None, capability: tuple[int, int]
) -> Iterator[str]:
  """Whether the devices have the kernels that the config insists on; see models/attention.py."""
  kernel = config.model.get("attention")
  if kernel == "splash" and platform == "gpu":
    yield _line(
      "model.attention",
      "splash",
      "is for TPUs, and this run is on a GPU; use 'auto', 'cudnn' or 'xla'",
    )
  if kernel != "cudnn" or platform is None:
    return
  if platform != "gpu":
    remedy = f"is for NVIDIA GPUs, and this run is on a {platform.upper()}; use 'auto' or 'xla'"
    yield _line("model.attention", "cudnn", remedy)
  elif capability < (8, 0):
    has = "{}.{}".format(*capability) if capability[0] else "none, as it is not NVIDIA's"
    remedy = f"needs a compute capability of 8.0; this GPU has {has}"
    yield _line("model.attention", "cudnn", f"{remedy}; use 'xla'")


def policy_steps(config: ConfigDict) -> int:
  """Stochastic steps of the whole schedule: the last one is deterministic unless `last_step` is
  sde.
  """
  return config.sampler.steps - (config.sampler.last_step != "sde")


def _paradigm(config: ConfigDict) -> str:
  """What the family's denoiser was trained as, "" where there is no such family."""
  try:
    return family_of(config.model.family).paradigm
  except ValueError:
    return ""


def _family(config: ConfigDict) -> Iterator[str]:
  try:
    family_of(config.model.family)
  except ValueError as error:
    yield str(error)


def _sampler(config: ConfigDict) -> Iterator[str]:
  sampler, paradigm = config.sampler, _paradigm(config)
  if sampler.kind == "flow" and paradigm == "diffusion":
    remedy = (
      f"for rectified flow only; {config.model.family} is a diffusion model: use ddim, dance or cps"
    )
    yield _line("sampler.kind", "flow", remedy)
  if sampler.kind in ("ddim", "cps") and sampler.noise_level > 1:
    yield _line(
      "sampler.noise_level",
      sampler.noise_level,
      f"{sampler.kind} takes at most 1; more noise than a step can hold",
    )
  if policy_steps(config) < 1:
    remedy = f"no stochastic step is left with last_step = {sampler.last_step!r}; use 2 or more"
    yield _line("sampler.steps", sampler.steps, remedy)
  if sampler.guidance_scale > 1 and config.data.negative_prompt is None:
    yield _line(
      "sampler.guidance_scale",
      sampler.guidance_scale,
      "needs data.negative_prompt; the empty text '' is usual",
    )
  size = config.model.size
  if len(size) != 2 or any(not isinstance(side, int) or side < 1 for side in size):
    yield _line("model.size", size, "must be (height, width) in pixels, as (512, 512)")


def _window(config: ConfigDict) -> Iterator[str]:
  window, steps = config.sampler.window, policy_steps(config)
  if not 0 <= window.size <= steps:
    yield _line(
      "sampler.window.size",
      window.size,
      f"the schedule has {steps} policy steps; use 0 (all) to {steps}",
    )
    return
  last_start = steps - window.size
  if window.size and window.mode != "random" and not 0 <= window.start <= last_start:
    remedy = f"a window of {window.size} starting there leaves the {steps} policy steps; use 0 to {last_start}"
    yield _line("sampler.window.start", window.start, remedy)
  if window.mode == "sliding":
    for field in ("stride", "interval"):
      if window[field] < 1:
        yield _line(
          f"sampler.window.{field}", window[field], "must be at least 1 for a sliding window"
        )


def _rewards(config: ConfigDict) -> Iterator[str]:
  terms = config.reward.terms
  if not terms or any(not _is_pair(term) for term in terms):
    yield _line(
      "reward.terms", terms, 'must hold (term, weight) pairs, at least one, as (("clip", 1.0),)'
    )
    return
  names = [name for name, _ in terms]
  for name in dict.fromkeys(map(kinds.reward_of, names)):
    try:
      section = kinds.kind_of(name).section
    except ValueError as error:
      yield str(error)
      continue
    if section and section not in config.reward:
      remedy = f"its section config.reward.{section} is missing"
      if name in kinds.KINDS:
        remedy += "; configs/common.py has it"
      yield _line("reward.terms", name, remedy)
  for name in sorted({name for name in names if names.count(name) > 1}):
    yield _line("reward.terms", name, "named twice; give it one weight")
  for threshold in config.reward.thresholds:
    if not _is_pair(threshold) or threshold[0] not in names:
      yield _line(
        "reward.thresholds",
        threshold,
        f"must be (term, value) with a term of reward.terms: {', '.join(names)}",
      )
  compressibility = config.reward.get("compressibility")
  if compressibility is not None and not 1 <= compressibility.quality <= 100:
    yield _line(
      "reward.compressibility.quality", compressibility.quality, "must lie in [1, 100]; 95 is usual"
    )


def _is_pair(value: Any) -> bool:
  return (
    isinstance(value, (tuple, list))
    and len(value) == 2
    and isinstance(value[0], str)
    and isinstance(value[1], (int, float))
  )


def _advantage(config: ConfigDict) -> Iterator[str]:
  best_of, group, history = (
    config.advantage.best_of,
    config.rollout.samples_per_prompt,
    config.advantage.history,
  )
  if best_of < 0 or best_of % 2:
    yield _line(
      "advantage.best_of", best_of, "must be even: half are the best, half the worst; 0 trains all"
    )
  elif best_of > group:
    even = group - group % 2
    yield _line(
      "advantage.best_of",
      best_of,
      f"a group has rollout.samples_per_prompt = {group} samples; use at most {even}",
    )
  if 0 < history.size < history.min_count:
    yield _line(
      "advantage.history.size",
      history.size,
      f"never reaches min_count = {history.min_count}; use 0 (off) or 32",
    )


def _objective(config: ConfigDict) -> Iterator[str]:
  objective, kind, paradigm = (
    config.objective,
    config.sampler.kind,
    _paradigm(config),
  )
  field, mode = "objective.kl.mode", objective.kl.mode
  if mode in ("no_dt", "velocity_mse") and paradigm == "diffusion":
    yield _line(
      field,
      mode,
      f"for rectified flow only; {config.model.family} is a diffusion model: exact or mean_mse",
    )
  elif mode == "no_dt" and kind not in ("dance", "flow"):
    yield _line(
      field, mode, f"for the dance and flow samplers only, not {kind}; use exact or mean_mse"
    )
  needs_means = "needs the old means, so objective.old_log_prob = 'recompute'"
  if objective.kind == "dppo":
    if objective.guard:
      remedy = "is a ratio of GRPO's; objective.kind = 'dppo' has its own trust region: use False"
      yield _line("objective.guard", True, remedy)
    if objective.old_log_prob == "rollout":
      yield _line("objective.kind", "dppo", needs_means)
  elif objective.guard and objective.old_log_prob == "rollout":
    yield _line("objective.guard", True, needs_means)


def _lora(config: ConfigDict) -> Iterator[str]:
  """Rank, alpha and targets are all set or all empty; whether the targets are in the network shows
  when it is built.
  """
  lora = config.lora
  try:
    re.compile(lora.targets)
  except re.error as error:
    yield _line("lora.targets", lora.targets, f"not a regular expression: {error}")
  if lora.rank > 0:
    if lora.alpha == 0:
      yield _line(
        "lora.alpha",
        lora.alpha,
        f"the adapters of rank {lora.rank} would do nothing; use 1 to 2 times lora.rank",
      )
    if not lora.targets:
      example = r".*attn.*/to_(q|k|v|out_0)/kernel"
      yield _line("lora.targets", lora.targets, f"must match the kernels to adapt, as {example!r}")
  elif lora.rank == 0:
    for field in ("alpha", "targets", "checkpoint"):
      if lora[field]:
        yield _line(
          f"lora.{field}",
          lora[field],
          "needs lora.rank above 0; with rank 0 every weight is trained",
        )


def _data(config: ConfigDict, num_examples: int | None) -> Iterator[str]:
  prompts = config.data.prompts_per_iteration
  if not config.data.prompts:
    yield _line(
      "data.prompts",
      config.data.prompts,
      "must name a text file, one prompt a line, or a .json list",
    )
  if num_examples is not None and prompts > num_examples:
    remedy = f"{config.data.prompts} has {num_examples} prompts; use at most {num_examples}"
    yield _line("data.prompts_per_iteration", prompts, remedy)


def _mesh_rules(config: ConfigDict) -> Iterator[str]:
  for field in ("rules", "reward_rules"):
    for rule in config.mesh[field]:
      yield from _rule(f"mesh.{field}", rule)


def _rule(field: str, rule: Any) -> Iterator[str]:
  is_pair = isinstance(rule, (tuple, list)) and len(rule) == 2 and isinstance(rule[0], str)
  if not is_pair or not isinstance(rule[1], (tuple, list)):
    yield _line(field, rule, 'must be (regex, partition spec), as (".*/kernel", (None, "fsdp"))')
    return
  try:
    re.compile(rule[0])
  except re.error as error:
    yield _line(field, rule[0], f"not a regular expression: {error}")
  spec = rule[1][1:] if rule[1][:1] in ((REST,), [REST]) else rule[1]
  axes = [
    axis for entry in spec for axis in (entry if isinstance(entry, (tuple, list)) else (entry,))
  ]
  for axis in axes:
    if axis is not None and axis not in AXES:
      yield _line(field, rule, f"unknown mesh axis {axis!r}; one of {', '.join(AXES)}, or None")
  if "data" in axes and "tensor" in axes:
    yield _line(
      field,
      rule,
      "data beside tensor: the compiler gets gradients of such kernels wrong; use fsdp for data",
    )


def _logging(config: ConfigDict) -> Iterator[str]:
  steps = config.logging.profile_steps
  if steps and not (len(steps) == 2 and 0 <= steps[0] <= steps[1]):
    yield _line("logging.profile_steps", steps, "must be () or (first, last) iteration, as (3, 4)")


def _sizes(config: ConfigDict, num_devices: int, wrong: set[str]) -> Iterator[str]:
  """Batches divide: P G samples into chunks, trained transitions into microbatches, both into
  lanes, lanes onto devices.
  """
  lanes, shards = config.mesh.lanes, 1
  try:
    shards = prod(axis_sizes(config.mesh, num_devices)[:2])
  except errors.ConfigError as error:
    yield str(error)
  if wrong & _SIZES:
    return  # the remedies below would be computed from values that are wrong themselves
  if lanes % shards:
    yield _line(
      "mesh.lanes",
      lanes,
      f"must be a multiple of data x fsdp = {shards}; use {shards} or {shards * 2}",
    )
  group, prompts, chunk = (
    config.rollout.samples_per_prompt,
    config.data.prompts_per_iteration,
    config.rollout.chunk,
  )
  samples = prompts * group
  if samples % chunk or chunk % lanes:
    what = f"must divide the {samples} samples of an iteration ({prompts} prompts x {group})"
    yield _line(
      "rollout.chunk",
      chunk,
      f"{what} and be a multiple of mesh.lanes = {lanes}; {_works(samples, lanes, chunk)}",
    )
  yield from _transitions(config, prompts * (config.advantage.best_of or group))


def _transitions(config: ConfigDict, trained: int) -> Iterator[str]:
  """`trained` samples x trained steps = updates x microbatches x microbatch, each microbatch with
  equally many of each lane.
  """
  objective, optimizer, lanes = config.objective, config.optimizer, config.mesh.lanes
  steps = config.sampler.window.size or policy_steps(config)
  count = timesteps.count(objective.timesteps, objective.timestep_fraction, steps)
  if trained % lanes:
    remedy = (
      f"the {trained} trained samples of an iteration must divide by it; use a divisor of {trained}"
    )
    yield _line("mesh.lanes", lanes, f"{remedy}, or change data.prompts_per_iteration")
    return
  total, updates, microbatch = (
    trained * count,
    optimizer.updates_per_iteration,
    optimizer.microbatch,
  )
  what = f"the {total} trained transitions ({trained} samples x {count} steps)"
  if total % updates or (total // updates) % lanes:
    works = _near([n for n in range(1, total + 1) if total % (n * lanes) == 0], updates)
    remedy = f"must divide {what} in multiples of mesh.lanes = {lanes}; use {works}"
    yield _line("optimizer.updates_per_iteration", updates, remedy)
  elif (total // updates) % microbatch or microbatch % lanes:
    each = total // updates
    what = (
      f"must divide {what} / {updates} updates = {each} and be a multiple of mesh.lanes = {lanes}"
    )
    yield _line("optimizer.microbatch", microbatch, f"{what}; {_works(each, lanes, microbatch)}")


def _works(total: int, multiple: int, wanted: int) -> str:
  values = [n for n in range(multiple, total + 1, multiple) if total % n == 0]
  return (
    f"use {_near(values, wanted)}"
    if values
    else f"no value does: {total} is not a multiple of {multiple}"
  )


def _near(values: list[int], wanted: int) -> str:
  """The four values nearest to the wanted one, as text."""
  near = sorted(sorted(values, key=lambda value: abs(value - wanted))[:4])
  return ", ".join(map(str, near[:-1])) + f" or {near[-1]}" if len(near) > 1 else str(near[0])
