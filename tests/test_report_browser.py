"""A real browser renders the report, wide and narrow, and enlarges its pictures; its colours have
contrast.
"""

import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from synthetic_run import make_long_run, make_run, read

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)

# Measures the page from inside and sends the numbers to the page around it.
PROBE = """<script>addEventListener("load", () => {
  const box = item => item.getBoundingClientRect();
  const all = name => [...document.querySelectorAll(name)];
  const svg = tick => tick.closest(".plot").querySelector("svg");
  const size = item => parseFloat(getComputedStyle(item).fontSize);
  const pictures = all("main img"), plots = all(".plot"), cards = all(".pairs:not(.wide) .pair");
  const cut = all(".plot span, .plot .label").filter(tick => {
    const inside = box(tick), figure = box(tick.closest("figure"));
    const isBeside = inside.left < figure.left || inside.right > figure.right;
    return isBeside || inside.bottom > figure.bottom;
  });
  const touching = all(".plot .x").filter(row => [...row.children].some(
    (tick, i) => i && box(tick).left < box(row.children[i - 1]).right));
  const outside = all(".plot .y span").filter(tick => box(tick).right > box(svg(tick)).left);
  const right = Math.max(...cards.map(card => box(card).right));
  const seen = {
    overflow: document.documentElement.scrollWidth - innerWidth,
    pictures: pictures.length,
    broken: pictures.filter(image => !image.complete || !image.naturalWidth).length,
    charts: plots.length, cut: cut.length, touching: touching.length, outside: outside.length,
    flat: all(".plot svg").filter(chart => box(chart).height < 150).length,
    font: Math.min(...all("main *").filter(item => item.innerText).map(size)),
    used: (right - box(cards[0]).left) / box(document.querySelector(".pairs")).width,
    card: Math.max(...cards.map(card => box(card).height)),
    chart_at: box(document.querySelector(".charts.main")).top,
  };
  const links = all("a.enlarge"), dialog = document.querySelector("dialog");
  const large = dialog.querySelector("img");
  const key = name => dialog.dispatchEvent(new KeyboardEvent("keydown", {key: name}));
  links[0].click();
  seen.opened = dialog.open && large.alt;
  key("ArrowRight"); seen.next = large.alt;
  key("ArrowLeft"); key("ArrowLeft"); seen.last = large.alt;
  dialog.querySelector("button[value='0']").click();
  dialog.addEventListener("close", () => setTimeout(() => {
    seen.closed = !dialog.open; seen.focus = links.indexOf(document.activeElement);
    parent.postMessage(JSON.stringify(seen), "*");
  }));
});</script></body>"""
AROUND = """<body style="margin:0">
<iframe src="report.html" style="border:0;width:WIDTHpx;height:1000px"></iframe>
<script>addEventListener("message", event => document.title = event.data)</script></body>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs")
  return {
    "short": read(make_run(folder / "short")),
    "long": read(make_long_run(folder / "long")),
  }


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path; set CHROMIUM to its binary")
@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("name", ["short", "long"])
def test_a_browser_renders_it(name, width, pages, tmp_path):
  """The page lies in a frame, because a window of Chromium can't be narrower than 500 pixels."""
  html = pages[name]
  (tmp_path / "report.html").write_text(html.html.replace("</body>", PROBE))
  around = tmp_path / "around.html"
  around.write_text(AROUND.replace("WIDTH", str(width)))
  command = [
    CHROMIUM,
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    f"--user-data-dir={tmp_path / 'profile'}",
    "--window-size=1500,1100",
    "--virtual-time-budget=5000",
    "--dump-dom",
    around.as_uri(),
  ]
  dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
  seen = json.loads(re.search(r"<title>(\{.*?\})</title>", dom).group(1))
  assert seen["overflow"] <= 0 and seen["broken"] == 0
  assert seen["pictures"] == len(html.pictures) and seen["charts"] == len(html.labels) >= 8
  assert seen["cut"] == seen["touching"] == seen["outside"] == seen["flat"] == 0
  assert seen["font"] >= 12
  assert seen["used"] > 0.7 and seen["card"] < 800 and seen["chart_at"] < 2000
  alts = [each["alt"] for each in html.pictures]
  assert [seen["opened"], seen["next"], seen["last"]] == [alts[0], alts[1], alts[-1]]
  assert seen["closed"] and seen["focus"] == len(alts) - 1


# Colours


def luminance(color: str) -> float:
  """Of WCAG 2.1: the relative luminance of "#rrggbb"."""
  parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
  return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("theme", [0, 1])
def test_text_and_curves_have_contrast(pages, theme):
  """WCAG 2.1 AA: 4.5 for text, 3 for graphics, in the light and the dark theme."""
  block = re.findall(r":root \{(.*?)\}", pages["short"].html, re.S)[theme]
  colors = dict(re.findall(r"--(\w+): (#\w{6})", block))
  for ground in ("paper", "card"):
    for name, least in {
      **dict.fromkeys(("ink", "soft", "good", "bad"), 4.5),
      **dict.fromkeys(("warn", "c1", "c2", "c3", "c4", "c5"), 3.0),
    }.items():
      dark, bright = sorted([luminance(colors[name]), luminance(colors[ground])])
      assert (bright + 0.05) / (dark + 0.05) >= least, (name, ground)
