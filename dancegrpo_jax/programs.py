"""The compiled functions of an iteration: the only file that calls jax.jit.

Each is compiled once: shapes are static, and what changes from call to call (iteration, sample
numbers) is an argument.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dancegrpo_jax.devices import sharding
from dancegrpo_jax.diffusion import windows
from dancegrpo_jax.diffusion.guidance import classifier_free
from dancegrpo_jax.models import lora
from dancegrpo_jax.pipelines.base import Pipeline
from dancegrpo_jax.rewards.base import Reward
from dancegrpo_jax.rl import advantages, lanes, rng, state, update
from dancegrpo_jax.rl.policy import objective_of, policy_of
from dancegrpo_jax.rl.rollout import Rollout, rollout
from dancegrpo_jax.rl.state import learning_rate, optimizer_of
from dancegrpo_jax.types import Conditioning, Media, PyTree


class Programs(NamedTuple):
  """The iteration's compiled functions. P prompts, G samples each, B = P G; sample number b is
  sample b % G of prompt b // G.

  Attributes:
    encode: `(frozen, tokens [n, t]) -> rows`, on every device.
    rollout: `(trainable, frozen, conditioning, prompt_ids [P], numbers [chunk], iteration) ->
      Rollout`.
    sample: `(trainable, frozen, conditioning, prompt_ids [P], numbers [chunk], seed) -> latents`,
      deterministic sampler.
    decode: `(frozen, latents) -> pixels`.
    features: `(reward params, prepared) -> features`, per device reward.
    score: `(reward params, pixels, features, numbers, group) -> {term: f32[chunk]}`, per device
      reward.
    join: `({term: [f32[chunk], ..]}, order [B]) -> {term: f32[P, G]}`: the chunks' scores, sample
      by sample.
    advantages: `(scores {term: [P, G]}, prompt_ids, prompt_stats) -> (advantage [B'], weight [B'],
      chosen [B'], stats, metrics)`.
    update: `(state, frozen, reference, conditioning, prompt_ids, rollouts, advantage, weight,
      chosen, iteration) -> (state, metrics)`; donates the state.
  """

  encode: Callable
  rollout: Callable
  sample: Callable
  decode: Callable
  features: dict[str, Callable]
  score: dict[str, Callable]
  join: Callable
  advantages: Callable
  update: Callable


def guided(pipeline: Pipeline, scale: float) -> Callable:
  """`(params, x, model_time, conditioning of P rows, prompt [b]) -> output`, rows gathered where
  they are used.
  """

  def denoise(
    params: PyTree, x: Array, time: Array, conditioning: Conditioning, prompt: Int[Array, "b"]
  ) -> Array:
    branch = classifier_free(lambda x, time, rows: pipeline.denoise(params, x, time, rows), scale)
    return branch(x, time, jax.tree.map(lambda rows: rows[prompt], conditioning))

  return denoise


def program(config: ConfigDict, name: str, function: Callable, **options: Any) -> Callable:
  """`function` jitted, with the precision of products that the config asks for.

  Args:
    config: of the run; model.matmul_precision holds for everything that is traced, gradients too.
    name: what profiles and XLA's messages call the program.
    function: what to compile.
    options: of `jax.jit`.
  """

  @functools.wraps(function)
  def traced(*arguments):
    if (
      config.model.matmul_precision == "default"
    ):  # leaves it to JAX, and to what its user set there
      return function(*arguments)
    with jax.default_matmul_precision(config.model.matmul_precision):
      return function(*arguments)

  traced.__name__ = traced.__qualname__ = name.replace(" ", "_")
  return jax.jit(traced, **options)


def build(
  config: ConfigDict,
  pipeline: Pipeline,
  rewards: dict[str, Reward],
  mesh: jax.sharding.Mesh,
  state_shardings: PyTree,
) -> Programs:
  """All programs of a run.

  Args:
    config: validated.
    pipeline: the model family's functions.
    rewards: by name.
    mesh: the devices; the caller has entered it with `jax.set_mesh`.
    state_shardings: of the TrainState.
  """
  split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  steps_first = jax.NamedSharding(mesh, jax.P(None, *split.spec))
  rolled = Rollout(whole, steps_first, steps_first, split)
  device = {name: reward for name, reward in rewards.items() if reward.kind == "device"}

  def each(kind: str, function_of: Callable, rewards: dict[str, Reward]) -> dict[str, Callable]:
    return {
      name: program(config, f"{kind} {name}", function_of(reward), out_shardings=whole)
      for name, reward in rewards.items()
    }

  return Programs(
    encode=encoder(config, pipeline, mesh),
    rollout=program(config, "rollout", _rollout(config, pipeline), out_shardings=rolled),
    sample=program(config, "sample", _sample(config, pipeline), out_shardings=split),
    decode=program(config, "decode", pipeline.decode, out_shardings=split),
    features=each("features", lambda reward: reward.features, device),
    score=each("score", _score, device),
    join=program(config, "join", _join(config), out_shardings=whole),
    advantages=program(config, "advantages", _advantages(config), out_shardings=whole),
    update=program(
      config,
      "update",
      _update(config, pipeline, mesh),
      out_shardings=(state_shardings, whole),
      donate_argnums=0,
    ),
  )


def encoder(config: ConfigDict, pipeline: Pipeline, mesh: jax.sharding.Mesh) -> Callable:
  """`(params of the encoders, tokens [n, t]) -> rows`, on every device."""
  return program(config, "encode", pipeline.encode, out_shardings=sharding.replicated(mesh))


def _rollout(config: ConfigDict, pipeline: Pipeline) -> Callable:
  policy, denoise = (
    policy_of(config, pipeline.prediction),
    guided(pipeline, config.sampler.guidance_scale),
  )
  group, shape = config.rollout.samples_per_prompt, pipeline.latent_shape

  def run(
    trainable,
    frozen,
    conditioning: Conditioning,
    prompt_ids: Array,
    numbers: Int[Array, "chunk"],
    iteration,
  ) -> Rollout:
    # Here and not outside: nothing is computed where programs are only compiled (plan.py), on
    # devices that aren't there.
    streams = {
      name: rng.stream(config.seed, name) for name in ("initial_noise", "step_noise", "window")
    }
    params, schedule = (
      state.variables(frozen, trainable),
      pipeline.schedule(policy.steps, config.sampler.shift),
    )
    prompt, sample = numbers // group, numbers % group
    ids = prompt_ids[prompt]
    shared = config.rollout.shared_noise
    initial = rng.initial_noise(
      streams["initial_noise"], iteration, ids, sample, shared=shared, shape=shape
    )
    start = windows.window(
      config.sampler.window,
      policy.policy_steps,
      iteration,
      rng.derive(streams["window"], iteration),
    )
    return rollout(
      lambda x, time: denoise(params, x, time, conditioning, prompt),
      schedule,
      policy,
      start,
      initial,
      lambda i: rng.step_noise(streams["step_noise"], iteration, ids, sample, i, shape=shape),
    )

  return run


def _sample(config: ConfigDict, pipeline: Pipeline) -> Callable:
  """The deterministic sampler on noise of its own seed: what sample.py, evaluate.py and the
  report's grids use.
  """
  denoise, steps = guided(pipeline, config.sampler.guidance_scale), config.evaluation.steps
  policy = policy_of(config, pipeline.prediction)._replace(steps=steps, window=0, last_step="ode")

  def run(
    trainable,
    frozen,
    conditioning: Conditioning,
    noise_ids: Int[Array, "chunk"],
    prompt: Int[Array, "chunk"],
    seed,
  ):
    params, schedule = (
      state.variables(frozen, trainable),
      pipeline.schedule(steps, config.sampler.shift),
    )
    stream = rng.derive(rng.stream(0, "evaluation"), seed)
    initial = rng.initial_noise(
      stream, 0, noise_ids, noise_ids, shared=True, shape=pipeline.latent_shape
    )
    drawn = rollout(
      lambda x, time: denoise(params, x, time, conditioning, prompt),
      schedule,
      policy,
      0,
      initial,
      jnp.zeros_like,
    )
    return drawn.sample

  return run


def _score(reward: Reward) -> Callable:
  def run(
    params, pixels: Float[Array, "chunk h w 3"], features: PyTree, prompt: Int[Array, "chunk"]
  ):
    return reward.score(params, Media(pixels), jax.tree.map(lambda rows: rows[prompt], features))

  return run


def _join(config: ConfigDict) -> Callable:
  def run(chunks: dict[str, list], order: Int[Array, "samples"]) -> dict:
    return {
      term: jnp.concatenate(parts)[order].reshape(-1, config.rollout.samples_per_prompt)
      for term, parts in chunks.items()
    }

  return run


def _advantages(config: ConfigDict) -> Callable:
  c = config.advantage
  options = {"ddof": c.ddof, "eps": c.eps, "min_spread": c.min_spread}
  terms = tuple((name, weight) for name, weight in config.reward.terms)

  def run(scores: dict, prompt_ids: Int[Array, "prompts"], stats: dict) -> tuple:
    binary = advantages.apply_thresholds(scores, config.reward.thresholds)
    statistics = None
    if c.history.size:
      named, valid = advantages.signals(binary, terms, config.reward.combine)
      stats = {
        name: advantages.update_stats(stats[name], prompt_ids, rewards, valid)
        for name, rewards in named.items()
      }
      statistics = {
        name: advantages.prompt_statistics(
          stats[name], prompt_ids, rewards, valid, min_count=c.history.min_count, ddof=c.ddof
        )
        for name, rewards in named.items()
      }
    result = advantages.combine(
      binary, terms, config.reward.combine, clamp=c.clamp, statistics=statistics, **options
    )
    metrics = _reward_metrics(scores, terms, result)
    prompts, group = result.advantage.shape
    position = jnp.broadcast_to(jnp.arange(group)[None], (prompts, group))
    if c.best_of:
      position, result = advantages.best_of(result, c.best_of)
    chosen = (jnp.arange(prompts)[:, None] * group + position).reshape(-1).astype(jnp.int32)
    return result.advantage.reshape(-1), result.weight.reshape(-1), chosen, stats, metrics

  return run


def _reward_metrics(scores: dict, terms: tuple, result: advantages.Advantages) -> dict[str, Array]:
  """reward/* is the weighted sum of the raw scores; each term has rows of its own where there are
  several; failed is a share.
  """
  total = sum(weight * scores[name] for name, weight in terms)
  metrics, rows = {}, {"reward": total}
  if len(terms) > 1:
    rows |= {f"reward/{name}": scores[name] for name, _ in terms}
  for prefix, values in rows.items():
    ok = jnp.isfinite(values)
    count = jnp.maximum(ok.sum(), 1)
    mean = jnp.where(ok.any(), jnp.where(ok, values, 0.0).sum() / count, jnp.nan)
    spread = jnp.where(ok, jnp.square(values - mean), 0.0).sum() / jnp.maximum(count - 1, 1)
    metrics |= {
      f"{prefix}/mean": mean,
      f"{prefix}/std": jnp.sqrt(spread),
      f"{prefix}/min": jnp.min(jnp.where(ok, values, jnp.inf)),
      f"{prefix}/max": jnp.max(jnp.where(ok, values, -jnp.inf)),
      f"{prefix}/failed": jnp.mean(~ok),
    }
  group = advantages.group_statistics(total, jnp.isfinite(total), 1)
  return metrics | {
    "reward/failed": result.failed,  # what was masked, thresholds applied
    "group/std_mean": group.std.mean(),
    "group/zero_variance": result.flat_groups,
    "advantage/abs_mean": jnp.abs(result.advantage).mean(),
  }


def _update(config: ConfigDict, pipeline: Pipeline, mesh: jax.sharding.Mesh) -> Callable:
  policy, settings, optimizer = (
    policy_of(config, pipeline.prediction),
    objective_of(config),
    optimizer_of(config),
  )
  denoise, count, group = (
    guided(pipeline, config.sampler.guidance_scale),
    config.mesh.lanes,
    config.rollout.samples_per_prompt,
  )

  def run(
    train_state,
    frozen,
    reference,
    conditioning,
    prompt_ids,
    rollouts,
    advantage,
    weight,
    chosen,
    iteration,
  ):
    latents, log_probs = (
      lanes.in_lanes([getattr(r, name) for r in rollouts], count, 1)
      for name in ("latents", "log_probs")
    )
    if config.advantage.best_of:  # a selection crosses lanes; without one nothing moves

      def select(x: Array) -> Array:
        return lanes.in_lanes([x.reshape(len(x), -1, *x.shape[3:])[:, chosen]], count, 1)

      latents, log_probs = select(latents), select(log_probs)
    numbers = chosen.reshape(count, -1)
    prompt, sample = numbers // group, numbers % group
    batch = update.Batch(
      step_index=rollouts[0].step_index,
      latents=latents,
      log_probs=log_probs,
      prompt=prompt,
      advantage=advantage.reshape(count, -1),
      weight=weight.reshape(count, -1),
    )
    flat = (prompt_ids[prompt].reshape(-1), sample.reshape(-1))
    streams = {name: rng.stream(config.seed, name) for name in ("timesteps", "shuffle")}
    keys = (
      rng.sample_keys(streams["timesteps"], iteration, *flat),
      rng.derive(streams["shuffle"], iteration),
    )
    schedule = pipeline.schedule(policy.steps, config.sampler.shift)

    def policy_output(trainable, x, time, prompt):
      return denoise(state.variables(frozen, trainable), x, time, conditioning, prompt)

    rate = learning_rate(config)(train_state.step)
    new, metrics = update.update(
      policy_output, schedule, policy, settings, optimizer, train_state, reference, batch, keys
    )
    return new, metrics | {"learning_rate": rate, "optimizer/skipped_total": new.skipped}

  return run


def init_adapters(config: ConfigDict, adapters: PyTree, shardings: PyTree) -> PyTree:
  """LoRA's adapters before the first iteration, sharded; drawn from the config's seed."""
  key = rng.stream(config.seed, "lora")
  return jax.jit(lambda: lora.init(key, adapters), out_shardings=shardings)()


def embed(config: ConfigDict, reward: Reward) -> Callable:
  """`(reward params, pixels) -> embeddings`, for evaluate.py."""
  return program(config, f"embed {reward.name}", reward.embed)


def fit_step(loss: Callable, optimizer: optax.GradientTransformation) -> Callable:
  """One step of supervised training, for pretrain.py.

  Args:
    loss: `(params, batch, key) -> (loss, metrics)`.
    optimizer: applied to the whole parameter tree.

  Returns:
    `(state, batch, key, ema_decay) -> (state, metrics)` with state = (params, opt_state, ema),
    donated.
  """

  def step(carry: tuple, batch: Any, key: Array, ema_decay: Array) -> tuple:
    params, opt_state, ema = carry
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
    ema = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, ema, params)
    return (params, opt_state, ema), {"loss": value, **metrics}

  return jax.jit(step, donate_argnums=0)


def compiled(function: Callable) -> Callable:
  """`function` jitted, for the one-off calls of commands."""
  return jax.jit(function)
