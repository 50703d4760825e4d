"""Taxonomy: sums, the deepest node that reaches a level, and tables that are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.taxonomy import Node, Taxonomy, read_taxonomy

TABLE = """name,parent
lynx,cats
cat,cats
wolf,dogs
cats,carnivores
dogs,carnivores
carnivores,
fern,
"""
CLASSES = ["cat", "fern", "lynx", "wolf"]


def test_the_answer_is_the_deepest_node_that_reaches_the_level():
    taxonomy = read_taxonomy(TABLE, CLASSES)
    p = np.array([[0.5, 0.02, 0.42, 0.06]])
    assert taxonomy.names[:4] == CLASSES
    for level, name, probability in (
        (0.4, "cat", 0.5), (0.6, "cats", 0.92), (0.92, "cats", 0.92), (0.95, "carnivores", 0.98), (0.99, None, 1.0),
    ):  # fmt: skip
        [answer] = taxonomy.answers(p, level)
        assert (taxonomy.names[answer.node] if answer.node >= 0 else None) == name
        assert answer.probability == pytest.approx(probability)
    assert taxonomy.answers(np.repeat(p, 2, axis=0), np.array([0.4, 0.6])) == [
        taxonomy.answers(p, 0.4)[0], taxonomy.answers(p, 0.6)[0],
    ]  # fmt: skip
    assert (
        taxonomy.contains(-1, 1) and taxonomy.contains(taxonomy.names.index("cats"), 2) and not taxonomy.contains(0, 2)
    )


@st.composite
def forests(draw):
    classes, inner = draw(st.integers(2, 7)), draw(st.integers(0, 5))
    nodes = classes + inner
    # The parent of an inner node has a larger number, so there is no cycle.
    parents = [draw(st.sampled_from([-1, *range(max(classes, node + 1), nodes)])) for node in range(nodes)]
    return Taxonomy([f"n{i}" for i in range(nodes)], parents, classes)


@given(forests(), st.integers(0, 2**32 - 1), st.floats(0.05, 1.0))
def test_answers_equal_a_search_over_all_nodes(taxonomy, seed, level):
    p = np.random.default_rng(seed).dirichlet(np.full(taxonomy.classes, 0.4), 5)
    below = [[c for c in range(taxonomy.classes) if node in taxonomy.path(c)] for node in range(len(taxonomy.names))]
    for row, answer in zip(p, taxonomy.answers(p, level), strict=True):
        sums = [row[members].sum() for members in below]
        reached = [node for node, total in enumerate(sums) if total >= level - 1e-9]
        if not reached:
            assert answer == Node(-1, 1.0)
            continue
        deepest = max(len(taxonomy.path(node)) for node in reached)
        best = max(sums[node] for node in reached if len(taxonomy.path(node)) == deepest)
        assert len(taxonomy.path(answer.node)) == deepest and answer.probability == pytest.approx(min(best, 1))
    np.testing.assert_allclose(taxonomy.sums(p)[:, : taxonomy.classes], p)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("name,genus\ncat,cats\n", "has name, genus; expected the columns name and parent"),
        ("", "has no row; expected the columns"),
        ("name,parent\ncat,cats\n", r"class 'fern' is missing \(3 such classes\); add a row for it"),
        (TABLE + "cat,dogs\n", "line 9: 'cat' has two parents, 'cats' and 'dogs'"),
        (TABLE.replace("carnivores,\n", "carnivores,cats\n"), "has a cycle through"),
        (
            TABLE.replace("carnivores,\n", "carnivores,n0\n") + "".join(f"n{i},n{i + 1}\n" for i in range(50_000)),
            "has more than 100 levels above 'cat'",
        ),
        (TABLE + "kitten,cat\n", "class 'cat' is the parent of another node"),
        (TABLE + "birds,carnivores\n", "'birds' has no class below it"),
        (TABLE + ",cats\n", "line 9 has no name"),
    ],
)
def test_a_wrong_table_is_refused_with_the_reason(rows, message):
    with pytest.raises(ValueError, match=message):
        read_taxonomy(rows, CLASSES)


def test_composed_and_decomposed_names_are_one_class():
    assert read_taxonomy("name,parent\ncafe\u0301,x\ntea,x\n", ["caf\u00e9", "tea"]).names == ["caf\u00e9", "tea", "x"]


def test_two_columns_of_one_name_are_refused():
    with pytest.raises(ValueError, match="has more than one column 'parent'; rename all but one"):
        read_taxonomy("name,parent,parent\ncat,cats,dogs\nwolf,cats,dogs\n", ["cat", "wolf"])
