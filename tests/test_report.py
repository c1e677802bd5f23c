"""The report is one valid file about the run, and a real browser renders it, wide and narrow."""

import base64
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dancegrpo_jax.report import charts, images, metrics, page
from dancegrpo_jax.settings import config_file, stored_config

COMMON = str(Path(__file__).parent.parent / "configs" / "common.py")
PROMPTS = [
  "a red apple on a blue background",
  "a cat & <b>dog</b> on a green background",
  "a rocket on a white background",
]


def make_run(workdir: Path, iterations=40, prompts=None, size=32, kind="grpo") -> Path:
  """A workdir with made-up numbers.

  The reward grows; one score failed, and one iteration has no ratio.
  """
  prompts, draw = prompts or PROMPTS, np.random.RandomState(0)
  changes = [f"iterations={iterations}", "name=synthetic", f"objective.kind={kind}"]
  config = config_file.load(COMMON, ["logging.tensorboard=False", *changes])
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "config.json").write_text(stored_config.to_json(config))
  page.save_environment(workdir)
  with metrics.Writer(workdir, config) as writer:
    for i in range(iterations):
      row = make_row(i, draw)
      if kind == "dppo":
        row |= {"drop_fraction": row.pop("clip_fraction"), "policy_kl": 1e-4 * draw.rand()}
      writer.write(i, row)
  for i in [0, *range(10, iterations + 1, 10)]:
    pixels = np.stack(
      [picture(number, i / iterations, draw, size) for number in range(len(prompts))]
    )
    scores = 0.5 + 0.2 * i / iterations + draw.normal(0, 0.02, len(prompts))
    page.save_samples(workdir, i, pixels, prompts, [math.nan, *scores[1:]] if i == 10 else scores)
    if i:
      page.save_extremes(
        workdir, i, picture(0, 1, draw, size), picture(0, 0, draw, size), prompts[0], 0.71, 0.43
      )
  return workdir


def make_row(i, draw) -> dict[str, float]:
  mean = 0.5 + 0.15 * (1 - math.exp(-i / 15)) + draw.normal(0, 0.01)
  wide = 2e-4 * (1 + draw.rand())
  row = {
    "reward/mean": mean,
    "reward/std": 0.08,
    "reward/min": mean - 0.2,
    "reward/max": mean + 0.17,
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
    "grad_norm": 0.3 * draw.rand(),
  }
  row |= {"learning_rate": min(1, i / 10) * 1e-5, "images_per_second": 40 + draw.rand()}
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


class Page(HTMLParser):
  """Counts tags, checks their nesting, and collects text and addresses."""

  VOID = {"meta", "img", "br", "link", "i/"}

  def __init__(self, html: str):
    super().__init__()
    self.open, self.tags, self.text, self.addresses = [], [], "", []
    self.feed(html)
    assert self.open == []

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.addresses += [
      value for name, value in attributes if name in ("src", "href", "data", "xlink:href")
    ]
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.tags.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = make_run(tmp_path_factory.mktemp("runs") / "synthetic")
  page.write(workdir)
  return workdir


@pytest.fixture(scope="module")
def html(run):
  return Page((run / "report.html").read_text())


def test_it_is_one_file_without_scripts_or_addresses(html):
  assert "script" not in html.tags and "link" not in html.tags
  assert html.addresses and all(
    address.startswith("data:image/png;base64,") for address in html.addresses
  )


def test_it_shows_prompts_with_base_first(html):
  assert PROMPTS[1] in html.text  # escaped in the file, read back as written
  assert html.text.index("base") < html.text.index("iteration 10") < html.text.index("iteration 40")
  assert html.tags.count("img") == 3 * 5 + 2 * 4
  assert "failed" in html.text  # the score is NaN


def test_embedded_images_are_the_saved_ones(run, html):
  first = base64.b64decode(html.addresses[0].partition(",")[2])
  assert first == (run / "samples" / "iteration_000000" / "00.png").read_bytes()


def test_it_shows_curves_config_and_environment(html):
  assert html.tags.count("svg") >= 11
  shown = (
    "Importance ratio",
    "± 1 std of the samples",
    "rollout.samples_per_prompt",
    "jax",
    "8 x cpu",
  )
  for text in (*shown, "40 of 40", "3 min 34 s"):  # 39 finite rows of 5.5 s
    assert text in html.text
  assert "NaN" not in html.text and "nan" not in re.sub(
    r"[A-Za-z_]+nan|nan[A-Za-z_]+", "", html.text
  )


def titles(workdir: Path) -> list[str]:
  """The titles of the charts, in the page's order."""
  return re.findall(
    r'<figure class="chart"><figcaption><b>(.*?)</b>', page.write(workdir).read_text()
  )


def test_an_algorithm_shows_what_it_reports(run, tmp_path):
  """Where GRPO shows clipping, Flow-DPPO shows dropped samples and the distance of the policy."""
  other = make_run(tmp_path / "other", iterations=10, kind="dppo")
  (place,) = [i for i, title in enumerate(titles(run)) if title == "Clipped"]
  assert titles(other)[place : place + 2] == ["Dropped", "Divergence"]
  assert [title for title in titles(other) if title not in ("Dropped", "Divergence")] == [
    title for title in titles(run) if title != "Clipped"
  ]
  assert "GRPO on stable diffusion" in (run / "report.html").read_text()
  assert "DPPO on stable diffusion" in (other / "report.html").read_text()


def test_the_gain_is_that_of_the_rows(run, html):
  rows = metrics.read(run)
  finite = [row["reward/mean"] for row in rows if math.isfinite(row["reward/mean"])]
  assert f"{np.mean(finite[-5:]) - np.mean(finite[:5]):+.4f}" in html.text


def test_a_run_that_has_only_started_gets_a_report(tmp_path):
  (tmp_path / "config.json").write_text(stored_config.to_json(config_file.load(COMMON)))
  html = Page(page.write(tmp_path).read_text())
  assert "No iteration has been run yet" in html.text
  metrics.Writer(tmp_path, config_file.load(COMMON, ["logging.tensorboard=False"])).write(
    0, {"reward/mean": 0.5}
  )
  assert "svg" in Page(page.write(tmp_path).read_text()).tags


def test_other_prompts_after_a_resume_leave_cells_empty(tmp_path):
  pixels = np.zeros((2, 8, 8, 3))
  page.save_samples(tmp_path, 0, pixels, ["a", "b"], [0.1, 0.2])
  page.save_samples(tmp_path, 5, pixels[:1], ["a"], [0.1])
  assert Page(page.write(tmp_path).read_text()).tags.count("img") == 3


def test_large_images_are_embedded_small(tmp_path):
  page.save_samples(tmp_path, 0, np.random.RandomState(0).rand(1, 512, 512, 3), ["a"], [0.1])
  html = Page(page.write(tmp_path).read_text())
  assert html.addresses[0].startswith("data:image/jpeg") and len(html.addresses[0]) < 60_000


# Charts


@pytest.mark.parametrize(
  "low, high, expected",
  [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    (0.43, 0.71, [0.4, 0.5, 0.6, 0.7, 0.8]),
    (0.99981, 1.0002, [0.9998, 0.9999, 1.0, 1.0001, 1.0002]),
    (-3, 12, [-5, 0, 5, 10, 15]),
    (0, 1e-5, [0, 2e-6, 4e-6, 6e-6, 8e-6, 1e-5]),
  ],
)
def test_ticks_are_round_and_enclose(low, high, expected):
  assert charts.ticks(low, high) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
  "value, step, text",
  [
    (0.5, 0.1, "0.5"),
    (1.0, 0.0001, "1.0000"),
    (12, 5, "12"),
    (2e-6, 2e-6, "2e-6"),
    (0, 2e-6, "0"),
    (0.51234, 0, "0.5123"),
  ],
)
def test_numbers_have_the_digits_they_need(value, step, text):
  assert charts.number(value, step) == text


def test_a_gap_breaks_the_line():
  html = charts.chart(
    "t", "u", [0, 1, 2, 3, 4], [charts.Series("a", [0.0, 1.0, math.nan, 1.0, 0.0])]
  )
  assert re.search(r'class="line c1" d="M[^M]+M[^M]+"', html)
  assert charts.chart("t", "u", [0, 1], [charts.Series("a", [math.nan, math.nan])]) == ""


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [1.0, 1.0], [-2.0, -2.0], [1e-12, 3e-12]])
def test_constant_and_tiny_curves_are_drawn(values):
  html = charts.chart("t", "u", list(range(len(values))), [charts.Series("a", values)])
  assert "nan" not in html and "inf" not in html


# Images


def test_png_keeps_pixels(tmp_path):
  pixels = np.random.RandomState(0).randint(0, 256, (5, 7, 3)) / 255
  images.save(tmp_path / "new" / "a.png", pixels)
  np.testing.assert_array_equal(
    np.asarray(Image.open(tmp_path / "new" / "a.png")), np.round(pixels * 255)
  )
  assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_pixels_outside_the_range_are_clipped():
  assert images.to_uint8(np.array([-1.0, 0.5, 2.0, math.nan])).tolist() == [0, 128, 255, 0]


def test_files_of_a_batch_sort_in_order(tmp_path):
  paths = images.save_images(tmp_path, np.zeros((101, 2, 2, 3)))
  assert (
    sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in paths]
    and paths[100].name == "100.png"
  )


def test_grid_places_images_and_captions():
  pixels = np.stack([np.full((32, 32, 3), value) for value in (0.2, 0.4, 0.6)])
  sheet = np.asarray(
    images.grid(pixels, 2, captions=["one", "two", "three"], headers=["left", "right"])
  )
  plain = np.asarray(images.grid(pixels, 2))
  assert plain.shape == (2 * 96 + 3 * 6, 2 * 96 + 3 * 6, 3)  # enlarged three times, with gaps of 6
  assert (
    plain[6, 6, 0] == 51
    and plain[6, 108, 0] == 102
    and plain[108, 6, 0] == 153
    and plain[108, 108, 0] == 255
  )
  assert sheet.shape[1] == plain.shape[1] and sheet.shape[0] > plain.shape[0]


# A real browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path; set CHROMIUM to its binary")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_renders_it(run, tmp_path, width):
  """The browser's layout of the page is read from its title.

  A script, added to a copy of the page, puts it there.
  """
  html = (run / "report.html").read_text()
  probe = """<script>addEventListener("load", () => {
    const images = [...document.images], charts = [...document.querySelectorAll("svg")];
    document.title = JSON.stringify({
      overflow: document.documentElement.scrollWidth - innerWidth,
      images: images.length, charts: charts.length,
      broken: images.filter(image => !image.complete || !image.naturalWidth).length,
      flat: charts.filter(chart => chart.getBoundingClientRect().height < 80).length,
      lines: document.querySelectorAll("path.line").length,
      font: Math.min(...charts.map(chart => 12 * chart.getBoundingClientRect().width / 520)),
    });});</script></body>"""
  copy = tmp_path / "report.html"
  copy.write_text(html.replace("</body>", probe))
  command = [
    CHROMIUM,
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    f"--user-data-dir={tmp_path / 'profile'}",
    f"--window-size={width},2000",
    "--virtual-time-budget=5000",
    "--dump-dom",
    copy.as_uri(),
  ]
  dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
  seen = json.loads(re.search(r"<title>(\{.*?\})</title>", dom).group(1))
  assert seen["images"] == 3 * 5 + 2 * 4 and seen["broken"] == 0
  assert seen["charts"] >= 11 and seen["flat"] == 0 and seen["lines"] >= 13
  assert seen["overflow"] <= 0
  assert seen["font"] > 7
