"""Two iterations of `main` with all that a run holds in memory.

That is networks, encoders, reward and optimizer.
"""

from pathlib import Path

from gpu_parts import cuts, follow, measure

PHASES = ("rollout", "decode", "reward", "update")
MAIN = Path(__file__).with_name("drawn_main.py")


def run(context) -> None:
  cuts.describe(context.argument, context.folder)
  words = cuts.flags(context.argument, context.tiny, context.folder)
  command = [str(MAIN), *words, f"--config.logging.compilation_cache={context.cache}"]
  names = iter(("first iteration", "second iteration"))
  for seconds, values in follow.rows(command, context.folder / "run", 2):
    name = next(names)
    cells = {phase: measure.number(values[f"time/{phase}"], "s") for phase in PHASES}
    cells["time"] = measure.number(values["time/total"], "s")
    cells["images/s"] = measure.number(values["samples_per_second"])
    drift = values["ratio/drift_max"]
    context.say.cells(
      name, cells, note=f"told {seconds:.0f} s after the start; ratio/drift_max {drift:.3g}"
    )
