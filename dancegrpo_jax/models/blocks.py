"""Equal blocks one after another, stacked in a scan or apart."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn


def repeated(
  block: type[nn.Module],
  *args: Any,
  count: int,
  name: str,
  scan_blocks: bool,
  remat: bool,
) -> Callable:
  """A function `(carry, *fixed) -> carry` that applies `count` equal blocks.

  Args:
    block: `(carry, *fixed) -> (carry, None)`.
    args: the fields of every block.
    count: the number of blocks.
    name: of the stacked blocks, or of the single ones without their numbers.
    scan_blocks: whether the parameters of the blocks are stacked on axis 0.
    remat: whether the blocks are recomputed in the backward pass.
  """
  cls = nn.remat(block, prevent_cse=not scan_blocks) if remat else block
  if scan_blocks:
    axes = {"params": 0, "lora": 0}
    stack = nn.scan(
      cls, variable_axes=axes, split_rngs={"params": True}, in_axes=nn.broadcast, length=count
    )
    return lambda carry, *fixed: stack(*args, name=name)(carry, *fixed)[0]

  def one_by_one(carry, *fixed):
    for i in range(count):
      carry, _ = cls(*args, name=f"{name}_{i}")(carry, *fixed)
    return carry

  return one_by_one
