"""Whether a config can be run: every mistake is found before a weight is loaded or compiled.

`validate` is the entrance. Each module here checks one part: `values` has the tables of single
fields, and the others check values that must agree with each other.
"""

from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from dancegrpo_jax import errors
from dancegrpo_jax.models.attention import capability_of
from dancegrpo_jax.settings import automatic, stored_config
from dancegrpo_jax.settings.checks import batches, mesh, model, objective, rewards, sampler, values

_START = "start from configs/common.py, which has every field"
_AGREEMENTS: tuple[Callable[[ConfigDict], Iterator[str]], ...] = (
  model.family,
  sampler.sampler,
  sampler.window,
  rewards.rewards,
  objective.advantage,
  objective.objective,
  model.lora,
  mesh.rules,
)


def device_facts(device: Any) -> dict[str, Any]:
  """The arguments of `validate` that describe a run's devices, from one of them."""
  return {"platform": device.platform, "capability": capability_of(device)}


def validate(
  config: ConfigDict,
  *,
  num_devices: int,
  num_examples: int | None = None,
  platform: str | None = None,
  capability: tuple[int, int] = (0, 0),
) -> None:
  """Checks every value, and all values that must agree.

  Args:
    config: the whole config.
    num_devices: devices of the run, all processes together.
    num_examples: prompts in `data.prompts`; None where they have not been read.
    platform: the kind of devices: cpu, gpu or tpu. None where it is not known; then nothing that
      depends on it is checked.
    capability: the compute capability of NVIDIA GPUs, as (9, 0); (0, 0) for other devices.

  Raises:
    ConfigError: all problems in one message, one line each: field, value, and what would work.
  """
  lines = problems(config, num_devices=num_devices, num_examples=num_examples)
  lines += model.attention(config, platform, capability)
  if lines:
    raise errors.ConfigError("\n".join(lines))


def problems(config: ConfigDict, *, num_devices: int, num_examples: int | None = None) -> list[str]:
  """What is wrong with a config apart from its devices.

  Args:
    config, num_devices, num_examples: as for `validate`. Sizes may still be "auto".

  Returns:
    One line for each problem, [] for a valid config.
  """
  fields = stored_config.flatten(config)
  missing = [field for field in (*values.CHOICES, *values.LIMITS) if field not in fields]
  if missing:
    return [f"config.{field}: missing; {_START}" for field in missing]
  try:
    config = automatic.resolved(config, num_devices)
  except errors.ConfigError as error:
    sized = {field for field in automatic.FIELDS if automatic.is_auto(fields[field])}
    return [*values.problems(fields | dict.fromkeys(sized, 1)), str(error)]
  flat = stored_config.flatten(config)
  lines = [*values.problems(flat), *values.urls(flat)]
  try:
    for check in _AGREEMENTS:
      lines += check(config)
    lines += batches.prompts(config, num_examples)
    wrong = {line.split(" ")[0].removeprefix("config.") for line in lines}
    lines += batches.sizes(config, num_devices, wrong)
  except (AttributeError, KeyError) as error:  # ml_collections names the missing field
    lines.append(f"config: {str(error).splitlines()[0]}; {_START}")
  return lines
