"""How fast this machine multiplies matrices: what the FLOP/s that contenders reach are held against.

    python -m controlrt.perf.ceiling THREADS DEVICE

multiplies square matrices with PyTorch, and in float32 with NumPy too, and prints the best of each dtype as JSON. It
runs in a process of its own, because the number of threads is decided when libraries load.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from controlrt.perf.results import Ceiling
from controlrt.runtime.errors import ControlRTError

SIZE = {"cpu": 2048, "cuda": 8192}
"""Large enough that nothing but the product counts, small enough to take a second."""
SECONDS = 1.0
"""How long each dtype is tried."""
PROBE, PROBES = 512, 5
SLOW = 4.0
"""A dtype whose products would take as many seconds, by small ones, has no kernel of its own here and is left out."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def measure_ceilings(threads: int, device: str) -> tuple[Ceiling, ...]:
    """The fastest product of each dtype, in a process of its own.

    Raises:
        ControlRTError: the process failed.
    """
    command = [sys.executable, "-m", "controlrt.perf.ceiling", str(threads), device]
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        said = found.stderr.strip().splitlines()
        raise ControlRTError(f"the matrix products failed: {said[-1] if said else found.returncode}")
    return msgspec.json.decode(found.stdout, type=tuple[Ceiling, ...])


def main() -> None:
    """Measures as the command line says, and prints."""
    threads, device = int(sys.argv[1]), sys.argv[2]
    best: dict[str, Ceiling] = {}
    for found in (*_torch(threads, device), *(_numpy(threads) if device == "cpu" else ())):
        if found.dtype not in best or found.flops_per_second > best[found.dtype].flops_per_second:
            best[found.dtype] = found
    print(msgspec.json.encode(tuple(best.values())).decode())


def _torch(threads: int, device: str) -> Iterator[Ceiling]:
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(threads)
    size = SIZE[device]
    for name in ("float32", "float16", "bfloat16"):

        def product(side: int, name: str = name) -> Callable[[], None]:
            a, b = (torch.randn(side, side, device=device).to(getattr(torch, name)) for _ in range(2))

            def run() -> None:
                torch.mm(a, b)
                if device == "cuda":
                    torch.cuda.synchronize()

            return run

        rate = _rate(product, size)
        if rate is not None:
            yield Ceiling(dtype=name, flops_per_second=rate, size=size, threads=threads, library=f"PyTorch, {device}")


def _numpy(threads: int) -> Iterator[Ceiling]:
    def product(side: int) -> Callable[[], object]:
        a, b = np.random.default_rng(0).standard_normal((2, side, side), np.float32)
        return lambda: a @ b

    size = SIZE["cpu"]
    rate = _rate(product, size)
    if rate is not None:
        yield Ceiling(dtype="float32", flops_per_second=rate, size=size, threads=threads, library="NumPy, cpu")


def _rate(product: Callable[[int], Callable[[], object]], size: int) -> float | None:
    """FLOP/s of the fastest of the products that fit into SECONDS; None where the dtype is slow.

    Args:
        product: makes one, of matrices with so many rows and columns.
        size: of those to measure.
    """
    small = product(PROBE)
    if min(_seconds(small) for _ in range(PROBES)) * (size / PROBE) ** 3 > SLOW:
        return None
    large = product(size)
    fastest, until = _seconds(large), time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        fastest = min(fastest, _seconds(large))
    return 2 * size**3 / fastest


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
