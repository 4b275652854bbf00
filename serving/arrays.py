# SPDX-License-Identifier: Apache-2.0
"""Packs arrays into memory, one after another. Strings are packed in Triton's format: each after its length."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

ALIGNMENT = 64  # bytes, of each array: a cache line, which is enough for any dtype
STRINGS = "object"  # the dtype of arrays of bytes objects, as in PyTriton


class ArraySpec(NamedTuple):
    """The position, shape and dtype of an array in memory."""

    shape: tuple[int, ...]
    dtype: str  # numpy's name
    begin: int
    end: int


class Packer:
    """Places arrays into memory. Raises ValueError if the memory is too small."""

    def __init__(self, memory: np.ndarray):
        """``memory`` is uint8 ``[N]``."""
        self._memory = memory
        self.specs: dict[str, ArraySpec] = {}
        self.end = 0

    def reserve(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Return uninitialized memory for an array of fixed-size values, with this shape and dtype."""
        return self.allocate(name, shape, dtype, math.prod(shape) * np.dtype(dtype).itemsize).view(dtype).reshape(shape)

    def add(self, name: str, array: np.ndarray) -> None:
        """Copy an array of numbers or strings into the memory."""
        if array.dtype.kind in "OU":
            content, dtype = _serialize(array), STRINGS
        else:
            content, dtype = np.ascontiguousarray(array).reshape(-1).view(np.uint8), array.dtype.str
        # Not np.copyto, which releases the GIL: acquiring it again takes longer than the copy.
        self.allocate(name, array.shape, dtype, len(content)).data[:] = content.data

    def allocate(self, name: str, shape: tuple[int, ...], dtype: str, size: int) -> np.ndarray:
        """Return this number of bytes for an array, uint8 ``[size]``, at an aligned position."""
        begin = -(-self.end // ALIGNMENT) * ALIGNMENT
        end = begin + size
        if end > len(self._memory):
            raise ValueError(f"{name} does not fit: {end} bytes are needed, but only {len(self._memory)} are available")
        self.specs[name] = ArraySpec(tuple(shape), dtype, begin, end)
        self.end = end
        return self._memory[begin:end]


def unpack(memory: np.ndarray, specs: Mapping[str, ArraySpec]) -> dict[str, np.ndarray]:
    """Return the arrays that a :class:`Packer` placed into this memory: views, or copies of strings."""
    return {name: _read(memory[spec.begin : spec.end], spec) for name, spec in specs.items()}


def _read(content: np.ndarray, spec: ArraySpec) -> np.ndarray:
    if spec.dtype == STRINGS:
        return deserialize_bytes_tensor(content.tobytes()).reshape(spec.shape)
    return content.view(spec.dtype).reshape(spec.shape)


def _serialize(strings: np.ndarray) -> np.ndarray:
    if strings.size == 0:
        return np.empty(0, np.uint8)
    return np.frombuffer(serialize_byte_tensor(strings.astype(object)).item(), np.uint8)
