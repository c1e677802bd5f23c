"""The layout of Stable Diffusion's first release (CompVis' latent-diffusion, "LDM"), which single
files and ComfyUI's folders have: its UNet, its autoencoder, and OpenCLIP's text encoder of 2.x.

The blocks of that UNet are numbered through, so that the numbers depend on how many layers a block
of the network has.
"""

from collections.abc import Iterable

from dancegrpo_jax.conversion.table import Dialect, Part, Spec, Table, match_name
from dancegrpo_jax.conversion.tables.rows import Rows, join, respelt

TITLE = "the names of Stable Diffusion's first release (LDM)"


def _count(pattern: str, names: Iterable[str]) -> int:
  """One more than the highest index `i` of the names of a pattern; 0 where there is none."""
  found = [match_name(pattern, name) for name in names]
  return max((int(match["i"]) + 1 for match in found if match is not None), default=0)


# ---- UNet


def _resnet(source: str, name: str) -> Rows:
  pairs = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
  }
  return join(
    *(respelt(f"{source}.{old}.{{*}}", f"{name}.{new}.{{*}}") for old, new in pairs.items())
  )


def _attention(source: str, name: str) -> Rows:
  return join(
    *(
      respelt(f"{source}.{layer}.{{*}}", f"{name}.{layer}.{{*}}")
      for layer in ("norm", "proj_in", "transformer_blocks", "proj_out")
    )
  )


def _down(number: int, block: str, layers: int) -> Rows:
  """The rows of a block of the first half, which begins with the input block `number`."""
  end = f"input_blocks.{number + layers}.0.op.{{*}}"
  return join(
    *(_resnet(f"input_blocks.{number + j}.0", f"{block}.resnets.{j}") for j in range(layers)),
    *(_attention(f"input_blocks.{number + j}.1", f"{block}.attentions.{j}") for j in range(layers)),
    respelt(end, f"{block}.downsamplers.0.conv.{{*}}"),
  )


def _up(number: int, block: str, layers: int, attends: bool) -> Rows:
  """The rows of a block of the second half, which begins with the output block `number`."""
  end = f"output_blocks.{number + layers - 1}.{2 if attends else 1}.conv.{{*}}"
  return join(
    respelt(end, f"{block}.upsamplers.0.conv.{{*}}"),
    *(_resnet(f"output_blocks.{number + j}.0", f"{block}.resnets.{j}") for j in range(layers)),
    *(
      _attention(f"output_blocks.{number + j}.1", f"{block}.attentions.{j}") for j in range(layers)
    ),
  )


def _unet(own: dict[str, Spec]) -> Table:
  levels = _count("down_blocks.{i}.{*}", own)
  layers = _count("down_blocks.0.resnets.{i}.{*}", own)
  single = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
  }
  return Table(
    name="UNet2DConditionModel",
    rows=join(
      *(respelt(f"{old}.{{*}}", f"{new}.{{*}}") for old, new in single.items()),
      *(_down(1 + i * (layers + 1), f"down_blocks.{i}", layers) for i in range(levels)),
      _resnet("middle_block.0", "mid_block.resnets.0"),
      _attention("middle_block.1", "mid_block.attentions.0"),
      _resnet("middle_block.2", "mid_block.resnets.1"),
      *(
        _up(
          i * (layers + 1),
          f"up_blocks.{i}",
          layers + 1,
          attends=any(name.startswith(f"up_blocks.{i}.attentions.") for name in own),
        )
        for i in range(levels)
      ),
    ),
  )


UNET = Dialect(title=f"a UNet in {TITLE}", marks=("input_blocks.{*}",), table=_unet)

# ---- Autoencoder


def _vae_blocks(source: str, name: str) -> Rows:
  return join(
    respelt(
      f"{source}.block.{{j}}.nin_shortcut.{{*}}", f"{name}.resnets.{{j}}.conv_shortcut.{{*}}"
    ),
    respelt(f"{source}.block.{{j}}.{{*}}", f"{name}.resnets.{{j}}.{{*}}"),
  )


def _vae_middle(half: str) -> Rows:
  layers = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
  attention = f"{half}.mid_block.attentions.0"
  return join(
    *(
      respelt(f"{half}.mid.block_{k + 1}.{{*}}", f"{half}.mid_block.resnets.{k}.{{*}}")
      for k in (0, 1)
    ),
    *(
      respelt(f"{half}.mid.attn_1.{old}.{{*}}", f"{attention}.{new}.{{*}}")
      for old, new in layers.items()
    ),
  )


def _autoencoder(own: dict[str, Spec]) -> Table:
  levels = _count("encoder.down_blocks.{i}.{*}", own)
  same = ["quant_conv", "post_quant_conv"]
  same += [
    f"{half}.{layer}" for half in ("encoder", "decoder") for layer in ("conv_in", "conv_out")
  ]
  return Table(
    name="AutoencoderKL",
    rows=join(
      *(respelt(f"{name}.{{*}}", f"{name}.{{*}}") for name in same),
      *(
        join(_vae_middle(half), respelt(f"{half}.norm_out.{{*}}", f"{half}.conv_norm_out.{{*}}"))
        for half in ("encoder", "decoder")
      ),
      _vae_blocks("encoder.down.{i}", "encoder.down_blocks.{i}"),
      respelt(
        "encoder.down.{i}.downsample.conv.{*}", "encoder.down_blocks.{i}.downsamplers.0.conv.{*}"
      ),
      # That decoder counts its blocks from the pixels, and diffusers from the latents.
      *(
        join(
          _vae_blocks(f"decoder.up.{levels - 1 - i}", f"decoder.up_blocks.{i}"),
          respelt(
            f"decoder.up.{levels - 1 - i}.upsample.conv.{{*}}",
            f"decoder.up_blocks.{i}.upsamplers.0.conv.{{*}}",
          ),
        )
        for i in range(levels)
      ),
    ),
    others=("loss.{*}",),  # the discriminator of its training
  )


AUTOENCODER = Dialect(
  title=f"an autoencoder in {TITLE}", marks=("decoder.mid.block_1.{*}",), table=_autoencoder
)

# ---- OpenCLIP's text encoder, of Stable Diffusion 2.x


def _third(block: str, number: int) -> Rows:
  name = f"text_model.encoder.layers.{{i}}.self_attn.{'qkv'[number]}_proj"
  part = Part("a", number, number + 1, 3)
  return join(
    respelt(f"{block}.attn.in_proj_weight", f"{name}.weight", part),
    respelt(f"{block}.attn.in_proj_bias", f"{name}.bias", part),
  )


def _open_clip_text(own: dict[str, Spec]) -> Table:
  layers = _count("text_model.encoder.layers.{i}.{*}", own)
  block, layer = "transformer.resblocks.{i}", "text_model.encoder.layers.{i}"
  pairs = {
    f"{block}.ln_1.{{*}}": f"{layer}.layer_norm1.{{*}}",
    f"{block}.ln_2.{{*}}": f"{layer}.layer_norm2.{{*}}",
    f"{block}.attn.out_proj.{{*}}": f"{layer}.self_attn.out_proj.{{*}}",
    f"{block}.mlp.c_fc.{{*}}": f"{layer}.mlp.fc1.{{*}}",
    f"{block}.mlp.c_proj.{{*}}": f"{layer}.mlp.fc2.{{*}}",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.{*}": "text_model.final_layer_norm.{*}",
  }
  return Table(
    name="CLIPTextModel",
    rows=join(
      *(_third(block, number) for number in range(3)),
      *(respelt(old, new) for old, new in pairs.items()),
    ),
    # Stable Diffusion 2.x takes the states of the layer before the last one.
    others=(
      f"transformer.resblocks.{layers}.{{*}}",
      "text_projection",
      "logit_scale",
      "attn_mask",
      "visual.{*}",
    ),
  )


OPEN_CLIP_TEXT = Dialect(
  title="a text encoder in open_clip's names",
  marks=("transformer.resblocks.{*}", "ln_final.{*}"),
  table=_open_clip_text,
)
