"""T5's encoder against transformers, with random weights in every tensor."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_checkpoint import relative_error
from torch_parity import convert, error, randomise, run
from transformers import T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

from dancegrpo_jax.conversion.tables.flux import T5
from dancegrpo_jax.models import t5

SMALL = {
  "vocab_size": 60,
  "d_model": 32,
  "d_kv": 12,
  "d_ff": 56,
  "num_layers": 3,
  "num_heads": 4,
  "feed_forward_proj": "gated-gelu",
  "relative_attention_num_buckets": 8,
  "relative_attention_max_distance": 20,
  "layer_norm_epsilon": 1e-6,
}
LENGTH = 40  # longer than the largest distance with a separate bias


def torch_encoder(scale: float = 1.0, **change) -> T5EncoderModel:
  """transformers' network, with `scale` applied to all inputs of norms."""
  theirs = randomise(T5EncoderModel(T5Config(**(SMALL | change))), seed=1, scale=scale)
  with torch.no_grad():
    theirs.shared.weight.normal_(generator=torch.Generator().manual_seed(2)).mul_(scale)
  return theirs


def ids() -> np.ndarray:
  return np.random.default_rng(0).integers(0, 60, (2, LENGTH)).astype(np.int32)


@cache
def ours_of(scan: bool, epsilon: float = 1e-6):
  network = t5.from_json(SMALL | {"layer_norm_epsilon": epsilon}, scan_blocks=scan)
  return network, lambda params, ids: network.apply({"params": params}, ids)


def both(theirs, network, apply):
  """(our states, transformers')."""
  ours = run(apply, convert(T5, theirs, network, ids()), ids())
  with torch.no_grad():
    return ours, theirs(torch.tensor(ids(), dtype=torch.long)).last_hidden_state


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_encoder(scan, scale):
  assert error(*both(torch_encoder(scale), *ours_of(scan))) <= 2e-5


@pytest.mark.parametrize("epsilon", [1e-5])
def test_the_norms_epsilon_is_the_configs(epsilon):
  assert (
    error(*both(torch_encoder(1e-3, layer_norm_epsilon=epsilon), *ours_of(True, epsilon))) <= 1e-4
  )


def test_scan_and_loop_agree():
  theirs = torch_encoder()
  states = [both(torch_encoder(), *ours_of(scan))[0] for scan in (False, True)]
  assert theirs.config.dense_act_fn == "gelu_new"  # the meaning of gated-gelu in the config file
  assert relative_error(states[1], states[0]) <= 1e-5


@pytest.mark.parametrize("count, distance", [(32, 128), (8, 20)])
def test_buckets(count, distance):
  """Compares the buckets of all pairs of 600 tokens, which is more than FLUX takes."""
  offset = torch.arange(600)[None, :] - torch.arange(600)[:, None]
  theirs = T5Attention._relative_position_bucket(offset, True, count, distance)
  np.testing.assert_array_equal(t5.buckets(600, count, distance), theirs.numpy())


def test_half_precision_stays_close():
  """In bfloat16 the results stay within a few steps of 2^-8.

  Norms, logits and softmax are in float32.
  """
  network = t5.from_json(SMALL, dtype=jnp.bfloat16)
  ours, theirs = both(torch_encoder(), network, lambda p, ids: network.apply({"params": p}, ids))
  assert ours.dtype == jnp.bfloat16 and error(ours.astype(np.float32), theirs) <= 0.05


def test_the_first_t5_is_refused():
  with pytest.raises(ValueError, match="feed_forward_proj = 'relu' .implemented: 'gated-gelu'"):
    t5.from_json(SMALL | {"feed_forward_proj": "relu"})
