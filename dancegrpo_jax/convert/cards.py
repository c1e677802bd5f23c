"""The model card of an export, README.md in the form of the Hugging Face hub, and the metadata of
its weight file. Both say only what the run's own files say, and nothing of the time or the machine.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

import dancegrpo_jax
from dancegrpo_jax import buckets
from dancegrpo_jax.assembly import loading, sampling
from dancegrpo_jax.checkpoints import weights
from dancegrpo_jax.checkpoints.chosen import Checkpoint
from dancegrpo_jax.convert import bases
from dancegrpo_jax.convert.bases import Base
from dancegrpo_jax.report import metrics
from dancegrpo_jax.settings import stored_config

FILE = "README.md"
PAPER = "[DanceGRPO](https://arxiv.org/abs/2505.07818)"
_KINDS = {
  "pipeline": "the whole pipeline",
  "denoiser": "the trained network alone",
  "lora": "LoRA adapters",
}


class Change(NamedTuple):
  """A mean score before training and after some iterations of it."""

  what: str
  prompts: int
  before: float
  after: float


class Facts(NamedTuple):
  """What the card and the metadata of a file are made from.

  Attributes:
    config: of the run; its section `model` is that of the export, whose base may have moved.
    iteration: of the checkpoint.
    part: "pipeline", "denoiser" or "lora".
    averaged: whether the weights are averages.
    dtype: of the weights.
    name: of the folder.
    base: of the run.
    start: the checkpoint that the run started from; "" for the base.
    counts: numbers of prompts by field of config.data, where they are known.
    evaluated: iterations that were done at the last evaluation before the checkpoint.
    changes: of the scores until then; () where they are not known.
  """

  config: ConfigDict
  iteration: int
  part: str
  averaged: bool
  dtype: str
  name: str
  base: Base
  start: str
  counts: dict[str, int]
  evaluated: int
  changes: tuple[Change, ...]


def facts(
  config: ConfigDict, checkpoint: Checkpoint, part: str, kind: str, dtype: str, name: str
) -> Facts:
  """Reads what is known of a checkpoint.

  Args:
    config: of the export.
    checkpoint: that is exported.
    part, kind, dtype: as for `folders.export`.
    name: of the folder that is written.
  """
  meta = checkpoint.meta()
  run = stored_config.completed(meta["config"])
  with run.unlocked():
    run.model = config.model
  evaluated, changes = evaluation(_local(checkpoint.workdir), checkpoint.iteration)
  counts = {field: each["count"] for field, each in meta.get("prompts", {}).items()}
  return Facts(
    config=run,
    iteration=checkpoint.iteration,
    part=part,
    averaged=sampling.is_averaged(checkpoint) and kind != "raw",
    dtype="float32" if part == "lora" else dtype,
    name=name,
    base=bases.base_of(config, meta["config"]["model"]["checkpoint"]),
    start=run.init_from,
    counts=counts,
    evaluated=evaluated,
    changes=changes,
  )


def _local(workdir: epath.Path) -> Path:
  """A local folder with the numbers of a run, whose workdir may be in a bucket."""
  if not buckets.is_url(str(workdir)):
    return Path(workdir)
  return buckets.mirrored(str(workdir), (metrics.FILE, "samples/*/prompts.json"))


def evaluation(workdir: Path, iteration: int) -> tuple[int, tuple[Change, ...]]:
  """The last evaluation inside training that a checkpoint has seen, beside that before training.

  Returns:
    The iterations that were done then, and the changes; (0, ()) where the workdir has no such
    numbers, or other prompts were evaluated before.
  """
  rows = [
    row
    for row in metrics.read(workdir)
    if row["iteration"] < iteration and "evaluation/score" in row
  ]
  if not rows:
    return 0, ()
  done = int(rows[-1]["iteration"]) + 1
  before, after = (_shown(workdir, number) for number in (0, done))
  if not before or before["prompts"] != after.get("prompts"):
    return 0, ()
  changes = []
  for what, key, metric in (
    ("training prompts", "scores", "evaluation/score"),
    ("held-out prompts", "held_out", "evaluation/held_out"),
  ):
    scores = [score for score in before[key] if score is not None]
    value = rows[-1].get(metric, math.nan)
    if scores and len(before[key]) == len(after[key]) and math.isfinite(value):
      changes.append(Change(what, len(before[key]), sum(scores) / len(scores), value))
  return done, tuple(changes)


def _shown(workdir: Path, done: int) -> dict[str, Any]:
  """The scores of the fixed prompts after some iterations; {} where there are none."""
  file = workdir / "samples" / f"iteration_{done:06d}" / "prompts.json"
  return json.loads(file.read_text()) if file.is_file() else {}


# The metadata of the weight file


def header(about: Facts) -> dict[str, str]:
  """The metadata of the file of trained weights: texts, the same for the same checkpoint."""
  config, base = about.config, about.base
  values = {
    "base_model": base.name,
    "iterations": str(about.iteration),
    "reward": _rewards(config),
    "dancegrpo_jax": dancegrpo_jax.__version__,
    "modelspec.title": config.name,
  }
  if base.architecture:
    lora = "/lora" if about.part == "lora" else ""
    values |= {
      "modelspec.sai_model_spec": "1.0.0",
      "modelspec.architecture": base.architecture + lora,
      "modelspec.implementation": "diffusers",
    }
  if about.part == "lora":
    # alpha / rank is in the weights, so that the file's own alpha is its rank.
    rank = str(config.lora.rank)
    values |= {"ss_network_dim": rank, "ss_network_alpha": rank}
  return values


def _rewards(config: ConfigDict) -> str:
  """The terms and their weights, as "clip 1, hps 0.7"."""
  return ", ".join(f"{term} {weight:g}" for term, weight in config.reward.terms)


# The card


def text(about: Facts) -> str:
  """The card, with the hub's metadata at its top."""
  sections = [
    f"# {about.config.name}",
    _summary(about),
    "## Loading",
    _loading(about),
    "## Training",
    _training(about),
    *_results(about),
    "## Licence",
    _license(about.base),
  ]
  return f"---\n{_front_matter(about)}---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(about: Facts) -> str:
  from huggingface_hub import ModelCardData

  base, family = about.base, about.config.model.family
  is_diffusers = bool(loading.family_of(about.config).index_file)
  task = "text-to-video" if about.config.model.frames > 1 else "text-to-image"
  tags = [task, "reinforcement-learning", "grpo", "dancegrpo_jax"]
  if is_diffusers:
    tags.append(family.replace("_", "-"))
  if about.part == "lora":
    tags.append("lora")
  relation = "adapter" if about.part == "lora" else "finetune"
  data = ModelCardData(
    license=base.license or "unknown",
    license_name=base.license_name or None,
    license_link=base.license_link or None,
    base_model=base.hub_id or None,
    base_model_relation=relation if base.hub_id else None,
    library_name="diffusers" if is_diffusers else None,
    pipeline_tag=task,
    tags=tags,
  )
  return data.to_yaml().rstrip() + "\n"


def _summary(about: Facts) -> str:
  config, base = about.config, about.base
  link = f"[{base.name}](https://huggingface.co/{base.hub_id})" if base.hub_id else base.name
  trained = "LoRA adapters" if config.lora.rank else "every weight of the denoiser"
  merged = config.lora.rank and about.part != "lora"
  return (
    f"{link}, post-trained with reinforcement learning by {PAPER} towards the reward"
    f" {_rewards(config)}: {trained}, {about.iteration} iterations. This folder holds"
    f" {_KINDS[about.part]}{', with the adapters merged in' if merged else ''}, in {about.dtype}"
    f"{', averaged over training' if about.averaged else ''}. It was written by dancegrpo_jax"
    f" {dancegrpo_jax.__version__}."
  )


def _training(about: Facts) -> str:
  config, o = about.config, about.config.optimizer
  sampler, objective = config.sampler, config.objective
  clip = f", clip range {objective.clip_range:g}" if objective.kind == "grpo" else ""
  noise = f"{sampler.kind}, {sampler.steps} steps, noise level {sampler.noise_level:g}"
  rows = {
    "algorithm": f"{objective.kind}{clip}, KL weight {objective.kl.weight:g}",
    "iterations": str(about.iteration),
    "an iteration": f"{config.data.prompts_per_iteration} prompts with"
    f" {config.rollout.samples_per_prompt} samples each, {o.updates_per_iteration} optimizer steps",
    "sampler": f"{noise}, guidance {sampler.guidance_scale:g}",
    "optimizer": f"AdamW, learning rate {o.learning_rate:g}, {o.warmup_steps} steps of warm-up,"
    f" weight decay {o.weight_decay:g}",
    "samples": _samples(config.model),
    "prompts": _prompts(about, "prompts"),
    "held-out prompts": _prompts(about, "held_out"),
    "reward": _rewards(config),
    "seed": str(config.seed),
  }
  if config.lora.rank:
    rows["adapters"] = f"rank {config.lora.rank}, alpha {config.lora.alpha:g}"
  if config.ema.decay:
    rows["average of the weights"] = f"decay {config.ema.decay:g}"
  if about.start:
    rows["started from"] = f"the weights of {bases.published_name(about.start)}"
  lines = [f"| {name} | {value.replace('|', '&#124;')} |" for name, value in rows.items() if value]
  return "\n".join(["| what | value |", "| --- | --- |", *lines])


def _samples(model: ConfigDict) -> str:
  """The size of a sample."""
  size = f"{model.size[0]} x {model.size[1]} pixels"
  return size if model.frames == 1 else f"{model.frames} frames of {size}, {model.fps:g} a second"


def _prompts(about: Facts, field: str) -> str:
  """The source of the prompts and their number, where it is known."""
  source, count = about.config.data[field], about.counts.get(f"data.{field}")
  name = bases.published_name(source)
  return f"{count} of {name}" if count and source else name


def _results(about: Facts) -> list[str]:
  if not about.changes:
    return []
  start = "the weights it started from" if about.start else "base"
  lines = [
    f"| {each.prompts} {each.what} | {each.before:.4f} | {each.after:.4f} |"
    for each in about.changes
  ]
  head = f"| prompts | {start} | after {about.evaluated} iterations |"
  note = ""
  if about.config.ema.decay and not about.averaged:
    note = " They are of the averaged weights, and this folder holds the plain ones."
  return [
    "## Results",
    "Mean score of one sample of each prompt, with fixed noise and the deterministic sampler."
    + note,
    "\n".join([head, "| --- | --- | --- |", *lines]),
  ]


def _license(base: Base) -> str:
  if base.license:
    name = base.license_name or base.license
    return (
      f"The base model's licence is {name}, as {base.source} says. Read there what it asks of"
      " models that are made from it."
    )
  text = "See the base model: its licence is not known to the program that wrote this card."
  if base.name in ("assets/emoji-sd", "assets/emoji-flux"):
    text += (
      " It comes with dancegrpo_jax and learned from pictures of Noto Color Emoji, Copyright"
      " Google, SIL Open Font License 1.1."
    )
  return text


def _loading(about: Facts) -> str:
  """How diffusers load the folder, or dancegrpo_jax that of another family."""
  config, is_lora = about.config, about.part == "lora"
  if not loading.family_of(config).index_file:
    field = "lora.checkpoint" if is_lora else "model.checkpoint"
    flag = f"--config.{field}={about.name}"
    return f"`{flag}` of a command of dancegrpo_jax, with the config of the run."
  classes, lines = ["DiffusionPipeline"], []
  pretrained = f"DiffusionPipeline.from_pretrained({_quoted(bases.loadable(config, about.base))}"
  dtype = f"dtype=torch.{config.model.frozen_dtype if is_lora else about.dtype}"
  name = _quoted(about.name)
  if about.part == "pipeline":
    lines.append(f"pipeline = DiffusionPipeline.from_pretrained({name}, {dtype})")
  elif is_lora:
    lines += [
      f"pipeline = {pretrained}, {dtype})",
      f"pipeline.load_lora_weights({name})",
    ]
  else:
    place = loading.build_pipeline(config).components["denoiser"].folder
    network = weights.read_config(loading.checkpoint_folder(config) / place)["_class_name"]
    classes.append(network)
    lines += [
      f"{place} = {network}.from_pretrained({name}, {dtype})",
      f"pipeline = {pretrained}, {place}={place}, {dtype})",
    ]
  call = loading.family_of(config).diffusers_call(config, loading.read_files(config)[1])
  if call.scheduler:
    classes.append(call.scheduler.partition(".")[0])
    lines.append(f"pipeline.scheduler = {call.scheduler}")
  name, save, more = "image", 'image.save("sample.png")', []
  if call.fps:
    name, save = "video", f'export_to_video(video, "sample.mp4", fps={call.fps:g})'
    more = ["from diffusers.utils import export_to_video  # needs imageio and imageio-ffmpeg"]
  code = [
    "import torch",
    f"from diffusers import {', '.join(sorted(classes))}",
    *more,
    "",
    *lines,
    f"{name} = pipeline(",
    '  "a prompt",',
    *(f"  {argument}={value!r}," for argument, value in call.arguments.items()),
    f").{call.result}",
    save,
  ]
  folder = f"`{about.name}` is this folder. The arguments are those of the run's evaluations."
  return "\n".join(["```python", *code, "```", "", folder])


def _quoted(name: str) -> str:
  return json.dumps(name, ensure_ascii=False)
