"""What is taken of a folder or a list, what is not, and that it is said."""

import os
import re
from pathlib import Path

import pytest
from build_samples import DENSE, pictures, toy
from PIL import Image
from test_images import csv_of, write

from embedcam.cli.command_line import for_command_line
from embedcam.errors import ImageError, InputError
from embedcam.evaluate.regions import of_boxes
from embedcam.images import ImageSource, Item, LeftOut, find_images, sources
from embedcam.offline import add_images, build_index
from embedcam.offline.report import BuildReport
from embedcam.preprocess import Preprocess

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two classes with other files among them."""
    for name in ("a/1.png", "a/2.PNG", "b/3.png", "b/small/4.png"):
        write(tmp_path / name)
    for name in ("notes.txt", "a/film.MOV", "b/other.mov", "b/README", "a/.DS_Store", ".git/x.png"):
        write(tmp_path / name, b"x")
    os.mkdir(tmp_path / "c")
    return tmp_path


def test_what_a_folder_holds_besides_is_counted(mixed: Path) -> None:
    source = find_images(mixed)
    assert source.ids == ["a/1.png", "a/2.PNG", "b/3.png", "b/small/4.png"]
    assert source.left_out == LeftOut({".mov": 2, "": 1, ".txt": 1}, hidden=2, empty=1)
    assert str(source.left_out) == "2 .mov, 1 without an ending, 1 .txt, 2 hidden, 1 empty folder"
    assert str(find_images(mixed / "b" / "small").left_out) == ""
    many = LeftOut({f".{n}": 20 - n for n in range(13)})
    assert str(many).endswith("11 .9, 27 of 3 other kinds")
    with pytest.raises(InputError, match=r"contains no images \(.*\); it holds 1 \.mov, 1 hidden"):
        find_images(mixed / "a", exclude="*.[pP][nN][gG]")


@pytest.mark.parametrize(
    ("patterns", "left", "counted"),
    [
        (["*.PNG"], ["a/1.png", "b/3.png", "b/small/4.png"], {"*.PNG": 1}),
        ("small", ["a/1.png", "a/2.PNG", "b/3.png"], {"small": 1}),
        (["b/*"], ["a/1.png", "a/2.PNG"], {"b/*": 4}),
        (["b/"], ["a/1.png", "a/2.PNG"], {"b/": 1}),
        (["a/1.png", "?.png"], ["a/2.PNG"], {"a/1.png": 1, "?.png": 2}),
        (["*.bmp"], ["a/1.png", "a/2.PNG", "b/3.png", "b/small/4.png"], {"*.bmp": 0}),
    ],
)
def test_patterns_leave_out_files_and_folders(mixed, patterns, left, counted) -> None:
    source = find_images(mixed, "none", exclude=patterns)
    assert source.ids == left
    assert source.left_out.excluded == counted
    name, number = next(iter(counted.items()))
    assert f"{number} excluded by {name}" in str(source.left_out)
    listed = "path,label\n" + "".join(f"{one},x\n" for one in find_images(mixed).ids)
    assert find_images(csv_of(mixed, listed), exclude=patterns).ids == left
    with pytest.raises(InputError, match=r"expected patterns such as '\*\.gif', given \[1\]"):
        find_images(mixed, exclude=[1])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("names", "note"),
    [
        ("train/c0/1 train/c1/2 test/c0/3",
         r"look like parts of .*: test and train; .* \(c0, c1\) give .*/train, or take labels="
         '"subfolders"'),
        ("Train/c0/1 Train/c1/2", r"a data set: Train; .* \(c0, c1\) give .*/Train, "),
        ("train/1 val/2", 'look like parts .*: train and val; labels="none" leaves'),
        ("train/a/1 car/2", None),
        ("c0/train/1 c1/train/2", None),
    ],
)  # fmt: skip
def test_labels_that_are_splits_are_pointed_out(tmp_path, names, note) -> None:
    for name in names.split():
        write(tmp_path / f"{name}.png")
    said = find_images(tmp_path).notes
    assert re.search(note, *said) if note else not said
    assert not find_images(tmp_path, "none").notes


def test_the_level_below_gives_labels(tmp_path: Path) -> None:
    for name in ("train/c0/1", "train/c1/2", "test/c1/deep/3"):
        write(tmp_path / f"{name}.png")
    source = find_images(tmp_path, "subfolders")
    assert source.ids == ["test/c1/deep/3.png", "train/c0/1.png", "train/c1/2.png"]
    assert source.labels == ["c1", "c0", "c1"]
    assert not source.notes
    write(tmp_path / "train/4.png")
    with pytest.raises(InputError, match=r"1 images such as 'train/4\.png' lie beside the class"):
        find_images(tmp_path, "subfolders")


@pytest.mark.parametrize(
    "text",
    [
        "path , label\n a.png , cat \n b.png ,\n",
        "Path;LABEL\r\na.png;cat\r\n\r\nb.png;\r\n;\r\n",
        '"path"\t"label"\t"more"\n"a.png"\tcat\t\n"b.png"\t\t1\n',
        '\ufeffpath, label\na.png, "cat"\nb.png, ""\n',
    ],
    ids=["blanks", "semicolons", "tabs", "quotes after blanks"],
)
def test_lists_as_programs_write_them(tmp_path: Path, text: str) -> None:
    source = find_images(csv_of(tmp_path, text))
    assert source.items == (Item("a.png", "a.png", "cat"), Item("b.png", "b.png", None))
    write(tmp_path / "a.png")
    boxes = csv_of(tmp_path, "Path; x0; y0; x1; y1\n a.png ; 1;1; 3;2\n")
    assert len(of_boxes(boxes, ImageSource([Item("a.png", "a.png")], tmp_path))) == 1


def test_an_address_in_a_list_is_unreadable_by_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "_reads_addresses", lambda: False)
    path = csv_of(tmp_path, "path,label\nhttps://host/x/1.jpg,a\nb.png,b\n")
    source = find_images(path)
    assert source.ids == ["https://host/x/1.jpg", "b.png"]
    with pytest.raises(ImageError, match=r"^https://host/x/1\.jpg: is an address, which fsspec"):
        source.open(0)


def test_a_huge_value_is_not_repeated_whole(tmp_path: Path) -> None:
    twice = f"a.png,1,{'z' * 99_000}\n" * 2
    for text in ("x" * 2_000_000 + ",label\n", "path,label,y,y\n", f"path,label,id\n{twice}"):
        with pytest.raises(InputError) as caught:
            find_images(csv_of(tmp_path, text))
        assert len(str(caught.value)) < 400


def test_a_build_ends_with_what_it_took(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    pictures(folder)
    write(folder / "c0/notes.txt", b"x")
    write(folder / "c0/bad.png", b"")
    given = (toy().network, tmp_path / "i", DENSE)
    report = build_index(find_images(folder), *given, on_unreadable="skip", progress=False)
    assert report.labels == dict.fromkeys(["c0", "c1", "c2"], 4)
    assert report.left_out == LeftOut({".txt": 1})
    assert report.taken()[0].startswith("labels: 3 (c0, c1, c2), of ")
    assert report.taken()[1] == "not taken: 1 .txt, 1 skipped"
    again = build_index(find_images(folder), *given, on_unreadable="skip", progress=False)
    assert (again.n_images, [name for name, _ in again.skipped]) == (0, ["c0/bad.png"])
    write(tmp_path / "more/c0/new.png", (folder / "c0/000.png").read_bytes())
    write(tmp_path / "more/c0/x.heics", b"")
    added = add_images(find_images(tmp_path / "more"), toy().network, tmp_path / "i")
    assert added.labels == {"c0": 1}
    assert added.taken() == ["labels: 1 (c0), of 1 image each", "not taken: 1 .heics"]


def test_how_labels_are_told() -> None:
    told = [
        BuildReport(Path("i"), 9, [], labels=labels, n_unlabelled=3).taken()[0]
        for labels in ({}, {"ant": 2, "bee": 31, "cat": 4, "dog": 4})
    ]
    many = "labels: 4 (ant, bee, cat, ...), of 2 (ant) to 31 (bee) images each"
    assert told == ["labels: none", f"{many}; 3 images without a label"]


def test_a_name_that_is_no_text_stops_nothing_where_it_may_be_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    source = pictures(folder)
    try:
        os.rename(folder / source.ids[0], os.fsencode(folder) + b"/c0/\xff.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    found = find_images(folder)
    with pytest.raises(ImageError, match=r"c0/\\xff\.png: the file name is not UTF-8; rename it"):
        build_index(found, toy().network, tmp_path / "i", DENSE, progress=False)
    assert not (tmp_path / "i").exists()  # said before any work
    report = build_index(found, toy().network, tmp_path / "i", DENSE, on_unreadable="skip")
    assert [name for name, _ in report.skipped] == ["c0/\\xff.png"]
    assert report.n_images == len(source) - 1


def test_a_crop_that_leaves_out_much_is_counted(tmp_path: Path) -> None:
    folder, network = tmp_path / "pictures", toy().network
    source = pictures(folder)
    side = network.preprocess.size[0]
    network.preprocess = Preprocess((side, side), "crop", side)
    for position, width in enumerate((160, 100, 130, 133, 150)):
        where = folder / source.ids[position]
        Image.open(where).convert("RGB").resize((width, 100)).save(where)
    report = build_index(find_images(folder), network, tmp_path / "i", DENSE, progress=False)
    # 100 of 133 columns are three quarters, 100 of 150 are two thirds.
    wide = "the crop leaves out more than a quarter of 2 of 12 pictures"
    assert report.notes == [f'{wide}; resize="squash" shows all of each']
    assert for_command_line(report.notes[0]).endswith("; --resize squash shows all of each")
    assert report.taken()[-1] == report.notes[0]
