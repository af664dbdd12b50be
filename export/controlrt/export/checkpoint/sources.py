"""Finding checkpoints: paths, hub ids and files in hub repositories, and what of them decides what is built."""

from __future__ import annotations

from pathlib import Path

from controlrt.export.checkpoint.parts import IPAdapterSource
from controlrt.runtime.errors import SourceError
from controlrt.runtime.storage import sha256_file

SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
PIPELINE_PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")
# what a pipeline or a ControlNet on the hub is made of, without its doubles in other precisions and formats
HUB_FILES = [
    "model_index.json",
    "config.json",
    "diffusion_pytorch_model*",
    *(f"{part}/*" for part in PIPELINE_PARTS),
]
HUB_IGNORED = ["*.bin", "*.fp16.*", "*non_ema*", "*.msgpack", "*.onnx*", "*openvino*", "*.md"]
HUB_CONFIGS = ["model_index.json", *(f"{part}/*{suffix}" for part in PIPELINE_PARTS for suffix in (".json", ".txt"))]
LORA_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and PEFT call the weights of a LoRA in a folder of its own."""
UNTELLING_LORA_NAMES = tuple(name.removesuffix(".safetensors") for name in LORA_NAMES)
ADAPTER_CONFIG = "adapter_config.json"
IMAGE_ENCODER = "image_encoder"
"""The folder beside an IP-Adapter that holds what reads its pictures."""


def resolve(source: str, what: str) -> Path:
    """The local folder or file of a checkpoint: a path as it is, a hub id from the local cache or the hub.

    A file in a hub repository is ``owner/name/path/in/it.safetensors``.

    Raises:
        SourceError: no such path, or the hub does not have it or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    path = Path(source).expanduser()
    if path.exists():
        return path.resolve()
    if source.startswith((".", "/", "~")) or source.count("/") < 1:
        raise SourceError(f"{what} {source} does not exist; give a diffusers folder, a .safetensors file or a hub id")
    if path.suffix in SINGLE_FILE_SUFFIXES and source.count("/") > 1:
        return _hub_file(source, what)
    if path.suffix in SINGLE_FILE_SUFFIXES or source.count("/") > 1:
        raise SourceError(f"{what} {source} does not exist; a file on the hub is OWNER/NAME/FILE.safetensors")
    try:  # falls back to its local cache by itself, and asks nothing of the network with HF_HUB_OFFLINE=1
        path = Path(snapshot_download(source, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED))
        if not any(path.rglob("*.safetensors")):  # only in another format or precision
            path = Path(snapshot_download(source, allow_patterns=HUB_FILES))
        return path
    except Exception as error:  # the hub client raises many kinds
        raise _not_on_the_hub(source, what, error) from error


def resolve_config(source: str) -> Path:
    """The folder of a pipeline's configs and tokenizers; its weights are neither needed nor downloaded.

    Raises:
        SourceError: it cannot be found, or has no model_index.json.
    """
    from huggingface_hub import snapshot_download

    path = Path(source).expanduser()
    if not path.exists() and source.count("/") == 1 and not source.startswith((".", "/", "~")):
        try:
            path = Path(snapshot_download(source, allow_patterns=HUB_CONFIGS))
        except Exception as error:  # the hub client raises many kinds
            raise _not_on_the_hub(source, "--config", error) from error
    if not (path / "model_index.json").is_file():
        raise SourceError(
            f"--config {source} is no folder or hub id of a diffusers pipeline (it has a model_index.json)"
        )
    return path.resolve()


def resolve_lora(source: str) -> Path:
    """The file of a LoRA: a path, the file of a folder, a hub id or a file on the hub.

    Raises:
        SourceError: it cannot be found, or a folder holds several files and none of the usual name.
    """
    from huggingface_hub import snapshot_download

    path = Path(source).expanduser()
    if not path.exists():
        if source.count("/") != 1 or source.startswith((".", "/", "~")) or path.suffix in SINGLE_FILE_SUFFIXES:
            path = resolve(source, "LoRA")
        else:
            try:
                path = Path(snapshot_download(source, allow_patterns=["*.safetensors", ADAPTER_CONFIG]))
            except Exception as error:  # the hub client raises many kinds
                raise _not_on_the_hub(source, "LoRA", error) from error
    if path.is_file():
        if path.suffix not in SINGLE_FILE_SUFFIXES:
            raise SourceError(f"LoRA {source} is no {', '.join(SINGLE_FILE_SUFFIXES)} file")
        return path.resolve()
    for name in LORA_NAMES:
        if (path / name).is_file():
            return (path / name).resolve()
    files = sorted(file.name for file in path.glob("*.safetensors"))
    if len(files) == 1:
        return (path / files[0]).resolve()
    if files:
        raise SourceError(f"LoRA {source} holds several files; name one of them: {', '.join(files)}")
    raise SourceError(f"LoRA {source} is a folder without a .safetensors file")


def resolve_ip_adapter(name: str, source: str, image_encoder: str | None) -> IPAdapterSource:
    """An IP-Adapter's file and the folder of its image encoder.

    Args:
        name: to call it by.
        source: a file, a folder with one file in it, or a file on the hub.
        image_encoder: a folder, or ``OWNER/NAME/FOLDER`` on the hub; ``image_encoder`` beside the file where None.

    Raises:
        SourceError: one that cannot be found, or a folder with several files.
    """
    path = resolve(source, "IP-Adapter")
    if (local := Path(source).expanduser()).exists():
        path = local.absolute()  # not where a link leads: the image encoder lies beside the link
    beside = f"{source.rpartition('/')[0]}/{IMAGE_ENCODER}"
    if path.is_dir():
        names = sorted(file.name for file in path.iterdir() if file.suffix in SINGLE_FILE_SUFFIXES)
        safe = [each for each in names if each.endswith(".safetensors")] or names
        if len(safe) != 1:
            found = f"several files; name one of them: {', '.join(safe)}" if safe else "no file of weights"
            raise SourceError(f"IP-Adapter {source} holds {found}")
        path = path / safe[0]
    folder = path.parent / IMAGE_ENCODER
    if image_encoder is not None:
        folder = _resolve_folder(image_encoder, "image encoder")
    elif not folder.is_dir() and not Path(source).expanduser().exists():
        folder = _resolve_folder(beside, "image encoder")
    if not (folder / "config.json").is_file():
        mend = "name the folder of a CLIPVisionModelWithProjection with --image-encoder"
        raise SourceError(f"IP-Adapter {name} needs an image encoder, and {folder} holds no config.json; {mend}")
    return IPAdapterSource(name=name, file=path, image_encoder=folder.resolve())


def _resolve_folder(source: str, what: str) -> Path:
    """A folder: a path, or ``OWNER/NAME/FOLDER`` on the hub."""
    from huggingface_hub import snapshot_download

    path = Path(source).expanduser()
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") < 1:
        return path
    owner, name, *inside = source.split("/", 2)
    within = f"{inside[0]}/" if inside else ""
    try:
        files = [f"{within}config.json", f"{within}*.safetensors"]
        return Path(snapshot_download(f"{owner}/{name}", allow_patterns=files)) / within
    except Exception as error:  # the hub client raises many kinds
        raise _not_on_the_hub(source, what, error) from error


def digest_files(path: Path) -> dict[str, str]:
    """SHA-256 of the files of a resolved checkpoint that decide what is built, by relative name.

    Raises:
        SourceError: the folder is no diffusers model.
    """
    if path.is_file():
        return {path.name: sha256_file(path)}
    if (path / "model_index.json").is_file():
        parts = [path / part for part in PIPELINE_PARTS if (path / part).is_dir()]
        files = [path / "model_index.json", *(file for part in parts for file in part.rglob("*") if file.is_file())]
    elif (path / "config.json").is_file():
        files = [file for file in path.iterdir() if file.is_file()]
    else:
        raise SourceError(f"{path} is no diffusers folder: it has neither model_index.json nor config.json")
    return {file.relative_to(path).as_posix(): sha256_file(file) for file in sorted(files)}


def digest_configs(path: Path) -> dict[str, str]:
    """SHA-256 of a pipeline folder's files that are not weights."""
    return {
        file.relative_to(path).as_posix(): sha256_file(file)
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.suffix in (".json", ".txt")
    }


def digest_lora(path: Path) -> dict[str, str]:
    """SHA-256 of a LoRA's file, and of the config that PEFT puts beside it."""
    config = path.with_name(ADAPTER_CONFIG)
    return {file.name: sha256_file(file) for file in (path, config) if file.is_file()}


def _hub_file(source: str, what: str) -> Path:
    from huggingface_hub import hf_hub_download

    owner, name, file = source.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except Exception as error:  # the hub client raises many kinds
        raise _not_on_the_hub(source, what, error) from error


def _not_on_the_hub(source: str, what: str, error: Exception) -> SourceError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return SourceError(
        f"{what} {source} is no path here, and the hub and its local cache say: {reason}; name a folder or a file, or "
        "see that the hub can be reached"
    )
