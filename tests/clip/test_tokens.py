"""Class names as token ids."""

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from vlfast.clip.tokens import tokenize_names


@pytest.fixture(scope="module")
def tokenizer():
    return SimpleTokenizer()


def test_suffix_is_name_rest_and_eot(tokenizer):
    tokens = tokenize_names(tokenizer, ["cat", "school_bus"], "{ctx} {name}.")
    assert tokens.suffix[0, : tokens.lengths[0]].tolist() == [
        *tokenizer.encode("cat."),
        tokenizer.eot_token_id,
    ]
    assert tokens.suffix[1, : tokens.lengths[1]].tolist() == [
        *tokenizer.encode("school bus."),
        tokenizer.eot_token_id,
    ]
    assert tokens.has_context and tokens.between == 0
    assert tokens.name_lengths.tolist() == [1, 2]


def test_words_between_context_and_name(tokenizer):
    tokens = tokenize_names(tokenizer, ["cat"], "{ctx} of a {name}.")
    assert tokens.between == 2
    assert tokens.suffix[0, :2].tolist() == tokenizer.encode("of a")


def test_padding_is_zero_beyond_each_length(tokenizer):
    tokens = tokenize_names(tokenizer, ["cat", "long haired border collie"], "{ctx} {name}.")
    assert tokens.suffix.shape[1] == int(tokens.lengths.max())
    assert bool((tokens.suffix[0, tokens.lengths[0] :] == 0).all())


def test_select_keeps_the_order_asked_for(tokenizer):
    tokens = tokenize_names(tokenizer, ["cat", "dog", "hen"], "{ctx} {name}.")
    chosen = tokens.select(torch.tensor([2, 0]))
    assert len(chosen) == 2
    assert torch.equal(chosen.suffix, tokens.suffix[[2, 0]])


def test_name_glued_to_letters_is_marked(tokenizer):
    assert not tokenize_names(tokenizer, ["cat"], "{ctx} {name}s").separable
    assert tokenize_names(tokenizer, ["cat"], "{ctx} {name}.").separable


@pytest.mark.parametrize(
    ("names", "template", "match"),
    [
        ([], "{ctx} {name}.", "names: expected a non-empty"),
        ("cat", "{ctx} {name}.", "names: expected a non-empty"),
        (["cat", " "], "{ctx} {name}.", "empty class name at position 1"),
        (["cat"], "a photo", "template: expected one"),
        (["cat"], "{ctx} {ctx} {name}", "template: expected one"),
        (["cat"], "an icon {ctx} {name}.", "directly after the start"),
    ],
)
def test_bad_input(tokenizer, names, template, match):
    with pytest.raises(ValueError, match=match):
        tokenize_names(tokenizer, names, template)


def test_too_long_names_the_class(tokenizer):
    tokens = tokenize_names(tokenizer, ["cat", "long haired border collie"], "{ctx} {name}.")
    tokens.check_fits(10, 24)
    assert tokens.longest == ("long haired border collie", int(tokens.lengths[1]))
    with pytest.raises(ValueError, match=r"n_ctx: 30 .*'long haired border collie'.*n_ctx=\d+"):
        tokens.check_fits(30, 24)
