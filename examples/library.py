"""A diffusion model of one's own on points in the plane: pre-trained, then post-trained by GRPO.

    python -m examples.library [--plot=points.png]    # in the project's folder; under a minute

The model is a small Flax network that has nothing to do with images. It learns to draw eight clouds
of points on a ring. Its "prompt" is one of four lines through the middle, which has a cloud at
either end. The reward then asks for points on the right, which the data does not prefer. All that
this takes of the package is `import dancegrpo_jax`; docs/library.md says more about each part.
"""

import argparse
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dancegrpo_jax as dg

PROMPTS, GROUP, STEPS, ITERATIONS = 4, 64, 10, 40
# Number b is sample b % GROUP of prompt b // GROUP.
PROMPT, SAMPLE = np.divmod(np.arange(PROMPTS * GROUP, dtype=np.int32), GROUP)


def data(key, prompt):
  """Points of the training data, one for each prompt: either end of its line, blurred."""
  side_key, blur_key = jax.random.split(key)
  angle = jnp.pi * (prompt / PROMPTS - 0.375)  # none of the lines is vertical
  line = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
  side = jnp.where(jax.random.bernoulli(side_key, shape=prompt.shape), 2.0, -2.0)
  return side[:, None] * line + 0.15 * jax.random.normal(blur_key, line.shape)


def reward(points: np.ndarray) -> np.ndarray:
  """1 for a point in the right half, 0 for another: any function will do, without a gradient."""
  return (points[:, 0] > 0).astype(np.float32)


class Velocity(nn.Module):
  """(noisy points, time from 0 to 1, prompt) -> noise - data, as rectified flow has it."""

  @nn.compact
  def __call__(self, x, time, prompt):
    waves = jnp.sin(time[:, None] * jnp.array([[1.0, 3.0, 9.0]]))
    hidden = jnp.concatenate([x, waves, nn.Embed(PROMPTS, 16)(prompt)], axis=1)
    for _ in range(3):
      hidden = nn.silu(nn.Dense(128)(hidden))
    return nn.Dense(2)(hidden)


network = Velocity()


def pretrain(key, steps=2000, batch=512):
  """Flow matching: at (1 - time) data + time noise, the network should say noise - data."""
  init_key, train_key = jax.random.split(key)
  params = network.init(init_key, jnp.zeros((1, 2)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
  adam = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

  def loss(params, key):
    prompt_key, data_key, noise_key, time_key = jax.random.split(key, 4)
    prompt = jax.random.randint(prompt_key, (batch,), 0, PROMPTS)
    clean, noise = data(data_key, prompt), jax.random.normal(noise_key, (batch, 2))
    time = jax.random.uniform(time_key, (batch, 1))
    output = network.apply(params, (1 - time) * clean + time * noise, time[:, 0], prompt)
    return jnp.mean(jnp.square(output - (noise - clean)))

  def step(carry, key):
    params, moments = carry
    updates, moments = adam.update(jax.grad(loss)(params, key), moments)
    return (optax.apply_updates(params, updates), moments), None

  keys = jax.random.split(train_key, steps)
  return jax.jit(lambda p: jax.lax.scan(step, (p, adam.init(p)), keys)[0][0])(params)


# The sampler goes from noise to data in ten steps. All but the last are stochastic: each is a
# Gaussian whose density is known. So the network is a policy, and every step is an action.
schedule = dg.flow_schedule(steps=STEPS, num_train_timesteps=1)  # this network's time ends at 1
policy = dg.Policy(
  kind="dance", noise_level=0.7, prediction="velocity", steps=STEPS, log_prob="sum"
)
# Two optimizer steps an iteration go through 5 of the 9 stochastic steps of every sample.
settings = dg.grpo.Objective(kl_weight=0.05, updates=2, microbatch=PROMPTS * GROUP * 5 // 2)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))


@jax.jit
def draw(params, iteration):
  """An iteration's trajectories. All noise is a function of (seed, iteration, prompt, sample)."""
  first, later = dg.rng.stream(0, "initial_noise"), dg.rng.stream(0, "step_noise")
  return dg.rollout(
    network_output=lambda x, time: network.apply(params, x, time, PROMPT),
    schedule=schedule,
    policy=policy,
    initial=dg.rng.initial_noise(first, iteration, PROMPT, SAMPLE, shared=False, shape=(2,)),
    step_noise=lambda i: dg.rng.step_noise(later, iteration, PROMPT, SAMPLE, i, shape=(2,)),
  )


@jax.jit
def improve(state, base, drawn, rewards, iteration):
  """Rewards -> advantages within the group of each prompt -> optimizer steps."""
  scores = {"right": rewards.reshape(PROMPTS, GROUP)}
  batch = dg.trajectories.batch_of_groups(drawn, dg.advantages.combine(scores, (("right", 1.0),)))
  algorithm = dg.grpo.algorithm(
    policy_output=network.apply,  # (parameters, x, time, prompt) -> what the network says
    schedule=schedule,
    policy=policy,
    settings=settings,
    surrogate=dg.grpo.clipped(clip_range=0.2),  # a range for log_prob="sum"; or dg.dppo's
    reference=base,  # the KL penalty holds to it; without it the clouds lose their shape
  )
  keys = dg.trajectories.keys_of(0, iteration, PROMPT, SAMPLE)
  return dg.optimize.update(algorithm, optimizer, state, batch, keys)


@jax.jit
def sample(params):
  """1000 points of the deterministic sampler, on noise that training never sees."""
  prompt = jnp.arange(1000) % PROMPTS
  return dg.rollout(
    network_output=lambda x, time: network.apply(params, x, time, prompt),
    schedule=schedule,
    policy=policy._replace(window=0),
    initial=jax.random.normal(jax.random.key(1), (1000, 2)),
    step_noise=jnp.zeros_like,  # is not called
  ).sample


def plot(path, before, after):
  """The points before and after, a colour for each prompt."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8, 4.2), layout="constrained")
  pairs = (("pre-trained", before), ("post-trained", after))
  for axes, (title, points) in zip(figure.subplots(1, 2, sharex=True, sharey=True), pairs):
    axes.scatter(*points.T, c=np.arange(len(points)) % PROMPTS, s=4)
    axes.axvline(0, color="grey", linewidth=0.5)
    axes.set(title=f"{title}: reward {reward(points).mean():.2f}", aspect="equal")
  figure.savefig(path, dpi=110)


def say(name, points):
  """The mean reward and its standard error."""
  scores = reward(points)
  print(f"{name}: reward {scores.mean():.3f} +- {scores.std() / np.sqrt(len(scores)):.3f}")


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--plot", metavar="FILE", help="writes samples before and after as a PNG")
  flags = parser.parse_args()
  begin = time.monotonic()
  base = pretrain(jax.random.key(0))
  before = np.asarray(sample(base))
  say("pre-trained", before)
  state = dg.state.create(base, optimizer)
  for iteration in range(ITERATIONS):
    drawn = draw(state.trainable, iteration)
    rewards = reward(np.asarray(drawn.sample))
    state, metrics = improve(state, base, drawn, rewards, iteration)
    if iteration % 5 == 4:
      kl, clip = float(metrics["kl"]), float(metrics["clip_fraction"])
      mean = rewards.mean()
      print(
        f"iteration {iteration + 1}: reward {mean:.3f}, KL to the base {kl:.2f}, clipped {clip:.1%}"
      )
  after = np.asarray(sample(state.trainable))
  say("post-trained", after)
  print(f"{time.monotonic() - begin:.0f} s")
  if flags.plot:
    plot(flags.plot, before, after)


if __name__ == "__main__":
  main()
