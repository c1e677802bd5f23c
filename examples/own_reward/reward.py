"""The reward: how sure a small network is that the background has the colour that the prompt names.

A config names it as a term, "examples.own_reward.reward:KIND". It runs on the devices, compiled and
split over the samples as the package's own network rewards are.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dancegrpo_jax.conversion.table import Table
from dancegrpo_jax.conversion.tables.rows import dense, join
from dancegrpo_jax.pipelines.layout import RANDOM, Component, is_random
from dancegrpo_jax.pipelines.networks import abstract
from dancegrpo_jax.rewards.base import Describe, Files, Networks, Reward, RewardKind, images
from dancegrpo_jax.types import Example, Media, PyTree

from .model import COLOURS, SIDE, BackgroundJudge

WEIGHTS = Path(__file__).with_name("weights.safetensors")
SECTION = "background"  # of config.reward, for those who want to name another weight file
TABLE = Table(name="BackgroundJudge", rows=join(dense("fc1"), dense("fc2")), file=WEIGHTS.stem)


def colour_of(prompt: str) -> int:
  """The number of the colour in "... on a <colour> background", -1 where there is none."""
  words = prompt.lower().split()
  named = [a for a, b in zip(words, words[1:], strict=False) if b == "background"]
  return COLOURS.index(named[-1]) if named and named[-1] in COLOURS else -1


def build(name: str, section: ConfigDict, files: Files, networks: Networks) -> Reward:
  """The probability of the named colour, as the term `name`; NaN for prompts that name none.

  Args:
    name: of the reward and its one term.
    section: `checkpoint`, the weight file, where the config has the section; else empty.
    files: how files are found.
    networks: how the network is built.
  """
  location = section.get("checkpoint", str(WEIGHTS))
  if not is_random(location):
    location = str(files.file(f"reward.{SECTION}.checkpoint", location))
  dtype = jnp.dtype(networks.dtype)
  network = BackgroundJudge(dtype=dtype, param_dtype=dtype)
  component = Component(folder=location, table=TABLE, abstract=_abstract(network))

  def prepare(examples: list[Example]) -> Int[np.ndarray, "n"]:
    return np.array([colour_of(example.prompt) for example in examples], np.int32)

  def features(params: PyTree, colours: Int[Array, "n"]) -> Int[Array, "n"]:
    del params  # a reward with a text tower would run it here, once a prompt
    return colours

  def score(params: PyTree, media: Media, colours: Int[Array, "b"]) -> dict[str, Float[Array, "b"]]:
    logits = network.apply({"params": params["judge"]}, images(name, media))
    sure = jax.nn.softmax(logits.astype(jnp.float32))
    named = jnp.take_along_axis(sure, jnp.maximum(colours, 0)[:, None], axis=1)[:, 0]
    return {name: jnp.where(colours < 0, jnp.nan, named)}

  return Reward(
    name=name,
    kind="device",
    terms=(name,),
    score=score,
    prepare=prepare,
    features=features,
    components={"judge": component},
  )


def blank(section: ConfigDict, describe: Describe, published: Path) -> dict[str, Any]:
  """The section with random weights."""
  del section, describe, published
  return {"checkpoint": RANDOM}


def _abstract(network: BackgroundJudge) -> PyTree:
  """Shapes and dtypes of the parameters."""
  return abstract(network, (1, SIDE, SIDE, 3))


# The weights are those beside this file.
KIND = RewardKind(build=build)
# The same for configs with a section `reward.background`, whose `checkpoint` names the weights.
FROM_SECTION = RewardKind(build=build, section=SECTION, blank=blank)
