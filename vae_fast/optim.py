"""Optimizers by name: SGD, Adagrad as the paper runs it, Adam and AdamW.

All can be captured in a CUDA graph: their step counters are tensors and no step waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import _C

OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class Adagrad(torch.optim.Optimizer):
    """Adagrad as the authors of the paper ran it::

        G += g**2;    w -= lr * g / sqrt(G + eps)

    (they ascend the bound, so theirs reads ``w += lr * g / ...``). eps is inside the root, unlike torch's
    Adagrad. During the first ``accumulate_steps`` steps only G grows and the parameters stay, so that the
    first moves are already of a sensible size; plain Adagrad moves every coordinate by the full lr at its
    first step.

    Source: Duchi, Hazan & Singer, JMLR 12, 2011; eps and the accumulate-only start from the authors'
        published code.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.02, *, eps: float = 1e-8, accumulate_steps: int = 0
    ) -> None:
        if not lr > 0:
            raise ValueError(f"lr: got {lr}, wanted a number above 0")
        if not eps > 0:
            raise ValueError(f"eps: got {eps}, wanted a number above 0")
        if accumulate_steps < 0:
            raise ValueError(f"accumulate_steps: got {accumulate_steps}, wanted an integer of 0 or more")
        # "capturable" is torch's name for: the state called "step" lives on the parameter's device.
        defaults = {"lr": lr, "eps": eps, "accumulate_steps": accumulate_steps, "capturable": True}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                # float32 counts exactly to 2**24 and then stays there, which is beyond any accumulate_steps
                self.state[p] = {"step": torch.zeros((), device=p.device), "sum": torch.zeros_like(p)}
        self._scratch: dict[
            Tensor, Tensor
        ] = {}  # kept, because fresh memory costs more than the arithmetic on a CPU

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._scratch = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_kind.setdefault((p.device, p.dtype), []).append(p)
            for params in by_kind.values():
                self._update(params, group)
        return loss

    def _root(self, p: Tensor) -> Tensor:
        if p not in self._scratch:
            self._scratch[p] = torch.empty_like(p)
        return self._scratch[p]

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        sums = [self.state[p]["sum"] for p in params]
        steps = [self.state[p]["step"] for p in params]
        torch._foreach_add_(steps, 1)
        if _in_one_pass([*params, *grads, *sums, steps[0]], group["eps"]):
            how = {"lr": group["lr"], "eps": group["eps"], "accumulate_steps": group["accumulate_steps"]}
            _C.adagrad_update(params, grads, sums, steps[0], **how)
            return
        roots = [self._root(p) for p in params]
        torch._foreach_addcmul_(sums, grads, grads)
        torch._foreach_copy_(roots, sums)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_sqrt_(roots)
        if group["accumulate_steps"]:
            # Dividing by infinity leaves a parameter where it is: no branch on the device's counter.
            factor = torch.ones_like(steps[0], dtype=params[0].dtype)
            factor.masked_fill_(steps[0] <= group["accumulate_steps"], math.inf)
            torch._foreach_mul_(roots, factor)
        torch._foreach_addcdiv_(params, grads, roots, value=-group["lr"])


def _in_one_pass(tensors: Iterable[Tensor], eps: float) -> bool:
    """Whether the kernel of the native step takes these: dense float32 on the CPU, an eps that float32 has
    all digits of, and nobody who traces the arithmetic."""
    return (
        not torch.compiler.is_compiling()
        and eps >= torch.finfo(torch.float32).tiny
        and all(
            type(t) in (Tensor, torch.nn.Parameter)
            and t.device.type == "cpu"
            and t.dtype == torch.float32
            and t.layout == torch.strided
            and t.is_contiguous()
            for t in tensors
        )
    )


OPTIMIZERS = ("sgd", "adagrad", "adam", "adamw")
KINDS = (torch.optim.SGD, Adagrad, torch.optim.Adam, torch.optim.AdamW)  # what they are


def make_optimizer(
    name: str | OptimizerFactory, params: Iterable[Tensor], lr: float, **options: Any
) -> torch.optim.Optimizer:
    """An optimizer by name, or by a factory ``params -> torch.optim.Optimizer`` (lr and options are then its
    own affair).

    ``options`` go to the optimizer: "sgd", "adam" and "adamw" are torch's (fused, and capturable on CUDA),
    "adagrad" is :class:`Adagrad` with ``accumulate_steps=100`` unless told otherwise.
    """
    params = list(params)
    if callable(name):
        return name(params)
    if name not in OPTIMIZERS:
        raise ValueError(
            f"optimizer: got {name!r}, wanted one of {', '.join(map(repr, OPTIMIZERS))} or a function"
        )
    if name == "adagrad":
        return Adagrad(params, lr, **{"accumulate_steps": 100, **options})
    fused = {"fused": all(p.is_floating_point() for p in params)}
    if name == "sgd":
        return torch.optim.SGD(params, lr, **{**fused, **options})
    capturable = {"capturable": any(p.is_cuda for p in params)}
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(params, lr, **{**fused, **capturable, **options})
