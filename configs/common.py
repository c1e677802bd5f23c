"""Every value of a run, with its unit and its source.

The config file of a run starts from these values and changes some of them. The code has no other
defaults: those of the library's functions are the same, and a test compares them. Every field has a
comment above it or behind it. docs/make_configuration.py makes the page docs/configuration.md from
these comments, so each one is understood without the others.

Sources: [P] is the DanceGRPO paper, arXiv 2505.07818. [C] is its PyTorch code as of October 2025.
[F] is Flow-GRPO, arXiv 2505.05470.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference


def whole_or_auto(value: int) -> Any:
  """A field that holds a whole number, or "auto"."""
  return FieldReference(value, field_type=object)


def get_config() -> ConfigDict:
  """The defaults: the algorithm of the paper on the embedded emoji Stable Diffusion."""
  config = ConfigDict()
  # The name of the run. Without `--workdir` a run writes into `runs/<name>`.
  config.name = "common"
  # The root of every random stream of the run.
  config.seed = 0
  # GRPO iterations. One iteration is a rollout, its rewards and an update.
  config.iterations = 300
  # The run whose weights this one starts from, as WORKDIR or WORKDIR@ITERATION: averaged ones where
  # that run has an average. Optimizer and iterations begin anew. Empty means the model of
  # `model.checkpoint`. The flag `--init-from` of `main` sets it.
  config.init_from = ""

  # The generator, and how its networks are computed.
  config.model = ConfigDict(
    {
      # The kind of model: `stable_diffusion` (1.x and 2.x), `flux` (FLUX.1), `hunyuan_video`, or
      # `module:object` for a family of your own, for example `examples/own_family`.
      "family": "stable_diffusion",
      # Where the model is: a folder in diffusers' layout, a Hugging Face hub id, a folder that
      # `convert import` wrote, or `random:FOLDER`, which reads the config.json files of FOLDER and
      # draws the weights.
      "checkpoint": "assets/emoji-sd",
      # Whether pickled weights (.pt, .pth, .bin, .ckpt) may be read too, for the model and for the
      # rewards. They go through torch's weights_only loader, so torch must be installed.
      "allow_pickle": False,
      # The weight files to prefer where a checkpoint has several, for example `fp16`. Empty means
      # the full ones, and others only where those are missing.
      "variant": "",
      # Height and width of the samples, in pixels.
      "size": (32, 32),
      # Frames of a sample. Models of videos take 4 n + 1; 1 draws images.
      "frames": 1,
      # Frames a second of videos. Rewards get it, and files are played with it.
      "fps": 8.0,
      # How the autoencoder of videos decodes a sample: `none` (whole, which takes the most memory),
      # `time` (in tiles of 17 frames, which is what diffusers do by default) or `diffusers` (in
      # tiles of 256 x 256 pixels too). Tiles change pixels a little.
      "decode_tiling": "time",
      # Samples that each device decodes at once. It bounds the memory of decoding, which is large
      # for videos. 0 decodes all samples of a chunk at once.
      "decode_batch": 0,
      # What the denoiser computes in: `float32`, `bfloat16` or `float16`. Trained parameters and
      # the arithmetic of the sampler stay float32.
      "dtype": "float32",
      # What the frozen networks (text encoder, autoencoder, rewards) are stored and computed in:
      # `float32`, `bfloat16` or `float16`. Under LoRA the denoiser's own weights are stored in it
      # too.
      "frozen_dtype": "float32",
      # Whether the denoiser's blocks are recomputed in the backward pass. This takes less memory
      # and about a third more time.
      "remat": False,
      # The attention kernel: `auto` (what suits the devices), `xla`, `cudnn` (NVIDIA GPUs) or
      # `splash` (TPUs). `models/attention.py` has the table.
      "attention": "auto",
      # The precision of float32 products and convolutions in every network. `default` is the fast
      # one of the device: tf32 (10 bits of mantissa) on NVIDIA GPUs, bfloat16 on TPUs and float32
      # on CPUs. `highest` is float32 everywhere. Half precision is not changed.
      "matmul_precision": "default",
      # Whether the weights of equal blocks are stacked and one block of a kind is compiled: in
      # FLUX's transformer, T5 and every CLIP, the rewards' too. Deep networks compile many times
      # faster. The blocks of the UNet and of the autoencoder differ, so they stay as they are.
      "scan_blocks": False,
      # The number of tokens that a prompt is cut to: of T5 in FLUX (FLUX.1-schnell was made with
      # 256), of Llama in HunyuanVideo (made with 256). Stable Diffusion's tokenizer has its own.
      "text_length": 512,
      # HunyuanVideo only: the text around a prompt, `video`, `image`, or a text of your own with
      # one {} where the prompt goes.
      "template": "video",
    }
  )

  # The prompts.
  config.data = ConfigDict(
    {
      # The training prompts: a .txt file with one prompt a line, a .json, .jsonl, .csv or .tsv
      # file, or `tfds:NAME`.
      "prompts": "assets/prompts/emoji_run.txt",
      # Prompts that are never trained on. Training scores a few of them now and then, and
      # `evaluate` scores all of them. Empty means none.
      "held_out": "assets/prompts/emoji_held_out.txt",
      # Prompts of one iteration. Each gets `rollout.samples_per_prompt` samples.
      "prompts_per_iteration": 16,
      # The text of the unconditional branch, used where `sampler.guidance_scale` is above 1.
      "negative_prompt": "",
      # Whether each epoch takes the prompts in a new order, drawn from the seed.
      "shuffle": True,
      # Whether all prompts are encoded once and kept on disk, so that the text encoders are not in
      # memory while the model trains.
      "cache_embeddings": False,
      # The folder of that cache. Empty means `<workdir>/embeddings`. One folder may serve many
      # runs on the same prompts and encoders.
      "cache_folder": "",
    }
  )

  # How samples are drawn, which is also the policy that is trained.
  config.sampler = ConfigDict(
    {
      # The stochastic step: `ddim`, `dance`, `flow` or `cps`.
      "kind": "ddim",
      # How much noise a stochastic step adds: eta of `ddim` and `dance`, a of `flow` and `cps`. It
      # must be above 0, because a deterministic policy has no likelihood ratio.
      "noise_level": 1.0,
      # Denoising steps of a sample.
      "steps": 10,
      # The time shift of rectified flow: 1 is no shift and 0 takes what the checkpoint's scheduler
      # says. Diffusion models ignore it.
      "shift": 1.0,
      # Whether rollout and update cut the times that they give the network to whole numbers, as [C]
      # does. It is for comparisons with that code. Evaluations keep the exact times.
      "whole_times": False,
      # The scale of classifier-free guidance, in rollout and training alike. 1 turns it off.
      "guidance_scale": 1.0,
      # The guidance scale that a guidance-distilled model (FLUX.1-dev, HunyuanVideo) gets as an
      # input. Other models ignore it.
      "embedded_guidance": 3.5,
      # The last step: `ode` (deterministic, not trained), `x0hat` (jumps to the estimate of the
      # clean sample, not trained) or `sde` (stochastic and trained, as [C] does for Stable
      # Diffusion).
      "last_step": "ode",
      # The SDE window of MixGRPO, arXiv 2507.21802: steps inside it are stochastic and trained,
      # steps outside it are deterministic.
      "window": ConfigDict(
        {
          # The width of the window in steps. 0 makes every step stochastic that may be.
          "size": 0,
          # Where the window lies: `fixed`, `sliding` or `random`.
          "mode": "fixed",
          # The first step of a fixed window, and of a sliding window at iteration 0.
          "start": 0,
          # Steps by which a sliding window moves at a time.
          "stride": 1,
          # Iterations between two moves of a sliding window.
          "interval": 25,
          # The deterministic step outside the window: `ode` or `dpm++` (DPM-Solver++(2M)).
          "outside": "ode",
        }
      ),
    }
  )

  # How many samples are drawn.
  config.rollout = ConfigDict(
    {
      # Samples of one prompt. They are the group within which rewards are compared.
      "samples_per_prompt": 16,
      # Whether all samples of a prompt start from the same noise [P].
      "shared_noise": True,
      # Samples that one call of the rollout program draws. It bounds the memory of the rollout;
      # another size changes results by round-off at most. `auto` takes the largest that divides the
      # samples and fits, `auto:N` one of at most N.
      "chunk": whole_or_auto(256),
    }
  )

  # What is rewarded. The sections of the single rewards are read only for the rewards in `terms`.
  # A checkpoint there is a local folder or a hub id. A tokenizer is a folder or a hub id with
  # CLIP's vocab.json, merges.txt and tokenizer_config.json.
  config.reward = ConfigDict(
    {
      # The rewards as (term, weight) pairs. A term is `clip`, `hps`, `pickscore`, `aesthetic`,
      # `compressibility`, `moving_emoji/vq` (or `mq`, `ta`, `direction`), `remote`, or
      # `module:object` for a Python function or a kind of reward of your own, for example
      # `examples/own_reward`.
      "terms": (("clip", 1.0),),
      # How several rewards become one advantage: `advantages` (the weighted sum of the terms'
      # advantages [P]), `rewards` (the advantage of the weighted sum of rewards [F]) or `gdpo` (as
      # `advantages`, then normalised over the whole batch, arXiv 2601.05242).
      "combine": "advantages",
      # Terms that are scored and logged but never trained on, as names. A failed one masks no
      # sample.
      "watch": (),
      # Terms that become binary, as (term, value) pairs: the reward is 1 where the score is above
      # the value and 0 elsewhere.
      "thresholds": (),
      # The largest share of failed (NaN) rewards of an iteration. A larger share in each of
      # `failed_iterations` iterations in a row stops the run.
      "max_failed": 0.5,
      # Iterations in a row with more failed rewards than `max_failed` that stop the run; in a
      # shorter run, all of its iterations.
      "failed_iterations": 3,
      # Samples that one call of a reward on the host gets. A call that raises is repeated once, and
      # then costs the scores of these samples alone. 0 is all samples of a chunk.
      "slice": 16,
      # The cosine similarity of CLIP's embeddings of image and prompt.
      "clip": ConfigDict(
        {
          # A CLIP in transformers' layout (openai/clip-vit-large-patch14), or a local folder in
          # open_clip's layout with its open_clip_config.json (apple/DFN5B-CLIP-ViT-H-14,
          # laion/CLIP-ViT-H-14-laion2B-s32B-b79K).
          "checkpoint": "assets/emoji-clip",
          # The tokenizer. Empty means the checkpoint's own.
          "tokenizer": "",
          # Frames of a video that are scored, whose mean counts: `first`, `middle`, `all`, or a
          # number of evenly spaced ones as text. `sheet` scores one image with all frames in it.
          # `error` refuses videos.
          "frames": "error",
        }
      ),
      # HPS-v2.1, arXiv 2306.09341, the reward of the paper's main experiments [P].
      "hps": ConfigDict(
        {
          # The weight file, from `hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir
          # checkpoints/HPSv2`, which needs `model.allow_pickle`; or a .safetensors file with the
          # same tensor names.
          "checkpoint": "checkpoints/HPSv2/HPS_v2.1_compressed.pt",
          # The tokenizer. Empty means the folder of the weight file.
          "tokenizer": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
          # Frames of a video that are scored, whose mean counts: `first`, `middle`, `all`, or a
          # number of evenly spaced ones as text. `sheet` scores one image with all frames in it.
          # `error` refuses videos.
          "frames": "error",
        }
      ),
      # PickScore, arXiv 2305.01569.
      "pickscore": ConfigDict(
        {
          # A checkpoint in transformers' layout.
          "checkpoint": "yuvalkirstain/PickScore_v1",
          # The tokenizer; the default is its authors' choice. Empty means the checkpoint's own.
          "tokenizer": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
          # Frames of a video that are scored, whose mean counts: `first`, `middle`, `all`, or a
          # number of evenly spaced ones as text. `sheet` scores one image with all frames in it.
          # `error` refuses videos.
          "frames": "error",
        }
      ),
      # LAION's aesthetic predictor v2, in points from about 1 to 10.
      "aesthetic": ConfigDict(
        {
          # The CLIP that the predictor's head was trained on.
          "checkpoint": "openai/clip-vit-large-patch14",
          # The head: a .safetensors copy, or the .pth file itself (this one needs
          # `model.allow_pickle`), from
          # https://github.com/christophschuhmann/improved-aesthetic-predictor.
          "head": "checkpoints/sac+logos+ava1-l14-linearMSE.pth",
          # Frames of a video that are scored, whose mean counts: `first`, `middle`, `all`, or a
          # number of evenly spaced ones as text. `sheet` scores one image with all frames in it.
          # `error` refuses videos.
          "frames": "error",
        }
      ),
      # The size of the sample as a JPEG file, in units of 1000 bytes.
      "compressibility": ConfigDict(
        {
          # The quality of the JPEG, from 1 to 100.
          "quality": 95,
          # What the size is multiplied by: -1 rewards small files and 1 rewards large ones.
          "sign": -1.0,
          # Frames of a video that are scored, whose mean counts: `first`, `middle`, `all`, or a
          # number of evenly spaced ones as text. `sheet` scores one image with all frames in it.
          # `error` refuses videos.
          "frames": "error",
        }
      ),
      # The verifier of clips of moving emoji, in closed form.
      "moving_emoji": ConfigDict(
        {
          # The file with all emoji that clips are compared with; `python -m
          # dancegrpo_jax.data.moving_emoji --write-subjects=FOLDER` writes it.
          "subjects": "assets/emoji-video/subjects.png",
        }
      ),
      # A scorer in another process or on another machine; `benchmarks/reward_server.py` is one.
      "remote": ConfigDict(
        {
          # The address of the scorer, http or https.
          "url": "http://127.0.0.1:8000/",
          # Seconds that one attempt may take, from the connection to the end of the answer.
          "timeout": 60.0,
          # Attempts after the first one, with pauses of 0.5, 1, 2 ... seconds, at most 30.
          "retries": 2,
          # How images are sent: `png` (8 bits, base64 in JSON) or `npz` (numpy's format, for
          # video too).
          "format": "png",
        }
      ),
    }
  )

  # How rewards become advantages.
  config.advantage = ConfigDict(
    {
      # The standard deviation of a group: 1 is the unbiased one [C], 0 the one of DDPO and
      # Flow-GRPO.
      "ddof": 1,
      # A number that is added to the standard deviation [C].
      "eps": 1e-8,
      # Advantages are clipped to the range from -clamp to clamp [C].
      "clamp": 5.0,
      # The smallest difference between the largest and the smallest reward of a group that counts.
      # A group with less gets advantage 0.
      "min_spread": 1e-6,
      # The number of samples of each group that are trained: half are those with the highest
      # advantages, half those with the lowest. 0 trains all. The number of prompts should be a
      # multiple of data x fsdp, and must be for videos: no trajectory is then sent to another
      # device.
      "best_of": 0,
      # Statistics of each prompt's rewards over iterations (DDPO), in place of the group's.
      "history": ConfigDict(
        {
          # Rewards of a prompt that are remembered. 0 turns this off; DDPO takes 32.
          "size": 0,
          # Rewards of a prompt from which on its own statistics are used. Until then those of the
          # whole batch are.
          "min_count": 16,
        }
      ),
    }
  )

  # The loss.
  config.objective = ConfigDict(
    {
      # The algorithm: `grpo` (the clipped surrogate [P]) or `dppo` (a trust region in its place,
      # arXiv 2606.11025).
      "kind": "grpo",
      # How far the ratio may leave 1 before the surrogate is clipped. The default belongs to
      # `log_prob = "mean"` [C]. Only `grpo` reads it.
      "clip_range": 1e-4,
      # How the log-density of a step is reduced over the latent's dimensions: `mean` [C] or
      # `sum`, which is the true log-density.
      "log_prob": "mean",
      # Where the log-densities of the old policy come from: `recompute` (the update's own forward
      # pass, so that the ratio is exactly 1 before the first optimizer step) or `rollout`.
      "old_log_prob": "recompute",
      # Which stochastic steps of a sample are trained: `first`, `random`, `last` or `all`.
      "timesteps": "random",
      # The share of the stochastic steps that is trained, rounded down [P]. `all` ignores it.
      "timestep_fraction": 0.6,
      # Whether GRPO-Guard's ratio and weight are used, arXiv 2510.22319. For `grpo` alone.
      "guard": False,
      # Only `dppo` reads this section.
      "dppo": ConfigDict(
        {
          # In nats a latent dimension. A (sample, step) pair whose KL between the new and the old
          # policy is at least this is dropped where its ratio moves further from 1.
          "tau": 1e-4,
        }
      ),
      # A penalty on the distance from the base model.
      "kl": ConfigDict(
        {
          # The factor of the penalty in the loss. 0 turns it off.
          "weight": 0.0,
          # How the distance is measured: `exact`, `no_dt`, `mean_mse` or `velocity_mse`.
          "mode": "exact",
        }
      ),
    }
  )

  # AdamW, with the gradient clipped before it.
  config.optimizer = ConfigDict(
    {
      # The learning rate, constant after the warm-up [C].
      "learning_rate": 1e-5,
      # Optimizer steps over which the rate rises linearly from 0.
      "warmup_steps": 0,
      # The decay of Adam's first moment [C].
      "b1": 0.9,
      # The decay of Adam's second moment [C].
      "b2": 0.999,
      # A number that is added to the root of Adam's second moment [C].
      "eps": 1e-8,
      # The weight decay [C].
      "weight_decay": 1e-4,
      # The largest global norm of a gradient; larger ones are scaled down to it [C].
      "max_grad_norm": 1.0,
      # Optimizer steps of an iteration. The chosen (sample, step) pairs are shared out among them.
      "updates_per_iteration": 1,
      # (sample, step) pairs of one forward and backward pass. It bounds the memory of the update;
      # another size changes results by round-off at most. `auto` takes the largest that divides the
      # pairs of an optimizer step and fits, `auto:N` one of at most N.
      "microbatch": whole_or_auto(256),
      # Microbatches that one call of a program processes; 0 is all of them. Between two calls the
      # run reacts to SIGTERM. The value doesn't change the results.
      "microbatches_per_call": 0,
      # Optimizer steps with a non-finite loss or gradient that are skipped before the run stops.
      "max_skipped": 10,
    }
  )

  # Low-rank adapters over a frozen denoiser, arXiv 2106.09685.
  config.lora = ConfigDict(
    {
      # The rank of the adapters. 0 trains every weight of the denoiser instead.
      "rank": 0,
      # The product of the two factors is multiplied by `alpha / rank`.
      "alpha": 0.0,
      # A regular expression that matches the whole path of each dense kernel to adapt, for example
      # `.*attn.*/to_(q|k|v|out_0)/kernel`.
      "targets": "",
      # Adapters to start from, in the layout of diffusers, PEFT or kohya: a file or its folder.
      # Empty means new ones.
      "checkpoint": "",
    }
  )
  # A running average of the trained weights, in float32. Where there is one, samples, evaluations
  # and exports use it.
  config.ema = ConfigDict(
    {
      # The share of the old average that each optimizer step keeps. 0 turns the average off.
      "decay": 0.0,
    }
  )

  # How devices share the work.
  config.mesh = ConfigDict(
    {
      # Devices along the data axis, which splits the samples and copies the parameters. One of the
      # three axes may be -1: it takes the devices that the others leave.
      "data": -1,
      # Devices along the fsdp axis, which splits both the samples and the parameters.
      "fsdp": 1,
      # Devices along the tensor axis, which splits parameters inside a layer.
      "tensor": 1,
      # The number of lanes that the samples of an iteration are distributed to. A device has whole
      # lanes, so the number must be a multiple of data x fsdp. Results depend on the number of
      # lanes and not on the number of devices. `auto` takes the largest, up to 8 or the number
      # of devices, that the batches divide by; a run that goes on keeps its number.
      "lanes": whole_or_auto(8),
      # How the model's parameters are split, as (regular expression, partition) pairs. The first
      # expression that matches a parameter's whole path counts. `("...", "fsdp")` splits the
      # last dimension over fsdp.
      "rules": ((".*", ()),),
      # The same for the rewards' networks, whose paths begin with the reward's name, as in
      # `hps/clip/text_projection/kernel`.
      "reward_rules": ((".*", ()),),
    }
  )

  # Checkpoints of the run. A resumed run continues from the last one.
  config.checkpoint = ConfigDict(
    {
      # Iterations between two checkpoints. The last iteration is always saved.
      "every": 10,
      # Checkpoints that are kept.
      "keep": 2,
    }
  )

  # Evaluations inside training, and what `evaluate` does.
  config.evaluation = ConfigDict(
    {
      # Iterations between two evaluations, which sample fixed prompts with fixed noise for the
      # report and score held-out prompts. 0 evaluates at the start and at the end alone.
      "every": 10,
      # The number of training prompts in such an evaluation, and of held-out ones.
      "prompts": 8,
      # Denoising steps of the deterministic sampler, in evaluations, `sample` and `evaluate`.
      "steps": 20,
      # Samples of each prompt in `evaluate`.
      "samples": 4,
      # The seed of the noise of evaluations. Training never sees this noise.
      "seed": 1234,
      # Captions among which `evaluate` looks for the one nearest to an image (retrieval).
      "candidates": 200,
      # The prompts file that the other captions come from. Empty means the evaluated prompts.
      "distractors": "",
    }
  )

  # What a run writes besides its checkpoints and its report.
  config.logging = ConfigDict(
    {
      # Whether TensorBoard events are written into `<workdir>/tensorboard`.
      "tensorboard": True,
      # Whether metrics go to Weights & Biases too, which needs `pip install wandb`.
      "wandb": False,
      # The project there.
      "wandb_project": "dancegrpo_jax",
      # The user or team there. Empty means the default one of the account.
      "wandb_entity": "",
      # The group of runs there. Empty means none.
      "wandb_group": "",
      # The run's name there. Empty means the config's name.
      "wandb_name": "",
      # `online`, `offline` (files in the workdir, for `wandb sync`) or `disabled`. Empty means
      # that of the variable WANDB_MODE, or else `online`.
      "wandb_mode": "",
      # The (first, last) iteration that the profiler traces into `<workdir>/profile`. Empty
      # means none.
      "profile_steps": (),
      # Where compiled programs are kept, so that a second start compiles nothing: a folder, which
      # all processes of a run must see; `default`, the user's cache folder with at most 8 GiB, for
      # runs of a single process. Empty keeps none.
      "compilation_cache": "default",
    }
  )
  return config
