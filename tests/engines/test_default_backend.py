"""The runtime may not ask the engines which backend they pick, so ``controlrt doctor`` knows the rule by itself."""

from __future__ import annotations

import pytest

from controlrt.engines.backends import BACKENDS, choose_backend
from controlrt.runtime.commands import doctor, main


@pytest.mark.parametrize("has_openvino", [True, False])
def test_doctor_says_what_the_build_picks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], has_openvino: bool
) -> None:
    monkeypatch.setattr(BACKENDS["openvino"], "is_installed", lambda: has_openvino)
    versions = {} if has_openvino else {"openvino": None}
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, "1.0"))
    assert main(["doctor"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("backend:"))
    assert line.split()[1] == choose_backend(None)
