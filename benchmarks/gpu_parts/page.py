"""Formats the measurements as text, with one table for each part."""

from gpu_parts import measure, registry, runner


def _line(cells: list[str]) -> str:
  return "| " + " | ".join(cells) + " |"


def table(result: dict) -> str:
  """The table of a part."""
  columns = result["columns"]
  lines = [_line(["", *columns, "note"]), _line(["---"] * (len(columns) + 2))]
  for name, row in result["rows"].items():
    cells = [
      measure.shown(row["cells"][column]) if column in row["cells"] else "-" for column in columns
    ]
    notes = [row["note"]] if row["note"] else []
    if row["problem"]:
      notes.append(f"not measured: {row['problem']}")
    lines.append(_line([name, *cells, "; ".join(notes).replace("|", "/")]))
  return "\n".join(lines)


HEAD = """## One NVIDIA GPU

`python benchmarks/gpu.py`: what one card does, with random weights of the published sizes, a part
at a time. Times are medians, with the least and the largest of the runs after a first one. MFU is
what the networks' products and convolutions have to compute, as `plan` counts it, without what is
recomputed, over the peak of the card's data sheet. Stable Diffusion and FLUX run their recipes at
full image size and steps, with 16 and 8 samples of one prompt an iteration and 4 trained steps of
each.
"""


EMPTY = "Nothing of this section has been measured yet."


def about(result: dict) -> str:
  """Where and when a part was run, and by which command."""
  ran = result["ran"]
  versions = ", ".join(f"{name} {version}" for name, version in ran["versions"].items())
  device, driver = result.get("device") or ran["gpu"] or "an unknown device", ran["driver"]
  tiny = " Tiny sizes: the numbers say nothing but that the part works." * ran["tiny"]
  return (
    f"{device}{f', driver {driver}' if driver else ''}; {versions}; {ran['date']};"
    f" `{ran['command']}`, {result['seconds']:.0f} s.{tiny}"
  )


def section(parts: dict[str, dict]) -> str:
  """The section of RESULTS.md, which also names the parts that were not run.

  Args:
    parts: results of the runner by name. `ran` has what `about` formats.
  """
  texts = [HEAD] + [f"\n{EMPTY}\n"] * (not parts)
  for part in registry.ALL:
    result = parts.get(part.name)
    ran = f"{about(result)}\n\n" if result else ""
    result = result or runner.empty(part, f"run with --parts={part.name}")
    texts.append(f"\n### {part.title}\n\n{ran}{table(result)}\n")
  return "".join(texts)
