from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from controlrt.runtime.errors import OutputError
from controlrt.runtime.storage import (
    atomic_directory,
    check_writable,
    lock,
    refuse_foreign_directory,
    sha256_file,
    sha256_tree,
)


def test_digests_are_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    one = sha256_tree(tmp_path, "*")
    (tmp_path / "abc").rename(tmp_path / "other")
    assert sha256_tree(tmp_path, "*") != one
    assert sha256_tree(tmp_path, "*.py") == sha256_tree(tmp_path / "absent", "*")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_block_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "bundle"
    with atomic_directory(target) as partial:
        (partial / "file").write_text("old")

    def fail() -> None:
        with atomic_directory(target) as partial:
            (partial / "file").write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_interrupted_between_the_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "bundle"
    with atomic_directory(target) as partial:
        (partial / "file").write_text("old")
    rename = Path.rename

    def interrupted(self: Path, other: Path) -> Path:
        if ".partial-" in self.name and "-replaced" not in self.name:
            raise KeyboardInterrupt
        return rename(self, other)

    def replace() -> None:
        with atomic_directory(target):
            monkeypatch.setattr(Path, "rename", interrupted)

    with pytest.raises(KeyboardInterrupt):
        replace()
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_directory(tmp_path / "link") as partial:
        (partial / "file").write_text("new")
    assert (tmp_path / "real" / "file").read_text() == "new"
    assert (tmp_path / "link").is_symlink()


def test_replacing(tmp_path: Path) -> None:
    target = tmp_path / "new" / "bundle"
    for text in ("one", "two"):
        with atomic_directory(target) as partial:
            (partial / text).write_text(text)
    assert [path.name for path in target.iterdir()] == ["two"]
    assert [path.name for path in target.parent.iterdir()] == ["bundle"]


def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    (tmp_path / "bundle.partial-killed").mkdir()
    with atomic_directory(tmp_path / "bundle"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no space left"), atomic_directory(tmp_path / "bundle"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_no_permission_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    with pytest.raises(OutputError, match=r"cannot write .*: Permission denied"):
        check_writable(tmp_path / "bundle")
    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(OutputError, match="Permission denied"):
        refuse_foreign_directory(tmp_path / "bundle", "manifest.json")


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        check_writable(tmp_path / "file" / "bundle")
    with pytest.raises(OutputError, match="is a file"):
        refuse_foreign_directory(tmp_path / "file", "manifest.json")
    with pytest.raises(OutputError, match="holds other files"):
        refuse_foreign_directory(tmp_path / "work", "manifest.json")
    check_writable(tmp_path / "fresh" / "deep" / "bundle")
    refuse_foreign_directory(tmp_path / "fresh", "manifest.json")


def _hold(target: Path, log: Path) -> None:
    with lock(target):
        with log.open("a") as file:
            file.write("in\n")
        time.sleep(0.3)
        with log.open("a") as file:
            file.write("out\n")


def test_two_processes_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTROLRT_CACHE", str(tmp_path / "cache"))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_hold, args=(tmp_path / "bundle", tmp_path / "log")) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text().split() == ["in", "out", "in", "out"]
