"""Every value of a run, with its unit and source. Run files change what differs; code holds no
defaults.

Sources: [P] DanceGRPO paper, arXiv 2505.07818. [C] its PyTorch code, 2025-10. [F] Flow-GRPO, arXiv
2505.05470.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """The shared defaults: the paper's algorithm on the embedded Stable Diffusion-like emoji
  model.
  """
  config = ConfigDict()
  config.name = "common"  # the default workdir is runs/<name>
  config.seed = 0  # root of every random stream
  config.iterations = 300  # GRPO iterations; one = rollout, reward, update

  config.model = ConfigDict(
    {
      "family": "stable_diffusion",  # pipelines/<family>.py
      # folder in diffusers layout, hub id, or random:FOLDER (config.json files, weights drawn)
      "checkpoint": "assets/emoji-sd",
      # read .pt, .pth and .bin weights too, of models and rewards, through torch's weights_only
      # loader
      "allow_pickle": False,
      "variant": "",  # which weight files to prefer, as "fp16"; "" = the full ones, then any
      "size": (32, 32),  # height, width of the samples, pixels
      # what the denoiser computes in; parameters and SDE arithmetic stay float32
      "dtype": "float32",
      # text encoder and decoder, stored and computed; the denoiser under lora, stored
      "frozen_dtype": "float32",
      # recompute the denoiser's blocks in the backward pass: less memory, a third more time
      "remat": False,
      # auto (what suits the devices) | xla | cudnn (GPU) | splash (TPU); models/attention.py has
      # the table
      "attention": "auto",
      # default | highest: of products and convolutions of float32 numbers, in every network.
      # "default" is what the device is fast at: tf32 (10 bits of mantissa) on NVIDIA GPUs, bfloat16
      # on TPUs, float32 on CPUs. Half precision isn't changed by it.
      "matmul_precision": "default",
      # Stack the weights of equal blocks and compile one of a kind: of FLUX's transformer, T5 and
      # every CLIP, the rewards' too. Deep networks compile many times faster; the UNet's and the
      # autoencoder's blocks differ and stay as they are.
      "scan_blocks": False,
      # flux: tokens of T5's text, padded and cut to (FLUX.1-schnell was made with 256)
      "text_length": 512,
    }
  )

  config.data = ConfigDict(
    {
      "prompts": "assets/prompts/emoji_run.txt",  # text file, one prompt a line, or a .json list
      # never trained on; evaluate.py scores them. "" = none
      "held_out": "assets/prompts/emoji_held_out.txt",
      "prompts_per_iteration": 16,  # P
      "negative_prompt": "",  # text of the unconditional branch when sampler.guidance_scale > 1
      "shuffle": True,  # a new order each epoch, from the seed
      # encode all prompts once, onto disk, and train without the text encoders in memory
      "cache_embeddings": False,
      # where to; "" = <workdir>/embeddings. One folder may serve many runs on the same prompts and
      # encoders
      "cache_folder": "",
    }
  )

  config.sampler = ConfigDict(
    {
      "kind": "ddim",  # ddim | dance | flow | cps: the stochastic step that is the policy
      "noise_level": 1.0,  # eta of ddim and dance, a of flow and cps; 0 would be deterministic
      "steps": 10,  # N, network calls a sample
      # time shift of rectified flow; 1 = none, 0 = as the checkpoint's scheduler says. Diffusion
      # models ignore it
      "shift": 1.0,
      "guidance_scale": 1.0,  # classifier-free guidance in rollout and training; 1 = off
      # the scale that a guidance-distilled model (FLUX.1-dev) is told; other models aren't
      "embedded_guidance": 3.5,
      # ode (deterministic, not trained) | x0hat | sde (as [C] for Stable Diffusion)
      "last_step": "ode",
      "window": ConfigDict(
        {  # MixGRPO, arXiv 2507.21802: stochastic and trained inside, deterministic outside
          "size": 0,  # steps; 0 = every policy step
          "mode": "fixed",  # fixed | sliding | random
          "start": 0,  # first step of a fixed window, and of a sliding one at iteration 0
          "stride": 1,  # sliding: steps forward each `interval`
          "interval": 25,  # sliding: iterations
          "outside": "ode",  # ode | dpm++
        }
      ),
    }
  )

  config.rollout = ConfigDict(
    {
      "samples_per_prompt": 16,  # G, the group
      "shared_noise": True,  # one initial noise for a group [P, section 3]
      "chunk": 256,  # samples that one call of the rollout program makes; bounds memory
    }
  )

  config.reward = ConfigDict(
    {
      "terms": (
        ("clip", 1.0),
        # (term, weight): clip | hps | pickscore | aesthetic | compressibility | remote |
        # module:function
      ),
      # advantages (sum of weighted advantages [P]) | rewards (normalise the weighted sum [F]) |
      # gdpo
      "combine": "advantages",
      "thresholds": (),  # (term, value): r = 1 where score > value, else 0
      "max_failed": 0.5,  # an iteration with a larger share of failed (NaN) rewards stops the run
      # The sections below are read for the rewards in `terms` alone. A checkpoint is a local folder
      # or a hub id; a tokenizer is a folder or hub id with CLIP's vocab.json, merges.txt and
      # tokenizer_config.json, "" the checkpoint's own.
      "clip": ConfigDict(
        {
          # transformers' CLIPModel layout (openai/clip-vit-large-patch14), or a local folder in
          # open_clip's, with open_clip_config.json (apple/DFN5B-CLIP-ViT-H-14,
          # laion/CLIP-ViT-H-14-laion2B-s32B-b79K)
          "checkpoint": "assets/emoji-clip",
          "tokenizer": "",
        }
      ),
      "hps": ConfigDict(
        {  # HPS-v2.1, arXiv 2306.09341; the paper's reward [P]
          # a file: `hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir checkpoints/HPSv2`
          # (needs model.allow_pickle), or a .safetensors with the same names
          "checkpoint": "checkpoints/HPSv2/HPS_v2.1_compressed.pt",
          "tokenizer": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        }
      ),
      "pickscore": ConfigDict(
        {  # arXiv 2305.01569
          "checkpoint": "yuvalkirstain/PickScore_v1",
          "tokenizer": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",  # its authors' choice
        }
      ),
      "aesthetic": ConfigDict(
        {  # LAION's predictor v2, points from 1 to 10
          "checkpoint": "openai/clip-vit-large-patch14",  # the CLIP that the head was trained on
          # a .safetensors copy, or the .pth itself (needs model.allow_pickle) from
          # https://github.com/christophschuhmann/improved-aesthetic-predictor
          "head": "checkpoints/sac+logos+ava1-l14-linearMSE.pth",
        }
      ),
      "compressibility": ConfigDict(
        {"quality": 95, "sign": -1.0}
      ),  # JPEG quality; -1 rewards small files
      "remote": ConfigDict(
        {  # a scorer of your own in another process or machine: benchmarks/reward_server.py
          "url": "http://127.0.0.1:8000/",
          "timeout": 60.0,  # seconds of one attempt
          "retries": 2,  # attempts after the first, 0.5, 1, 2 ... s apart
          "format": "png",  # png (8 bits, base64 in JSON) | npz (numpy, for video too)
        }
      ),
    }
  )

  config.advantage = ConfigDict(
    {
      "ddof": 1,  # 1 = unbiased std [C]; 0 as DDPO and Flow-GRPO
      "eps": 1e-8,  # added to the std [C]
      "clamp": 5.0,  # advantages are clipped to +-clamp [C]
      "min_spread": 1e-6,  # groups whose rewards differ by less get advantage 0
      "best_of": 0,  # k: train the k/2 best and k/2 worst of each group; 0 = all
      "history": ConfigDict(
        {"size": 0, "min_count": 16}
      ),  # per-prompt statistics over iterations (DDPO); size 0 = off, 32 there
    }
  )

  config.objective = ConfigDict(
    {
      # grpo (the clipped surrogate [P]) | dppo (a trust region, arXiv 2606.11025)
      "kind": "grpo",
      # grpo: c of the clipped surrogate, for the mean-reduced log-prob [C]; dppo clips nothing
      "clip_range": 1e-4,
      "log_prob": "mean",  # mean (over latent dimensions [C]) | sum (the true density)
      # recompute (the update's own forward: ratio exactly 1) | rollout (grpo without guard)
      "old_log_prob": "recompute",
      "timesteps": "random",  # first | random | last | all: which policy steps are trained
      "timestep_fraction": 0.6,  # share of the policy steps, rounded down [P]
      "guard": False,  # grpo: ratio and weight of GRPO-Guard, arXiv 2510.22319
      # dppo: a transition whose KL to the old policy, in nats a latent dimension, is at least tau is
      # dropped where its ratio moves further outwards
      "dppo": ConfigDict({"tau": 1e-4}),
      "kl": ConfigDict(
        {"weight": 0.0, "mode": "exact"}
      ),  # to the base model; exact | no_dt | mean_mse | velocity_mse
    }
  )

  config.optimizer = ConfigDict(
    {
      "learning_rate": 1e-5,  # constant after warm-up [C]
      "warmup_steps": 0,  # optimizer steps, linear from 0
      "b1": 0.9,
      "b2": 0.999,
      "eps": 1e-8,
      "weight_decay": 1e-4,
      "max_grad_norm": 1.0,  # global norm [C]
      "updates_per_iteration": 1,  # optimizer steps an iteration
      "microbatch": 256,  # transitions in one forward and backward pass
      # Microbatches that one call of a program goes through; 0 = all. Between two calls the run
      # hears SIGTERM. It changes nothing that is computed.
      "microbatches_per_call": 0,
      "max_skipped": 10,  # optimizer steps with a non-finite loss or gradient before the run stops
    }
  )

  config.lora = ConfigDict(
    # arXiv 2106.09685: train low-rank adapters over a frozen denoiser (stored in
    # model.frozen_dtype)
    {
      "rank": 0,  # 0 = train every weight
      "alpha": 0.0,  # the adapters count alpha / rank times
      # regex that matches the whole path of a dense kernel, as ".*attn.*/to_(q|k|v|out_0)/kernel"
      "targets": "",
      # adapters to start from, in PEFT's or diffusers' layout: a file or its folder; "" = new ones
      "checkpoint": "",
    }
  )
  config.ema = ConfigDict({"decay": 0.0})  # of the trained weights, float32; 0 = off

  config.mesh = ConfigDict(
    {
      "data": -1,  # devices along each axis; -1 takes what is left
      "fsdp": 1,
      "tensor": 1,
      # samples lie in this many fixed lanes; a multiple of every data x fsdp to be supported
      "lanes": 8,
      # (regex over a parameter's path, partition spec); the first match holds; ("...", "fsdp")
      # splits the last dimension
      "rules": ((".*", ()),),
      "reward_rules": (
        (".*", ()),
      ),  # the same for the rewards' networks; paths as hps/clip/text_projection/kernel
    }
  )

  config.checkpoint = ConfigDict({"every": 10, "keep": 2})  # iterations; checkpoints kept

  config.evaluation = ConfigDict(
    {
      # iterations between evaluations inside training: sample grid of the report, held-out score; 0
      # = start and end
      "every": 10,
      # of data.prompts in the grid, and as many of data.held_out that are scored with it
      "prompts": 8,
      "steps": 20,  # network calls of the deterministic sampler
      "samples": 4,  # evaluate.py: samples a prompt
      "seed": 1234,  # noise that training never sees
      # evaluate.py: captions among which an image must be nearest to its own (retrieval)
      "candidates": 200,
      # evaluate.py: prompts file that the others come from; "" = the evaluated prompts
      "distractors": "",
    }
  )

  config.logging = ConfigDict(
    {
      "tensorboard": True,
      "wandb": False,  # needs `pip install wandb`
      "profile_steps": (),  # (first, last) iteration traced into <workdir>/profile
      # Where compiled programs are kept, so that a second start compiles nothing: a folder, which
      # all processes of a run must see; "default" = the user's cache folder, at most 8 GiB, for
      # runs of a single process; "" = nowhere.
      "compilation_cache": "default",
    }
  )
  return config
