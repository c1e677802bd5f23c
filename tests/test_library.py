"""The package as a library: what it offers, that asking for it is cheap, the defaults, and the
snippets of docs/library.md.
"""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dancegrpo_jax as dg
from dancegrpo_jax.rl.policy import policy_of
from dancegrpo_jax.settings import config_file, stored_config

ROOT = Path(__file__).parent.parent
FIELDS = stored_config.flatten(config_file.load(str(ROOT / "configs" / "common.py")))


# What is offered


def test_every_name_is_there():
  for name in dg.__all__:
    assert getattr(dg, name) is not None and name in dir(dg)
  with pytest.raises(AttributeError, match="'dancegrpo_jax' has no attribute 'Polciy'"):
    dg.Polciy  # noqa: B018


def test_type_checkers_see_the_same_names():
  (block,) = [
    node
    for node in ast.parse((ROOT / "dancegrpo_jax" / "__init__.py").read_text()).body
    if isinstance(node, ast.If)
  ]
  seen = {alias.name: node.module for node in block.body for alias in node.names}
  assert sorted(seen) == sorted(dg.__all__) == sorted([*dg._MODULES, *dg._HOMES])
  for name, module in seen.items():
    assert module == f"dancegrpo_jax.{dg._HOMES.get(name, 'rl')}"


def test_no_name_hides_a_room():
  rooms = {path.stem for path in (ROOT / "dancegrpo_jax").iterdir()}
  assert not rooms & set(dg.__all__)


def test_asking_for_it_does_not_start_jax():
  """Commands answer their flags, and settle what JAX reads when it starts, after this import."""
  program = (
    "import sys, dancegrpo_jax as dg\n"
    "assert not {'jax', 'numpy', 'flax'} & set(sys.modules)\n"
    "for name in dg.__all__: getattr(dg, name)\n"
    "from jax._src import xla_bridge\n"
    "assert not xla_bridge.backends_are_initialized()\n"
  )
  subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def documented() -> list:
  """Every function and type of the library, modules opened."""
  found = []
  for name in dg.__all__:
    value = getattr(dg, name)
    if inspect.ismodule(value):
      found += [
        pytest.param(thing, id=f"{name}.{key}")
        for key, thing in vars(value).items()
        if not key.startswith("_") and getattr(thing, "__module__", "") == value.__name__
        if inspect.isfunction(thing) or inspect.isclass(thing)
      ]
    else:
      found.append(pytest.param(value, id=name))
  return found


@pytest.mark.parametrize("thing", documented())
def test_everything_has_a_docstring(thing):
  """Of its own: a NamedTuple without one has a list of its fields."""
  text = inspect.getdoc(thing) or ""
  assert len(text.split()) >= 5 and not text.startswith(f"{thing.__name__}(")
  if inspect.isfunction(thing) and "Args:" in text:
    for name in inspect.signature(thing).parameters:
      assert re.search(rf"^  ([\w, ]+, )?{name}[,:]", text, re.M), name


# Defaults

FIELD_OF = {  # a default -> the field of configs/common.py that it equals
  "Policy.outside": "sampler.window.outside",
  "Policy.last_step": "sampler.last_step",
  "Policy.log_prob": "objective.log_prob",
  "log_prob.reduce": "objective.log_prob",
  "flow_schedule.shift": "sampler.shift",
  "rng.initial_noise.shared": "rollout.shared_noise",
  "state.create.ema_decay": "ema.decay",
  "optimize.update.ema_decay": "ema.decay",
  "grpo.Objective.old_log_prob": "objective.old_log_prob",
  "grpo.Objective.timesteps": "objective.timesteps",
  "grpo.Objective.timestep_fraction": "objective.timestep_fraction",
  "grpo.Objective.kl_weight": "objective.kl.weight",
  "grpo.Objective.kl_mode": "objective.kl.mode",
  "grpo.Objective.updates": "optimizer.updates_per_iteration",
  "grpo.Objective.microbatch": "optimizer.microbatch",
  "grpo.clipped.guard": "objective.guard",
  "dppo.trust_region.tau": "objective.dppo.tau",
  "advantages.combine.mode": "reward.combine",
  "advantages.prompt_statistics.min_count": "advantage.history.min_count",
} | {
  f"advantages.{function}.{name}": f"advantage.{name}"
  for function, names in {
    "group_statistics": ("ddof",),
    "group_advantages": ("ddof", "eps", "clamp", "min_spread"),
    "combine": ("ddof", "eps", "clamp", "min_spread"),
    "prompt_statistics": ("ddof",),
  }.items()
  for name in names
}
OF_NO_FIELD = {
  "Policy.window": None,  # every step that may be stochastic: window.size = 0, see below
  "rollout.start": 0,  # where there is no window
  "diffusion_schedule.rescale_betas_zero_snr": False,  # likewise
  "flow_schedule.num_train_timesteps": 1000,  # of the checkpoint's scheduler
  "state.create.prompt_stats": None,
  "advantages.group_advantages.statistics": None,
  "advantages.combine.statistics": None,
  "grpo.Surrogate.reports": (),
  "grpo.Surrogate.needs_means": False,
  "grpo.algorithm.reference": None,
  "trajectories.batch_of.chosen": None,
  "trajectories.batch_of.count": 1,  # one lane: the library does not know of devices
}


def defaults() -> dict:
  return {
    f"{thing.id}.{name}": parameter.default
    for thing in documented()
    for name, parameter in inspect.signature(thing.values[0]).parameters.items()
    if parameter.default is not parameter.empty
  }


def test_defaults_are_those_of_the_config():
  expected = {name: FIELDS[field] for name, field in FIELD_OF.items()} | OF_NO_FIELD
  assert defaults() == expected


def test_a_policy_without_a_window_is_the_configs():
  config = config_file.load(str(ROOT / "configs" / "common.py"))
  theirs = policy_of(config, "epsilon")
  mine = dg.Policy(kind="ddim", noise_level=1.0, prediction="epsilon", steps=config.sampler.steps)
  assert mine.width == theirs.width == 9
  assert mine._replace(window=theirs.window) == theirs


# Mistakes that arrays would not tell of

GRID = dg.flow_schedule(steps=4)
POLICY = dg.Policy(kind="dance", noise_level=0.5, prediction="velocity", steps=4)


def draw(policy=POLICY, schedule=GRID, samples=6) -> dg.Rollout:
  initial = jax.random.normal(jax.random.key(0), (samples, 2))
  return dg.rollout(
    network_output=lambda x, time: -x,
    schedule=schedule,
    policy=policy,
    initial=initial,
    step_noise=lambda i: jnp.ones_like(initial),
  )


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"kind": "dnace"}, "sampler kind is 'dnace', must be one of ode, ddim"),
    ({"outside": "euler"}, "sampler kind is 'euler'"),
    ({"last_step": "od"}, "last_step is 'od', must be one of ode, x0hat, sde"),
    ({"window": 4}, "window is 4, must lie between 0 and the 3 policy steps"),
    ({"steps": 5}, "the policy has 5 steps and the schedule 4"),
    ({"log_prob": "median"}, "log_prob reduction is 'median'"),
  ],
)
def test_a_policy_that_makes_no_sense(changes, message):
  with pytest.raises(ValueError, match=message):
    draw(POLICY._replace(**changes))


def output(params, x, time, prompt):
  return params["factor"] * x


def algorithm(surrogate=None, reference=None, **changes):
  return dg.grpo.algorithm(
    policy_output=output,
    schedule=GRID,
    policy=POLICY,
    settings=dg.grpo.Objective(**changes),
    surrogate=surrogate or dg.grpo.clipped(clip_range=1e-4),
    reference=reference,
  )


def test_an_algorithm_that_makes_no_sense():
  with pytest.raises(ValueError, match="old_log_prob is 'recomputed', must be one of recompute"):
    algorithm(old_log_prob="recomputed")
  for surrogate in (dg.dppo.trust_region(), dg.grpo.clipped(clip_range=1e-4, guard=True)):
    with pytest.raises(ValueError, match="needs the old policy's means"):
      algorithm(surrogate, old_log_prob="rollout")
  with pytest.raises(ValueError, match="KL mode is 'exactly'"):
    algorithm(reference={"factor": jnp.ones(())}, kl_mode="exactly")


RESULT = dg.advantages.combine({"r": jnp.arange(6.0).reshape(2, 3)}, (("r", 1.0),))


def test_a_batch_of_groups():
  drawn = draw()
  batch = dg.trajectories.batch_of_groups(drawn, RESULT)
  np.testing.assert_array_equal(batch.prompt, [[0, 0, 0, 1, 1, 1]])
  np.testing.assert_array_equal(batch.advantage, RESULT.advantage.reshape(1, -1))
  np.testing.assert_array_equal(batch.latents[:, 0], drawn.latents)
  np.testing.assert_array_equal(batch.log_probs[:, 0], drawn.log_probs)
  with pytest.raises(ValueError, match="has 5 samples, the advantages belong to 2 x 3"):
    dg.trajectories.batch_of_groups(draw(samples=5), RESULT)


def test_a_microbatch_that_does_not_fit():
  """6 samples x 1 step: three may be taken at once, and four may not."""
  batch = dg.trajectories.batch_of_groups(draw(), RESULT)
  optimizer = optax.sgd(0.1)
  state = dg.state.create({"factor": -jnp.ones(())}, optimizer)

  def update(microbatch):
    keys = dg.trajectories.keys_of(0, 0, jnp.arange(6) // 3, jnp.arange(6) % 3)
    learned = algorithm(microbatch=microbatch)
    return dg.optimize.update(learned, optimizer, state, batch, keys)

  after, metrics = update(3)
  assert after.step == 1 and metrics["ratio/drift_max"] == 0
  with pytest.raises(
    ValueError, match=r"1 x 4, must divide the 6 transitions \(6 samples x 1 steps"
  ):
    update(4)


def test_a_penalty_without_a_reference():
  """It would be no penalty at all."""
  batch = dg.trajectories.batch_of_groups(draw(), RESULT)
  optimizer = optax.sgd(0.1)
  state = dg.state.create({"factor": -jnp.ones(())}, optimizer)
  keys = dg.trajectories.keys_of(0, 0, jnp.arange(6) // 3, jnp.arange(6) % 3)
  with pytest.raises(ValueError, match="kl_weight is 0.5: this penalty needs a reference"):
    dg.optimize.update(algorithm(kl_weight=0.5, microbatch=6), optimizer, state, batch, keys)


# docs/library.md


@pytest.fixture(scope="module")
def page() -> dict:
  """What the snippets of the page define, one after the other, as they stand there."""
  names: dict = {}
  text = (ROOT / "docs" / "library.md").read_text()
  for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)):
    exec(compile(block, f"docs/library.md, block {number}", "exec"), names)
  return names


def test_the_pages_training_learns(page):
  first, last = np.array(page["means"][:5]), np.array(page["means"][-5:])
  error = np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / 5)
  assert last.mean() - first.mean() > 3 * error


def test_the_pages_guidance(page):
  """Three times the prompt's row: the negative branch of the page has nothing but zeros."""
  params = {"kernel": jax.random.normal(jax.random.key(0), (4, 2))}
  x, time, prompt = jnp.ones((4, 2)), jnp.zeros(4), jnp.arange(4)
  expected = x - 3.0 * params["kernel"]
  np.testing.assert_allclose(page["guided_output"](params, x, time, prompt), expected, rtol=1e-6)


def test_the_pages_own_surrogate(page):
  """Before the first optimizer step its gradient is that of the clipped one."""
  optimizer = optax.sgd(1.0)
  found = []
  for surrogate in (page["surrogate"], dg.grpo.clipped(clip_range=1e-4)):
    learned = algorithm(surrogate, microbatch=6)
    state = dg.state.create({"factor": -jnp.ones(())}, optimizer)
    batch = dg.trajectories.batch_of_groups(draw(), RESULT)
    keys = dg.trajectories.keys_of(0, 0, jnp.arange(6) // 3, jnp.arange(6) % 3)
    after, _ = dg.optimize.update(learned, optimizer, state, batch, keys)
    found.append(float(after.trainable["factor"]))
  assert found[0] == found[1] != -1.0
