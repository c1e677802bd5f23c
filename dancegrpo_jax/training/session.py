"""What stays the same during a run: models, programs and data. It is loaded and compiled here."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dancegrpo_jax import buckets, programs, scoring
from dancegrpo_jax.assembly import (
  cut_prompts,
  encoding,
  loading,
  resident,
  reward_builders,
  reward_trial,
)
from dancegrpo_jax.assembly.loading import Model
from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.compilation import ahead, automatic, calls
from dancegrpo_jax.data import prompts
from dancegrpo_jax.data.prompts import read_held_out
from dancegrpo_jax.devices import out_of_memory, processes, program_cache
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.report import page
from dancegrpo_jax.report.progress import Progress, phase
from dancegrpo_jax.rl.state import TrainState, init_state
from dancegrpo_jax.settings import automatic as auto_fields
from dancegrpo_jax.settings import checks, stored_config
from dancegrpo_jax.training import first_line, run_prompts, starting
from dancegrpo_jax.types import Example, PyTree


class Session(NamedTuple):
  """What stays the same during a run.

  Attributes:
    config: validated.
    workdir: of the run.
    examples: the prompt data set.
    shown: the prompts of an evaluation inside training: some of the data set, and some held out.
    batches: `batches[iteration]` are the examples of that iteration.
    model: without its trainable weights, which belong to the state.
    programs: compiled functions of an iteration.
    shown_programs: the same functions, compiled for the shapes of an evaluation inside training.
    encode: `examples -> rows` for the prompts of an iteration, by the model's encoders or from the
      cache of embeddings.
    encode_shown: the same for the prompts of an evaluation.
    reference: what a KL penalty holds to, in the place of the trained weights. {} under LoRA, since
      the base has no adapters; None without a penalty.
    features: by device reward, the features of every prompt of the data set.
    shown_features: by device reward, the features of the prompts of an evaluation.
  """

  config: ConfigDict
  workdir: Path
  examples: list[Example]
  shown: tuple[list[Example], list[Example]]
  batches: Any
  model: Model
  programs: programs.Programs
  shown_programs: programs.Programs
  encode: encoding.Encode
  encode_shown: encoding.Encode
  reference: PyTree | None
  features: dict[str, PyTree]
  shown_features: dict[str, PyTree]


class Loaded(NamedTuple):
  """What `load_and_compile` returns.

  Attributes:
    model: with its weights.
    programs: compiled, of an iteration.
    shown_programs: compiled, at the shapes of an evaluation inside training.
    state: the TrainState before the first iteration, of `jax.ShapeDtypeStruct`s.
    cached: `examples -> rows` from the cache of embeddings; None where the encoders are loaded.
  """

  model: Model
  programs: programs.Programs
  shown_programs: programs.Programs
  state: TrainState
  cached: encoding.Encode | None


def load_and_compile(
  config: ConfigDict,
  workdir: Path,
  examples: list[Example],
  held_out: list[Example],
  mesh: jax.sharding.Mesh,
  progress: Progress,
  summaries: Sequence[str] = (),
  first: int = 0,
) -> Loaded:
  """Reads the weights, and compiles the programs in threads meanwhile.

  Both can begin as soon as the JSON files of the checkpoints have been read.

  Args:
    config: validated.
    workdir: of the run.
    examples: the prompt data set.
    held_out: prompts that are evaluated and not trained on.
    mesh: the devices; the caller has entered it.
    progress: of the run.
    summaries: lines about the prompts. They are printed after the line that says what is about to
      happen, with those about prompts that are cut, when the files of the models have been found.
    first: number of iterations that are done already. Where it is 0, the weights of
      config.init_from must fit.

  Raises:
    ConfigError: a checkpoint or a reward that can't be used, or a model that is too large for the
      devices.
  """
  with phase("finding the files of the model and of the rewards"):
    limits = cut_prompts.of_model(config)
    pipeline = loading.build_pipeline(config)
    rewards = reward_builders.build_rewards(config, cut_prompts.noting_files(limits))
    reward_builders.require_scorable(rewards, pipeline.sample_shape)
  without = pipeline.encoders if config.data.cache_embeddings else ()
  with phase("working out what lies where on the devices"):
    outline = loading.outline(config, pipeline, rewards, mesh)
    state = loading.abstract_state(config, outline, mesh, len(examples))
    resident.require_room(config, mesh, outline, state, without)
  if not first:
    starting.require_fitting(config, outline, mesh)
  progress.message(first_line.of_run(config, workdir, outline, mesh, len(examples), first))
  groups = {"prompts": examples, "held-out prompts": held_out}
  with phase("counting the tokens of the prompts"):
    for line in (*summaries, *cut_prompts.lines(config, limits, groups)):
      progress.message(line)
  with phase("trying the rewards on two blank pictures"):
    reward_trial.require_usable(rewards, pipeline, examples, progress.warning)
  cached = None
  if config.data.cache_embeddings:
    with phase("reading the embeddings of the prompts, or making them"):
      cached = encoding.cached_encoder(config, workdir, pipeline, examples + held_out, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, state)
  jitted = programs.build(config, pipeline, rewards, mesh, shardings)
  with phase("listing the programs"):
    listed = calls.of_run(config, outline, state, jitted, len(examples), len(held_out)).listed
  if cached:
    listed = [call for call in listed if call.name != "encode"]
  with ahead.compilers() as pool:
    compiling = ahead.start(listed, mesh, pool)
    with phase("reading the weights, while programs are compiled"):
      model = loading.load(config, pipeline, rewards, mesh, without)
    compiled, shown_programs = ahead.ready(compiling, jitted)
  return Loaded(
    model=model,
    programs=out_of_memory.guarded(compiled),
    shown_programs=out_of_memory.guarded(shown_programs, calls.SHOW),
    state=state,
    cached=cached,
  )


@out_of_memory.named("loading")
def prepare(
  config: ConfigDict,
  workdir: Path,
  examples: list[Example],
  mesh: jax.sharding.Mesh,
  first: int,
  progress: Progress,
  summaries: Sequence[str] = (),
) -> tuple[Session, TrainState]:
  """Loads and compiles what the iterations need. Then writes config.json and environment.json.

  Args:
    config: validated.
    workdir: of the run.
    examples: the prompt data set.
    mesh: the devices; the caller has entered it.
    first: number of iterations that are done already.
    progress: of the run.
    summaries: lines about the prompts, as for `load_and_compile`.

  Returns:
    The session, and the state before iteration `first`.

  Raises:
    ConfigError: as `load_and_compile`.
  """
  program_cache.use(config.logging.compilation_cache)
  held_out = read_held_out(config)
  loaded = load_and_compile(config, workdir, examples, held_out, mesh, progress, summaries, first)
  model, compiled = loaded.model, loaded.programs
  reference = reference_of(config, model)
  if first:
    with phase(f"reading the checkpoint of iteration {first}"):
      state = store.restore(store.folder_of(workdir), loaded.state).state
  else:
    shardings = jax.tree.map(lambda x: x.sharding, loaded.state)
    start = starting.weights(config, model, mesh, progress.message)
    state = init_state(config, len(examples), shardings)(start)
  model = model._replace(trainable=None)  # the weights belong to the state now
  shown = examples[: config.evaluation.prompts], held_out[: config.evaluation.prompts]
  rows = config.data.prompts_per_iteration

  def features_of(examples: list[Example]) -> dict[str, PyTree]:
    return scoring.reward_features(
      model.rewards, model.reward_params, compiled.features, examples, rows
    )

  with phase("encoding the prompts for the rewards"):
    features, shown_features = features_of(examples), features_of([*shown[0], *shown[1]])
  session = Session(
    config=config,
    workdir=workdir,
    examples=examples,
    shown=shown,
    batches=prompts.prompt_batches(examples, rows, config.seed, config.data.shuffle),
    model=model,
    programs=compiled,
    shown_programs=loaded.shown_programs,
    encode=loaded.cached or encoding.encoder(model, compiled.encode),
    encode_shown=loaded.cached or encoding.encoder(model, loaded.shown_programs.encode),
    reference=reference,
    features=features,
    shown_features=shown_features,
  )
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(stored_config.to_json(config))
    page.save_environment(workdir)
  return session, state


def resumed_config(config: ConfigDict, workdir: Path, given: Collection[str]) -> ConfigDict:
  """The config with which the run of a workdir goes on, see `stored_config.as_stored`.

  Args:
    config: of the command.
    workdir: of the run.
    given: fields of the config that the user has set by hand.

  Returns:
    The config; `config` itself where the workdir holds no run yet.
  """
  folder = store.folder_of(workdir)
  if store.latest(folder) is None:
    return starting.pinned(_with_sizes(config), workdir)
  stored = store.read_meta(folder)["config"]
  config = _with_sizes(config, stored["mesh"]["lanes"])
  resumed, lines = stored_config.as_stored(stored, config, given)
  resumed = starting.as_pinned(resumed, stored, workdir)
  for line in lines if jax.process_index() == 0 else ():
    print(line)
  return resumed


def _with_sizes(config: ConfigDict, lanes: int | None = None) -> ConfigDict:
  """The config with numbers in place of "auto". `lanes` is that of a run that goes on."""
  if not auto_fields.asked(config):
    return config
  with Progress() as progress:
    return automatic.resolved(config, jax.devices(), progress.message, lanes)


def checked(config: ConfigDict, workdir: Path) -> tuple[run_prompts.RunPrompts, int]:
  """Checks all that can be checked before anything is loaded.

  Returns:
    The prompts, and the number of iterations that are done already.

  Raises:
    ConfigError: a mistake in the config, the prompts or the workdir.
  """
  found = run_prompts.read(config)
  facts = checks.device_facts(jax.devices()[0])
  checks.validate(config, num_devices=jax.device_count(), num_examples=len(found.examples), **facts)
  done = iterations_done(config, workdir)
  run_prompts.require_unchanged(config, workdir, found.identity)
  processes.require_same(
    done,
    f"--workdir={buckets.behind(workdir)}: iterations done differ",
    "all hosts must see the same folder",
  )
  processes.require_same(
    prompts.digest([*found.examples, *found.held_out]),
    "the processes read different prompts",
    "all hosts must have the same prompts files",
  )
  processes.require_shared(workdir)
  return found, done


def iterations_done(config: ConfigDict, workdir: Path) -> int:
  """The number of iterations that the run of a workdir has done, 0 where there is none.

  Prints the fields in which the config differs from that of the run and may do so.

  Raises:
    ConfigError: fields differ that may not change during a run; the message names each.
  """
  folder = store.folder_of(workdir)
  done = store.latest(folder)
  if done is None:
    return 0
  allowed, refused = stored_config.differences(store.read_meta(folder)["config"], config)
  if refused:
    lines = "\n".join(map(str, refused))
    raise ConfigError(
      f"{buckets.behind(workdir)} holds a run with another config; use another --workdir, or undo"
      f" these changes:\n{lines}"
    )
  for difference in allowed if jax.process_index() == 0 else ():
    print(f"resuming with {difference}")
  return done


def reference_of(config: ConfigDict, model: Model) -> PyTree | None:
  """What a KL penalty holds to, in the place of the trained weights.

  It is a copy of the weights before training. Under LoRA it is {}: without adapters the model is
  the base, which stays as it is. Without a penalty it is None.
  """
  if not config.objective.kl.weight:
    return None
  return {} if config.lora.rank else jax.tree.map(jnp.copy, model.trainable)
