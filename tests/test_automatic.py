"""Sizes that are "auto": arithmetic worked out by hand, memory by an estimate, and whole runs."""

import json
import re

import jax
import pytest
from test_configs import CASES, load
from tiny_checkpoint import ROOT, overrides, tiny_config

from dancegrpo_jax import main
from dancegrpo_jax.compilation import automatic as fitting
from dancegrpo_jax.compilation import estimate, inventory
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.settings import automatic, checks, command_line, config_file, stored_config
from dancegrpo_jax.training import session

AUTO = ("mesh.lanes=auto", "rollout.chunk=auto", "optimizer.microbatch=auto")
COMMON = str(ROOT / "configs" / "common.py")


def chosen(prompts, group, devices=1, words=AUTO, stored=None, **fields):
  """(lanes, chunk, microbatch) for a run with 9 policy steps, of which 5 are trained."""
  sizes = {"data.prompts_per_iteration": prompts, "rollout.samples_per_prompt": group, **fields}
  config = config_file.load(COMMON, [f"{key}={value}" for key, value in sizes.items()])
  config = config_file.overridden(config, words)
  result = automatic.resolved(config, devices, stored=stored)
  checks.validate(result, num_devices=devices)
  checks.validate(config, num_devices=devices)  # as it is, too
  return result.mesh.lanes, result.rollout.chunk, result.optimizer.microbatch


@pytest.mark.parametrize(
  "prompts, group, updates, devices, expected",
  [
    (16, 16, 1, 1, (8, 256, 256)),  # the defaults
    (5, 12, 1, 1, (6, 60, 150)),  # 60 samples, 300 transitions
    (5, 12, 4, 1, (5, 60, 75)),  # 75 transitions a step
    (1, 2, 1, 1, (2, 2, 10)),
    (1, 7, 1, 1, (7, 7, 35)),
    (1, 13, 1, 1, (1, 13, 65)),  # 13 lanes would be more than 8
    (13, 12, 1, 1, (6, 156, 156)),  # 780 transitions: 390 is above 256
    (6, 12, 1, 8, (8, 72, 360)),
    (40, 12, 1, 16, (16, 480, 2400)),  # lanes for every device
    (32, 32, 1, 1, (8, 256, 256)),  # 1024 samples
    (5, 12, 1, 5, (5, 60, 300)),
  ],
)
def test_largest_that_divide(prompts, group, updates, devices, expected):
  found = chosen(prompts, group, devices, **{"optimizer.updates_per_iteration": updates})
  assert found == expected


@pytest.mark.parametrize(
  "prompts, group, best_of, devices, expected",
  [
    (16, 16, 6, 1, (8, 256, 240)),  # 96 trained samples, 480 transitions
    (5, 12, 4, 1, (5, 60, 100)),  # 20 trained samples, 100 transitions
    (6, 12, 4, 2, (8, 72, 120)),  # a device has 3 prompts in 4 lanes
    (32, 24, 8, 32, (32, 768, 1280)),  # 256 trained samples
  ],
)
def test_a_selection_divides_too(prompts, group, best_of, devices, expected):
  assert chosen(prompts, group, devices, **{"advantage.best_of": best_of}) == expected


def test_a_number_stays_and_auto_has_a_cap():
  words = ["mesh.lanes=3", "rollout.chunk=auto:30", "optimizer.microbatch=auto:20"]
  assert chosen(5, 12, words=words) == (3, 30, 15)
  assert chosen(5, 12, words=[*AUTO, "optimizer.microbatch=auto:100"]) == (6, 60, 60)
  config = config_file.load(COMMON)
  assert automatic.resolved(config, 1) is config
  # The one that is "auto" in a file, and a number in its place.
  with config.unlocked():
    config.rollout.chunk = "auto"
  assert config_file.overridden(config, ["rollout.chunk=64"]).rollout.chunk == 64


def test_a_run_that_goes_on_keeps_its_lanes():
  assert chosen(5, 12, stored=2) == (2, 60, 150)
  with pytest.raises(ConfigError, match=r"lanes = 8; this run began with so many; name another"):
    chosen(5, 12, stored=8)


@pytest.mark.parametrize(
  "prompts, group, devices, words, message",
  [
    (5, 12, 8, AUTO, "config.mesh.lanes = 'auto': .* data x fsdp = 8 .* 6 devices"),
    (5, 12, 1, ["rollout.chunk=auto"], "config.rollout.chunk = 'auto': .* use mesh.lanes = auto"),
    (6, 12, 1, ["rollout.chunk=auto:4"], "'auto:4': .*mesh.lanes = 8 .* is 8; use auto:8"),
    (0, 12, 1, AUTO, "config.data.prompts_per_iteration = 0: must be at least 1"),
    (5, 12, 1, [*AUTO, "optimizer.updates_per_iteration=7"], "updates_per_iteration = 7: .* 300"),
    (5, 12, 1, [*AUTO, "mesh.data=3"], "config.mesh.data = 3"),
  ],
)
def test_what_cannot_be_chosen_is_a_line(prompts, group, devices, words, message):
  with pytest.raises(ConfigError) as error:
    chosen(prompts, group, devices, words)
  assert re.search(message, str(error.value)) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["auto:0", "automatic", "auto:", "1.5", "-auto"])
def test_other_words_are_refused(text):
  with pytest.raises(ConfigError, match="write a whole number, auto, or auto:N"):
    config_file.load(COMMON, [f"rollout.chunk={text}"])


@pytest.mark.parametrize("value", ["64", 1.5, True, 0, None])
def test_a_file_may_not_hold_other_things(value):
  config = config_file.load(COMMON)
  with config.unlocked(), config.ignore_type():
    config.rollout.chunk = value
  with pytest.raises(ConfigError, match="config.rollout.chunk = .* whole number"):
    checks.validate(config, num_devices=1)


@pytest.mark.parametrize("name, preset", CASES)
def test_auto_is_valid_for_every_config_and_changes_none(name, preset):
  config = load(name, preset)
  assert not automatic.asked(config) and automatic.resolved(config, 1) is config
  for devices in (1, 8) if name.startswith(("sd_", "flux_")) and preset != "tiny" else (1,):
    result = automatic.resolved(config_file.overridden(load(name, preset), AUTO), devices)
    checks.validate(result, num_devices=devices)
    assert result.mesh.lanes == config.mesh.lanes or config.mesh.lanes > 8


def test_the_estimate_is_near_what_the_compiler_allots(tiny_models):
  """Of the programs that decide what fits, on the CPU."""
  config = inventory.without_weights(tiny_config(tiny_models))
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  taken = inventory.take(config, mesh, 8, 0)
  with jax.set_mesh(mesh):
    for call in taken.calls:
      if call.name in ("decode", "score clip", "encode"):
        memory = call.program.trace(*call.arguments).lower().compile().memory_analysis()
        ratio = memory.temp_size_in_bytes / estimate.temporaries(call, 1)
        assert 0.4 < ratio < 2, (call.name, ratio)


def test_a_product_is_counted_with_its_operands_results():
  """Three matrices of 64 kB are alive at most: x @ x, its own product, and the next one."""
  x = jax.ShapeDtypeStruct((128, 128), jax.numpy.float32)
  call = inventory.Call("x", jax.jit(lambda x: ((x @ x) @ (x + 1) @ x).sum()), (x,), 1)
  assert estimate.temporaries(call, 1) == 3 * 128 * 128 * 4


def test_smaller_memory_gives_smaller_batches(tiny_models):
  """16 samples and 48 transitions in 8 lanes: all at once where there is room, or the smallest."""
  config = config_file.overridden(tiny_config(tiny_models), AUTO)
  devices, said, found = jax.devices()[:1], [], []
  for memory in (0.0, 2.0**36, 2.0**10):
    result = fitting.resolved(config, devices, said.append, memory=memory)
    checks.validate(result, num_devices=1)
    found.append((result.rollout.chunk, result.optimizer.microbatch))
  assert found == [(16, 48), (16, 48), (8, 8)]
  assert "whose memory isn't known" in said[0] and "GiB by an estimate" in said[1]


def test_networks_that_are_not_here_get_the_smallest(tiny_models):
  config = config_file.overridden(tiny_config(tiny_models), [*AUTO, "model.checkpoint=no/such"])
  said = []
  result = fitting.resolved(config, jax.devices()[:1], said.append, memory=2.0**36)
  assert result.rollout.chunk == result.mesh.lanes and "aren't known yet" in said[0]


def words(models, folder, sizes=AUTO):
  changes = {
    "data.prompts": folder / "five.txt",
    "data.held_out": "",
    "data.prompts_per_iteration": 5,
    "rollout.samples_per_prompt": 16,
    "sampler.steps": 3,
    "evaluation.every": 0,
  }
  return [
    f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tiny",
    *(f"--config.{word}" for word in [*overrides(models, **changes), *sizes]),
    f"--workdir={folder / 'run'}",
  ]


def test_a_run_of_five_prompts(tiny_models, tmp_path, capsys):
  """On the 8 devices of the tests: 80 samples, 160 transitions. It may go on with other sizes."""
  (tmp_path / "five.txt").write_text("\n".join(f"picture {number}" for number in range(5)))
  assert main.main([*words(tiny_models, tmp_path), "--config.iterations=1"]) == 0
  said = capsys.readouterr().out.splitlines()
  chosen = "mesh.lanes = 8 (auto), rollout.chunk = 80 (auto), optimizer.microbatch = 160 (auto)"
  assert said[0].startswith(chosen)
  stored = stored_config.flatten(json.loads((tmp_path / "run" / "config.json").read_text()))
  assert [stored[field] for field in automatic.FIELDS] == [8, 80, 160]
  other = ["mesh.lanes=auto", "rollout.chunk=auto:40", "optimizer.microbatch=auto:16"]
  line = command_line.parse_argv(words(tiny_models, tmp_path, other)[:-1], "")
  config = session.resumed_config(line.config, tmp_path / "run", line.given)
  assert session.iterations_done(config, tmp_path / "run") == 1
  said = capsys.readouterr().out
  assert "resuming with config.rollout.chunk: 80 -> 40" in said and "config.mesh" not in said
  # Asked for again, the same sizes are no difference.
  line = command_line.parse_argv(words(tiny_models, tmp_path)[:-1], "")
  config = session.resumed_config(line.config, tmp_path / "run", line.given)
  assert session.iterations_done(config, tmp_path / "run") == 1
  assert "resuming with config.rollout" not in capsys.readouterr().out
