"""Class names as token ids."""

import copy

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from tests.clip import support
from vlfast.clip.tokens import as_tokenizer, tokenize_names


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


def test_texts_are_split_as_coop_splits_them(tokenizer):
    """Behind as many tokens as the name has by itself: ")." is one, and goes with the name."""
    tokens = tokenize_names(tokenizer, ["crane (bird)", "cat"], "{ctx} {name}.")
    assert tokens.separable
    assert tokens.name_lengths.tolist() == [4, 1] and tokens.lengths.tolist() == [5, 3]


def test_a_name_that_melts_into_what_follows_is_marked(tokenizer):
    """ "elep" has two tokens, "elephant" has one."""
    assert not tokenize_names(tokenizer, ["elep"], "{ctx} {name}hant").separable


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


def test_names_without_a_token_or_that_are_no_strings(tokenizer):
    with pytest.raises(ValueError, match=r"names: '\\x00' at position 1 has no token"):
        tokenize_names(tokenizer, ["cat", "\x00"], "{ctx} {name}.")
    with pytest.raises(TypeError, match="names: expected strings, got 3 at position 1"):
        tokenize_names(tokenizer, ["cat", 3], "{ctx} {name}.")


def test_blanks_around_a_name_go(tokenizer):
    tokens = tokenize_names(tokenizer, [" (cat)_", "(cat)"], "{ctx} {name}.")
    assert torch.equal(tokens.suffix[0], tokens.suffix[1])


def test_too_long_names_the_class(tokenizer):
    tokens = tokenize_names(tokenizer, ["cat", "long haired border collie"], "{ctx} {name}.")
    tokens.check_fits(10, 24)
    assert tokens.longest == ("long haired border collie", int(tokens.lengths[1]))
    with pytest.raises(ValueError, match=r"n_ctx: 30 .*'long haired border collie'.*n_ctx=\d+"):
        tokens.check_fits(30, 24)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    return support.roberta_tokenizer(tmp_path_factory.mktemp("roberta"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return support.t5_tokenizer(tmp_path_factory.mktemp("t5"))


def sentence(tokens, row, context):
    """The ids of a whole sentence, put together from its parts."""
    start = [] if tokens.sot is None else [tokens.sot]
    return [*start, *context, *tokens.suffix[row, : tokens.lengths[row]].tolist()]


@pytest.mark.parametrize("kind", ["clip", "roberta", "t5"])
@pytest.mark.parametrize("template", ["{ctx} {name}.", "{ctx} of a {name}.", "{ctx} {name}"])
def test_parts_are_the_tokens_of_the_sentence(request, tokenizer, kind, template):
    theirs = tokenizer if kind == "clip" else request.getfixturevalue(kind)
    ours = as_tokenizer(theirs)
    names = ["cat", "school_bus"]
    tokens = tokenize_names(theirs, names, template)
    context = ours.encode("a photo")
    for row, name in enumerate(names):
        text = template.format(ctx="a photo", name=name.replace("_", " "))
        ids = theirs([text], context_length=40)[0].tolist()
        ours_padded = sentence(tokens, row, context)
        ours_padded += [tokens.pad] * (40 - len(ours_padded))
        assert ours_padded == ids, name


@pytest.mark.parametrize("kind", ["clip", "roberta", "t5"])
def test_hard_prompts_are_the_sentence(request, tokenizer, kind):
    theirs = tokenizer if kind == "clip" else request.getfixturevalue(kind)
    for template in ("a photo of a {name}.", " {name} of a"):
        tokens = tokenize_names(theirs, ["cat", "school bus"], template)
        for row, name in enumerate(("cat", "school bus")):
            ids = theirs([template.format(name=name)], context_length=40)[0].tolist()
            ours = sentence(tokens, row, [])
            assert ours + [tokens.pad] * (40 - len(ours)) == ids


def test_special_tokens_are_those_around_a_text(tokenizer, roberta, t5):
    assert as_tokenizer(tokenizer) is tokenizer
    for given in (roberta, roberta.tokenizer):
        ours = as_tokenizer(given)
        assert (ours.sot_token_id, ours.eot_token_id, ours.pad_token_id) == (0, 2, 1)
    for given in (t5, t5.tokenizer):
        ours = as_tokenizer(given)
        assert (ours.sot_token_id, ours.eot_token_id, ours.pad_token_id) == (None, 1, 0)
    assert as_tokenizer(ours) is ours
    assert ours.vocab_size == len(t5.tokenizer)
    assert ours.decode(ours.encode("yellow school bus")) == "yellow school bus"


def test_texts_are_cleaned_as_the_wrapper_does(t5):
    from open_clip.tokenizer import SigLipTokenizer, get_clean_fn

    plain = as_tokenizer(t5).encode("school bus")
    assert as_tokenizer(t5).encode(" school \n bus ") == plain
    assert as_tokenizer(t5).encode("School Bus!") != plain
    canonical = copy.copy(t5)
    canonical.clean_fn = get_clean_fn("canonicalize")
    assert as_tokenizer(canonical).encode("School Bus!") == plain
    # Its constructor downloads a vocabulary.
    siglip = SigLipTokenizer.__new__(SigLipTokenizer)
    siglip.tokenizer = t5.tokenizer
    assert as_tokenizer(siglip).encode(" School Bus!") == plain


def test_a_separator_that_is_stripped_ends_texts_with_zero(roberta):
    stripped = copy.copy(roberta)
    stripped.strip_sep_token = True
    stripped.tokenizer = copy.deepcopy(roberta.tokenizer)
    stripped.tokenizer.sep_token = "</s>"
    assert as_tokenizer(stripped).eot_token_id == 0
    ids = stripped(["a cat"], context_length=8)[0].tolist()
    tokens = tokenize_names(stripped, ["cat"], "a {name}")
    assert sentence(tokens, 0, []) == ids[: 1 + int(tokens.lengths[0])]


def test_the_limit_counts_no_start_token_where_there_is_none(tokenizer, t5):
    for given, extra in ((tokenizer, 1), (t5, 0)):
        tokens = tokenize_names(given, ["cat"], "{ctx} {name}")
        fits = 24 - extra - int(tokens.lengths[0])
        tokens.check_fits(fits, 24)
        with pytest.raises(ValueError, match=f"'cat' need 25 tokens.*n_ctx={fits}"):
            tokens.check_fits(fits + 1, 24)


def framed(tokenizer, single, special):
    from tokenizers import processors

    changed = copy.deepcopy(tokenizer)
    changed._tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=special
    )
    return changed


def test_tokenizers_that_do_not_serve(roberta):
    inner = roberta.tokenizer
    two = framed(inner, "$A </s> <s>", [("<s>", 0), ("</s>", 2)])
    with pytest.raises(ValueError, match=r"one after it, got \[\] and \['</s>', '<s>'\]"):
        as_tokenizer(two)
    none = framed(inner, "<s> $A", [("<s>", 0)])
    with pytest.raises(ValueError, match=r"one after it, got \['<s>'\] and \[\]"):
        as_tokenizer(none)
    clips = copy.copy(roberta)
    clips.tokenizer_mode = "clips"
    with pytest.raises(ValueError, match="mode 'clips'"):
        as_tokenizer(clips)
    with pytest.raises(TypeError, match="of open_clip or of transformers, got int"):
        as_tokenizer(3)
