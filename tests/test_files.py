"""Files that are to be new, and texts that come from files, made fit to be shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvit.errors import ConfigError, OutputError
from qvit.files import all_or_none, check_new, printable


@given(st.text(st.characters()))
def test_a_printable_text_is_one_line_without_commands(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown.encode("utf-8").decode("utf-8") == shown
    assert printable(shown) == shown


@given(st.text(st.characters()))
def test_what_can_be_shown_is_shown_as_it_is(text: str) -> None:
    plain = "".join(c for c in text if c.isprintable())
    assert printable(plain) == plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("tabby cat, [bold] größer 猫 🐱", "tabby cat, [bold] größer 猫 🐱"),
        ("a\x1b[31mb\x07", r"a\x1b[31mb\x07"),
        ("two\nlines\r\n", r"two\nlines\r\n"),
        ("gpj.\u202etac", r"gpj.\u202etac"),
        ("eight-bit \x9b1m", r"eight-bit \x9b1m"),
        ("half \udcff of a pair", r"half \udcff of a pair"),
        ("no-break\u00a0and\u2028line", r"no-break\xa0and\u2028line"),
    ],
)
def test_commands_are_shown_by_their_escape_sequences(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_files_that_are_to_be_new_are_looked_at_and_not_left_behind(tmp_path: Path) -> None:
    first, second = tmp_path / "new" / "first", tmp_path / "second"
    check_new([first, second])
    assert not list((tmp_path / "new").iterdir())
    with pytest.raises(ConfigError, match="second would be written twice: give two names."):
        check_new([second, tmp_path / "new" / ".." / "second"])
    with pytest.raises(OutputError, match=r"Cannot write into .*second: .*second is no folder: give another name\.$"):
        check_new([second, second / "third"])
    assert not second.exists()


def test_all_or_none_leaves_what_was_there(tmp_path: Path) -> None:
    present, absent = tmp_path / "present", tmp_path / "absent"
    present.write_text("precious")
    with pytest.raises(ConfigError, match="present is there already"), all_or_none([absent, present]):
        raise AssertionError
    assert present.read_text() == "precious"

    def stopped() -> None:
        (absent / "deep").mkdir(parents=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), all_or_none([absent]):
        stopped()
    assert not absent.exists()
