"""Which variants there are, and how they are chosen."""

from __future__ import annotations

import pytest

from controlrt.engines.backends import BACKENDS
from controlrt.perf.variants import REFERENCE, all_variants, choose_variants
from controlrt.runtime.errors import UnknownNameError


def chosen(*only: str) -> list[str]:
    return [variant.name for variant in choose_variants(only, all_variants(["openvino", "onnxruntime"]))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_passes_follow_the_backend_one_more_each_time(backend: str) -> None:
    variants = [variant for variant in all_variants([backend]) if variant.runtime == backend]
    passes = BACKENDS[backend].passes
    assert [variant.passes for variant in variants] == [*range(len(passes) + 1), len(passes), len(passes)]
    assert [variant.cut for variant in variants] == [False] * (len(passes) + 1) + [True, True]
    assert [variant.fused for variant in variants] == [False] * (len(passes) + 2) + [True]
    assert variants[0].is_plain
    assert not any(variant.is_plain for variant in variants[1:])
    assert variants[2].name == f"{backend}+{_kebab(passes[1])}"
    assert variants[-2].name == f"{backend}+binding-times"


def _kebab(each: object) -> str:
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in type(each).__name__).lstrip("-")


def test_names_are_unique_and_the_reference_is_among_them() -> None:
    names = chosen()
    assert len(set(names)) == len(names)
    assert names[:4] == ["eager", "eager-channels-last", REFERENCE, "plain-openvino"]


def test_what_a_choice_is_compared_with_comes_along() -> None:
    assert chosen("eager") == ["eager", REFERENCE]
    assert chosen("openvino+fuse") == [REFERENCE, "plain-openvino", "openvino+fuse"]
    assert chosen("onnxruntime+b*") == [REFERENCE, "onnxruntime+blocked-group-norm", "onnxruntime+binding-times"]


def test_an_unknown_variant_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'openvino\+fuse'"):
        chosen("openvino+fused")
