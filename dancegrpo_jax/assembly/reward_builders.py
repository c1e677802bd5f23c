"""From a config to its rewards and their weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from dancegrpo_jax.checkpoints import components, hub, weights
from dancegrpo_jax.data import cut_texts
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.pipelines.layout import Layout, local_path, without_mark
from dancegrpo_jax.rewards import frames, kinds
from dancegrpo_jax.rewards.base import Files, Networks, Reward, RewardKind
from dancegrpo_jax.types import PyTree

# How to get the files that configs/common.py names.
_WHERE = {
  "reward.hps.checkpoint": (
    "get it with `hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir checkpoints/HPSv2`"
  ),
  "reward.aesthetic.head": (
    "get sac+logos+ava1-l14-linearMSE.pth from"
    " https://github.com/christophschuhmann/improved-aesthetic-predictor"
  ),
  "reward.moving_emoji.subjects": (
    "assets/emoji-video/subjects.png comes with this package;"
    " `python -m dancegrpo_jax.data.moving_emoji --write-subjects=FOLDER` writes it too"
  ),
}


def load_tokenizer(
  field: str, source: str, network: dict[str, Any], find: Callable[..., Path] = hub.folder
) -> Callable:
  """The CLIP tokenizer of a folder or a hub id, for `Files.tokenizer`.

  Args:
    field, source, network: as for `Files.tokenizer`.
    find: as `hub.folder`.

  Raises:
    ConfigError: a file is missing.
    ValueError: the tokenizer is of another kind, or doesn't fit the network.
  """
  layout = Layout(files={}, tokenizers={"": "clip"}, networks=())
  folder = find(field, without_mark(source), layout)
  tokenizer = components.read_tokenizers(folder, layout)[""]
  cut_texts.require_fit(f"{folder}", tokenizer, network.get("text_config", {}), length=True)
  return tokenizer


def weight_file(field: str, source: str) -> Path:
  """A local weight file, or a folder that has one. Raises ConfigError where there is none."""
  path = local_path(source)
  if not path.exists():
    raise ConfigError(
      f"config.{field} = {source!r}: no such file (from {Path.cwd()});"
      f" {_WHERE.get(field, 'correct the path')}"
    )
  return path


def kind_of(name: str) -> RewardKind:
  """The kind of a reward that a config names, see `kinds.kind_of`. Its ValueError becomes a
  ConfigError.
  """
  try:
    return kinds.kind_of(name)
  except ValueError as error:
    raise ConfigError(str(error)) from error


FILES = Files(
  folder=hub.folder,
  file=weight_file,
  json=weights.read_config,
  tokenizer=load_tokenizer,
)


def build_rewards(config: ConfigDict, files: Files = FILES) -> dict[str, Reward]:
  """The rewards that config.reward.terms and config.reward.watch name, without their weights.

  Args:
    config: validated.
    files: how the files of a reward are found.

  Raises:
    ConfigError: a file that is missing, a value in one that is not implemented, or a term that its
      reward does not have.
  """
  model = config.model
  networks = Networks(
    dtype=model.frozen_dtype, attention=model.attention, scan_layers=model.scan_blocks
  )
  rewards = {}
  for name in dict.fromkeys(map(kinds.reward_of, kinds.scored(config))):
    kind = kind_of(name)
    try:
      section = config.reward[kind.section] if kind.section else ConfigDict()
      reward = kind.build(name, section, files, networks)
      if kind.of_images:
        reward = frames.of_videos(
          reward, section.get(frames.FIELD, frames.NAMED[0]), f"reward.{kind.section}"
        )
      rewards[name] = reward
    except KeyError as error:
      raise ConfigError(
        f"config.reward.{kind.section}: missing; the reward {name!r} reads this section"
      ) from error
    except (ValueError, FileNotFoundError) as error:
      raise ConfigError(str(error)) from error
    if rewards[name].any_part:
      asked = [term for term in kinds.scored(config) if kinds.reward_of(term) == name]
      rewards[name] = rewards[name]._replace(terms=tuple(asked))
    _require_terms(config, rewards[name])
  return rewards


def _require_terms(config: ConfigDict, reward: Reward) -> None:
  """Raises ConfigError where the config asks a reward for a term that it does not have."""
  for term in kinds.scored(config):
    if kinds.reward_of(term) == reward.name and term not in reward.terms:
      raise ConfigError(
        f"config.reward: {term!r} is no score of {reward.name!r}, which gives"
        f" {', '.join(reward.terms)}"
      )


def require_scorable(rewards: dict[str, Reward], shape: tuple[int, ...]) -> None:
  """Checks that the rewards can score samples of a shape, see `Pipeline.sample_shape`.

  Raises:
    ConfigError: a line for each reward that can't.
  """
  problems = [reward.refusal(shape) for reward in rewards.values() if reward.refusal]
  if any(problems):
    raise ConfigError("\n".join(filter(None, problems)))


def read_reward(
  reward: Reward,
  shardings: dict[str, PyTree] | jax.sharding.Sharding | None,
  allow_pickle: bool = False,
) -> dict[str, PyTree]:
  """Reads the parameters of a reward by component, {} for a reward without a network.

  Args:
    reward: whose components are read.
    shardings: by component, or one for all.
    allow_pickle: whether pickled weights may be read.

  Raises:
    ConfigError: as `components.read_component`.
  """
  each = shardings if isinstance(shardings, dict) else dict.fromkeys(reward.components, shardings)
  return {
    name: components.read_component(
      part.folder, part._replace(folder=""), each[name], allow_pickle=allow_pickle
    )
    for name, part in reward.components.items()
  }
