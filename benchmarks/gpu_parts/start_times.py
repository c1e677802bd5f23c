"""Time from the command to the first finished iteration.

Measured with an empty compilation cache, and again with the cache that the first run has filled.
"""

from gpu_parts import follow, measure

ITERATIONS = 3


def run(context) -> None:
  name = context.argument
  config = f"configs/{name}.py" + ":tiny" * context.tiny
  folder = context.folder / "programs"  # empty for the first run
  changes = {"iterations": ITERATIONS, "logging.compilation_cache": folder}
  command = [
    "-m",
    "dancegrpo_jax.main",
    f"--config={config}",
    *(f"--config.{k}={v}" for k, v in changes.items()),
  ]
  for state in ("cold", "programs cached"):
    speeds, row = [], f"{name}: {state}"
    for seconds, values in follow.rows(
      command, context.folder / state.replace(" ", "_"), ITERATIONS
    ):
      if values["iteration"] == 0:
        context.say.row(row, first_iteration=measure.number(seconds, "s"), note=phases(values))
      else:
        speeds.append(values["samples_per_second"])
    context.say.row(row, afterwards=measure.spread(speeds, "images/s"))


def phases(values: dict) -> str:
  """How the first iteration's time is divided. The programs were compiled before it."""
  parts = {
    key.removeprefix("time/"): value for key, value in values.items() if key.startswith("time/")
  }
  return "in it: " + ", ".join(
    f"{name} {seconds:.1f} s" for name, seconds in parts.items() if name != "total"
  )
