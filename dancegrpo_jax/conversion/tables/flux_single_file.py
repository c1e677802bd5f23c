"""FLUX's transformer in the layout of Black Forest Labs, which single files and ComfyUI's folders
have.

The layers are those that flux_lora.py lists for LoRA files. The projections q, k and v are one
tensor, and in a single block the first layer of the feed-forward network is a part of it too, which
is four times as wide as each of them.
"""

from dancegrpo_jax.conversion.table import Dialect, LoraName, Part, Spec, Table
from dancegrpo_jax.conversion.tables.flux_lora import BLACK_FOREST_LABS
from dancegrpo_jax.conversion.tables.rows import Rows, join, respelt


def _layer(layer: LoraName) -> Rows:
  """The rows of one layer of the file, whose outputs are those of one or several of the network."""
  source = f"{layer.source}.{{*}}"
  if layer.halves_swapped:
    first, second = Part("a", 0, 1, 2), Part("a", 1, 2, 2)
    (module,) = layer.modules
    return join(
      respelt(source, f"{module}.{{*}}", first, second),
      respelt(source, f"{module}.{{*}}", second, first),
    )
  if len(layer.modules) == 1:
    return respelt(source, f"{layer.modules[0]}.{{*}}")
  units = [4 if module.endswith("proj_mlp") else 1 for module in layer.modules]
  starts = [sum(units[:k]) for k in range(len(units))]
  return join(
    *(
      respelt(source, f"{module}.{{*}}", Part("a", start, start + size, sum(units)))
      for module, start, size in zip(layer.modules, starts, units)
    )
  )


_NORMS = {
  "double_blocks.{i}.img_attn.norm": ("transformer_blocks.{i}.attn", "norm"),
  "double_blocks.{i}.txt_attn.norm": ("transformer_blocks.{i}.attn", "norm_added"),
  "single_blocks.{i}.norm": ("single_transformer_blocks.{i}.attn", "norm"),
}


def _table(own: dict[str, Spec]) -> Table:
  del own  # the names don't depend on the network's sizes
  return Table(
    name="FluxTransformer2DModel",
    rows=join(
      *(_layer(layer) for layer in BLACK_FOREST_LABS),
      *(
        respelt(f"{source}.{name}_norm.scale", f"{module}.{norm}_{name[0]}.weight")
        for source, (module, norm) in _NORMS.items()
        for name in ("query", "key")
      ),
    ),
  )


FLUX = Dialect(
  title="a FLUX transformer in the names of Black Forest Labs",
  # HunyuanVideo's files in the names of Tencent have blocks of the same names.
  marks=("double_blocks.{*}", "single_blocks.{*}", "txt_in.weight"),
  table=_table,
)
