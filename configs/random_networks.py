"""What the presets `tiny` of the full-size recipes share: small networks with random weights."""

from ml_collections import ConfigDict

REPLICATED = ((".*", ()),)


def shrink(config: ConfigDict, checkpoint: str) -> None:
  """Changes a recipe to two iterations of small networks on a CPU, in a minute or two.

  It shows that everything fits together, and learns nothing.

  Args:
    config: is changed.
    checkpoint: as "random:assets/random-flux", a folder with the networks' config.json files.
  """
  config.iterations = 2
  config.model.update(
    checkpoint=checkpoint,
    size=(32, 32),
    dtype="float32",
    frozen_dtype="float32",
    remat=False,
  )
  config.data.prompts_per_iteration = 4
  config.sampler.steps = 4
  config.rollout.update(samples_per_prompt=4, chunk=16)
  # One pass of the update, because on a CPU compiling takes longer than running.
  config.optimizer.update(updates_per_iteration=1, microbatch=16)
  config.mesh.update(data=-1, fsdp=1, lanes=8, rules=REPLICATED, reward_rules=REPLICATED)
  config.evaluation.update(every=0, prompts=4, steps=2, samples=1)
  config.checkpoint.every = 2
