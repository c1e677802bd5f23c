"""Which tensor of a checkpoint is which parameter.

The files have the names that a PyTorch program would give: `blocks.0.channels_mlp.0.weight` is the
first layer of an nn.Sequential, and an nn.Linear's weight is `[out, in]`. Rows read both ways:
import, export and LoRA files all go through them.
"""

from dancegrpo_jax.conversion.table import Row, Table
from dancegrpo_jax.conversion.tables.rows import dense, join, renamed, under


def _sequential(name: str, first: str, second: str) -> tuple[Row, ...]:
  """nn.Sequential(Linear, activation, Linear): its layers are numbers 0 and 2."""
  return join(renamed(f"{name}.0", dense(first)), renamed(f"{name}.2", dense(second)))


_BLOCK = join(
  dense("modulation"),
  _sequential("patches_mlp", "patches_mlp.fc1", "patches_mlp.fc2"),
  _sequential("channels_mlp", "channels_mlp.fc1", "channels_mlp.fc2"),
)

MIXER = Table(
  name="Mixer",
  rows=join(
    dense("patch_embed"),
    (Row("position", "position", "p d -> p d"),),
    _sequential("time_embed", "time_fc1", "time_fc2"),
    dense("text_proj"),
    under("blocks.{i}", _BLOCK),
    dense("head_modulation"),
    dense("head"),
  ),
  file="mixer",
  lora_prefix="mixer",
)

WORDS = Table(name="Words", rows=(Row("words.weight", "embedding", "n d -> n d"),), file="words")
