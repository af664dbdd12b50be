"""Merging LoRAs and LyCORIS files into a pipeline's weights, every tensor of them or none."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlrt.export.checkpoint.lora_change import Change, IncompleteError
from controlrt.export.checkpoint.lora_names import ModuleNames, part_of, split_name
from controlrt.export.checkpoint.parts import LoraSource
from controlrt.export.checkpoint.sources import ADAPTER_CONFIG
from controlrt.export.checkpoint.tensor_file import TensorFile, metadata_json, read_tensor_file
from controlrt.runtime.errors import SourceError

KNOWN_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
"""Published architectures by the width of their cross-attention."""
OTHER_ARCHITECTURES = (  # words of entries' names
    (("double_blocks", "single_transformer_blocks", "single_blocks"), "Flux"),
    (("joint_blocks", "transformer."), "a diffusion transformer, such as Stable Diffusion 3 or Flux"),
    (("lora_prior_",), "a prior, such as Stable Cascade's"),
)
UNSUPPORTED = (  # words of tensors' names that belong to no supported kind
    (("oft_blocks", "oft_diag", "boft"), "OFT"),
    ((".a1.weight", ".b1.weight"), "GLoRA"),
    (("bundle_emb.", "string_to_param", "emb_params"), "textual inversion inside a LoRA"),
    (("lora_prompt", "vera_lambda", "hada_w3"), "another method"),
)

SUPPORTED_KINDS = "LoRA, LoCon, LoHa, LoKr, DoRA, (IA)^3 and full differences, as kohya, LyCORIS, diffusers and PEFT do"


@dataclass(frozen=True, kw_only=True)
class _AdapterConfig:
    """PEFT's config of one model: what its files leave unsaid."""

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_root: bool = False

    def alpha_of(self, entry: str) -> float | None:
        for pattern, alpha in self.alpha_pattern.items():
            if re.match(rf"(.*\.)?({pattern})$", entry):
                return alpha
        return self.alpha


def merge_loras(models: Mapping[str, Any], loras: Sequence[LoraSource]) -> None:
    """Adds to the weights of ``models`` what each LoRA changes in them, times its weight.

    Every difference is to the weights as they were, and all are added up, so order does not matter; this is what
    diffusers computes with ``set_adapters``, but for rounding.

    Args:
        models: unet, text_encoder, and text_encoder_2 for SDXL; float32. They are changed in place. Those without
            values are left as they are.
        loras: what to merge.

    Raises:
        SourceError: a damaged file, one that is no LoRA, of another architecture, or with entries that match nothing.
    """
    if not loras:
        return
    names = ModuleNames(models)
    by_module: dict[int, list[tuple[LoraSource, str, Change, Any]]] = defaultdict(list)
    for lora in loras:
        for entry, change, module in _matched(lora, names, models):
            by_module[id(module)].append((lora, entry, change, module))
    with torch.no_grad():
        for uses in by_module.values():
            if not uses[0][3].weight.is_meta:
                _merge_into(uses[0][3], uses)


def _merge_into(module: Any, uses: Sequence[tuple[LoraSource, str, Change, Any]]) -> None:
    weight = torch.zeros_like(module.weight)
    bias: Tensor | None = None
    outputs = module.weight.shape[:1]
    for lora, entry, change, _ in uses:
        try:
            difference, shift = change.of_weight(module.weight, lora.weight), change.of_bias(lora.weight)
            if shift is not None and shift.shape != outputs:
                raise ValueError(f"a bias of shape {tuple(shift.shape)} does not fit {tuple(outputs)}")
        except (ValueError, RuntimeError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise SourceError(f"LoRA {lora.path} does not fit the model: {entry}: {reason}") from error
        if not all(torch.isfinite(one).all() for one in (difference, shift) if one is not None):
            raise SourceError(f"LoRA {lora.path} is damaged: {entry} has values that are not finite")
        if difference is not None:
            weight += difference
        if shift is not None:
            bias = shift if bias is None else bias + shift
    module.weight += weight
    if bias is not None:
        module.bias = torch.nn.Parameter(bias if module.bias is None else module.bias + bias, requires_grad=False)


def _matched(lora: LoraSource, names: ModuleNames, models: Mapping[str, Any]) -> Iterator[tuple[str, Change, Any]]:
    """The entries of one file with the modules they mean; all of them, or an error."""
    file = read_tensor_file(lora.path)
    changes = _changes(file)
    _refuse_other_architecture(file, changes, models)
    found = {entry: names.find(entry) for entry in changes}
    unmatched = [entry for entry, module in found.items() if module is None]
    if unmatched:
        raise SourceError(
            f"LoRA {lora.path} does not fit the model: {len(unmatched)} of its {len(changes)} entries match nothing "
            f"there, such as {unmatched[0]}"
        )
    for entry, module in found.items():
        yield entry, changes[entry], module


def _changes(file: TensorFile) -> dict[str, Change]:
    """Every entry of the file.

    Raises:
        SourceError: tensors that are no part of a LoRA, or entries that lack some.
    """
    for words, what in UNSUPPORTED:
        if any(word in name for name in file.tensors for word in words):
            raise SourceError(f"LoRA {file.path} holds {what}, which is not supported; supported: {SUPPORTED_KINDS}")
    entries: dict[str, dict[str, Tensor]] = defaultdict(dict)
    strange = []
    for name, tensor in file.tensors.items():
        split = split_name(name)
        if split is None:
            strange.append(name)
        else:
            entries[split[0]][split[1]] = tensor
    for entry in [entry for entry, tensors in entries.items() if set(tensors) <= {"weight", "alpha"}]:
        strange += [f"{entry}.{role}" for role in entries.pop(entry)]  # any model's weights are called that
    if strange:
        what = "is no LoRA" if not entries else "is not supported"
        raise SourceError(
            f"LoRA {file.path} {what}: {len(strange)} of its {len(file.tensors)} tensors are of no known kind, such as "
            f"{strange[0]}; supported: {SUPPORTED_KINDS}"
        )
    configs = _adapter_configs(file)
    changes = {}
    for entry, tensors in entries.items():
        config = configs.get(part_of(entry), _AdapterConfig())
        try:
            changes[entry] = Change(
                tensors, default_alpha=config.alpha_of(entry) if "up" in tensors else None, rank_root=config.rank_root
            )
        except IncompleteError:
            held = ", ".join(sorted(tensors))
            raise SourceError(f"LoRA {file.path} is damaged: {entry} has only {held}") from None
    return changes


def _adapter_configs(file: TensorFile) -> dict[str, _AdapterConfig]:
    """PEFT's configs by model: from the header that diffusers writes, or the file that PEFT puts beside."""
    beside = file.path.with_name(ADAPTER_CONFIG)
    if beside.is_file():
        try:
            return {"unet": _adapter_config(dict(json.loads(beside.read_text())), beside)}
        except (ValueError, TypeError) as error:
            raise SourceError(f"{beside} is damaged: {error}") from error
    by_part: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in metadata_json(file, "lora_adapter_metadata").items():
        part, _, option = key.partition(".")
        by_part[part][option] = value
    return {part: _adapter_config(options, file.path) for part, options in by_part.items()}


def _adapter_config(options: Mapping[str, Any], path: Path) -> _AdapterConfig:
    alpha = options.get("lora_alpha")
    pattern = options.get("alpha_pattern") or {}
    try:
        return _AdapterConfig(
            alpha=None if alpha is None else float(alpha),
            alpha_pattern={str(key): float(value) for key, value in pattern.items()},
            rank_root=bool(options.get("use_rslora", False)),
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise SourceError(f"{path} is damaged: lora_alpha and alpha_pattern must be numbers") from error


def _refuse_other_architecture(file: TensorFile, changes: Mapping[str, Change], models: Mapping[str, Any]) -> None:
    unet = models["unet"]
    theirs, width = _made_for(changes)
    ours = unet.config.cross_attention_dim
    xl = "text_encoder_2" in models
    model = KNOWN_WIDTHS.get(ours, f"{'an XL model' if xl else 'a model'} with cross-attention of width {ours}")
    if theirs is None and width not in (None, ours):
        theirs = KNOWN_WIDTHS.get(width or 0, f"a model with cross-attention of width {width}")
    elif theirs == KNOWN_WIDTHS[2048] and xl:
        return
    if theirs is not None:
        raise SourceError(f"LoRA {file.path} was made for {theirs}; the model is {model}")


def _made_for(changes: Mapping[str, Change]) -> tuple[str | None, int | None]:
    """The architecture that entries' names give away, and the width of cross-attention that their shapes do."""
    for words, architecture in OTHER_ARCHITECTURES:
        if any(word in entry for entry in changes for word in words):
            return architecture, None
    xl_only = ("lora_te2_", "text_encoder_2.", "add_embedding", "label_emb")
    if any(entry.startswith(xl_only[:2]) or any(word in entry for word in xl_only[2:]) for entry in changes):
        return KNOWN_WIDTHS[2048], None
    for entry, change in changes.items():
        if entry.endswith(("attn2.to_k", "attn2_to_k", "attn2.to_v", "attn2_to_v")):
            width = change.read_width()
            if width is not None:
                return None, width
    return None, None
