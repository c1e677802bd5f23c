"""The sampler and the window of its stochastic steps."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from dancegrpo_jax.settings import geometry
from dancegrpo_jax.settings.checks.model import paradigm
from dancegrpo_jax.settings.checks.values import problem


def sampler(config: ConfigDict) -> Iterator[str]:
  """Whether the stochastic step suits the model, and whether the schedule and guidance work."""
  section = config.sampler
  if section.kind == "flow" and paradigm(config) == "diffusion":
    remedy = "for rectified flow only"
    model = f"{config.model.family} is a diffusion model"
    yield problem("sampler.kind", "flow", f"{remedy}; {model}: use ddim, dance or cps")
  if section.kind in ("ddim", "cps") and section.noise_level > 1:
    remedy = f"{section.kind} takes at most 1; a step cannot hold more noise"
    yield problem("sampler.noise_level", section.noise_level, remedy)
  if geometry.policy_steps(config) < 1:
    remedy = f"no stochastic step is left with last_step = {section.last_step!r}; use 2 or more"
    yield problem("sampler.steps", section.steps, remedy)
  if section.guidance_scale > 1 and config.data.negative_prompt is None:
    remedy = "needs data.negative_prompt; the empty text '' is usual"
    yield problem("sampler.guidance_scale", section.guidance_scale, remedy)


def window(config: ConfigDict) -> Iterator[str]:
  """Whether the window stays inside the policy steps."""
  section, steps = config.sampler.window, geometry.policy_steps(config)
  if not 0 <= section.size <= steps:
    remedy = f"the schedule has {steps} policy steps; use 0 (all) to {steps}"
    yield problem("sampler.window.size", section.size, remedy)
    return
  last = steps - section.size
  if section.size and section.mode != "random" and not 0 <= section.start <= last:
    reach = f"a window of {section.size} steps from there exceeds the {steps} policy steps"
    yield problem("sampler.window.start", section.start, f"{reach}; use 0 to {last}")
  if section.mode == "sliding":
    for name in ("stride", "interval"):
      if section[name] < 1:
        remedy = "must be at least 1 for a sliding window"
        yield problem(f"sampler.window.{name}", section[name], remedy)
