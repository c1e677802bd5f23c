"""The verifier of moving emoji: what a clip shows, judged in closed form, without a network.

Its terms have the names of VideoAlign's (arXiv 2501.13918). 1 is the best score of each:

- vq, visual quality: whether the object stays the same from frame to frame.
- mq, motion quality: whether it moves or changes its size at all, and how smoothly.
- ta, text alignment: half for the motion of the caption (minus a half for the opposite one), and
  half for its emoji on its background.
- direction: 1 where the motion is that of the caption, else 0. Its mean is a share of clips.

It is meant to be watched beside a learned reward: training can't please what it isn't shown.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict
from PIL import Image

from dancegrpo_jax.data import emoji, moving_emoji
from dancegrpo_jax.data.moving_emoji import Scene
from dancegrpo_jax.rewards import moving_object
from dancegrpo_jax.rewards.base import Files, Networks, Reward, RewardKind
from dancegrpo_jax.types import Example, Media

TERMS = ("vq", "mq", "ta", "direction")
FIELD = "reward.moving_emoji.subjects"
FEWEST = 3  # frames, of which a second difference is made

# What is slower than this is no full motion: pixels a frame, and the change of the side in a frame
# as a share of it. The slowest that are drawn have 0.8 and 0.09.
SLOW = 0.5
SLOW_GROWTH = 0.05
SHAKE = 1.5  # pixels a frame squared, at which smoothness is 1/e
CHANGE = 0.05  # of pixels in [0, 1], at which constancy is 1/e
NEARNESS = 0.15  # distance of two backgrounds in RGB, at which their agreement is 1/e
TEMPERATURE = 0.03  # of the softmax over correlations
# A motion is right where it agrees with the caption's by more than this. That is a little more than
# cos 45 degrees, so that no motion is right for two directions.
RIGHT = 0.71
# An emoji of nearly the colour of its background, which shows fewer pixels than this, can't be
# judged: while it shrinks it isn't seen.
VISIBLE = 15.0


class Subjects(NamedTuple):
  """The emoji, in the order of `moving_emoji.NAMES`, blurred as clips are.

  Attributes:
    colours: RGB in [0, 1], multiplied by alpha.
    alphas: in [0, 1].
  """

  colours: Float[np.ndarray, "n 3 h w"]
  alphas: Float[np.ndarray, "n 1 h w"]


def read_subjects(path: Path) -> Subjects:
  """Reads the file that `python -m dancegrpo_jax.data.moving_emoji --write-subjects` writes.

  Raises:
    ValueError: the file is no such image; one line.
  """
  tile, columns = moving_emoji.TILE, moving_emoji.COLUMNS
  height, width = len(moving_emoji.NAMES) // columns * tile, columns * tile
  try:
    with Image.open(path) as image:
      found = f"{image.mode} of {image.width} x {image.height}"
      pixels = np.asarray(image, np.float32) / 255
  except OSError as error:
    found, pixels = str(error), np.zeros(())
  if pixels.shape != (height, width, 4):
    raise ValueError(
      f"config.{FIELD} = {str(path)!r}: must be an image with RGBA of {width} x {height}, as"
      f" `python -m dancegrpo_jax.data.moving_emoji --write-subjects=FOLDER` writes it ({found})"
    )
  rows = pixels.reshape(-1, tile, columns, tile, 4).transpose(0, 2, 4, 1, 3)
  tiles = rows.reshape(-1, 4, tile, tile)
  colours, alphas = tiles[:, :3], tiles[:, 3:]
  return Subjects(colours=moving_object.blur(colours * alphas), alphas=moving_object.blur(alphas))


def on_backgrounds(
  subjects: Subjects, backgrounds: Float[np.ndarray, "b 3"]
) -> Float[np.ndarray, "b n 3 h w"]:
  """Every emoji on every background, minus the background."""
  return subjects.colours - subjects.alphas * backgrounds[:, None, :, None, None]


def likeness(
  pictures: Float[np.ndarray, "b 3 side side"],
  subjects: Subjects,
  backgrounds: Float[np.ndarray, "b 3"],
) -> Float[np.ndarray, "b n"]:
  """How much the object of each clip is each of the emoji: shares that sum to 1.

  Emoji are put on the clip's own background and cut out at the centre of what is seen of them
  there, as `moving_object.measure` does it with a clip. The shares are a softmax over normalised
  cross-correlations.
  """
  differences = on_backgrounds(subjects, backgrounds.astype(np.float32))
  areas, centres = moving_object.located(differences)
  templates = moving_object.cut_out(differences, centres, np.ones_like(areas))
  correlations = np.einsum("bcij,bncij->bn", _normalised(pictures), _normalised(templates))
  weights = np.exp((correlations - correlations.max(1, keepdims=True)) / TEMPERATURE)
  return weights / weights.sum(1, keepdims=True)


def _normalised(pictures: Float[np.ndarray, "... 3 h w"]) -> Float[np.ndarray, "... 3 h w"]:
  """Pictures without their mean colour, of length 1; those of one colour are 0."""
  centred = pictures - pictures.mean((-1, -2), keepdims=True)
  length = np.sqrt(np.square(centred).sum((-1, -2, -3), keepdims=True))
  return (centred / np.maximum(length, 1e-6)).astype(np.float32)


def judge(
  clips: Float[np.ndarray, "b f h w 3"], scenes: list[Scene], subjects: Subjects
) -> dict[str, Float[np.ndarray, "b"]]:
  """The scores of clips by term of `TERMS`.

  Args:
    clips: finite pixels in [0, 1], at least `FEWEST` frames.
    scenes: what each clip shall show.
    subjects: of `read_subjects`.
  """
  found = moving_object.measure(clips)
  wanted = [moving_emoji.MOTIONS[scene.motion] for scene in scenes]
  changes_size = np.array([direction is None for direction in wanted])
  directions = np.array([direction or (0, 0) for direction in wanted])
  signs = np.array([1 if scene.motion == "growing" else -1 for scene in scenes])

  speed = np.linalg.norm(found.velocity, axis=1)
  along = (found.velocity * directions).sum(1) / np.maximum(speed, SLOW)
  agreement = np.where(changes_size, np.clip(signs * found.growth / SLOW_GROWTH, -1, 1), along)
  # Of any motion, because mq doesn't read the caption: ta says whether it's the right one.
  amplitude = np.minimum(np.maximum(speed / SLOW, np.abs(found.growth) / SLOW_GROWTH), 1)
  smoothness = np.exp(-((found.shake / SHAKE) ** 2))

  numbers = [moving_emoji.NAMES.index(scene.name) for scene in scenes]
  subject = likeness(found.picture, subjects, found.background)[np.arange(len(scenes)), numbers]
  colours = np.array([emoji.COLOURS[scene.colour] for scene in scenes]) / 255
  distance = np.linalg.norm(found.background - colours, axis=1)
  background = np.exp(-((distance / NEARNESS) ** 2))

  return {
    "vq": found.seen * np.exp(-found.change / CHANGE),
    "mq": found.seen * smoothness * amplitude,
    "ta": found.seen * (agreement + subject * background) / 2,
    "direction": (found.seen * agreement > RIGHT).astype(np.float32),
  }


def can_be_judged(subjects: Subjects) -> set[tuple[str, str]]:
  """The (name, colour) pairs of which enough is seen, see `VISIBLE`."""
  colours = np.array(list(emoji.COLOURS.values()), np.float32) / 255
  areas, _ = moving_object.located(on_backgrounds(subjects, colours))
  return {
    (name, colour)
    for colour, row in zip(emoji.COLOURS, areas, strict=True)
    for name, area in zip(moving_emoji.NAMES, row, strict=True)
    if area > VISIBLE
  }


def _scene(prompt: str) -> Scene | None:
  """The scene of a caption, None for another text."""
  try:
    return moving_emoji.scene_of(prompt)
  except ValueError:
    return None


def refusal(shape: tuple[int, ...]) -> str:
  """Why samples of a shape can't be judged; "" where they can."""
  side = moving_emoji.SIZE
  if len(shape) == 4 and shape[0] >= FEWEST and shape[1:3] == (side, side):
    return ""
  return (
    f"config.reward: the reward 'moving_emoji' judges clips of at least {FEWEST} frames of {side} x"
    f" {side} pixels, and the model draws {list(shape)}; take it out of reward.terms and"
    " reward.watch"
  )


def build(name: str, section: ConfigDict, files: Files, networks: Networks) -> Reward:
  """The verifier; its section has `subjects`, the file with the emoji.

  A clip fails where one of its pixels is not finite, where its prompt is no caption of moving
  emoji, and where the emoji can't be seen on its background.
  """
  del networks
  subjects = read_subjects(files.file(FIELD, section.subjects))
  visible = can_be_judged(subjects)

  def score(media: Media, examples: list[Example]) -> dict[str, np.ndarray]:
    clips = np.asarray(media.pixels, np.float32)
    if problem := refusal(clips.shape[1:]):
      raise ValueError(problem)
    finite = np.asarray(np.isfinite(clips).reshape(len(clips), -1).all(axis=1))
    scenes = {
      row: scene
      for row, example in enumerate(examples)
      if finite[row] and (scene := _scene(example.prompt)) and (scene.name, scene.colour) in visible
    }
    scores = np.full((len(TERMS), len(clips)), np.nan, np.float32)
    if scenes:
      rows = list(scenes)
      judged = judge(clips[rows], list(scenes.values()), subjects)
      scores[:, rows] = [judged[term] for term in TERMS]
    return {f"{name}/{term}": row for term, row in zip(TERMS, scores, strict=True)}

  terms = tuple(f"{name}/{term}" for term in TERMS)
  return Reward(name=name, kind="host", terms=terms, score=score, refusal=refusal)


KIND = RewardKind(build=build, section="moving_emoji")
