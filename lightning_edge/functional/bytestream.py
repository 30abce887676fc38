"""Bytes read with suspicion: every length is checked against what is there before memory is taken."""

from collections.abc import Iterable


class EdgeFormatError(ValueError):
    """A file or stream that is damaged, cut short or hostile; ``offset`` says where, ``reason`` why."""

    def __init__(self, reason: str, *, offset: int) -> None:
        super().__init__(f"{reason}, at byte {offset}")
        self.reason, self.offset = reason, offset


def varint(value: int) -> bytes:
    """Return a number >= 0 as base-128 digits, least first, all but the last with the high bit set (LEB128).

    >>> varint(300).hex()
    'ac02'
    """
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


class ByteReader:
    r"""A cursor over bytes that raises :class:`EdgeFormatError` instead of running over their end.

    >>> reader = ByteReader(b"\xac\x02xyz")
    >>> reader.varint(), bytes(reader.take(3))
    (300, b'xyz')
    """

    def __init__(self, data: bytes | memoryview, *, offset: int = 0) -> None:
        self._data = memoryview(data)
        self._position = 0
        self._base = offset

    @property
    def offset(self) -> int:
        """Where the next byte lies, counted from the start of the file."""
        return self._base + self._position

    @property
    def left(self) -> int:
        """Bytes that are not read yet."""
        return len(self._data) - self._position

    def take(self, size: int) -> memoryview:
        """Return the next ``size`` bytes."""
        if size > self.left:
            raise self.error(f"{size} bytes are announced, {self.left} are left")
        start = self._position
        self._position += size
        return self._data[start : self._position]

    def byte(self) -> int:
        """Return the next byte as a number."""
        return self.take(1)[0]

    def varint(self, *, limit: int = (1 << 63) - 1) -> int:
        """Return the next number, which must not be above ``limit``."""
        value, shift = 0, 0
        while True:
            digit = self.byte()
            value |= (digit & 0x7F) << shift
            if value > limit or shift > 63:
                raise self.error(f"a number must be at most {limit}, got more")
            if digit < 0x80:
                return value
            shift += 7

    def sub(self, size: int) -> "ByteReader":
        """Return a reader over the next ``size`` bytes alone."""
        offset = self.offset
        return ByteReader(self.take(size), offset=offset)

    def end(self) -> None:
        """Raise unless everything has been read."""
        if self.left:
            raise self.error(f"{self.left} bytes are left over")

    def error(self, reason: str) -> EdgeFormatError:
        """Return the exception for what is wrong here."""
        return EdgeFormatError(reason, offset=self.offset)


class BitWriter:
    """Collects bits, most significant first; for tables of a few bytes.

    >>> writer = BitWriter(); writer.write(5, 3); writer.bytes().hex()
    'a0'
    """

    def __init__(self) -> None:
        self._bits: list[str] = []

    def write(self, value: int, width: int) -> None:
        """Append ``width`` bits of ``value``."""
        if width:
            self._bits.append(f"{value:0{width}b}")

    def write_exp_golomb(self, values: Iterable[int], order: int) -> None:
        """Append numbers >= 0 as Exp-Golomb codes: small ones take few bits, any one fits."""
        for value in values:
            shifted = value + (1 << order)
            length = shifted.bit_length()
            self.write(0, length - 1 - order)
            self.write(shifted, length)

    def bytes(self) -> bytes:
        """Return the bits, padded with zeros to whole bytes."""
        bits = "".join(self._bits)
        bits += "0" * (-len(bits) % 8)
        return int(bits, 2).to_bytes(len(bits) // 8, "big") if bits else b""


class BitReader:
    r"""Reads what :class:`BitWriter` wrote from a :class:`ByteReader`, a byte at a time.

    >>> BitReader(ByteReader(b"\xa0")).read(3)
    5
    """

    def __init__(self, reader: ByteReader) -> None:
        self._reader = reader
        self._value = 0
        self._count = 0

    def read(self, width: int) -> int:
        """Return the next ``width`` bits as a number."""
        while self._count < width:
            self._value = self._value << 8 | self._reader.byte()
            self._count += 8
        self._count -= width
        value, self._value = self._value >> self._count, self._value & (1 << self._count) - 1
        return value

    def read_exp_golomb(self, order: int, *, limit: int) -> int:
        """Return the next Exp-Golomb number, which must not be above ``limit``."""
        zeros = 0
        while not self.read(1):
            zeros += 1
            if zeros > 32:
                raise self._reader.error("an Exp-Golomb code must have at most 32 leading zeros, got more")
        value = (1 << zeros + order | self.read(zeros + order)) - (1 << order)
        if value > limit:
            raise self._reader.error(f"a number must be at most {limit}, got {value}")
        return value
