"""CLIP's towers against transformers, with random weights in every tensor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_parity import convert, error, nhwc, randomise, run
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from dancegrpo_jax.conversion.tables.clip import CLIP, CLIP_TEXT
from dancegrpo_jax.models.clip import Clip, ClipText

TEXT = {
  "vocab_size": 64,
  "max_position_embeddings": 16,
  "hidden_size": 48,
  "intermediate_size": 96,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
  "bos_token_id": 62,
  "eos_token_id": 63,
  "pad_token_id": 63,
}
VISION = {
  "image_size": 24,
  "patch_size": 6,
  "hidden_size": 64,
  "intermediate_size": 128,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
}


def tokens(eos: int, pad: int) -> np.ndarray:
  """Rows of different lengths that end with `eos` and are filled with `pad`."""
  ids = np.random.default_rng(0).integers(3, 60, (4, 16))
  for row, end in zip(ids, (2, 7, 15, 1)):
    row[end], row[end + 1 :] = eos, pad
  return ids.astype(np.int32)


def text_case(eos: int, pad: int, scale: float = 1.0, scan: bool = False, **change):
  """(our hidden states and pooled, transformers' output) of one text tower."""
  config = TEXT | {"eos_token_id": eos, "pad_token_id": pad} | change
  theirs = randomise(CLIPTextModel(CLIPTextConfig(**config)), seed=1, scale=scale)
  if scale != 1.0:
    with torch.no_grad():
      theirs.embeddings.token_embedding.weight.mul_(scale)
      theirs.embeddings.position_embedding.weight.mul_(scale)
  ids = tokens(63 if eos == 2 else eos, pad)
  network = ClipText.from_json(config, scan_layers=scan, remat=scan)
  params = convert(CLIP_TEXT, theirs, network, ids)
  ours = run(lambda p, x: network.apply({"params": p}, x), params, ids)
  with torch.no_grad():
    return ours, theirs(torch.tensor(ids, dtype=torch.long))


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("scan", [False, True])
def test_text_tower(act, scan):
  (hidden, pooled), theirs = text_case(eos=63, pad=63, scan=scan, hidden_act=act)
  assert error(hidden, theirs.last_hidden_state) <= 1e-4
  assert error(pooled, theirs.pooler_output) <= 1e-4


@pytest.mark.parametrize("eos, pad", [(2, 0), (2, 63), (61, 0), (61, 61)])
def test_pooling_takes_the_first_end_of_text(eos, pad):
  """OpenAI's configs have a wrong eos_token_id of 2.

  With it the highest id of a row ends the text.
  """
  (_, pooled), theirs = text_case(eos, pad)
  assert error(pooled, theirs.pooler_output) <= 1e-4


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_small_activations_show_the_norm_epsilon(eps):
  (hidden, _), theirs = text_case(eos=63, pad=63, scale=1e-3, layer_norm_eps=eps)
  assert error(hidden, theirs.last_hidden_state) <= 1e-4


def test_padding_does_not_reach_the_text():
  """The causal mask alone gives what transformers computes with a mask over the padding, too."""
  config = TEXT | {"pad_token_id": 0}
  theirs = randomise(CLIPTextModel(CLIPTextConfig(**config)), seed=1)
  ids = tokens(63, 0)
  network = ClipText.from_json(config)
  _, pooled = run(
    lambda p, x: network.apply({"params": p}, x), convert(CLIP_TEXT, theirs, network, ids), ids
  )
  with torch.no_grad():
    masked = theirs(
      torch.tensor(ids, dtype=torch.long), attention_mask=torch.tensor(ids != 0).long()
    )
  assert error(pooled, masked.pooler_output) <= 1e-4


@pytest.mark.parametrize("scan", [False, True])
def test_penultimate_layer(scan):
  theirs = randomise(CLIPTextModel(CLIPTextConfig(**TEXT)), seed=1)
  ids = tokens(63, 63)
  network = ClipText.from_json(TEXT, scan_layers=scan)
  hidden, _ = run(
    lambda p, x: network.apply({"params": p}, x, layer=-2),
    convert(CLIP_TEXT, theirs, network, ids),
    ids,
  )
  with torch.no_grad():
    states = theirs(torch.tensor(ids, dtype=torch.long), output_hidden_states=True).hidden_states
    assert error(hidden, theirs.final_layer_norm(states[-2])) <= 1e-4


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("scan", [False, True])
def test_model(act, scan):
  """Both towers, projections and temperature, through transformers' own forward pass."""
  text, vision = TEXT | {"hidden_act": act}, VISION | {"hidden_act": act}
  config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
  theirs = randomise(CLIPModel(config), seed=2)
  network = Clip.from_json(config.to_dict(), scan_layers=scan)
  ids = tokens(63, 63)
  pixels = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
  params = convert(CLIP, theirs, network, ids, nhwc(pixels))

  def forward(p, ids, pixels):
    methods = {"text": (Clip.text_features, ids), "image": (Clip.image_features, pixels)}
    features = {
      name: network.apply({"params": p}, x, method=method) for name, (method, x) in methods.items()
    }
    return network.apply({"params": p}, ids, pixels), features

  (text_embeds, image_embeds, scale), features = run(forward, params, ids, nhwc(pixels))
  with torch.no_grad():
    long = torch.tensor(ids, dtype=torch.long)
    output = theirs(input_ids=long, pixel_values=pixels)
    assert error(features["text"], theirs.get_text_features(long).pooler_output) <= 1e-4
    assert error(features["image"], theirs.get_image_features(pixels).pooler_output) <= 1e-4
  assert error(text_embeds, output.text_embeds) <= 1e-4
  assert error(image_embeds, output.image_embeds) <= 1e-4
  assert error(scale * image_embeds @ text_embeds.T, output.logits_per_image) <= 1e-4


def test_gradients_with_and_without_scan_and_remat():
  """Stacking and rematerialisation change no derivative."""
  ids, gradients = tokens(63, 63), []
  theirs = randomise(CLIPTextModel(CLIPTextConfig(**TEXT)), seed=1)
  for scan in (False, True):
    network = ClipText.from_json(TEXT, scan_layers=scan, remat=scan)
    params = convert(CLIP_TEXT, theirs, network, ids)
    gradient = run(
      jax.grad(lambda p, x, n=network: n.apply({"params": p}, x)[1].sum()), params, ids
    )
    gradients.append(gradient["embeddings"]["token_embedding"]["embedding"])
  assert np.abs(gradients[0] - gradients[1]).max() <= 1e-5 * np.abs(gradients[0]).max()


def test_half_precision_stays_close():
  """In bfloat16 the results stay within a few steps of 2^-8.

  Norms and softmax are in float32.
  """
  theirs = randomise(CLIPTextModel(CLIPTextConfig(**TEXT)), seed=1)
  ids = tokens(63, 63)
  network = ClipText.from_json(TEXT, dtype=jnp.bfloat16)
  params = convert(CLIP_TEXT, theirs, network, ids)
  hidden, _ = run(lambda p, x: network.apply({"params": p}, x), params, ids)
  assert hidden.dtype == jnp.bfloat16
  with torch.no_grad():
    assert (
      error(
        hidden.astype(np.float32), theirs(torch.tensor(ids, dtype=torch.long)).last_hidden_state
      )
      <= 0.05
    )


@pytest.mark.parametrize(
  "change, message",
  [
    ({"hidden_act": "relu"}, "hidden_act"),
    ({"num_attention_heads": 5}, "num_attention_heads"),
    ({}, "max_position_embeddings"),
  ],
)
def test_bad_configs_are_named(change, message):
  ids = jnp.zeros((1, 17 if not change else 4), jnp.int32)
  with pytest.raises(ValueError, match=message):
    ClipText.from_json(TEXT | change).init(jax.random.key(0), ids)
