"""The update: the ratio is exactly 1 where it must be, the gradient is the policy gradient, batches
may be cut as one likes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_checkpoint import (
  TOY_SHAPE,
  Toy,
  assert_trees_equal,
  moves_between_devices,
  noting,
  relative_error,
  toy_programs,
  update_of,
)

from dancegrpo_jax.diffusion import schedules
from dancegrpo_jax.diffusion.guidance import classifier_free
from dancegrpo_jax.rl import advantages, grpo, lanes, optimize
from dancegrpo_jax.rl.grpo import Objective
from dancegrpo_jax.rl.rollout import Policy, rollout
from dancegrpo_jax.rl.state import TrainState
from dancegrpo_jax.rl.trajectories import Batch, partition
from dancegrpo_jax.types import Conditioning

PROMPTS, GROUP, LANES, SHAPE, STEPS = 4, 8, 8, (2, 2, 3), 9
SAMPLES, TRAINED = PROMPTS * GROUP, STEPS - 1
DANCE = Policy("dance", 0.3, "velocity", STEPS, TRAINED, "ode", "ode", "mean")
DDIM = Policy("ddim", 1.0, "epsilon", STEPS, TRAINED, "ode", "ode", "mean")
PLAIN = Objective(
  old_log_prob="recompute",
  timesteps="all",
  timestep_fraction=1.0,
  kl_weight=0.0,
  kl_mode="exact",
  updates=1,
  microbatch=32,
)
CLIP_RANGE = 1e-4


def grid(policy: Policy) -> schedules.Schedule:
  if policy.prediction == "velocity":
    return schedules.flow_schedule(STEPS, 1.0)
  return schedules.diffusion_schedule(
    STEPS,
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    spacing="leading",
    steps_offset=1,
    set_alpha_to_one=False,
  )


def parameters(seed: int = 0, scale: float = 1.0) -> dict:
  rng, size = np.random.default_rng(seed), int(np.prod(SHAPE))
  shapes = {"first": (size, 32), "prompt": (PROMPTS, 32), "time": (1, 32), "last": (32, size)}
  drawn = {
    name: scale * rng.standard_normal(shape) / np.sqrt(shape[0]) for name, shape in shapes.items()
  }
  return {name: jnp.asarray(value, jnp.float32) for name, value in drawn.items()}


def network(params, x, time, rows):
  """One hidden layer over the sample, the time and the prompt's row."""
  hidden = (
    x.reshape(len(x), -1) @ params["first"]
    + rows @ params["prompt"]
    + jnp.sin(time[:, None] / 99) * params["time"]
  )
  return (jnp.tanh(hidden) @ params["last"]).reshape(x.shape)


def denoiser(scale: float):
  """As `programs.guided`: classifier-free guidance over conditioning of one row a prompt."""
  rows = Conditioning(jnp.eye(PROMPTS), -jnp.ones((PROMPTS, PROMPTS)) if scale != 1 else None)

  def denoise(params, x, time, prompt):
    branch = classifier_free(lambda x, time, rows: network(params, x, time, rows), scale)
    return branch(x, time, jax.tree.map(lambda leaf: leaf[prompt], rows))

  return denoise


def in_lanes(x: jax.Array, axis: int) -> jax.Array:
  return x.reshape(*x.shape[:axis], LANES, -1, *x.shape[axis + 1 :])


@functools.cache
def make_batch(policy: Policy, scale: float = 1.0) -> Batch:
  """Trajectories that the policy itself drew, with random advantages."""
  rng = np.random.default_rng(1)
  initial, noise = (
    rng.standard_normal((SAMPLES, *SHAPE)),
    rng.standard_normal((STEPS, SAMPLES, *SHAPE)),
  )
  noise, prompt = jnp.asarray(noise, jnp.float32), jnp.arange(SAMPLES, dtype=jnp.int32) // GROUP
  denoise = denoiser(scale)

  def draw(params, initial):
    return rollout(
      lambda x, time: denoise(params, x, time, prompt),
      grid(policy),
      policy,
      initial,
      lambda i: noise[i],
    )

  drawn = jax.jit(draw)(parameters(), jnp.asarray(initial, jnp.float32))
  advantage = jnp.asarray(rng.standard_normal(SAMPLES), jnp.float32)
  return Batch(
    drawn.step_index,
    in_lanes(drawn.latents, 1),
    in_lanes(drawn.log_probs, 1),
    in_lanes(prompt, 0),
    in_lanes(advantage, 0),
    jnp.ones((LANES, SAMPLES // LANES)),
  )


class Probe(NamedTuple):
  """Optimizer state of `probe`."""

  rate: Any
  gradient: Any


def probe() -> optax.GradientTransformation:
  """Gradient descent whose state holds the rate and the last gradient: one program serves every
  rate, and a test can read the gradient without the round-off of a difference of parameters."""
  return optax.GradientTransformation(
    lambda params: Probe(jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)),
    lambda g, state, params: (jax.tree.map(lambda x: -state.rate * x, g), Probe(state.rate, g)),
  )


@functools.cache
def program(policy, settings, optimizer=probe, scale=1.0, guard=False, ema_decay=0.0):
  """`(state, reference, batch, seed) -> (state, metrics)`, jitted."""

  def run(state, reference, batch, seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    samples = jax.vmap(lambda i: jax.random.fold_in(keys[0], i))(jnp.arange(SAMPLES))
    surrogate = grpo.clipped(CLIP_RANGE, guard)
    algorithm = grpo.algorithm(
      denoiser(scale), grid(policy), policy, settings, surrogate, reference
    )
    return optimize.update(algorithm, optimizer(), state, batch, (samples, keys[1]), ema_decay)

  return jax.jit(run)


def make_state(opt_state, ema: bool = False) -> TrainState:
  zero, params = jnp.zeros((), jnp.int32), parameters()
  return TrainState(zero, zero, params, opt_state, params if ema else None, {})


def descend(rate: float, ema: bool = False) -> TrainState:
  return make_state(probe().init(parameters())._replace(rate=jnp.float32(rate)), ema)


def step(policy, settings, batch, rate: float = 0.0, *, reference=None, scale=1.0, guard=False):
  """One call of the update with the probe. Its `opt_state.gradient` is that of the last optimizer
  step.
  """
  run = program(policy, settings, scale=scale, guard=guard)
  return run(descend(rate), reference, batch, 3)


# Promise 1: the ratio.


@pytest.mark.parametrize(
  "microbatch, updates, scale, guard",
  [
    (8, 4, 1.0, False),
    (16, 4, 1.0, False),
    (32, 4, 1.0, False),
    (8, 4, 3.0, False),
    (32, 4, 3.0, False),
  ]
  + [(32, 1, 1.0, False), (32, 1, 3.0, False), (16, 4, 1.0, True)],
)
def test_ratio_is_exactly_one_before_the_first_step(microbatch, updates, scale, guard):
  """...and stays 1 in later ones as long as no step changes the parameters. Their old log-probs
  come from a pass of their own, so that this half can fail; the first step's ratio is 1 by
  construction."""
  settings = PLAIN._replace(updates=updates, microbatch=microbatch)
  batch = make_batch(DDIM, scale)
  state, metrics = step(DDIM, settings, batch, scale=scale, guard=guard)
  assert metrics["ratio/drift_max"] == 0 and state.step == updates
  assert abs(metrics["ratio/min"] - 1) <= 1e-6 and abs(metrics["ratio/max"] - 1) <= 1e-6
  assert (
    abs(metrics["approx_kl"]) <= 1e-11
  )  # half the squared log ratio, not the round-off of a ratio near 1
  moved, metrics = step(DDIM, settings, batch, 0.1, scale=scale, guard=guard)
  assert metrics["ratio/drift_max"] == 0 and metrics["grad_norm"] > 1e-3
  assert (metrics["ratio/max"] - metrics["ratio/min"] > 1e-4) == (
    updates > 1
  )  # the later steps see what the first one did
  assert relative_error(moved.trainable, parameters()) > 1e-5


def test_the_two_sources_of_old_log_probs():
  """The rollout's agree with the update's own forward to round-off, and `ratio/drift_max` says
  which of them is in use.
  """
  batch = make_batch(DDIM)
  by_rollout = PLAIN._replace(old_log_prob="rollout")
  own, rolled = step(DDIM, PLAIN, batch)[1], step(DDIM, by_rollout, batch)[1]
  assert own["ratio/drift_max"] == 0
  assert rolled["ratio/drift_max"] <= 1e-6 and rolled["ratio/rollout_drift_max"] <= 1e-6
  np.testing.assert_allclose(
    own["ratio/rollout_drift_max"], rolled["ratio/rollout_drift_max"], atol=1e-7
  )
  # a rollout by another policy: its own log-probs give the true ratio to it, which the update's
  # forward can't know
  shifted = batch._replace(log_probs=batch.log_probs - 0.01)
  own, rolled = step(DDIM, PLAIN, shifted)[1], step(DDIM, by_rollout, shifted)[1]
  assert own["ratio/drift_max"] == 0
  for drift in (
    own["ratio/rollout_drift_max"],
    rolled["ratio/rollout_drift_max"],
    rolled["ratio/drift_max"],
  ):
    np.testing.assert_allclose(drift, np.expm1(0.01), rtol=1e-3)


# The gradient. The policy is dance noise on rectified flow, eq. (8) of arXiv 2505.07818, all steps
# at once.


SIGMA = jnp.linspace(1.0, 0.0, STEPS + 1)
HERE, DT = (
  jnp.repeat(value, SAMPLES).reshape(-1, 1, 1, 1)
  for value in (SIGMA[:TRAINED], jnp.diff(SIGMA)[:TRAINED])
)
STD = 0.3 * jnp.sqrt(-DT)


def means(params, batch: Batch, scale: float = 1.0):
  """Mean of every (step, lane, sample), rows `[steps x samples, ...]`."""
  x = batch.latents[:-1].reshape(-1, *SHAPE)
  v = denoiser(scale)(
    params, x, 1000 * HERE.reshape(-1), jnp.tile(batch.prompt.reshape(-1), TRAINED)
  )
  return x + v * DT + 0.3**2 / 2 * (x + (1 - HERE) * v) / HERE * DT


def log_probs(params, batch: Batch, scale: float = 1.0):
  """log p of every (step, lane, sample), averaged over the dimensions."""
  error = batch.latents[1:].reshape(-1, *SHAPE) - means(params, batch, scale)
  values = -(error**2) / (2 * STD**2) - jnp.log(STD) - jnp.log(2 * jnp.pi) / 2
  return values.mean((1, 2, 3)).reshape(TRAINED, LANES, -1)


def policy_gradient(batch: Batch, chosen=slice(None), scale: float = 1.0):
  """Gradient of -mean(A log p) over chosen entries of `[steps, lanes, samples]`."""
  return jax.jit(
    jax.grad(
      lambda params: -(batch.advantage[None] * log_probs(params, batch, scale))[chosen].mean()
    )
  )(parameters())


@pytest.mark.parametrize("microbatch, scale", [(32, 1.0), (256, 3.0)])
def test_gradient_at_ratio_one_is_the_policy_gradient(microbatch, scale):
  batch = make_batch(DANCE, scale)
  state, metrics = step(DANCE, PLAIN._replace(microbatch=microbatch), batch, scale=scale)
  expected = policy_gradient(batch, scale=scale)
  assert relative_error(state.opt_state.gradient, expected) < 1e-4
  np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(expected), rtol=1e-4)
  np.testing.assert_allclose(metrics["loss"], -batch.advantage.mean(), atol=1e-6)


def test_a_chosen_part_of_the_steps_has_the_gradient_of_that_part():
  batch = make_batch(DANCE)
  state, _ = step(DANCE, PLAIN._replace(timesteps="last", timestep_fraction=0.4), batch)  # 3 of 8
  assert relative_error(state.opt_state.gradient, policy_gradient(batch, slice(-3, None))) < 1e-4


def test_microbatches_change_nothing():
  """The shuffle deals the same transitions to each optimizer step, whose gradient is a sum over
  them, however they are cut.
  """
  settings = PLAIN._replace(timesteps="random", timestep_fraction=0.6, updates=2)
  runs = [
    step(DDIM, settings._replace(microbatch=size), make_batch(DDIM), 0.1)[0].trainable
    for size in (8, 32)
  ]
  assert relative_error(runs[0], runs[1]) <= 1e-6
  assert relative_error(runs[0], parameters()) > 1e-4


def test_constant_rewards_change_nothing():
  """Rewards that are all .3 have a std of 1e-8 in float32: the advantages must still be 0, and
  Adam's step too.
  """
  scores = {"clip": jnp.full((PROMPTS, GROUP), 0.3)}
  result = advantages.combine(
    scores, (("clip", 1.0),), "advantages", ddof=1, eps=1e-8, clamp=5.0, min_spread=1e-6
  )
  batch = make_batch(DDIM)._replace(advantage=in_lanes(result.advantage.reshape(-1), 0))

  def adam():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.0))

  state, metrics = program(DDIM, PLAIN._replace(updates=4), adam)(
    make_state(adam().init(parameters())), None, batch, 3
  )
  assert_trees_equal(state.trainable, parameters())
  assert metrics["grad_norm"] == 0 and metrics["loss"] == 0 and state.step == 4


LEFT_OUT = (np.arange(SAMPLES) % 5 == 2).reshape(LANES, -1)


def masked() -> Batch:
  batch = make_batch(DANCE)
  return batch._replace(
    weight=jnp.where(LEFT_OUT, 0.0, 1.0), advantage=jnp.where(LEFT_OUT, 0.0, batch.advantage)
  )


def spoilt(batch: Batch, latents: float, log_probs: float) -> Batch:
  """The samples that are left out, with something else in them."""
  return batch._replace(
    latents=jnp.where(LEFT_OUT.reshape(1, LANES, -1, 1, 1, 1), latents, batch.latents),
    log_probs=jnp.where(LEFT_OUT[None], log_probs, batch.log_probs),
  )


def test_samples_of_weight_zero_have_no_influence():
  batch = masked()
  state, metrics = step(DANCE, PLAIN, batch)
  assert (
    relative_error(state.opt_state.gradient, policy_gradient(batch, np.s_[:, ~LEFT_OUT])) < 1e-4
  )
  garbage = spoilt(batch, 50.0, -7.0)._replace(advantage=jnp.where(LEFT_OUT, 1e6, batch.advantage))
  again, same = step(DANCE, PLAIN, garbage)
  assert_trees_equal(again.opt_state, state.opt_state)
  assert_trees_equal(same, metrics)


def test_a_failed_sample_may_hold_nan():
  """A trajectory that diverged decodes to NaN, so its reward fails and its weight is 0: the others'
  step must not be lost.
  """
  batch = masked()
  expected, _ = step(DANCE, PLAIN, batch)
  state, metrics = step(DANCE, PLAIN, spoilt(batch, jnp.nan, jnp.nan))
  assert metrics["optimizer/skipped"] == 0
  assert relative_error(state.opt_state.gradient, expected.opt_state.gradient) < 1e-6


def test_weights_are_averaged_over_the_whole_optimizer_step():
  """The samples of weight 1 lie unevenly in the microbatches: the mean is over the step, not a mean
  of means.
  """
  batch = make_batch(DANCE)
  few = jnp.zeros((LANES, SAMPLES // LANES)).at[:, 0].set(1.0)
  batch = batch._replace(weight=few, advantage=few * batch.advantage)
  state, _ = step(DANCE, PLAIN, batch)
  assert relative_error(state.opt_state.gradient, policy_gradient(batch, np.s_[:, :, 0])) < 1e-4


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
  """Each sample has one transition here, so that the one with a NaN spoils one of the two optimizer
  steps.
  """
  settings = PLAIN._replace(timesteps="first", timestep_fraction=0.125, updates=2, microbatch=8)
  adam = functools.partial(optax.adamw, 1e-2)
  batch, run = make_batch(DDIM), program(DDIM, settings, adam, ema_decay=0.5)
  nan = batch._replace(advantage=batch.advantage.at[3, 1].set(jnp.nan))
  half, metrics = run(make_state(adam().init(parameters()), ema=True), None, nan, 3)
  assert metrics["optimizer/skipped"] == 1 and half.skipped == 1 and half.step == 1
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(half))
  assert relative_error(half.trainable, parameters()) > 1e-4
  whole, metrics = run(
    half, None, batch._replace(advantage=jnp.full_like(batch.advantage, jnp.nan)), 4
  )
  assert metrics["optimizer/skipped"] == 2 and whole.skipped == 3
  assert_trees_equal(whole._replace(skipped=half.skipped), half)
  after, metrics = run(whole, None, batch, 5)
  assert metrics["optimizer/skipped"] == 0 and after.step == 3


# KL, guard, EMA.


def test_kl_pulls_towards_the_reference():
  batch, params, reference = make_batch(DANCE), parameters(), parameters(seed=5, scale=0.5)
  batch = batch._replace(advantage=jnp.zeros_like(batch.advantage))

  @jax.jit
  def kl(params):
    """Of two Gaussians of equal std, reduced as the log-prob is: mean((mean - mean_ref)^2) / (2
    std^2).
    """
    return ((means(params, batch) - means(reference, batch)) ** 2 / (2 * STD**2)).mean()

  settings = PLAIN._replace(kl_weight=0.5)
  state, metrics = step(DANCE, settings, batch, 0.05, reference=reference)
  value, gradient = jax.value_and_grad(kl)(params)
  np.testing.assert_allclose(metrics["kl"], value, rtol=1e-4)
  np.testing.assert_allclose(metrics["loss"], 0.5 * value, rtol=1e-4)
  assert relative_error(state.opt_state.gradient, jax.tree.map(lambda g: 0.5 * g, gradient)) < 1e-4
  assert kl(state.trainable) < value
  # from the reference itself: no distance before the first step, some after it
  state, first = step(DANCE, settings, make_batch(DANCE), 0.1, reference=params)
  _, second = program(DANCE, settings)(state, params, make_batch(DANCE), 4)
  assert first["kl"] == 0 and second["kl"] > 0


def test_guard_weighs_each_step_by_its_width():
  """GRPO-Guard's gradient at ratio 1: A mean(d mean . noise) / D over the steps, arXiv
  2510.22319.
  """
  batch = make_batch(DANCE)

  def loss(params):
    mean = means(params, batch)
    noise = jax.lax.stop_gradient(batch.latents[1:].reshape(-1, *SHAPE) - mean) / STD
    advantage = jnp.tile(batch.advantage.reshape(-1), TRAINED)
    return -(advantage * (mean * noise).mean((1, 2, 3)) / -DT.reshape(-1)).mean()

  state, metrics = step(DANCE, PLAIN, batch, guard=True)
  assert metrics["ratio/drift_max"] == 0
  assert relative_error(state.opt_state.gradient, jax.jit(jax.grad(loss))(parameters())) < 1e-4


def test_ema_is_its_closed_form():
  """ema_n = d^n p_0 + (1 - d) sum_k d^(n - k) p_k over every optimizer step."""
  decay, batch = 0.8, make_batch(DDIM)
  run, state, history = program(DDIM, PLAIN, ema_decay=decay), descend(0.1, ema=True), []
  for seed in range(3):
    state, _ = run(state, None, batch, seed)
    history.append(state.trainable)
  expected = jax.tree.map(lambda p: decay**3 * np.float64(p), parameters())
  for k, params in enumerate(history):
    expected = jax.tree.map(
      lambda e, p, k=k: e + (1 - decay) * decay ** (2 - k) * np.float64(p), expected, params
    )
  assert relative_error(state.ema, expected) < 1e-6
  assert relative_error(state.ema, state.trainable) > 1e-4


# Lanes.


def test_every_pair_is_dealt_once_and_stays_in_its_lane():
  lanes, samples, trained, updates, microbatch = 4, 6, 3, 3, 12
  rng = np.random.default_rng(0)
  selected = np.stack(
    [[rng.permutation(9)[:trained] for _ in range(samples)] for _ in range(lanes)]
  ).astype(np.int32)
  sample, steps = (
    np.asarray(x) for x in partition(jax.random.key(0), jnp.asarray(selected), updates, microbatch)
  )
  assert (
    sample.shape
    == steps.shape
    == (updates, lanes * samples * trained // updates // microbatch, lanes, microbatch // lanes)
  )
  orders = []
  for lane in range(lanes):
    dealt = list(zip(sample[:, :, lane].reshape(-1), steps[:, :, lane].reshape(-1)))
    assert sorted(dealt) == sorted((s, t) for s in range(samples) for t in selected[lane, s])
    orders.append(tuple(sample[:, :, lane].reshape(-1)))
  assert len(set(orders)) == lanes  # every lane has an order of its own
  other = np.asarray(partition(jax.random.key(1), jnp.asarray(selected), updates, microbatch)[0])
  assert (other != sample).any()


# The programs of a run, on 8 devices and on 1.


ADVANTAGE = np.random.default_rng(0).standard_normal(16).astype(np.float32)


@functools.cache
def toy(devices: int, scale: float, size: int = 8, best_of: int = 0) -> tuple[Toy, Any]:
  """Programs, and `advantage -> (state, metrics)` of an update with a rollout of 16 samples in
  chunks of `size`; it leaves in `seen` the shapes that its programs were called with.
  """
  run = toy_programs(
    jax.devices()[:devices],
    sampler__guidance_scale=scale,
    rollout__chunk=size,
    advantage__best_of=best_of,
    optimizer__updates_per_iteration=2,
    optimizer__microbatch=8,
    optimizer__learning_rate=1e-3,
    optimizer__eps=1e-3,
    optimizer__weight_decay=0.0,
    ema__decay=0.9,
  )
  ids, numbers = np.arange(4, dtype=np.int32), np.arange(16, dtype=np.int32)
  with jax.set_mesh(run.mesh):
    rolled = tuple(
      run.compiled.rollout(run.trainable, {}, run.conditioning, ids, chunk, np.int32(0))
      for chunk in lanes.deal(16, size, 8)
    )

  def updated(advantage, seen=None):
    rest = (np.float32(advantage), np.ones(16, np.float32), numbers, np.int32(0))
    compiled = run.compiled if seen is None else noting(run.compiled, seen)
    return update_of(compiled, run.new_state(), {}, None, run.conditioning, ids, rolled, *rest)

  return run, updated


def call(devices: int, scale: float, advantage):
  run, updated = toy(devices, scale)
  with jax.set_mesh(run.mesh):
    state, metrics = updated(advantage)
  return jax.device_get(state), jax.device_get(metrics)


def test_eight_devices_make_the_update_of_one(scale: float = 3.0):
  before = jax.device_get(toy(1, scale)[0].trainable)
  (a, metrics_a), (b, metrics_b) = (call(devices, scale, ADVANTAGE) for devices in (1, 8))
  assert metrics_a["ratio/drift_max"] == metrics_b["ratio/drift_max"] == 0
  assert relative_error(b.trainable, a.trainable) < 1e-5 and relative_error(b.ema, a.ema) < 1e-5
  changes = [jax.tree.map(np.subtract, state.trainable, before) for state in (a, b)]
  assert relative_error(*changes) < 1e-3 and relative_error(a.trainable, before) > 1e-4
  np.testing.assert_allclose(metrics_b["grad_norm"], metrics_a["grad_norm"], rtol=1e-4)
  state, metrics = call(
    8, scale, np.zeros(16)
  )  # the parameters stay, so the second step's ratio compares two passes
  assert_trees_equal(state.trainable, before)
  assert abs(metrics["ratio/min"] - 1) <= 1e-6 and abs(metrics["ratio/max"] - 1) <= 1e-6
  update = toy(8, scale)[0].compiled.update
  names = {"deal", "remember", "accumulate", "first_step", "step", "summary"}
  assert {name: program._cache_size() for name, program in update.items()} == dict.fromkeys(
    names, 1
  )


@pytest.mark.parametrize("best_of", [0, 4])  # 4: all, by way of the selection
def test_chunks_change_no_update(best_of):
  """Two optimizer steps over the same batches: what a lane holds does not depend on the chunks that
  it came in.
  """
  changes = []
  for size in (8, 16):
    run, updated = toy(8, 1.0, size, best_of)
    with jax.set_mesh(run.mesh):
      state, _ = updated(ADVANTAGE)
    changes.append(
      jax.tree.map(np.subtract, jax.device_get(state.trainable), jax.device_get(run.trainable))
    )
  assert (
    relative_error(*changes) < 1e-3
  )  # round-off of other shapes is up to 3e-4; other batches differ by their whole size


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_no_device_fetches_trajectories(scale):
  """What lanes are for: nothing as large as a sample's latents moves between devices, only sums of
  gradients and statistics.
  """
  run, updated = toy(8, scale)
  with jax.set_mesh(run.mesh):
    seen: dict = {}
    updated(ADVANTAGE, seen)
    texts = {
      name: program.lower(*seen[name]).compile().as_text()
      for name, program in run.compiled.update.items()
    }
  assert "all-reduce" in texts["accumulate"]  # the gradients: of a program on several devices
  size = int(np.prod(TOY_SHAPE))
  for name, text in texts.items():
    assert not [move for move in moves_between_devices(text) if np.prod(move) >= size], name
