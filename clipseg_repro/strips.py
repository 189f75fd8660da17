"""Large pictures in strips of rows, on all cores: worked on, and written as PNG.

Pillow and OpenCV compress in one thread, which at 48 megapixels takes longer than everything else together.
"""

import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from clipseg_repro.files import written_whole

ROWS = 16  # of a strip: so few that it stays in the cache of a core


def in_strips(function, *arrays):
    """Yields function(*strips) for each strip of ROWS rows of the arrays, in order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tops = range(0, len(arrays[0]), ROWS)
        yield from pool.map(lambda top: function(*(array[top : top + ROWS] for array in arrays)), tops)


def write_png(path, array, convert=np.asarray, palette=None):
    """Write convert(array) as PNG, whole or not at all: (H, W) uint8 or uint16 as grey, (H, W, 3) uint8 as RGB.

    convert: works on a few rows at a time, so that the result never needs memory as a whole. palette: N RGB triples of
    which an (H, W) uint8 array holds the indices.
    """
    first = convert(array[:1])
    pixel = first[0, 0].nbytes
    colour = 3 if palette else 2 if first.ndim == 3 else 0

    def packed(rows):
        rows = convert(rows)
        values = rows.astype(rows.dtype.newbyteorder(">")).view(np.uint8).reshape(len(rows), -1)
        lines = np.empty((len(rows), 1 + values.shape[1]), np.uint8)
        lines[:, 0] = 1  # PNG's filter "Sub": differences to the pixel on the left
        lines[:, 1 : 1 + pixel] = values[:, :pixel]
        np.subtract(values[:, pixel:], values[:, :-pixel], out=lines[:, 1 + pixel :])
        packer = zlib.compressobj(1, wbits=-15)
        return packer.compress(lines) + packer.flush(zlib.Z_SYNC_FLUSH), zlib.adler32(lines), lines.size

    with written_whole(path) as temporary, temporary.open("wb") as file:

        def write(name, data):
            file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))

        file.write(b"\x89PNG\r\n\x1a\n")
        write(b"IHDR", struct.pack(">IIBBBBB", array.shape[1], len(array), 8 * first.itemsize, colour, 0, 0, 0))
        if palette:
            write(b"PLTE", bytes(value for triple in palette for value in triple))
        write(b"IDAT", b"\x78\x01")  # zlib's header
        low, high = 1, 0
        for data, checksum, size in in_strips(packed, array):
            write(b"IDAT", data)
            high = (
                high + (checksum >> 16) + size * (low - 1)
            ) % 65521  # the halves of Adler-32, of strips put together
            low = (low + (checksum & 65535) - 1) % 65521
        write(b"IDAT", b"\x03\x00" + struct.pack(">HH", high, low))  # an empty last block
        write(b"IEND", b"")
