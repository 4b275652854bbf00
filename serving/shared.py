# SPDX-License-Identifier: Apache-2.0
"""Memory that forked processes share. It is anonymous: it takes no space in /dev/shm, and needs no clean-up."""

import mmap

import numpy as np


def share_numbers(count: int) -> np.ndarray:
    """Return zeros, float64 ``[count]``, that the processes forked from now on share.

    Writing one number is atomic. Each should have one writer.
    """
    return np.frombuffer(mmap.mmap(-1, 8 * count), np.float64)


def share_bytes(count: int) -> np.ndarray:
    """Return zeros, uint8 ``[count]``, that the processes forked from now on share. Unused pages take up no memory."""
    return np.frombuffer(mmap.mmap(-1, count), np.uint8)
