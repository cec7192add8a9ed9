"""Texts that come from files, made fit to be shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvit.files import printable


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
