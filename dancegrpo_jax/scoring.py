"""From a config to its rewards in memory, and scores out of them."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax import components
from dancegrpo_jax.data.tokenizer import load_tokenizer
from dancegrpo_jax.rewards import aesthetic, clip, compressibility, hps, pickscore, remote
from dancegrpo_jax.rewards import callable as python_function
from dancegrpo_jax.rewards.base import Reward
from dancegrpo_jax.runtime import hub, weights
from dancegrpo_jax.runtime import mesh as meshes
from dancegrpo_jax.runtime.config import ConfigError
from dancegrpo_jax.types import Example, Media, PyTree

Tokenizer = Callable[[str, str, dict[str, Any]], Callable]  # see build_rewards


def _is_open_clip(source: str) -> bool:
  """Whether a local folder is in open_clip's layout. LAION's are in both: transformers' then, where its weights are there."""
  folder = Path(source.removeprefix(hub.RANDOM))
  whole = (folder / clip.FILES["clip"]).is_file() and (hub.is_random(source) or any(folder.glob("model*.safetensors*")))
  return (folder / clip.OPEN_CLIP_FILE).is_file() and not whole


def _clip_checkpoint(field: str, source: str) -> clip.Checkpoint:
  """A CLIP in transformers' layout, or a local one in open_clip's."""
  if not _is_open_clip(source):
    folder = hub.folder(field, source, hub.layout_of(clip)._replace(tokenizers=()))
    return clip.transformers_checkpoint(components.location_of(source, folder), components.read_jsons(folder, clip))
  folder = hub.folder(field, source, hub.Layout((clip.OPEN_CLIP_FILE,), (), ("",)))
  # its own file: beside it may lie the same weights with transformers' names
  names = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
  place = next((folder / name for name in names if (folder / name).is_file()), folder)
  return clip.open_clip_checkpoint(components.location_of(source, place), weights.read_config(folder, clip.OPEN_CLIP_FILE))


def _tokenizer(field: str, source: str, network: dict[str, Any]) -> Callable:
  """The CLIP tokenizer of a folder or a hub id; it says itself how many tokens the network takes."""
  del network
  return load_tokenizer(str(hub.folder(field, source.removeprefix(hub.RANDOM), hub.Layout((), ("",), ()))))


def _weight_file(field: str, source: str) -> Path:
  """A weight file, or a folder with one. ConfigError where there is none."""
  path = Path(source.removeprefix(hub.RANDOM))
  if not path.exists():
    raise ConfigError(f"config.{field} = {source!r}: no such file (from {Path.cwd()}); configs/common.py says where to get it")
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
  said = weights.read_config(folder, clip.OPEN_CLIP_FILE) if (folder / clip.OPEN_CLIP_FILE).is_file() else None
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


def reward_of(term: str) -> str:
  """The reward that a term of config.reward.terms belongs to: of "videoalign/vq" the first part."""
  return term if ":" in term else term.split("/")[0]


def build_rewards(config: ConfigDict, tokenizer: Tokenizer = _tokenizer) -> dict[str, Reward]:
  """The rewards that config.reward.terms names, without weights; no other's files are looked at.

  Args:
    config: validated.
    tokenizer: how a tokenizer is found: (field, its name there, the network's config.json) -> tokenizer.

  Raises:
    ConfigError: a file that is missing, or a value in one that is not implemented.
  """
  rewards = {}
  for term, _ in config.reward.terms:
    name = reward_of(term)
    try:
      rewards[name] = REWARDS[name](config, tokenizer) if name in REWARDS else python_function.build(name)
    except (ValueError, FileNotFoundError) as error:
      raise ConfigError(str(error)) from error
  return rewards


def read_reward(
  reward: Reward, shardings: dict[str, PyTree] | jax.sharding.Sharding | None, allow_pickle: bool = False
) -> dict[str, PyTree]:
  """A reward's parameters by component, {} where it has none. Errors are `read_component`'s.

  Args:
    reward: what to read.
    shardings: by component, or one for all.
    allow_pickle: as `read_component`.
  """
  each = shardings if isinstance(shardings, dict) else dict.fromkeys(reward.components, shardings)
  return {
    name: components.read_component(part.folder, part._replace(folder=""), each[name], allow_pickle=allow_pickle)
    for name, part in reward.components.items()
  }


def reward_features(
  rewards: dict[str, Reward], params: dict[str, PyTree], compute: dict[str, Callable], examples: list[Example], rows: int
) -> dict[str, PyTree]:
  """Every device reward's features of all prompts, computed once, `rows` prompts a call.

  Args:
    rewards: by name.
    params: by reward.
    compute: compiled, `Programs.features`.
    examples: the data set.
    rows: prompts of one call.

  Returns:
    By reward, a pytree of host arrays with one row an example.
  """
  padded = examples + [examples[-1]] * (-len(examples) % rows)
  result = {}
  for name, features in compute.items():
    prepared = rewards[name].prepare(padded)
    parts = [
      jax.device_get(features(params[name], jax.tree.map(lambda x, i=i: x[i : i + rows], prepared)))
      for i in range(0, len(padded), rows)
    ]
    result[name] = jax.tree.map(lambda *x: np.concatenate(x)[: len(examples)], *parts)
  return result


def host_scores(reward: Any, pixels: Any, examples: list[Example], say: Callable[[str], None]) -> dict[str, np.ndarray]:
  """A host reward of one chunk. A failure is NaN for the chunk's samples, and a line."""
  try:
    return reward.score(Media(np.asarray(pixels)), examples)
  except Exception as error:  # the user's own function: whatever it raises must not end the run
    say(f"reward {reward.name} failed for {len(examples)} samples: {type(error).__name__}: {error}")
    return {reward.name: np.full(len(examples), np.nan, np.float32)}


def own_scores(reward: Reward, pixels: meshes.Shards, examples: list[Example], say: Callable[[str], None]) -> tuple:
  """A host reward of this process's rows of one chunk, in a thread: it may look at devices' data, and not compute on them.

  Returns:
    (numbers of the rows, {term: scores of these rows}).
  """
  if not len(pixels.numbers):
    return pixels.numbers, {}
  rows = np.concatenate([np.asarray(part) for part in pixels.parts])
  return pixels.numbers, host_scores(reward, rows, [examples[number] for number in pixels.numbers], say)


def from_host(config: ConfigDict, waiting: list[tuple[str, np.ndarray, Future]], chunks: np.ndarray) -> dict[str, list]:
  """The host rewards of an iteration, from all processes; waits for them.

  Args:
    config: of the run.
    waiting: reward, sample numbers of its chunk, and the future of `own_scores`.
    chunks: sample numbers `[chunks, chunk]`.

  Returns:
    `{term: [f32[samples]]}` in the order of `chunks`, NaN where failed.
  """
  place = np.argsort(chunks.reshape(-1))  # of a sample among all chunks
  terms = {name: [term for term, _ in config.reward.terms if reward_of(term) == name] for name, *_ in waiting}
  values = {term: np.full(chunks.size, np.nan, np.float32) for named in terms.values() for term in named}
  own = np.zeros(chunks.size, bool)
  for name, chunk, future in waiting:
    numbers, scores = future.result()
    places = place[chunk[numbers]]
    own[places] = True
    for term in terms[name]:
      if term in scores:
        values[term][places] = scores[term]
  return {term: [row] for term, row in meshes.join_processes(values, own).items()}


def chunks(count: int, size: int, lanes: int) -> np.ndarray:
  """Numbers 0 .. count - 1 in rows of one length: `size`, or fewer where all fit in one; the last number fills up."""
  size = min(size, -(-count // lanes) * lanes)
  return np.minimum(np.arange(-(-count // size) * size, dtype=np.int32), count - 1).reshape(-1, size)


def score_all(
  rewards: dict[str, Reward],
  params: dict[str, PyTree],
  compute: dict[str, Callable],
  pixels: np.ndarray,
  features: dict[str, PyTree],
  owners: np.ndarray,
  examples: list[Example],
  rows: np.ndarray,
  say: Callable[[str], None] = print,
) -> dict[str, np.ndarray]:
  """Every reward of samples that are there already: for evaluation; training scores chunk by chunk, as they come.

  Args:
    rewards, params: by name.
    compute: compiled, `Programs.score`.
    pixels: `[n, h, w, 3]`.
    features: of the device rewards, one row an example.
    owners: int32 `[n]`, each sample's row of `features` and `examples`.
    examples: prompts.
    rows: `chunks(n, ..)`, what device rewards score at once.
    say: where failures are told.

  Returns:
    `{term: f32[n]}`, NaN where failed. Host rewards are process 0's alone, as all have the same pixels: NaN elsewhere.
  """
  result = {}
  for name, reward in rewards.items():
    if reward.kind == "host":
      if jax.process_index() == 0:
        result |= host_scores(reward, pixels, [examples[owner] for owner in owners], say)
      else:
        result[name] = np.full(len(pixels), np.nan, np.float32)
      continue
    parts = [compute[name](params[name], pixels[row], features[name], owners[row]) for row in rows]
    result |= {term: np.concatenate([np.asarray(part[term]) for part in parts])[: len(pixels)] for term in parts[0]}
  return result
