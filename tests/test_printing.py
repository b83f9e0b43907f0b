"""What strangers wrote, printed: escaped, on its own line, and no longer than a message may be."""

import ast
import io
import json
import logging
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import embedcam
from embedcam.cli.serving import PrintableLines
from embedcam.errors import (
    EmbedcamError,
    ImageTooLarge,
    InputError,
    as_json,
    cut,
    printable,
    reason,
    say,
    sentence,
    short,
    show,
)
from embedcam.index.identity import NetworkWarning
from embedcam.methods import MethodWarning
from embedcam.recipe.recipe import RecipeWarning

PACKAGE = Path(embedcam.__file__).parent


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("plain, é 東京 \N{NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}.", None),
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("a\nb\r\tc\x00\x7f", r"a\nb\r\tc\x00\x7f"),
        ("\x85\x9b", r"\x85\x9b"),
        ("\u202egnp.exe\u202c\u2066\u2069\u200e\u200f\u061c",
         r"\u202egnp.exe\u202c\u2066\u2069\u200e\u200f\u061c"),
        ("\u200b\ufeff\u2060\xad\u2028\u2029", r"\u200b\ufeff\u2060\xad\u2028\u2029"),
        ("\u3164\u115f\u034f\U000e0041", r"\u3164\u115f\u034f\U000e0041"),
        ("\udcff\ud800", r"\udcff\ud800"),
    ],
)  # fmt: skip
def test_what_is_not_seen_is_escaped(given: str, expected: str | None) -> None:
    assert printable(given) == (given if expected is None else expected)
    assert printable(printable(given)) == printable(given)


def test_every_letter_is_seen_or_escaped_and_can_be_encoded() -> None:
    for number in range(sys.maxunicode + 1):
        shown = printable(chr(number))
        shown.encode("utf-8")
        assert shown == chr(number) or (shown.isascii() and shown.startswith("\\"))


def test_long_texts_keep_their_two_ends() -> None:
    assert (cut("0123456789", 10), cut("0123456789A", 10)) == ("0123456789", "01234...9A")
    assert len(sentence("\x1b" * 5_000)) == 2_000
    long = sentence("begin" + "x" * 10**6 + "end")
    assert (long[:8], long[-6:]) == ("beginxxx", "xxxend")


def test_values_of_any_depth_and_length_are_quoted() -> None:
    assert short({"a": [1, 2.5, "\x1b"]}) == r"{'a': [1, 2.5, '\x1b']}"
    assert short("y" * 100) == "'" + "y" * 34 + "..." + "y" * 21 + "'"
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert (short(deep), short(10**5_000)) == ("[[[[...]]]]", "<int>")
    assert len(short(np.zeros(10**6))) <= 60


def test_reasons_are_one_line() -> None:
    assert reason(ValueError("\n first. \nsecond")) == "first"
    assert reason(ValueError()) == "ValueError"
    assert reason(FileNotFoundError(2, "No such file", "a.txt")) == "No such file"
    assert len(reason(ValueError("x" * 10**6))) == 200


def test_errors_are_one_printable_line_of_bounded_length() -> None:
    error = InputError("a\x1b[31m\nb" + "c" * 10**6 + "; do this")
    assert str(error).startswith(r"a\x1b[31m\nbccc")
    assert str(error).endswith("ccc; do this")
    assert len(str(error)) == 2_000
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(ImageTooLarge("x\u202e.png: too large")) == r"x\u202e.png: too large"
    assert (EmbedcamError().args, InputError("text", 3).args) == ((), ("text", 3))


def test_warnings_are_as_errors() -> None:
    for kind in (NetworkWarning, RecipeWarning, MethodWarning):
        with pytest.warns(kind) as caught:
            warnings.warn("a\x1b\n" + "b" * 10**4, kind, stacklevel=1)
        (warning,) = caught
        assert str(warning.message).startswith(r"a\x1b\nbbb")
        assert len(str(warning.message)) == 2_000


def test_each_value_is_printed_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    show("one\ntwo", "three")
    say("embedcam: \x1b[31m" + "x" * 10**6)
    told = capsys.readouterr()
    assert told.out == "one\\ntwo\nthree\n"
    assert told.err.startswith(r"embedcam: \x1b[31mxxx")
    assert len(told.err) == 2_001


def test_what_an_encoding_lacks_is_escaped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    show("é \udcff")
    assert stream.buffer.getvalue() == b"\\xe9 \\udcff\n"  # type: ignore[attr-defined]


def test_a_closed_stream_is_passed_over(monkeypatch, capsys) -> None:
    for name, tell in (("stderr", say), ("stdout", show)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, None)
            tell("nobody reads this")
    assert capsys.readouterr() == ("", "")


def test_json_holds_no_control_character() -> None:
    values = {"a\x1b": "\x7f\u202e\udcff\x85"}
    text = as_json(values, 2).replace("\n", "")
    assert json.loads(text) == values
    assert text.isascii()
    assert text.isprintable()


def test_log_lines_are_printable() -> None:
    try:
        raise ValueError("bad\x1b[0m")
    except ValueError:
        about = ("x", logging.ERROR, "f", 1, "of %s", ("a\nb\x1b",), sys.exc_info())
    lines = PrintableLines("%(message)s").format(logging.LogRecord(*about)).split("\n")
    assert (lines[0], lines[-1]) == (r"of a\nb\x1b", r"ValueError: bad\x1b[0m")


def test_nothing_else_prints() -> None:
    found = [
        f"{file.relative_to(PACKAGE)}: {ast.unparse(node)[:60]}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    ]
    # Where nothing may be imported yet.
    assert found == ["__init__.py: sys.stderr.write('embedcam: interrupted\\n')"]
