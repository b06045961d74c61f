"""Triton's interpreter, number for number the same, in about half the time.

It makes types and shapes anew at every operation, and at every call of a function within a kernel it wraps the whole language
again, which the launch around it has done. Here these are kept; no operation on numbers is touched but, where a test asks for it,
the cast to float8.
"""

from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
import triton
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def make_faster() -> None:
    """For a process whose kernels are all interpreted. Written for Triton 3.7; others are left as they are."""
    if triton.__version__.startswith("3.7."):
        _keep_numpys_types()
        _wrap_the_language_once_a_launch()
        _share_shapes()


def _keep_numpys_types() -> None:
    look_up, kept = interpreter._get_np_dtype, {}

    def type_of(type: Any) -> Any:
        name = type.scalar.name
        if name not in kept:
            kept[name] = look_up(type)
        return kept[name]

    interpreter._get_np_dtype = type_of


class _NothingToRestore:
    def restore(self) -> None: ...


def _wrap_the_language_once_a_launch() -> None:
    wrap, wrapped = interpreter._patch_lang, set()

    def once(function: FunctionType) -> Any:
        modules = {id(value) for value in function.__globals__.values() if value is interpreter.tl or value is core}
        if wrapped and modules <= wrapped:
            return _NothingToRestore()
        scope, of_the_launch = wrap(function), not wrapped
        wrapped.update(modules)
        if of_the_launch:
            restore = scope.restore

            def end() -> None:
                wrapped.clear()
                restore()

            scope.restore = end
        return scope

    interpreter._patch_lang = once


def _share_shapes() -> None:
    """Blocks of the same sizes have one shape object; two of these need no broadcasting."""
    block, tensor, broadcast = core.block_type.__init__, core.tensor.__init__, TritonSemantic.broadcast_impl_value
    shapes: dict[Any, Any] = {}
    blocks: dict[Any, dict[str, Any]] = {}
    of_tensors: dict[int, tuple[Any, Any]] = {}

    def block_of(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(
            size.value if isinstance(size, core.constexpr) else size for size in core._unwrap_if_constexpr(shape)
        )
        key = type(shape), element_ty.name, getattr(element_ty, "address_space", None), sizes
        if key not in blocks:
            block(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            blocks[key] = dict(self.__dict__)
        self.__dict__.update(blocks[key])

    def tensor_of(self: Any, handle: Any, type: Any) -> None:
        key = id(type.shape) if type.is_block() else 0
        if key not in of_tensors:
            tensor(self, handle, type)
            if not key or type.shape is shapes.get(tuple(type.shape)):  # kept for good, so its number stays its own
                of_tensors[key] = self.numel, self.shape
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = of_tensors[key]

    def broadcast_of(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    core.block_type.__init__ = block_of
    core.tensor.__init__ = tensor_of
    TritonSemantic.broadcast_impl_value = broadcast_of


def cast_to_float8_as_torch(patch: pytest.MonkeyPatch) -> None:
    """The one operation on numbers that is touched, where a test asks for it."""
    own: Any = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target != interpreter.tl.float8e4nv:
            return own(data, source, target, rounding)
        assert data.dtype == np.float32
        return torch.from_numpy(np.ascontiguousarray(data)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    patch.setattr(interpreter, "_convert_float", convert)
