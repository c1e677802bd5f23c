"""Flow-DPPO's trust region (arXiv 2606.11025): which transitions are dropped, what the others' loss
and gradient are, and that an update of several optimizer steps does the same.

Expected values are closed forms in NumPy's float64.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_checkpoint import assert_trees_equal, relative_error

from dancegrpo_jax.diffusion import schedules
from dancegrpo_jax.rl import dppo, grpo, objective, optimize, trajectories
from dancegrpo_jax.rl.rollout import Policy, rollout
from dancegrpo_jax.rl.state import TrainState

# The surrogate by itself: every sign of the advantage, every direction of the ratio, and a
# divergence below, at and above tau. All numbers of the divergence are powers of 2, so that "at" is
# exact in float32: with std 1/2 a shift d of every dimension is 2 d^2.


TAU, STD, DIMENSIONS = 2.0**-7, 0.5, (2, 3, 4)
SHIFTS = {"below": 2.0**-5, "at": 2.0**-4, "above": 2.0**-3}
CASES = [
  (advantage, log_ratio, shift)
  for advantage in (1.3, -0.8, 0.0)
  for log_ratio in (0.02, -0.03, 0.0)
  for shift in SHIFTS.values()
]
ADVANTAGE, LOG_RATIO, SHIFT = np.array(CASES).T


def policies(log_ratio=LOG_RATIO, shift=SHIFT, std=STD) -> tuple[grpo.Scored, grpo.Remembered]:
  """A new and an old policy so far from each other, whatever the log-probs would be."""
  old_mean = np.random.default_rng(0).integers(-4, 5, (len(shift), *DIMENSIONS)) / 4
  mean = jnp.float32(old_mean + np.reshape(shift, (-1, 1, 1, 1)))
  old_log_prob = np.full(len(shift), -1.25)
  new = grpo.Scored(
    log_prob=jnp.float32(old_log_prob + log_ratio),
    mean=mean,
    std=jnp.full(len(shift), std, jnp.float32),
    output=jnp.zeros_like(mean),
  )
  return new, grpo.Remembered(log_prob=jnp.float32(old_log_prob), mean=jnp.float32(old_mean))


def transitions_of(advantage) -> trajectories.Transitions:
  """Of which the surrogate reads the advantage alone."""
  count = len(advantage)
  numbers, states = jnp.zeros(count), jnp.zeros((count, *DIMENSIONS))
  return trajectories.Transitions(
    step=jnp.zeros(count, jnp.int32),
    x=states,
    x_next=states,
    rollout_log_prob=numbers,
    prompt=jnp.zeros(count, jnp.int32),
    advantage=jnp.asarray(advantage, jnp.float32),
    weight=jnp.ones(count),
  )


def evaluate(new, old, advantage=ADVANTAGE, tau: float = TAU):
  """The surrogate, which reads nothing of the schedule."""
  schedule = schedules.flow_schedule(STEPS, 1.0)
  return dppo.trust_region(tau).loss(transitions_of(advantage), new, old, schedule)


def is_dropped(advantage, ratio, divergence, tau):
  """Eq. (18): at the border or beyond it, and on the way outwards."""
  return (divergence >= tau) & (np.sign(advantage) * (ratio - 1.0) > 0)


@pytest.mark.parametrize("shift, std", [(0.3, 0.7), (-0.02, 0.1), (1.5, 2.0)])
def test_the_divergence_is_the_integral(shift, std):
  """KL(new, old) = the integral of p_new log(p_new / p_old), in each dimension. It is the same the
  other way round, as the two have one std.
  """
  x = np.linspace(-12, 12, 200_001) * std
  log_new, log_old = (-0.5 * ((x - mean) / std) ** 2 for mean in (shift, 0.0))
  p_new, p_old = (np.exp(log) / (std * np.sqrt(2 * np.pi)) for log in (log_new, log_old))
  new, old = policies(np.zeros(1), np.array([shift]), std)
  found = objective.mean_kl(new.mean, old.mean, new.std)
  for p, log_ratio in ((p_new, log_new - log_old), (p_old, log_old - log_new)):
    np.testing.assert_allclose(found, np.trapezoid(p * log_ratio, x), rtol=1e-5)


def test_the_divergence_is_averaged_over_the_dimensions():
  """...which may differ, as may the samples' std."""
  rng = np.random.default_rng(1)
  mean, old_mean, std = rng.normal(size=(2, 5, 3, 7)), rng.normal(size=(5, 3, 7)), rng.random(5)
  for one in mean:
    arrays = (jnp.asarray(array, jnp.float32) for array in (one, old_mean, std))
    expected = ((one - old_mean) ** 2 / (2 * std[:, None, None] ** 2)).mean((1, 2))
    np.testing.assert_allclose(objective.mean_kl(*arrays), expected, rtol=1e-5)


def test_a_deterministic_step_has_no_divergence():
  """As `transitions.kl` and `transitions.log_prob` have it: a last step that ends at sigma 0."""
  new, old = policies(std=0.0)
  assert (objective.mean_kl(new.mean, old.mean, new.std) == 0).all()


def test_who_is_dropped_and_what_the_others_lose():
  losses, statistics = evaluate(*policies())
  ratio, divergence = np.exp(LOG_RATIO), 2 * SHIFT**2
  dropped = is_dropped(ADVANTAGE, ratio, divergence, TAU)
  assert dropped.sum() == 4  # two signs that agree with their ratio, at tau and above
  np.testing.assert_array_equal(statistics["drop_fraction"], dropped)
  np.testing.assert_array_equal(statistics["policy_kl"], divergence)
  np.testing.assert_allclose(statistics["ratio"], ratio, rtol=1e-6)
  np.testing.assert_allclose(losses, np.where(dropped, 0, -ratio * ADVANTAGE), rtol=1e-6)
  assert (losses[dropped] == 0).all()


@pytest.mark.parametrize("where, drops", [("below", False), ("at", True), ("above", True)])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("log_ratio", [0.01, -0.01])
def test_both_conditions_are_needed(where, drops, advantage, log_ratio):
  new, old = policies(np.array([log_ratio]), np.array([SHIFTS[where]]))
  _, statistics = evaluate(new, old, np.array([advantage]))
  assert statistics["drop_fraction"][0] == (drops and advantage * log_ratio > 0)


def test_the_loss_is_not_clipped():
  """A ratio of e^5 counts as such inside the trust region, in both directions."""
  log_ratio, advantage = np.array([5.0, -5.0]), np.array([1.0, -1.0])
  new, old = policies(log_ratio, np.full(2, SHIFTS["below"]))
  losses, _ = evaluate(new, old, advantage)
  np.testing.assert_allclose(losses, -np.exp(log_ratio) * advantage, rtol=1e-5)


def test_the_gradient_is_that_of_the_policy_and_exactly_0_where_dropped():
  """d loss / d mean = -ratio A (x' - mean) / (D std^2) with the mean-reduced log-prob: what the
  divergence itself depends on, so that this also shows that nothing is learned through it.
  """
  rng = np.random.default_rng(2)
  count, size = 64, np.prod(DIMENSIONS)
  old_mean, noise, direction = rng.normal(size=(3, count, *DIMENSIONS))
  x_next = old_mean + STD * noise
  # from 1/4 of tau to 4 times as much
  shift = np.sqrt(2 * TAU) * STD * 2 ** rng.uniform(-1, 1, (count, 1, 1, 1))
  mean = old_mean + shift * direction / np.sqrt((direction**2).mean((1, 2, 3), keepdims=True))
  advantage = rng.normal(size=count)

  def log_prob(mean, numpy=np):
    return -(numpy.square(numpy.asarray(x_next) - mean) / (2 * STD**2)).mean((1, 2, 3))

  def loss(mean):
    std, output = jnp.full(count, STD), jnp.zeros_like(mean)
    new = grpo.Scored(log_prob=log_prob(mean, jnp), mean=mean, std=std, output=output)
    old = grpo.Remembered(log_prob(jnp.float32(old_mean), jnp), jnp.float32(old_mean))
    losses, statistics = evaluate(new, old, advantage)
    return losses.sum(), statistics

  gradient, statistics = jax.grad(loss, has_aux=True)(jnp.float32(mean))
  ratio = np.exp(log_prob(mean) - log_prob(old_mean))
  divergence = ((mean - old_mean) ** 2).mean((1, 2, 3)) / (2 * STD**2)
  dropped = is_dropped(advantage, ratio, divergence, TAU)
  assert 10 < dropped.sum() < 54
  np.testing.assert_array_equal(statistics["drop_fraction"], dropped)
  assert (gradient[dropped] == 0).all()
  expected = -(ratio * advantage).reshape(-1, 1, 1, 1) * (x_next - mean) / (size * STD**2)
  np.testing.assert_allclose(gradient[~dropped], expected[~dropped], rtol=1e-4, atol=1e-7)


def test_a_dropped_ratio_may_overflow():
  """Far outside, where the ratio is infinite, the loss and its gradient are 0 and not NaN."""
  _, old = policies(np.zeros(2), np.full(2, SHIFTS["above"]))

  def loss(log_ratio):
    new, _ = policies(np.zeros(2), np.full(2, SHIFTS["above"]))
    return evaluate(new._replace(log_prob=old.log_prob + log_ratio), old, np.array([1.0, 1.0]))[0]

  losses, gradient = loss(jnp.array([200.0, -1.0])), jax.jacobian(loss)(jnp.array([200.0, -1.0]))
  np.testing.assert_allclose(losses, [0.0, -np.exp(-1)], rtol=1e-6)
  np.testing.assert_allclose(gradient, [[0.0, 0.0], [0.0, -np.exp(-1)]], rtol=1e-6)


# Through the engine: a network of one hidden layer, dance noise on rectified flow.


PROMPTS, GROUP, LANES, SHAPE, STEPS = 2, 8, 4, (2, 2, 3), 5
SAMPLES, TRAINED, ETA = PROMPTS * GROUP, STEPS - 1, 0.3
POLICY = Policy(
  kind="dance",
  noise_level=ETA,
  prediction="velocity",
  steps=STEPS,
  window=TRAINED,
  last_step="ode",
  outside="ode",
  log_prob="mean",
)
SETTINGS = grpo.Objective(
  old_log_prob="recompute",
  timesteps="all",
  timestep_fraction=1.0,
  kl_weight=0.0,
  kl_mode="exact",
  updates=2,
  microbatch=16,
)
RATE = 3.0


def parameters() -> dict:
  rng, size = np.random.default_rng(0), int(np.prod(SHAPE))
  shapes = {"first": (size, 16), "prompt": (PROMPTS, 16), "last": (16, size)}
  return {
    name: jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)
    for name, shape in shapes.items()
  }


def denoise(params, x, time, prompt, numpy=jnp):
  hidden = numpy.tanh(x.reshape(len(x), -1) @ params["first"] + params["prompt"][prompt])
  return (hidden @ params["last"]).reshape(x.shape) + 0 * time.reshape(-1, 1, 1, 1)


@functools.cache
def make_batch() -> trajectories.Batch:
  """Trajectories that the policy itself drew, with random advantages; a sample is left out."""
  rng = np.random.default_rng(1)
  initial = jnp.asarray(rng.standard_normal((SAMPLES, *SHAPE)), jnp.float32)
  noise = jnp.asarray(rng.standard_normal((STEPS, SAMPLES, *SHAPE)), jnp.float32)
  prompt = jnp.arange(SAMPLES, dtype=jnp.int32) // GROUP
  drawn = rollout(
    lambda x, time: denoise(parameters(), x, time, prompt),
    schedules.flow_schedule(STEPS, 1.0),
    POLICY,
    initial,
    lambda i: noise[i],
  )
  weight = jnp.ones(SAMPLES).at[5].set(0.0)
  return trajectories.batch_of(
    rollouts=(drawn,),
    prompt=prompt.reshape(LANES, -1),
    advantage=weight * jnp.asarray(rng.standard_normal(SAMPLES), jnp.float32),
    weight=weight,
    chosen=None,
    count=LANES,
  )


def keys() -> trajectories.Keys:
  samples = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(SAMPLES))
  return samples, jax.random.key(4)


class Probe(NamedTuple):
  """Optimizer state of `probe`."""

  gradient: Any


def probe() -> optax.GradientTransformation:
  """Gradient descent whose state is the last gradient, which a test can read without round-off."""
  return optax.GradientTransformation(
    lambda params: Probe(jax.tree.map(jnp.zeros_like, params)),
    lambda g, state, params: (jax.tree.map(lambda x: -RATE * x, g), Probe(g)),
  )


def learn(surrogate: grpo.Surrogate, updates: int = 2) -> tuple[TrainState, dict]:
  """An iteration's update by the engine."""
  algorithm = algorithm_of(surrogate, updates)
  zero, params = jnp.zeros((), jnp.int32), parameters()
  state = TrainState(zero, zero, params, probe().init(params), None, {})
  run = jax.jit(functools.partial(optimize.update, algorithm, probe()))
  return run(state, make_batch(), keys())


def algorithm_of(surrogate: grpo.Surrogate, updates: int = 2):
  return grpo.algorithm(
    denoise,
    schedules.flow_schedule(STEPS, 1.0),
    POLICY,
    SETTINGS._replace(updates=updates),
    surrogate,
  )


class Known(NamedTuple):
  """The second optimizer step's transitions, in float64."""

  x: np.ndarray
  x_next: np.ndarray
  prompt: np.ndarray
  advantage: np.ndarray
  weight: np.ndarray
  sigma: np.ndarray
  dt: np.ndarray

  def mean(self, params, numpy=np):
    """Eq. (8) of arXiv 2505.07818, with its one coefficient for each transition."""
    sigma, dt = (value.reshape(-1, 1, 1, 1) for value in (self.sigma, self.dt))
    v = denoise(params, self.x, self.sigma, self.prompt, numpy)
    return self.x + v * dt + ETA**2 / 2 * (self.x + (1 - sigma) * v) / sigma * dt

  def std(self):
    return ETA * np.sqrt(-self.dt)

  def log_prob(self, params, numpy=np):
    """Without the part that no parameter changes."""
    squares = numpy.square(self.x_next - self.mean(params, numpy))
    return -squares.mean((1, 2, 3)) / (2 * self.std() ** 2)


@functools.cache
def second_step() -> Known:
  batch, sigma = make_batch(), np.linspace(1.0, 0.0, STEPS + 1)
  sample, step = algorithm_of(dppo.trust_region(1.0)).deal(batch, keys())
  lane = np.broadcast_to(np.arange(LANES)[:, None], sample.shape[2:])
  lane, sample, step = (
    np.concatenate([np.ravel(value) for value in values])
    for values in ([lane] * sample.shape[1], sample[1], step[1])
  )
  latents = np.float64(batch.latents)
  return Known(
    x=latents[step, lane, sample],
    x_next=latents[step + 1, lane, sample],
    prompt=np.asarray(batch.prompt)[lane, sample],
    advantage=np.float64(batch.advantage)[lane, sample],
    weight=np.float64(batch.weight)[lane, sample],
    sigma=sigma[step],
    dt=np.diff(sigma)[step],
  )


@functools.cache
def moved() -> tuple[dict, np.ndarray, np.ndarray]:
  """Parameters before the second optimizer step; ratio and divergence of its transitions. No
  surrogate differs from another in the first step.
  """
  first = learn(dppo.trust_region(1.0))[0]
  # the parameters after both steps, and the gradient of the second
  between = jax.tree.map(
    lambda p, g: np.float64(p) + RATE * np.float64(g), first.trainable, first.opt_state.gradient
  )
  old, known = jax.tree.map(np.float64, parameters()), second_step()
  ratio = np.exp(known.log_prob(between) - known.log_prob(old))
  squares = (known.mean(between) - known.mean(old)) ** 2
  return between, ratio, squares.mean((1, 2, 3)) / (2 * known.std() ** 2)


def test_nothing_is_dropped_in_the_first_optimizer_step():
  """The ratio is 1 and the divergence 0, which is below every tau."""
  _, metrics = learn(dppo.trust_region(1e-30), updates=1)
  assert metrics["drop_fraction"] == 0 and metrics["policy_kl"] == 0
  assert metrics["ratio/min"] == metrics["ratio/max"] == 1 and metrics["grad_norm"] > 1e-3


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_second_optimizer_step_is_the_closed_form(share):
  """Gradient and metrics, with a tau in the middle between two divergences."""
  between, ratio, divergence = moved()
  known = second_step()
  ordered = np.sort(divergence)
  place = int(share * len(ordered))
  tau = float(ordered[place - 1 : place + 1].mean())
  dropped = is_dropped(known.advantage, ratio, divergence, tau) & (known.weight > 0)
  assert 0 < dropped.sum() < known.weight.sum() - 1
  state, metrics = learn(dppo.trust_region(tau))
  used = float(make_batch().weight.sum()) * TRAINED
  np.testing.assert_allclose(metrics["drop_fraction"], dropped.sum() / used, rtol=1e-6)
  np.testing.assert_allclose(
    metrics["policy_kl"], (known.weight * divergence).sum() / used, rtol=1e-3
  )
  counted = known.weight * ~dropped

  def loss(params):
    ratio = jnp.exp(known.log_prob(params, jnp) - old)
    return -(counted * ratio * known.advantage).sum() / known.weight.sum()

  old = known.log_prob(parameters(), jnp)
  expected = jax.grad(loss)(jax.tree.map(jnp.float32, between))
  assert relative_error(state.opt_state.gradient, expected) < 1e-4


def test_an_unbounded_region_is_the_unclipped_policy_gradient():
  """tau = infinity and GRPO whose clipping never bites: the same optimizer steps, to the bit."""
  unbounded, metrics = learn(dppo.trust_region(np.inf))
  unclipped, others = learn(grpo.clipped(1e9))
  assert metrics["drop_fraction"] == 0 and others["clip_fraction"] == 0
  assert metrics["ratio/max"] - metrics["ratio/min"] > 1e-3
  assert_trees_equal(unbounded.trainable, unclipped.trainable)
  assert_trees_equal(unbounded.opt_state, unclipped.opt_state)
  assert metrics["loss"] == others["loss"] and metrics["approx_kl"] == others["approx_kl"]
