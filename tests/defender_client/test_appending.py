from __future__ import annotations

from pathlib import Path

import pytest

from defender_client.appending import drop_lines_from, drop_torn_line


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"", b""), (b"a\n", b"a\n"), (b"a\nb\n", b"a\nb\n"), (b"a\nb", b"a\n"), (b"torn", b""), (b"a\n\xff\xfe", b"a\n")],
)
def test_only_a_line_without_its_end_goes(tmp_path: Path, before: bytes, after: bytes) -> None:
    path = tmp_path / "lines"
    path.write_bytes(before)
    drop_torn_line(path)
    assert path.read_bytes() == after


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"", b""), (b"1\n2\n", b"1\n2\n"), (b"1\n2\n3\n4\n", b"1\n2\n"), (b"1\n9\n1\n", b"1\n"), (b"1\n2", b"1\n")],
)
def test_lines_go_from_the_first_that_should(tmp_path: Path, before: bytes, after: bytes) -> None:
    path = tmp_path / "lines"
    path.write_bytes(before)
    drop_lines_from(path, lambda line: int(line) >= 3)
    assert path.read_bytes() == after


def test_no_file_is_made(tmp_path: Path) -> None:
    drop_torn_line(tmp_path / "none")
    drop_lines_from(tmp_path / "none", lambda line: True)
    assert not (tmp_path / "none").exists()
