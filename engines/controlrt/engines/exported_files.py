"""What a bundle takes from an export as it is: tokenizers, the scheduler and hints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from controlrt.runtime.manifest import Manifest


def exported_files(exported: Manifest) -> Iterator[str]:
    """All files of an export but its programs, relative to it."""
    return (file for file in exported.files if not file.startswith("programs/"))


def copy_files(exported: Manifest, source: Path, target: Path) -> None:
    """Copies all that an export holds but its programs."""
    for file in exported_files(exported):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, target / file)
