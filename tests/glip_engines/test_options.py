"""Sizes and ranges as they are written on a command line."""

from __future__ import annotations

import pytest
from glip_engines.options import Range, parse_range, parse_size

from glip_deploy.errors import OptionError


@pytest.mark.parametrize(("text", "expected"), [("1", Range(1, 1, 1)), ("1:8:80", Range(1, 8, 80))])
def test_ranges(text, expected):
    assert parse_range(text, "--x") == expected
    assert parse_range(str(expected), "--x") == expected


@pytest.mark.parametrize("text", ["", "a", "1:2", "1:2:3:4", "-1", "0", "3:2:1", "1:9:8", "1.5", "99999999999"])
def test_bad_ranges(text):
    with pytest.raises(OptionError, match=r"^--x is .*(MIN:BEST:MAX|smallest is 1)"):
        parse_range(text, "--x")


def test_sizes():
    assert parse_size("800x1344", "--size") == (800, 1344)


@pytest.mark.parametrize("text", ["", "800", "800x", "0x32", "801x1344", "800x1333", "16x32", "8224x32", "-32x32"])
def test_bad_sizes(text):
    with pytest.raises(OptionError, match=r"^--size is .*(HEIGHTxWIDTH|multiples of 32 from 32 to 8192; \d+ is)"):
        parse_size(text, "--size")
