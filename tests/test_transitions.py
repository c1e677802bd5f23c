"""Steps, log-probs and KL.

They are compared with values worked out in float64 and with diffusers' DDIM, and they converge on
Gaussian data.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from dancegrpo_jax.diffusion import predictions, transitions
from dancegrpo_jax.diffusion.schedules import (
  Point,
  Schedule,
  diffusion_schedule,
  flow_schedule,
  point,
)
from dancegrpo_jax.diffusion.transitions import Transition, empty_history

KINDS_BY_TYPE = [("velocity", k) for k in ("dance", "flow", "ddim", "cps")] + [
  (p, k) for p in ("epsilon", "v") for k in ("dance", "ddim", "cps")
]


def f32(*values):
  return tuple(jnp.float32(value) for value in values)


def flow_point(sigma, sigma_next):
  return Point(*f32(1 - sigma, sigma, 1 - sigma_next, sigma_next))


def vp_point(alpha_bar, alpha_bar_next):
  return Point(
    *f32(alpha_bar**0.5, (1 - alpha_bar) ** 0.5, alpha_bar_next**0.5, (1 - alpha_bar_next) ** 0.5)
  )


def flow_step(kind, noise_level, x=0.3, v=-0.5, sigma=0.7, sigma_next=0.62):
  at = flow_point(sigma, sigma_next)
  x = jnp.float32(x)
  prediction = predictions.from_output("velocity", x, jnp.float32(v), at.alpha, at.sigma)
  return transitions.transition(kind, "velocity", noise_level, at, x, prediction)


def close(got, want, rel=2e-6):
  np.testing.assert_allclose(np.float64(got), want, rtol=rel)


# Golden values of rectified flow: x = .3, v = -.5, v_ref = -.45, sigma .7 -> .62.


def test_prediction_of_a_velocity():
  prediction = predictions.from_output("velocity", *f32(0.3, -0.5, 0.3, 0.7))
  close(prediction.x0, 0.65)
  close(prediction.eps, 0.15)
  close(predictions.velocity(prediction), -0.5)
  close(-prediction.eps / 0.7, -0.214285714)


@pytest.mark.parametrize(
  "kind, noise_level, mean, std",
  [
    ("ode", 0.3, 0.34, 0.0),
    ("dance", 0.3, 0.339228571, 0.084852814),
    ("flow", 0.7, 0.3302, 0.302434566),
    ("cps", 0.8, 0.27573858, 0.58965504),
    ("x0hat", 0.3, 0.65, 0.0),
  ],
)
def test_flow_steps(kind, noise_level, mean, std):
  got = flow_step(kind, noise_level)
  close(got.mean, mean)
  close(got.std, std)


@pytest.mark.parametrize(
  "kind, noise_level, mode, value",
  [
    ("dance", 0.3, "exact", 0.001154382),
    ("dance", 0.3, "no_dt", 9.2351e-05),
    ("flow", 0.7, "exact", 0.000135571),
    ("flow", 0.7, "no_dt", 1.0846e-05),
    ("cps", 0.8, "mean_mse", 0.000108704),
    ("dance", 0.3, "velocity_mse", 0.0025),
  ],
)
def test_kl(kind, noise_level, mode, value):
  def at(reduce, copies):
    steps = [flow_step(kind, noise_level, v=v) for v in (-0.5, -0.45)]
    policy, reference = (Transition(jnp.full(copies, step.mean), step.std) for step in steps)
    output = jnp.full(copies, -0.5, jnp.float32)
    reference_output = jnp.full(copies, -0.45, jnp.float32)
    return transitions.kl(
      mode,
      kind=kind,
      prediction_type="velocity",
      reduce=reduce,
      point=flow_point(0.7, 0.62),
      transition=policy,
      reference=reference,
      output=output,
      reference_output=reference_output,
    )

  close(at("mean", (2, 3)), value, rel=5e-5)  # means .33 that differ by .004 in float32
  close(at("sum", (2, 3)), 6 * value if mode == "exact" else value, rel=5e-5)


@pytest.mark.parametrize(
  "kind, noise_level, value", [("dance", 0.3, 1.047898593), ("flow", 0.7, -0.223048197)]
)
def test_log_prob_of_one_std(kind, noise_level, value):
  got = flow_step(kind, noise_level)
  policy = Transition(jnp.full((2, 2), got.mean), got.std)
  x_next = policy.mean + policy.std
  close(transitions.log_prob(policy, x_next, "mean"), value)
  close(transitions.log_prob(policy, x_next, "sum"), 4 * value)


def test_flow_first_step_uses_the_next_points_noise():
  got = flow_step("flow", 0.7, sigma=1.0, sigma_next=0.96)
  close(got.std, 0.7)  # s_t sqrt(D) = 3.5 * 0.2
  drift = got.mean - flow_step("ode", 0.0, sigma=1.0, sigma_next=0.96).mean
  close(drift, -(3.5**2) / 2 * 0.3 * 0.04, rel=1e-5)  # -s_t^2/2 score dt, score = -eps / 1 = -x


def test_cps_gradient():
  gradient = jax.grad(lambda v: flow_step("cps", 0.8, v=v).mean)(jnp.float32(-0.5))
  close(gradient, -0.208522839)


def test_flow_gradient_is_dt_times_one_plus_half_a_squared():
  gradient = jax.grad(lambda v: flow_step("flow", 0.7, v=v).mean)(jnp.float32(-0.5))
  close(gradient, -0.08 * (1 + 0.7**2 / 2))


def test_dpm_two_steps():
  def two(sigma_next_last):
    x, history = jnp.float32(0.3), empty_history(jnp.float32(0.3))
    for v, sigma, sigma_next in ((-0.5, 0.7, 0.62), (-0.42, 0.62, sigma_next_last)):
      at = flow_point(sigma, sigma_next)
      prediction = predictions.from_output("velocity", x, jnp.float32(v), at.alpha, at.sigma)
      first = transitions.dpm_step(at, x, prediction, empty_history(x))[0].mean
      step, history = transitions.step("dpm++", "velocity", 0.0, at, x, prediction, history)
      x = step.mean
    return x, first

  second, first = two(0.53)
  close(second, 0.374082724)
  close(first, 0.3778)
  close(*two(0.0))  # the step to sigma = 0 is of first order: a jump to x0hat


# Golden values of diffusion: ab .5 -> .6, x = .3, epshat = .2.


@pytest.mark.parametrize(
  "kind, noise_level, mean, std",
  [
    ("ddim", 1.0, 0.276993757, 0.365148372),
    ("dance", 0.0, 0.300205307, 0.0),
    ("dance", 0.3, 0.297646767, 0.134164079),
    ("dance", 1.0, 0.271777080, 0.447213596),
    ("ode", 1.0, 0.300205307, 0.0),
  ],
)
def test_diffusion_steps(kind, noise_level, mean, std):
  at, x = vp_point(0.5, 0.6), jnp.float32(0.3)
  prediction = predictions.from_output("epsilon", x, jnp.float32(0.2), at.alpha, at.sigma)
  close(prediction.x0, 0.224264069)
  got = transitions.transition(kind, "epsilon", noise_level, at, x, prediction)
  close(got.mean, mean)
  close(got.std, std)


def sd_schedule(steps):
  return diffusion_schedule(
    steps,
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    spacing="leading",
    steps_offset=1,
    set_alpha_to_one=False,
  )


def test_ddim_std_on_the_stable_diffusion_grid():
  schedule, x = sd_schedule(50), jnp.float32(0.3)
  for time, std in (
    (981, 0.4545),
    (581, 0.3229),
    (181, 0.1771),
    (41, 0.0999),
    (21, 0.0395),
    (1, 0.0206),
  ):
    at = point(schedule, (981 - time) // 20)
    got = transitions.transition("ddim", "epsilon", 1.0, at, x, predictions.Prediction(x, x))
    assert float(got.std) == pytest.approx(std, abs=6e-5)


@pytest.mark.parametrize("prediction_type, theirs", [("epsilon", "epsilon"), ("v", "v_prediction")])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_against_diffusers(prediction_type, theirs, eta):
  steps = 10
  scheduler = DDIMScheduler(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    timestep_spacing="leading",
    steps_offset=1,
    set_alpha_to_one=False,
    clip_sample=False,
    prediction_type=theirs,
  )
  scheduler.set_timesteps(steps)
  schedule, random = sd_schedule(steps), np.random.default_rng(0)
  for i in (0, 4, steps - 1):
    x, output, noise = random.standard_normal((3, 4, 8, 8)).astype(np.float32)
    want = scheduler.step(
      torch.tensor(output),
      int(scheduler.timesteps[i]),
      torch.tensor(x),
      eta=eta,
      variance_noise=torch.tensor(noise),
    ).prev_sample.numpy()
    at = point(schedule, i)
    prediction = predictions.from_output(
      prediction_type, jnp.asarray(x), jnp.asarray(output), at.alpha, at.sigma
    )
    got = transitions.transition("ddim", prediction_type, eta, at, jnp.asarray(x), prediction)
    assert np.abs(got.mean + got.std * noise - want).max() <= 2e-5 * np.abs(want).max()


# Properties.


@pytest.mark.parametrize("prediction_type, kind", KINDS_BY_TYPE)
def test_noise_level_0_is_the_ode(prediction_type, kind):
  schedule = flow_schedule(10, 3.0) if prediction_type == "velocity" else sd_schedule(10)
  x, output = jax.random.normal(jax.random.key(0), (2, 16))
  for i in range(10):
    at = point(schedule, i)
    prediction = predictions.from_output(prediction_type, x, output, at.alpha, at.sigma)
    got, want = (
      transitions.transition(k, prediction_type, 0.0, at, x, prediction) for k in (kind, "ode")
    )
    np.testing.assert_allclose(got.mean, want.mean, atol=1e-6 * np.abs(prediction.x0).max())
    assert float(got.std) == 0.0


@pytest.mark.parametrize("prediction_type, kind", KINDS_BY_TYPE)
def test_x0hat_and_eps_recompose_the_sample(prediction_type, kind):
  at, (x, output) = vp_point(0.5, 0.6), jax.random.normal(jax.random.key(1), (2, 16))
  at = flow_point(0.7, 0.62) if prediction_type == "velocity" else at
  x0, eps = predictions.from_output(prediction_type, x, output, at.alpha, at.sigma)
  np.testing.assert_allclose(at.alpha * x0 + at.sigma * eps, x, atol=1e-6)


def test_one_deterministic_step_covers_both_paradigms():
  """z' = z + output (eta' - eta).

  z = x / alpha and eta = sigma / alpha for epsilon; z = x and eta = t for flow.
  """
  x, output = jax.random.normal(jax.random.key(2), (2, 16))
  for prediction_type, at in (("epsilon", vp_point(0.3, 0.5)), ("velocity", flow_point(0.7, 0.62))):
    a, s, a_next, s_next = (np.float64(value) for value in at)
    scale, scale_next, eta, eta_next = (
      (a, a_next, s / a, s_next / a_next) if prediction_type == "epsilon" else (1, 1, s, s_next)
    )
    want = scale_next * (np.float64(x) / scale + np.float64(output) * (eta_next - eta))
    prediction = predictions.from_output(prediction_type, x, output, at.alpha, at.sigma)
    np.testing.assert_allclose(
      transitions.transition("ode", prediction_type, 0.0, at, x, prediction).mean, want, atol=2e-6
    )


def gaussian_output(prediction_type, g, alpha, sigma):
  """The exact output for x0 ~ N(0, g^2) at x = 1.

  It is E[eps | x] or E[eps - x0 | x], both linear in x.
  """
  total = alpha**2 * g**2 + sigma**2
  return sigma / total if prediction_type == "epsilon" else (sigma - alpha * g**2) / total


@functools.partial(jax.jit, static_argnames=("kind", "prediction_type", "noise_level"))
def final_variance(kind, prediction_type, noise_level, schedule, variance):
  """Variance at the end of the grid.

  Steps are linear in x, so that a unit sample gives each step's factor.
  """

  def body(carry, i):
    x, variance, history = carry
    at = point(schedule, i)
    output = x * gaussian_output(prediction_type, 0.5, at.alpha, at.sigma)
    prediction = predictions.from_output(prediction_type, x, output, at.alpha, at.sigma)
    got, history = transitions.step(kind, prediction_type, noise_level, at, x, prediction, history)
    factor = got.mean / x
    return (got.mean, factor**2 * variance + got.std**2, history), None

  start = (jnp.float32(1.0), variance, empty_history(jnp.float32(1.0)))
  return jax.lax.scan(body, start, jnp.arange(schedule.sigma.shape[0] - 1))[0][1]


def flow_error(kind, noise_level, steps, start=1.0):
  sigma = np.linspace(start, 0, steps + 1)
  schedule = Schedule(*(jnp.asarray(v, jnp.float32) for v in (sigma, 1 - sigma, sigma)))
  variance = jnp.float32((1 - start) ** 2 * 0.25 + start**2)
  return abs(float(final_variance(kind, "velocity", noise_level, schedule, variance)) - 0.25)


@pytest.mark.parametrize(
  "kind, noise_level, start", [("ode", 0.0, 1.0), ("dance", 0.3, 1.0), ("flow", 0.7, 0.9)]
)
def test_variance_error_of_flow_samplers_halves(kind, noise_level, start):
  errors = [flow_error(kind, noise_level, steps, start) for steps in (50, 100, 200, 400)]
  assert errors[0] < 0.05
  for coarse, fine in zip(errors, errors[1:], strict=False):
    assert 1.7 <= coarse / fine <= 2.3, errors


def test_variance_error_of_dpm_is_of_second_order():
  errors = [flow_error("dpm++", 0.0, steps) for steps in (50, 100, 200)]
  assert errors[0] / errors[1] >= 2.7 and errors[1] / errors[2] >= 2.7, errors
  assert errors[1] * 5 <= flow_error("ode", 0.0, 100)


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 1.0])
def test_variance_error_of_dance_on_a_variance_preserving_schedule_halves(noise_level):
  errors = []
  for steps in (50, 100, 200, 400):
    angle = np.linspace(1.4, 0.05, steps + 1)
    alpha, sigma = np.cos(angle), np.sin(angle)
    schedule = Schedule(*(jnp.asarray(v, jnp.float32) for v in (angle, alpha, sigma)))
    variance, end = (alpha**2 * 0.25 + sigma**2)[[0, -1]]
    errors.append(
      abs(
        float(final_variance("dance", "epsilon", noise_level, schedule, jnp.float32(variance)))
        - end
      )
    )
  for coarse, fine in zip(errors, errors[1:], strict=False):
    assert 1.7 <= coarse / fine <= 2.3, errors


@pytest.mark.parametrize("kind", ["ode", "dance", "flow", "ddim", "cps", "x0hat", "dpm++"])
def test_flow_is_finite_at_both_ends(kind):
  """Values and gradients under jit.

  The ends are sigma = 1 (lambda = -inf, no 1 - t) and the step to sigma = 0.
  """
  schedule = flow_schedule(4, 3.0)

  @jax.jit
  def loss(weight, x):
    history, total = empty_history(x), 0.0
    for i in range(4):
      at = point(schedule, jnp.int32(i))
      output = weight * x
      prediction = predictions.from_output("velocity", x, output, at.alpha, at.sigma)
      got, history = transitions.step(kind, "velocity", 0.7, at, x, prediction, history)
      reference = Transition(got.mean + 0.1, got.std)
      options = {"kind": kind, "prediction_type": "velocity", "reduce": "mean", "point": at}
      total += transitions.log_prob(got, x, "mean")
      total += transitions.kl(
        "exact",
        transition=got,
        reference=reference,
        output=output,
        reference_output=output,
        **options,
      )
      x = got.mean
    return total + jnp.sum(x), history

  (value, history), gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
    jnp.float32(0.4), jnp.ones(3)
  )
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, history, gradient)))


def test_a_stochastic_step_resets_the_history():
  x = jnp.ones(3)
  at = flow_point(0.7, 0.62)
  prediction = predictions.from_output("velocity", x, x, at.alpha, at.sigma)
  history = transitions.step("dpm++", "velocity", 0.0, at, x, prediction, empty_history(x))[1]
  assert bool(history.valid)
  reset = transitions.step("dance", "velocity", 0.3, at, x, prediction, history)[1]
  assert not bool(reset.valid) and jax.tree.structure(reset) == jax.tree.structure(history)
  assert [a.dtype for a in reset] == [a.dtype for a in history]


def test_a_bfloat16_network_steps_in_float32():
  at, x = flow_point(0.7, 0.62), jnp.ones(3)
  prediction = predictions.from_output("velocity", x, jnp.ones(3, jnp.bfloat16), at.alpha, at.sigma)
  for kind in transitions.KINDS:
    got, _ = transitions.step(kind, "velocity", 0.3, at, x, prediction, empty_history(x))
    assert got.mean.dtype == got.std.dtype == jnp.float32


@pytest.mark.parametrize("kind", transitions.KINDS)
def test_samples_of_a_batch_may_be_at_different_steps(kind):
  schedule, (x, output) = flow_schedule(4, 3.0), jax.random.normal(jax.random.key(4), (2, 3, 8))

  def one(x, output, i):
    at = point(schedule, i)
    prediction = predictions.from_output("velocity", x, output, at.alpha, at.sigma)
    return transitions.step(kind, "velocity", 0.3, at, x, prediction, empty_history(x))[0]

  got = jax.jit(jax.vmap(one))(x, output, jnp.int32([2, 0, 3]))
  assert got.std.shape == (3,)
  for row, i in enumerate((2, 0, 3)):
    want = one(x[row], output[row], i)
    np.testing.assert_allclose(got.mean[row], want.mean, atol=1e-6)
    np.testing.assert_allclose(got.std[row], want.std, atol=1e-7)


def test_mean_ratio_under_the_mean_reduction():
  """E[ratio] = exp(-m/2 + m/(2 dim)) under the old policy.

  m = mean((mean_new - mean_old)^2) / std^2.
  """
  dim, std = 4, 0.3
  old = Transition(jnp.zeros(dim), jnp.float32(std))
  new = Transition(jnp.full(dim, 0.15), jnp.float32(std))
  x_next = std * jax.random.normal(jax.random.key(3), (200_000, dim))
  log_ratio = jax.vmap(
    lambda x: transitions.log_prob(new, x, "mean") - transitions.log_prob(old, x, "mean")
  )(x_next)
  m = 0.25
  assert float(jnp.mean(jnp.exp(log_ratio))) == pytest.approx(
    np.exp(-m / 2 + m / (2 * dim)), abs=2e-3
  )


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: transitions.check_kind("euler", "velocity"), "sampler kind is 'euler'"),
    (lambda: transitions.check_kind("flow", "epsilon"), "'flow' needs a velocity network"),
    (lambda: flow_step("dpm++", 0.0), "use step"),
    (
      lambda: predictions.from_output("noise", *f32(0.3, 0.3, 0.3, 0.3)),
      "prediction type is 'noise'",
    ),
    (lambda: transitions.log_prob(flow_step("dance", 0.3), jnp.float32(0), "median"), "median"),
    (lambda: transitions.check_kl("reverse", "dance", "velocity"), "KL mode is 'reverse'"),
    (lambda: transitions.check_kl("no_dt", "cps", "velocity"), "'no_dt' needs"),
    (lambda: transitions.check_kl("no_dt", "dance", "epsilon"), "'no_dt' needs"),
    (lambda: transitions.check_kl("velocity_mse", "dance", "v"), "'velocity_mse' needs"),
  ],
)
def test_mistakes_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
