"""HunyuanVideo's denoiser against diffusers, with random weights in every tensor."""

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.transformers import transformer_hunyuan_video as reference
from tiny_checkpoint import relative_error
from torch_parity import convert, error, randomise, run
from transformers import LlamaConfig, LlamaModel

from dancegrpo_jax.checkpoints import weights
from dancegrpo_jax.conversion.tables.hunyuan_video import HUNYUAN_VIDEO
from dancegrpo_jax.convert.__main__ import main
from dancegrpo_jax.models import hunyuan_video, lora, rotary

SMALL = {
  "in_channels": 4,
  "out_channels": 4,
  "num_attention_heads": 2,
  "attention_head_dim": 16,
  "num_layers": 1,
  "num_single_layers": 1,
  "num_refiner_layers": 1,
  "text_embed_dim": 24,
  "pooled_projection_dim": 20,
  "rope_axes_dim": [4, 6, 6],
}
PLAIN = SMALL | {"guidance_embeds": False}
HEIGHT, WIDTH, TOKENS = 4, 6, 8  # latents that are not square
LENGTHS = (3, 6)  # the valid ones of TOKENS


def inputs(frames: int = 3, channels: int = 4, guidance: bool = True) -> tuple:
  """(latents [b, c, f, h, w], time 0 .. 1000, text, lengths, pooled, guidance or None)."""
  generator = torch.Generator().manual_seed(0)
  shapes = (channels, frames, HEIGHT, WIDTH), (TOKENS, 24), (20,)
  latents, text, pooled = (torch.randn(2, *shape, generator=generator) for shape in shapes)
  scale = torch.tensor([6.016, 1.0]) if guidance else None
  return latents, torch.tensor([700.25, 300.0]), text, torch.tensor(LENGTHS), pooled, scale


def ours_in(latents, time, text, lengths, *rest) -> tuple:
  """The same inputs for our network; the guidance is left out where it is None."""
  x = np.ascontiguousarray(latents.permute(0, 2, 3, 4, 1).numpy())
  lengths = lengths.numpy().astype(np.int32)
  return (x, time.numpy(), text.numpy(), lengths, *(y.numpy() for y in rest if y is not None))


@torch.no_grad()
def their_output(theirs, latents, time, text, lengths, pooled, guidance) -> torch.Tensor:
  """Diffusers' output `[b, f, h, w, c]`. It takes the guidance times 1000, and a mask."""
  mask = torch.arange(text.shape[1])[None] < lengths[:, None]
  guidance = None if guidance is None else 1000 * guidance
  output = theirs(latents, time, text, mask, pooled, guidance).sample
  return output.permute(0, 2, 3, 4, 1)


@cache
def ours_of(scan: bool = True, remat: bool = False, guidance: bool = True, **change):
  """Our network and its call, the same objects in each test, so that they compile once."""
  base = {"guidance_embeds": guidance, **change}
  network = hunyuan_video.from_json(SMALL | base, scan_blocks=scan, remat=remat)
  return network, lambda params, *arguments: network.apply({"params": params}, *arguments)


@cache
def torch_network(seed: int = 1, scale: float = 1.0, **change) -> HunyuanVideoTransformer3DModel:
  return randomise(HunyuanVideoTransformer3DModel(**(SMALL | change)), seed=seed, scale=scale)


def both(theirs, ours, arguments) -> tuple[np.ndarray, torch.Tensor]:
  """(our velocity, diffusers')."""
  network, apply = ours
  params = convert(HUNYUAN_VIDEO, theirs, network, *ours_in(*arguments))
  return run(apply, params, *ours_in(*arguments)), their_output(theirs, *arguments)


@pytest.mark.parametrize("frames", [1, 4, 14])
def test_frames(frames):
  assert error(*both(torch_network(), ours_of(), inputs(frames))) <= 5e-5


def test_epsilons():
  """All that enters a norm is so small that a wrong epsilon shows."""
  assert error(*both(torch_network(scale=1e-3), ours_of(), inputs())) <= 5e-5


def test_without_guidance():
  theirs = torch_network(guidance_embeds=False)
  assert error(*both(theirs, ours_of(guidance=False), inputs(guidance=False))) <= 5e-5


def test_image_to_video_channels():
  """The condition's channels come after those of the noisy latents; the output has none of them."""
  theirs, ours = torch_network(in_channels=8), ours_of(in_channels=8)
  velocity, wanted = both(theirs, ours, inputs(channels=8))
  assert velocity.shape == (2, 3, HEIGHT, WIDTH, 4)
  assert error(velocity, wanted) <= 5e-5


def test_other_base_of_the_rotations():
  assert error(*both(torch_network(rope_theta=99.0), ours_of(rope_theta=99.0), inputs())) <= 5e-5
  assert error(*both(torch_network(rope_theta=99.0), ours_of(), inputs())) > 1e-3


def test_full_depth():
  """2 refiner, 20 double and 40 single blocks, as published."""
  depth = {"num_layers": 20, "num_single_layers": 40, "num_refiner_layers": 2}
  assert error(*both(torch_network(seed=4, **depth), ours_of(**depth), inputs())) <= 1e-4


def test_scan_loop_and_remat_agree():
  """Outputs and gradients agree within round-off, and both parameter trees make one checkpoint."""
  depth = {"num_layers": 2}
  theirs, arguments, results = torch_network(seed=2, **depth), ours_in(*inputs()), []
  for scan, remat in ((False, False), (True, True)):
    network, apply = ours_of(scan, remat, **depth)
    params = convert(HUNYUAN_VIDEO, theirs, network, *arguments)

    def loss(p, *a, apply=apply):
      output = apply(p, *a)
      return jnp.square(output).mean(), output

    gradient, output = run(jax.grad(loss, has_aux=True), params, *arguments)
    if not scan:
      refiner = gradient["context_embedder"]["token_refiner"]
      for tree, name in (
        (gradient, "transformer_blocks"),
        (gradient, "single_transformer_blocks"),
        (refiner, "refiner_blocks"),
      ):
        blocks = [tree.pop(key) for key in sorted(tree) if key.startswith(name)]
        tree[name] = jax.tree.map(lambda *x: np.stack(x), *blocks)
    results.append((output, gradient))
  (loop, loop_gradient), (scanned, gradient) = results
  assert error(loop, their_output(theirs, *inputs())) <= 1e-4
  assert relative_error(scanned, loop) <= 1e-5
  assert relative_error(gradient, loop_gradient) <= 1e-5


def test_tokens_after_the_end_of_a_text_change_nothing():
  """Not one bit; and a text that is cut to its length gives the same velocity."""
  network, apply = ours_of()
  x, time, text, lengths, *rest = ours_in(*inputs())
  params = convert(HUNYUAN_VIDEO, torch_network(), network, x, time, text, lengths, *rest)
  whole = run(apply, params, x, time, text, lengths, *rest)
  other = text.copy()
  for row, length in enumerate(lengths):
    other[row, length:] = 1e3
  np.testing.assert_array_equal(run(apply, params, x, time, other, lengths, *rest), whole)
  cut = run(apply, params, x, time, text[:, : max(LENGTHS)], lengths, *rest)
  assert relative_error(cut, whole) <= 1e-5
  longer = run(apply, params, x, time, text, lengths + 1, *rest)
  assert relative_error(longer, whole) > 1e-3


def test_refiner():
  """Its valid tokens. In diffusers the others see other keys, and nothing reads them."""
  theirs = randomise(reference.HunyuanVideoTokenRefiner(24, 2, 16, num_layers=2), seed=3)
  _, time, text, lengths, *_ = inputs()
  mask = torch.arange(TOKENS)[None] < lengths[:, None]
  network = hunyuan_video.TokenRefiner(features=32, heads=2, layers=2)
  table = HUNYUAN_VIDEO._replace(
    rows=tuple(
      row._replace(
        source=row.source.removeprefix("context_embedder."),
        target=row.target.removeprefix("context_embedder/"),
      )
      for row in HUNYUAN_VIDEO.rows
      if row.source.startswith("context_embedder.")
    )
  )
  arguments = text.numpy(), time.numpy(), lengths.numpy().astype(np.int32)
  params = convert(table, theirs, network, *arguments)
  ours = run(lambda p, *a: network.apply({"params": p}, *a), params, *arguments)
  with torch.no_grad():
    wanted = theirs(text, time, mask)
  assert error(ours[mask.numpy()], wanted[mask]) <= 2e-5


def test_rotations_of_the_published_size():
  """53 frames of 480x480 pixels. Diffusers computes the angles in float32."""
  rope = reference.HunyuanVideoRotaryPosEmbed(2, 1, [16, 56, 56], 256.0)
  theirs = rope(torch.zeros(1, 1, 14, 60, 60))
  ours = rotary.rotation(rotary.grid(14, 30, 30), (16, 56, 56), 256.0)
  for a, b in zip(ours, theirs):
    assert error(np.asarray(a), b[:, ::2]) <= 5e-6


def test_half_precision_stays_close():
  theirs, arguments = torch_network(), inputs()
  network = hunyuan_video.from_json(SMALL, dtype=jnp.bfloat16, scan_blocks=True)
  ours, wanted = both(theirs, (network, lambda p, *a: network.apply({"params": p}, *a)), arguments)
  assert ours.dtype == jnp.bfloat16
  assert error(ours.astype(np.float32), wanted) <= 0.05


def test_adapters_reach_the_dense_layers():
  """With adapters of a block and of the refiner as with W + A B in the place of W."""
  arguments, (network, apply) = ours_in(*inputs()), ours_of()
  params = convert(HUNYUAN_VIDEO, torch_network(), network, *arguments)
  targets = r".*(single_transformer_blocks|refiner_blocks).*to_q/kernel"
  adapters = jax.tree.map(
    lambda leaf: np.linspace(-0.5, 0.5, leaf.size, dtype=np.float32).reshape(leaf.shape),
    lora.abstract(params, lora.Lora(rank=2, alpha=2.0, targets=targets)),
  )
  assert len(jax.tree.leaves(adapters)) == 4
  variables = {"params": params, lora.COLLECTION: adapters}
  adapted = run(lambda v, *a: network.apply(v, *a), variables, *arguments)
  merged = run(apply, lora.merged(params, adapters, 1.0), *arguments)
  assert relative_error(adapted, merged) <= 1e-5
  assert relative_error(adapted, run(apply, params, *arguments)) > 1e-3


def test_a_published_folder(tmp_path, capsys):
  """`convert inspect` knows both networks; devices read the slices of the parts that they hold."""
  theirs = torch_network()
  theirs.save_pretrained(tmp_path / "transformer")
  sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
  model = LlamaModel(LlamaConfig(**sizes, num_hidden_layers=1))
  model.save_pretrained(tmp_path / "text_encoder")
  index = {
    "_class_name": "HunyuanVideoPipeline",
    "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
    "text_encoder": ["transformers", "LlamaModel"],
  }
  (tmp_path / "model_index.json").write_text(json.dumps(index))
  assert main(["inspect", str(tmp_path)]) == 0
  shown = capsys.readouterr().out
  assert "x_embedder.proj.weight\t[32, 4, 1, 2, 2]\tfloat32\tx_embedder/proj/kernel" in shown
  assert f"# {tmp_path / 'text_encoder'} (LlamaModel): 11 tensors, 11 parameters" in shown

  network, _ = ours_of()
  params = convert(HUNYUAN_VIDEO, theirs, network, *ours_in(*inputs()))
  mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.NamedSharding(mesh, jax.P(None, None, None, "fsdp"))
  whole = jax.NamedSharding(mesh, jax.P())
  shardings = jax.tree.map(lambda x: split if x.ndim == 4 else whole, params)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  loaded = weights.load(tmp_path / "transformer", HUNYUAN_VIDEO, abstract, shardings)
  assert loaded["x_embedder"]["proj"]["kernel"].sharding.shard_shape((4, 2, 2, 32))[-1] == 8
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), loaded, params)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"rope_axes_dim": [4, 6, 4]}, "three even numbers that sum to attention_head_dim 16"),
    ({"rope_axes_dim": [4, 7, 5]}, "even"),
    ({"rope_axes_dim": [8, 8]}, "three"),
    ({"patch_size_t": 2}, "patch_size_t = 2"),
    ({"image_condition_type": "token_replace"}, "image_condition_type = 'token_replace'"),
    ({"image_condition_type": "latent_concat"}, "image_condition_type = 'latent_concat'"),
    ({"qk_norm": None}, "qk_norm = None"),
  ],
)
def test_bad_configs_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    hunyuan_video.from_json(SMALL | change)


@pytest.mark.parametrize("given", [True, False])
def test_guidance_is_given_where_the_network_takes_it(given):
  arguments = ours_in(*inputs(guidance=given))
  network = hunyuan_video.from_json(PLAIN if given else SMALL)
  with pytest.raises(ValueError, match="guidance_embeds"):
    jax.eval_shape(network.init, jax.random.key(0), *arguments)
