"""Which steps are trained: their number in the paper's recipes, and the rules for a selection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dancegrpo_jax.rl import timesteps


def keys(count=64):
  return jax.random.split(jax.random.key(0), 64)[:count]


@pytest.mark.parametrize(
  "fraction, steps, trained",
  [
    (0.6, 15, 9),
    (0.6, 11, 6),
    (0.6, 19, 11),
    (0.3, 10, 3),
    (0.29, 100, 29),
    (0.7, 10, 7),
    (0.1, 3, 1),
    (1.0, 7, 7),
    (1, 7, 7),
  ],
)
def test_count(fraction, steps, trained):
  assert timesteps.count("random", fraction, steps) == trained
  assert timesteps.count("all", fraction, steps) == steps


def test_fixed_modes():
  assert timesteps.select("first", 0.3, 10, keys(2)).tolist() == [[0, 1, 2]] * 2
  assert timesteps.select("last", 0.4, 10, keys(2)).tolist() == [[6, 7, 8, 9]] * 2
  assert timesteps.select("all", 0.4, 4, keys(2)).tolist() == [[0, 1, 2, 3]] * 2


def test_random_is_a_subset_in_order_for_each_sample():
  chosen = jax.jit(timesteps.select, static_argnums=(0, 1, 2))("random", 0.6, 10, keys())
  assert chosen.shape == (64, 6) and chosen.dtype == jnp.int32
  # Ascending, so drawn without replacement.
  assert (np.diff(chosen, axis=1) > 0).all() and chosen.min() >= 0 and chosen.max() <= 9
  assert len({tuple(row) for row in np.asarray(chosen).tolist()}) > 30  # 64 draws from 210 subsets
  share = np.bincount(np.ravel(chosen), minlength=10) / 64
  assert np.abs(share - 0.6).max() < 0.25  # four standard errors


def test_a_samples_choice_does_not_depend_on_the_batch():
  alone, together = (timesteps.select("random", 0.6, 10, batch) for batch in (keys(3), keys()))
  np.testing.assert_array_equal(alone, together[:3])


@pytest.mark.parametrize(
  "mode, fraction, steps",
  [("middle", 0.5, 10), ("first", 0.0, 10), ("random", 1.5, 10), ("all", 0.5, 0)],
)
def test_mistakes_are_named(mode, fraction, steps):
  with pytest.raises(ValueError, match="timestep|policy steps"):
    timesteps.count(mode, fraction, steps)
