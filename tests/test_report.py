"""The report tells the story of a run first, is right after every ending, and stays small."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from scipy.spatial.distance import pdist
from synthetic_run import COMMON, PROMPTS, make_long_run, make_run, points, read, y_axis

from dancegrpo_jax.report import charts, metrics, page, status, story
from dancegrpo_jax.settings import config_file, stored_config
from dancegrpo_jax.training import diversity
from dancegrpo_jax.types import Media


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp("runs") / "synthetic")


@pytest.fixture(scope="module")
def html(run):
  return read(run)


# The story


def test_it_needs_no_other_file(run, html):
  """Pictures are inside. Links lead to files of the workdir; nothing leads to the network."""
  assert all(each["src"].startswith("data:image/") for each in html.pictures)
  assert html.links and all((run / link).is_file() for link in html.links)
  assert not re.search(r"<link|@import|url\(|fetch\(|src=\"(?!data:)", html.html)


def test_the_story_comes_first(html):
  parts = (
    "painter trained on clip",
    "In 40 iterations",
    "fixed prompts, base → now",
    "Fixed prompts, before and after",
    "Fixed and held-out prompts are drawn",
    "Distribution of the reward",
    "Diversity",
    "Fixed prompts over training",
    "Importance ratio",
    "How it was run",
    "rollout.samples_per_prompt",
  )
  places = [html.text.index(part) for part in parts]
  assert places == sorted(places)


def test_the_verdict_is_student_s_interval_of_the_paired_scores(run, html):
  first, last = (
    json.loads((run / "samples" / f"iteration_{i:06d}" / "prompts.json").read_text())
    for i in (0, 40)
  )
  for kind in ("scores", "held_out"):
    interval = stats.ttest_rel(last[kind], first[kind]).confidence_interval(0.95)
    half = (interval.high - interval.low) / 2
    before, after = np.mean(first[kind]), np.mean(last[kind])
    clause = f"rose from {before:.3f} to {after:.3f} ({after - before:+.3f} ± {half:.3f})"
    assert clause in html.text
  seconds = 39 * 5.5  # one row has no number
  assert f"40 iterations ({metrics.duration(seconds)} on 8 x cpu)" in html.text


@pytest.mark.parametrize(
  "before, after, words",
  [
    ([0.5, 0.5, 0.5], [0.6, 0.61, 0.62], "rose from 0.500 to 0.610"),
    ([0.6, 0.61, 0.62], [0.5, 0.5, 0.5], "fell from 0.610 to 0.500"),
    ([0.1, 0.9, 0.5], [0.9, 0.1, 0.51], "which may be chance"),
    ([0.5], [0.7], "the fixed prompt went from 0.500 to 0.700 (+0.200)"),
    ([0.5, None, 0.7], [0.6, 0.1, 0.81], "mean score of 2 fixed prompts rose from 0.600 to 0.705"),
  ],
)
def test_a_change_is_said_as_it_is(before, after, words):
  assert words in story._clause(story.change(before, after), "fixed")


def test_before_stands_above_after(run, html):
  """The first pictures of the page, by prompt: the base's, then the last one's."""
  shown = [each["alt"] for each in html.pictures[:6]]
  assert shown == [f"{name}: {p}" for p in PROMPTS for name in ("base", "iteration 40")]
  first = base64.b64decode(html.pictures[1]["src"].partition(",")[2])
  assert first == (run / "samples" / "iteration_000040" / "00.png").read_bytes()
  assert "failed" in html.text  # a score of iteration 10 is NaN


def test_other_prompts_after_a_resume_are_not_compared(tmp_path):
  pixels = np.zeros((2, 8, 8, 3))
  page.save_samples(tmp_path, 0, Media(pixels), ["a", "b"], [0.1, 0.2])
  page.save_samples(tmp_path, 5, Media(pixels), ["c", "b"], [0.9, 0.3])
  metrics.Writer(tmp_path, config_file.load(COMMON, ["logging.tensorboard=False"])).write(4, {})
  html = read(tmp_path)
  assert [each["alt"] for each in html.pictures] == ["base: b", "iteration 5: b"]
  assert "went from 0.200 to 0.300" in html.text


# The charts


def test_the_reward_s_axis_fits_mean_and_spread(tmp_path):
  """Single samples between 0 and 1 don't make a rise from .657 to .752 flat."""
  config = config_file.load(COMMON, ["logging.tensorboard=False"])
  with metrics.Writer(tmp_path, config) as writer:
    for i in range(30):
      mean = 0.657 + 0.095 * i / 29
      extremes = {"reward/min": 0.0, "reward/max": 1.0}
      writer.write(i, {"reward/mean": mean, "reward/std": 0.05} | extremes)
  figure = read(tmp_path).figure("Reward")
  axis = y_axis(figure)
  assert 0.55 <= axis[0] <= 0.607 and 0.802 <= axis[-1] <= 0.85
  rise = np.ptp(points(figure, "line c2")[:, 1])
  assert rise == pytest.approx(1000 * 0.095 / (axis[-1] - axis[0]), abs=1) and rise > 300


def test_one_far_value_does_not_flatten_a_chart():
  values = [1 + 0.1 * math.sin(i) for i in range(100)]
  values[50] = 1e6
  figure = charts.chart("t", "u", [charts.Series("a", range(100), values)])
  assert y_axis(figure)[-1] < 2 and "1 far value outside of the chart" in figure
  assert np.ptp(points(figure, "line c1")[:50, 1]) > 500


def test_the_first_chart_has_fixed_and_held_out_prompts_with_the_base(run, html):
  assert next(iter(html.labels)) == "Reward"
  for line in ("fixed prompts", "held-out prompts", "samples of training"):
    assert line in html.labels["Reward"]
  scores = [
    json.loads((run / "samples" / f"iteration_{i:06d}" / "prompts.json").read_text())["held_out"]
    for i in range(0, 41, 10)
  ]
  figure = html.figure("Reward")
  drawn, axis = points(figure, "line c3"), y_axis(figure)
  expected = [1000 * (axis[-1] - np.mean(each)) / (axis[-1] - axis[0]) for each in scores]
  np.testing.assert_allclose(drawn[:, 1], expected, atol=0.1)
  np.testing.assert_allclose(drawn[:, 0], [0, 250, 500, 750, 1000], atol=0.1)


def test_charts_of_what_is_turned_off_or_zero_are_left_out(run, html, tmp_path):
  assert not [title for title in html.labels if "KL" in title]
  assert "Drift before the first update" not in html.labels
  assert "not drawn: Failed or flat, Drift before the first update" in html.text
  penalized = read(make_run(tmp_path / "kl", iterations=10, kl=0.1))
  assert "KL to the initial model" in penalized.labels


def test_an_algorithm_shows_what_it_reports(html, tmp_path):
  """Where GRPO shows clipping, Flow-DPPO shows dropped samples and the distance of the policy."""
  other = read(make_run(tmp_path / "other", kind="dppo"))
  titles = list(html.labels)
  place = titles.index("Clipped")
  expected = [*titles[:place], "Dropped", "Divergence", *titles[place + 1 :]]
  assert list(other.labels) == expected
  assert "GRPO on stable diffusion" in html.text and "DPPO on stable diffusion" in other.text


def test_the_histogram_counts_the_kept_rewards(run, html):
  figure = html.figure("Distribution of the reward")
  (low, *_, high) = [
    float(text)
    for text in re.findall(r'left:[\d.]+%">([^<]+)', figure[figure.index('class="x"') :])
  ]
  top = y_axis(figure)[-1] / 100
  for css, iteration in (("outline c2", 10), ("bars c1", 40)):
    file = run / "samples" / f"extremes_{iteration:06d}" / "scores.json"
    rewards = json.loads(file.read_text())["rewards"]
    assert len(rewards) == 256
    share = np.histogram(rewards, 24, (low, high))[0] / 256
    used = np.flatnonzero(share)
    drawn = 1 - points(figure, css)[1:-1:2, 1] / 1000
    np.testing.assert_allclose(drawn * top, share[used[0] : used[-1] + 1], atol=1e-3)


def test_diversity_is_the_mean_distance_of_pairs_within_a_prompt():
  draw = np.random.RandomState(0)
  rows = {number: draw.rand(32, 32, 3) for number in (0, 1, 3, 4, 6, 11)}  # groups of 4
  expected = np.mean(
    [
      np.mean(pdist([rows[n].ravel() for n in group]) / math.sqrt(32 * 32 * 3))
      for group in ([0, 1, 3], [4, 6])
    ]
  )
  assert diversity.within_groups(rows, 4) == pytest.approx(expected)
  assert math.isnan(diversity.within_groups({0: rows[0], 5: rows[1]}, 4))
  same = {0: rows[0], 1: rows[0]}
  assert diversity.within_groups(same, 4) == 0
  pixels = draw.rand(2, 64, 100, 3).astype(np.float32)
  small = diversity.reduced(pixels)
  assert small.shape == (2, 32, 50, 3)
  assert small[1, 3, 7, 2] == pytest.approx(pixels[1, 6:8, 14:16, 2].mean())


def test_diversity_is_drawn_from_zero(html):
  axis = y_axis(html.figure("Diversity"))
  assert axis[0] == 0 and axis[-1] >= 0.3 * math.exp(-9 / 40)


# Endings


def write_status(folder: Path, **values) -> None:
  (folder / status.FILE).write_text(json.dumps(values))


@pytest.mark.parametrize("rows", [0, 3])
def test_an_error_is_what_the_page_says_first(tmp_path, rows):
  config = config_file.load(COMMON, ["logging.tensorboard=False"])
  (tmp_path / "config.json").write_text(stored_config.to_json(config))
  with metrics.Writer(tmp_path, config) as writer:
    for i in range(rows):
      writer.write(i, {"reward/mean": math.nan, "reward/failed": 1.0})
  reason = "stopped at iteration 3: 100% of the rewards failed & <more>"
  write_status(tmp_path, state="failed", ended="noon", reason=reason, traceback="")
  (tmp_path / "reward_errors.txt").write_text("x\n" * 9000 + "ConnectionError: <refused>\n")
  html = read(tmp_path)
  assert f"Ended by an error after {rows} of {config.iterations} iterations, noon." in html.text
  assert html.text.index(reason) < html.text.index("How it was run")
  assert "ConnectionError: <refused>" in html.text and len(html.text) < 30_000
  assert "No iteration has been run yet" not in html.text and "Running" not in html.text
  assert ("no reward was a number" in html.text) == bool(rows)


def test_every_ending_is_said(tmp_path):
  for state, text in (
    ("finished", "Finished after 0 of"),
    ("stopped", "Stopped after 0 of"),
    ("running", "Running: 0 of"),
    ("", "how the run ended is not recorded"),
  ):
    write_status(tmp_path, state=state, ended="noon", reason="the reason", traceback="the trace")
    html = read(tmp_path)
    assert text in html.text and "the reason" in html.text and "the trace" in html.text


def test_a_run_that_has_only_started_gets_a_report(tmp_path):
  assert "No iteration has been finished" in read(tmp_path).text
  metrics.Writer(tmp_path, config_file.load(COMMON, ["logging.tensorboard=False"])).write(
    0, {"reward/mean": 0.5}
  )
  html = read(tmp_path)
  assert "svg" in html.tags and "mean reward of training went from 0.5000" in html.text


def test_how_it_was_run_is_on_the_page(run, tmp_path):
  workdir = shutil.copytree(run, tmp_path / "copy")
  write_status(
    workdir,
    state="finished",
    began="morning",
    command="python -m dancegrpo_jax.main --config=x.py:small",
    directory="/home/me",
    workdir="/data/runs/17",
    config_file="x.py:small",
    changed={"seed": [0, 3]},
  )
  text = " ".join(read(workdir).text.split())
  assert "Run synthetic in /data/runs/17" in text
  assert "commandpython -m dancegrpo_jax.main --config=x.py:small" in text
  assert "fieldx.py:smallthis run seed03" in text
  # What the config file changes is what differs from configs/common.py and not by the command.
  assert "model.checkpoint" in text.split("Fields that the config file sets")[1].split("All")[0]
  environment = json.loads((run / "environment.json").read_text())
  assert environment["jax"] in text and environment["dancegrpo_jax"] in text
  commit = subprocess.run(
    ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(COMMON).parent
  ).stdout.strip()
  assert not commit or environment["commit"].startswith(commit)


# Sizes


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
  return make_long_run(tmp_path_factory.mktemp("runs") / "long")


def test_a_long_run_makes_a_small_page(long_run, html):
  large = read(long_run)
  assert len(large.html) < 700_000
  assert len(large.pictures) <= 4 * 2 + 4 * 7 + 4 * 2
  for path in re.findall(r' d="([^"]*)"', large.html):
    assert path.count("L") <= 400
  drawn = points(large.figure("Reward"), "line c2")
  rows = [row["reward/mean"] for row in metrics.read(long_run)]
  axis = y_axis(large.figure("Reward"))
  expected = [np.nanmean(rows[i : i + 10]) for i in range(0, 2000, 10)]
  np.testing.assert_allclose(
    axis[-1] - drawn[:, 1] / 1000 * (axis[-1] - axis[0]), expected, atol=1e-4
  )


def test_a_long_prompt_is_in_full_once(long_run):
  html = read(long_run)
  prompt = "a wall of text, " * 475
  assert html.text.count(prompt.strip()) == 1
  assert html.text.index("Long prompts in full") < html.text.index(prompt.strip())
  assert max(len(each["alt"]) for each in html.pictures) < 200


def test_large_pictures_are_thumbnails_with_a_link(tmp_path):
  """24 prompts with 512 x 512 pixels of noise, the worst case for a JPEG."""
  draw = np.random.RandomState(0)
  prompts = [f"prompt {i}" for i in range(24)]
  pixels = draw.rand(24, 512, 512, 3)
  page.save_samples(tmp_path, 0, Media(pixels), prompts, [0.1] * 24)
  page.save_samples(tmp_path, 5, Media(pixels), prompts, [0.2] * 24)
  html = read(tmp_path)
  assert len(html.pictures) == 2 * 16 and "8 more prompts are not shown" in html.text
  assert len(html.html) < 2_500_000
  for picture, link in zip(html.pictures, html.links):
    assert picture["src"].startswith("data:image/jpeg")
    thumbnail = Image.open(io.BytesIO(base64.b64decode(picture["src"].partition(",")[2])))
    assert thumbnail.size == (256, 256) and Image.open(tmp_path / link).size == (512, 512)


def test_many_rewards_are_thinned_and_keep_their_distribution(tmp_path):
  rewards = np.random.RandomState(0).normal(size=50_001)
  rewards[7] = np.nan
  black = np.zeros((8, 8, 3))
  folder = page.save_extremes(tmp_path, 1, black, black, None, "a", 1.0, 0.0, rewards)
  kept = json.loads((folder / "scores.json").read_text())["rewards"]
  assert len(kept) == 1000
  assert stats.kstest(kept, rewards[np.isfinite(rewards)]).statistic < 0.002
