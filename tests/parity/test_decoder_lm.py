"""Llama against transformers, with random weights in every tensor."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_checkpoint import relative_error
from torch_parity import convert, error, randomise, run
from transformers import LlamaConfig, LlamaModel

from dancegrpo_jax.conversion.tables.language_models import LLAMA, without_last_layers
from dancegrpo_jax.models import decoder_lm

SMALL = {
  "vocab_size": 60,
  "hidden_size": 32,
  "intermediate_size": 56,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-5,
  "rope_theta": 500000.0,
}
LENGTH = 20


def torch_model(scale: float = 1.0, **change) -> LlamaModel:
  theirs = randomise(LlamaModel(LlamaConfig(**(SMALL | change))), seed=1, scale=scale)
  with torch.no_grad():
    generator = torch.Generator().manual_seed(2)
    theirs.embed_tokens.weight.normal_(generator=generator).mul_(scale)
  return theirs


def ids() -> np.ndarray:
  return np.random.default_rng(0).integers(0, 60, (2, LENGTH)).astype(np.int32)


@torch.no_grad()
def their_states(theirs: LlamaModel, **arguments) -> tuple[torch.Tensor, ...]:
  """The embedding's states, and those after each layer; the last ones after the final norm."""
  tokens = torch.tensor(ids(), dtype=torch.long)
  return theirs(tokens, output_hidden_states=True, **arguments).hidden_states


@cache
def ours_of(scan: bool = True, layers: int | None = None, norm: bool = True, **change):
  network = decoder_lm.from_json(SMALL | change, scan_blocks=scan, layers=layers, final_norm=norm)
  return network, lambda params, ids: network.apply({"params": params}, ids)


def states(theirs: LlamaModel, network, apply) -> np.ndarray:
  return run(apply, convert(LLAMA, theirs, network, ids()), ids())


@pytest.mark.parametrize("scan, scale", [(False, 1.0), (True, 1.0), (True, 1e-3)])
def test_states(scan, scale):
  theirs = torch_model(scale)
  assert error(states(theirs, *ours_of(scan)), their_states(theirs)[-1]) <= 2e-5


@pytest.mark.parametrize(
  "change",
  [
    {"attention_bias": True, "mlp_bias": True},
    {"num_key_value_heads": 1, "head_dim": 16},
    {"rope_theta": 10000.0},
    {"rms_norm_eps": 1e-2},
  ],
  ids=str,
)
def test_fields_of_the_config(change):
  theirs = torch_model(**change)
  wanted = their_states(theirs)[-1]
  assert error(states(theirs, *ours_of(**change)), wanted) <= 2e-5


@pytest.mark.parametrize("scan", [False, True])
def test_states_of_an_inner_layer_without_the_norm(scan):
  """hidden_states[-3] of 4 layers are those after 2; HunyuanVideo takes layer 30 of 32."""
  theirs = torch_model()
  network, apply = ours_of(scan, layers=2, norm=False)
  table = without_last_layers(LLAMA, 2, 4)
  state = {name: t for name, t in theirs.state_dict().items() if name.startswith(("emb", "layers"))}
  kept = [name for name in state if not name.startswith(("layers.2.", "layers.3."))]

  class Part:
    """The file's tensors that the network needs: what `convert` checks the export against."""

    def state_dict(self):
      return {name: state[name] for name in kept}

  params = convert(table, Part(), network, ids())
  assert error(run(apply, params, ids()), their_states(theirs)[-3]) <= 2e-5


def test_tokens_after_the_end_change_nothing():
  """Without a mask, as transformers with one."""
  theirs, (network, apply) = torch_model(), ours_of()
  params = convert(LLAMA, theirs, network, ids())
  whole = run(apply, params, ids())
  padded = ids()
  padded[0, 7:] = 59
  ours = run(apply, params, padded)
  np.testing.assert_array_equal(ours[0, :7], whole[0, :7])
  assert relative_error(ours[0, 7:], whole[0, 7:]) > 1e-2
  mask = torch.ones(2, LENGTH, dtype=torch.long)
  mask[0, 7:] = 0
  assert error(ours[0, :7], their_states(theirs, attention_mask=mask)[-1][0, :7]) <= 2e-5


def test_half_precision_stays_close():
  theirs = torch_model()
  network = decoder_lm.from_json(SMALL, dtype=jnp.bfloat16)
  ours = states(theirs, network, lambda p, ids: network.apply({"params": p}, ids))
  assert ours.dtype == jnp.bfloat16
  assert error(ours.astype(np.float32), their_states(theirs)[-1]) <= 0.05


@pytest.mark.parametrize(
  "change, message",
  [
    ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
    ({"hidden_size": 30}, "hidden_size 30 does not divide into 4 heads"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type = 'llama3'"),
    ({"rope_parameters": {"rope_theta": 10000.0}}, "rope_theta is 500000.0; they must agree"),
  ],
)
def test_bad_configs_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    decoder_lm.from_json(SMALL | change)


def test_more_layers_than_the_file_has_are_refused():
  with pytest.raises(ValueError, match="num_hidden_layers is 4, and 5 layers are needed"):
    decoder_lm.from_json(SMALL, layers=5)
