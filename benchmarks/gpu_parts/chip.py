"""What the chip offers to any program, measured by a large bfloat16 product and a large copy."""

from dancegrpo_jax.devices import chips
from gpu_parts import measure

# Calls between two readings of the clock: a product alone may take no longer than its dispatch and
# the reading.
CALLS = 10


def run(context) -> None:
  import jax
  import jax.numpy as jnp

  device = jax.devices()[0]
  context.say.device(device.device_kind)
  size, count = (256, 2**16) if context.tiny else (8192, 2**29)

  def rate(call, work: float) -> dict:
    """A cell with the work per second of `CALLS` calls, which the device executes one by one."""
    jax.block_until_ready(call())

    def several():
      return [call() for _ in range(CALLS)][-1]

    times = measure.timed(several, jax.block_until_ready, count=10, seconds=4.0)
    return measure.spread([CALLS * work / seconds for seconds in times], "")

  a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in (0, 1))
  product = jax.jit(jnp.matmul)
  found = rate(lambda: product(a, b), 2 * size**3 / 1e12)
  peak = chips.gpu_peak(device.device_kind)
  share = (
    f"{found['value'] * 1e12 / peak:.0%} of the data sheet's {peak / 1e12:.0f}" if peak else ""
  )
  context.say.row(
    "bf16 product",
    rate=found | {"unit": "TFLOP/s"},
    note=", ".join(filter(None, (f"{size}^3", share))),
  )
  x = jax.random.normal(jax.random.key(2), (count,), jnp.float32)
  copy = jax.jit(jnp.copy)
  found = rate(lambda: copy(x), 2 * x.nbytes / 1e9)
  context.say.row(
    "copy, bytes read and written",
    rate=found | {"unit": "GB/s"},
    note=f"of an array of {x.nbytes / 2**30:.3g} GiB",
  )
