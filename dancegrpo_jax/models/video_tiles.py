"""The autoencoder of videos in tiles, which bounds its memory: overlapping parts of a clip are
computed one after another, and blended where they overlap.

Tiles change the result a little, because norms and attention see one tile only. Which tiles there
are, and how they are blended, is exactly as in diffusers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dancegrpo_jax.models.autoencoder_hunyuan_video import AutoencoderKLHunyuanVideo, split_moments
from dancegrpo_jax.types import PyTree

# none: whole clips; time: tiles of frames, which are diffusers' default; diffusers: also tiles in
# space, as after enable_tiling().
TILINGS = ("none", "time", "diffusers")


class Tiles(NamedTuple):
  """The sizes of tiles, in frames and pixels; the defaults are those of diffusers.

  Attributes:
    frames: of a tile, not counting its first frame.
    frame_stride: from one tile to the next.
    side: height and width of a tile.
    side_stride: from one tile to the next.
  """

  frames: int = 16
  frame_stride: int = 12
  side: int = 256
  side_stride: int = 192


DEFAULT = Tiles()


class Axis(NamedTuple):
  """How one axis of a clip is divided.

  Attributes:
    spans: start and length of each tile, in units of what comes in.
    blend: the number of units of what comes out in which a tile is blended with the one before.
    keep: the number of units of what comes out that the next tile follows; None for all.
  """

  spans: tuple[tuple[int, int], ...]
  blend: int = 0
  keep: int | None = None


def pixels_of(
  network: AutoencoderKLHunyuanVideo,
  params: PyTree,
  latents: Float[Array, "b f h w z"],
  tiling: str = "time",
  tiles: Tiles = DEFAULT,
) -> Float[Array, "b f2 h2 w2 c"]:
  """Pixels in [0, 1], float32, from latents with the denoiser's scale.

  Args:
    network: the autoencoder.
    params: its parameters.
    latents: of a clip of 4 (f - 1) + 1 frames.
    tiling: one of `TILINGS`.
    tiles: their sizes.

  Raises:
    ValueError: the tiling is unknown, or the tiles don't consist of whole latents.
  """

  def decode(part: Array) -> Array:
    return network.apply({"params": params}, part, method="decode").astype(jnp.float32)

  unscaled = (latents / network.scaling_factor).astype(network.dtype)
  per = (network.temporal_compression_ratio, network.spatial_compression_ratio)
  pixels = _tiled(decode, unscaled, tiling, tiles, incoming=per, outgoing=(1, 1))
  return jnp.clip(pixels / 2 + 0.5, 0.0, 1.0)


def posterior_of(
  network: AutoencoderKLHunyuanVideo,
  params: PyTree,
  pixels: Float[Array, "b f h w c"],
  tiling: str = "time",
  tiles: Tiles = DEFAULT,
) -> tuple[Float[Array, "b f2 h2 w2 z"], Float[Array, "b f2 h2 w2 z"]]:
  """Mean and log-variance (clipped to [-30, 20]) of a clip's latents, float32.

  They are in the network's own scale; the denoiser's latents are `network.scaling_factor` times as
  large.

  Args:
    network: the autoencoder.
    params: its parameters.
    pixels: in [0, 1]; 4 n + 1 frames, and height and width that the latents divide.
    tiling: one of `TILINGS`.
    tiles: their sizes.

  Raises:
    ValueError: the tiling is unknown, or the tiles don't consist of whole latents.
  """

  def moments(part: Array) -> Array:
    return network.apply({"params": params}, part, method="moments").astype(jnp.float32)

  signed = (2 * pixels - 1).astype(network.dtype)
  per = (network.temporal_compression_ratio, network.spatial_compression_ratio)
  return split_moments(_tiled(moments, signed, tiling, tiles, incoming=(1, 1), outgoing=per))


def _tiled(
  function: Callable[[Array], Array],
  x: Float[Array, "b f h w i"],
  tiling: str,
  tiles: Tiles,
  incoming: tuple[int, int],
  outgoing: tuple[int, int],
) -> Float[Array, "b f2 h2 w2 o"]:
  """A function of a clip, computed by tiles.

  Args:
    function: the encoder or the decoder.
    x: its argument.
    tiling: one of `TILINGS`.
    tiles: their sizes, in frames and pixels.
    incoming: frames and pixels per frame and pixel of `x`.
    outgoing: the same for the result.
  """
  if tiling not in TILINGS:
    raise ValueError(f"tiling = {tiling!r}: unknown; one of {', '.join(TILINGS)}")
  per_frame, per_side = (max(pair) for pair in zip(incoming, outgoing, strict=True))
  parts = ((tiles.frames, tiles.frame_stride, per_frame), (tiles.side, tiles.side_stride, per_side))
  if any(size % ratio or stride % ratio for size, stride, ratio in parts):
    raise ValueError(
      f"{tiles}: sizes must be multiples of {per_frame} frames and {per_side} pixels"
    )
  frames, height, width = x.shape[1:4]
  length, size = tiles.frames // incoming[0], tiles.side // incoming[1]
  in_time = tiling != "none" and frames > length
  in_space = tiling == "diffusers" and max(height, width) > size
  time, rows, columns = (Axis(spans=((0, n),)) for n in x.shape[1:4])
  if in_time:
    stride = tiles.frame_stride
    spans = _spans(frames, length + 1, stride // incoming[0])
    # The first frame of a later tile is dropped, so that a tile of one frame adds nothing.
    spans = tuple(span for span in spans if span[0] == 0 or span[1] > 1)
    time = Axis(spans, (tiles.frames - stride) // outgoing[0], stride // outgoing[0])
  if in_space:
    stride = tiles.side_stride
    shared = {"blend": tiles.side // outgoing[1] - stride // outgoing[1]}
    shared["keep"] = stride // outgoing[1]
    rows, columns = (
      Axis(_spans(n, size, stride // incoming[1]), **shared) for n in (height, width)
    )
  return _joined(_computed(function, x, time, rows, columns), time, rows, columns)


def _spans(length: int, size: int, stride: int) -> tuple[tuple[int, int], ...]:
  """Start and length of each tile; the last ones are shorter."""
  return tuple((start, min(size, length - start)) for start in range(0, length, stride))


Key = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # the spans of a tile


def _computed(
  function: Callable[[Array], Array], x: Array, time: Axis, rows: Axis, columns: Axis
) -> dict[Key, Array]:
  """The function of each tile, by its spans.

  Tiles of one shape are computed one after another in a loop, so that the function is compiled once
  for each shape, of which there are at most two or three along an axis.
  """
  groups: dict[tuple[int, ...], list[Key]] = {}
  for key in ((t, y, w) for t in time.spans for y in rows.spans for w in columns.spans):
    groups.setdefault(tuple(length for _, length in key), []).append(key)
  results: dict[Key, Array] = {}
  for shape, keys in groups.items():

    def tile(start: Array, shape: tuple[int, ...] = shape) -> Array:
      return function(jax.lax.dynamic_slice(x, (0, *start, 0), (x.shape[0], *shape, x.shape[-1])))

    if len(keys) == 1:
      results[keys[0]] = function(x[:, *(slice(n, n + length) for n, length in keys[0])])
      continue
    starts = jnp.asarray([[start for start, _ in key] for key in keys], jnp.int32)
    results |= zip(keys, jax.lax.map(tile, starts), strict=True)
  return results


def _joined(tiles: dict[Key, Array], time: Axis, rows: Axis, columns: Axis) -> Array:
  """The whole, of tiles that are blended along height, width and then time."""
  clips: list[Array] = []
  parts = []
  for index, span in enumerate(time.spans):
    clip = _plane(tiles, span, rows, columns)
    if index:
      clip = _blend(clips[-1], clip[:, 1:], time.blend, axis=1)
    clips.append(clip)
    keep = time.keep if index or time.keep is None else time.keep + 1
    parts.append(clip[:, :keep])
  return jnp.concatenate(parts, axis=1)


def _plane(tiles: dict[Key, Array], span: tuple[int, int], rows: Axis, columns: Axis) -> Array:
  """The tiles of one span of frames as one clip.

  A tile is blended with the tile above, then with the one on the left; both are already blended.
  """
  strips = []
  above: list[Array] = []
  for y in rows.spans:
    row: list[Array] = []
    for j, w in enumerate(columns.spans):
      tile = tiles[span, y, w]
      if above:
        tile = _blend(above[j], tile, rows.blend, axis=2)
      if row:
        tile = _blend(row[-1], tile, columns.blend, axis=3)
      row.append(tile)
    strips.append(jnp.concatenate([t[:, :, : rows.keep, : columns.keep] for t in row], axis=3))
    above = row
  return jnp.concatenate(strips, axis=2)


def _blend(before: Array, after: Array, extent: int, axis: int) -> Array:
  """`after`, whose first units come gradually from the last ones of `before`."""
  extent = min(before.shape[axis], after.shape[axis], extent)
  ramp = jnp.arange(extent, dtype=after.dtype) / max(extent, 1)
  weight = jnp.expand_dims(ramp, [other for other in range(after.ndim) if other != axis])
  last = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
  first = jax.lax.slice_in_dim(after, 0, extent, axis=axis)
  rest = jax.lax.slice_in_dim(after, extent, None, axis=axis)
  return jnp.concatenate([last * (1 - weight) + first * weight, rest], axis=axis)
