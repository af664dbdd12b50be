"""Checkpoints: finding, digesting and loading pipelines, ControlNets and LoRAs, whatever they are kept in."""

from controlrt.export.checkpoint.adapter import feature_places
from controlrt.export.checkpoint.loading import load, stored_scheduler_config
from controlrt.export.checkpoint.parts import Checkpoint, IPAdapterParts, IPAdapterSource, LoraSource, TextEncoderParts
from controlrt.export.checkpoint.sources import (
    UNTELLING_LORA_NAMES,
    digest_configs,
    digest_files,
    digest_lora,
    resolve,
    resolve_config,
    resolve_ip_adapter,
    resolve_lora,
)

__all__ = [
    "UNTELLING_LORA_NAMES",
    "Checkpoint",
    "IPAdapterParts",
    "IPAdapterSource",
    "LoraSource",
    "TextEncoderParts",
    "digest_configs",
    "digest_files",
    "digest_lora",
    "feature_places",
    "load",
    "resolve",
    "resolve_config",
    "resolve_ip_adapter",
    "resolve_lora",
    "stored_scheduler_config",
]
