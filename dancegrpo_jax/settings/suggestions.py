"""What the user may have meant by a name that does not exist: the end of a message."""

import difflib
from collections.abc import Collection, Sequence

# What other programs call a field, and what it is called here.
OTHER_NAMES = {
  "accumulation_steps": ("optimizer.microbatch",),
  "adv_clip_max": ("advantage.clamp",),
  "batch_size": ("data.prompts_per_iteration", "optimizer.microbatch"),
  "beta": ("objective.kl.weight",),
  "cfg": ("sampler.guidance_scale",),
  "cfg_scale": ("sampler.guidance_scale",),
  "checkpointing_steps": ("checkpoint.every",),
  "clip_eps": ("objective.clip_range",),
  "dataset": ("data.prompts",),
  "ema_decay": ("ema.decay",),
  "epochs": ("iterations",),
  "epsilon": ("objective.clip_range",),
  "eta": ("sampler.noise_level",),
  "eval_every": ("evaluation.every",),
  "eval_freq": ("evaluation.every",),
  "gpus": ("mesh.data", "mesh.fsdp"),
  "gradient_accumulation_steps": ("optimizer.microbatch",),
  "gradient_checkpointing": ("model.remat",),
  "group_size": ("rollout.samples_per_prompt",),
  "guidance": ("sampler.guidance_scale",),
  "height": ("model.size",),
  "kl_beta": ("objective.kl.weight",),
  "kl_coef": ("objective.kl.weight",),
  "lora_alpha": ("lora.alpha",),
  "lora_rank": ("lora.rank",),
  "lr": ("optimizer.learning_rate",),
  "lr_warmup_steps": ("optimizer.warmup_steps",),
  "max_steps": ("iterations",),
  "max_train_steps": ("iterations",),
  "mixed_precision": ("model.dtype",),
  "model_path": ("model.checkpoint",),
  "num_epochs": ("iterations",),
  "num_generations": ("rollout.samples_per_prompt",),
  "num_gpus": ("mesh.data", "mesh.fsdp"),
  "num_inference_steps": ("sampler.steps",),
  "num_iterations": ("iterations",),
  "num_samples": ("rollout.samples_per_prompt",),
  "num_steps": ("sampler.steps",),
  "precision": ("model.dtype",),
  "pretrained_model_name_or_path": ("model.checkpoint",),
  "prompt_file": ("data.prompts",),
  "resolution": ("model.size",),
  "reward": ("reward.terms",),
  "reward_fn": ("reward.terms",),
  "rewards": ("reward.terms",),
  "sampling_steps": ("sampler.steps",),
  "save_every": ("checkpoint.every",),
  "save_freq": ("checkpoint.every",),
  "save_steps": ("checkpoint.every",),
  "train_batch_size": ("data.prompts_per_iteration", "optimizer.microbatch"),
  "use_ema": ("ema.decay",),
  "use_wandb": ("logging.wandb",),
  "warmup": ("optimizer.warmup_steps",),
  "width": ("model.size",),
}


def did_you_mean(word: str, known: Sequence[str]) -> str:
  """The end of a message that suggests the most similar of `known`; "" where none is similar."""
  close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
  return f"; did you mean {close[0]!r}?" if close else ""


def fields_called(name: str, fields: Collection[str]) -> list[str]:
  """The fields that somebody surely means who writes `name`: [] where there is none.

  Args:
    name: a field's name alone, its name with another section, its full name with underscores for
      points, or what other programs call it ("lr", "optimizer.lr"). Dashes are underscores.
    fields: full names, as "optimizer.learning_rate".
  """
  name = name.lower().replace("-", "_")
  leaf, whole = _leaf(name), name.replace(".", "_")
  if found := [field for field in fields if field.replace(".", "_") == whole]:
    return found
  if found := [field for field in fields if _leaf(field) == leaf]:
    return _of_section(name, found)
  other = OTHER_NAMES.get(whole) or OTHER_NAMES.get(leaf) or ()
  if found := [field for field in other if field in fields]:
    return found
  # A config of another kind, as that of `pretrain`, has the same leaves in other sections.
  leaves = {_leaf(field) for field in other}
  return _of_section(name, [field for field in fields if _leaf(field) in leaves])


def fields_like(name: str, fields: Collection[str], cutoff: float = 0.6) -> list[str]:
  """The fields that `name` is a misspelling of: those of `fields_called`, else similar ones, first
  of the same section.
  """
  if found := fields_called(name, fields):
    return found
  section = name.rpartition(".")[0]
  inside = [field for field in fields if section and field.startswith(f"{section}.")]
  for group in (inside, fields):
    leaves = sorted({_leaf(field) for field in group})
    close = difflib.get_close_matches(_leaf(name), leaves, n=1, cutoff=cutoff)
    if close:
      return [field for field in group if _leaf(field) == close[0]]
  return [] if inside else difflib.get_close_matches(name, list(fields), n=1, cutoff=0.8)


def did_you_mean_field(key: str, fields: Collection[str]) -> str:
  """The end of a message about an unknown field."""
  if close := fields_like(key, fields):
    return f"; did you mean {' or '.join(close[:3])}?"
  section = key.rpartition(".")[0]
  inside = [_leaf(field) for field in fields if section and field.startswith(f"{section}.")]
  if inside:
    return f"; {section} has {', '.join(inside)}"
  return "; --help with --config lists every field"


def _leaf(field: str) -> str:
  return field.rpartition(".")[2]


def _of_section(name: str, fields: Collection[str]) -> list[str]:
  """Those of `fields` that lie in the section that `name` begins with; all where none does."""
  section = name.rpartition(".")[0]
  return [field for field in fields if field.startswith(f"{section}.")] or list(fields)
