"""The demo: a supplied scene, its edges, and pictures that follow them; what ``make demo`` runs after the build.

    python demo/run.py --bundle bundles/demo-512x512 --output out/demo

Every picture comes from ``controlrt``'s command line in a process without PyTorch, which is checked; only the last
panel of the contact sheet is drawn by diffusers in eager PyTorch, with the same seed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from controlrt.demo import CONTROLNETS, MODEL_DIR

SCENE = Path(__file__).parent / "pictures" / "scene.png"
PROMPT = "a red star on a light blue background"
STEPS, GUIDANCE, SEED = 20, 7.5, 7
SCALES = (0.0, 0.5, 1.0)
CAPTION = 28

# refuses PyTorch in every process that draws: `import torch` fails there
BLOCKER = "import sys\nsys.modules.update(dict.fromkeys(['torch', 'diffusers', 'transformers', 'onnx']))\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo-512x512"))
    parser.add_argument("--output", type=Path, default=Path("out/demo"))
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    control = output / "control.png"
    with tempfile.TemporaryDirectory() as site:
        Path(site, "sitecustomize.py").write_text(BLOCKER)
        environment = {**os.environ, "PYTHONPATH": site}

        def controlrt(*words: str) -> None:
            print("$ controlrt " + " ".join(f"'{word}'" if " " in word else word for word in words), flush=True)
            subprocess.run([sys.executable, "-m", "controlrt.runtime.commands", *words], check=True, env=environment)

        controlrt("annotate", "canny", str(SCENE), "-o", str(control))
        for scale in SCALES:
            name = "picture.png" if scale == 1 else f"picture-scale-{scale:g}.png"
            controlrt(
                *("generate", str(arguments.bundle), "--prompt", PROMPT),
                *("--control", f"canny={control},scale={scale:g}"),
                *("--steps", str(STEPS), "--guidance-scale", str(GUIDANCE), "--seed", str(SEED)),
                *("-o", str(output / name)),
            )
    print("drawing the same with diffusers in eager PyTorch, to compare", flush=True)
    eager = draw_with_diffusers(Image.open(control))
    eager.save(output / "picture-eager-diffusers.png")
    panels = {"control (canny)": Image.open(control)}
    for scale in SCALES:
        name = "picture.png" if scale == 1 else f"picture-scale-{scale:g}.png"
        panels[f"controlrt, scale {scale:g}"] = Image.open(output / name)
    panels["eager diffusers, scale 1"] = eager
    contact_sheet(panels).save(output / "contact-sheet.png")
    difference = np.asarray(panels["controlrt, scale 1"], np.float64) - np.asarray(eager, np.float64)
    error = np.mean(difference**2)
    psnr = 10 * np.log10(255**2 / error) if error else np.inf
    print(f"controlrt against eager diffusers, same seed: PSNR {psnr:.1f} dB over the 8-bit pictures")
    print(f"see {output / 'contact-sheet.png'}")
    return 0


def draw_with_diffusers(control: Image.Image) -> Image.Image:
    """The picture at scale 1 by diffusers' own pipeline."""
    import diffusers
    import torch
    import transformers

    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    controlnet = diffusers.ControlNetModel.from_pretrained(CONTROLNETS["canny"])
    pipeline = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        MODEL_DIR, controlnet=controlnet, safety_checker=None
    ).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPT,
        control,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator("cpu").manual_seed(SEED),
    ).images[0]


def contact_sheet(panels: dict[str, Image.Image]) -> Image.Image:
    """The pictures side by side, each with its caption."""
    width, height = next(iter(panels.values())).size
    sheet = Image.new("RGB", (len(panels) * width, height + CAPTION), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (caption, picture) in enumerate(panels.items()):
        sheet.paste(picture, (column * width, CAPTION))
        draw.text((column * width + 8, 4), caption, fill="black", font_size=18)
    return sheet


if __name__ == "__main__":
    sys.exit(main())
