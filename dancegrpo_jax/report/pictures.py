"""The pictures of the page: before and after, over training, best and worst.

A picture is embedded, so that the page can be moved: a small one as it is, a larger one as a
thumbnail in JPEG. It links to the PNG file beside the page. A video is embedded as a film strip,
with a small version that plays where the strip is pointed at.
"""

import base64
import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dancegrpo_jax.report import clips, images
from dancegrpo_jax.report.charts import number_text
from dancegrpo_jax.report.samples import Evaluation, Extremes

_THUMBNAIL = 256  # pixels of the width of a thumbnail
_STRIP = 512  # pixels of the width of a thumbnail of a film strip, which is much less high
_AS_IT_IS = 24_000  # bytes of a file that is embedded unchanged
_MOVING = (96, 9)  # pixels of the width of a small version of a video, and frames at most
_MOST_PAIRS = 16  # prompts before and after
_MOST_ROWS, _MOST_COLUMNS = 6, 7  # prompts and iterations, over training
_MOST_EXTREMES = 4
_LONGEST = 160  # characters of a prompt beside a picture


class Embedded(NamedTuple):
  """A picture.

  Attributes:
    uri: its data; of a video the film strip's.
    width, height: of its file, or of the strip, in pixels.
    is_small: whether the page enlarges its pixels.
    moving: the data of a small version of a video; "" for an image.
  """

  uri: str
  width: int
  height: int
  is_small: bool
  moving: str = ""


def before_after(evaluations: Sequence[Evaluation], workdir: Path) -> dict[str, Any]:
  """The first evaluation and the last one: "names" of both, "pairs" of pictures, and "left_out",
  the number of prompts for which there is no room.
  """
  if not evaluations:
    return {"names": [], "pairs": [], "left_out": 0}
  shown = [evaluations[0], evaluations[-1]] if len(evaluations) > 1 else [evaluations[0]]
  prompts = [p for p in evaluations[0].prompts if all(p in each.prompts for each in shown)]
  prompts = list(dict.fromkeys(prompts))
  pairs = []
  for prompt in _spaced(prompts, _MOST_PAIRS):
    sides = [_cell(each, prompt, workdir) for each in shown]
    pairs.append({**_texts(prompt), "sides": sides, "gain": _gain(shown, prompt)})
  return {
    "names": [name(each.iteration) for each in shown],
    "pairs": pairs,
    "left_out": len(prompts) - len(pairs),
  }


def over_training(evaluations: Sequence[Evaluation], workdir: Path) -> dict[str, Any]:
  """Rows of pictures for some of the prompts: the first evaluation, the last one and some between;
  nothing where there are only two.
  """
  if len(evaluations) < 3:
    return {"columns": 0, "rows": []}
  shown = _spaced(evaluations, _MOST_COLUMNS)
  rows = [
    {**_texts(prompt), "cells": [_cell(each, prompt, workdir) for each in shown]}
    for prompt in _spaced(list(dict.fromkeys(shown[0].prompts)), _MOST_ROWS)
  ]
  return {"columns": len(shown), "rows": rows}


def best_and_worst(pairs: Sequence[Extremes], workdir: Path) -> list[dict[str, Any]]:
  """Pairs of a best and a worst sample."""
  result = []
  for pair in _spaced(pairs, _MOST_EXTREMES):
    sides = [
      _picture(
        file=pair.files.get(side),
        score=pair.scores[side],
        caption=side,
        prompt=pair.prompt,
        workdir=workdir,
      )
      for side in ("best", "worst")
    ]
    result.append({"title": f"iteration {pair.iteration}", **_texts(pair.prompt), "sides": sides})
  return result


def has_videos(evaluations: Sequence[Evaluation], pairs: Sequence[Extremes]) -> bool:
  """Whether the pictures of the page are film strips."""
  files = [file for each in evaluations for file in each.pictures]
  files += [file for pair in pairs for file in pair.files.values()]
  return any(file.suffix == ".webp" for file in files)


def name(iteration: int) -> str:
  """What a column is called."""
  return "base" if iteration == 0 else f"iteration {iteration}"


def short(prompt: str) -> str:
  """A prompt as it stands beside a picture."""
  return prompt if len(prompt) <= _LONGEST else f"{prompt[: _LONGEST - 1].rstrip()}…"


def _texts(prompt: str) -> dict[str, Any]:
  return {"prompt": short(prompt), "is_cut": len(prompt) > _LONGEST}


def _gain(shown: Sequence[Evaluation], prompt: str) -> str:
  """How the score of a prompt has changed; "" where there is only one, or it failed."""
  scores = [each.scores[each.prompts.index(prompt)] for each in shown]
  if len(scores) < 2 or scores[0] is None or scores[-1] is None:
    return ""
  return f"{scores[-1] - scores[0]:+.3f}"


def _side(evaluation: Evaluation, prompt: str, workdir: Path) -> dict[str, Any]:
  """A picture of an evaluation. A resumed run may have other prompts than before, because
  evaluation.prompts may change: without the prompt there is no picture.
  """
  caption = name(evaluation.iteration)
  if prompt not in evaluation.prompts:
    return {"image": None, "name": caption}
  index = evaluation.prompts.index(prompt)
  if index >= len(evaluation.pictures):
    return {"image": None, "name": caption}
  score = evaluation.scores[index]
  return _picture(evaluation.pictures[index], score, caption, prompt, workdir)


def _cell(evaluation: Evaluation, prompt: str, workdir: Path) -> dict[str, Any]:
  """As `_side`, with a name that fits below a narrow picture."""
  side = _side(evaluation, prompt, workdir)
  return side | {"name": f"{evaluation.iteration}" if evaluation.iteration else "base"}


def _picture(
  file: Path | None, score: float | None, caption: str, prompt: str, workdir: Path
) -> dict[str, Any]:
  if file is None or not file.exists():
    return {"image": None, "name": caption}
  return {
    "image": _embedded(file, file.stat().st_mtime_ns),
    "name": caption,
    "file": file.relative_to(workdir).as_posix(),
    "alt": f"{caption}: {short(prompt)}",
    "score": "failed" if score is None else number_text(score),
  }


def _spaced(items: Sequence[Any], most: int) -> list[Any]:
  """At most `most` of the items, evenly spaced, with the first and the last."""
  if len(items) <= most:
    return list(items)
  return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


@functools.lru_cache(maxsize=512)
def _embedded(file: Path, changed: int) -> Embedded:
  """A picture. It is kept until its file changes, as the page is written after each evaluation."""
  del changed  # for the cache alone
  if file.suffix == ".webp":
    return _embedded_clip(file)
  with Image.open(file) as image:
    width, height = image.size
    if width <= _THUMBNAIL and file.stat().st_size <= _AS_IT_IS:
      uri = _uri("png", file.read_bytes())
    else:
      uri = _thumbnail(image)
  return Embedded(uri=uri, width=width, height=height, is_small=width < 100)


def _embedded_clip(file: Path) -> Embedded:
  """A video as a film strip, with a small version that plays."""
  frames, fps = clips.read(file)
  is_small = frames.shape[2] < 100
  strip = Image.fromarray(images.to_uint8(clips.strip(frames / 255)))
  still = io.BytesIO()
  strip.save(still, "PNG")
  width, most = _MOVING
  buffer, seconds = io.BytesIO(), len(frames) / fps
  shown = np.unique(np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int))
  small = [Image.fromarray(frames[number]) for number in shown]
  for image in small:
    image.thumbnail((width, 2 * width))
  small[0].save(
    buffer,
    format="WEBP",
    save_all=True,
    append_images=small[1:],
    duration=round(1000 * seconds / len(small)),
    loop=0,
    lossless=is_small,
    quality=60,
  )
  return Embedded(
    uri=_uri("png", still.getvalue()) if is_small else _thumbnail(strip, _STRIP),
    width=strip.width,
    height=strip.height,
    is_small=is_small,
    moving=_uri("webp", buffer.getvalue()),
  )


def _thumbnail(image: Image.Image, width: int = _THUMBNAIL) -> str:
  small, buffer = image.convert("RGB"), io.BytesIO()
  small.thumbnail((width, 2 * _THUMBNAIL))
  small.save(buffer, "JPEG", quality=85)
  return _uri("jpeg", buffer.getvalue())


def _uri(kind: str, content: bytes) -> str:
  return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
