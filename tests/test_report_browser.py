"""A real browser renders the report, wide and narrow, enlarges its pictures and plays its videos.
Its colours have contrast.
"""

import base64
import io
import json
import re
from pathlib import Path

import chromium
import numpy as np
import pytest
from PIL import Image
from synthetic_run import make_long_run, make_run, read

from dancegrpo_jax.report import page, status

needs_browser = pytest.mark.skipif(
  chromium.BINARY is None, reason="no chromium on the path; set CHROMIUM to its binary"
)

STATUS = {
  "state": status.FAILED,
  "began": "2026-11-27 19:46:02 UTC",
  "ended": "2026-11-27 20:46:02 UTC",
  "reason": "RuntimeError: /a/path/that/is/longer/than/a/telephone/is/wide/and/has/no/space/at/all",
  "traceback": "Traceback (most recent call last):\n" + 200 * "x",
  "command": "python -m dancegrpo_jax.main --config=configs/emoji_clip.py:tiny --workdir=runs/one",
  "directory": "/home/somebody/projects/with_a_long_name/dancegrpo_jax",
  "workdir": "/data/experiments/of/november/runs/one",
  "config_file": "configs/emoji_clip.py:tiny",
  "changed": {
    "data.prompts": ["assets/prompts.txt", "/home/somebody/prompts/of_an_experiment.txt"]
  },
}

# Opens what is folded and measures the page; gives the numbers after its dialog was used.
PROBE = """new Promise(done => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
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
    scrolling: all("main *").filter(item => {
      const scrolls = ["auto", "scroll"].includes(getComputedStyle(item).overflowX);
      return scrolls && item.scrollWidth > item.clientWidth + 1;
    }).length,
    split: all(".shot, .tile b").filter(item => [...item.childNodes].some(node => {
      const range = document.createRange();
      range.selectNodeContents(node);
      const tops = new Set([...range.getClientRects()].map(line => line.top));
      return node.nodeName != "A" && tops.size > 1;
    })).length,
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
    done(seen);
  }));
})"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
  folder = tmp_path_factory.mktemp("runs")
  made = {
    "short": make_run(folder / "short"),
    "long": make_long_run(folder / "long"),
    "videos": make_run(folder / "videos", iterations=20, frames=9),
  }
  for workdir in made.values():
    (workdir / status.FILE).write_text(json.dumps(STATUS))
  return made


@pytest.fixture(scope="module")
def pages(runs):
  return {name: read(workdir) for name, workdir in runs.items()}


@needs_browser
@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("name", ["short", "long", "videos"])
def test_a_browser_renders_it(name, width, runs, pages):
  html = pages[name]
  with chromium.opened(runs[name] / page.FILE, width) as send:
    seen = chromium.value(send, PROBE)
  assert seen["overflow"] <= 0 and seen["scrolling"] == seen["split"] == seen["broken"] == 0
  assert seen["pictures"] == len(html.pictures) and seen["charts"] == len(html.labels) >= 8
  assert seen["cut"] == seen["touching"] == seen["outside"] == seen["flat"] == 0
  assert seen["font"] >= 12
  assert seen["used"] > 0.7 and seen["card"] < 800 and seen["chart_at"] < 2000
  alts = [each["alt"] for each in html.pictures if each["alt"]]  # a video has none of its own
  assert [seen["opened"], seen["next"], seen["last"]] == [alts[0], alts[1], alts[-1]]
  assert seen["closed"] and seen["focus"] == len(alts) - 1


# Videos


LINK = "document.querySelectorAll('a.enlarge')[1]"  # of the last iteration's first video
PLACES = """[...document.querySelectorAll("main *")].filter(i => i.checkVisibility()).map(item => {
  const place = item.getBoundingClientRect();
  return [place.x, place.y + scrollY, place.width, place.height];
})"""


def window(send) -> np.ndarray:
  """What the window shows."""
  content = base64.b64decode(send("Page.captureScreenshot")["data"])
  return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def strip(send) -> np.ndarray:
  """What is drawn at the place of the film strip."""
  x, y, width, height = place(send)
  return window(send)[round(y) : round(y + height), round(x) : round(x + width)]


def place(send) -> list[float]:
  script = f"(b => [b.x, b.y, b.width, b.height])({LINK}.firstElementChild.getBoundingClientRect())"
  return chromium.value(send, script)


def over_time(send, look, count=12) -> list[np.ndarray]:
  """Several looks at something, within a second and more."""
  shown = []
  for _ in range(count):
    chromium.value(send, "new Promise(done => setTimeout(done, 70))")
    shown.append(look(send))
  return shown


def mouse(send, x, y):
  send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


def tab(send):
  for kind in ("rawKeyDown", "keyUp"):
    send("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)


@needs_browser
@pytest.mark.parametrize("by", ["mouse", "keyboard"])
@pytest.mark.parametrize("width, dark", [(1400, False), (400, True)])
def test_a_film_strip_plays_while_it_is_pointed_at(by, width, dark, runs, pages):
  """The video is drawn in the middle of its strip, which is gone. Nothing else moves, and the strip
  comes back.
  """
  with chromium.opened(runs["videos"] / page.FILE, width, height=400, dark=dark) as send:
    chromium.value(send, f"{LINK}.scrollIntoView({{block: 'center'}})")
    still, before = strip(send), chromium.value(send, PLACES)
    if by == "mouse":
      x, y, across, down = place(send)
      mouse(send, x + across / 2, y + down / 2)
    else:
      while not chromium.value(send, f"document.activeElement === {LINK}"):
        tab(send)
    shown = over_time(send, strip)
    np.testing.assert_allclose(chromium.value(send, PLACES), before, atol=0.01)  # pixels
    if by == "mouse":
      mouse(send, 0, 0)
    else:
      tab(send)
    np.testing.assert_array_equal(over_time(send, strip, count=2)[-1], still)
  height, width = still.shape[:2]
  assert height >= 40 and width >= 5 * height
  left, right = (width - height) // 2, (width + height) // 2
  videos = [each[3:-3, left + 3 : right - 3] for each in shown]
  assert len({each.tobytes() for each in videos}) >= 4
  disk = [(each[..., 0] > 180).mean() for each in videos]  # red on blue, with a radius of 0.2
  np.testing.assert_allclose(disk, np.pi * 0.2**2, rtol=0.25)
  for each in shown:
    sides = np.concatenate([each[:, : left - 2], each[:, right + 2 :]], axis=1)
    assert (sides == (0x1D, 0x20, 0x24) if dark else sides == 0xFF).all()  # the card


@needs_browser
@pytest.mark.parametrize("moved", [False, True])
def test_a_tap_plays_a_video(moved, runs, pages, tmp_path):
  """In the dialog, and also where the page was moved without the files beside it."""
  file = runs["videos"] / page.FILE
  if moved:
    file = tmp_path / page.FILE
    file.write_text(pages["videos"].html)
  with chromium.opened(file, 400, height=800) as send:
    send("Emulation.setTouchEmulationEnabled", enabled=True)
    chromium.value(send, f"{LINK}.scrollIntoView({{block: 'center'}})")
    x, y, across, down = place(send)
    touch = {"x": x + across / 2, "y": y + down / 2}
    send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[touch])
    send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    shown = over_time(send, window)
    assert chromium.value(send, "document.querySelector('dialog').open")
    script = "(i => [i.naturalWidth, i.naturalHeight, i.alt])(document.querySelector('dialog img'))"
    alt = "iteration 20: a red apple on a blue background"
    assert chromium.value(send, script) == [32, 32, alt]
  assert len({each.tobytes() for each in shown[2:]}) >= 4


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
