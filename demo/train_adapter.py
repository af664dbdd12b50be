"""Trains a T2I-Adapter for colour grids, on the demo model's weights.

    python demo/train_adapter.py --work build/demo    # takes a GPU where there is one
    build-engines --controlnet canny=demo/controlrt/demo/controlnet-canny --adapter color=build/demo/adapter-color

It is resumable as ``train.py`` is, climbs through picture sizes as its stages do, and writes a diffusers folder. A
T2I-Adapter (Mou et al. 2023, arXiv 2302.08453) sees the control picture alone, once, and adds features to the frozen
UNet's encoder. The timestep is drawn with a density that grows with it, as theirs is (section 3.4, non-uniform
sampling): colours and places are settled while a picture is noisy. Prompts are dropped in pairs, as in polishing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, T2IAdapter, UNet2DConditionModel
from networks import build_adapter, build_tokenizer, save_half
from torch import Tensor, nn
from train import Batches, Stage, encode_prompts, paired_loss, to_tensor
from transformers import CLIPTextModel

from controlrt.demo import MODEL_DIR

CONTROL = "color"
CLIMB = ((256, 8, 700), (512, 4, 600))
"""(picture side, batch, steps); each scene of a batch is seen with its prompt and without."""
CACHED_SCENES = {256: 1000, 512: 300}
RATE = 2e-3
NOISY = 0.5
"""Exponent of the timesteps' distribution: a density in proportion to the timestep."""


def train_adapter(work: Path, device: torch.device, seed: int) -> T2IAdapter:
    """The adapter, its UNet, text encoder and VAE frozen."""
    torch.manual_seed(seed + 30)
    tokenizer = build_tokenizer()
    vae = AutoencoderKL.from_pretrained(MODEL_DIR, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(MODEL_DIR, subfolder="unet")
    text_encoder = CLIPTextModel.from_pretrained(MODEL_DIR / "text_encoder")
    for frozen in (vae, unet, text_encoder):
        frozen.float().requires_grad_(False).to(device)
        frozen.to(memory_format=torch.channels_last)
    adapter = build_adapter().train().to(device, memory_format=torch.channels_last)
    batches = Batches(CLIMB, work, vae, device, seed, scenes=CACHED_SCENES, exponent=NOISY)
    stage = Stage(
        f"adapter-{CONTROL}",
        work,
        nn.ModuleDict({"adapter": adapter}),
        [{"params": list(adapter.parameters()), "lr": RATE}],
        batches.steps,
    )

    def loss_at(step: int) -> Tensor:
        scenes, size, noisy, timesteps, target = batches.draw(step)
        features = adapter((to_tensor([scene.control(CONTROL, size) for scene in scenes], device) + 1) / 2)

        def predict(noisy: Tensor, timesteps: Tensor, prompts: list[str]) -> Tensor:
            context = encode_prompts(tokenizer, text_encoder, prompts)
            repeated = [torch.cat([feature] * (len(noisy) // len(feature))) for feature in features]
            return unet(noisy, timesteps, context, down_intrablock_additional_residuals=repeated).sample

        return paired_loss(predict, scenes, noisy, timesteps, target, batches.scheduler)

    return stage.run(loss_at)["adapter"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="checkpoints and caches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    work = arguments.work / f"adapter-{arguments.seed}"
    work.mkdir(parents=True, exist_ok=True)
    output = arguments.work / f"adapter-{CONTROL}"
    save_half(train_adapter(work, torch.device(arguments.device), arguments.seed), output)
    print(f"wrote {output}", flush=True)


if __name__ == "__main__":
    main()
