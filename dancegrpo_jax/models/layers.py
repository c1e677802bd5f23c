"""Layers with the defaults of their torch counterparts, with images in NHWC.

Flax and torch differ in the epsilons of norms, the formula of the variance, and padding. Every such
default is set here, once.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dancegrpo_jax.types import SAMPLE_AXES

Dtype = Any  # jnp.float32, "bfloat16" or a numpy dtype
Padding = tuple[tuple[int, int], tuple[int, int]]  # (top, bottom), (left, right)


def by_sample(x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
  """Splits the samples of `x` over the mesh's fsdp and data axes.

  Without a mesh, or where the axes don't divide the number of samples, `x` is returned unchanged.

  The result of every layer goes through here. Samples and kernels are split over the same axis, and
  the compiler could otherwise gather the samples, so that each device would compute some columns
  of all samples. Instead it must gather the kernels, layer by layer.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(axis for axis in SAMPLE_AXES if mesh.shape.get(axis, 1) > 1)
  if not axes or x.ndim < 2 or x.shape[0] % prod(mesh.shape[axis] for axis in axes):
    return x
  return jax.lax.with_sharding_constraint(x, jax.P(axes, *(jax.P.UNCONSTRAINED,) * (x.ndim - 1)))


class Dense(nn.Module):
  """torch.nn.Linear: `[..., in] -> [..., features]`, with a kernel `[in, features]`.

  Where the variables have a collection "lora" with `a` and `b` for this layer, (x A) B is added;
  see models/lora.py.
  """

  features: int
  use_bias: bool = True
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
    kernel = self.param(
      "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), self.param_dtype
    )
    x = x.astype(self.dtype)
    y = by_sample(x @ kernel.astype(self.dtype))
    if self.has_variable("lora", "a"):
      a, b = (self.get_variable("lora", name).astype(self.dtype) for name in "ab")
      y = y + by_sample(by_sample(x @ a) @ b)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
      y = y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    return y


def _native(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def _product(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
  """The convolution with stride 1 as one matrix product: a row is the neighbourhood of a pixel."""
  size = kernel.shape[0]
  height, width = (n + sum(pads) - size + 1 for n, pads in zip(x.shape[1:3], padding, strict=True))
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  rows = [x[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
  return jnp.concatenate(rows, -1) @ kernel.reshape(-1, kernel.shape[-1])


def _upright(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
  """The convolution with stride 1 as one whose kernel is one pixel wide.

  The horizontal neighbours of a pixel become more channels of it.
  """
  size, vertical, horizontal = kernel.shape[0], *padding
  width = x.shape[2] + sum(horizontal) - size + 1
  x = jnp.pad(x, ((0, 0), (0, 0), horizontal, (0, 0)))
  x = jnp.concatenate([x[:, :, j : j + width] for j in range(size)], -1)
  return _native(x, kernel.reshape(size, 1, -1, kernel.shape[-1]), 1, (vertical, (0, 0)))


def _for_tpu(x: Array, kernel: Array, stride: int) -> Callable:
  """The form that is fastest on TPUs.

  The two matrix forms copy `x`, so they are for small ones. Few channels don't fill the lanes of a
  TPU, and then these forms gain nothing.
  """
  size = prod(x.shape[1:])
  if stride > 1 or min(kernel.shape[2:]) < 128 or size > 2**22:
    return _native
  return _product if size <= 2**21 else _upright


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
  """The convolution `[b, h, w, i] x [k, k, i, o] -> [b, h', w', o]`, in a form that XLA compiles
  well.

  On a TPU it is a matrix product or close to one where that is faster, forward and backward: with
  few samples a device the TPU compiler moves spatial positions of a convolution into the batch,
  generates several times as much code, and predicts a longer run time.

  Inside the body of a `lax.scan`, XLA's CPU backend doesn't use its fast library for the
  convolutions of a gradient: the filter gradient of one layer of 128 channels then takes seconds
  instead of milliseconds. On a CPU the backward pass therefore consists of matrix products, one for
  each position of the kernel. GPUs use XLA's own forms.
  """
  native = partial(_native, stride=stride, padding=padding)
  tpu = partial(_for_tpu(x, kernel, stride), stride=stride, padding=padding)
  return jax.lax.platform_dependent(x, kernel, tpu=tpu, default=native)


def _convolve_forward(x: Array, kernel: Array, stride: int, padding: Padding) -> tuple:
  return convolve(x, kernel, stride, padding), (x, kernel)


def _convolve_backward(
  stride: int, padding: Padding, residual: tuple, dy: Array
) -> tuple[Array, Array]:
  x, kernel = residual
  size = kernel.shape[0]

  def derivative(form: Callable) -> Callable:
    def pull(x, kernel, dy):
      return jax.vjp(lambda x, kernel: form(x, kernel, stride, padding), x, kernel)[1](dy)

    return pull

  def products(x, kernel, dy):
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    reach = [(n - 1) * stride + 1 for n in dy.shape[1:3]]
    flat = dy.reshape(-1, dy.shape[-1])

    def tap(i: int, j: int) -> Array:
      window = padded[:, i : i + reach[0] : stride, j : j + reach[1] : stride]
      return window.reshape(-1, x.shape[-1]).T @ flat

    dkernel = jnp.stack([jnp.stack([tap(i, j) for j in range(size)]) for i in range(size)])
    if stride > 1:
      return derivative(_native)(x, kernel, dy)[0], dkernel
    transposed = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    (top, bottom), (left, right) = padding
    last = size - 1
    margins = (last - top, last - bottom), (last - left, last - right)
    return _native(dy, transposed, 1, margins), dkernel

  tpu = derivative(_for_tpu(x, kernel, stride))
  return jax.lax.platform_dependent(
    x, kernel, dy, cpu=products, tpu=tpu, default=derivative(_native)
  )


convolve.defvjp(_convolve_forward, _convolve_backward)


class Conv(nn.Module):
  """torch.nn.Conv2d: `[b, h, w, in] -> [b, h', w', features]`.

  The kernel is `[size, size, in, features]`.

  Attributes:
    padding: an integer as in torch, or ((top, bottom), (left, right)).
  """

  features: int
  size: int = 3
  stride: int = 1
  padding: int | Sequence[Sequence[int]] = 1
  zero_init: bool = False
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
    init = nn.initializers.zeros if self.zero_init else nn.initializers.lecun_normal()
    kernel = self.param(
      "kernel", init, (self.size, self.size, x.shape[-1], self.features), self.param_dtype
    )
    bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
    if isinstance(self.padding, int):
      rows = columns = (self.padding, self.padding)
    else:
      (top, bottom), (left, right) = self.padding
      rows, columns = (top, bottom), (left, right)
    padding = (rows, columns)
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    if self.size == self.stride == 1 and not any(map(sum, padding)):
      y = x @ kernel[0, 0]
    else:
      y = convolve(x, kernel, self.stride, padding)
    return by_sample(y) + bias.astype(self.dtype).reshape(1, 1, 1, -1)


class GroupNorm(nn.Module):
  """torch.nn.GroupNorm over the last axis, with statistics in float32."""

  groups: int
  epsilon: float
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (channels,), self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
    grouped = x.astype(jnp.float32).reshape(x.shape[0], -1, self.groups, channels // self.groups)
    mean = grouped.mean((1, 3), keepdims=True)
    centred = grouped - mean
    variance = jnp.square(centred).mean((1, 3), keepdims=True)
    y = (centred * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
    return (y * _float32_row(scale, x.ndim) + _float32_row(bias, x.ndim)).astype(self.dtype)


def _float32_row(x: Float[Array, "c"], axes: int) -> Float[Array, "... c"]:
  """A vector in float32, reshaped to multiply the last axis of an array with `axes` axes."""
  return x.astype(jnp.float32).reshape((1,) * (axes - 1) + (-1,))


def standardise(x: Float[Array, "... c"], epsilon: float) -> Float[Array, "... c"]:
  """Mean 0 and variance 1 over the last axis, float32: a LayerNorm without parameters."""
  y = x.astype(jnp.float32)
  y = y - y.mean(-1, keepdims=True)
  return y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)


class LayerNorm(nn.Module):
  """torch.nn.LayerNorm over the last axis, with statistics in float32."""

  epsilon: float = 1e-5
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
    y = standardise(x, self.epsilon) * _float32_row(scale, x.ndim) + _float32_row(bias, x.ndim)
    return y.astype(self.dtype)


class RMSNorm(nn.Module):
  """torch.nn.RMSNorm over the last axis (arXiv 1910.07467), with statistics in float32.

  It subtracts no mean and has no bias.
  """

  epsilon: float
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
    return (y * _float32_row(scale, x.ndim)).astype(self.dtype)


def upsample_nearest(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
  """Doubles height and width by repeating every pixel."""
  b, h, w, c = x.shape
  return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


class ResnetBlock(nn.Module):
  """diffusers' ResnetBlock2D: norm, silu, conv, (+ time), norm, silu, conv, + shortcut."""

  features: int
  groups: int
  epsilon: float
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w i"], time: Float[Array, "b t"] | None = None
  ) -> Float[Array, "b h w o"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    h = nn.silu(GroupNorm(self.groups, self.epsilon, name="norm1", **types)(x))
    h = Conv(self.features, name="conv1", **types)(h)
    if time is not None:
      h = h + Dense(self.features, name="time_emb_proj", **types)(nn.silu(time))[:, None, None, :]
    h = nn.silu(GroupNorm(self.groups, self.epsilon, name="norm2", **types)(h))
    h = Conv(self.features, name="conv2", **types)(h)
    if x.shape[-1] != self.features:
      x = Conv(self.features, size=1, padding=0, name="conv_shortcut", **types)(x)
    return x + h


class Downsample(nn.Module):
  """A convolution with stride 2.

  It is a module of its own because the names of the weights require it.
  """

  features: int
  padding: tuple | int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
    return Conv(
      self.features,
      stride=2,
      padding=self.padding,
      name="conv",
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )(x)


class Upsample(nn.Module):
  """Doubles height and width by repeating every pixel, then a convolution."""

  features: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
    return Conv(self.features, name="conv", dtype=self.dtype, param_dtype=self.param_dtype)(
      upsample_nearest(x)
    )
