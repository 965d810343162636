"""PEFT's LoRA layer in the backbone's own dtype, forward and backward by hand: y = x W^T + (x A^T) (s B)^T.

PEFT takes x and the update to float32 and keeps both for backward. Here A and s B are cast down once a pass, nothing
but x and x A^T (rank columns) is kept, and the update is added to the frozen layer's output in place. The gradients
are those of the same formula (G = dL/dy):

    dL/dx = G W + (G s B) A        dL/dA = (G s B)^T x        dL/dB = s G^T (x A^T)
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.autograd import Function

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


class _Lora(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        down, up = a.to(weight.dtype), (b * scale).to(weight.dtype)
        inner = rows @ down.T
        y = rows @ weight.T if bias is None else bias.addmm(rows, weight.T)
        y.addmm_(inner, up.T)
        ctx.save_for_backward(rows, weight, inner, down, up)
        ctx.scale = scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, inner, down, up = ctx.saved_tensors
        gradient = outputs[0].reshape(-1, weight.shape[0])
        inner_gradient = gradient @ up
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = (gradient @ weight).addmm_(inner_gradient, down).view(*outputs[0].shape[:-1], -1)
        by_a = (inner_gradient.T @ rows).float()
        by_b = (gradient.T @ inner).float() * ctx.scale
        return by_x, None, None, by_a, by_b, None


def fuse(layers: Iterable[LoraLayer], adapter: str) -> None:
    """Have LoRA layers without dropout run by the formula above; the instances alone are changed."""
    for layer in layers:
        layer.forward = partial(_forward, layer, adapter)


def _forward(layer: LoraLayer, adapter: str, x: Tensor, *_: Any, **__: Any) -> Tensor:
    base = layer.get_base_layer()
    if layer.disable_adapters:
        return base(x)  # type: ignore[no-any-return]
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return _Lora.apply(x, base.weight, base.bias, a, b, layer.scaling[adapter])  # type: ignore[no-any-return,no-untyped-call]
