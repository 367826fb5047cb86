"""The compiled library seen as a backend: C++ on CPU, CUDA on GPU.

``_C.so`` holds ``torch.ops.neox_kernels.*`` on PyTorch's stable ABI: no Python and no ATen, so one binary serves every
Python and every torch from 2.10 on. Its fakes and gradients are registered here, at import, so that torch.compile,
torch.export and users of the raw ops find them.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
CHECKS_ITSELF = ("cpu",)

_FOLDER = Path(__file__).parent


def _read_build_config() -> dict[str, Any]:
    path = _FOLDER / "_build_config.json"
    config: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return config


def _load() -> str | None:
    """Load the library; why it could not be, or None."""
    library = _FOLDER / "_C.so"
    if not library.exists():
        return f"this installation has no compiled library ({build_config.get('ext_reason') or 'it was not built'})"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        # torch wraps the loader's own words, which name the symbol or the file that is missing.
        reason = f"the compiled library does not load: {error.__cause__ or error}"
        warnings.warn(f"neox_kernels: {reason}; other backends serve instead", stacklevel=2)
        return reason
    return None


build_config = _read_build_config()
load_error = _load()


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device, or None."""
    if load_error is not None:
        return load_error
    if device_type == "cpu":
        return None
    if device_type != "cuda":
        return f"it has no kernels for {device_type}"
    if not build_config.get("cuda"):
        return f"it was built without CUDA ({build_config.get('cuda_reason') or 'nvcc was not found'})"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return None


def cpu_isa(name: str = "") -> str:
    """The CPU instruction set in use: default, avx2, avx512 or avx512_bf16. With a name, or "best", choose it."""
    isa: str = torch.ops.neox_kernels.cpu_isa(name)
    return isa


# The bits of the rotary ops' `flags` (csrc/rotary_ops.h).
_INTERLEAVED, _HEADS_FIRST, _CONJUGATE = 1, 2, 4
_FLAGS = {
    (interleaved, layout): _INTERLEAVED * interleaved + _HEADS_FIRST * (layout == "bhsd")
    for interleaved in (False, True)
    for layout in ("bshd", "bhsd")
}


def _needs_grad(*tensors: Tensor) -> bool:
    if forward_ad._current_level >= 0:  # a library op would drop the tangents without a word
        raise NotImplementedError("the compiled backend has no forward-mode derivative; use_backend('reference') has")
    return torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])


def _mark_written(*tensors: Tensor) -> None:
    """Tell autograd that these were written: the dispatcher does not for ops of a library."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            if not tensor.is_inference():
                increment_version(tensor)


def _rotation(
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    seqlen_offsets: int | Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    layout: str,
) -> tuple[Any, ...]:
    """The arguments that every rotary op ends with."""
    flags = _FLAGS[interleaved, layout]
    if isinstance(seqlen_offsets, Tensor):
        return cos, sin, position_ids, seqlen_offsets.contiguous(), cu_seqlens, 0, flags
    return cos, sin, position_ids, None, cu_seqlens, seqlen_offsets or 0, flags


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    seqlen_offsets: int | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    inplace: bool = False,
    layout: str = "bshd",
) -> Tensor:
    """See :func:`neox_kernels.apply_rotary`."""
    rotation = _rotation(cos, sin, position_ids, seqlen_offsets, cu_seqlens, interleaved, layout)
    rotary = torch.ops.neox_kernels.rotary
    needs_grad = _needs_grad(x, cos, sin)
    if inplace and not needs_grad:
        torch.ops.neox_kernels.rotary_.default(x, *rotation)
        _mark_written(x)
        return x
    y: Tensor = (rotary.default if needs_grad else rotary.inference)(x, *rotation)
    return x.copy_(y) if inplace else y


def apply_rotary_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    seqlen_offsets: int | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    inplace: bool = False,
    layout: str = "bshd",
) -> tuple[Tensor, Tensor]:
    """See :func:`neox_kernels.apply_rotary_qk`."""
    rotation = _rotation(cos, sin, position_ids, seqlen_offsets, cu_seqlens, interleaved, layout)
    rotary_qk = torch.ops.neox_kernels.rotary_qk
    needs_grad = _needs_grad(q, k, cos, sin)
    if inplace and not needs_grad:
        torch.ops.neox_kernels.rotary_qk_.default(q, k, *rotation)
        _mark_written(q, k)
        return q, k
    result: tuple[Tensor, Tensor] = (rotary_qk.default if needs_grad else rotary_qk.inference)(q, k, *rotation)
    # autograd takes no library op that writes into its inputs, and copy_ knows every rule about views and leaves.
    return (q.copy_(result[0]), k.copy_(result[1])) if inplace else result


def apply_rotary_kv_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    layout: str = "bshd",
) -> Tensor:
    """See :func:`neox_kernels.apply_rotary_kv_append`."""
    if _needs_grad(q, k, v, cos, sin, k_cache, v_cache):
        raise ValueError("appending to a cache is for inference: no tensor may require a gradient")
    q_out: Tensor = torch.ops.neox_kernels.rotary_kv_append.default(
        k_cache, v_cache, q, k, v, cos, sin, cache_seqlens.contiguous(), position_ids, _FLAGS[interleaved, layout]
    )
    _mark_written(k_cache, v_cache)
    return q_out


# The gradient of a rotation is the rotation by the negative angle: each backward is the op with that flag turned.


def _save_rotation(ctx: Any, inputs: tuple[Any, ...], first: int) -> None:
    rotation = inputs[first:]
    if any(ctx.needs_input_grad[first : first + 2]):
        raise ValueError("cos and sin must not require a gradient: tables are constants here")
    *tensors, ctx.offset, ctx.flags = rotation
    ctx.save_for_backward(*tensors)


def _negative_angle(ctx: Any) -> tuple[Any, ...]:
    return *ctx.saved_tensors, ctx.offset, ctx.flags ^ _CONJUGATE


def _rotary_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.neox_kernels.rotary.default(grad, *_negative_angle(ctx)), *(None,) * 7


def _rotary_qk_backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    rotation = _negative_angle(ctx)
    needs_q, needs_k = ctx.needs_input_grad[:2]
    dq: Tensor | None
    dk: Tensor | None
    if needs_q and needs_k:
        dq, dk = torch.ops.neox_kernels.rotary_qk.default(grad_q, grad_k, *rotation)
    else:
        dq = torch.ops.neox_kernels.rotary.default(grad_q, *rotation) if needs_q else None
        dk = torch.ops.neox_kernels.rotary.default(grad_k, *rotation) if needs_k else None
    return dq, dk, *(None,) * 7


def _register() -> None:
    library = torch.library

    def same_place(*args: Any) -> None:
        # A call with a meta tensor among real ones ends up here, where nothing would be computed.
        places = {arg.device for arg in args if isinstance(arg, Tensor)}
        if len(places) > 1:
            raise ValueError(f"all tensors must be on one device, not on {', '.join(sorted(map(str, places)))}")

    @library.register_fake("neox_kernels::rotary")
    @library.register_fake("neox_kernels::rotary.inference")
    def _(x: Tensor, *rotation: Any) -> Tensor:
        same_place(x, *rotation)
        return x.new_empty(x.shape)

    @library.register_fake("neox_kernels::rotary_qk")
    @library.register_fake("neox_kernels::rotary_qk.inference")
    def _(q: Tensor, k: Tensor, *rotation: Any) -> tuple[Tensor, Tensor]:
        same_place(q, k, *rotation)
        return q.new_empty(q.shape), k.new_empty(k.shape)

    @library.register_fake("neox_kernels::rotary_")
    @library.register_fake("neox_kernels::rotary_qk_")
    def _(*args: Any) -> None:
        same_place(*args)

    @library.register_fake("neox_kernels::rotary_kv_append")
    def _(k_cache: Tensor, v_cache: Tensor, q: Tensor, *rest: Any) -> Tensor:
        same_place(k_cache, v_cache, q, *rest)
        return q.new_empty(q.shape)

    library.register_autograd(
        "neox_kernels::rotary",
        _rotary_backward,
        setup_context=lambda ctx, inputs, output: _save_rotation(ctx, inputs, 1),
    )
    library.register_autograd(
        "neox_kernels::rotary_qk",
        _rotary_qk_backward,
        setup_context=lambda ctx, inputs, output: _save_rotation(ctx, inputs, 2),
    )


if load_error is None:
    _register()
