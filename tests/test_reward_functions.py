"""Reward functions as people write them: what they may return, the trial before a run, what they
can't spoil, and what a failure costs.
"""

import asyncio
import json
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoint import ROOT, tiny_config

from dancegrpo_jax import evaluate, main, scoring, strict_json
from dancegrpo_jax.assembly import loading, reward_builders, reward_trial
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.evaluation import comparison, measures
from dancegrpo_jax.rewards import failures, host
from dancegrpo_jax.training import outcome
from dancegrpo_jax.types import Example, Media

EMOJI = f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tiny"
EXAMPLES = [Example(0, "a cat", metadata={"bonus": 1.0}), Example(1, "a dog")]
PIXELS = np.stack([np.full((4, 4, 3), value, np.float32) for value in (0.25, 0.5)])
SEMAPHORE = asyncio.Semaphore(1)


def light(pixels):
  return pixels.mean((1, 2, 3))


def plain(pixels, prompts, metadata):
  return light(pixels)


def pair(pixels, prompts, metadata):
  return light(pixels), {}


def pair_of_list(pixels, prompts, metadata):
  return [list(light(pixels)), {"seen": 2}]


def pair_with_none(pixels, prompts, metadata):
  return light(pixels), None


def pair_of_mapping(pixels, prompts, metadata):
  return {"light": light(pixels)}, {}


def column(pixels, prompts, metadata):
  return light(pixels)[:, None]


def tensor(pixels, prompts, metadata):
  return torch.tensor(light(pixels), requires_grad=True).bfloat16()


def tensors(pixels, prompts, metadata):
  first, second = light(pixels)
  return [torch.tensor(first, requires_grad=True), torch.tensor([second])]


def generator(pixels, prompts, metadata):
  return (float(value) for value in light(pixels))


async def later(pixels, prompts, metadata):
  async with SEMAPHORE:  # belongs to the loop that it is first used in
    await asyncio.sleep(0)
  return light(pixels)


def mapping(pixels, prompts, metadata):
  return {"light": light(pixels), "dark": list(1 - light(pixels))}


def mapping_with_total(pixels, prompts, metadata):
  return {"dark": 1 - light(pixels), "avg": light(pixels)}


def some_failed(pixels, prompts, metadata):
  return [None, float(light(pixels)[1])]


def changes_metadata(pixels, prompts, metadata):
  assert (metadata[0] or {}).pop("bonus", 0) == 1
  return light(pixels)


def single(pixels, prompts, metadata):
  return float(pixels.mean())


def single_pair(pixels, prompts, metadata):
  return np.float32(0.5), {}


def records(pixels, prompts, metadata):
  return [{"score": float(value), "acc": 1.0} for value in light(pixels)]


def nothing(pixels, prompts, metadata):
  light(pixels)


def matrix(pixels, prompts, metadata):
  return np.ones((2, 2))


def ragged(pixels, prompts, metadata):
  return [[1.0], [1.0, 2.0]]


def five(pixels, prompts, metadata):
  return (light(pixels),) * 5


def numbered(pixels, prompts, metadata):
  return {0: 0.1, 1: 0.2}


def details(pixels, prompts, metadata):
  return {"score": light(pixels), "details": [{}, {}]}


def words(pixels, prompts, metadata):
  return ["good", "bad"]


async def streamed(pixels, prompts, metadata):
  yield 1.0


def raises(pixels, prompts, metadata):
  return np.linalg.inv(np.zeros((2, 2)))


def leaves(pixels, prompts, metadata):
  sys.exit("bye\nbye")


def scales(pixels, prompts, metadata):
  pixels *= 255
  return light(pixels)


def sorts(pixels, prompts, metadata):
  pixels.sort()
  return light(pixels)


def scales_a_tensor(pixels, prompts, metadata):
  return torch.from_numpy(pixels).mul_(255).mean((1, 2, 3))


def built(*terms: str):
  return reward_builders.build_rewards(
    tiny_config(reward__terms=tuple((f"{__name__}:{term}", 1.0) for term in terms))
  )


def tried(*terms: str, warn=print) -> None:
  config = tiny_config()
  reward_trial.require_usable(built(*terms), loading.build_pipeline(config), EXAMPLES, warn)


def scored(term: str) -> np.ndarray:
  (reward,) = built(term).values()
  (scores,) = host.call(reward, Media(PIXELS), EXAMPLES).values()
  return scores


@pytest.mark.parametrize(
  "term",
  [
    *("plain", "pair", "pair_of_list", "pair_with_none", "pair_of_mapping", "column", "tensor"),
    *("tensors", "generator", "later", "mapping/light", "mapping_with_total", "changes_metadata"),
  ],
)
def test_what_a_function_may_return(term):
  tried(term)
  for _ in range(2):
    scores = scored(term)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, [0.25, 0.5])
  assert EXAMPLES[0].metadata == {"bonus": 1.0}


def test_several_terms_of_one_function():
  tried("mapping/light", "mapping/dark")
  (reward,) = built("mapping/dark", "mapping/light").values()
  scores = host.call(reward, Media(PIXELS), EXAMPLES)
  assert list(scores) == [f"{__name__}:mapping/dark", f"{__name__}:mapping/light"]
  np.testing.assert_array_equal(list(scores.values()), [[0.75, 0.5], [0.25, 0.5]])


def test_none_is_a_failed_sample():
  tried("some_failed")
  np.testing.assert_array_equal(scored("some_failed"), [np.nan, 0.5])


def test_one_sample_may_come_without_its_axis():
  """A squeeze in the function takes it away where the last slice has one sample."""
  (reward,) = built("single").values()
  (scores,) = host.call(reward, Media(PIXELS[1:]), EXAMPLES[1:]).values()
  np.testing.assert_array_equal(scores, [0.5])


@pytest.mark.parametrize(
  "term, said",
  [
    ("single", "returned one number for 2 samples; return 2 numbers"),
    ("single_pair", "returned one number for 2 samples"),
    ("records", r"returned a list of 2 \(dict\).* as \[x\['score'\] for x in ...\]"),
    ("nothing", "returned None for 2 samples"),
    ("matrix", r"returned an array of shape \(2, 2\)"),
    ("ragged", r"returned a list of 2 \(list\)"),
    ("five", r"returned a tuple of 5 \(ndarray\)"),
    ("numbered", "returned a dict with the key 0"),
    ("details", r"returned the entry 'details', a list of 2 \(dict\)"),
    ("words", r"returned a list of 2 \(str\)"),
    ("streamed", "returned an object of type async_generator"),
    ("mapping", "returned the terms .*:mapping/light, .*:mapping/dark, and not .*:mapping;"),
    ("mapping/colour", "and not .*:mapping/colour; name in reward.terms"),
    ("raises", r"raised LinAlgError: Singular matrix \(.*test_reward_functions.py:\d+\)"),
    ("leaves", r"raised SystemExit: bye bye \(.*test_reward_functions.py:\d+\)"),
    ("scales", r"wrote into its pixels.*\(.*test_reward_functions.py:\d+\).*pixels.copy\(\)"),
    ("sorts", r"wrote into its pixels.*pixels.copy\(\)"),
    ("scales_a_tensor", r"wrote into its pixels.*shares their memory; copy them first"),
  ],
)
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_mistake_is_a_line_before_the_run(term, said):
  with pytest.raises(ConfigError, match=f"^config.reward: .*{said}") as error:
    tried(term)
  assert "\n" not in str(error.value)


def test_every_mistaken_reward_has_its_line():
  with pytest.raises(ConfigError) as error:
    tried("single", "plain", "records")
  assert len(str(error.value).splitlines()) == 2


def test_a_run_and_an_evaluation_begin_with_the_trial(tmp_path, monkeypatch, capsys):
  """Nothing has been read or written: the weight files are empty."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "of_a_user.py").write_text("def f(pixels, prompts, metadata):\n  return 1 / 0\n")
  monkeypatch.syspath_prepend(tmp_path)
  shutil.copytree(ROOT / "assets" / "emoji-sd", tmp_path / "model")
  for weights in (tmp_path / "model").rglob("*.safetensors"):
    weights.write_bytes(b"")
  flags = [EMOJI, f"--config.model.checkpoint={tmp_path / 'model'}"]
  flags += ["--config.reward.terms=(('of_a_user:f', 1.0),)"]
  assert main.main([*flags, "--workdir=run"]) == 2
  assert evaluate.main([*flags, "--checkpoint=base", "--out=scores.json"]) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 2
  for line in lines:
    assert "raised ZeroDivisionError: division by zero (of_a_user.py:2)" in line
  assert not (tmp_path / "run").exists() and not (tmp_path / "scores.json").exists()


def test_a_server_that_is_not_up_yet_is_a_notice():
  said = []
  with socket.socket() as held:
    held.bind(("127.0.0.1", 0))  # the port is taken, but nothing listens
    url = f"http://127.0.0.1:{held.getsockname()[1]}/"
    config = tiny_config(
      reward__terms=(("remote", 1.0),), reward__remote__url=url, reward__remote__retries=0
    )
    rewards = reward_builders.build_rewards(config)
    pipeline = loading.build_pipeline(config)
    reward_trial.require_usable(rewards, pipeline, EXAMPLES, said.append)
    # In a run it is not asked for every slice in vain.
    scores, failed = host.sliced(rewards["remote"], Media(PIXELS), EXAMPLES, size=1)
  (line,) = said
  assert line.startswith("reward remote isn't ready yet: ServerDownError") and url in line
  assert [failure.samples for failure in failed] == [2] and np.isnan(scores["remote"]).all()


# Slices.

CALLS: list[int] = []


def no_dogs(pixels, prompts, metadata):
  CALLS.append(len(prompts))
  if "a dog" in prompts:
    raise KeyError("dogs are\nnot known")
  return light(pixels)


def once(pixels, prompts, metadata):
  CALLS.append(len(prompts))
  if len(CALLS) == 1:
    raise TimeoutError
  return light(pixels)


def many(term: str, prompts: list[str], size: int, errors: Path | None = None):
  """(scores, lines, pixels) of noise."""
  CALLS.clear()
  (reward,) = built(term).values()
  pixels = np.random.default_rng(0).random((len(prompts), 16, 8, 3), np.float32)
  examples = [Example(i, prompt) for i, prompt in enumerate(prompts)]
  said: list[str] = []
  media = Media(pixels)
  (scores,) = scoring.host_scores(reward, media, examples, said.append, size, errors).values()
  return scores, said, pixels


def test_an_exception_costs_its_slice(tmp_path):
  file = tmp_path / "new" / failures.FILE
  prompts = ["a cat", "a cat", "a cat", "a dog", "a cat"]
  scores, said, pixels = many("no_dogs", prompts, 2, file)
  assert CALLS == [2, 2, 2, 1]  # the second one twice
  np.testing.assert_array_equal(np.isnan(scores), [False, False, True, True, False])
  np.testing.assert_array_equal(scores[[0, 1, 4]], light(pixels)[[0, 1, 4]])
  (line,) = said
  assert line.startswith(f"reward {__name__}:no_dogs failed for 2 samples: KeyError: ")
  assert "test_reward_functions.py:" in line and line.endswith(f"; traceback: {file}")
  text = file.read_text()
  assert line.partition(";")[0] in text and "Traceback (most recent call last)" in text
  assert 'raise KeyError("dogs are\\nnot known")' in text
  many("no_dogs", prompts, 2, file)
  assert file.read_text().count("Traceback (most") == 2


def test_one_line_for_equal_errors():
  scores, said, _ = many("no_dogs", ["a dog"] * 5, 2)
  assert np.isnan(scores).all() and len(said) == 1 and "failed for 5 samples" in said[0]


def test_a_second_attempt_can_succeed():
  scores, said, pixels = many("once", ["a cat"] * 4, 4)
  assert not said and CALLS == [4, 4]
  np.testing.assert_array_equal(scores, light(pixels))


@pytest.mark.parametrize("size", [0, 1, 3, 16])
def test_slices_change_no_bit(size):
  whole, _, _ = many("plain", ["a cat"] * 7, 7)
  scores, _, _ = many("plain", ["a cat"] * 7, size)
  np.testing.assert_array_equal(scores, whole)


def test_one_reward_can_t_spoil_the_next_one_s_pixels():
  (reward,) = built("scales").values()
  pixels = PIXELS.copy()
  scores, failed = host.sliced(reward, Media(pixels), EXAMPLES)
  assert len(failed) == 1 and np.isnan(list(scores.values())).all()
  np.testing.assert_array_equal(pixels, PIXELS)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_tensor_that_shares_memory_can_t_either():
  (reward,) = built("scales_a_tensor").values()
  pixels = PIXELS.copy()
  host.sliced(reward, Media(pixels), EXAMPLES)
  np.testing.assert_array_equal(pixels, PIXELS)


def test_a_disk_that_can_t_be_written_ends_nothing(tmp_path):
  (tmp_path / "file").touch()
  _, said, _ = many("no_dogs", ["a dog"], 1, tmp_path / "file" / failures.FILE)
  assert "traceback" not in said[0]


# What a run makes of failures.


def rows(*failed: float) -> list[dict]:
  return [{"reward/failed": share} for share in failed]


def test_a_single_bad_iteration_ends_no_run_and_a_lasting_failure_does():
  config = tiny_config(iterations=9)
  for shares, count in {
    (0.0, 1.0): 0,
    (1.0, 1.0): 0,
    (1.0, 0.0, 1.0): 0,
    (0.5, 1.0, 1.0): 0,  # no more than reward.max_failed
    (0.6, 1.0, 0.6): 3,
    (0.0, 1.0, 1.0, 1.0): 3,
  }.items():
    assert outcome.failing_iterations(rows(*shares), config) == count, shares
  short = tiny_config(iterations=1)
  assert outcome.failing_iterations(rows(1.0), short) == 1
  strict = tiny_config(iterations=9, reward__failed_iterations=1)
  assert outcome.failing_iterations(rows(0.0, 1.0), strict) == 1


# Evaluation.


def test_failed_samples_are_left_out_of_a_comparison_and_counted(tmp_path):
  base = np.array([[1.0, 2.0], [np.nan, 4.0], [np.nan, np.nan]])
  tuned = np.array([[2.0, np.nan], [7.0, 5.0], [1.0, np.inf]])
  rows = measures.compare({"mine": base}, {"mine": tuned})["mine"]
  assert (rows["base"], rows["checkpoint"], rows["difference"]) == (2.5, 3.5, 1.0)
  assert (rows["low"], rows["high"], rows["failed"]) == (1.0, 1.0, 4)
  assert "4 failed" in comparison.table({"prompts": {"mine": rows}})


def test_all_failed_is_null_in_strict_json():
  none = np.full((2, 2), np.nan)
  with np.errstate(all="raise"):
    rows = measures.compare({"mine": none}, {"mine": none})
  text = strict_json.dumps(rows)
  values = json.loads(text, parse_constant=pytest.fail)["mine"]
  assert values.pop("failed") == 4 and set(values.values()) == {None}


def test_strict_json():
  value = {"a": [np.nan, 1.5, (np.inf, "NaN")], "b": {"c": np.float64("-inf")}, "d": None}
  expected = {"a": [None, 1.5, [None, "NaN"]], "b": {"c": None}, "d": None}
  assert json.loads(strict_json.dumps(value), parse_constant=pytest.fail) == expected


def test_the_mean_of_an_evaluation_leaves_failed_samples_out():
  assert scoring.mean_of_finite(np.array([np.nan, 1.0, np.inf, 3.0])) == 2
  with np.errstate(all="raise"):
    assert np.isnan(scoring.mean_of_finite(np.array([np.nan])))
