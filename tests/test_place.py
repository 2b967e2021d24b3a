"""Places as text and as numbers: the grammar, layers, spans and positions. No model is needed."""

import numpy as np
import pytest
import torch

from trimtab.errors import PlaceError
from trimtab.place import FOREVER, SITES, Place, Selection, Tokens


def positions_of(lengths, width=None):
    """Positions [B, T] of left-padded rows."""
    width = width or max(lengths)
    return torch.tensor([[-1] * (width - n) + list(range(n)) for n in lengths])


def chosen(tokens, prompt_len, lengths):
    """The positions that a selector chooses in each row, in a batch that is left-padded."""
    positions = positions_of(lengths)
    selection = Selection.of([Tokens.of(tokens)] * len(lengths), prompt_len, lengths)
    mask = selection.mask(positions)
    return [row[m].tolist() for row, m in zip(positions, mask, strict=True)]


# ---- text form -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("resid@10:28 answer", "resid@10:28 answer"),
        ("norm@0: all", "norm@all all"),
        ("norm@0: answer[:16]", "norm@all answer[:16]"),
        ("  attn @ 3,5   prompt[-1:]  ", "attn@3,5 prompt[-1:]"),
        ("mlp@-1", "mlp@-1 all"),
        ("resid@all prompt[::2]", "resid@all prompt[::2]"),
        ("resid@2:8:2", "resid@2:8:2 all"),
        ("resid@1 answer[3]", "resid@1 answer[3:4]"),
        ("resid@1 answer[-1]", "resid@1 answer[-1:]"),
        ("resid@1 [3, 5]", "resid@1 [3, 5]"),
        ("resid@1 [[3,5],[2]]", "resid@1 [[3, 5], [2]]"),
        ("resid@:3 answer[0:16]", "resid@0:3 answer[:16]"),
        ("resid@1 prompt[0:]", "resid@1 prompt"),
        ("resid@1 answer[0]", "resid@1 answer[:1]"),
        ("attn@4,7 prompt before", "attn@4,7 prompt before"),
        ("embed@0 all", "embed@0 all"),
        ("embed", "embed@0 all"),
        (" embed answer[1:] before", "embed@0 answer[1:] before"),
    ],
)
def test_text_form_is_read_and_written(text, shown):
    place = Place.parse(text)
    assert str(place) == shown
    assert Place.parse(str(place)) == place and hash(Place.parse(shown)) == hash(place)
    assert Place.parse(place) is place
    assert repr(place) == f"Place({shown!r})"


@pytest.mark.parametrize("site", SITES)
def test_every_site_is_a_place(site):
    assert Place.parse(f"{site}@0").site == site


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "resid",
            "@3",
            "resid@",
            "resid@x",
            "resid@3 tokens",
            "resid@3 answer[",
            "resid@1,,2",
        ),
        *("resid@3 answer[]", "resid@3 answer[a]", "resid@3 answer[1:2:3:4]", "resid@3 answer[-]"),
        *("resid@3 answer[::0]", "resid@3 answer[::-1]", "resid@3 [3,,5]", "resid@3 [[3], 5]"),
        *("resid@3 [[[3]]]", "resid@3 [3, 3]", "resid@3 answer after", "resid@0:4:0", "resid@--1"),
        *("resid answer", "embedanswer", "embedanswer[:3]", "embed nose", "resid@1 [5, 3]"),
        *("resid@3 [" + "9" * 30 + "]", "residual@3", "resid@3 __import__('os')"),
    ],
)
def test_what_is_no_place_says_so(text):
    with pytest.raises(PlaceError) as told:
        Place.parse(text)
    assert len(str(told.value)) > 30  # what was given, and how it is written


@pytest.mark.parametrize("place", [None, 3, ["resid@3"], b"resid@3"])
def test_a_place_is_text_or_a_place(place):
    with pytest.raises(PlaceError, match="cannot read the place"):
        Place.parse(place)


def test_the_errors_carry_value_and_remedy():
    with pytest.raises(PlaceError, match=r"no site 'residual'; a site is one of resid, norm"):
        Place("residual")
    with pytest.raises(PlaceError, match=r"'resid at 3'.*resid@10:28 answer"):
        Place.parse("resid at 3")
    with pytest.raises(PlaceError, match=r"tokens 'last'.*prompt, answer|tokens 'last'.*prompt or"):
        Place("resid", 3, "last")
    with pytest.raises(PlaceError, match=r"'prompt\[::-1\]' steps by -1; a step is 1 or more"):
        Place("resid", 3, "prompt[::-1]")


# ---- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "text", "found"),
    [
        ("all", "all", range(6)),
        (":", "all", range(6)),
        (slice(None), "all", range(6)),
        (2, "2", [2]),
        (-1, "-1", [5]),
        (-6, "-6", [0]),
        (range(1, 3), "1:3", [1, 2]),
        (range(3), "0:3", [0, 1, 2]),
        (range(0, 6, 2), "0,2,4", [0, 2, 4]),
        (range(0, 8, 4), "0,4", [0, 4]),  # its end is no layer, and need not be one
        (np.int64(2), "2", [2]),
        (np.array([4, 1]), "1,4", [1, 4]),
        (torch.tensor(-1), "-1", [5]),
        (torch.arange(3), "0:3", [0, 1, 2]),
        ([np.int32(1), torch.tensor(3)], "1,3", [1, 3]),
        (slice(np.int64(1), torch.tensor(3)), "1:3", [1, 2]),
        (":2", "0:2", [0, 1]),
        (range(4, 0, -1), "1:5", [1, 2, 3, 4]),
        (range(-2, 0), "-2,-1", [4, 5]),
        (slice(1, None), "1:", [1, 2, 3, 4, 5]),
        (slice(None, -3), "0:-3", [0, 1, 2]),
        (slice(-2, None), "-2:", [4, 5]),
        ([4, 1, 1], "1,4", [1, 4]),
        ((2, 3, 4), "2:5", [2, 3, 4]),
        ({0}, "0", [0]),
        ((i for i in (0, 2)), "0,2", [0, 2]),
        ("0:2,4", "0:2,4", [0, 1, 4]),
        ("1, 5", "1,5", [1, 5]),
        ("-1,5", "-1,5", [5]),
    ],
)
def test_layers_in_every_form(layers, text, found):
    place = Place("resid", layers)
    assert place.layers == text
    assert place.layer_indices(6) == tuple(found)


@pytest.mark.parametrize("layers", [6, -7, "0:7", [0, 6], "-8:"])
def test_layers_that_the_model_lacks(layers):
    with pytest.raises(PlaceError, match=r"asks for layer -?\d.*layers 0..5 \(or -6..-1"):
        Place("resid", layers).layer_indices(6)


@pytest.mark.parametrize(
    "layers",
    [
        *(None, 3.5, True, [True], [], range(3, 3), range(5, 2), [1.0], ["1"], "", "1;2", "0:4:-1"),
        *(np.float64(1), np.array([True]), torch.ones(2), torch.ones(1, 1).long(), np.array([])),
    ],
)
def test_what_is_no_layer_says_so(layers):
    with pytest.raises(PlaceError, match="layer"):
        Place("resid", layers)


def test_an_empty_slice_names_no_layer():
    with pytest.raises(PlaceError, match=r"names no layer of a model with layers 0..5"):
        Place("resid", "4:2").layer_indices(6)


def test_embed_is_at_layer_0_whatever_the_layers():
    assert Place("embed", "all") == Place("embed", 0)


def test_at_changes_what_is_named():
    place = Place("resid", "2:4", "answer[:3]", before=True)
    assert str(place.at(site="norm")) == "norm@2:4 answer[:3] before"
    assert str(place.at(layers=-1, tokens=[7])) == "resid@-1 [7] before"
    assert place.at(layers=0).layers == "0"
    assert not place.at(before=False).before and place.at(before=False).at(before=True) == place
    with pytest.raises(PlaceError):
        place.at(site="nose")


# ---- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "first", "second"),
    [  # rows of 6 tokens, 4 of them prompt, and of 3, 2 of them prompt
        ("all", [0, 1, 2, 3, 4, 5], [0, 1, 2]),
        ("all[-2:]", [4, 5], [1, 2]),
        ("all[1:3]", [1, 2], [1, 2]),
        ("all[::2]", [0, 2, 4], [0, 2]),
        ("prompt", [0, 1, 2, 3], [0, 1]),
        ("prompt[-1:]", [3], [1]),
        ("prompt[-1]", [3], [1]),
        ("prompt[-2]", [2], [0]),
        ("prompt[-3:]", [1, 2, 3], [0, 1]),
        ("prompt[1:-1]", [1, 2], []),
        ("prompt[9:]", [], []),
        ("answer", [3, 4, 5], [1, 2]),  # begins at the last prompt token
        ("answer[0]", [3], [1]),
        ("answer[1:]", [4, 5], [2]),
        ("answer[:16]", [3, 4, 5], [1, 2]),
        ("answer[-1:]", [5], [2]),
        ("answer[::2]", [3, 5], [1]),
        ([0, 4], [0, 4], [0]),
        ([[5], [0, 2]], [5], [0, 2]),
        ([[], [1]], [], [1]),
        ([], [], []),
    ],
)
def test_selectors_choose_by_real_tokens(tokens, first, second):
    assert chosen(tokens, [4, 2], [6, 3]) == [first, second]


def test_a_growing_text_is_counted_from_its_start():
    selection = Selection.of([Tokens.of("answer[1:3]")], [4], [FOREVER])
    assert selection.mask(torch.tensor([[3, 4, 5, 6]])).tolist() == [[False, True, True, False]]
    assert selection.mask(torch.tensor([[6]])).tolist() == [[False]]
    assert selection.order(torch.tensor([[3, 4, 5, 6]])).tolist() == [[0, 0, 1, 2]]


@pytest.mark.parametrize("tokens", ["all[-2:]", "answer[-1:]", "answer[:-1]", "all[-3]"])
def test_the_end_of_a_growing_text_is_unknown(tokens):
    with pytest.raises(PlaceError, match=r"still growing.*answer\[:16\].*prompt\[-1:\]"):
        Selection.of([Tokens.of(tokens)], [4], [FOREVER])


def test_order_numbers_the_chosen_tokens():
    positions = positions_of([6, 3])
    tokens = [Tokens.of("all[1::2]"), Tokens.of([0, 2])]
    selection = Selection.of(tokens, [6, 3], [6, 3])
    mask, order = selection.mask(positions), selection.order(positions)
    assert [o[m].tolist() for o, m in zip(order, mask, strict=True)] == [[0, 1, 2], [0, 1]]


def test_rows_of_a_selection_can_be_taken_and_repeated():
    selection = Selection.of([Tokens.of([[1], [2]])] * 2, [3, 3], [3, 3])
    positions = positions_of([3, 3])
    swapped = selection.take(torch.tensor([1, 0])).mask(positions)
    assert swapped.tolist() == [[False, False, True], [False, True, False]]
    assert selection.repeat(2).mask(positions[[0, 0, 1, 1]]).nonzero()[:, 1].tolist() == [
        1,
        1,
        2,
        2,
    ]


@pytest.mark.parametrize("lists", [[[1], [2], [3]], [[1], [2], [3], [4], [5]]])
def test_positions_for_another_number_of_rows(lists):
    with pytest.raises(
        PlaceError, match=rf"positions for {len(lists)} rows in a batch of 4;.*list"
    ):
        Selection.of([Tokens.of(lists)] * 4, [3] * 4, [3] * 4)


@pytest.mark.parametrize(
    "positions",
    [
        *([-1], [2, 2], [[0], [-4]], [1.5], [True], 7, b"ab", [[1], 2], [5, 3], [[1], [4, 0]]),
        *(
            np.array([1.0]),
            torch.ones(2),
            torch.ones(1, 1, 1).long(),
            np.array([True]),
            np.array(3),
        ),
    ],
)
def test_what_is_no_position_says_so(positions):
    with pytest.raises(PlaceError, match="positions"):
        Tokens.of(positions)


def test_positions_of_numpy_and_torch():
    wanted = Place("resid", 0, [[1, 4], [0, 2]])
    rows = np.array([[1, 4], [0, 2]])
    for tokens in (rows, torch.from_numpy(rows), list(rows), [list(row) for row in rows]):
        assert Place("resid", 0, tokens) == wanted
    assert Place("resid", 0, torch.tensor([1, 4])) == Place("resid", 0, (np.int64(1), 4))


def test_unsorted_positions_say_how_to_list_them():
    with pytest.raises(PlaceError, match=r"not \[5, 3\]; list them ascending.*one per token"):
        Place("resid", 0, [5, 3])


def test_what_is_the_same_place_is_equal():
    assert Place.parse("resid@1 answer[0:16]") == Place.parse("resid@1 answer[:16]")
    assert Place("resid", range(0, 6, 2)) == Place("resid", [0, 2, 4])
    assert Place.parse("embed answer") == Place("embed", tokens="answer")


@pytest.mark.parametrize("text", ["resid@1:3 answer", "norm@all all", "attn@2 [3, 5] before"])
def test_the_repr_makes_the_place(text):
    place = Place.parse(text)
    assert Place(text) == place and repr(place) == f"Place({text!r})"
    for options in ({"tokens": "prompt"}, {"layers": 3}, {"before": True}):
        with pytest.raises(PlaceError, match=r"is a whole place; give it alone, .*\.at\(\)"):
            Place(text, **options)
    with pytest.raises(PlaceError, match="cannot read the place 'resid@'"):
        Place("resid@")


@pytest.mark.parametrize(
    "text",
    [
        "resid@N",
        "resid@0:N",
        "resid@0:4:N",
        "resid@1 [N]",
        "resid@1 answer[:N]",
        "resid@1 prompt[N]",
    ],
)
def test_numbers_of_thousands_of_digits(text):
    for number in ("9" * 5000, "0" * 5000 + "1", "-" + "9" * 5000):
        with pytest.raises(PlaceError) as told:
            Place.parse(text.replace("N", number))
        assert len(str(told.value)) < 500


def test_a_deep_nest_is_refused_not_a_crash():
    with pytest.raises(PlaceError):
        Place.parse("resid@0 " + "[" * 5000 + "]" * 5000)
