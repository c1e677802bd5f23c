"""Errors of bfloat16 attention against float32, by xla and by the device's own kernel."""

import jax
import jax.numpy as jnp

from dancegrpo_jax.models.attention import attention
from gpu_parts import loaded, measure, registry


def run(context) -> None:
  loaded.use_cache(context)
  context.say.device(jax.devices()[0].device_kind)
  for name, sizes in registry.ATTENTIONS.items():
    try:
      compare(context.say, name, smaller(sizes) if context.tiny else sizes)
    except Exception as error:  # one refused shape must not stop the others
      context.say.failed(name, measure.reason(error))


def smaller(sizes: tuple) -> tuple:
  """Smaller sizes, in which odd lengths stay odd."""
  queries, keys, heads, width, _, causal = sizes
  return min(queries, 64 + queries % 2), min(keys, 64 + keys % 2), min(heads, 2), width, 1, causal


def compare(say, name: str, sizes: tuple) -> None:
  """One row: the largest errors of the value and of the three gradients.

  They are shares of the largest number.
  """
  queries, keys, heads, width, batch, causal = sizes
  shapes = [(batch, n, heads, width) for n in (queries, keys, keys, queries)]
  normal = [
    jax.random.normal(jax.random.key(i), shape, jnp.float32) for i, shape in enumerate(shapes)
  ]
  *qkv, weight = (x.astype(jnp.bfloat16) for x in normal)
  with jax.default_matmul_precision("highest"):
    exact = both("xla", causal)(*(x.astype(jnp.float32) for x in (*qkv, weight)))
  chosen = both("auto", causal).lower(*qkv, weight).compile()
  text = chosen.as_text()
  kernel = "cudnn" if "fmha" in text else "xla"
  value, gradient = errors(chosen(*qkv, weight), exact)
  value_xla, gradient_xla = errors(both("xla", causal)(*qkv, weight), exact)
  cells = {
    "kernel": measure.text(kernel),
    "value": measure.number(value),
    "gradient": measure.number(gradient),
    "value by xla": measure.number(value_xla),
    "gradient by xla": measure.number(gradient_xla),
  }
  say.cells(name, cells, note=f"batch of {batch}")


def both(impl: str, causal: bool):
  """Returns `(q, k, v, weight) -> (value, gradients)`.

  The gradients are those of the sum of value * weight.
  """

  def weighted(q, k, v, weight):
    value = attention(q, k, v, causal=causal, impl=impl)
    return jnp.sum(value.astype(jnp.float32) * weight.astype(jnp.float32)), value

  def run(q, k, v, weight):
    (_, value), gradients = jax.value_and_grad(weighted, (0, 1, 2), has_aux=True)(q, k, v, weight)
    return value, gradients

  return jax.jit(run)


def errors(found: tuple, exact: tuple) -> tuple[float, float]:
  """The error of the value, and the largest error of the gradients."""

  def one(a, b) -> float:
    difference = jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))
    return float(jnp.max(difference) / jnp.max(jnp.abs(b)))  # NaN stays NaN

  return one(found[0], exact[0]), max(
    (one(a, b) for a, b in zip(found[1], exact[1])), key=lambda e: (e != e, e)
  )
