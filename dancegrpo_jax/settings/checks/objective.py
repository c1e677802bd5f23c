"""The advantages and the objective."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from dancegrpo_jax.settings.checks.model import paradigm
from dancegrpo_jax.settings.checks.values import problem


def advantage(config: ConfigDict) -> Iterator[str]:
  """Whether `best_of` fits into a group, and whether the history can ever be used."""
  group, history = config.rollout.samples_per_prompt, config.advantage.history
  best_of = config.advantage.best_of
  if best_of < 0 or best_of % 2:
    remedy = "must be even: half are the best, half the worst; 0 trains all"
    yield problem("advantage.best_of", best_of, remedy)
  elif best_of > group:
    remedy = f"a group has rollout.samples_per_prompt = {group} samples"
    yield problem("advantage.best_of", best_of, f"{remedy}; use at most {group - group % 2}")
  if 0 < history.size < history.min_count:
    remedy = f"never reaches min_count = {history.min_count}; use 0 (off) or 32"
    yield problem("advantage.history.size", history.size, remedy)


def objective(config: ConfigDict) -> Iterator[str]:
  """Whether the KL penalty suits model and sampler, and whether the trust region has old means."""
  section, sampler = config.objective, config.sampler.kind
  field, mode = "objective.kl.mode", section.kl.mode
  if mode in ("no_dt", "velocity_mse") and paradigm(config) == "diffusion":
    remedy = f"for rectified flow only; {config.model.family} is a diffusion model"
    yield problem(field, mode, f"{remedy}: use exact or mean_mse")
  elif mode == "no_dt" and sampler not in ("dance", "flow"):
    remedy = f"for the dance and flow samplers only, not {sampler}; use exact or mean_mse"
    yield problem(field, mode, remedy)
  is_dppo, has_means = section.kind == "dppo", section.old_log_prob != "rollout"
  needs_means = "needs the old means, so objective.old_log_prob = 'recompute'"
  if is_dppo and section.guard:
    remedy = "is a ratio of GRPO's; objective.kind = 'dppo' has its own trust region: use False"
    yield problem("objective.guard", True, remedy)
  if is_dppo and not has_means:
    yield problem("objective.kind", "dppo", needs_means)
  if section.guard and not is_dppo and not has_means:
    yield problem("objective.guard", True, needs_means)
