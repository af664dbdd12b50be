"""Prompts against diffusers and transformers in eager PyTorch: layers left out, learned words, weights, chunks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from parity.eager import PROMPT, check_same, hints, relative
from safetensors.torch import save_file

from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.errors import ParameterError, SourceError, UserError
from controlrt.runtime.prompts import Encoding
from controlrt.runtime.tokenizer import PromptTruncatedWarning
from families import SIDE, Family

BOUND = 1e-4
"""Of embeddings; rounding alone gives about 1e-6."""

on = {
    name: pytest.mark.parametrize("family", [name], indirect=True, scope="module") for name in ("sd15", "sd21", "sdxl")
}


def embeds(compiled: ControlNetPipeline, prompt: str, **encoding: Any) -> dict[str, Any]:
    return compiled._conditioner.prompts.encode(prompt, Encoding(**encoding))


def encoded(
    reference: Any, texts: Sequence[str], weights: NDArray[np.float32] | None = None
) -> dict[str, torch.Tensor]:
    """transformers' embeddings of chunks, side by side, and XL's pooled output of the first.

    Args:
        reference: diffusers' pipeline, which lends its text encoders.
        texts: each fits into one chunk.
        weights: (chunks, 77): the web UI's rule, for each encoder by itself: token embeddings times their weights, and
            then all of a chunk times what restores the mean.
    """
    found = {}
    sides = []
    xl = hasattr(reference, "text_encoder_2")
    for suffix in ("", "_2") if xl else ("",):
        tokenizer, encoder = getattr(reference, f"tokenizer{suffix}"), getattr(reference, f"text_encoder{suffix}")
        ids = tokenizer(list(texts), padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        made = encoder(ids.input_ids, output_hidden_states=True)
        states = made.hidden_states[-2] if xl else made.last_hidden_state
        if weights is not None:
            weighted = states * torch.from_numpy(weights)[..., None]
            states = weighted * (states.mean((1, 2), True) / weighted.mean((1, 2), True))
        sides.append(states.flatten(0, 1)[None])
        if suffix:
            found["pooled_prompt_embeds"] = made.text_embeds[:1]
    return {"prompt_embeds": torch.cat(sides, dim=-1), **found}


def check_embeds(found: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    assert relative(found["prompt_embeds"], expected["prompt_embeds"].numpy()) < BOUND
    if "text_embeds" in found:
        assert relative(found["text_embeds"], expected["pooled_prompt_embeds"].numpy()) < BOUND


def check_drawn(pipeline: ControlNetPipeline, reference: Any, ours: dict[str, Any], theirs: dict[str, Any]) -> Any:
    """Draws with control on both sides, and gives our latents."""
    (hint,) = hints(SIDE, 1)
    shared = {"num_inference_steps": 3, "guidance_scale": 6.0, "output_type": "latent"}
    expected = reference(image=hint, generator=torch.Generator("cpu").manual_seed(7), **shared, **theirs).images
    found = pipeline(image={"first": hint}, seed=7, width=SIDE, height=SIDE, **shared, **ours).images
    check_same(pipeline, found, reference, expected)
    return found


@on["sd15"]
@pytest.mark.parametrize("clip_skip", [0, 1, 2, 3])
def test_clip_skip(compiled: ControlNetPipeline, family: Family, clip_skip: int) -> None:
    expected = skipping(family.reference(), PROMPT, clip_skip).numpy()
    assert relative(embeds(compiled, PROMPT, clip_skip=clip_skip)["prompt_embeds"], expected) < BOUND


def skipping(reference: Any, prompt: str, clip_skip: int) -> torch.Tensor:
    """diffusers' rule, spelled out: its own code asks for a ``text_model`` that transformers 5 no longer has."""
    ids = reference.tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    states = reference.text_encoder(ids.input_ids, output_hidden_states=True).hidden_states
    return reference.text_encoder.final_layer_norm(states[-(clip_skip + 1)])


@on["sdxl"]
@pytest.mark.parametrize("clip_skip", [None, 0, 1, 2])
def test_clip_skip_xl(compiled: ControlNetPipeline, family: Family, clip_skip: int | None) -> None:
    """diffusers takes None for the last layer but one, and counts on from there."""
    expected, _, pooled, _ = family.reference().encode_prompt(
        PROMPT, device="cpu", do_classifier_free_guidance=False, clip_skip=clip_skip
    )
    found = embeds(compiled, PROMPT, clip_skip=clip_skip or 0)
    assert relative(found["prompt_embeds"], expected.numpy()) < BOUND
    assert relative(found["text_embeds"], pooled.numpy()) < BOUND


@on["sd15"]
@pytest.mark.parametrize(("syntax", "of_the_negative"), [("plain", None), ("webui", 2)])
def test_clip_skip_draws_as_diffusers(
    compiled: ControlNetPipeline, family: Family, syntax: str, of_the_negative: int | None
) -> None:
    """diffusers leaves layers out for the prompt alone; the web UI, which has no pipeline here, for both."""
    reference = family.reference("first")
    if of_the_negative is None:
        _, negative = reference.encode_prompt("", "cpu", 1, True, "a moon")
    else:
        negative = skipping(reference, "a moon", of_the_negative)
    embeddings = {"prompt_embeds": skipping(reference, PROMPT, 2), "negative_prompt_embeds": negative}
    said = {"prompt": PROMPT, "negative_prompt": "a moon"}
    ours = {**said, "prompt_syntax": syntax}
    found = check_drawn(compiled, reference, {**ours, "clip_skip": 2}, embeddings)
    assert relative(check_drawn(compiled, reference, ours, said), found) > 1e-3


@on["sdxl"]
def test_clip_skip_draws_as_diffusers_xl(compiled: ControlNetPipeline, family: Family) -> None:
    said = {"prompt": PROMPT, "negative_prompt": "a moon"}
    reference = family.reference("first")
    found = check_drawn(compiled, reference, {**said, "clip_skip": 1}, {**said, "clip_skip": 1})
    assert relative(check_drawn(compiled, reference, said, said), found) > 1e-3


@on["sdxl"]
def test_clip_skip_of_the_prompt_alone_xl(compiled: ControlNetPipeline, family: Family) -> None:
    _, expected, _, pooled = family.reference().encode_prompt(
        PROMPT, device="cpu", negative_prompt="a moon", clip_skip=1
    )
    found = embeds(compiled, "a moon", **vars(Encoding(clip_skip=1).of_negatives))
    assert relative(found["prompt_embeds"], expected.numpy()) < BOUND
    assert relative(found["text_embeds"], pooled.numpy()) < BOUND


@on["sd15"]
@pytest.mark.parametrize("clip_skip", [-1, 4, 1.0, True])
def test_layers_that_are_not_there(compiled: ControlNetPipeline, family: Family, clip_skip: Any) -> None:
    del family
    with pytest.raises(ParameterError, match=r"clip_skip .* from 0 to 3"):
        compiled(PROMPT, num_inference_steps=1, clip_skip=clip_skip)


@on["sd15"]
def test_learned_words(compiled: ControlNetPipeline, family: Family, tmp_path: Path) -> None:
    torch.manual_seed(5)
    vectors = {"<cat>": torch.randn(1, 32), "<style>": torch.randn(3, 32)}
    reference = family.reference("first")
    for token, tensor in vectors.items():
        reference.load_textual_inversion({token: tensor}, token=token)
        file = tmp_path / f"{token.strip('<>')}.safetensors"
        save_file({"emb_params": tensor}, file)
        compiled.load_textual_inversion(file, token)
    for prompt in ("a red <cat> star", "<style>", "blue <style> moon and <cat>"):
        written = reference.maybe_convert_prompt(prompt, reference.tokenizer)
        check_embeds(embeds(compiled, prompt), encoded(reference, [written]))
    found = check_drawn(compiled, reference, {"prompt": "a <style> moon"}, {"prompt": "a <style> moon"})
    assert relative(check_drawn(compiled, reference, {"prompt": "a moon"}, {"prompt": "a moon"}), found) > 1e-3
    with pytest.raises(ParameterError, match=r"it stands for .*cat\.safetensors already"):
        compiled.load_textual_inversion(tmp_path / "cat.safetensors", "<cat>")
    with pytest.raises(ParameterError, match="vocabulary does not have"):
        compiled.load_textual_inversion(tmp_path / "cat.safetensors", "<|endoftext|>")


@on["sd15"]
def test_files_that_are_no_learned_words(compiled: ControlNetPipeline, family: Family, tmp_path: Path) -> None:
    del family
    save_file({"emb_params": torch.zeros(1, 48)}, tmp_path / "other.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"no")
    torch.save({"string_to_param": {"*": torch.zeros(1, 32)}}, tmp_path / "pickled.pt")
    for name, says in (
        ("other.safetensors", "vectors of 48 values, text_encoder takes 32"),
        ("damaged.safetensors", "damaged"),
        ("pickled.pt", "pickled"),
        ("missing.safetensors", "does not exist"),
    ):
        with pytest.raises(SourceError, match=says):
            compiled.load_textual_inversion(tmp_path / name, "<new>")
    assert "<new>" not in compiled._conditioner.prompts.embeddings


@on["sdxl"]
def test_learned_words_of_both_encoders(compiled: ControlNetPipeline, family: Family, tmp_path: Path) -> None:
    torch.manual_seed(6)
    vectors = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 48)}
    save_file(vectors, tmp_path / "pair.safetensors")
    compiled.load_textual_inversion(tmp_path / "pair.safetensors", "<pair>")
    reference = family.reference("first")
    for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = getattr(reference, f"text_encoder{suffix}"), getattr(reference, f"tokenizer{suffix}")
        reference.load_textual_inversion(
            {"<pair>": vectors[key]}, token="<pair>", text_encoder=encoder, tokenizer=tokenizer
        )
    expected, _, pooled, _ = reference.encode_prompt("a <pair> moon", device="cpu", do_classifier_free_guidance=False)
    check_embeds(embeds(compiled, "a <pair> moon"), {"prompt_embeds": expected, "pooled_prompt_embeds": pooled})
    found = check_drawn(compiled, reference, {"prompt": "a <pair> moon"}, {"prompt": "a <pair> moon"})
    assert relative(check_drawn(compiled, reference, {"prompt": "a moon"}, {"prompt": "a moon"}), found) > 1e-3


@on["sdxl"]
def test_learned_words_go_by_their_names(compiled: ControlNetPipeline, family: Family, tmp_path: Path) -> None:
    del family
    fits, other = torch.zeros(1, 32), torch.zeros(1, 48)
    for tensors, says in (
        ({"emb_params": fits}, "its tensors are emb_params; for this one it has clip_l and clip_g"),
        ({"clip_l": fits}, "its tensors are clip_l; for this one"),
        ({"clip_l": other, "clip_g": fits}, "vectors of 48 values, text_encoder takes 32"),
        ({"clip_l": fits, "clip_g": torch.zeros(80, 48)}, "1 and 80 vectors; both encoders take as many"),
    ):
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "wrong.safetensors")
        with pytest.raises(SourceError, match=says):
            compiled.load_textual_inversion(tmp_path / "wrong.safetensors", "<wrong>")


@on["sd15"]
def test_learned_words_of_xl_are_no_others(compiled: ControlNetPipeline, family: Family, tmp_path: Path) -> None:
    del family
    save_file({"clip_l": torch.zeros(1, 32), "clip_g": torch.zeros(1, 48)}, tmp_path / "xl.safetensors")
    with pytest.raises(SourceError, match=r"its tensors are clip_.*; for this one it has no clip_l or clip_g"):
        compiled.load_textual_inversion(tmp_path / "xl.safetensors", "<xl>")


@pytest.mark.parametrize("family", ["sd15", "sdxl"], indirect=True, scope="module")
def test_weights(compiled: ControlNetPipeline, family: Family) -> None:
    """Of both encoders of XL; its pooled output is that without weights."""
    written, plain = "a (red star:1.3) on [blue]", "a red star on blue"
    weights = np.ones((1, 77), np.float32)
    weights[0, 2:4] = 1.3
    weights[0, 5] = 1 / 1.1
    reference = family.reference("first")
    expected = encoded(reference, [plain], weights)
    found = embeds(compiled, written, syntax="webui")
    check_embeds(found, expected)
    unweighted, literal = embeds(compiled, plain), embeds(compiled, written)
    assert min(relative(each["prompt_embeds"], unweighted["prompt_embeds"]) for each in (found, literal)) > 0.01
    empty = encoded(reference, [""])
    theirs = {**expected, **{f"negative_{name}": value for name, value in empty.items()}}
    ours = {"prompt": written, "negative_prompt": "", "prompt_syntax": "webui"}
    latents = check_drawn(compiled, reference, ours, theirs)
    others = check_drawn(compiled, reference, {**ours, "prompt": plain}, {"prompt": plain, "negative_prompt": ""})
    assert relative(others, latents) > 1e-3


@on["sd15"]
def test_a_prompt_that_is_too_long_says_what_mends_it(compiled: ControlNetPipeline, family: Family) -> None:
    with pytest.warns(PromptTruncatedWarning, match="--prompt-chunks") as warned:
        compiled("red " * 90, num_inference_steps=1, seed=1, output_type="latent")
    assert len(warned) == 1
    expected = family.reference().encode_prompt("red " * 90, "cpu", 1, False)[0].numpy()
    with pytest.warns(PromptTruncatedWarning):
        assert relative(embeds(compiled, "red " * 90)["prompt_embeds"], expected) < BOUND


@on["sd15"]
@pytest.mark.parametrize("prompt", ["[a:b:0.5]", "a AND b"])
def test_what_the_syntax_cannot_mean(compiled: ControlNetPipeline, family: Family, prompt: str) -> None:
    del family
    with pytest.raises(UserError):
        compiled(prompt, num_inference_steps=1, prompt_syntax="webui")
    with pytest.raises(UserError, match="prompt syntax"):
        compiled("a", num_inference_steps=1, prompt_syntax="comfy")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "family", ["sd21", pytest.param("sdxl", marks=pytest.mark.slow)], indirect=True, scope="module"
)
@pytest.mark.parametrize("chunks", [2, 3])
def test_long_prompts(wide: ControlNetPipeline, family: Family, chunks: int) -> None:
    """Chunk by chunk through transformers' encoders, side by side; the empty prompt fills the shorter one up."""
    reference = family.reference("first")
    words = [["red"] * 75, ["blue"] * 75, ["star"] * 10][:chunks]
    words[-1] = words[-1][:10]
    prompt = " ".join(word for each in words for word in each)
    negative = encoded(reference, ["a moon"] + [""] * (chunks - 1))
    theirs = {
        **encoded(reference, [" ".join(each) for each in words]),
        **{f"negative_{name}": value for name, value in negative.items()},
    }
    found = check_drawn(wide, reference, {"prompt": prompt, "negative_prompt": "a moon"}, theirs)
    short = {"prompt": "red", "negative_prompt": "a moon"}
    assert relative(check_drawn(wide, reference, short, short), found) > 1e-3
