"""A setting is declared once: checks, command line, TOML and errors follow from it."""

import argparse
from dataclasses import dataclass

import pytest

from embedcam._options import add_options, check, checked_values, chosen, from_tables, setting
from embedcam.cli.parser import parser
from embedcam.errors import EmbedcamError, InputError, RecipeError
from embedcam.evaluate.settings import Settings
from embedcam.recipe import recipe as recipes
from embedcam.service import limits


@dataclass(frozen=True)
class Kinds:
    whole: int = setting(3, "N", "a number", least=1, most=9)
    share: float = setting(0.5, "X", "a share", above=0, below=1)
    on: bool = setting(True, help="turn it off", flag="not_on")
    off: bool = setting(False, help="turn it on")
    word: str = setting("a", help="a choice", choices=("a", "b"))
    names: tuple[str, ...] = setting((), "NAMES", "names", choices=lambda: ("x", "y"))
    maybe: int | None = setting(None, "N", "none or a number", kind=int, table="more", entry="may")
    several: str | None = setting(None, "T", "s", kind=str, repeated=True, check=lambda _, v: v)
    hidden: str = setting("h", table="more")

    def __post_init__(self) -> None:
        check(self)


def parsed(record: type, *words: str) -> dict:
    one = argparse.ArgumentParser(exit_on_error=False)
    add_options(one, record)
    return chosen(one.parse_args(words), record)


def test_options_are_read_by_kind_and_what_is_not_given_is_not_chosen() -> None:
    assert parsed(Kinds) == {}
    words = ["--whole", "4", "--share=.25", "--not-on", "--off", "--word", "b", "--names", "x,,y"]
    words += ["--maybe", "7", "--several", "p", "--several", "q"]
    values = parsed(Kinds, *words)
    assert values == {
        "whole": 4, "share": 0.25, "on": False, "off": True, "word": "b", "names": ("x", "y"),
        "maybe": 7, "several": ["p", "q"],
    }  # fmt: skip
    assert Kinds(**values).names == ("x", "y")


@pytest.mark.parametrize(
    ("name", "text", "value", "wanted"),
    [
        ("whole", "0", 0, "a whole number from 1 to 9"),
        ("whole", "x", True, "a whole number from 1 to 9"),
        ("share", "nan", float("nan"), "a number between 0 and 1"),
        ("maybe", "²", "3", "a whole number"),
    ],
)
def test_numbers_out_of_range_are_refused_by_both(name, text, value, wanted) -> None:
    with pytest.raises(argparse.ArgumentError, match=f"'{text}' is not {wanted}"):
        parsed(Kinds, f"--{name}", text)
    with pytest.raises(InputError, match=rf"^{name} = .*; give {wanted}"):
        Kinds(**{name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"on": 1}, "on = 1; give true or false"),
        ({"word": "c"}, "word = 'c' is unknown; known: a, b"),
        ({"word": 3}, "word = 3; give a text"),
        ({"hidden": "a\0b"}, r"hidden = 'a\x00b' holds a NUL"),
        ({"names": "x"}, "names = 'x'; give a list of names"),
        ({"names": ("x", "z")}, "names = 'z' is unknown; known: x, y"),
        ({"whole": "1"}, "whole = '1'; give a whole number"),
    ],
)
def test_values_of_another_kind_are_refused(values, message) -> None:
    with pytest.raises(InputError) as caught:
        Kinds(**values)
    assert str(caught.value).startswith(message)
    with pytest.raises(InputError, match=r"^here "):
        checked_values(Kinds, values, "here")


def test_tables_hold_settings_by_their_entries() -> None:
    tables = {"": {"whole": 2}, "more": {"may": 5}, "others": {"any": 1}}
    assert from_tables(Kinds, tables, "f", RecipeError, ["others"]) == {"whole": 2, "maybe": 5}
    assert checked_values(Kinds, {"whole": 2, "maybe": None}, "t") == {"whole": 2}
    for wrong, message in (
        ({"more": {"maybe": 3}}, r"f: \[more\] has no entry 'maybe'; did you mean 'may'\?"),
    ):
        with pytest.raises(RecipeError, match=message):
            from_tables(Kinds, wrong, "f", RecipeError)
    with pytest.raises(InputError, match="t has no entry 'wohle'; did you mean 'whole'"):
        checked_values(Kinds, {"wohle": 1}, "t")


def glowing(record: type, table: str = "") -> type:
    """Return a class of settings with one declaration more."""
    glow = setting(0.5, "X", "how much it glows", above=0, table=table)
    more = {"__annotations__": {"glow": float}, "glow": glow}
    return dataclass(frozen=True)(type(f"More{record.__name__}", (record,), more))


@pytest.mark.parametrize(
    ("record", "place", "words"),
    [
        (recipes.Recipe, "embedcam.recipe.choices.Choices", ["build", "i"]),
        (Settings, "embedcam.evaluate.settings.Settings", ["evaluate", "i", "--images", "p"]),
        (limits.Limits, "embedcam.service.limits.Limits", ["serve", "i"]),
    ],
)
def test_one_declaration_more_is_an_option_a_value_and_an_error(
    record, place, words, monkeypatch, capsys
) -> None:
    kind = glowing(record, "weights" if record is recipes.Recipe else "")
    monkeypatch.setattr(place, kind)
    said = parser().parse_args([*words, "--glow", "0.75"])
    assert kind(**chosen(said, kind)).glow == 0.75
    for more in (["--glow", "0"], ["--help"]):
        with pytest.raises(SystemExit):
            parser().parse_args([*words, *more])
    told = capsys.readouterr()
    assert "argument --glow: '0' is not a number above 0" in told.err
    assert "--glow X" in told.out
    with pytest.raises(EmbedcamError, match="glow = 0; give a number above 0"):
        kind(glow=0)


def test_a_recipe_s_new_entry_is_read_from_toml(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(recipes, "Recipe", glowing(recipes.Recipe, "weights"))
    (tmp_path / "r.toml").write_text("[weights]\nglow = 0.25\n")
    assert recipes.read_toml(tmp_path / "r.toml")[0].glow == 0.25
    (tmp_path / "r.toml").write_text("[weights]\nglwo = 0.25\n")
    with pytest.raises(RecipeError, match="did you mean 'glow'"):
        recipes.read_toml(tmp_path / "r.toml")
