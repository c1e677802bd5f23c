"""The networks of the example: a bag of words, and an MLP-Mixer (arXiv 2105.01601) that predicts
the velocity of rectified flow directly on pixels.

Both are built from their config.json by `from_json`. `Dense` is the package's own layer, so that
LoRA finds its kernels and a mesh splits its samples.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dancegrpo_jax.models.config import from_config, keys_of
from dancegrpo_jax.models.embeddings import sinusoid
from dancegrpo_jax.models.layers import Dense, Dtype, standardise

PAD = 0  # the word that fills up a short text
TIME_SCALE = 1000  # the network's time at pure noise
LEAST = 0.05  # smallest share of noise that is divided by


class Words(nn.Module):
  """A text as the sum of its words' embeddings, in any order.

  Attributes:
    vocabulary: number of words.
    width: of an embedding.
  """

  vocabulary: int
  width: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, words: Int[Array, "n t"]) -> Float[Array, "n d"]:
    table = self.param(
      "embedding", nn.initializers.normal(0.5), (self.vocabulary, self.width), self.param_dtype
    )
    is_word = (words != PAD).astype(self.dtype)
    return jnp.sum(table.astype(self.dtype)[words] * is_word[..., None], axis=1)


class Mlp(nn.Module):
  """Two dense layers over the last axis."""

  hidden: int
  features: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = nn.gelu(Dense(self.hidden, name="fc1", **types)(x))
    return Dense(self.features, name="fc2", **types)(x)


class Block(nn.Module):
  """Mixes the patches of a channel, then the channels of a patch. The condition scales and shifts
  the input of each half.
  """

  patches: int
  width: int
  hidden: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b p d"], condition: Float[Array, "b d"]
  ) -> Float[Array, "b p d"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    told = Dense(4 * self.width, name="modulation", **types)(nn.silu(condition))[:, None]
    scale1, shift1, scale2, shift2 = jnp.split(told, 4, axis=-1)
    y = modulated(x, scale1, shift1).swapaxes(1, 2)
    x = x + Mlp(2 * self.patches, self.patches, name="patches_mlp", **types)(y).swapaxes(1, 2)
    y = modulated(x, scale2, shift2)
    return x + Mlp(self.hidden, self.width, name="channels_mlp", **types)(y)


def modulated(
  x: Float[Array, "b p d"], scale: Float[Array, "b 1 d"], shift: Float[Array, "b 1 d"]
) -> Float[Array, "b p d"]:
  """A LayerNorm whose scale and shift come from elsewhere."""
  return standardise(x, 1e-6).astype(x.dtype) * (1.0 + scale) + shift


class Mixer(nn.Module):
  """The denoiser: patches of noisy pixels, a time and a text to the velocity of the pixels.

  Attributes:
    size: height and width of the pictures, pixels.
    patch: height and width of a patch; it divides `size`.
    width: channels of a patch inside the network.
    hidden: inner width of the MLP over channels.
    blocks: number of blocks.
    text_width: of the text's embedding.
    remat: recompute the blocks in the backward pass.
  """

  size: int
  patch: int
  width: int
  hidden: int
  blocks: int
  text_width: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w 3"], time: Float[Array, "b"], text: Float[Array, "b t"]
  ) -> Float[Array, "b h w 3"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    side = self.size // self.patch
    cut = x.astype(self.dtype).reshape(-1, side, self.patch, side, self.patch, 3)
    cut = cut.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side**2, 3 * self.patch**2)
    place = self.param(
      "position", nn.initializers.normal(0.1), (side**2, self.width), self.param_dtype
    )
    y = Dense(self.width, name="patch_embed", **types)(cut) + place.astype(self.dtype)[None]

    wave = sinusoid(time, self.width, flip_sin_to_cos=True, shift=0).astype(self.dtype)
    told = nn.silu(Dense(self.width, name="time_fc1", **types)(wave))
    condition = Dense(self.width, name="time_fc2", **types)(told)
    condition = condition + Dense(self.width, name="text_proj", **types)(text)

    kind = nn.remat(Block) if self.remat else Block
    for number in range(self.blocks):
      block = kind(side**2, self.width, self.hidden, name=f"blocks_{number}", **types)
      y = block(y, condition)
    told = Dense(2 * self.width, name="head_modulation", **types)(nn.silu(condition))[:, None]
    y = Dense(3 * self.patch**2, name="head", **types)(modulated(y, *jnp.split(told, 2, axis=-1)))
    y = y.reshape(-1, side, side, self.patch, self.patch, 3).transpose(0, 1, 3, 2, 4, 5)
    clean = y.reshape(-1, self.size, self.size, 3)
    # The clean picture is simpler than its noise, so a narrow network predicts it, and the velocity
    # follows: x = (1 - t) clean + t noise, and noise - clean = (x - clean) / t.
    level = jnp.maximum(time / TIME_SCALE, LEAST).astype(self.dtype).reshape(-1, 1, 1, 1)
    return (x.astype(self.dtype) - clean) / level


def mixer_from_json(config: dict[str, Any], **extra: Any) -> Mixer:
  """The denoiser of a config.json. ValueError: a key that is not implemented, or a patch that does
  not divide the size.
  """
  network = from_config(Mixer, keys_of(Mixer), config, **extra)
  if network.size % network.patch:
    raise ValueError(f"patch = {network.patch} does not divide size = {network.size}")
  return network


def words_from_json(config: dict[str, Any], **extra: Any) -> Words:
  """The text encoder of a config.json. ValueError: a key that is not implemented."""
  return from_config(Words, keys_of(Words), config, **extra)
