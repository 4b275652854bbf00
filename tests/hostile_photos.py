# SPDX-License-Identifier: Apache-2.0
"""Writes photos as no camera does: any variant of a format, and files whose parts are damaged or contradict each other.

Each format has a small encoder here, because Pillow writes few of the variants that exist.
"""

import io
import random
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


@dataclass(frozen=True)
class Sample:
    """A photo, and its known properties."""

    data: bytes
    format: str
    orientation: int = 1  # that the first EXIF block states, or 0 if damage may have changed it
    pixels_are_whole: bool = True  # otherwise, decoders may return different pixels


def picture(dice: random.Random, mode: str = "RGB") -> Image.Image:
    """Return a picture of random size with smooth and sharp parts."""
    size = dice.choice(((dice.randint(1, 160), dice.randint(1, 160)), (120, 80), (80, 120), (64, 64)))
    small = np.random.default_rng(dice.getrandbits(32)).integers(40, 216, (6, 6, 4), dtype=np.uint8)
    image = Image.fromarray(small, "RGBA").resize(
        size, dice.choice((Image.Resampling.BICUBIC, Image.Resampling.NEAREST))
    )
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


# JPEG


def segment(marker: int, body: bytes) -> bytes:
    """Return a segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body


DC_TABLE = bytes([0x00, 0, 0, 0, 12, *12 * [0]]) + bytes(range(12))  # categories 0 to 11, 4 bits each
AC_TABLE = bytes([0x10, 1, *15 * [0]]) + b"\0"  # the end of a block: one bit
JFIF, ADOBE = segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"), b"Adobe\0\x64\0\0\0\0"


class Bits:
    """The data of a scan."""

    def __init__(self):
        self.text = ""
        self.data = b""

    def add(self, value: int, count: int) -> None:
        """Append the lowest bits of a number."""
        if count:
            self.text += f"{value & ((1 << count) - 1):0{count}b}"

    def finish(self, marker: bytes = b"") -> bytes:
        """Fill the last byte with ones, and append a marker. Returns everything so far."""
        text = self.text + "1" * (-len(self.text) % 8)
        self.data += int(text or "0", 2).to_bytes(len(text) // 8).replace(b"\xff", b"\xff\0") + marker
        self.text = ""
        return self.data


def blocks_jpeg(
    size: tuple[int, int],
    factors: Sequence[tuple[int, int]],
    dice: random.Random,
    *,
    progressive: bool = False,
    interleaved: bool = True,
    interval: int = 0,
    ids: Sequence[int] = (1, 2, 3, 4),
    colors: bytes = JFIF,
    wide_quantization: bool = False,
    bands: int = 2,
) -> bytes:
    """Return a JPEG whose blocks of 8 x 8 are flat, for any sampling factors and order of scans.

    ``bands`` is the number of scans for the other coefficients of each component in a progressive JPEG.
    """
    width, height = size
    widest, highest = (max(values) for values in zip(*factors, strict=True))
    columns, rows = ceil(width / (8 * widest)), ceil(height / (8 * highest))
    planes = [
        [[dice.randint(-60, 60) for _ in range(columns * h)] for _ in range(rows * v)] for h, v in factors
    ]  # the DC coefficients

    def scan(indices: Sequence[int], first: int, last: int, high: int, low: int) -> bytes:
        bits, previous, units = Bits(), dict.fromkeys(indices, 0), []
        if len(indices) > 1:
            for unit in range(rows * columns):
                row, column = divmod(unit, columns)
                units.append(
                    [
                        (index, row * v + y, column * h + x)
                        for index in indices
                        for h, v in [factors[index]]
                        for y in range(v)
                        for x in range(h)
                    ]
                )
        else:
            h, v = factors[indices[0]]
            across, down = (
                ceil(ceil(length * f / most) / 8) for length, f, most in ((width, h, widest), (height, v, highest))
            )
            units = [[(indices[0], y, x)] for y in range(down) for x in range(across)]
        for number, unit in enumerate(units):
            if interval and number and number % interval == 0:
                bits.finish(bytes([0xFF, 0xD0 + (number // interval - 1) % 8]))
                previous = dict.fromkeys(indices, 0)
            for index, y, x in unit:
                value = planes[index][y][x]
                if first == 0 and high:
                    bits.add(value >> low, 1)
                elif first == 0:
                    difference = (value >> low) - previous[index]
                    previous[index] = value >> low
                    category = abs(difference).bit_length()
                    bits.add(category, 4)
                    bits.add(difference if difference > 0 else difference - 1, category)
                if last:
                    bits.add(0, 1)
        header = bytes([len(indices)]) + b"".join(bytes([ids[index], 0]) for index in indices)
        return segment(0xDA, header + bytes([first, last, 16 * high + low])) + bits.finish()

    everything = range(len(factors))
    groups = [everything] if interleaved and sum(h * v for h, v in factors) <= 10 else [[index] for index in everything]
    if progressive:
        cuts = [0, *sorted(dice.sample(range(1, 63), bands - 1)), 63]
        scans = [scan(group, 0, 0, 0, 1) for group in groups]
        scans += [scan([index], 1, cuts[1], 0, 0) for index in everything]
        scans += [scan(group, 0, 0, 1, 0) for group in groups]
        scans += [scan([index], cut + 1, last, 0, 0) for cut, last in pairwise(cuts[1:]) for index in everything]
    else:
        scans = [scan(group, 0, 63, 0, 0) for group in groups]
    quantization = b"\x10" + 64 * b"\0\x10" if wide_quantization else b"\0" + 64 * b"\x10"
    frame = struct.pack(">BHHB", 8, height, width, len(factors))
    frame += b"".join(bytes([number, 16 * h + v, 0]) for number, (h, v) in zip(ids, factors, strict=False))
    tables = (
        segment(0xDB, quantization) + segment(0xC4, DC_TABLE + AC_TABLE) + segment(0xDD, struct.pack(">H", interval))
    )
    marker = 0xC2 if progressive else 0xC1 if wide_quantization else 0xC0
    return b"\xff\xd8" + colors + tables + segment(marker, frame) + b"".join(scans) + b"\xff\xd9"


FACTORS = (
    [(1, 1)],
    [(2, 2)],
    [(1, 1)] * 3,
    [(2, 1), (1, 1), (1, 1)],
    [(1, 2), (1, 1), (1, 1)],
    [(2, 2), (1, 1), (1, 1)],
    [(4, 1), (1, 1), (1, 1)],
    [(4, 2), (1, 1), (1, 1)],
    [(2, 2), (2, 1), (2, 1)],
    [(2, 2), (1, 2), (2, 1)],
    [(1, 1), (2, 2), (1, 2)],
    [(3, 1), (1, 1), (1, 1)],
    [(2, 2)] * 3,
    [(1, 1)] * 4,
    [(2, 2), (1, 1), (1, 1), (2, 2)],
)


def any_jpeg(dice: random.Random) -> bytes:
    """Return a good JPEG of any kind."""
    if dice.random() < 0.5:
        options = {
            "quality": dice.randint(5, 100),
            "subsampling": dice.randint(0, 2),
            "progressive": dice.random() < 0.3,
        }
        if dice.random() < 0.3:
            options["restart_marker_blocks"] = dice.randint(1, 9)
        return encode(picture(dice, dice.choice(("RGB", "RGB", "L", "CMYK"))), "JPEG", **options)
    factors = dice.choice(FACTORS)
    count = len(factors)
    return blocks_jpeg(
        (dice.randint(1, 90), dice.randint(1, 90)),
        factors,
        dice,
        progressive=dice.random() < 0.4,
        interleaved=dice.random() < 0.7,
        interval=dice.choice((0, 0, 1, 2, 7)),
        ids=dice.choice(((1, 2, 3, 4), (0, 1, 2, 3), b"RGBA", (7, 200, 3, 9))),
        colors=dice.choice(
            (b"", JFIF, segment(0xEE, ADOBE + bytes([dice.randint(0, 2)])), JFIF + segment(0xEE, ADOBE + b"\0"))
            if count == 3
            else (b"", segment(0xEE, ADOBE + bytes([dice.choice((0, 2))])))
            if count == 4
            else (JFIF, b"")
        ),
        wide_quantization=dice.random() < 0.1,
    )


# PNG


def chunk(kind: bytes, body: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def ihdr(width: int, height: int, depth: int = 8, color_type: int = 2, interlaced: bool = False) -> bytes:
    """Return the header of a PNG."""
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, interlaced))


ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def any_png(dice: random.Random) -> bytes:
    """Return a good PNG of any color type, bit depth and interlacing."""
    color_type, depths = dice.choice(
        ((0, (1, 2, 4, 8, 16)), (2, (8, 16)), (3, (1, 2, 4, 8)), (4, (8, 16)), (6, (8, 16)))
    )
    depth = dice.choice(depths)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color_type]
    width, height = dice.randint(1, 100), dice.randint(1, 100)
    values = np.random.default_rng(dice.getrandbits(32)).integers(0, 1 << depth, (height, width, channels))
    interlaced = dice.random() < 0.4
    data = b""
    for left, top, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        rows = values[top::down, left::across]
        if rows.size:
            bits = (rows.reshape(len(rows), -1)[..., None] >> np.arange(depth)[::-1]) & 1
            data += b"".join(b"\0" + np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in bits)
    compressed = zlib.compress(data, dice.choice((0, 1, 9)))
    cut = dice.randint(0, len(compressed))
    parts = [ihdr(width, height, depth, color_type, interlaced)]
    if color_type == 3 or (color_type in (2, 6) and dice.random() < 0.2):
        parts.append(chunk(b"PLTE", dice.randbytes(3 * (1 << depth if color_type == 3 else 9))))
    if color_type in (0, 2, 3) and dice.random() < 0.3:
        parts.append(chunk(b"tRNS", {0: bytes(2), 2: bytes(6), 3: dice.randbytes(2)}[color_type]))
    parts += [chunk(b"IDAT", compressed[:cut]), chunk(b"IDAT", compressed[cut:]), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# WebP


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    """Return a WebP of these chunks."""
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def any_webp(dice: random.Random) -> bytes:
    """Return a good WebP of any kind."""
    image = picture(dice, dice.choice(("RGB", "RGBA")))
    return encode(image, "WEBP", lossless=dice.random() < 0.5, quality=dice.randint(1, 100), method=dice.randint(0, 4))


# BMP


def any_bmp(dice: random.Random) -> bytes:
    """Return a good BMP of any kind."""
    bits, compression = dice.choice(((1, 0), (4, 0), (8, 0), (16, 3), (24, 0), (32, 0), (32, 3)))
    width, height = dice.randint(1, 70), dice.randint(1, 70)
    header = dice.choice(
        {(16, 3): (40, 52, 56, 108, 124), (32, 3): (40, 56, 124), (32, 0): (40, 108)}.get(
            (bits, compression), (12, 40, 64, 108, 124)
        )
    )
    top_down = header != 12 and dice.random() < 0.4
    colors = 1 << bits if bits <= 8 else 0
    masks = b""
    if compression == 3:
        masks = struct.pack("<III", *dice.choice(BMP_MASKS[bits]))
    pixels = dice.randbytes((width * bits + 31) // 32 * 4 * height)
    if header == 12:
        info = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        size = -height if top_down else height
        info = struct.pack("<IiiHHIIiiII", header, width, size, 1, bits, compression, len(pixels), 1, 1, 0, 0)
        info += masks if header == 40 else masks.ljust(header - 40, b"\0")
    palette = b"".join(dice.randbytes(3) + b"\0" * (header != 12) for _ in range(colors))
    gap = bytes(dice.choice((0, 0, 4)))
    offset = 14 + len(info) + len(palette) + len(gap)
    return struct.pack("<2sIHHI", b"BM", offset + len(pixels), 0, 0, offset) + info + palette + gap + pixels


BMP_MASKS = {
    16: [(0x7C00, 0x3E0, 0x1F), (0xF800, 0x7E0, 0x1F)],
    32: [(0xFF0000, 0xFF00, 0xFF), (0xFF000000, 0xFF0000, 0xFF00)],
}

ENCODERS = {"JPEG": any_jpeg, "PNG": any_png, "WEBP": any_webp, "BMP": any_bmp}


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    """Return the image as a file, as Pillow writes it."""
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


# EXIF


def exif_block(dice: random.Random) -> tuple[bytes, int]:
    """Return an EXIF block, without the prefix that JPEG has, and the orientation that it states."""
    order = dice.choice("<>")
    start = {"<": b"II*\0", ">": b"MM\0*"}[order]
    orientation = dice.randint(1, 8)
    kind, field = dice.choice(((3, "H2x"), (3, "H2x"), (4, "I")))
    good = struct.pack(f"{order}HHI{field}", 0x0112, kind, 1, orientation)
    other = struct.pack(f"{order}HHII", 0x0100, 4, 1, 77)
    how = dice.choice(
        ("good", "good", "good", "good", "after others", "value", "type", "count", "offset", "second", "cut", "loop")
    )
    entries, next_directory = [good], 0
    if how == "after others":
        entries = [other] * dice.randint(1, 20) + [good]
    elif how == "value":
        entries, orientation = [struct.pack(f"{order}HHIH2x", 0x0112, 3, 1, dice.choice((0, 9, 77, 65535)))], 1
    elif how == "type":
        entries, orientation = [struct.pack(f"{order}HHII", 0x0112, dice.choice((0, 1, 2, 5, 9, 99)), 1, 6)], 1
    elif how == "count":
        entries, orientation = [struct.pack(f"{order}HHIH2x", 0x0112, 3, dice.choice((0, 2, 1 << 31)), 6)], 1
    elif how == "loop":
        next_directory = 8
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + struct.pack(f"{order}I", next_directory)
    if how == "second":  # in the directory of the preview
        first = struct.pack(f"{order}H", 1) + other
        directory, orientation = first + struct.pack(f"{order}I", 8 + len(first) + 4) + directory, 1
    block = start + struct.pack(f"{order}I", 8) + directory
    if how == "offset":
        block, orientation = (
            start + struct.pack(f"{order}I", dice.choice((len(block), 1 << 31, (1 << 32) - 1))) + directory,
            1,
        )
    elif how == "cut":
        block, orientation = block[: dice.randint(0, 20)], 1
    return block, orientation


# Damage


def split(data: bytes, file_format: str) -> list[bytes]:
    """Return the parts of a good file: segments, chunks, or headers and pixels."""
    ends = []
    if file_format == "JPEG":
        position = 2
        while position < len(data):
            ends.append(position)
            if data[position + 1] == 0xD9:
                break
            position += 2 + int.from_bytes(data[position + 2 : position + 4])
            if data[ends[-1] + 1] == 0xDA:
                ends.append(position)
                while not (data[position] == 0xFF and data[position + 1] not in (0, *range(0xD0, 0xD8))):
                    position += 1
    elif file_format in ("PNG", "WEBP"):
        position = 8 if file_format == "PNG" else 12
        while position < len(data):
            ends.append(position)
            if file_format == "PNG":
                position += 12 + int.from_bytes(data[position : position + 4])
            else:
                length = int.from_bytes(data[position + 4 : position + 8], "little")
                position += 8 + length + length % 2
    else:
        ends = [14, 54, int.from_bytes(data[10:14], "little")]
    return [data[begin:end] for begin, end in zip([0, *ends], [*ends, len(data)], strict=True)]


def damage(parts: list[bytes], file_format: str, dice: random.Random) -> None:
    """Damage one of the parts, or their order."""
    at = min(dice.randrange(len(parts)) or dice.randrange(len(parts)), len(parts) - 1)  # rarely the signature
    how = dice.choice(("drop", "repeat", "swap", "cut", "flip", "flip", "number", "splice", "insert"))
    if how == "drop":
        del parts[at]
    elif how == "repeat":
        parts[at:at] = [parts[at]] * dice.randint(1, 3)
    elif how == "swap":
        other = dice.randrange(len(parts))
        parts[at], parts[other] = parts[other], parts[at]
    elif how == "cut":
        parts[at] = parts[at][: dice.randrange(len(parts[at]) + 1)]
    elif how in ("flip", "number") and parts[at]:
        part = bytearray(parts[at])
        place = dice.randrange(min(len(part), dice.choice((12, 40, len(part)))))
        if how == "flip":
            part[place] ^= 1 << dice.randrange(8)
        else:
            part[place] = dice.choice((0, 1, 0x7F, 0x80, 0xD0, 0xD9, 0xFF))
        parts[at] = bytes(part)
    elif how == "splice":
        others = split(ENCODERS[file_format](dice), file_format)
        parts[at] = dice.choice(others)
    elif how == "insert":
        parts.insert(at, dice.choice((dice.randbytes(dice.randint(1, 30)), *METADATA[file_format])))


METADATA = {
    "JPEG": (
        segment(0xFE, b"a comment \xff\xd9"),
        segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(200)),
        segment(0xEE, ADOBE + b"\0"),
        segment(0xDD, b"\0\3"),
        b"\xff\xff\xff",
        b"\xff\xd3",
        segment(0xDC, b"\0\x40"),
    ),
    "PNG": (
        chunk(b"tEXt", b"Comment\0a\x1b[2Jb"),
        chunk(b"iCCP", b"a\nb\x1b[1m\0\0" + zlib.compress(bytes(1000))),
        chunk(b"acTL", struct.pack(">II", 1, 0)),
        chunk(b"gAMA", struct.pack(">I", 45455)),
        chunk(b"abCd", b"1234"),
        chunk(b"ABCD", b"1234"),
        chunk(b"tRNS", bytes(6)),
        chunk(b"PLTE", bytes(9)),
        chunk(b"IDAT", b""),
    ),
    "WEBP": (
        b"ICCP\4\0\0\0abcd",
        b"abcd\3\0\0\0abc\0",
        b"ANIM\6\0\0\0abcdef",
        b"VP8X\n\0\0\0" + bytes(10),
        b"ALPH\5\0\0\0" + bytes(6),
    ),
    "BMP": (bytes(4),),
}


def repair(data: bytes, file_format: str) -> bytes:
    """Return the file with sizes and checksums that fit, so that damage goes further than the first check."""
    if file_format == "WEBP" and len(data) > 12:
        return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]
    if file_format != "PNG":
        return data
    repaired, position = data[:8], 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if position + 12 + length > len(data):
            break
        repaired += chunk(kind, data[position + 8 : position + 8 + length])
        position += 12 + length
    return repaired + data[position:]


def add_exif(data: bytes, file_format: str, dice: random.Random) -> tuple[bytes, int]:
    """Return a good file with one to three EXIF blocks, and the orientation that the first of them states."""
    blocks, orientations = zip(*[exif_block(dice) for _ in range(dice.choice((1, 1, 2, 2, 3)))], strict=True)
    parts = split(data, file_format)
    if file_format == "JPEG":
        segments = [segment(0xE1, b"Exif\0\0" + block) for block in blocks]
        scan = next(index for index, part in enumerate(parts) if part.startswith(b"\xff\xda"))
        places = sorted(dice.randint(1, scan) for _ in blocks)
    elif file_format == "PNG":
        segments = [chunk(b"eXIf", block) for block in blocks]
        kinds = [part[4:8] for part in parts]
        pixels = kinds.index(b"IDAT")
        places = sorted(dice.choice((dice.randint(2, pixels), len(parts) - 1)) for _ in blocks)
    elif file_format == "WEBP":
        image = Image.open(io.BytesIO(data))
        if parts[1][:4] != b"VP8X":
            size = struct.pack("<I", image.width - 1)[:3] + struct.pack("<I", image.height - 1)[:3]
            parts.insert(1, b"VP8X\n\0\0\0\x08\0\0\0" + size)
        else:
            parts[1] = parts[1][:8] + bytes([parts[1][8] | 8]) + parts[1][9:]
        segments = [b"EXIF" + struct.pack("<I", len(block)) + block + bytes(len(block) % 2) for block in blocks]
        places = [len(parts)] * len(blocks)
    else:
        return data, 1
    for place, part in reversed(list(zip(places, segments, strict=True))):
        parts.insert(place, part)
    data = b"".join(parts)
    return (repair(data, file_format) if file_format == "WEBP" else data), orientations[0]


def hostile_photo(number: int) -> Sample:
    """Return the photo with this number, which is always the same."""
    dice = random.Random(number)
    file_format = dice.choice(("JPEG", "JPEG", "PNG", "PNG", "WEBP", "BMP"))
    data, orientation, whole = ENCODERS[file_format](dice), 1, True
    if dice.random() < 0.5:
        data, orientation = add_exif(data, file_format, dice)
    if dice.random() < 0.6:
        parts, orientation, whole = split(data, file_format), 0, False
        for _ in range(dice.randint(1, 3)):
            if parts:
                damage(parts, file_format, dice)
        data = b"".join(parts)
        if dice.random() < 0.8:
            data = repair(data, file_format)
    return Sample(data or b"x", file_format, orientation, whole)
