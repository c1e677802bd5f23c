"""Group normalisation, failed samples, several rewards, selection, and running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dancegrpo_jax.rl import advantages
from dancegrpo_jax.rl.advantages import Advantages

NAN = np.nan
GROUP = [0.1, 0.4, 0.2, 0.9]
GOLDEN = [-0.842927, 0.0, -0.561951, 1.404879]  # ddof 1, eps 1e-8
OPTIONS = {"ddof": 1, "eps": 1e-8, "clamp": 5.0, "min_spread": 1e-6}


def rewards(*groups):
  return jnp.asarray(groups, jnp.float32)


def normalise(values, **options):
  valid = jnp.isfinite(values)
  return advantages.group_advantages(values, valid, **{**OPTIONS, **options})


def combine(scores, terms, mode="advantages", statistics=None, **options):
  return advantages.combine(scores, terms, mode, statistics=statistics, **{**OPTIONS, **options})


def test_golden():
  np.testing.assert_allclose(normalise(rewards(GROUP)), [GOLDEN], atol=1e-6)
  np.testing.assert_allclose(
    normalise(rewards(GROUP), ddof=0, eps=1e-4), [[-0.973013, 0, -0.648675, 1.621688]], atol=1e-6
  )


@pytest.mark.parametrize("group", [4, 16, 24])
def test_largest_advantage(group):
  one = jnp.zeros((1, group)).at[0, 1].set(1.0)
  assert float(normalise(one).max()) == pytest.approx((group - 1) / group**0.5, rel=1e-5)
  assert float(normalise(one, ddof=0).max()) == pytest.approx((group - 1) ** 0.5, rel=1e-5)
  assert float(normalise(one, clamp=1.0).max()) == 1.0


def test_groups_are_independent_and_sum_to_0():
  values = 0.2 + 0.05 * jax.random.normal(jax.random.key(0), (5, 12))
  got = normalise(values)
  np.testing.assert_allclose(jnp.sum(got, axis=1), 0.0, atol=1e-5)
  np.testing.assert_allclose(normalise(values[2:3]), got[2:3], atol=1e-6)
  # A shift and a scale have no effect.
  np.testing.assert_allclose(normalise(values * 10 + 3), got, atol=2e-4)


@pytest.mark.parametrize("value", [0.3, 0.1, 1e6, 0.0])
def test_equal_rewards_give_exactly_0(value):
  scores = {"clip": jnp.full((2, 12), value, jnp.float32)}
  for mode in advantages.MODES:
    got = combine(scores, (("clip", 0.7),), mode)
    # The weight is 1: a KL penalty still acts.
    assert not np.any(got.advantage) and np.all(got.weight == 1)
    assert float(got.flat_groups) == 1.0


def test_a_large_common_part_costs_no_precision():
  # These values are exact in float32, but their mean in float32 is not.
  values = 4096.0 + np.array([1, 4, 2, 9, 3, 7]) / 1024
  small = values - 4096.0
  want = (small - small.mean()) / small.std(ddof=1)
  np.testing.assert_allclose(normalise(rewards(values)), [want], rtol=1e-5)


def test_rewards_that_differ_by_round_off_are_equal():
  assert not np.any(normalise(rewards([0.3, 0.3000003, 0.3, 0.3])))
  assert np.any(normalise(rewards([0.3, 0.3000003, 0.3, 0.3]), min_spread=0.0))


def test_a_failed_sample_leaves_the_statistics():
  got = combine({"clip": rewards([0.1, NAN, 0.4, 0.2, 0.9])}, (("clip", 1.0),))
  np.testing.assert_allclose(got.advantage, [[GOLDEN[0], 0, *GOLDEN[1:]]], atol=1e-6)
  np.testing.assert_array_equal(got.weight, [[1, 0, 1, 1, 1]])
  assert float(got.failed) == pytest.approx(0.2)


def test_one_failed_term_drops_the_sample_from_all_terms():
  scores = {
    "a": rewards([0.1, 7.0, 0.4, 0.2, 0.9]),
    "b": rewards([0.1, NAN, 0.4, 0.2, 0.9]),
    "unused": rewards([NAN] * 5),
  }
  got = combine(scores, (("a", 0.7), ("b", 1.4)))
  np.testing.assert_allclose(got.advantage, [2.1 * np.insert(GOLDEN, 1, 0)], atol=3e-6)


@pytest.mark.parametrize("mode", advantages.MODES)
def test_failed_groups_have_weight_0(mode):
  values = rewards([NAN, NAN, NAN, NAN], [NAN, 0.5, NAN, NAN], GROUP, [np.inf, 0.2, 0.4, NAN])
  got = jax.jit(lambda v: combine({"clip": v}, (("clip", 1.0),), mode))(values)
  np.testing.assert_array_equal(got.weight, [[0] * 4, [0] * 4, [1] * 4, [0, 1, 1, 0]])
  assert np.isfinite(got.advantage).all() and not np.any(got.advantage[:2])
  np.testing.assert_allclose(jnp.sum(got.advantage, axis=1), 0.0, atol=1e-5)
  assert float(got.failed) == pytest.approx(9 / 16)
  assert float(got.flat_groups) == 0.5


def test_weighted_advantages_and_weighted_rewards():
  a, b = rewards(GROUP), rewards([100.0, 200.0, 300.0, 400.0])
  linear = np.array([-1.5, -0.5, 0.5, 1.5]) / np.sqrt(5 / 3)  # unbiased std of 1, 2, 3, 4
  summed = combine({"a": a, "b": b}, (("a", 0.7), ("b", 1.4)))
  np.testing.assert_allclose(summed.advantage, [0.7 * np.array(GOLDEN) + 1.4 * linear], atol=3e-6)
  # a + 2 b is the golden group.
  parts = {"a": rewards([0.1, 0.0, 0.2, 0.4]), "b": rewards([0.0, 0.2, 0.0, 0.25])}
  np.testing.assert_allclose(
    combine(parts, (("a", 1.0), ("b", 2.0)), "rewards").advantage, [GOLDEN], atol=1e-6
  )
  np.testing.assert_allclose(
    combine({"a": a}, (("a", 3.0),), "rewards").advantage, [GOLDEN], atol=1e-6
  )


def test_clamp_acts_on_the_sum():
  got = combine({"a": rewards(GROUP), "b": rewards(GROUP)}, (("a", 1.0), ("b", 1.0)), clamp=2.0)
  np.testing.assert_allclose(got.advantage, [np.clip(2 * np.array(GOLDEN), -2, 2)], atol=2e-6)


def test_gdpo_normalises_over_the_batch():
  values = jax.random.normal(jax.random.key(1), (2, 6, 8))
  got = combine({"a": values[0], "b": values[1]}, (("a", 1.0), ("b", 0.5)), "gdpo")
  assert float(jnp.std(got.advantage, ddof=1)) == pytest.approx(1.0, rel=1e-5)
  np.testing.assert_allclose(jnp.sum(got.advantage, axis=1), 0.0, atol=1e-5)
  summed = combine({"a": values[0], "b": values[1]}, (("a", 1.0), ("b", 0.5)))
  ratio = np.asarray(got.advantage / summed.advantage)
  # One factor for the whole batch, since groups are centred already.
  np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-4)


def test_thresholds_keep_failures():
  scores = {"hps": rewards([0.27, 0.28, 0.29, NAN]), "clip": rewards(GROUP)}
  got = advantages.apply_thresholds(scores, (("hps", 0.28),))
  np.testing.assert_array_equal(got["hps"], rewards([0, 0, 1, NAN]))
  np.testing.assert_array_equal(got["clip"], scores["clip"])
  with pytest.raises(ValueError, match="reward.thresholds names pick"):
    advantages.apply_thresholds(scores, (("pick", 0.2),))


def made(*groups):
  values = rewards(*groups)
  ok = jnp.isfinite(values)
  zero = jnp.float32(0.0)
  return Advantages(jnp.where(ok, values, 0.0), ok.astype(jnp.float32), zero, zero)


def test_best_of_keeps_the_extremes_of_each_prompt():
  chosen, got = advantages.best_of(made([0.5, -2.0, 1.0, 0.1, -0.1, 3.0], [5, 4, 3, 2, 1, 0]), 4)
  assert chosen.tolist() == [[5, 2, 4, 1], [0, 1, 4, 5]]
  np.testing.assert_allclose(
    got.advantage, [[2.525, 0.525, -0.575, -2.475], [2.5, 1.5, -1.5, -2.5]], atol=1e-6
  )
  np.testing.assert_array_equal(got.weight, np.ones((2, 4)))


def test_best_of_never_prefers_a_failure():
  chosen, got = advantages.best_of(
    made([NAN, 1.0, NAN, 0.0, -3.0, 2.0], [NAN, 1.0, NAN, -1.0, NAN, NAN], [NAN] * 6), 4
  )
  assert chosen[0].tolist() == [5, 1, 3, 4]
  assert chosen[1].tolist()[:2] == [1, 3]
  np.testing.assert_array_equal(got.weight, [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
  np.testing.assert_allclose(got.advantage, [[2, 1, 0, -3], [1, -1, 0, 0], [0, 0, 0, 0]], atol=1e-6)
  assert all(len(set(row)) == 4 for row in chosen.tolist())


def test_best_of_breaks_ties_by_sample_id():
  assert advantages.best_of(made([1, 1, 1, 0, 0, 0]), 4)[0].tolist() == [[0, 1, 4, 5]]
  assert advantages.best_of(made([0] * 6), 2)[0].tolist() == [[0, 5]]
  assert advantages.best_of(made([0, 2, 1, 3]), 4)[0].tolist() == [[3, 1, 2, 0]]


@pytest.mark.parametrize("k", [0, 3, 8])
def test_best_of_refuses_other_sizes(k):
  with pytest.raises(ValueError, match=f"best_of is {k}"):
    advantages.best_of(made([0, 2, 1, 3]), k)


def test_ring_buffer_appends_valid_rewards_and_wraps():
  stats = advantages.empty_stats(3, 4)
  prompts = jnp.int32([2, 0])
  stats = advantages.update_stats(
    stats, prompts, rewards([1, NAN, 3], [5, 6, 7]), jnp.asarray([[1, 0, 1], [1, 1, 1]], bool)
  )
  assert stats.count.tolist() == [3, 0, 2]
  assert stats.values[2].tolist() == [1, 3, 0, 0] and stats.values[0].tolist() == [5, 6, 7, 0]
  stats = jax.jit(advantages.update_stats)(
    stats, jnp.int32([0, 0]), rewards([8, 9, 10], [11, 12, 13]), jnp.ones((2, 3), bool)
  )
  assert stats.count.tolist() == [9, 0, 2]  # a prompt may come twice
  assert sorted(stats.values[0].tolist()) == [10, 11, 12, 13]


def test_more_rewards_than_slots_keep_the_last_ones():
  values = jnp.arange(7, dtype=jnp.float32)[None]
  stats = advantages.update_stats(
    advantages.empty_stats(1, 4), jnp.int32([0]), values, jnp.ones((1, 7), bool)
  )
  assert sorted(stats.values[0].tolist()) == [3, 4, 5, 6] and stats.count.tolist() == [7]


def test_statistics_over_iterations_replace_the_groups():
  """Prompt 0 has enough scores for its own mean and std; prompt 1 gets those of the whole batch."""
  old, new = [[1.0, 2.0], [0.0, 0.0]], [[3.0, 4.0], [10.0, 13.0]]
  prompts = jnp.int32([0, 1])
  stats = advantages.update_stats(
    advantages.empty_stats(2, 8), prompts, rewards(*old), jnp.asarray([[1, 1], [0, 0]], bool)
  )
  named, valid = advantages.signals({"clip": rewards(*new)}, (("clip", 1.0),), "advantages")
  stats = advantages.update_stats(stats, prompts, named["clip"], valid)
  statistics = advantages.prompt_statistics(
    stats, prompts, named["clip"], valid, min_count=4, ddof=0
  )
  got = combine({"clip": rewards(*new)}, (("clip", 1.0),), ddof=0, statistics={"clip": statistics})
  batch = np.array([3.0, 4.0, 10.0, 13.0])
  want = [(np.array([3.0, 4.0]) - 2.5) / np.sqrt(1.25), (batch[2:] - batch.mean()) / batch.std()]
  np.testing.assert_allclose(got.advantage, want, rtol=1e-5)
  assert np.all(got.weight == 1)


def test_a_lone_sample_is_trained_against_its_history():
  stats = advantages.update_stats(
    advantages.empty_stats(1, 8), jnp.int32([0]), rewards(GROUP), jnp.ones((1, 4), bool)
  )
  statistics = advantages.prompt_statistics(
    stats, jnp.int32([0]), rewards([0.9]), jnp.ones((1, 1), bool), min_count=4, ddof=1
  )
  got = combine({"clip": rewards([0.9])}, (("clip", 1.0),), statistics={"clip": statistics})
  np.testing.assert_allclose(got.advantage, [[GOLDEN[3]]], atol=1e-6)
  assert float(got.weight[0, 0]) == 1.0
  assert float(combine({"clip": rewards([0.9])}, (("clip", 1.0),)).weight[0, 0]) == 0.0


@pytest.mark.parametrize(
  "terms, mode, message",
  [
    ((("hps", 1.0),), "advantages", "reward.terms names hps, but the rewards give clip"),
    ((), "advantages", "reward.terms is empty"),
    ((("clip", 1.0),), "product", "reward.combine is 'product'"),
  ],
)
def test_mistakes_are_named(terms, mode, message):
  with pytest.raises(ValueError, match=message):
    combine({"clip": rewards(GROUP)}, terms, mode)
