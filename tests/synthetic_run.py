"""Workdirs with made-up numbers, and a reader of their reports."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from dancegrpo_jax.report import metrics, page
from dancegrpo_jax.settings import config_file, stored_config
from dancegrpo_jax.types import Media

COMMON = str(Path(__file__).parent.parent / "configs" / "common.py")
PROMPTS = [
  "a red apple on a blue background",
  "a cat & <b>dog</b> on a green background",
  "a rocket on a white background",
]


def make_run(
  workdir: Path, iterations=40, prompts=None, size=32, kind="grpo", kl=0.0, every=10, frames=0
) -> Path:
  """A workdir with made-up numbers.

  The reward grows; one score failed, and one iteration has no ratio.
  """
  prompts, draw = prompts or PROMPTS, np.random.RandomState(0)
  fps = 8.0 if frames else None
  changes = [f"iterations={iterations}", "name=synthetic", f"objective.kind={kind}"]
  changes += [f"objective.kl.weight={kl}", "model.checkpoint=models/painter"]
  config = config_file.load(COMMON, ["logging.tensorboard=False", *changes])
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "config.json").write_text(stored_config.to_json(config))
  page.save_environment(workdir)
  with metrics.Writer(workdir, config) as writer:
    for i in range(iterations):
      row = make_row(i, draw)
      if kind == "dppo":
        row |= {"drop_fraction": row.pop("clip_fraction"), "policy_kl": 1e-4 * draw.rand()}
      if i % every == every - 1:
        row["samples/diversity"] = 0.3 * math.exp(-i / iterations)
      writer.write(i, row)
  for i in [0, *range(every, iterations + 1, every)]:
    pixels = np.stack(
      [sample(number, i / iterations, draw, size, frames) for number in range(len(prompts))]
    )
    scores = 0.5 + 0.2 * i / iterations + draw.normal(0, 0.005, len(prompts))
    held_out = 0.45 + 0.1 * i / iterations + draw.normal(0, 0.005, len(prompts))
    shown = [math.nan, *scores[1:]] if i == 10 else scores
    page.save_samples(workdir, i, Media(pixels, fps), prompts, shown, held_out)
    if i:
      best, worst = (sample(0, share, draw, size, frames) for share in (1, 0))
      rewards = draw.normal(0.5 + 0.15 * i / iterations, 0.05, 256)
      page.save_extremes(workdir, i, best, worst, fps, prompts[0], 0.71, 0.43, rewards)
  return workdir


def sample(number, share, draw, size, frames):
  """A picture, or a video in which it moves to the right."""
  still = picture(number, share, draw, size)
  if not frames:
    return still
  return np.stack([np.roll(still, size * frame // frames, axis=1) for frame in range(frames)])


def make_row(i, draw) -> dict[str, float]:
  mean = 0.5 + 0.15 * (1 - math.exp(-i / 15)) + draw.normal(0, 0.01)
  wide = 2e-4 * (1 + draw.rand())
  row = {
    "reward/mean": mean,
    "reward/std": 0.08,
    "reward/min": mean - 0.6,
    "reward/max": mean + 0.5,
  }
  row |= {
    "reward/failed": 0.0,
    "group/std_mean": 0.06,
    "group/zero_variance": 0.0,
    "advantage/abs_mean": 0.8,
  }
  row |= {
    "ratio/mean": 1 - wide / 10,
    "ratio/min": 1 - wide,
    "ratio/max": 1 + wide,
    "ratio/drift_max": 0.0,
  }
  row |= {
    "clip_fraction": 0.2 + 0.1 * draw.rand(),
    "approx_kl": 1e-8 * draw.rand(),
    "kl": 1e-3 * i,
    "grad_norm": 0.3 * draw.rand(),
  }
  row |= {"learning_rate": min(1, i / 10) * 1e-5, "samples_per_second": 40 + draw.rand()}
  row |= {
    f"time/{part}": seconds + 0.1 * draw.rand()
    for part, seconds in (("rollout", 2), ("update", 3), ("decode", 0.4))
  }
  row["time/total"] = 5.5
  return {key: math.nan for key in row} if i == 7 else row


def picture(number, sharpness, draw, size) -> np.ndarray:
  y, x = np.mgrid[0:size, 0:size] / size - 0.5
  inside = (np.hypot(x, y) < 0.2 + 0.05 * number)[..., None]
  clean = np.where(inside, [0.9, 0.2 + 0.2 * number, 0.1], [0.2, 0.4, 0.9])
  return sharpness * clean + (1 - sharpness) * draw.rand(size, size, 3)


def make_long_run(workdir: Path) -> Path:
  """2,000 iterations with 101 evaluations, and a prompt of 7,600 characters."""
  prompts = [*PROMPTS, "a wall of text, " * 475]
  return make_run(workdir, iterations=2000, prompts=prompts, every=20)


class Page(HTMLParser):
  """Checks the nesting of tags, and collects what a reader gets: text, pictures, links, charts."""

  VOID = {"meta", "img", "br", "link"}

  def __init__(self, html: str):
    super().__init__()
    self.open, self.tags, self.text = [], [], ""
    self.pictures, self.links, self.labels, self.figures = [], [], {}, []
    self.html = html
    self.feed(html)
    assert self.open == []

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    attributes = dict(attributes)
    if tag == "img" and "src" in attributes:
      self.pictures.append(attributes)
    elif tag == "a":
      self.links.append(attributes["href"])
    elif attributes.get("class") == "plot":
      title, _, description = attributes["aria-label"].partition(". ")
      self.labels[title] = description
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.tags.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if not {"style", "script"} & set(self.open):
      self.text += data

  def figure(self, title: str) -> str:
    """The HTML of a chart."""
    (found,) = re.findall(
      rf'<figure class="chart"><figcaption><b>{re.escape(title)}</b>.*?</figure>', self.html
    )
    return found


def y_axis(figure: str) -> list[float]:
  """The numbers at the y axis of a chart, from the lowest."""
  column = figure[figure.index('class="y"') : figure.index("<svg")]
  texts = re.findall(r'<span style="top:[\d.]+%">([^<]+)</span>', column)
  return [float(text.removesuffix(" %")) for text in texts]


def points(figure: str, css: str) -> np.ndarray:
  """The (x, y) of a curve, in the square with sides of 1000."""
  (path,) = re.findall(rf'<path class="{css}" d="([^"]*)"', figure)
  return np.array([[float(v) for v in p.split()] for p in re.split("[MLZ]+", path) if p])


def read(workdir: Path) -> Page:
  return Page(page.write(workdir).read_text())
