"""Command: makes the embedded models.

    python -m dancegrpo_jax.pretrain --config=configs/emoji_pretrain.py --stage=vae
        --workdir=runs/pretrain --out=assets

The stages are `frames` (an autoencoder of clips on single frames), `vae` (autoencoder), `clip`
(contrastive), `denoiser` (noise prediction), `flow` (rectified flow of pictures) and `video`
(rectified flow of clips); `all` runs those of the config in its order. The last three need the
weights of `vae` in --out. A stage that was interrupted continues from its last checkpoint when the
command is repeated.
"""

from dancegrpo_jax.devices import interrupts

if __name__ == "__main__":
  interrupts.watch()  # before the imports below, which take seconds

import argparse
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dancegrpo_jax import errors, programs, strict_json
from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.data import emoji
from dancegrpo_jax.devices import accelerator, out_of_memory
from dancegrpo_jax.pretrain import loading
from dancegrpo_jax.pretrain.stages import STAGES, Stage
from dancegrpo_jax.report import progress
from dancegrpo_jax.report.progress import phase
from dancegrpo_jax.settings import command_line
from dancegrpo_jax.types import PyTree

FIELDS = ("params", "opt_state", "ema")  # of a stage's state


def fit(stage: Stage, config: ConfigDict, workdir: Path, save_every: int = 400) -> PyTree:
  """Trains a stage to its last step, from the workdir's checkpoint if there is one.

  Args:
    stage: what is trained.
    config: of pretraining.
    workdir: of checkpoints and logs.
    save_every: steps between checkpoints.

  Returns:
    The averaged parameters.
  """
  settings = config[stage.name]
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=settings.learning_rate,
    warmup_steps=settings.warmup,
    decay_steps=settings.steps,
    end_value=1e-5,
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-4)
  )
  step_fn = out_of_memory.Guarded("pretraining", programs.fit_step(stage.loss, optimizer))
  state = (stage.params, optimizer.init(stage.params), jax.tree.map(jnp.copy, stage.params))
  folder, start = workdir / stage.name, 0
  if store.latest(folder) is not None:
    restored = store.restore(folder, dict(zip(FIELDS, jax.eval_shape(lambda: state))))
    start, state = restored.iteration, tuple(restored.state[name] for name in FIELDS)
    print(f"{stage.name}: resuming at step {start}", flush=True)
  begin = time.monotonic()
  with store.Saver(folder, keep=1) as saver, (workdir / f"{stage.name}.jsonl").open("a") as log:
    for step in progress.steps(f"{stage.name}: step", range(start, settings.steps)):
      # The decay grows to its value; otherwise the random start would stay in the average for
      # thousands of steps.
      decay = min(settings.ema, (step + 1) / (step + 10))
      key = jax.random.fold_in(jax.random.key(config.seed + 1), step)
      state, metrics = step_fn(state, stage.batch(step), key, np.float32(decay))
      if step % 50 == 0 or step == settings.steps - 1:
        row = {"step": step, "seconds": round(time.monotonic() - begin, 1)}
        row |= {name: float(value) for name, value in metrics.items()}
        text = "  ".join(f"{name} {value:.5g}" for name, value in row.items())
        print(f"{stage.name}: {text}", flush=True)
        print(strict_json.dumps(row), file=log, flush=True)
      if (step + 1) % save_every == 0 or step == settings.steps - 1:
        saver.save(step + 1, dict(zip(FIELDS, state)), {"stage": stage.name})
  return dict(zip(FIELDS, state))["ema"]


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  parser.add_argument("--stage", default="all", choices=("all", *STAGES))
  parser.add_argument("--workdir", default="runs/pretrain", help="data set, checkpoints and logs")
  parser.add_argument("--out", default="assets", help="where the folders of models are written")
  parser.add_argument(
    "--font",
    default=os.environ.get("EMOJI_FONT", emoji.FONT),
    help="NotoColorEmoji.ttf (CBDT build)",
  )


def run(config: ConfigDict, stage: str, workdir: Path, out: Path, font: str) -> None:
  """Trains and exports one stage, or all of them in their order.

  Args:
    config: of pretraining.
    stage: a name in `STAGES`, or "all".
    workdir: of the data set, checkpoints and logs.
    out: the folder of the models.
    font: NotoColorEmoji.ttf.

  Raises:
    ConfigError: the config has no such stage, or has a value that doesn't fit; the font or the
      weights of an earlier stage are missing or unfit.
  """
  if stage not in ("all", *config.stages):
    raise errors.ConfigError(
      f"--stage={stage}: not a stage of {config.name}; use all, {', '.join(config.stages)}"
    )
  try:
    emoji.check_font(font)
    workdir.mkdir(parents=True, exist_ok=True)
    chosen_stages = list(config.stages) if stage == "all" else [stage]
    print(f"pretraining {', '.join(chosen_stages)} in {workdir}, into {out}", flush=True)
    with phase("drawing the samples, or reading them"):
      data = loading.load(config, font, workdir, out)
    accelerator.say_share(jax.default_backend())
    for name in chosen_stages:
      with phase(f"preparing {name}"):
        chosen = STAGES[name](config, data, out)
      with phase(f"training {name}"):
        params = fit(chosen, config, workdir)
      with phase(f"writing {name}"):
        chosen.export(params)
  except (ValueError, FileNotFoundError) as error:
    raise errors.ConfigError(str(error)) from error


def main(argv: list[str]) -> int:
  """Reads the flags and trains. Returns the exit code, which is 2 after a mistake."""

  def command() -> None:
    line = command_line.parse_argv(argv, "Make the embedded models.", add_flags)
    accelerator.start()
    flags = line.flags
    command_line.require_writable(f"--workdir={flags.workdir}", Path(flags.workdir))
    command_line.require_writable(f"--out={flags.out}", Path(flags.out))
    with progress.Progress():
      run(
        line.config,
        flags.stage,
        workdir=Path(flags.workdir),
        out=Path(flags.out),
        font=flags.font,
      )

  return command_line.exit_on_mistake(command)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
