"""Out of memory in one line: real errors of XLA's CPU client, and the texts of other platforms."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from tiny_checkpoint import ROOT, overrides, tiny_config

from dancegrpo_jax import main
from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.compilation import ahead, inventory
from dancegrpo_jax.devices import chips, out_of_memory
from dancegrpo_jax.plan import planning
from dancegrpo_jax.plan.flops import Flops

GiB = 2**30
CONFIG = f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tiny"
# As they stand in issues of jax-ml/jax, openxla/xla, google-deepmind/gemma and others, and as JAX's
# CPU client writes them here: text, bytes requested, bytes available.
TEXTS = {
  "GPU": (
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes.\nBufferAssignment"
    " OOM Debugging.\nBufferAssignment stats:\n             parameter allocation:  372.76MiB",
    4770354232,
    None,
  ),
  "GPU, newer": (
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.3GiB.",
    12.3 * GiB,
    None,
  ),
  "GPU, a request": (
    "RESOURCE_EXHAUSTED: Failed to allocate request for 6.27GiB (6727663616B) on device ordinal 0",
    6.27 * GiB,
    None,
  ),
  "GPU, allocator": (
    "Allocator (GPU_0_bfc) ran out of memory trying to allocate 4.49GiB with freed_by_count=0.",
    4.49 * GiB,
    None,
  ),
  "GPU, no number": (
    "INTERNAL: Failed to load in-memory CUBIN: CUDA_ERROR_OUT_OF_MEMORY",
    None,
    None,
  ),
  "TPU, compiling": (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm."
    " Used 21.95G of 15.48G hbm. Exceeded hbm capacity by 6.47G.\n\nTotal hbm usage >= 22.47G:\n"
    "    reserved        530.00M",
    21.95 * GiB,
    15.48 * GiB,
  ),
  "TPU, a buffer": (
    "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 15.65G. That was"
    " not possible. There are 11.08G free.; (0x0x0_HBM0)",
    15.65 * GiB,
    11.08 * GiB,
  ),
  "TPU, a program": (
    "RESOURCE_EXHAUSTED: Attempting to reserve 6.48G at the bottom of memory. That was not"
    " possible. There are 6.78G free, 0B reserved, and 3.33G reservable.",
    6.48 * GiB,
    6.78 * GiB,
  ),
  "TPU, a kernel's memory": (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space vmem."
    " Used 32.42M of 16.00M vmem. Exceeded vmem capacity by 16.42M",
    None,
    None,
  ),
  "CPU": ("RESOURCE_EXHAUSTED: Out of memory allocating 123456 bytes.", 123456, None),
  "CPU, downstream": (
    "INTERNAL: Error dispatching computation: Out of memory allocating 4398046511104 bytes.",
    4398046511104,
    None,
  ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_xla_says(name):
  text, requested, available = TEXTS[name]
  shortage = out_of_memory.shortage(jax.errors.JaxRuntimeError(text))
  assert shortage.requested == (requested and pytest.approx(requested))
  assert shortage.available == (available and pytest.approx(available))
  assert shortage.message and "\n" not in shortage.message
  assert text.startswith(shortage.message[:40])


def test_what_the_host_says():
  with pytest.raises(MemoryError) as caught:
    bytearray(2**60)  # an exbibyte
  assert out_of_memory.shortage(caught.value) is not None
  numpy = MemoryError("Unable to allocate 128. TiB for an array with shape (17592186044416,)")
  assert out_of_memory.shortage(numpy).requested == 128 * 2**40


@pytest.mark.parametrize(
  "error",
  [
    jax.errors.JaxRuntimeError("INVALID_ARGUMENT: the shapes differ"),
    RuntimeError("Array has been deleted with shape=float32[3]."),
    ValueError("out of memory"),  # not a device's
  ],
)
def test_other_errors_stay_as_they_are(error):
  assert out_of_memory.shortage(error) is None
  with pytest.raises(type(error)) as caught, out_of_memory.explained():
    raise error
  assert caught.value is error


def test_a_remedy_says_what_the_config_has_and_leaves_out_what_it_did():
  full = tiny_config(optimizer__microbatch=16, model__remat=False)
  said = out_of_memory.remedy("update accumulate", full)
  assert said.startswith("a smaller optimizer.microbatch (now 16), model.remat = True, a lora.rank")
  adapters = {"lora__rank": 4, "lora__alpha": 4.0, "lora__targets": ".*to_q/kernel"}
  said = out_of_memory.remedy("update step", tiny_config(model__remat=True, **adapters))
  assert "remat" not in said and "lora" not in said and "optimizer.microbatch" in said
  for program in ("rollout", "decode", "score clip", "embed clip"):
    said = out_of_memory.remedy(program, full)
    assert said.startswith("a smaller rollout.chunk (now 16), or more devices")
  assert "(now" not in out_of_memory.remedy("update accumulate")


def test_a_tpu_s_own_words_come_before_what_the_device_has():
  found = out_of_memory.shortage(jax.errors.JaxRuntimeError(TEXTS["TPU, compiling"][0]))
  line = str(out_of_memory.OutOfMemory("decode", found, None, "no checkpoint was saved yet"))
  assert line == (
    "decode ran out of memory: it asked for 21.95 GiB, there is 15.48 GiB; use a smaller"
    " rollout.chunk, or more devices along mesh.fsdp with mesh.rules that split; no checkpoint was"
    " saved yet"
  )


def test_what_lies_beside_jax_has_another_remedy():
  """CUDA's libraries get what JAX has left: a smaller chunk alone may not help them."""
  found = out_of_memory.shortage(jax.errors.JaxRuntimeError(TEXTS["GPU, no number"][0]))
  line = str(out_of_memory.OutOfMemory("rollout", found))
  assert line.startswith("rollout ran out of memory: INTERNAL: Failed to load in-memory CUBIN")
  assert "use XLA_CLIENT_MEM_FRACTION=0.85" in line and "rollout.chunk" in line


# What really happens


def hungry(x: jax.Array) -> jax.Array:
  """4 TiB for 1024 numbers, on a CPU as anywhere."""
  many = jnp.broadcast_to(x[:, None], (1024, 2**30)) + jnp.arange(2**30, dtype=jnp.float32)[None]
  return jnp.sort(many, axis=0).sum(1)


def test_an_error_that_shows_up_later_has_the_name_of_its_program():
  """The wait is for a program that was given the result of the one that failed."""
  first = out_of_memory.Guarded("first", jax.jit(hungry))
  second = out_of_memory.Guarded("second", jax.jit(lambda x: jnp.sort(x).sum()))
  left = "the last good checkpoint is that of iteration 3"
  explained = out_of_memory.explained(None, lambda: left)
  with pytest.raises(out_of_memory.OutOfMemory) as caught, explained:
    between = first(jnp.ones(1024))
    jax.block_until_ready(second(between))
  assert caught.value.program == "first" and caught.value.shortage.requested == 4 * 2**40
  line = str(caught.value)
  assert line.startswith("first ran out of memory: it asked for 4.00 TiB, this machine has ")
  assert line.endswith(left) and "\n" not in line


def test_results_are_not_kept():
  """A guarded program holds nothing of what it has returned."""
  array = out_of_memory.Guarded("x", jax.jit(lambda x: x + 1))(jnp.ones(3))
  (reference,) = out_of_memory._started[-1][1]
  assert reference() is array
  del array
  assert reference() is None


def process(module: str, *flags: str) -> list[str]:
  """Lines on stderr of a command that must stop with exit code 2 and print nothing else."""
  command = [sys.executable, "-m", f"dancegrpo_jax.{module}", CONFIG, *flags]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
  )
  assert done.returncode == 2, done.stderr
  assert "Traceback" not in done.stderr
  return done.stderr.splitlines()


def test_a_rollout_that_is_too_large(tiny_models, tmp_path):
  """Four million samples at once."""
  changes = {
    "rollout__samples_per_prompt": 2**20,
    "rollout__chunk": 2**22,
    "optimizer__microbatch": 2**20,
  }
  flags = [f"--config.{word}" for word in overrides(tiny_models, **changes)]
  (line,) = process("main", *flags, f"--workdir={tmp_path / 'run'}")
  assert line.startswith("error: rollout ran out of memory: it asked for "), line
  assert "iB, this machine has " in line and "use a smaller rollout.chunk (now 4194304)" in line
  assert line.endswith("; no checkpoint was saved yet")


def test_a_sample_that_is_too_large(tiny_models, tmp_path):
  """Attention over 256 x 256 positions takes 16 GiB a head: 1 TiB for 16 images with guidance.

  XLA's CPU compiler (jaxlib 0.11.2) divides by zero where images are larger than that.
  """
  flags = [f"--config.{word}" for word in overrides(tiny_models, model__size=(2048, 2048))]
  out = tmp_path / "out"
  where = ["--checkpoint=base", "--prompt=x", "--samples=16", f"--out={out}"]
  (line,) = process("sample", *flags, *where)
  assert line.startswith("error: sample ran out of memory: it asked for ") and not out.exists()


def test_an_update_that_is_too_large_leaves_the_last_checkpoint(
  tiny_models, tmp_path, monkeypatch, capsys
):
  """In the second iteration, with XLA's own error, which the loop meets where it waits."""
  put_together, calls = ahead.put_together, []

  @jax.jit
  def too_much(sums):
    total = hungry(jnp.full(1024, sums.loss)).sum()
    return sums._replace(loss=sums.loss + total)

  def grown(*arguments):
    built = put_together(*arguments)

    def accumulate(*given):
      sums = built.update["accumulate"](*given)
      calls.append(None)
      return too_much(sums) if len(calls) == 2 else sums

    return built._replace(update=built.update | {"accumulate": accumulate})

  workdir = tmp_path / "run"
  flags = overrides(tiny_models, iterations=3, checkpoint__every=1, evaluation__every=0)
  argv = [CONFIG, *(f"--config.{word}" for word in flags), f"--workdir={workdir}"]
  monkeypatch.setattr(ahead, "put_together", grown)
  assert main.main(argv) == 2
  (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
  assert line.startswith("error: update ran out of memory: it asked for 4.00 TiB, this machine has")
  assert "optimizer.microbatch (now 16)" in line
  assert line.endswith("; the last good checkpoint is that of iteration 1")
  assert store.latest(workdir / "checkpoints") == 1
  assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 1


def test_plan_reads_the_same_texts():
  """A program that the compiler refuses is a row that says what it needs, beside what is kept."""
  text, requested, _ = TEXTS["TPU, compiling"]

  def refuse(*_):
    raise jax.errors.JaxRuntimeError(text)

  lowered = SimpleNamespace(lower=lambda: SimpleNamespace(compile=refuse))
  call = inventory.Call("update accumulate", SimpleNamespace(trace=lambda *_: lowered), (), 3)
  row = planning.compile_call(call, 1000, Flops(5.0), chips.CHIPS["TPU v5 lite"], 1)
  assert row.peak == pytest.approx(requested + 1000)
  assert row.problem.startswith("RESOURCE_EXHAUSTED: XLA:TPU")
