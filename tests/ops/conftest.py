"""Triton's interpreter, made to compute as a GPU does."""

from __future__ import annotations

import os
from importlib.util import find_spec

import numpy as np

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    patch_tensor, create_dot, cast = interpreter._patch_lang_tensor, builder.create_dot, builder.cast_impl

    def patch_tensor_index(tensor, scope):
        """A loop's bounds are arrays of one element there, which numpy 2.4 no longer takes for whole numbers."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widen(x):
        """It keeps bfloat16 as the bits of whole numbers."""
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, *rest):
        """It would multiply these whole numbers."""
        return create_dot(self, *((widen(x) if x.dtype == tl.bfloat16 else x) for x in (a, b)), *rest)

    def cast_to_nearest(self, x, target):
        """It would cut off what bfloat16 has no room for."""
        if x.dtype.scalar == tl.bfloat16 and target.scalar == tl.float32:
            return widen(x)
        if x.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, x, target)
        bits = np.ascontiguousarray(x.data).view(np.uint32).astype(np.uint64)
        bits = np.where(np.isnan(x.data), 0x7FC00000, bits + 0x7FFF + (bits >> 16 & 1))
        return handle((bits >> 16).astype(np.uint16), tl.bfloat16)

    interpreter._patch_lang_tensor = patch_tensor_index
    builder.create_dot, builder.cast_impl = dot, cast_to_nearest
