"""CSV tables are read strictly: by name, by column, or as cells."""

import gzip
import math

import pytest

from avjax.errors import AvjaxError
from avjax.utils import tables


@pytest.fixture
def table(tmp_path):
    def write(content: bytes, name="a.csv"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


def test_rows_by_name(table):
    path = table('\ufeffa; b ;c\r\n 1 ;"x;\r\ny"\r\n\r\n2;3;4;5\r\n'.encode())
    assert tables.read(path, ("b",)) == [{"a": "1", "b": "x;\ny", "c": ""}, {"a": "2", "b": "3", "c": "4", None: "5"}]
    assert tables.read(path, cell=str)[0]["a"] == " 1 "
    with pytest.raises(AvjaxError, match=r"no column d; got a, b, c; expected a, d"):
        tables.read(path, ("a", "d"))


def test_other_bytes_are_read_only_where_a_column_may_have_them(table):
    path = table(b"file,label\nfr\xf6h.mp4,sad\n")
    assert tables.read(path, raw=("file",))[0]["file"].encode(errors="surrogateescape") == b"fr\xf6h.mp4"
    with pytest.raises(AvjaxError, match=r"a\.csv, line 2: not UTF-8; save the table as UTF-8"):
        tables.read(path)


def test_columns(table):
    assert tables.read_columns(table(b"a\tb\n1\t2\n3\t4\n")) == {"a": ("1", "3"), "b": ("2", "4")}
    assert tables.read_columns(table(b"1,2\n3,4\n"), header=False) == {"0": ("1", "3"), "1": ("2", "4")}
    assert tables.read_columns(table(b"a,b\n")) == {"a": (), "b": ()}


def test_cells_of_a_compressed_file(table):
    assert tables.read_cells(table(gzip.compress(b"a b\n\n  \nc\n"), "a.csv.gz")) == [["a b"], ["c"]]
    assert tables.read_cells(table(b"")) == []


def test_numbers():
    assert tables.number(" 1e-3 ") == 0.001
    assert math.isnan(tables.number("one"))
