"""Writes the figures of docs/architecture.md: the rooms of the package, floor by floor, and the way
through an iteration.

    python docs/make_figures.py

The rooms and their floors are read from the import contract in pyproject.toml.
"""

import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "images"
COMMAND, PROGRAM, DATA = "#e8e3f6", "#dbe9fb", "#fdf3d8"
NOTES = {  # room -> what is in it, in two or three words
  "command": "dancegrpo train, sample, ...",
  "main": "train",
  "sample": "draw images",
  "evaluate": "base against trained",
  "pretrain": "embedded models",
  "plan": "compile, do not run",
  "convert": "checkpoints in and out",
  "train": "the loop, top to bottom",
  "dry_run": "all checks in one table",
  "evaluation": "a checkpoint beside its base",
  "training": "what the loop is made of",
  "compilation": "programs ahead of the run",
  "assembly": "from a config to a model in memory",
  "checkpoints": "files to parameters and back",
  "programs": "every compiled function",
  "scoring": "how the loop scores",
  "data": "prompts, data sets, tokenizers",
  "report": "metrics, charts, report.html",
  "settings": "config, command line, checks",
  "rewards": "one file a reward",
  "pipelines": "one file a model family",
  "rl": "rollout, advantages, update",
  "models": "the networks in Flax",
  "conversion": "which tensor is which parameter",
  "objects": "module:object of a config",
  "diffusion": "grids, steps, windows",
  "devices": "mesh, processes, memory",
  "types": "what crosses rooms",
  "errors": "mistakes of the user",
  "installation": "where configs and assets are",
  "buckets": "gs:// and local copies",
  "published": "keys of other tools' files",
  "strict_json": "JSON without NaN",
}


def box(x: float, y: float, width: float, height: float, fill: str, lines: list[str]) -> str:
  """A rectangle with a bold first line and plain ones below it."""
  size = 15
  top = y + height / 2 - (len(lines) - 1) * size / 2 + 4
  texts = "".join(
    f'<text x="{x + width / 2}" y="{top + i * size}" class="{"small" if i else "name"}">'
    f"{escape(line)}</text>"
    for i, line in enumerate(lines)
  )
  shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{fill}"/>'
  return f"{shape}{texts}"


def arrow(*points: tuple[float, float]) -> str:
  path = " ".join(f"{x},{y}" for x, y in points)
  return f'<polyline points="{path}" marker-end="url(#head)"/>'


def label(x: float, y: float, text: str, anchor: str = "start") -> str:
  return f'<text x="{x}" y="{y}" class="small" style="text-anchor: {anchor}">{escape(text)}</text>'


def picture(width: int, height: int, parts: list[str], title: str) -> str:
  """An SVG on a white ground of its own, so that it can be read on a dark page too."""
  return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">
<title>{escape(title)}</title>
<style>
text {{ font-family: Helvetica, Arial, sans-serif; text-anchor: middle; fill: #222; }}
.name {{ font-size: 14px; font-weight: bold; }}
.small {{ font-size: 11.5px; fill: #444; }}
rect {{ stroke: #8a8fa3; stroke-width: 1; }}
polyline {{ fill: none; stroke: #555; stroke-width: 1.4; }}
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8"
 orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#555"/></marker></defs>
<rect x="0" y="0" width="{width}" height="{height}" rx="8" fill="#ffffff" stroke="none"/>
{chr(10).join(parts)}
</svg>
"""


def layers() -> list[list[str]]:
  """The floors of the import contract, the highest first, as lists of rooms."""
  contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
  contract = next(c for c in contracts["contracts"] if c["type"] == "layers")
  return [[room.strip() for room in layer.split("|")] for layer in contract["layers"]]


def rooms() -> str:
  """The floors, each a row of boxes; imports point down."""
  width, height, gap, left, total = 900, 46, 10, 20, 860
  parts = []
  for row, floor in enumerate(layers()):
    each = (total - gap * (len(floor) - 1)) / len(floor)
    for column, room in enumerate(floor):
      lines = [room, *([NOTES[room]] if room in NOTES else [])]
      x, y = left + column * (each + gap), 20 + row * (height + gap)
      parts.append(box(x, y, each, height, PROGRAM if row > 1 else COMMAND, lines))
  bottom = 20 + len(layers()) * (height + gap)
  parts.append(
    label(width / 2, bottom + 12, "A room imports only from the rows below it.", "middle")
  )
  return picture(width, bottom + 30, parts, "The rooms of the package by floor")


def iteration() -> str:
  """The programs in a column, what they take on the left and what they leave on the right."""
  x, width, height = 345, 210, 52
  tops = {"prompts": 20, "encode": 105, "rollout": 200, "decode": 295, "score": 390}
  tops |= {"advantages": 485, "update": 580}
  lines = {
    "prompts": ["P prompts", "of this iteration"],
    "encode": ["encode", "text encoders, frozen"],
    "rollout": ["rollout", "lax.scan over N steps"],
    "decode": ["decode", "latents to pixels"],
    "score": ["score", "device program or host threads"],
    "advantages": ["advantages", "reward minus group mean, over std"],
    "update": ["update", "optimizer steps over (sample, step) pairs"],
  }
  parts = [
    '<rect x="322" y="182" width="256" height="278" rx="8" fill="#f6f7fb" stroke-dasharray="4 4"/>',
    label(330, 197, "chunk by chunk"),
  ]
  for name, y in tops.items():
    wide = 40 if name == "update" else 0
    fill = DATA if name == "prompts" else PROGRAM
    parts.append(box(x - wide / 2, y, width + wide, height, fill, lines[name]))
  # Straight down: what the next program takes at once.
  for above, below, text in (
    ("prompts", "encode", ""),
    ("rollout", "decode", "final latents [B, h, w, c]"),
    ("decode", "score", "pixels [B, H, W, 3]"),
    ("advantages", "update", "advantage and weight [B]"),
  ):
    start, end = tops[above] + height, tops[below]
    parts += [arrow((450, start), (450, end)), label(458, (start + end) / 2 + 4, text)]
  # On the right: what is kept, and who takes it.
  parts.append(box(650, 105, 210, height, DATA, ["conditioning", "P rows, one a prompt"]))
  parts.append(arrow((555, 131), (650, 131)))
  parts.append(arrow((690, 157), (690, 170), (450, 170), (450, 200)))
  parts.append(arrow((860, 131), (885, 131), (885, 616), (575, 616)))
  kept = ["trajectories", "B = P x G samples, K + 1 latents"]
  parts.append(box(650, 200, 210, height, DATA, kept))
  parts.append(arrow((555, 226), (650, 226)))
  parts.append(arrow((860, 226), (872, 226), (872, 596), (575, 596)))
  parts.append(box(650, 390, 210, height, DATA, ["scores", "{term: [P, G]}, NaN where failed"]))
  parts.append(arrow((555, 416), (650, 416)))
  parts.append(arrow((755, 442), (755, 511), (555, 511)))
  # On the left: what the rollout takes besides.
  noise = ["noise", "f(seed, iteration, prompt, sample, step)"]
  parts.append(box(30, 200, 240, height, DATA, noise))
  parts.append(arrow((270, 219), (345, 219)))
  parts.append(arrow((325, 606), (155, 606), (155, 290), (300, 290), (300, 237), (345, 237)))
  parts.append(label(165, 596, "new weights"))
  return picture(900, 652, parts, "The way of a prompt and of a latent through an iteration")


FIGURES = {"rooms.svg": rooms, "iteration.svg": iteration}

if __name__ == "__main__":
  FOLDER.mkdir(exist_ok=True)
  for name, draw in FIGURES.items():
    (FOLDER / name).write_text(draw())
    print(FOLDER / name)
