"""From a config to its rewards, and their weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from dancegrpo_jax.checkpoints import components, hub, weights
from dancegrpo_jax.data.tokenizer import load_tokenizer
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.rewards import aesthetic, clip, compressibility, hps, pickscore, remote
from dancegrpo_jax.rewards import callable as python_function
from dancegrpo_jax.rewards.base import Reward
from dancegrpo_jax.scoring import reward_of
from dancegrpo_jax.types import PyTree

Tokenizer = Callable[[str, str, dict[str, Any]], Callable]  # see build_rewards


def _is_open_clip(source: str) -> bool:
  """Whether a local folder is in open_clip's layout. LAION's are in both: transformers' then, where
  its weights are there.
  """
  folder = Path(source.removeprefix(hub.RANDOM))
  whole = (folder / clip.FILES["clip"]).is_file() and (
    hub.is_random(source) or any(folder.glob("model*.safetensors*"))
  )
  return (folder / clip.OPEN_CLIP_FILE).is_file() and not whole


def _clip_checkpoint(field: str, source: str) -> clip.Checkpoint:
  """A CLIP in transformers' layout, or a local one in open_clip's."""
  if not _is_open_clip(source):
    folder = hub.folder(field, source, hub.layout_of(clip)._replace(tokenizers=()))
    return clip.transformers_checkpoint(
      components.location_of(source, folder), components.read_jsons(folder, clip)
    )
  folder = hub.folder(field, source, hub.Layout((clip.OPEN_CLIP_FILE,), (), ("",)))
  # its own file: beside it may lie the same weights with transformers' names
  names = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
  )
  place = next((folder / name for name in names if (folder / name).is_file()), folder)
  return clip.open_clip_checkpoint(
    components.location_of(source, place), weights.read_config(folder, clip.OPEN_CLIP_FILE)
  )


def _tokenizer(field: str, source: str, network: dict[str, Any]) -> Callable:
  """The CLIP tokenizer of a folder or a hub id; it says itself how many tokens the network
  takes.
  """
  del network
  return load_tokenizer(
    str(hub.folder(field, source.removeprefix(hub.RANDOM), hub.Layout((), ("",), ())))
  )


def _weight_file(field: str, source: str) -> Path:
  """A weight file, or a folder with one. ConfigError where there is none."""
  path = Path(source.removeprefix(hub.RANDOM))
  if not path.exists():
    raise ConfigError(
      f"config.{field} = {source!r}: no such file (from {Path.cwd()}); configs/common.py says"
      " where to get it"
    )
  return path


def _network_options(config: ConfigDict) -> dict[str, Any]:
  """How the rewards' networks are built, which config.model says for all networks."""
  m = config.model
  return {"dtype": m.frozen_dtype, "attention": m.attention, "scan_layers": m.scan_blocks}


def _clip(config: ConfigDict, tokenizer: Tokenizer) -> Reward:
  c = config.reward.clip
  checkpoint = _clip_checkpoint("reward.clip.checkpoint", c.checkpoint)
  tokenize = tokenizer("reward.clip.tokenizer", c.tokenizer or c.checkpoint, checkpoint.config)
  return clip.build("clip", checkpoint, tokenize, **_network_options(config))


def _hps(config: ConfigDict, tokenizer: Tokenizer) -> Reward:
  c = config.reward.hps
  place = _weight_file("reward.hps.checkpoint", c.checkpoint)
  folder = place if place.is_dir() else place.parent
  said = (
    weights.read_config(folder, clip.OPEN_CLIP_FILE)
    if (folder / clip.OPEN_CLIP_FILE).is_file()
    else None
  )
  checkpoint = hps.checkpoint(components.location_of(c.checkpoint, place), said)
  tokenize = tokenizer("reward.hps.tokenizer", c.tokenizer or str(folder), checkpoint.config)
  return clip.build("hps", checkpoint, tokenize, **_network_options(config))


def _pickscore(config: ConfigDict, tokenizer: Tokenizer) -> Reward:
  c = config.reward.pickscore
  folder = components.folder_of("reward.pickscore.checkpoint", c.checkpoint, pickscore)
  values = components.read_jsons(folder, pickscore)["clip"]
  checkpoint = pickscore.checkpoint(components.location_of(c.checkpoint, folder), values)
  tokenize = tokenizer("reward.pickscore.tokenizer", c.tokenizer or c.checkpoint, checkpoint.config)
  return clip.build("pickscore", checkpoint, tokenize, **_network_options(config))


def _aesthetic(config: ConfigDict, tokenizer: Tokenizer) -> Reward:
  del tokenizer
  c = config.reward.aesthetic
  checkpoint = _clip_checkpoint("reward.aesthetic.checkpoint", c.checkpoint)
  head = c.head if hub.is_random(c.head) else str(_weight_file("reward.aesthetic.head", c.head))
  return aesthetic.build(checkpoint, head, **_network_options(config))


REWARDS = {
  "clip": _clip,
  "hps": _hps,
  "pickscore": _pickscore,
  "aesthetic": _aesthetic,
  "compressibility": lambda config, _: compressibility.build(**config.reward.compressibility),
  "remote": lambda config, _: remote.build(**config.reward.remote),
}


def build_rewards(config: ConfigDict, tokenizer: Tokenizer = _tokenizer) -> dict[str, Reward]:
  """The rewards that config.reward.terms names, without weights; no other's files are looked at.

  Args:
    config: validated.
    tokenizer: how a tokenizer is found: (field, its name there, the network's config.json) ->
      tokenizer.

  Raises:
    ConfigError: a file that is missing, or a value in one that is not implemented.
  """
  rewards = {}
  for term, _ in config.reward.terms:
    name = reward_of(term)
    try:
      rewards[name] = (
        REWARDS[name](config, tokenizer) if name in REWARDS else python_function.build(name)
      )
    except (ValueError, FileNotFoundError) as error:
      raise ConfigError(str(error)) from error
  return rewards


def read_reward(
  reward: Reward,
  shardings: dict[str, PyTree] | jax.sharding.Sharding | None,
  allow_pickle: bool = False,
) -> dict[str, PyTree]:
  """A reward's parameters by component, {} where it has none. Errors are `read_component`'s.

  Args:
    reward: what to read.
    shardings: by component, or one for all.
    allow_pickle: as `read_component`.
  """
  each = shardings if isinstance(shardings, dict) else dict.fromkeys(reward.components, shardings)
  return {
    name: components.read_component(
      part.folder, part._replace(folder=""), each[name], allow_pickle=allow_pickle
    )
    for name, part in reward.components.items()
  }
