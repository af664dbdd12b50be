"""LoRAs merged into a checkpoint, against diffusers with the same LoRAs loaded beside the weights, not fused.

Both sides are float32; the bound is the project's own for latents, rounding alone gives about 1e-6.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity.eager import PROMPT, relative
from safetensors.torch import save_file

from controlrt.export import checkpoint
from controlrt.export.checkpoint import LoraSource
from controlrt.export.checkpoint.lora import merge_loras
from controlrt.runtime.errors import SourceError
from families import SIDE, Family, lora_tensors

BOUND = 1e-3
one_family = pytest.mark.parametrize("family", ["sd15"], indirect=True, scope="module")


def saved(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"} | (metadata or {})
    )
    return path


def lora(path: Path, weight: float = 1.0) -> LoraSource:
    return LoraSource(name=path.stem, path=path, weight=weight)


def latents(pipeline: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    drawn = pipeline(
        PROMPT,
        num_inference_steps=3,
        guidance_scale=5.0,
        width=SIDE,
        height=SIDE,
        generator=torch.Generator().manual_seed(4),
        output_type="latent",
    )
    return np.asarray(drawn.images)


def merged(family: Family, *loras: LoraSource) -> np.ndarray[Any, np.dtype[np.float32]]:
    """diffusers' picture by the merged weights."""
    pipeline = family.reference()
    parts = ("unet", "text_encoder", "text_encoder_2")
    merge_loras({part: model for part in parts if (model := getattr(pipeline, part, None)) is not None}, loras)
    return latents(pipeline)


@pytest.mark.parametrize(
    ("family", "layout", "alpha", "convolutions"),
    [
        ("sd15", "kohya", 2.0, True),
        ("sd15", "diffusers", None, False),
        ("sd15", "processor", None, False),
        ("sd15", "peft", None, True),
        ("sd21", "kohya", 3.0, False),
        ("sdxl", "sgm", 8.0, True),
        ("sdxl", "peft", None, False),
    ],
    indirect=["family"],
)
def test_layouts(family: Family, tmp_path: Path, layout: str, alpha: float | None, convolutions: bool) -> None:
    tensors = lora_tensors(family, layout, seed=1, alpha=alpha, convolutions=convolutions)
    reference = family.reference()
    base = latents(reference)
    reference.load_lora_weights(dict(tensors), adapter_name="one")
    reference.set_adapters(["one"], [0.7])
    expected = latents(reference)
    found = merged(family, lora(saved(tensors, tmp_path / "one.safetensors"), 0.7))
    assert relative(found, expected) < BOUND
    assert relative(base, expected) > 20 * BOUND


@one_family
def test_several_at_once(family: Family, tmp_path: Path) -> None:
    """With weights of either sign, on overlapping modules and of different ranks."""
    first = lora_tensors(family, "kohya", seed=1, alpha=2.0)
    second = lora_tensors(family, "peft", seed=2, rank=6, convolutions=True)
    reference = family.reference()
    reference.load_lora_weights(dict(first), adapter_name="one")
    reference.load_lora_weights(dict(second), adapter_name="two")
    reference.set_adapters(["one", "two"], [0.8, -0.4])
    files = [saved(first, tmp_path / "one.safetensors"), saved(second, tmp_path / "two.safetensors")]
    found = merged(family, lora(files[0], 0.8), lora(files[1], -0.4))
    assert relative(found, latents(reference)) < BOUND
    swapped = merged(family, lora(files[1], -0.4), lora(files[0], 0.8))
    assert relative(swapped, found) < 1e-5


@one_family
@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}])
def test_as_peft_saves_them(family: Family, tmp_path: Path, options: dict[str, bool]) -> None:
    """diffusers' own file of a trained adapter: alpha by module, DoRA, rank-stabilised scale and biases."""
    from peft import LoraConfig, get_peft_model_state_dict

    targets = ["to_q", "to_v", "ff.net.2", *([] if "lora_bias" in options else ["conv1"])]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, alpha_pattern={"to_v": 3}, **options)
    trained = family.reference()
    trained.unet.add_adapter(config, adapter_name="default")
    generator = torch.Generator().manual_seed(5)
    for name, parameter in trained.unet.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter += 0.3 * parameter.abs().mean().clamp(0.3) * torch.randn(parameter.shape, generator=generator)
    trained.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(trained.unet),
        unet_lora_adapter_metadata=trained.unet.peft_config["default"].to_dict(),
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    for weight in (1.0, 0.6):
        trained.set_adapters(["default"], [weight])
        expected = latents(trained)
        assert relative(merged(family, lora(file, weight)), expected) < BOUND
    assert relative(merged(family), expected) > 20 * BOUND


@one_family
def test_the_config_that_peft_puts_beside(family: Family, tmp_path: Path) -> None:
    tensors = {
        name.replace("unet.", "base_model.model."): tensor
        for name, tensor in lora_tensors(family, "peft", seed=3).items()
        if name.startswith("unet.")
    }
    file = saved(tensors, tmp_path / "adapter_model.safetensors")
    before = checkpoint.digest_lora(file)
    plain = checkpoint.load(family.model, {}, [lora(file, 0.5)]).unet.state_dict()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    assert checkpoint.digest_lora(file) != before
    doubled = checkpoint.load(family.model, {}, [lora(file, 0.25)]).unet.state_dict()
    for name, weight in plain.items():
        torch.testing.assert_close(doubled[name], weight)
    assert checkpoint.resolve_lora(str(tmp_path)) == file


LINEAR, CONVOLUTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.1.resnets.0.conv1"
NORM = "down_blocks.0.resnets.0.norm1"


def lycoris(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    """Tensors of one LyCORIS entry, and the change of a weight W at strength s by the papers' formulas, as s, W -> dW.

    Hadamard: dW = (B1 A1) * (B2 A2); Kronecker: dW = C (x) (B A); both times alpha / rank (arXiv 2309.14859, 3.2, 3.3).
    """
    rank, alpha = 3, 1.5
    out, into, *kernel = shape

    def random(*size: int) -> Any:
        return rng.normal(size=size, scale=0.5).astype(np.float32)

    def low_rank(rows: int, columns: int) -> tuple[Any, Any]:
        return random(rows, rank), random(rank, columns)

    width = into * int(np.prod(kernel))
    scale = alpha / rank
    if kind == "loha":
        (b1, a1), (b2, a2) = low_rank(out, width), low_rank(out, width)
        tensors = {"hada_w1_a": b1, "hada_w1_b": a1, "hada_w2_a": b2, "hada_w2_b": a2}
        change = scale * (b1 @ a1) * (b2 @ a2)
    elif kind == "loha_tucker":
        cores = [random(rank, rank, *kernel) for _ in range(2)]
        outs, ins = [random(rank, out) for _ in range(2)], [random(rank, into) for _ in range(2)]
        tensors = {"hada_t1": cores[0], "hada_w1_a": outs[0], "hada_w1_b": ins[0]}
        tensors |= {"hada_t2": cores[1], "hada_w2_a": outs[1], "hada_w2_b": ins[1]}
        change = scale * np.prod([_core(*three) for three in zip(cores, outs, ins, strict=True)], axis=0)
    elif kind == "lokr":
        c, whole = random(4, 2), random(out // 4, into // 2, *kernel)
        tensors = {"lokr_w1": c, "lokr_w2": whole}
        change = _kronecker(c, whole)  # whole matrices: alpha has no rank to go with
    elif kind == "lokr_low_rank":
        (c1, c2), (b, a) = low_rank(4, 2), low_rank(out // 4, width // 2)
        tensors = {"lokr_w1_a": c1, "lokr_w1_b": c2, "lokr_w2_a": b, "lokr_w2_b": a}
        change = scale * _kronecker(c1 @ c2, (b @ a).reshape(out // 4, into // 2, *kernel))
    elif kind == "lokr_tucker":
        c, core, rows, columns = (
            random(4, 2),
            random(rank, rank, *kernel),
            random(rank, out // 4),
            random(rank, into // 2),
        )
        tensors = {"lokr_w1": c, "lokr_t2": core, "lokr_w2_a": rows, "lokr_w2_b": columns}
        change = scale * _kronecker(c, _core(core, rows, columns))
    elif kind == "locon_tucker":
        core, rows, columns = random(rank, rank, *kernel), random(rank, out), random(rank, into)
        tensors = {"lora_mid.weight": core, "lora_up.weight": rows.T[..., None, None]}
        tensors["lora_down.weight"] = columns[..., None, None]
        change = scale * _core(core, rows, columns)
    elif kind == "full":
        change = random(*shape)
        tensors = {"diff": change}
    elif kind in ("ia3", "ia3_out"):
        factor = random(into if kind == "ia3" else out)
        tensors = {"weight": factor, "on_input": np.asarray(kind == "ia3")}
        along = (
            factor.reshape(1, into, *[1] * len(kernel))
            if kind == "ia3"
            else factor.reshape(out, *[1] * (len(kernel) + 1))
        )
        return tensors, lambda strength, weight: strength * along * weight
    else:  # decomposed along outputs or inputs: m (W + dW) / |W + dW|
        (b, a), axis = low_rank(out, width), 0 if kind == "dora_out" else 1
        magnitude = np.abs(random(*[shape[axis] if dim == axis else 1 for dim in range(len(shape))])) + 1
        tensors = {
            "lora_down.weight": a.reshape(rank, into, *kernel),
            "lora_up.weight": b.reshape(out, rank, *[1] * len(kernel)),
        }
        tensors |= {"dora_scale": magnitude, "alpha": np.float32(alpha)}
        change = scale * (b @ a).reshape(shape)

        def decomposed(strength: float, weight: Any) -> Any:
            moved = weight + strength * change
            others = tuple(dim for dim in range(len(shape)) if dim != axis)
            return magnitude * moved / np.sqrt((moved**2).sum(axis=others, keepdims=True)) - weight

        return tensors, decomposed
    return tensors | {"alpha": np.float32(alpha)}, lambda strength, _: strength * change.reshape(shape)


def _core(core: Any, rows: Any, columns: Any) -> Any:
    """A convolution from its core: sum over i, j of core[i, j] rows[i] columns[j]."""
    made = 0
    for i in range(core.shape[0]):
        for j in range(core.shape[1]):
            made = made + np.multiply.outer(np.multiply.outer(rows[i], columns[j]), core[i, j])
    return made


def _kronecker(c: Any, whole: Any) -> Any:
    """Blocks c[i, j] * whole, side by side in outputs and inputs."""
    return np.concatenate([np.concatenate([factor * whole for factor in row], axis=1) for row in c], axis=0)


KINDS = ("loha", "lokr", "lokr_low_rank", "full", "ia3", "ia3_out", "dora_out", "dora_in")
CORED = ("loha_tucker", "lokr_tucker", "locon_tucker")  # a core belongs to a convolution


@one_family
@pytest.mark.parametrize(
    ("kind", "module"),
    [*((kind, LINEAR) for kind in KINDS), *((kind, CONVOLUTION) for kind in (*KINDS, *CORED))],
)
def test_lycoris(base: Any, tmp_path: Path, kind: str, module: str) -> None:
    weight = base.unet.get_submodule(module).weight.numpy()
    tensors, change = lycoris(kind, weight.shape, np.random.default_rng(6))
    entry = "lora_unet_" + module.replace(".", "_")
    named = {f"{entry}.{role}": torch.from_numpy(np.asarray(value).copy()) for role, value in tensors.items()}
    file = saved(named, tmp_path / "file.safetensors")
    unet = copy.deepcopy(base.unet)
    merge_loras({"unet": unet}, [lora(file, 0.6)])
    expected = weight + change(0.6, weight.astype(np.float64))
    np.testing.assert_allclose(unet.get_submodule(module).weight.numpy(), expected, rtol=1e-5, atol=1e-5)
    others = {name: value for name, value in base.unet.state_dict().items() if not name.startswith(module)}
    after = unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in others.items())


@pytest.fixture(scope="module")
def base(family: Family) -> Any:
    return checkpoint.load(family.model, {})


@one_family
def test_differences_of_norms_and_biases(base: Any, family: Family, tmp_path: Path) -> None:
    entry = "lora_unet_" + NORM.replace(".", "_")
    tensors = {f"{entry}.w_norm": torch.randn(32), f"{entry}.b_norm": torch.randn(32)}
    tensors[f"lora_unet_{CONVOLUTION.replace('.', '_')}.diff_b"] = torch.randn(32)
    loaded = checkpoint.load(family.model, {}, [lora(saved(tensors, tmp_path / "norm.safetensors"), 0.5)])
    for part, name in (("weight", "w_norm"), ("bias", "b_norm")):
        before, after = (getattr(one.unet.get_submodule(NORM), part) for one in (base, loaded))
        torch.testing.assert_close(after, before + 0.5 * tensors[f"{entry}.{name}"])


@pytest.mark.parametrize("family", ["sd15"], indirect=True, scope="module")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda _: {"encoder.conv.weight": torch.zeros(2, 2)}, "is no LoRA: 1 of its 1 tensors .* encoder.conv.weight"),
        (
            lambda t: (
                t
                | {
                    "lora_unet_new_block.lora_down.weight": torch.zeros(4, 8),
                    "lora_unet_new_block.lora_up.weight": torch.zeros(8, 4),
                }
            ),
            r"1 of its \d+ entries match nothing there, such as lora_unet_new_block",
        ),
        (
            lambda t: (
                {
                    name: tensor
                    for name, tensor in t.items()
                    if not name.endswith("mid_block_attentions_0_proj_in.lora_up.weight") and "alpha" not in name
                }
                | {"lora_unet_conv_in.lora_up.weight": torch.zeros(32, 4, 1, 1)}
            ),
            "is damaged: lora_unet_conv_in has only up",
        ),
        (lambda t: t | {"lora_unet_conv_in.oft_blocks": torch.zeros(2)}, "holds OFT, which is not supported"),
        (lambda t: t | {"bundle_emb.cat.string_to_param.*": torch.zeros(2)}, "textual inversion"),
        (lambda t: t | {"network.epoch": torch.zeros(2)}, "is not supported: 1 of its .* network.epoch"),
        (lambda t: {n: torch.full_like(x, torch.nan) for n, x in t.items()}, "not finite"),
        (
            lambda t: {n: (x[:, :-1] if n.endswith("attn1_to_q.lora_down.weight") else x) for n, x in t.items()},
            "attn1_to_q: .* does not fit",
        ),
        (
            lambda _: {
                "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.zeros(2, 2),
                "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.zeros(2, 2),
            },
            "was made for Flux; the model is",
        ),
        (
            lambda t: {n.replace("lora_te_", "lora_te2_"): x for n, x in t.items()},
            "was made for Stable Diffusion XL; the model is a model with cross-attention of width 32",
        ),
    ],
)
def test_refusals(base: Any, family: Family, tmp_path: Path, change: Any, says: str) -> None:
    file = saved(change(lora_tensors(family, "kohya", seed=1, alpha=2.0)), tmp_path / "bad.safetensors")
    models = {"unet": base.unet, "text_encoder": base.text_encoders[0].model}
    with pytest.raises(SourceError, match=says) as caught:
        merge_loras(copy.deepcopy(models), [lora(file)])
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@one_family
def test_another_architecture_by_its_shapes(base: Any, tmp_path: Path) -> None:
    entry = f"lora_unet_{LINEAR.replace('.', '_').replace('attn1_to_q', 'attn2_to_k')}"
    tensors = {f"{entry}.lora_down.weight": torch.zeros(4, 1024), f"{entry}.lora_up.weight": torch.zeros(32, 4)}
    file = saved(tensors, tmp_path / "other.safetensors")
    with pytest.raises(SourceError, match=r"made for Stable Diffusion 2\.x; the model is a model with cross-attention"):
        merge_loras({"unet": base.unet}, [lora(file)])


@one_family
def test_damaged_files(base: Any, family: Family, tmp_path: Path) -> None:
    file = saved(lora_tensors(family, "kohya", seed=1), tmp_path / "cut.safetensors")
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(SourceError, match=r"cut\.safetensors is damaged"):
        merge_loras({"unet": base.unet}, [lora(file)])
    broken = saved(lora_tensors(family, "peft", seed=1), tmp_path / "meta.safetensors", {"lora_adapter_metadata": "{"})
    with pytest.raises(SourceError, match="header is no JSON object"):
        merge_loras({"unet": base.unet}, [lora(broken)])


def test_finding_files(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        saved({"x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(SourceError, match=r"name one of them: a\.safetensors, b\.safetensors"):
        checkpoint.resolve_lora(str(tmp_path))
    with pytest.raises(SourceError, match="does not exist"):
        checkpoint.resolve_lora(str(tmp_path / "c.safetensors"))
    with pytest.raises(SourceError, match="local cache say"):
        checkpoint.resolve_lora("nobody/nothing")
    with pytest.raises(SourceError, match="local cache say"):
        checkpoint.resolve_lora("nobody/nothing/loras/a.safetensors")
    (tmp_path / "a.safetensors").unlink()
    assert checkpoint.resolve_lora(str(tmp_path)) == tmp_path / "b.safetensors"
