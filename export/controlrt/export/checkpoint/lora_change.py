"""What one entry of a LoRA or LyCORIS file does to one weight, by the published formulas.

LoRA is Hu et al. 2021 (arXiv 2106.09685), DoRA Liu et al. 2024 (arXiv 2402.09353), LoHa and LoKr are Yeh et al. 2023
(arXiv 2309.14859, section 3), (IA)^3 is Liu et al. 2022 (arXiv 2205.05638). ``alpha / rank`` scales
all that have a rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
ROLES = frozenset(
    (
        *("down", "up", "mid", "up_bias", "alpha", "magnitude", "dora_scale"),
        *(*LOHA, "hada_t1", "hada_t2"),
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        *("diff", "diff_b", "w_norm", "b_norm", "weight", "on_input"),
    )
)
"""What the tensors of one entry may be called."""
TOGETHER = (
    ("down", "up"),
    LOHA,
    ("hada_t1", "hada_t2"),
    ("lokr_w1_a", "lokr_w1_b"),
    ("lokr_w2_a", "lokr_w2_b"),
    ("weight", "on_input"),
)
"""Roles of which an entry has all or none."""


class IncompleteError(Exception):
    """Tensors that do not make a whole entry."""


class Change:
    """The difference that one entry makes, without the strength it is merged with."""

    def __init__(self, tensors: Mapping[str, Tensor], *, default_alpha: float | None = None, rank_root: bool = False):
        """``tensors`` by role; ``default_alpha`` where they name none; ``rank_root`` divides by the root of the rank.

        Raises:
            IncompleteError: roles that do not go together.
        """
        self.tensors = {role: tensor.float() for role, tensor in tensors.items()}
        self._rank_root = rank_root
        given = self.tensors.get("alpha")
        self._alpha = default_alpha if given is None else float(given)
        for together in TOGETHER:
            if self._has_any(*together) and not self._has_all(*together):
                raise IncompleteError
        if ("mid" in self.tensors and "down" not in self.tensors) or (
            "lokr_t2" in self.tensors and "lokr_w2_a" not in self.tensors
        ):
            raise IncompleteError
        self.kind = self._kind()

    def _has_any(self, *roles: str) -> bool:
        return any(role in self.tensors for role in roles)

    def _has_all(self, *roles: str) -> bool:
        return all(role in self.tensors for role in roles)

    def _kind(self) -> str:
        if self._has_all("down", "up"):
            return "lora"
        if self._has_any("hada_w1_a"):
            return "loha"
        if self._has_any("lokr_w1", "lokr_w1_a") and self._has_any("lokr_w2", "lokr_w2_a"):
            return "lokr"
        if self._has_any("diff", "diff_b", "w_norm", "b_norm"):
            return "full"
        if self._has_all("weight", "on_input"):
            return "ia3"
        raise IncompleteError

    def read_width(self) -> int | None:
        """How many values of its input the entry reads, where that shows."""
        if self.kind == "lora":
            return int(self.tensors["down"].shape[1])
        if self.kind == "ia3" or "hada_t1" in self.tensors:
            return None
        if self.kind == "full" and "diff" not in self.tensors:
            return None
        return int(self._matrix().shape[1])

    def of_weight(self, weight: Tensor, strength: float) -> Tensor | None:
        """The difference to ``weight`` at ``strength``, in its shape; None where the entry leaves it alone.

        Raises:
            ValueError: shapes that do not fit.
        """
        if self.kind == "ia3":
            return weight * (strength * self._ia3_factor(weight))
        if self.kind == "full" and not self._has_any("diff", "w_norm"):
            return None
        # Linear layers of one checkpoint are convolutions of size 1 in another
        difference = strength * self._scale() * self._matrix()
        rows, columns = weight.shape[0], weight[0].numel() if weight.dim() > 1 else 1
        if (difference.shape[0], difference[0].numel() if difference.dim() > 1 else 1) != (rows, columns):
            raise ValueError(f"{tuple(difference.shape)} does not fit {tuple(weight.shape)}")
        difference = difference.reshape(weight.shape)
        if self._has_any("magnitude", "dora_scale"):
            return self._decomposed(weight + difference) - weight
        return difference

    def of_bias(self, strength: float) -> Tensor | None:
        """The difference to the layer's bias at ``strength``; None where the entry leaves it alone."""
        if "up_bias" in self.tensors:
            return strength * self._scale() * self.tensors["up_bias"]
        given = self.tensors.get("diff_b", self.tensors.get("b_norm"))
        return None if given is None else strength * given

    def _decomposed(self, weight: Tensor) -> Tensor:
        """DoRA eq. 5: the direction of ``weight`` with a learned magnitude.

        The magnitude is per output; LyCORIS may make it per input, and then its first dimension is 1.
        """
        magnitude = self.tensors["magnitude" if "magnitude" in self.tensors else "dora_scale"]
        per_input = "dora_scale" in self.tensors and magnitude.dim() > 1 and magnitude.shape[0] == 1
        axis = 1 if per_input and weight.shape[0] > 1 else 0
        if magnitude.numel() != weight.shape[axis]:
            raise ValueError(f"a magnitude of {magnitude.numel()} values does not fit {tuple(weight.shape)}")
        others = tuple(dim for dim in range(weight.dim()) if dim != axis)
        shape = [-1 if dim == axis else 1 for dim in range(weight.dim())]
        return weight * (magnitude.reshape(shape) / weight.square().sum(others, keepdim=True).sqrt())

    def _scale(self) -> float:
        rank = self._rank()
        if rank is None or self._alpha is None:
            return 1.0
        return self._alpha / (math.sqrt(rank) if self._rank_root else rank)

    def _rank(self) -> int | None:
        """None for matrices that are whole: there alpha means nothing."""
        for role, axis in (("down", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
            if role in self.tensors:
                return int(self.tensors[role].shape[axis])
        return None

    def _matrix(self) -> Tensor:
        """The difference before scaling: outputs first, then inputs and what there is of a kernel."""
        t = self.tensors
        if self.kind == "lora":
            if "mid" in t:
                return _tucker(t["mid"], t["up"].flatten(1).T, t["down"].flatten(1))
            return _product(t["up"], t["down"])
        if self.kind == "loha":
            if "hada_t1" in t:
                one = _tucker(t["hada_t1"], t["hada_w1_a"], t["hada_w1_b"])
                return one * _tucker(t["hada_t2"], t["hada_w2_a"], t["hada_w2_b"])
            return _product(t["hada_w1_a"], t["hada_w1_b"]) * _product(t["hada_w2_a"], t["hada_w2_b"])
        if self.kind == "lokr":
            one = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
            if "lokr_w2" in t:
                other = t["lokr_w2"]
            elif "lokr_t2" in t:
                other = _tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
            else:
                other = _product(t["lokr_w2_a"], t["lokr_w2_b"])
            return torch.kron(one.reshape(*one.shape, *[1] * (other.dim() - one.dim())), other)
        return t["diff"] if "diff" in t else t["w_norm"]

    def _ia3_factor(self, weight: Tensor) -> Tensor:
        axis = 1 if bool(self.tensors["on_input"]) else 0
        factor = self.tensors["weight"].flatten()
        if factor.numel() != weight.shape[axis]:
            raise ValueError(f"{factor.numel()} factors do not fit {tuple(weight.shape)}")
        return factor.reshape([-1 if dim == axis else 1 for dim in range(weight.dim())])


def _product(up: Tensor, down: Tensor) -> Tensor:
    """(outputs, rank, ...) times (rank, inputs, kernel...): (outputs, inputs, kernel...)."""
    if up.dim() > 2 and up[0, 0].numel() != 1:
        raise ValueError(f"a second factor with a kernel, {tuple(up.shape)}")
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _tucker(core: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """Tucker decomposition of a convolution: core (r, r, kernel...), outputs (r, o), inputs (r, i)."""
    made: Tensor = torch.einsum("ij...,jr,ip->pr...", core, inputs, outputs)
    return made.contiguous()
