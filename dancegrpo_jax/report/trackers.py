"""Where numbers and pictures of a run go beside its own files: TensorBoard and Weights & Biases.

The step of everything is the number of finished iterations, so that step 0 is the base model.
Values that are not finite are left out.
"""

import json
import math
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.report import clips, images
from dancegrpo_jax.settings import stored_config

_WIDTH = 512  # pixels; larger pictures are sent at this width
_BINS = 64  # of a histogram in Weights & Biases


class TensorBoard:
  """Writes events into `<workdir>/tensorboard`.

  Args:
    workdir: of the run.
    config: of the run, which is written as text.
    first: number of finished iterations; events of later ones, which are written again, are hidden.
  """

  def __init__(self, workdir: str | os.PathLike, config: ConfigDict, first: int):
    from tensorboardX import SummaryWriter  # with protobuf, for runs that turn it on

    folder = Path(workdir) / "tensorboard"
    self._writer = SummaryWriter(str(folder), purge_step=first + 1 if first else 0)
    text = "\n".join(f"    {line}" for line in stored_config.to_json(config).splitlines())
    self._writer.add_text("config", text, first)  # indented: Markdown's code

  def scalars(self, step: int, row: Mapping[str, float]) -> None:
    """Writes numbers by name."""
    for key, value in finite(row).items():
      self._writer.add_scalar(key, value, step)
    self._writer.flush()

  def histograms(self, step: int, samples: Mapping[str, np.ndarray]) -> None:
    """Writes a histogram of each array."""
    for name, values in _finite_arrays(samples).items():
      self._writer.add_histogram(name, values, step)

  def pictures(
    self, step: int, pixels: np.ndarray, prompts: Sequence[str], captions: Sequence[str]
  ) -> None:
    """Writes `[n, (frames,) height, width, 3]` in [0, 1], a video as a film strip. Each is under
    its prompt, so that a slider goes through the steps. There is no place for captions.
    """
    for number, (picture, prompt) in enumerate(zip(clips.pictures(pixels), prompts)):
      name = f"samples/{number:02d}_{re.sub(r'[^A-Za-z0-9]+', '_', prompt)[:60]}"
      self._writer.add_image(name, _small(picture), step, dataformats="HWC")
    self._writer.flush()

  def close(self) -> None:
    """Ends the file."""
    self._writer.close()


class Wandb:
  """Sends everything to Weights & Biases, by config.logging. A resumed run continues its curves.

  Args:
    workdir: of the run. The run's id there is kept in it.
    config: of the run.
    first: number of finished iterations.

  Raises:
    ConfigError: wandb is not installed, or does not start.
  """

  def __init__(self, workdir: str | os.PathLike, config: ConfigDict, first: int):
    try:
      import wandb
    except ImportError as error:
      raise ConfigError(
        "config.logging.wandb = True: wandb is not installed; pip install wandb, or set False"
      ) from error
    logging, named = config.logging, Path(workdir) / "wandb" / "run_id.txt"
    name = named.read_text() if first and named.exists() else secrets.token_hex(4)
    named.parent.mkdir(parents=True, exist_ok=True)
    self._wandb = wandb
    try:
      self._run = wandb.init(
        project=logging.wandb_project,
        entity=logging.wandb_entity or None,
        group=logging.wandb_group or None,
        name=logging.wandb_name or config.name,
        mode=logging.wandb_mode or None,  # None: WANDB_MODE, or else online
        id=name,
        resume="allow",
        dir=str(workdir),
        config=json.loads(stored_config.to_json(config)),
      )
    # No login, no network, no such entity: the client has many classes, with long messages.
    except Exception as error:
      reason = " ".join(str(error).split())[:200]
      raise ConfigError(
        f"config.logging.wandb = True: it does not start ({type(error).__name__}: {reason}); run"
        " `wandb login`, check logging.wandb_entity and logging.wandb_project, or set"
        " logging.wandb_mode = offline"
      ) from error
    named.write_text(name)

  def scalars(self, step: int, row: Mapping[str, float]) -> None:
    """Sends numbers by name."""
    self._run.log(finite(row), step=step)

  def histograms(self, step: int, samples: Mapping[str, np.ndarray]) -> None:
    """Sends a histogram of each array."""
    found = {
      f"histogram/{name}": self._wandb.Histogram(np_histogram=np.histogram(values, _BINS))
      for name, values in _finite_arrays(samples).items()
    }
    if found:
      self._run.log(found, step=step)

  def pictures(
    self, step: int, pixels: np.ndarray, prompts: Sequence[str], captions: Sequence[str]
  ) -> None:
    """Sends `[n, (frames,) height, width, 3]` in [0, 1] as one panel with captions, a video as a
    film strip.
    """
    shown = [
      self._wandb.Image(_small(picture), caption=caption)
      for picture, caption in zip(clips.pictures(pixels), captions)
    ]
    self._run.log({"samples": shown}, step=step)

  def close(self) -> None:
    """Waits until everything is sent."""
    self._run.finish()


def finite(row: Mapping[str, float]) -> dict[str, float]:
  """The values that are finite."""
  return {key: value for key, value in row.items() if math.isfinite(value)}


def _finite_arrays(samples: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The finite values of each array that has any, in one dimension."""
  kept = {name: values[np.isfinite(values)] for name, values in samples.items()}
  return {name: values for name, values in kept.items() if len(values)}


def _small(picture: np.ndarray) -> np.ndarray:
  """A picture as 0..255, at most `_WIDTH` pixels wide."""
  pixels = images.to_uint8(picture)
  height, width = pixels.shape[:2]
  if width <= _WIDTH:
    return pixels
  size = (_WIDTH, max(1, round(height * _WIDTH / width)))
  return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
