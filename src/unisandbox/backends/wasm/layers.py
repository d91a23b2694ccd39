"""The bytes of a stranger's layer, as a file that `tarfile` reads forwards and only so far as it may.

tarfile takes the headers of long names and pax records whole, whatever size they say, and passes over what nobody wants
within one call: either may be gigabytes that a small blob unpacks to.
Source: _proc_gnulong, _proc_pax and TarFile.next in CPython's Lib/tarfile.py.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from typing import IO, Final

_RAW_PIECE: Final = 65536
_GZIP: Final = 16 + zlib.MAX_WBITS
"""Source: zlib.h, inflateInit2."""

# Longer than a name of digits can be. tarfile looks for numbers in a time that grows with the square of their length:
# one of 31 KiB took 7 seconds. Source: CVE-2024-6232.
_LONG_NUMBER: Final = re.compile(rb"[0-9]{256}")


class LayerFile:
    """A layer's tar archive.

    Args:
        file: the blob.
        zipped: it is gzip's.
    """

    def __init__(self, file: IO[bytes], *, zipped: bool) -> None:
        self._file = file
        self._unzip = zlib.decompressobj(_GZIP) if zipped else None
        self._at = 0
        self._left = 0
        self._headers = False
        self._raw_left = 0

    def allow(self, size: int, *, headers: bool = False) -> None:
        """Let so many bytes be read or passed over from here on, and no more; `headers`: tarfile will search them."""
        self._left = size
        self._headers = headers
        self._raw_left = size + 2 * _RAW_PIECE  # of the blob: there are pieces that unpack to nothing

    def tell(self) -> int:
        """How many bytes lie before the next."""
        return self._at

    def seek(self, position: int) -> int:
        """Pass over what comes before `position`; never backwards. Raises as `read`."""
        self.read(position - self._at)
        return self._at

    def read(self, size: int) -> bytes:
        """The next bytes; fewer at the end only.

        Raises:
            tarfile.ReadError: it is more than was allowed, no gzip, or a header that takes tarfile seconds to search.
        """
        if not 0 <= size <= self._left:
            raise tarfile.ReadError("its headers are too large, or it has data that belong to no file")
        self._left -= size
        found = self._file.read(size) if self._unzip is None else self._unzipped(self._unzip, size)
        self._at += len(found)
        if self._headers and _LONG_NUMBER.search(found):
            raise tarfile.ReadError("a number in its headers is too long")
        return found

    def _unzipped(self, unzip: zlib._Decompress, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            raw = unzip.unconsumed_tail or unzip.unused_data or self._raw()
            if not raw:
                break
            if unzip.eof:  # several gzip files one after the other are one. Source: RFC 1952, 2.2
                unzip = self._unzip = zlib.decompressobj(_GZIP)
            try:
                found += unzip.decompress(raw, size - len(found))
            except zlib.error as error:
                raise tarfile.ReadError(f"it is no gzip: {error}") from None
        return bytes(found)

    def _raw(self) -> bytes:
        if self._raw_left <= 0:
            raise tarfile.ReadError("it is packed in a way that unpacks to nothing")
        self._raw_left -= _RAW_PIECE
        return self._file.read(_RAW_PIECE)
