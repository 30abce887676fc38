import gzip

import numpy as np
import pytest

from lightning_edge.data.idx import read_idx

HEADER = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3])
WHOLE = HEADER + bytes(range(6))


@pytest.mark.parametrize(("name", "content"), [("a", WHOLE), ("a.gz", gzip.compress(WHOLE))])
def test_bytes_come_back_in_their_shape(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    np.testing.assert_array_equal(read_idx(tmp_path / name), [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a", WHOLE[:-1], r"a must hold 18 bytes \(header, \[2, 3\]\), got 17"),
        ("a", WHOLE + b"\0", "must hold 18 bytes"),
        ("a", HEADER[:6], "must hold"),
        ("a", b"", "must start with 00 00 08"),
        ("a", b"PK\x03\x04" + WHOLE, r"must start with 00 00 08 \(idx, bytes\), got 50 4b 03 04"),
        ("a", bytes([0, 0, 0x0D, 2]) + WHOLE[4:], "must start with 00 00 08"),
        ("a.gz", gzip.compress(WHOLE)[:-9], "must be a whole gzip file"),
        ("a.gz", WHOLE, "must be a whole gzip file"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / name)
