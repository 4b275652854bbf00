# SPDX-License-Identifier: Apache-2.0
"""JPEG, ITU-T T.81: baseline, extended sequential and progressive, with Huffman coding and 8 bits.

The new file has one segment that defines the color components, the quantization tables, the frame, and the scans, each
with its Huffman tables and restart interval. Components are numbered from 1.
"""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil

import numpy as np

from photo.base import (
    MAX_SEGMENTS,
    TOO_MANY_SEGMENTS,
    InvalidPhoto,
    Photo,
    check_size,
    damaged,
    join,
    read_orientation,
    truncated,
    unpack,
)

# Encoders write about 10 scans into a progressive JPEG. A scan of 44 bytes makes the decoder visit every pixel, which
# takes 70 ms at 25 megapixels. The second limit applies to photos of ``max_pixels``.
MAX_SCANS, MAX_SCANS_OF_LARGEST = 64, 24
MAX_TABLES = 1000  # more than a file needs, even if each scan redefines all tables

# Markers, as in table B.1.
SOF0, SOF1, SOF2, DHT, SOI, EOI, SOS, DQT, DNL, DRI = 0xC0, 0xC1, 0xC2, 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD
RST0, APP0, APP1, APP14, APP15, COM = 0xD0, 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
OTHER_FRAMES = frozenset(range(0xC3, 0xD0)) | {0xDE}  # lossless, hierarchical, arithmetic coding
PREFIX = re.compile(rb"\xff+")  # of a marker; all but one byte are fill

WINDOW = 1 << 18  # bytes of a scan to search at a time; they fit into the CPU's cache
RESTARTS = np.resize(np.arange(RST0, RST0 + 8, dtype=np.uint8), WINDOW + 8)  # restart markers count up
BLOCK = 8  # pixels
MIN_SIDE = 16  # pixels, for nvJPEG: in smaller photos, every pixel is near an edge
DC, AC = 0, 1  # classes of Huffman tables

BASELINE_ADVICE = "save it as a baseline JPEG"
JFIF = b"JFIF\0\1\1\0\0\1\0\1\0\0"
ADOBE = b"Adobe\0\x64\0\0\0\0"  # followed by the transform
NO_TRANSFORM, YCCK = b"\0", b"\2"


@dataclass
class Component:
    """A color component."""

    horizontal: int  # sampling factors
    vertical: int
    quantization: int  # the number of its table
    # For each coefficient, the lowest bit that the scans have contained so far.
    lowest_bits: list[int | None] = field(default_factory=lambda: [None] * 64)


class JpegReader:
    """Reads a JPEG, and collects the parts of the new file."""

    def __init__(self, data: memoryview, max_pixels: int):
        self.data = data
        self.max_pixels = max_pixels
        self.orientation: int | None = None
        self.has_jfif = False
        self.transform: int | None = None  # of the colors, according to Adobe's segment
        self.quantization: dict[int, bytes] = {}  # tables by number
        self.huffman: dict[tuple[int, int], bytes] = {}  # tables by class and number
        self.table_count = 0
        self.restart_interval = 0  # in MCUs (minimum coded units)
        self.has_restarts = False
        self.frame: int | None = None  # its marker
        self.width = self.height = 0
        self.components: dict[int, Component] = {}  # by the number in the file
        self.scans: list[bytes | memoryview] = []
        self.scan_count = 0
        self.active: dict[object, bytes] = {DRI: bytes(2)}  # segments of the new file that apply to the next scan

    def read(self) -> Photo:
        """Read the segments up to the end of the image, and ignore the rest: phones append pictures and videos."""
        position = 2
        for _ in range(MAX_SEGMENTS):
            marker, position = self.read_marker(position)
            if marker == EOI:
                return self.rebuild()
            (length,) = unpack(">H", self.data, position)
            body = bytes(self.data[position + 2 : position + length])
            position += length
            if length < 2:
                raise damaged("a segment without a length")
            if position > len(self.data):
                raise truncated("no end-of-image marker")
            if marker == SOS:
                position = self.read_scan(body, position)
            else:
                self.read_segment(marker, body)
        raise InvalidPhoto(TOO_MANY_SEGMENTS)

    def read_marker(self, position: int) -> tuple[int, int]:
        """Return the marker at this position, and where it ends."""
        prefix = PREFIX.match(self.data, position)
        end = prefix.end() if prefix else position
        if end == len(self.data):
            raise truncated("no end-of-image marker")
        if not prefix:
            raise damaged("a segment of the wrong length")
        return self.data[end], end + 1

    def read_segment(self, marker: int, body: bytes) -> None:
        """Read a segment other than a scan."""
        if marker in (SOF0, SOF1, SOF2):
            self.read_frame(marker, body)
        elif marker == DQT:
            self.read_quantization(body)
        elif marker == DHT:
            self.read_huffman(body)
        elif marker == DRI:
            (self.restart_interval,) = unpack(">H", body)
        elif APP0 <= marker <= APP15 or marker == COM:
            if not self.scans:  # decoders and viewers also ignore later ones
                self.read_metadata(marker, body)
        elif marker in OTHER_FRAMES:
            raise InvalidPhoto(f"the photo is an arithmetic-coded, lossless or hierarchical JPEG: {BASELINE_ADVICE}")
        elif marker == DNL:
            raise InvalidPhoto(f"the photo states its height after its pixels (DNL): {BASELINE_ADVICE}")
        else:
            raise damaged("an unknown segment")

    def read_metadata(self, marker: int, body: bytes) -> None:
        """Read the relevant fields of an application's segment."""
        if marker == APP0 and body.startswith(b"JFIF\0") and len(body) >= len(JFIF):
            self.has_jfif = True
        elif marker == APP14 and body.startswith(b"Adobe") and len(body) > 11:
            self.transform = body[11]
        elif marker == APP1 and body.startswith(b"Exif\0\0") and self.orientation is None:
            self.orientation = read_orientation(body)

    def read_quantization(self, body: bytes) -> None:
        """Read quantization tables."""
        while body:
            self.count_table()
            wide, number = divmod(body[0], 16)
            size = 1 + BLOCK * BLOCK * (1 + wide)
            if wide > 1 or number > 3 or len(body) < size:
                raise damaged("invalid quantization table")
            if self.scans and self.quantization.get(number) != body[:size]:
                raise damaged("another quantization table between scans")
            self.quantization[number], body = body[:size], body[size:]

    def read_huffman(self, body: bytes) -> None:
        """Read Huffman tables."""
        while body:
            self.count_table()
            kind, number = divmod(body[0], 16)
            counts = body[1:17]
            size = 17 + sum(counts)
            if kind not in (DC, AC) or number > 3 or len(body) < size:
                raise damaged("invalid Huffman table")
            used = 0  # codes of this length, including those that start with a shorter code
            for length, count in enumerate(counts, 1):
                used = 2 * used + count
                if count and used >= 1 << length:  # the code of all ones is reserved
                    raise damaged("invalid Huffman table")
            if kind == DC and max(body[17:size], default=0) > 15:
                raise damaged("invalid Huffman table")
            self.huffman[kind, number], body = body[:size], body[size:]

    def count_table(self) -> None:
        """Count a table. Raises InvalidPhoto if there are too many."""
        self.table_count += 1
        if self.table_count > MAX_TABLES:
            raise InvalidPhoto(f"the photo has more than {MAX_TABLES} tables: {BASELINE_ADVICE}")

    def read_frame(self, marker: int, body: bytes) -> None:
        """Read the frame: the size and the color components."""
        bits, self.height, self.width, count = unpack(">BHHB", body)
        if self.frame:
            raise damaged("two frames")
        if bits != 8:
            raise InvalidPhoto(f"the photo has {bits} bits per color: save it with 8")
        if not self.height:
            raise InvalidPhoto(f"the photo states its height after its pixels (DNL): {BASELINE_ADVICE}")
        check_size(self.width, self.height, self.max_pixels)
        if count not in (1, 3, 4) or len(body) != 6 + 3 * count:
            raise damaged("invalid color components")
        for number, factors, quantization in struct.iter_unpack("BBB", body[6:]):
            horizontal, vertical = divmod(factors, 16) if count > 1 else (1, 1)  # a single component's are meaningless
            if number in self.components or not {horizontal, vertical} <= {1, 2, 3, 4} or quantization > 3:
                raise damaged("invalid color components")
            self.components[number] = Component(horizontal, vertical, quantization)
        widest, highest = self.largest_factors()
        if any(widest % component.horizontal or highest % component.vertical for component in self.components.values()):
            raise InvalidPhoto(f"the photo has an unusual color subsampling: {BASELINE_ADVICE}")
        self.frame = marker

    def largest_factors(self) -> tuple[int, int]:
        """Return the largest horizontal and the largest vertical sampling factor."""
        components = self.components.values()
        return max(component.horizontal for component in components), max(
            component.vertical for component in components
        )

    def read_scan(self, body: bytes, position: int) -> int:
        """Read a scan whose data starts at this position. Return the position after it."""
        self.scan_count += 1
        limit = min(MAX_SCANS, MAX_SCANS_OF_LARGEST * self.max_pixels // max(1, self.width * self.height))
        if self.scan_count > limit:
            raise InvalidPhoto(f"the photo has more than {limit} scans: {BASELINE_ADVICE}")
        (count,) = unpack("B", body)
        if len(body) != 4 + 2 * count or not set(body[1:-3:2]) <= self.components.keys() or not 1 <= count <= 4:
            raise damaged("invalid scan")
        components = [self.components[number] for number in body[1:-3:2]]
        first, last, bits = body[-3:]
        if self.frame != SOF2:
            first, last, bits = 0, 63, 0  # decoders ignore these values
        previous, low = divmod(bits, 16)
        self.check_progress(components, first, last, previous, low)

        header = bytes([count])
        numbers = list(self.components)
        for number, tables in zip(body[1:-3:2], body[2:-3:2], strict=True):
            dc, ac = divmod(tables, 16)
            dc, ac = dc if first == 0 and not previous else None, ac if last else None
            for key in ((DC, dc), (AC, ac)):
                if key[1] is not None:
                    if key not in self.huffman:
                        raise damaged("no Huffman table")
                    self.activate(key, DHT, self.huffman[key])
            header += bytes([1 + numbers.index(number), 16 * (dc or 0) + (ac or 0)])
        self.activate(DRI, DRI, struct.pack(">H", self.restart_interval))
        data_end, end = self.find_end(position, self.count_restarts(components))
        self.scans += [_segment(SOS, header + bytes([first, last, bits])), self.data[position:data_end]]
        return end

    def check_progress(self, components: Sequence[Component], first: int, last: int, previous: int, low: int) -> None:
        """Check that the scan contains its coefficients for the first time, or their next bit."""
        is_progressive = self.frame == SOF2
        if not first <= last <= 63 or low > 13 or previous not in (0, low + 1):
            raise damaged("invalid scan")
        if is_progressive and (last if first == 0 else len(components) > 1 or components[0].lowest_bits[0] is None):
            raise damaged("invalid scan")
        if len(components) > 1 and sum(component.horizontal * component.vertical for component in components) > 10:
            raise damaged("a scan with too many blocks per unit")
        for component in components:
            if component.quantization not in self.quantization:
                raise damaged("no quantization table")
            if set(component.lowest_bits[first : last + 1]) != {previous or None}:
                raise damaged("scans out of order")
            component.lowest_bits[first : last + 1] = [low] * (last + 1 - first)

    def activate(self, key: object, marker: int, body: bytes) -> None:
        """Write a segment that the next scan needs, unless it already applies."""
        if self.active.get(key) != body:
            self.active[key] = body
            self.scans.append(_segment(marker, body))

    def count_restarts(self, components: Sequence[Component]) -> int:
        """Return the number of restart markers in a scan of these components."""
        if not self.restart_interval:
            return 0
        self.has_restarts = True
        widest, highest = self.largest_factors()
        if len(components) == 1:  # an MCU is one block
            width = ceil(self.width * components[0].horizontal / widest)
            height = ceil(self.height * components[0].vertical / highest)
            widest = highest = 1
        else:
            width, height = self.width, self.height
        units = ceil(width / (BLOCK * widest)) * ceil(height / (BLOCK * highest))
        return ceil(units / self.restart_interval) - 1

    def find_end(self, start: int, restarts: int) -> tuple[int, int]:
        """Return the end of a scan's data, with this number of restart markers, and the position of the next marker.

        Some encoders write another restart marker after the data. The new file omits it.
        """
        data, seen, last = np.frombuffer(self.data, np.uint8), 0, -1
        for position in range(start, len(data) - 1, WINDOW):
            window = data[position : position + WINDOW + 1]
            is_marker = (window[:-1] == 0xFF).view(np.uint8)
            np.minimum(is_marker, window[1:], out=is_marker)  # a zero after 0xFF marks it as data
            if not is_marker.max():  # which is faster than nonzero
                continue
            (places,) = is_marker.view(bool).nonzero()
            (others,) = (window[places + 1] != RESTARTS[seen % 8 :][: len(places)]).nonzero()
            count = int(others[0]) if len(others) else len(places)
            seen += count
            last = position + int(places[count - 1]) if count else last
            if seen > restarts + 1:
                break
            if len(others):
                end = data_end = position + int(places[count])
                if seen == restarts + 1 and last == end - 2:
                    data_end, seen = last, restarts
                if seen != restarts:
                    break
                if data_end == start:
                    raise truncated("a scan without data")
                return data_end, end
        else:
            raise truncated("no end-of-image marker")
        raise damaged("restart markers missing or out of order")

    def rebuild(self) -> Photo:
        """Return the new file."""
        if not self.scans:
            raise damaged("no pixels")
        if any(set(component.lowest_bits) != {0} for component in self.components.values()):
            raise truncated("scans are missing")
        frame = struct.pack(">BHHB", 8, self.height, self.width, len(self.components))
        for number, component in enumerate(self.components.values(), 1):
            frame += bytes([number, 16 * component.horizontal + component.vertical, component.quantization])
        encoded = join(
            bytes([0xFF, SOI]),
            self.describe_colors(),
            *(_segment(DQT, table) for table in self.quantization.values()),
            _segment(self.frame, frame),
            *self.scans,
            bytes([0xFF, EOI]),
        )
        return Photo(encoded, self.width, self.height, self.orientation or 1, self.suits_nvjpeg())

    def suits_nvjpeg(self) -> bool:
        """Return whether nvJPEG returns the same pixels as libjpeg (measured with nvJPEG 12.4 on an H200).

        nvJPEG takes RGB for YCbCr, damages some photos with restart markers, and changes the colors near the edges.
        """
        return self.is_gray_or_ycbcr() and not self.has_restarts and min(self.width, self.height) >= MIN_SIDE

    def describe_colors(self) -> bytes:
        """Return the segment that defines the color components, by the rules of libjpeg, which Pillow uses.

        Four components without Adobe's segment are CMYK. Pillow always treats CMYK as inverted, as Adobe's programs
        write it; decoders do so only if there is such a segment.
        """
        if self.is_gray_or_ycbcr():
            return _segment(APP0, JFIF)
        has_ycck = len(self.components) == 4 and self.transform
        return _segment(APP14, ADOBE + (YCCK if has_ycck else NO_TRANSFORM))

    def is_gray_or_ycbcr(self) -> bool:
        """Return whether the components are those of JFIF, and not RGB, CMYK or YCCK."""
        if len(self.components) != 3 or self.has_jfif:
            return len(self.components) < 4
        return bytes(self.components) != b"RGB" if self.transform is None else self.transform != 0


def read_jpeg(data: memoryview, max_pixels: int) -> Photo:
    """Return the JPEG with only the segments that its pixels need. Raises InvalidPhoto."""
    return JpegReader(data, max_pixels).read()


def _segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body
