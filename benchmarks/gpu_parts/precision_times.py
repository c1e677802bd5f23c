"""Cost and effect of float32 products: `main` with both settings of model.matmul_precision."""

from gpu_parts import follow, measure

ITERATIONS = 3


def run(context) -> None:
  name = context.argument
  config = f"configs/{name}.py" + ":tiny" * context.tiny
  for precision in ("highest", "default"):
    command = [
      "-m",
      "dancegrpo_jax.main",
      f"--config={config}",
      f"--config.iterations={ITERATIONS}",
      f"--config.model.matmul_precision={precision}",
      f"--config.logging.compilation_cache={context.cache}",
    ]
    found = [row for _, row in follow.rows(command, context.folder / precision, ITERATIONS)]
    speeds = [row["samples_per_second"] for row in found[1:]]
    drift = max(row["ratio/rollout_drift_max"] for row in found)
    context.say.row(
      f"{name}: {precision}",
      afterwards=measure.spread(speeds, "images/s"),
      rollout_drift=measure.number(drift),
      note="drift: the largest |ratio - 1| of the rollout's own log-probabilities",
    )
