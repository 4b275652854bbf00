# SPDX-License-Identifier: Apache-2.0
"""BMP of Windows and OS/2. The new file has the header of Windows 3, a full palette or masks, and the pixels."""

import struct

import numpy as np

from photo.base import InvalidPhoto, Photo, check_size, damaged, join, truncated, unpack

FILE_HEADER = 14  # bytes
OS2_HEADER, WINDOWS_HEADER, LATER_HEADERS = 12, 40, (52, 56, 64, 108, 124)
RGB, BITFIELDS = 0, 3
COMPRESSIONS = {RGB: "no color masks", 1: "RLE8 compression", 2: "RLE4 compression", BITFIELDS: "color masks"}
# Bits per pixel and compression. RLE is not supported, because it may omit pixels.
SUPPORTED = {(1, RGB), (4, RGB), (8, RGB), (16, BITFIELDS), (24, RGB), (32, RGB), (32, BITFIELDS)}
MASKS_16 = {(0x7C00, 0x3E0, 0x1F), (0xF800, 0x7E0, 0x1F)}  # red, green, blue; 5 bits each, or 6 for green
BYTE_MASKS = {0xFF << 8 * index: index for index in range(4)}
ADVICE = "save it with 24 bits per pixel, or as a PNG"


def read_bmp(data: memoryview, max_pixels: int) -> Photo:
    """Return the BMP with a header, offsets and sizes that agree. Raises InvalidPhoto."""
    offset, header_size = unpack("<II", data, 10)
    compression = colors = 0
    if header_size == OS2_HEADER:
        width, height, _, bits = unpack("<HHHH", data, 18)
    elif header_size == WINDOWS_HEADER or header_size in LATER_HEADERS:
        width, height, _, bits, compression, _, _, _, colors = unpack("<iiHHIIiiI", data, 18)
    else:
        raise damaged("invalid DIB header")
    check_size(width, abs(height), max_pixels)  # a negative height: the first row is the top one
    if (bits, compression) not in SUPPORTED:
        what = COMPRESSIONS.get(compression, "an unknown compression")
        raise InvalidPhoto(
            f"the photo is a BMP with {bits} bits per pixel and {what}, which is not supported: {ADVICE}"
        )
    size = (width * bits + 31) // 32 * 4 * abs(height)  # each row is padded to 4 bytes
    pixels = data[offset : offset + size]
    if offset < FILE_HEADER + header_size:
        raise damaged("the pixels overlap the header")
    if len(pixels) < size:
        raise truncated("pixels are missing")
    table = b""
    if bits <= 8:
        entry = 3 if header_size == OS2_HEADER else 4
        colors = min(colors or 1 << bits, 1 << bits)
        table = _read_palette(data[FILE_HEADER + header_size :][: colors * entry], entry, 1 << bits)
    elif compression == BITFIELDS:
        masks = unpack("<III", data, FILE_HEADER + WINDOWS_HEADER)  # after this header, or within a longer one
        if bits == 16 and masks in MASKS_16:
            table = struct.pack("<III", *masks)
        elif bits == 32 and len(BYTE_MASKS.keys() & masks) == 3:
            compression, pixels = RGB, _reorder(pixels, [BYTE_MASKS[mask] for mask in reversed(masks)])
        else:
            raise InvalidPhoto(f"the photo is a BMP with unusual color masks: {ADVICE}")
    start = FILE_HEADER + WINDOWS_HEADER + len(table)
    header = struct.pack(
        "<2sIHHI IiiHHIIiiII",
        *(b"BM", start + len(pixels), 0, 0, start),
        *(WINDOWS_HEADER, width, height, 1, bits, compression, len(pixels), 0, 0, 1 << bits if bits <= 8 else 0, 0),
    )
    return Photo(join(header, table, pixels), width, abs(height), 1)


def _read_palette(entries: memoryview, entry: int, colors: int) -> bytes:
    """Return a palette with this number of colors, 4 bytes each, padded with black."""
    palette = np.zeros((colors, 4), np.uint8)
    count = len(entries) // entry
    palette[:count, :3] = np.frombuffer(entries[: count * entry], np.uint8).reshape(count, entry)[:, :3]
    return palette.tobytes()


def _reorder(pixels: memoryview, order: list[int]) -> memoryview:
    """Return pixels of 4 bytes in the order blue, green, red; ``order`` has the current index of each."""
    if order == [0, 1, 2]:
        return pixels
    old = np.frombuffer(pixels, np.uint8).reshape(-1, 4)
    new = np.zeros_like(old)
    for target, source in enumerate(order):
        new[:, target] = old[:, source]
    return new.reshape(-1).data
