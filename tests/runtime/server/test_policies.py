"""Who goes next."""

from __future__ import annotations

import pytest

from controlrt.runtime.server.policies import Policy, Standing, order

LONG = Standing(arrived=0, remaining=50, deadline=None)
SHORT = Standing(arrived=10, remaining=4, deadline=None)
URGENT = Standing(arrived=20, remaining=20, deadline=40)
LATER = Standing(arrived=5, remaining=1, deadline=60)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("fifo", [LONG, LATER, SHORT, URGENT]),
        ("shortest", [LATER, SHORT, URGENT, LONG]),
        ("deadline", [URGENT, LATER, LONG, SHORT]),
    ],
)
def test_order(policy: Policy, expected: list[Standing]) -> None:
    ranked = sorted([SHORT, URGENT, LONG, LATER], key=lambda each: order(policy)(each, 21))
    assert ranked == expected


def test_a_long_request_gets_through() -> None:
    """However many short ones come: those that arrive late enough stand behind it."""
    assert order("shortest")(LONG, 500) < order("shortest")(Standing(arrived=499, remaining=4, deadline=None), 500)
