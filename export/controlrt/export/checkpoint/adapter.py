"""T2I-Adapters, as diffusers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from controlrt.export.checkpoint.quiet_loading import loading, loading_options, prepared, refuse_incomplete
from controlrt.runtime.errors import SourceError

SUPPORTED = "supported: T2IAdapter"


def load_adapter(name: str, path: Path, unet: Any) -> Any:
    """A resolved T2I-Adapter for ``unet``, in float32.

    Raises:
        SourceError: damaged or missing weights, another kind of model, or one for another architecture.
    """
    from diffusers import T2IAdapter

    what = f"adapter {name} ({path})"
    if path.is_file():
        raise SourceError(f"{what} is a single file; give a diffusers folder or a hub id")
    with loading(path):
        config = json.loads((path / "config.json").read_text())
        if config.get("_class_name") != "T2IAdapter":
            raise SourceError(f"{what} is a {config.get('_class_name')}; {SUPPORTED}")
        adapter, info = T2IAdapter.from_pretrained(path, output_loading_info=True, **loading_options(path))
        refuse_incomplete(what, info)
    _refuse_foreign(what, adapter.config, unet.config)
    return prepared(adapter)


def _refuse_foreign(what: str, config: Any, unet: Any) -> None:
    """Raises SourceError for an adapter whose features would not fit the UNet."""
    xl = unet.addition_embed_type == "text_time"
    made_for_xl = str(config.adapter_type).endswith("_xl")
    if made_for_xl != xl:
        made, model = ("SDXL", "is not SDXL") if made_for_xl else ("Stable Diffusion 1.x", "is SDXL")
        raise SourceError(f"{what} was made for {made}, but the model {model}")
    channels, wanted = list(config.channels), list(unet.block_out_channels)
    if not xl and channels != wanted:
        raise SourceError(f"{what} was made for another model: its channels are {channels}, the UNet's {wanted}")
