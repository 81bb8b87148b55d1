"""Triton's interpreter without what it does again and again: it runs most of the kernels' tests.

Nothing here changes a result or drops a check: what Triton computes for every operation is kept, or computed directly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def make_faster() -> None:
    """Called once, before a kernel is defined."""
    replace_language_once()
    check_overflow_directly()
    keep_types()


def replace_language_once() -> None:
    """A call of a device function replaces what its module sees of `triton.language`, a quarter of the tests' time.

    Within a launch that is now done once for each module: the replacements last until the launch ends.
    """
    from triton.runtime import interpreter

    launcher, function = interpreter.GridExecutor, interpreter.InterpretedFunction
    launch, called = launcher.__call__, function.__call__
    running: list[set[int]] = []

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        running.append({id(self.fn.__globals__)})
        try:
            launch(self, *args, **kwargs)
        finally:
            running.pop()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if not running or module not in running[-1]:
            if running:
                running[-1].add(module)
            return called(self, *args, **kwargs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    launcher.__call__, function.__call__ = launched, call


def check_overflow_directly() -> None:
    """Whether an integer operation leaves its dtype is asked of numpy, not of a dozen interpreted operations."""
    import numpy as np
    from triton.language.semantic import TritonSemantic
    from triton.runtime.interpreter import InterpreterBuilder

    original = TritonSemantic.binary_op_sanitize_overflow_impl
    known = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(self: Any, lhs: Any, rhs: Any, binary_op: Callable[..., Any]) -> None:
        dtype, function = lhs.type.scalar, known.get(binary_op.__name__)
        if function is None or not isinstance(self.builder, InterpreterBuilder):
            original(self, lhs, rhs, binary_op)
        elif dtype.int_bitwidth < 64 and self.builder.options.sanitize_overflow:
            exact = function(lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
            inside = (exact <= dtype.get_int_max_value()) & (exact >= dtype.get_int_min_value())
            assert inside.all(), f"int{dtype.int_bitwidth} overflow detected for operation {binary_op.__name__}"

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def keep_types() -> None:
    """Every result is wrapped in a tensor that describes its shape, and asks for numpy's dtype: each is found once."""
    from triton.language import core
    from triton.runtime import interpreter

    dtype_of = interpreter._get_np_dtype
    dtypes: dict[str, Any] = {}

    def np_dtype(dtype: Any) -> Any:
        scalar = dtype.element_ty if isinstance(dtype, core.block_type) else dtype
        if scalar.name not in dtypes:
            dtypes[scalar.name] = dtype_of(scalar)
        return dtypes[scalar.name]

    @functools.cache
    def described(shape: tuple[int, ...]) -> tuple[Any, Any]:
        whole = core.tensor(None, core.block_type(core.int1, shape)) if shape else core.tensor(None, core.int1)
        return whole.shape, whole.numel

    blocks: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    typed = core.block_type.__init__

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *shape)
        if key in blocks:
            self.element_ty = element_ty
            self.shape, self.numel, self.name = blocks[key]
        else:
            typed(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name

    made = core.tensor.__init__

    def init(self: Any, handle: Any, type: Any) -> None:
        if handle is None:
            made(self, handle, type)
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = described(type.shape if type.is_block() else ())

    interpreter._get_np_dtype = np_dtype
    core.block_type.__init__ = block
    core.tensor.__init__ = init
