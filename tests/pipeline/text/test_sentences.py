"""Sentences of classes from templates, a table of words and descriptions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.params import ClassWordsParams, TextParams
from pipeline.shared.errors import DataError, ParamsError
from pipeline.text.sentences import class_sentences, filled_templates, is_code, split_sentences


def text(**changes: Any) -> TextParams:
    """Section `text`; the encoder is not opened."""
    return TextParams(**{"encoder": "onnx", "file": "f", "tokenizer": "t", **changes})


def words(root: Path, content: str, **columns: Any) -> ClassWordsParams:
    """A table of words with that content."""
    (root / "classes.csv").write_text(content, encoding="utf-8")
    return ClassWordsParams(file=str(root / "classes.csv"), **columns)


def test_a_class_name_is_read_as_words() -> None:
    made = class_sentences(text(templates=["a {}.", "two {}s"]), ["sea_horse", "собака"])
    assert made.sentences == [["a sea horse.", "two sea horses"], ["a собака.", "two собакаs"]]
    assert made.remarks == []


def test_words_of_a_table_and_descriptions_follow_the_class(tmp_path: Path) -> None:
    names = words(
        tmp_path,
        'wnid,words\nn2,"toad, frog"\nn1,caf\u0065\u0301\n',
        class_column="wnid",
        text_column="words",
        separator=",",
    )
    (tmp_path / "n2.txt").write_text("It jumps. It is green!\n\nIt\tjumps.\n青い。小さい。", encoding="utf-8")
    (tmp_path / "n9.txt").write_text("of no class")
    section = text(names=names, templates=["a {}"], descriptions=str(tmp_path))
    made = class_sentences(section, ["n1", "n2"])
    assert made.sentences == [["a caf\u00e9"], ["a toad", "It jumps.", "a frog", "It is green!", "青い。", "小さい。"]]
    assert made.remarks == [
        f"{tmp_path}: no file for 1 class, such as 'n1'", f"{tmp_path}: 1 file of no class, such as 'n9.txt'"
    ]  # fmt: skip
    cut = class_sentences(section.model_copy(update={"max_sentences": 3}), ["n1", "n2"])
    assert cut.sentences[1] == ["a toad", "It jumps.", "a frog"]
    assert cut.unused == 3 and cut.remarks[-1] == (
        "3 sentences are not used, 3 of them from descriptions: 1 class with more than 3 (text.max_sentences), "
        "such as 'n2', whose first unused sentence is 'It is green!'"
    )


@given(templates=st.integers(1, 7), words=st.integers(1, 5), described=st.integers(0, 40), limit=st.integers(1, 40))
def test_a_limit_drops_from_templates_words_and_descriptions_alike(
    templates: int, words: int, described: int, limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("texts")
    (root / "c.csv").write_text("name,text\nc," + "/".join(f"w{number}" for number in range(words)))
    (root / "c.txt").write_text("\n".join(f"Sentence {number}" for number in range(described)) or "w0")
    names = ClassWordsParams(file=str(root / "c.csv"), separator="/")
    section = text(names=names, templates=[f"t{number} {{}}" for number in range(templates)], max_sentences=limit)
    made = class_sentences(section.model_copy(update={"descriptions": str(root)}), ["c"])
    [chosen], all_sentences = made.sentences, templates * words + max(described, 1)
    assert len(chosen) == len(set(chosen)) == min(limit, all_sentences)
    assert made.unused == all_sentences - len(chosen) and bool(made.remarks) == bool(made.unused)
    # Of both sources as many, unless one has no more sentences.
    filled = [sentence for sentence in chosen if sentence[0] == "t"]
    others, halves = len(chosen) - len(filled), len(chosen) // 2
    assert len(filled) >= min(halves, templates * words) and others >= min(halves, max(described, 1))


@pytest.mark.parametrize("templates", range(8))
@pytest.mark.parametrize("words", range(1, 8))
def test_of_the_first_filled_templates_each_template_and_each_word_has_an_equal_share(
    templates: int, words: int
) -> None:
    made = filled_templates(
        [f"t{number} {{}}" for number in range(templates)], [f"w{number}" for number in range(words)]
    )
    assert len(made) == len(set(made)) == templates * words
    for limit in range(1, len(made) + 1):
        for part, kinds in ((0, templates), (1, words)):
            uses = Counter(sentence.split()[part] for sentence in made[:limit])
            assert max(uses.values()) - min(uses.values()) <= 1 and len(uses) == min(kinds, limit)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,text\ncat,a\ncat,b\n", "class 'cat' has two rows"),
        ("name,text\ncat,\ndog,a\n", "class 'cat' has no words"),
        ("name,text\ndog,a\n", "class 'cat' has no row in this file"),
        ("name,words\ncat,a\n", "text.names.text_column is 'text', but the columns of .* are name, words"),
        ("", "are none"),
        (
            "name,text\ncat,It purrs, and it sleeps.\n",
            "the row of class 'cat' has more cells than the header; put .* in quotes",
        ),
    ],
)
def test_a_table_that_does_not_fit_is_refused_with_its_name(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises((DataError, ParamsError), match=message) as error:
        class_sentences(text(names=words(tmp_path, content)), ["cat", "dog"])
    assert "classes.csv" in str(error.value)


def test_descriptions_that_do_not_fit_are_refused_with_their_names(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"text\.descriptions is 'none': No such file"):
        class_sentences(text(descriptions="none"), ["cat"])
    (tmp_path / "cat.txt").write_text(" \n\n")
    with pytest.raises(DataError, match=r"cat\.txt: is empty"):
        class_sentences(text(descriptions=str(tmp_path)), ["cat"])
    (tmp_path / "cat.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"cat\.txt: is not UTF-8"):
        class_sentences(text(descriptions=str(tmp_path)), ["cat"])
    (tmp_path / "cat.txt").write_text("It purrs.")
    with pytest.raises(DataError, match=r"class 'dog' has no description, and text.templates is empty"):
        class_sentences(text(descriptions=str(tmp_path), templates=[]), ["cat", "dog"])


def test_descriptions_of_a_column_precede_those_of_a_file(tmp_path: Path) -> None:
    table = 'name,text,about\ndog,dog,"It barks. It runs."\ncat,cat,\n'
    names = words(tmp_path, table, description_column="about")
    made = class_sentences(text(names=names, templates=[]), ["dog"])
    assert (made.sentences, made.remarks) == ([["It barks.", "It runs."]], [])
    (tmp_path / "dog.txt").write_text("It sleeps.")
    both = class_sentences(text(names=names, descriptions=str(tmp_path), templates=["a {}"]), ["cat", "dog"])
    assert both.sentences == [["a cat"], ["a dog", "It barks.", "It runs.", "It sleeps."]]
    assert both.remarks[0] == f"{tmp_path}/classes.csv: no about of 1 class, such as 'cat'"
    with pytest.raises(DataError, match=r"classes\.csv: class 'cat' has no description, and text\.templates is empty"):
        class_sentences(text(names=names, templates=[]), ["cat", "dog"])
    with pytest.raises(
        ParamsError, match=r"text\.names\.description_column is 'facts', but the columns of .* name, text, "
    ):
        class_sentences(text(names=words(tmp_path, table, description_column="facts")), ["dog"])


def test_two_files_of_one_class_in_unicode_are_refused(tmp_path: Path) -> None:
    for name in ("caf\u00e9", "cafe\u0301"):
        (tmp_path / f"{name}.txt").write_text("Coffee.")
    with pytest.raises(DataError, match=r"'cafe\\u0301\.txt' and 'caf\\xe9\.txt' are of one class"):
        class_sentences(text(descriptions=str(tmp_path)), ["caf\u00e9"])


def test_a_class_name_cannot_name_a_file_outside_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "texts").mkdir()
    made = class_sentences(text(descriptions=str(tmp_path / "texts"), templates=["{}"]), ["../secret"])
    assert made.sentences == [["../secret"]]


def test_codes_are_not_words() -> None:
    assert all(map(is_code, ("n01440764", "class12", "class_3", "7", "label-004", "C10")))
    assert not any(map(is_code, ("cat", "boeing 747", "собака", "sea_horse", "b2 bomber", "a310")))
    assert "class names that are codes, not words: 2, such as '0'" in class_sentences(text(), ["0", "1"]).remarks[0]


def test_sentences_end_at_punctuation_and_lines() -> None:
    assert split_sentences("A 3.5 m fish.  Big?\nYes") == ["A 3.5 m fish.", "Big?", "Yes"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"templates": ["a photo"]}, "expected a sentence with one {}"),
        ({"templates": []}, "templates is empty and descriptions is null"),
        ({"tokenizer": None}, "tokenizer is null, but encoder is onnx; onnx alone needs it: set it"),
        ({"model": "RN50"}, "model is RN50, but encoder is onnx; open_clip alone needs it: set it to null"),
        ({"encoder": "features", "tokenizer": None, "descriptions": "d"}, "takes no sentences"),
    ],
)
def test_keys_that_do_not_fit_the_encoder_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        text(**changes)


def test_a_table_of_words_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    names = words(tmp_path, "name,text,text\na,x,y\n")
    with pytest.raises(DataError, match="has more than one column 'text'; rename all but one"):
        class_sentences(text(names=names), ["a"])
