"""What one device offers: memory, peak rate, clock and network."""

import os
from typing import Any, NamedTuple

import jax

from dancegrpo_jax.devices import accelerator, gpu_topologies


class Chip(NamedTuple):
  """What one device of a mesh offers.

  Attributes:
    name: the chip, as in the name of a topology; of other devices JAX's device_kind.
    memory: bytes of HBM that a program may use; 0 where it is not known.
    flops: peak rate of bfloat16 products, FLOP/s; 0 where it is not known.
    clock: clock of the matrix units, 1/s, which converts the compiler's cycles into seconds; 0
      where the compiler states none.
    network: bytes/s that a chip receives over all its links to other chips.
  """

  name: str
  memory: float
  flops: float
  clock: float
  network: float


# TPUs by device_kind. Memory: the limit in libtpu 0.0.42.1's message about a program that needs
# more. Peak and network: the tables of https://cloud.google.com/tpu/docs (v4 275 TFLOP/s and 2400
# Gbit/s, v5e 197 and 1600, v5p 459 and 4800, v6e 918 and 3584). Clock: the peak divided by
# 2 cores x 4 units x 2 x 128**2 (v4 and v5p), 4 x 2 x 128**2 (v5e) and 4 x 2 x 256**2 (v6e).
CHIPS = {
  "TPU v4": Chip(name="v4", memory=30.75 * 2**30, flops=275e12, clock=1.05e9, network=300e9),
  "TPU v5 lite": Chip(name="v5e", memory=15.75 * 2**30, flops=197e12, clock=1.50e9, network=200e9),
  "TPU v5": Chip(name="v5p", memory=95.74 * 2**30, flops=459e12, clock=1.75e9, network=600e9),
  "TPU v6 lite": Chip(name="v6e", memory=31.25 * 2**30, flops=918e12, clock=1.75e9, network=448e9),
}
# Peak rates of GPUs by a part of their device_kind, the first that matches: dense products in
# bfloat16, FLOP/s, from NVIDIA's data sheets, which state twice as much with sparsity. "H100" alone
# is the SXM module.
PEAKS = {
  "H100 PCIe": 756e12,
  "H100 NVL": 835e12,
  "H100": 989e12,
  "H200": 989e12,
  "A100": 312e12,
  "L40S": 362e12,
  "L4": 121e12,
}


def chip_of(device: Any) -> Chip:
  """What a device offers; zeros for what is not known, as for a CPU.

  A GPU's memory is the share that JAX has taken or will take, see devices/accelerator.py. Its clock
  and network are 0, because XLA states no cycles for GPUs.
  """
  kind = device.device_kind
  if kind in CHIPS:
    return CHIPS[kind]
  if device.platform != "gpu":
    return Chip(name=kind, memory=0.0, flops=0.0, clock=0.0, network=0.0)
  try:
    stats = device.memory_stats() or {}  # XLA_PYTHON_CLIENT_ALLOCATOR=platform has none
    memory = float(stats.get("bytes_limit", 0))
  except jax.errors.JaxRuntimeError:  # a card of a topology, which this machine does not have
    cards = gpu_topologies.CARDS.values()
    share = float(os.environ.get(accelerator.VARIABLE, accelerator.SHARE))
    memory = share * next((card.memory for card in cards if card.kind == kind), 0)
  return Chip(name=kind, memory=memory, flops=gpu_peak(kind), clock=0.0, network=0.0)


def gpu_peak(kind: str) -> float:
  """Peak rate of a GPU of this device_kind in bfloat16, FLOP/s; 0 where it is not known."""
  return next((flops for name, flops in PEAKS.items() if name in kind), 0.0)
