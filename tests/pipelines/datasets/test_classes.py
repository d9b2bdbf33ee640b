import re
from hashlib import sha256
from pathlib import Path

import pytest

from dalikd import configs
from dalikd.pipelines.datasets.classes import (
    alike,
    check_equal_classes,
    draw_classes,
    in_order,
    keep_listed,
    read_class_list,
    shorten,
)


@pytest.fixture
def listing(tmp_path: Path):
    path = tmp_path / "classes.txt"

    def write(content: str | bytes) -> Path:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


class TestReadClassList:
    def test_names_in_their_order_without_remarks(self, listing) -> None:
        path = listing("# which\n\n  n02 \nn01\t# a fish\n   # indented\r\nblack grouse\nc#\n")
        assert read_class_list(path) == ("n02", "n01", "black grouse", "c#")

    def test_byte_order_mark(self, listing) -> None:
        assert read_class_list(listing(b"\xef\xbb\xbfa\nb\n")) == ("a", "b")

    def test_listed_twice(self, listing) -> None:
        with pytest.raises(ValueError, match=r"classes\.txt line 4: b is listed in line 2 already"):
            read_class_list(listing("a\nb\n# c\nb # again\n"))

    @pytest.mark.parametrize(("content", "count"), [("", 0), ("# nothing\n\n", 0), ("a\n", 1)])
    def test_too_few(self, listing, content: str, count: int) -> None:
        with pytest.raises(ValueError, match=rf"classes\.txt lists {count} classes: name two or more, one a line"):
            read_class_list(listing(content))

    def test_no_text_and_no_file(self, listing, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"classes\.txt is not UTF-8 text \(.* at byte 2\): save it as UTF-8$"):
            read_class_list(listing(b"a\n\xff\xfe\n"))
        for path in (tmp_path, tmp_path / "missing"):
            with pytest.raises(FileNotFoundError, match=f"--data.classes {path} is no file: name a text file"):
                read_class_list(path)


def test_the_published_hundred() -> None:
    names = read_class_list(Path(configs.__file__).parent / "imagenet100/classes.txt")
    assert len(names) == 100
    assert all(re.fullmatch(r"n\d{8}", name) for name in names)
    assert list(names) == sorted(names)


class TestKeepListed:
    def test_the_order_is_that_of_the_data_set(self, listing) -> None:
        assert keep_listed(("a", "b", "c", "d"), listing("d\na\nc\n"), "DATA") == ("a", "c", "d")
        assert keep_listed(("d", "c", "b", "a"), listing("a\nd\n"), "DATA") == ("d", "a")

    @pytest.mark.parametrize(
        ("name", "there", "hint"),
        [
            (
                "caf\u00e9",
                "cafe\u0301",
                r"'caf\\xe9' and 'cafe\\u0301' differ only in Unicode form \(NFC, NFD\): rename",
            ),
            ("Dog", "dog", "'Dog' and 'dog' differ only in upper and lower case: write them alike"),
            ("dog", "dog ", "'dog' and 'dog ' differ only in spaces or signs that are not seen: "),
            ("\ufeffdog", "Dog", r"'\\ufeffdog' and 'Dog' differ only in spaces or signs"),  # of two lists in one file
        ],
    )
    def test_a_class_that_looks_like_one_that_is_there(self, listing, name: str, there: str, hint: str) -> None:
        with pytest.raises(ValueError, match=f"1 of 2 classes are not in DATA: .*; {hint}"):
            keep_listed(("ant", there), listing(f"ant\n{name}\n"), "DATA")

    def test_a_class_that_is_not_there(self, listing) -> None:
        with pytest.raises(ValueError, match=r"2 of 3 classes are not in DATA: e, f; it has a, b, c$"):
            keep_listed(("a", "b", "c"), listing("f\na\ne\n"), "DATA")


class TestInOrder:
    @pytest.mark.parametrize(
        ("names", "ordered"),
        [
            ("b a 10 9", "10 9 a b"),
            ("10 9 -2 8", "-2 8 9 10"),
            ("3 02 1", "1 02 3"),
            ("10 9 ²", "10 9 ²"),
            ("n02 n10 n1", "n02 n1 n10"),
        ],
    )
    def test_whole_numbers_by_number_all_others_as_text(self, names: str, ordered: str) -> None:
        assert in_order(names.split(), "DATA")[0] == tuple(ordered.split())

    def test_it_is_said_where_it_matters(self) -> None:
        names = [str(number) for number in range(1, 11)]
        assert in_order(names, "DATA") == (
            tuple(names),
            ["class folders that are whole numbers are ordered by number: 1, 2, 3, 4, 5 and 5 more; not as text: "
             "1, 10, 2, 3, 4 and 5 more"],
        )  # fmt: skip
        assert in_order(names[:9], "DATA")[1] == in_order(("01", "02", "10"), "DATA")[1] == []

    @pytest.mark.parametrize("names", [("1", "01", "2"), ("0", "-0")])
    def test_one_number_twice(self, names: tuple[str, ...]) -> None:
        with pytest.raises(
            ValueError, match=r"^DATA: the class folders \S+ and \S+ are the same number: merge or rename"
        ):
            in_order(names, "DATA")


class TestDrawClasses:
    names = tuple(f"n{number:08d}" for number in range(300))

    def test_those_with_the_smallest_hash(self) -> None:
        keys = {sha256(f"7/{name}".encode()).hexdigest(): name for name in self.names}
        smallest = {keys[key] for key in sorted(keys)[:100]}
        assert draw_classes(self.names, 100, 7, "DATA") == tuple(sorted(smallest))

    def test_values_of_this_version_stay(self) -> None:
        assert draw_classes(tuple("abcdefgh"), 3, 0, "DATA") == ("c", "f", "g")  # by sha256sum

    def test_order_does_not_matter_and_the_seed_does(self) -> None:
        chosen = draw_classes(self.names, 100, 0, "DATA")
        assert draw_classes(self.names[::-1], 100, 0, "DATA") == chosen[::-1]
        others = draw_classes(self.names, 100, 1, "DATA")
        assert len(set(chosen)) == len(set(others)) == 100
        assert 15 < len(set(chosen) & set(others)) < 52  # 33 on average, hypergeometric, standard deviation 3.9

    def test_one_more_class_changes_one_choice_at_most(self) -> None:
        chosen = set(draw_classes(self.names, 100, 0, "DATA"))
        for extra in ("x", "y", "z", "train"):
            assert len(chosen - set(draw_classes((*self.names, extra), 100, 0, "DATA"))) <= 1

    def test_all_of_a_hundred(self) -> None:
        assert draw_classes(self.names[:100], 100, 5, "DATA") == self.names[:100]
        with pytest.raises(ValueError, match=r"DATA has 99 class folders of which 100 are .*--data\.classes FILE$"):
            draw_classes(self.names[:99], 100, 0, "DATA")


class TestCheckEqualClasses:
    def check(self, train: str, val: str) -> None:
        check_equal_classes("pets", ("train", tuple(train)), ("val", list(val)))

    def test_same(self) -> None:
        self.check("ab", "ab")

    def test_missing_in_one(self) -> None:
        with pytest.raises(
            ValueError, match=r"^pets: train has 8 classes, val 1; only in train: b, c, d, e, f and 2 more"
        ):
            self.check("abcdefgh", "a")
        with pytest.raises(ValueError, match=r"only in train: a; only in val: c: both must have the same .*folders$"):
            self.check("ab", "bc")

    def test_names_of_another_unicode_form(self) -> None:
        with pytest.raises(ValueError, match=r"'caf\\xe9' and 'cafe\\u0301' differ only in Unicode form .* `convmv "):
            check_equal_classes("pets", ("train", ("bee", "caf\u00e9")), ("val", ("bee", "cafe\u0301")))

    def test_another_order(self) -> None:
        with pytest.raises(ValueError, match="label 1 is b and c"):
            self.check("abc", "acb")


def test_shorten() -> None:
    assert shorten("abc") == "a, b, c"
    assert shorten("abcdefg") == "a, b, c, d, e and 2 more"
    assert shorten("abc", 2) == "a, b and 1 more"


def test_names_that_look_alike_are_told_once() -> None:
    found = alike(["cat", "Cat", "dog", "caf\u00e9", "cafe\u0301", "dog\u200b"])
    assert [line.partition(":")[0] for line in found] == [
        "'cat' and 'Cat' differ only in upper and lower case",
        "'caf\\xe9' and 'cafe\\u0301' differ only in Unicode form (NFC, NFD)",
        "'dog' and 'dog\\u200b' differ only in spaces or signs that are not seen",
    ]
    assert alike(["cat", "dog"]) == []
