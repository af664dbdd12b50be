"""Trains the demo model from a seed: VAE, then UNet with its text encoder, then the two ControlNets.

    python demo/train.py --work build/demo                     # about an hour and a half on two CPU cores
    python demo/train.py --work build/demo --polish --seed 7   # a round of polishing on the weights that ship

Every stage keeps a checkpoint in ``--work`` and resumes from it, so the command can be interrupted and repeated; a
stage whose steps are raised below goes on from where it ended. The last stage writes the diffusers folders that ship
with the package. Each stage climbs through picture sizes, cheap ones first, and ends at 512x512:

* VAE: L1 + L2 + a small KL term (Kingma & Welling 2014; Rombach et al. 2022, arXiv 2112.10752).
* UNet: v-prediction (Salimans & Ho 2022, arXiv 2202.00512), 10% prompt dropout for classifier-free guidance.
* ControlNets: copied encoder, zero convolutions, frozen UNet, 50% prompt dropout (Zhang et al. 2023, arXiv 2302.05543).

Polishing drops prompts in pairs: a scene is seen with its prompt and, under the same noise, without. Once a noisy
picture shows its own colours the prompt tells nothing more, and both should be predicted alike; what differs is error,
and guidance multiplies it. So the difference is a term of the loss, weighted by how much signal the picture has.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from networks import (
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    save_half,
    save_model,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from controlrt.demo import CONTROLNETS, MODEL_DIR
from controlrt.demo.scenes import Scene, sample_scene

CACHED_SCENES = {128: 8000, 256: 8000, 512: 1500}
PROMPT_DROPOUT = {"unet": 0.1, "controlnet": 0.5}
CHECKPOINT_SECONDS = 60

# (picture side, batch, steps) of each climb
VAE_STEPS = 900
UNET_CLIMB = ((128, 64, 1100), (256, 32, 450), (512, 16, 400))
CONTROLNET_CLIMB = {
    "mask": ((256, 32, 110), (512, 8, 280)),
    "canny": ((256, 16, 600), (512, 8, 420)),
}
ROUNDS = {
    0: {"unet": 500, "mask": 1900, "canny": 1400},
    7: {"unet": 400, "mask": 2400, "canny": 1600},
    8: {"unet": 0, "mask": 1200, "canny": 900},
}
"""Rounds of polishing by their seed, in the order in which they were run: steps of four pairs of 512x512 pictures."""
GAP_WEIGHT = 5.0


# ---------------------------------------------------------------------------------------------- running


class Stage:
    """Steps through one training stage: one-cycle rate, moving average, resumable checkpoints."""

    def __init__(self, name: str, work: Path, modules: nn.ModuleDict, groups: list[dict], steps: int):
        self.name, self.path, self.modules, self.steps = name, work / f"{name}.pt", modules, steps
        self.optimizer = torch.optim.AdamW(groups, weight_decay=1e-2, betas=(0.9, 0.99))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            max_lr=[group["lr"] for group in groups],
            total_steps=steps + 1,
            pct_start=0.08,
            final_div_factor=50,
        )
        self.average = copy.deepcopy(modules).requires_grad_(False)
        self.step = 0
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.step = state["step"]
            self.modules.load_state_dict(state["modules"])
            self.average.load_state_dict(state["average"])
            if "optimizer" in state:
                self.optimizer.load_state_dict(state["optimizer"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would have the optimizer stepped before
            for _ in range(self.step):
                self.schedule.step()

    def save(self) -> None:
        state = {
            "step": self.step,
            "modules": self.modules.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def run(self, loss_at: Callable[[int], Tensor]) -> nn.ModuleDict:
        """Trains to the last step and returns the moving average of the modules."""
        saved = started = time.monotonic()
        first, smooth = self.step, None
        while self.step < self.steps:
            loss = loss_at(self.step)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.step += 1
            decay = min(0.995, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for kept, new in zip(self.average.parameters(), self.modules.parameters(), strict=True):
                    kept.lerp_(new, 1 - decay)
            smooth = loss.item() if smooth is None else 0.97 * smooth + 0.03 * loss.item()
            if self.step % 25 == 0 or self.step == self.steps:
                seconds = (time.monotonic() - started) / (self.step - first)
                print(f"{self.name} {self.step}/{self.steps} loss {smooth:.4f} {seconds:.2f} s/step", flush=True)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()
        return self.average.eval()


def to_tensor(pictures: list[np.ndarray], device: torch.device) -> Tensor:
    """(n, h, w, 3) uint8 -> (n, 3, h, w) float32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(pictures)).to(device)
    return (stacked.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------- stages


def train_vae(work: Path, device: torch.device, seed: int) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae = build_vae().to(device, memory_format=torch.channels_last)
    stage = Stage(
        "vae", work, nn.ModuleDict({"vae": vae}), [{"params": list(vae.parameters()), "lr": 1.5e-3}], VAE_STEPS
    )

    def crop(rng: np.random.Generator) -> np.ndarray:
        """128x128 around a point of an outline."""
        picture = (scene := sample_scene(rng)).render(size := int(rng.choice([192, 256, 384, 512])))
        points = scene.shapes[0].points
        corner = points[rng.integers(len(points))] * size - rng.uniform(16, 112, size=2)
        x, y = np.clip(corner, 0, size - 128).astype(int)
        return picture[y : y + 128, x : x + 128]

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng([seed, 1, step])
        torch.manual_seed(seed * 1_000_003 + step)
        kind = rng.choice(3, p=[0.7, 0.2, 0.1])  # normalization statistics differ between crops and whole scenes
        if kind == 0:
            pictures = [crop(rng) for _ in range(16)]
        else:
            pictures = [sample_scene(rng).render(256 * int(kind)) for _ in range({1: 4, 2: 1}[int(kind)])]
        x = to_tensor(pictures, device)
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        return error.abs().mean() + 2 * error.square().mean() + 1e-5 * posterior.kl().mean() / (x.shape[-1] / 8) ** 2

    trained = stage.run(loss_at)["vae"]
    with torch.no_grad():
        rng = np.random.default_rng([seed, 2])
        x = to_tensor([sample_scene(rng).render(512) for _ in range(16)], device)
        means = torch.cat([trained.encode(part).latent_dist.mean for part in x.split(4)])
        decoded = torch.cat([trained.decode(part).sample for part in means.split(4)]).clamp(-1, 1)
        psnr = -10 * torch.log10(((decoded - x) / 2).square().mean())
        print(f"vae: {psnr:.1f} dB on unseen 512x512 scenes, latent std {means.std():.3f}", flush=True)
    trained.register_to_config(scaling_factor=round(1 / means.std().item(), 5))
    return trained


def scene_at(size: int, index: int, seed: int) -> Scene:
    """Training scene number ``index`` of the cache for one picture size."""
    return sample_scene(np.random.default_rng([seed, 3, size, index]))


def cache_latents(work: Path, vae: AutoencoderKL, size: int, count: int, device: torch.device, seed: int) -> Tensor:
    """Scaled latents of the first ``count`` training scenes at one size: (count, 4, size/8, size/8), float16."""
    path = work / f"latents-{size}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    batch, parts = max(1, 16 * 128 * 128 // size**2), []
    with torch.no_grad():
        for start in range(0, count, batch):
            scenes = [scene_at(size, i, seed) for i in range(start, min(start + batch, count))]
            means = vae.encode(to_tensor([scene.render(size) for scene in scenes], device)).latent_dist.mean
            parts.append((means * vae.config.scaling_factor).half().cpu())
    latents = torch.cat(parts)
    partial = path.with_suffix(".partial")
    torch.save(latents, partial)
    partial.replace(path)
    print(f"cached {len(latents)} latents at {size}x{size}", flush=True)
    return latents


class Batches:
    """Draws training batches along a climb of picture sizes, the same at every step for one seed."""

    def __init__(
        self,
        climb: tuple[tuple[int, int, int], ...],
        work: Path,
        vae: AutoencoderKL,
        device: torch.device,
        seed: int,
        *,
        scenes: Mapping[int, int] = CACHED_SCENES,
        exponent: float = 0.8,
    ):
        self.climb, self.device, self.seed, self.exponent = climb, device, seed, exponent
        self.latents = {size: cache_latents(work, vae, size, scenes[size], device, seed) for size, _, _ in climb}
        self.scheduler = build_scheduler()

    @property
    def steps(self) -> int:
        return sum(steps for _, _, steps in self.climb)

    def _stage(self, step: int) -> tuple[int, int]:
        """Picture side and batch at ``step`` of the climb."""
        for size, batch, steps in self.climb:
            if step < steps:
                return size, batch
            step -= steps
        raise ValueError(f"the climb has only {self.steps} steps")

    def draw(self, step: int) -> tuple[list[Scene], int, Tensor, Tensor, Tensor]:
        """Scenes, picture size, noisy latents, timesteps and the v target of one step."""
        size, batch = self._stage(step)
        rng = np.random.default_rng([self.seed, 4, step])
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        rows = rng.integers(len(self.latents[size]), size=batch)
        latents = self.latents[size][rows].float()
        noise = torch.randn(latents.shape, generator=generator)
        # stratified, more weight on noisy timesteps, where layout is decided
        level = (np.arange(batch) + rng.random(batch)) / batch
        timesteps = torch.from_numpy((1000 * level**self.exponent).astype(np.int64).clip(0, 999))
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        scenes = [scene_at(size, int(row), self.seed) for row in rows]
        channels_last = noisy.to(self.device, memory_format=torch.channels_last)
        return scenes, size, channels_last, timesteps.to(self.device), target.to(self.device)


def drop_prompts(scenes: list[Scene], step: int, seed: int, dropout: float) -> list[str]:
    rng = np.random.default_rng([seed, 5, step])
    return ["" if rng.random() < dropout else scene.prompt for scene in scenes]


def paired_loss(
    predict: Callable[[Tensor, Tensor, list[str]], Tensor],
    scenes: list[Scene],
    noisy: Tensor,
    timesteps: Tensor,
    target: Tensor,
    scheduler: DDIMScheduler,
) -> Tensor:
    """Squared error with and without prompts, and of one against the other by the share of signal."""
    prompts = [scene.prompt for scene in scenes] + [""] * len(scenes)
    predicted = predict(torch.cat([noisy] * 2), torch.cat([timesteps] * 2), prompts)
    with_prompt, without = predicted.chunk(2)
    signal = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    gap = (signal * (with_prompt - without).square().mean((1, 2, 3))).mean()
    return F.mse_loss(predicted, torch.cat([target] * 2)) + GAP_WEIGHT * gap


def encode_prompts(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: list[str]) -> Tensor:
    ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return text_encoder(ids.to(text_encoder.device))[0]


def polishing(seed: int, part: str) -> tuple[tuple[int, int, int], ...]:
    """The climb of one part in a round of polishing, all of it at full size."""
    return ((512, 4, ROUNDS[seed][part]),)


def train_unet(
    work: Path, vae: AutoencoderKL, device: torch.device, seed: int, polish: bool
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    torch.manual_seed(seed + 10)
    tokenizer = build_tokenizer()
    if polish:
        unet = UNet2DConditionModel.from_pretrained(MODEL_DIR, subfolder="unet").float().train()
        text_encoder = CLIPTextModel.from_pretrained(MODEL_DIR / "text_encoder").float().train()
    else:
        unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    unet = unet.to(device, memory_format=torch.channels_last)
    text_encoder = text_encoder.to(device)
    batches = Batches(polishing(seed, "unet") if polish else UNET_CLIMB, work, vae, device, seed)
    rate = 4e-4 if polish else 1.5e-3
    groups = [
        {"params": list(unet.parameters()), "lr": rate},
        {"params": list(text_encoder.parameters()), "lr": rate},
    ]
    modules = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    stage = Stage("unet-polish" if polish else "unet", work, modules, groups, batches.steps)

    def predict(noisy: Tensor, timesteps: Tensor, prompts: list[str]) -> Tensor:
        return unet(noisy, timesteps, encode_prompts(tokenizer, text_encoder, prompts)).sample

    def loss_at(step: int) -> Tensor:
        scenes, _, noisy, timesteps, target = batches.draw(step)
        if polish:
            return paired_loss(predict, scenes, noisy, timesteps, target, batches.scheduler)
        prompts = drop_prompts(scenes, step, seed, PROMPT_DROPOUT["unet"])
        return F.mse_loss(predict(noisy, timesteps, prompts), target)

    trained = stage.run(loss_at)
    return trained["unet"], trained["text_encoder"]


def train_controlnet(
    control: str,
    work: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    device: torch.device,
    seed: int,
    polish: bool,
) -> ControlNetModel:
    torch.manual_seed(seed + 20)
    tokenizer = build_tokenizer()
    unet = unet.requires_grad_(False)
    if polish:
        controlnet = ControlNetModel.from_pretrained(CONTROLNETS[control]).float()
    else:
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 32, 64))
    controlnet = controlnet.train().requires_grad_(True).to(device, memory_format=torch.channels_last)
    batches = Batches(polishing(seed, control) if polish else CONTROLNET_CLIMB[control], work, vae, device, seed)
    fresh = [
        p
        for name, p in controlnet.named_parameters()
        if name.startswith(("controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block"))
    ]
    copied = [p for p in controlnet.parameters() if all(p is not other for other in fresh)]
    rate = 4e-4 if polish else 1e-3
    groups = [{"params": fresh, "lr": 2 * rate}, {"params": copied, "lr": rate}]
    name = f"controlnet-{control}" + ("-polish" if polish else "")
    stage = Stage(name, work, nn.ModuleDict({"controlnet": controlnet}), groups, batches.steps)

    def loss_at(step: int) -> Tensor:
        scenes, size, noisy, timesteps, target = batches.draw(step)
        hint = (to_tensor([scene.control(control, size) for scene in scenes], device) + 1) / 2

        def predict(noisy: Tensor, timesteps: Tensor, prompts: list[str]) -> Tensor:
            with torch.no_grad():
                context = encode_prompts(tokenizer, text_encoder, prompts)
            hints = torch.cat([hint] * (len(noisy) // len(hint)))
            down, mid = controlnet(noisy, timesteps, context, controlnet_cond=hints, return_dict=False)
            return unet(
                noisy, timesteps, context, down_block_additional_residuals=down, mid_block_additional_residual=mid
            ).sample

        if polish:
            return paired_loss(predict, scenes, noisy, timesteps, target, batches.scheduler)
        prompts = drop_prompts(scenes, step, seed, PROMPT_DROPOUT["controlnet"])
        return F.mse_loss(predict(noisy, timesteps, prompts), target)

    return stage.run(loss_at)["controlnet"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="checkpoints and caches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--polish", action="store_true", help="go on from the weights that ship, at 512x512")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device, seed = torch.device(arguments.device), arguments.seed
    polish: bool = arguments.polish
    if polish and seed not in ROUNDS:
        parser.error(f"no round of polishing has seed {seed}; there are: {', '.join(map(str, ROUNDS))}")
    work = arguments.work / (f"polish-{seed}" if polish else f"seed-{seed}")
    work.mkdir(parents=True, exist_ok=True)
    if polish:
        vae = AutoencoderKL.from_pretrained(MODEL_DIR, subfolder="vae").float().to(device)
    else:
        vae = train_vae(work, device, seed)
    vae = vae.requires_grad_(False)
    unet, text_encoder = train_unet(work, vae, device, seed, polish)
    save_model(vae, unet, text_encoder)
    for control in ("mask", "canny"):
        controlnet = train_controlnet(control, work, vae, unet, text_encoder, device, seed, polish)
        save_half(controlnet, CONTROLNETS[control])
        print(f"wrote {CONTROLNETS[control].name}", flush=True)


if __name__ == "__main__":
    main()
