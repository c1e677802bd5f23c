"""Measures this project on one NVIDIA GPU, and diffusers beside it, with one command.

    python benchmarks/gpu.py                       the parts that matter most, 6 minutes at most
    python benchmarks/gpu.py --parts=all           every part, 9 minutes at most
    python benchmarks/gpu.py --parts=chip,kernels  these; --minutes=N bounds all of them together
    python benchmarks/gpu.py --tiny --out=x.json   tiny sizes, on whatever device is there
    python benchmarks/gpu.py --write               the section of RESULTS.md alone

The results are a table, a JSON file and a section of RESULTS.md, which lists as not measured what a
part could not finish in its time. Needs the packages of requirements-gpu.txt; the PyTorch side runs
where torch and diffusers are installed too. No weights are read or downloaded. Parts that are not
run keep their results in the JSON file; --cache=FOLDER keeps compiled programs for later.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import results
from gpu_parts import page, registry, runner

OUT = Path(__file__).with_suffix(".json")
PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers")


def parse(argv: list[str]) -> argparse.Namespace:
  """Parses the flags. A mistake exits with code 2 and one line."""
  parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0],
    epilog=_help(),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--parts", default="", help="names of parts, separated by commas, or all; default: see below"
  )
  parser.add_argument(
    "--minutes",
    type=float,
    help="time limit of all parts together; default: 6, with --parts=all 9, with other --parts the"
    " sum of their limits. A larger value extends every limit",
  )
  parser.add_argument("--tiny", action="store_true", help="tiny sizes, on any device")
  parser.add_argument(
    "--out",
    type=Path,
    help=f"JSON file, which keeps the results of other parts; default: {OUT.name} beside this file",
  )
  parser.add_argument(
    "--results",
    type=Path,
    help="Markdown file whose section is written; default: RESULTS.md beside this file",
  )
  parser.add_argument(
    "--cache", type=Path, help="folder of compiled programs; default: a temporary folder"
  )
  parser.add_argument(
    "--write", action="store_true", help="write the section from the JSON file and measure nothing"
  )
  flags = parser.parse_args(argv)
  try:
    flags.chosen = registry.choose(flags.parts)
  except ValueError as error:
    parser.exit(2, f"error: {error}\n")
  if flags.minutes is not None and not flags.minutes > 0:
    parser.exit(2, f"error: --minutes={flags.minutes}: must be above 0\n")
  if not flags.tiny:  # tiny results are written only to files that the flags name
    flags.out, flags.results = flags.out or OUT, flags.results or results.FILE
  for name, file in (("out", flags.out), ("results", flags.results)):
    if file and not file.absolute().parent.is_dir():
      parser.exit(2, f"error: --{name}={file}: no folder {file.absolute().parent}; make it\n")
  return flags


def _help() -> str:
  rows = [f"  {part.name:24} {part.seconds:4.0f} s  {part.title}" for part in registry.ALL]
  return "\n".join(
    [
      "parts in the order in which they run, with their time limits:",
      *rows,
      "default: " + ", ".join(registry.DEFAULT),
    ]
  )


def versions() -> dict[str, str]:
  """Versions of the relevant packages that are installed."""
  found = {"Python": platform.python_version()}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def card() -> tuple[str, str]:
  """Name and driver of the first NVIDIA GPU, or ("", "") where there is none.

  Does not touch the GPU.
  """
  query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
  try:
    lines = subprocess.run(
      query, capture_output=True, text=True, timeout=30, check=True
    ).stdout.splitlines()
    name, driver = (word.strip() for word in lines[0].split(","))
  except (OSError, subprocess.SubprocessError, IndexError, ValueError):
    return "", ""
  return name, driver


def read(file: Path | None) -> dict[str, dict]:
  """The results of the parts in a JSON file, or {} where there is no file."""
  return json.loads(file.read_text())["parts"] if file and file.exists() else {}


def write(parts: dict[str, dict], out: Path | None, markdown: Path | None) -> None:
  """Writes the JSON file and the section of RESULTS.md, where they are requested."""
  if out:
    partial = out.with_name(out.name + ".tmp")
    partial.write_text(json.dumps({"parts": parts}, indent=1) + "\n")
    os.replace(partial, out)
  if markdown:
    results.write_section("gpu", page.section(parts), markdown)


def say(line: str) -> None:
  print(line, flush=True)


def measure(flags: argparse.Namespace) -> dict[str, dict]:
  """Runs the chosen parts, and writes the results after each of them.

  Returns all results, with earlier results of the other parts.
  """
  parts, (gpu, driver) = read(flags.out), card()
  words = [word for word in flags.argv if not word.startswith(("--out", "--results", "--cache"))]
  ran = {
    "gpu": gpu,
    "driver": driver,
    "versions": versions(),
    "tiny": flags.tiny,
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "command": shlex.join(["python", "benchmarks/gpu.py", *words]),
  }
  write(parts, None, flags.results)  # an unwritable file is noticed before anything is run
  total = flags.minutes * 60 if flags.minutes else registry.total_of(flags.parts, flags.chosen)
  say(
    f"{', '.join(part.name for part in flags.chosen)}: {total / 60:.1f} minutes at most, on"
    f" {gpu or 'no NVIDIA GPU'}"
  )

  def keep(name: str, result: dict) -> None:
    parts[name] = result | {"ran": ran}
    write(parts, flags.out, flags.results)

  with tempfile.TemporaryDirectory() as folder:
    runner.run(flags.chosen, total, (flags.cache or Path(folder)).absolute(), flags.tiny, say, keep)
  return parts


def main(argv: list[str]) -> int:
  """Measures or writes. Returns 1 where a part failed."""
  flags = parse(argv)
  flags.argv, start = argv, time.monotonic()
  if flags.write:
    write(read(flags.out), None, flags.results)
    return 0
  parts = measure(flags)
  chosen = {part.name: parts[part.name] for part in flags.chosen}
  for result in chosen.values():
    say(f"\n{result['title']}\n\n{page.table(result)}")
  failed = [name for name, result in chosen.items() if result["problem"]]
  say(
    f"\n{time.monotonic() - start:.0f} s" + (f"; not whole: {', '.join(failed)}" if failed else "")
  )
  return int(bool(failed))


if __name__ == "__main__":
  try:
    sys.exit(main(sys.argv[1:]))
  except results.ResultsError as error:
    sys.exit(f"error: {error}")
