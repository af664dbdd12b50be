"""Opening a bundle: schema, hashes and versions are checked before anything of it is used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from controlrt.runtime.errors import BundleError, NoBundleError
from controlrt.runtime.manifest import MANIFEST_NAME, SCHEMA_VERSION, Hint, Manifest
from controlrt.runtime.storage import sha256_file


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its directory and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Bundle:
        """Reads the manifest and, with ``verify``, compares every file with its SHA-256.

        Raises:
            BundleError: no bundle, another schema version, or a listed file that is missing or edited.
        """
        path = Path(path)
        manifest = read_manifest(path)
        bundle = cls(path, manifest)
        if verify:
            bundle.verify()
        return bundle

    def verify(self) -> None:
        """Raises BundleError unless every file is there and unchanged."""
        for name, expected in self.manifest.files.items():
            file = self.file(name)
            if not file.is_file():
                raise BundleError(f"{self.path}: {name} is missing; build the bundle again with build-engines")
            if sha256_file(file) != expected:
                raise BundleError(
                    f"{self.path}: {name} was changed after the build (SHA-256 differs); an engine is code, so it is "
                    "not loaded; build the bundle again with build-engines"
                )

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists; names that lead out of the bundle are refused."""
        file = self.path / name
        if name not in self.manifest.files or not file.resolve().is_relative_to(self.path.resolve()):
            raise BundleError(f"{self.path}: manifest names {name!r}, which is not a file of the bundle")
        return file

    def hint(self, control: str) -> Hint:
        """What the ControlNet ``control`` expects to see.

        Raises:
            BundleError: the bundle says nothing of it, or nothing that can be read.
        """
        file = self.file(f"hints/{control}.json")
        try:
            return msgspec.json.decode(file.read_bytes(), type=Hint)
        except (OSError, msgspec.DecodeError) as error:
            raise BundleError(f"{file} cannot be read: {error}; build the bundle again with build-engines") from error


def read_manifest(path: Path) -> Manifest:
    """Reads ``manifest.json`` of the bundle at ``path``.

    Raises:
        NoBundleError: there is none.
        BundleError: it is not valid, or has another schema version.
    """
    file = path / MANIFEST_NAME
    try:
        text = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if path.exists():
            mend = "name a directory that build-engines has written"
            raise NoBundleError(f"{path} is not a bundle: it has no {MANIFEST_NAME}; {mend}") from None
        mend = f"make one with: build-engines --output {path}"
        raise NoBundleError(f"{path} is not a bundle: it does not exist; {mend}") from None
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror}") from error
    try:
        version = msgspec.json.decode(text, type=dict[str, msgspec.Raw]).get("schema_version")
        found = msgspec.json.decode(version) if version is not None else None
        if found != SCHEMA_VERSION:
            raise BundleError(
                f"{path} has bundle schema {found}, this controlrt reads schema {SCHEMA_VERSION}; "
                "build it again with build-engines of this version"
            )
        return msgspec.json.decode(text, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{file} is damaged ({error}); build the bundle again with build-engines") from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes ``manifest.json`` into the bundle directory at ``path``."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (path / MANIFEST_NAME).write_bytes(text + b"\n")


def digest_files(path: Path) -> dict[str, str]:
    """SHA-256 of every file below ``path`` but the manifest, by relative name."""
    return {
        file.relative_to(path).as_posix(): sha256_file(file)
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != MANIFEST_NAME
    }
