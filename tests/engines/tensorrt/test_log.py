"""The builder's log condensed."""

from __future__ import annotations

from controlrt.engines.tensorrt.log import TAIL_LINES, tail, warnings_of

LOG = """\
\x1b[0m[W] ModelImporter.cpp:1071: Make sure input rows has Int64 binding.
[I] TF32 is disabled by default.
[W] Attention of node_7 was not fused.
[W] Attention of node_7 was not fused.
[11/26/2026-14:15:26] [TRT] [E] Error Code 4: something
[W] Multi stream is disabled because the stream assignment failed.
"""


def test_warnings_that_matter_come_once() -> None:
    assert warnings_of(LOG) == ["Attention of node_7 was not fused.", "Error Code 4: something"]


def test_the_tail_is_short_and_without_colours() -> None:
    long = "\n".join(f"\x1b[31mline {number}\x1b[0m" for number in range(100)) + "\n\n"
    assert tail(long).splitlines() == [f"line {number}" for number in range(100 - TAIL_LINES, 100)]
    assert tail(LOG).count("node_7") == 1
