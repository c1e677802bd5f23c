"""One denoising step as a Gaussian p(x_next | x): the policy of the reinforcement learning.

A step goes from (alpha, sigma) to (alpha', sigma'), a `Point` of the grid. The functions take ONE
sample, with scalars for the noise levels, and callers vmap them. Everything is float32. A step with
std 0 is deterministic.

| kind | step | source |
| --- | --- | --- |
| ode | Euler step of the probability flow; DDIM with eta = 0 | |
| dance | reverse SDE with stochasticity e | DanceGRPO, arXiv 2505.07818, eq. (7) and (8) |
| flow | the same, with a noise level that falls with time | Flow-GRPO, arXiv 2505.05470 |
| ddim | the posterior q(x' given x and x0), its std times eta | arXiv 2010.02502, eq. (12), (16) |
| cps | alpha' x0 + sigma' noise, of which a part is fresh | Flow-CPS, arXiv 2509.05952 |
| x0hat | jump to the clean estimate | |
| dpm++ | DPM-Solver++(2M), deterministic, second order | arXiv 2211.01095, algorithm 2 |

Eq. (7) of dance is for diffusion, eq. (8) for rectified flow. flow is for rectified flow alone.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from dancegrpo_jax.diffusion import predictions
from dancegrpo_jax.diffusion.predictions import Prediction
from dancegrpo_jax.diffusion.schedules import Point

STOCHASTIC_KINDS = ("ddim", "dance", "flow", "cps")
KINDS = ("ode", *STOCHASTIC_KINDS, "x0hat", "dpm++")
KL_MODES = ("exact", "no_dt", "mean_mse", "velocity_mse")


class Transition(NamedTuple):
  """The Gaussian p(x_next | x): `mean` shaped like x, one `std` for all dimensions (0 =
  deterministic).
  """

  mean: Float[Array, "*shape"]
  std: Float[Array, ""]


class History(NamedTuple):
  """What DPM-Solver++(2M) carries from one step to the next.

  Attributes:
    m_prev: the last step's estimate of x0, shaped like x.
    lambda_prev: log(alpha / sigma) of the last step; finite even where that is -inf (then `valid`
      is False).
    valid: whether the last step can be extrapolated from.
  """

  m_prev: Float[Array, "*shape"]
  lambda_prev: Float[Array, ""]
  valid: Bool[Array, ""]


def empty_history(x: Float[Array, "*shape"]) -> History:
  """The history before the first step, and after a stochastic one."""
  return History(
    m_prev=jnp.zeros_like(x, dtype=jnp.float32),
    lambda_prev=jnp.zeros((), jnp.float32),
    valid=jnp.zeros((), bool),
  )


def check_kind(kind: str, prediction_type: str) -> None:
  """Raises ValueError where `kind` is unknown or can't step a network of this prediction type."""
  if kind not in KINDS:
    raise ValueError(f"sampler kind is {kind!r}, must be one of {', '.join(KINDS)}")
  if kind == "flow" and prediction_type != "velocity":
    raise ValueError(
      f"sampler kind 'flow' needs a velocity network, this one predicts {prediction_type!r}; use"
      " dance or ddim"
    )


def step(
  kind: str,
  prediction_type: str,
  noise_level: ScalarLike,
  point: Point,
  x: Float[Array, "*shape"],
  prediction: Prediction,
  history: History,
) -> tuple[Transition, History]:
  """The one entry: any kind of step. Every step but dpm++ resets the history, so that all kinds
  carry the same tree.

  Args and errors: see `transition`; `history` comes from the step before, or `empty_history`.
  """
  if kind == "dpm++":
    return dpm_step(point, x, prediction, history)
  return transition(kind, prediction_type, noise_level, point, x, prediction), empty_history(x)


def transition(
  kind: str,
  prediction_type: str,
  noise_level: ScalarLike,
  point: Point,
  x: Float[Array, "*shape"],
  prediction: Prediction,
) -> Transition:
  """A step that needs no history.

  Args:
    kind: "ode", "ddim", "dance", "cps", "flow" or "x0hat".
    prediction_type: "epsilon", "v" or "velocity"; "velocity" gives the rectified-flow forms of ode
      and dance.
    noise_level: eta of ddim and dance, a of flow and cps; 0 makes each the ode step. Ignored by ode
      and x0hat.
    point: the noise levels before and after.
    x: the noisy sample.
    prediction: the network's estimate at `x`.

  Raises:
    ValueError: an unknown kind, one that carries a history (dpm++), or flow without a velocity
      network.
  """
  check_kind(kind, prediction_type)
  is_flow = prediction_type == "velocity"
  if kind == "ode":
    return _deterministic(_euler(point, x, prediction) if is_flow else _renoise(point, prediction))
  if kind == "ddim":
    return _ddim(noise_level, point, prediction)
  if kind == "dance" and is_flow:
    return _flow_sde(noise_level, point, x, prediction)
  if kind == "dance":
    return _dance_diffusion(noise_level, point, prediction)
  if kind == "flow":
    return _flow_sde(noise_level * _flow_grpo_scale(point), point, x, prediction)
  if kind == "cps":
    return _cps(noise_level, point, prediction)
  if kind == "x0hat":
    return _deterministic(prediction.x0)
  raise ValueError(f"sampler kind {kind!r} carries a history: use step, not transition")


def dpm_step(
  point: Point, x: Float[Array, "*shape"], prediction: Prediction, history: History
) -> tuple[Transition, History]:
  """DPM-Solver++(2M), arXiv 2211.01095, algorithm 2, with m = x0hat and lambda = log(alpha /
  sigma).

  x' = (sigma'/sigma) x - alpha' (e^-h - 1) [m + (m - m_prev) / (2 r0)], r0 = h_prev / h. Without
  the bracket's second term this is the Euler step; that is what the first step (no history), one
  after lambda = -inf (r0 = inf) and one to sigma' = 0 take.
  """
  log_snr = _log_snr(point.alpha, point.sigma)
  has_snr = point.alpha > 0
  second_order = history.valid & has_snr & (point.sigma_next > 0)
  h = _log_snr(point.alpha_next, point.sigma_next) - log_snr
  h_prev = jnp.where(second_order, log_snr - history.lambda_prev, 1.0)
  extrapolation = jnp.where(second_order, h / (2.0 * h_prev), 0.0)
  # -alpha' (e^-h - 1) without logarithms, which are infinite at sigma = 1 and at sigma' = 0.
  weight = point.alpha_next - point.alpha * point.sigma_next / point.sigma
  mean = _renoise(point, prediction) + weight * extrapolation * (prediction.x0 - history.m_prev)
  return _deterministic(mean), History(prediction.x0, log_snr, has_snr)


def log_prob(
  transition: Transition, x_next: Float[Array, "*shape"], reduce: str
) -> Float[Array, ""]:
  """log p(x_next | x) of ONE sample: the density's logarithm averaged or summed over all
  dimensions.

  A deterministic step has no density: the value is 0 there, and so is its gradient.

  Args:
    transition: the policy at x.
    x_next: where the sample went.
    reduce: "mean" (DanceGRPO; the ratio is the true one to the power 1 / dimensions) or "sum" (the
      true density).

  Raises:
    ValueError: an unknown `reduce`.
  """
  is_random = transition.std > 0
  std = jnp.where(is_random, transition.std, 1.0)
  values = (
    -jnp.square(x_next - transition.mean) / (2.0 * jnp.square(std))
    - jnp.log(std)
    - 0.5 * jnp.log(2.0 * jnp.pi)
  )
  return jnp.where(is_random, _reduce(values, reduce), 0.0)


def check_kl(mode: str, kind: str, prediction_type: str) -> None:
  """Raises ValueError where `mode` is unknown or has no meaning for this step and this network."""
  if mode not in KL_MODES:
    raise ValueError(f"KL mode is {mode!r}, must be one of {', '.join(KL_MODES)}")
  if mode == "no_dt" and (kind not in ("dance", "flow") or prediction_type != "velocity"):
    raise ValueError(
      "KL mode 'no_dt' needs a std with a factor sqrt(dt): dance or flow with a velocity network,"
      f" not {kind} with {prediction_type}; use exact"
    )
  if mode == "velocity_mse" and prediction_type != "velocity":
    raise ValueError(
      f"KL mode 'velocity_mse' needs a velocity network, this one predicts {prediction_type!r};"
      " use exact"
    )


def kl(
  mode: str,
  *,
  kind: str,
  prediction_type: str,
  reduce: str,
  point: Point,
  transition: Transition,
  reference: Transition,
  output: Float[Array, "*shape"],
  reference_output: Float[Array, "*shape"],
) -> Float[Array, ""]:
  """Distance of the policy from the reference policy at ONE sample, both with the same std.

  Args:
    mode: "exact" KL = (mean - mean_ref)^2 / (2 std^2), reduced as the log-prob is; the others are
      what published weights belong to, always averaged: "no_dt" (Flow-GRPO's code: std without its
      sqrt(sigma - sigma')), "mean_mse" (Flow-CPS), "velocity_mse" (of the network outputs).
    kind: the step's kind.
    prediction_type: the network's prediction type.
    reduce: "mean" or "sum", of the log-prob.
    point: the noise levels before and after.
    transition: the policy.
    reference: the reference policy at the same x.
    output: network output behind `transition`.
    reference_output: network output behind `reference`.

  Returns:
    The distance; 0 for exact and no_dt where the step is deterministic.

  Raises:
    ValueError: a mode that is unknown or has no meaning here, see `check_kl`.
  """
  check_kl(mode, kind, prediction_type)
  if mode == "velocity_mse":
    return jnp.mean(jnp.square(output.astype(jnp.float32) - reference_output.astype(jnp.float32)))
  squares = jnp.square(transition.mean - reference.mean)
  if mode == "mean_mse":
    return jnp.mean(squares)
  is_random = transition.std > 0
  variance = jnp.square(jnp.where(is_random, transition.std, 1.0))
  if mode == "no_dt":
    variance, reduce = variance / (point.sigma - point.sigma_next), "mean"
  return jnp.where(is_random, _reduce(squares / (2.0 * variance), reduce), 0.0)


def _reduce(values: Float[Array, "*shape"], reduce: str) -> Float[Array, ""]:
  if reduce == "mean":
    return jnp.mean(values)
  if reduce == "sum":
    return jnp.sum(values)
  raise ValueError(f"log_prob reduction is {reduce!r}, must be mean or sum")


def _deterministic(mean: Float[Array, "*shape"]) -> Transition:
  return Transition(mean, jnp.zeros((), jnp.float32))


def _euler(
  point: Point, x: Float[Array, "*shape"], prediction: Prediction
) -> Float[Array, "*shape"]:
  """x + v dt: equal to `_renoise` for rectified flow, with less round-off in the small steps."""
  return x + predictions.velocity(prediction) * (point.sigma_next - point.sigma)


def _renoise(point: Point, prediction: Prediction) -> Float[Array, "*shape"]:
  """alpha' x0 + sigma' eps: the Euler step in z = x / alpha, eta = sigma / alpha."""
  return point.alpha_next * prediction.x0 + point.sigma_next * prediction.eps


def _flow_grpo_scale(point: Point) -> Float[Array, ""]:
  """sqrt(t / (1 - t)) with t = sigma; at t = 1 the next point's 1 - sigma' stands in for the zero
  (Flow-GRPO's code).
  """
  return jnp.sqrt(point.sigma / jnp.where(point.alpha > 0, point.alpha, point.alpha_next))


def _flow_sde(
  eta: ScalarLike, point: Point, x: Float[Array, "*shape"], prediction: Prediction
) -> Transition:
  """Eq. (8): x + v dt - eta^2/2 score dt, std eta sqrt(-dt), with score = -eps / sigma."""
  dt = point.sigma_next - point.sigma
  drift = jnp.square(eta) / (2.0 * point.sigma) * dt * prediction.eps
  return Transition(_euler(point, x, prediction) + drift, jnp.float32(eta) * jnp.sqrt(-dt))


def _dance_diffusion(e: ScalarLike, point: Point, prediction: Prediction) -> Transition:
  """Eq. (7) integrated in z = x / alpha, where f drops out and g^2 dt = alpha^2 d(eta^2), eta =
  sigma / alpha.

  z' = z + (1 + e^2) eps (eta' - eta) + noise of variance e^2 (eta^2 - eta'^2). With z = x0 + eta
  eps, e = 0 is the ode step.
  """
  eta, eta_next = point.sigma / point.alpha, point.sigma_next / point.alpha_next
  drift = jnp.square(e) * point.alpha_next * (eta_next - eta) * prediction.eps
  std = e * point.alpha_next * jnp.sqrt((eta - eta_next) * (eta + eta_next))
  return Transition(_renoise(point, prediction) + drift, jnp.asarray(std, jnp.float32))


def _ddim(eta: ScalarLike, point: Point, prediction: Prediction) -> Transition:
  """Coefficient-preserving, std = eta times that of the posterior q(x' | x, x0).

  The paper's sqrt((1-ab')/(1-ab)) sqrt(1 - ab/ab') is sigma' sqrt(1 - r^2) with r = (alpha sigma')
  / (alpha' sigma). In this form it is the posterior of any alpha and sigma (also of rectified
  flow), finite at alpha = 0, and doesn't cancel for ab near 1.
  """
  r = point.alpha * point.sigma_next / (point.alpha_next * point.sigma)
  return _fresh_noise(eta * jnp.sqrt(jnp.maximum((1.0 - r) * (1.0 + r), 0.0)), point, prediction)


def _cps(a: ScalarLike, point: Point, prediction: Prediction) -> Transition:
  """Coefficient-preserving, std = sigma' sin(a pi/2); a in [0, 1]."""
  return _fresh_noise(jnp.sin(a * jnp.float32(jnp.pi / 2)), point, prediction)


def _fresh_noise(share: ScalarLike, point: Point, prediction: Prediction) -> Transition:
  """alpha' x0 + sqrt(sigma'^2 - std^2) eps with std = share * sigma': part of the noise is replaced
  by fresh noise.
  """
  unchanged = point.sigma_next * jnp.sqrt(jnp.maximum(1.0 - jnp.square(share), 0.0))
  mean = point.alpha_next * prediction.x0 + unchanged * prediction.eps
  return Transition(mean, jnp.float32(share) * point.sigma_next)


def _log_snr(alpha: Float[Array, ""], sigma: Float[Array, ""]) -> Float[Array, ""]:
  """log(alpha / sigma), finite (and unused by the caller) where either is 0."""
  return jnp.log(jnp.where(alpha > 0, alpha, 1.0)) - jnp.log(jnp.where(sigma > 0, sigma, 1.0))
