"""What contenders are asked to draw."""

from __future__ import annotations

import numpy as np

from controlrt.perf.peers.calls import Call, outlines, prompt


def call(seed: int = 3, batch: int = 2) -> Call:
    return Call(
        seed=seed,
        batch=batch,
        width=128,
        height=64,
        steps=4,
        sampler="DDIM",
        guidance_scale=7.5,
        controls=("canny", "mask"),
    )


def test_prompts_do_not_come_again_for_long() -> None:
    assert prompt(0) == "a red star on a blue background"
    assert len({prompt(seed) for seed in range(1320)}) == 1320
    assert prompt(1320) == prompt(0)


def test_hints_are_outlines_of_their_own() -> None:
    hints = call().hints()
    assert {name: pictures.shape for name, pictures in hints.items()} == dict.fromkeys(
        ("canny", "mask"), (2, 64, 128, 3)
    )
    pictures = [*hints["canny"], *hints["mask"]]
    for number, picture in enumerate(pictures):
        assert set(np.unique(picture)) == {0, 1}
        assert 0 < picture.mean() < 0.5
        assert not any((picture == other).all() for other in pictures[:number])
    np.testing.assert_array_equal(outlines((3, 0), 128, 64), pictures[0])


def test_noise_is_each_picture_s_own() -> None:
    noise = call().latents(4, 8)
    assert (noise.shape, noise.dtype) == ((2, 4, 8, 16), np.float32)
    np.testing.assert_array_equal(call(seed=4, batch=1).latents(4, 8)[0], noise[1])
    assert abs(noise.mean()) < 0.2
    assert abs(noise.std() - 1) < 0.1
