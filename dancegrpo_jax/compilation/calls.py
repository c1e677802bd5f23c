"""The calls of a run: every program with the shapes, dtypes and shardings of its arguments.

A run compiles this list before the first iteration, while the weights are read. `plan` compiles it
without weights. The arguments of a call are what the calls before it return, as shapes.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax import programs
from dancegrpo_jax.assembly.loading import Model
from dancegrpo_jax.programs import update_calls
from dancegrpo_jax.rewards import kinds
from dancegrpo_jax.rl.lanes import deal
from dancegrpo_jax.rl.state import TrainState
from dancegrpo_jax.types import Conditioning, Example, Media, PyTree

SHOW = "show "  # what the names of calls begin with that an evaluation inside training makes


class Call(NamedTuple):
  """A program as a run calls it.

  Attributes:
    name: of the program; "show decode" is the decoder with the shapes of an evaluation.
    program: jitted.
    arguments: abstract.
    times: number of calls in the run.
    turns: how often its loop turns in one call, where the length of the loop is an argument.
    freed: names in `Calls.kept` of arrays that are no longer in memory when it runs.
    extra: arrays that stay in memory while it runs and are not in `Calls.kept`.
  """

  name: str
  program: Any
  arguments: tuple
  times: float | int
  turns: float | int = 1
  freed: tuple[str, ...] = ()
  extra: PyTree = ()


class Calls(NamedTuple):
  """The calls of a run, and the arrays that stay in memory meanwhile.

  Attributes:
    listed: in the order of an iteration, then those of an evaluation.
    kept: by name, the arrays that are in memory when the last chunk has been scored.
  """

  listed: list[Call]
  kept: dict[str, PyTree]


def abstract(tree: PyTree, sharding: jax.sharding.Sharding | None = None) -> PyTree:
  """A tree of `jax.ShapeDtypeStruct`s.

  Args:
    tree: of arrays, or of anything with shapes and dtypes.
    sharding: of all leaves; None for arrays that a run passes from the host.
  """
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.result_type(x), sharding=sharding), tree
  )


def blank_examples(count: int) -> list[Example]:
  """Stand-ins for prompts: what is made of them has the same shapes as for any others."""
  return [Example(number, "") for number in range(count)]


def of_run(
  config: ConfigDict,
  model: Model,
  state: TrainState,
  run: programs.Programs,
  examples: int,
  held_out: int,
) -> Calls:
  """All calls of a run. The caller has entered the mesh.

  Args:
    config: validated.
    model: with abstract parameters, of `loading.outline`.
    state: abstract, of `loading.abstract_state`.
    run: jitted programs.
    examples: number of prompts in the data set.
    held_out: number of prompts in data.held_out.
  """
  prompts, group = config.data.prompts_per_iteration, config.rollout.samples_per_prompt
  chunks = deal(prompts * group, config.rollout.chunk, config.mesh.lanes)
  chunk_calls = len(chunks) * config.iterations
  ids, number = abstract(np.zeros(prompts, np.int32)), abstract(np.int32(0))
  frozen = _frozen(config, model)
  encoding, rows = _encoding(config, model, run, prompts, examples)
  arguments = (state.trainable, frozen, rows, ids, abstract(chunks[0]), number)
  rollouts = tuple(_copy(jax.eval_shape(run.rollout, *arguments)) for _ in chunks)
  decoding = (frozen, rollouts[-1].sample)
  media = jax.eval_shape(run.decode, *decoding)
  calls = [
    encoding,
    Call("rollout", run.rollout, arguments, chunk_calls),
    Call("decode", run.decode, decoding, chunk_calls),
    *of_scores(config, model, run, media, state.prompt_stats, examples),
  ]
  advantage, weight, chosen, _, _ = jax.eval_shape(calls[-1].program, *calls[-1].arguments)
  reference = None
  if config.objective.kl.weight:
    reference = {} if config.lora.rank else _copy(state.trainable)
  dealing = (state.trainable, rollouts, ids, advantage, weight, chosen, number)
  calls.append(Call("update deal", run.update["deal"], dealing, config.iterations))
  calls += of_update(config, run, state, frozen, reference, rows, dealing)
  calls += _showing(config, model, run, calls, examples, held_out)
  kept = {
    "trained weights": state.trainable,
    "optimizer": state.opt_state,
    "average": state.ema,
    "frozen weights": frozen,
    "reference": reference,
    "rewards": model.reward_params,
    "conditioning": rows,
    "trajectories": rollouts,
    "pixels": media,
  }
  return Calls(listed=calls, kept=kept)


def _frozen(config: ConfigDict, model: Model) -> PyTree:
  """The frozen parameters that are in memory while a run trains."""
  if not config.data.cache_embeddings:
    return model.frozen
  encoders = model.pipeline.encoders
  return {name: tree for name, tree in model.frozen.items() if name not in encoders}


def _encoding(
  config: ConfigDict, model: Model, run: programs.Programs, count: int, examples: int
) -> tuple[Call, Conditioning]:
  """The call of the text encoders for `count` prompts, and the conditioning that it returns.

  With cached embeddings the encoders are called for all examples before the first iteration, and
  not afterwards.
  """
  cached, pipeline = config.data.cache_embeddings, model.pipeline
  params = {name: model.frozen[name] for name in pipeline.encoders} if cached else model.frozen
  arguments = (params, abstract(pipeline.prepare(blank_examples(count))))
  is_guided = config.sampler.guidance_scale != 1.0
  rounds = examples / count if cached else config.iterations
  call = Call("encode", run.encode, arguments, rounds * (2 if is_guided else 1))

  def branch() -> PyTree:
    return jax.eval_shape(run.encode, *arguments)

  return call, Conditioning(positive=branch(), negative=branch() if is_guided else None)


def of_update(
  config: ConfigDict,
  run: programs.Programs,
  state: TrainState,
  frozen: PyTree,
  reference: PyTree | None,
  rows: Conditioning,
  dealing: tuple,
) -> list[Call]:
  """The calls of an update after "deal", see `programs.update_calls.run`.

  Args:
    config: validated.
    run: jitted programs.
    state: abstract.
    frozen: parameters that are not trained, abstract.
    reference: of a KL penalty, abstract, or None.
    rows: the conditioning, abstract.
    dealing: arguments of the program "update deal".
  """
  work, sums = jax.eval_shape(run.update["deal"], *dealing)
  updates, microbatches = jax.tree.leaves(work.items)[0].shape[:2]
  most, number = config.optimizer.microbatches_per_call, dealing[-1]
  before = _copy((state.trainable, state.opt_state, state.ema)) if updates > 1 else ()
  options: dict[str, Any] = {"freed": ("trajectories",)}
  calls = []

  def looped(name: str, arguments: tuple, count: int, rounds: int, **more: Any) -> Call:
    """A program that goes through `count` microbatches, `rounds` times in each iteration."""
    length = len(update_calls.bounds(count, most))
    times = config.iterations * rounds * length
    turns = count / length
    return Call(f"update {name}", run.update[name], arguments, times, turns, **options, **more)

  if "remember" in run.update:
    reading = (state.trainable, frozen, rows, work, sums, number, number)
    calls.append(looped("remember", reading, (updates - 1) * microbatches, 1))
  adding = (state.trainable, frozen, reference, rows, work, sums, number, number, number)
  calls.append(looped("accumulate", adding, microbatches, updates, extra=before))
  stepping = (state, sums, number)
  if "first_step" in run.update:
    first = Call(
      "update first_step", run.update["first_step"], stepping, config.iterations, **options
    )
    calls.append(first)
  steps = config.iterations * max(1, updates - 1)
  calls.append(Call("update step", run.update["step"], stepping, steps, **options, extra=before))
  calls.append(
    Call("update summary", run.update["summary"], (state, sums), config.iterations, **options)
  )
  return calls


def of_scores(
  config: ConfigDict,
  model: Model,
  run: programs.Programs,
  media: Media,
  stats: PyTree,
  examples: int,
) -> list[Call]:
  """The calls that lead from pixels to advantages: device rewards, then `join` and `advantages`.

  Args:
    config, model, run, examples: as for `of_run`.
    media: of a chunk, abstract.
    stats: per-prompt statistics of the state, abstract.
  """
  prompts, chunk = config.data.prompts_per_iteration, config.rollout.chunk
  samples, calls = prompts * config.rollout.samples_per_prompt, []
  ids, numbers, order = (abstract(np.zeros(size, np.int32)) for size in (prompts, chunk, samples))
  chunks = samples // chunk
  # Of host rewards, as `scoring.gather_host_scores` returns them; device rewards take their places.
  scores = {term: abstract([np.zeros(samples, np.float32)]) for term in kinds.scored(config)}
  for name, program in run.features.items():
    params = model.reward_params[name]
    prepare = model.rewards[name].prepare
    assert prepare is not None, name  # every reward that is a network has it
    prepared = abstract(prepare(blank_examples(prompts)))
    calls.append(Call(f"features {name}", program, (params, prepared), -(-examples // prompts)))
    features = abstract(jax.eval_shape(program, params, prepared))
    arguments = (params, media, features, numbers)
    calls.append(Call(f"score {name}", run.score[name], arguments, chunks * config.iterations))
    parts = jax.eval_shape(run.score[name], *arguments)
    scores |= {term: [part] * chunks for term, part in parts.items()}
  calls.append(Call("join", run.join, (scores, order), config.iterations))
  joined = jax.eval_shape(run.join, scores, order)
  calls.append(Call("advantages", run.advantages, (joined, ids, stats), config.iterations))
  return calls


def _showing(
  config: ConfigDict,
  model: Model,
  run: programs.Programs,
  calls: list[Call],
  examples: int,
  held_out: int,
) -> list[Call]:
  """The calls of an evaluation inside training, see training/showing.py.

  They take all prompts of the evaluation at once, filled up to a multiple of the lanes.
  """
  lanes, every = config.mesh.lanes, config.evaluation.every
  count = min(config.evaluation.prompts, examples) + min(config.evaluation.prompts, held_out)
  rows = -(-count // lanes) * lanes
  shows = config.iterations // every + 1 if every else 2
  numbers, seed = abstract(np.zeros(rows, np.int32)), abstract(np.int32(0))
  arguments = {call.name: call.arguments for call in calls}
  trainable, frozen, *_ = arguments["rollout"]
  encoding, conditioning = _encoding(config, model, run, rows, examples)
  drawing = (trainable, frozen, conditioning, numbers, numbers, seed)
  latents = jax.eval_shape(run.sample, *drawing)
  # Without a sharding: the rewards get these samples from the host.
  media = abstract(jax.eval_shape(run.decode, frozen, latents))
  result = [
    Call("sample", run.sample, drawing, shows),
    Call(f"{SHOW}decode", run.decode, (frozen, latents), shows),
  ]
  if not config.data.cache_embeddings:
    branches = 1 if conditioning.negative is None else 2
    result.append(encoding._replace(name=f"{SHOW}encode", times=branches * shows))
  for name, program in run.score.items():
    params, _, features, _ = arguments[f"score {name}"]
    features = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), features
    )
    result.append(Call(f"{SHOW}score {name}", program, (params, media, features, numbers), shows))
  return result


def _copy(tree: PyTree) -> PyTree:
  """The same shapes in new objects, which stand for other arrays than those of the tree."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
