"""plpp_loss and plpp_terms: values, gradients, memory, errors, and what the method promises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlfast.ops import backends, plpp_loss, plpp_terms, reference

from . import oracles
from .support import assert_close, gradients, normal


def problem(rows=5, words=60, width=6, dtype=torch.float64, **scales):
    prompts = normal(rows, width, seed=1, dtype=dtype, scale=scales.get("prompts", 1.0))
    hidden = normal(rows, width, seed=2, dtype=dtype, scale=scales.get("hidden", 1.0))
    embedding = normal(words, width, seed=3, dtype=dtype, scale=scales.get("embedding", 1.0))
    return prompts.requires_grad_(), hidden.requires_grad_(), embedding


def compare(arguments, options, expected_arguments=None, tolerance=1e-9, gradient_tolerance=None):
    """Public function against the reference, values and gradients."""
    expected_arguments = expected_arguments or arguments
    actual = plpp_terms(*arguments, **options)
    expected = reference.perplexity_terms(*expected_arguments, **options)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, tolerance)
    expected_gradients = gradients(expected, expected_arguments[:2])
    actual_gradients = gradients(actual, arguments[:2])
    for a, e in zip(actual_gradients, expected_gradients, strict=True):
        assert_close(a, e, gradient_tolerance or tolerance)


class TestValuesAndGradients:
    @pytest.mark.parametrize("detach_targets", [True, False])
    @pytest.mark.parametrize(
        ("rows", "words", "top_k"),
        [
            (1, 1, 1),
            (1, 997, 1),
            (7, 997, 10),
            (16, 997, 63),
            (16, 997, 64),
            (64, 997, 65),
            (65, 997, 100),
            (130, 97, 97),
            (129, 997, 5),
        ],
    )
    def test_equals_the_reference(self, rows, words, top_k, detach_targets):
        options = dict(top_k=top_k, temperature=0.4, detach_targets=detach_targets)
        compare(problem(rows, words, 12), options)

    def test_clip_vocabulary(self):
        prompts, hidden, embedding = problem(16, 49408, 64, torch.float32, embedding=0.1)
        exact = [x.detach().double() for x in (prompts, hidden, embedding)]
        exact = (exact[0].requires_grad_(), exact[1].requires_grad_(), exact[2])
        compare((prompts, hidden, embedding), dict(top_k=10), exact, 1e-5)

    def test_the_equation(self):
        prompts, hidden, embedding = problem(7, 97)
        losses = plpp_loss(
            prompts,
            hidden,
            embedding,
            top_k=5,
            temperature=0.2,
            inverse_weight=0.3,
            reduction="none",
        )
        terms = oracles.perplexity_terms(prompts, hidden, embedding, 5, 0.2, True)
        expected = terms[0] + 0.3 * terms[1]
        assert_close(losses, expected, 1e-11)
        for a, e in zip(
            gradients([losses], (prompts, hidden)),
            gradients([expected], (prompts, hidden)),
            strict=True,
        ):
            assert_close(a, e, 1e-10)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("top_k", [10, 70])
    def test_low_precision_is_computed_in_fp32(self, dtype, top_k):
        arguments = problem(16, 997, 32, dtype)
        exact = [x.detach().double() for x in arguments]
        exact = (exact[0].requires_grad_(), exact[1].requires_grad_(), exact[2])
        tolerance = max(1e-5, torch.finfo(dtype).eps)
        compare(arguments, dict(top_k=top_k), exact, 1e-5, tolerance)
        for term in plpp_terms(*arguments, top_k=top_k):
            assert term.dtype == torch.float32

    @pytest.mark.parametrize(
        ("prompts", "hidden", "embedding", "result"),
        [
            (torch.float32, torch.float16, torch.float16, torch.float32),
            (torch.float32, torch.bfloat16, torch.float32, torch.float32),
            (torch.float16, torch.float32, torch.bfloat16, torch.float32),
            (torch.float64, torch.float32, torch.float16, torch.float64),
            (torch.float32, torch.float32, torch.float64, torch.float64),
        ],
    )
    def test_mixed_dtypes(self, prompts, hidden, embedding, result):
        c, h, e = problem(9, 97, 16)
        c, h = (x.detach().to(t).requires_grad_() for x, t in ((c, prompts), (h, hidden)))
        e = e.to(embedding)
        loss = plpp_loss(c, h, e, top_k=7)
        assert loss.dtype == result
        loss.backward()
        assert (c.grad.dtype, h.grad.dtype) == (prompts, hidden)
        exact = [x.detach().double() for x in (c, h, e)]
        assert_close(loss.detach(), sum(reference.perplexity_terms(*exact, 7)).mean(), 1e-5)

    def test_reductions(self):
        arguments = problem()
        rows = plpp_loss(*arguments, reduction="none")
        terms = plpp_terms(*arguments)
        assert_close(rows, terms[0] + terms[1], 1e-12)
        assert_close(plpp_loss(*arguments, reduction="sum"), rows.sum(), 1e-12)
        assert_close(plpp_loss(*arguments, reduction="mean"), rows.mean(), 1e-12)
        assert_close(plpp_loss(*arguments), rows.mean(), 1e-12)
        assert_close(
            plpp_loss(*arguments, inverse_weight=torch.tensor(0.0), reduction="none"),
            terms[0],
            1e-12,
        )

    def test_tensor_temperature(self):
        arguments = problem()
        for a, e in zip(
            plpp_terms(*arguments, temperature=torch.tensor(0.25)),
            plpp_terms(*arguments, temperature=0.25),
            strict=True,
        ):
            assert_close(a, e, 1e-12)

    def test_given_norms(self):
        prompts, hidden, embedding = problem()
        norms = reference.inverse_norm(embedding)
        given_norms = plpp_terms(prompts, hidden, embedding, inverse_norms=norms)
        for a, e in zip(given_norms, plpp_terms(prompts, hidden, embedding), strict=True):
            assert_close(a, e, 1e-12)

    @pytest.mark.parametrize("top_k", [1, 8, 30])
    def test_vocabulary(self, top_k):
        arguments = problem(70, 80)
        vocabulary = normal(80, seed=4) > -0.3
        compare(arguments, dict(top_k=top_k, vocabulary=vocabulary))
        smaller = (*arguments[:2], arguments[2][vocabulary])
        for a, e in zip(
            plpp_terms(*arguments, top_k=top_k, vocabulary=vocabulary),
            plpp_terms(*smaller, top_k=top_k),
            strict=True,
        ):
            assert_close(a, e, 1e-12)

    def test_ties(self):
        prompts, hidden, embedding = problem(5, 40)
        embedding = embedding.repeat(3, 1)
        for top_k in (1, 2, 4, 100):
            compare((prompts, hidden, embedding), dict(top_k=top_k))
            terms = oracles.perplexity_terms(prompts, hidden, embedding, top_k, 1.0, True)
            for a, e in zip(
                plpp_terms(prompts, hidden, embedding, top_k=top_k), terms, strict=True
            ):
                assert_close(a, e, 1e-10)

    def test_zero_rows(self):
        prompts, hidden, embedding = problem(4, 30)
        embedding[[0, 5, 6]] = 0
        prompts = prompts.detach()
        prompts[2] = 0
        compare((prompts.requires_grad_(), hidden, embedding), dict(top_k=12))
        loss = plpp_loss(prompts, hidden, embedding, top_k=30)
        gradient = torch.autograd.grad(loss, prompts)[0]
        assert gradient.isfinite().all() and (gradient[2] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_large_logits(self, dtype):
        arguments = problem(6, 200, 16, dtype, hidden=100.0)
        loss = plpp_loss(*arguments, top_k=20)
        assert loss.isfinite()
        exact = [x.detach().double() for x in arguments]
        assert_close(loss.detach(), sum(reference.perplexity_terms(*exact, 20)).mean(), 1e-5)
        for gradient in gradients([loss], arguments[:2]):
            assert gradient.isfinite().all()

    def test_a_logit_offset_of_every_word_changes_nothing(self):
        prompts, hidden, embedding = (x.detach() for x in problem())
        embedding[:, 0] = 1.0
        moved = hidden.clone()
        moved[:, 0] += 50.0
        for a, e in zip(
            plpp_terms(prompts, moved, embedding),
            plpp_terms(prompts, hidden, embedding),
            strict=True,
        ):
            assert_close(a, e, 1e-11)

    def test_gradcheck(self):
        prompts, hidden, embedding = problem(2, 20, 4)
        for options in (
            dict(top_k=3),
            dict(top_k=20),
            dict(top_k=1, vocabulary=embedding[:, 0] > 0),
        ):
            assert torch.autograd.gradcheck(
                lambda c, h, o=options: plpp_terms(
                    c, h, embedding, temperature=0.5, detach_targets=False, **o
                ),
                (prompts, hidden),
            )

    def test_two_backwards_on_one_graph(self):
        prompts, hidden, embedding = problem()
        terms = plpp_terms(prompts, hidden, embedding)
        for seed in (20, 30):
            expected = reference.perplexity_terms(prompts, hidden, embedding)
            for a, e in zip(
                gradients(terms, (prompts, hidden), seed),
                gradients(expected, (prompts, hidden), seed),
                strict=True,
            ):
                assert_close(a, e, 1e-10)

    def test_gradient_of_one_input_alone(self):
        prompts, hidden, embedding = problem()
        both = gradients([plpp_loss(prompts, hidden, embedding)], (prompts, hidden))
        for position in (0, 1):
            inputs = [prompts.detach(), hidden.detach()]
            inputs[position].requires_grad_()
            alone = gradients([plpp_loss(*inputs, embedding)], [inputs[position]])
            assert_close(alone[0], both[position], 1e-12)
        with torch.no_grad():
            assert not plpp_loss(prompts, hidden, embedding).requires_grad

    def test_non_contiguous_inputs(self):
        prompts, hidden, embedding = problem()
        transposed = [x.detach().T.contiguous().T for x in (prompts, hidden, embedding)]
        assert not transposed[0].is_contiguous()
        assert_close(plpp_loss(*transposed), plpp_loss(prompts, hidden, embedding), 1e-12)

    def test_autocast_changes_nothing(self):
        arguments = problem(9, 97, 16, torch.float32)
        plain = plpp_loss(*arguments, top_k=70)
        with torch.autocast("cpu", torch.bfloat16):
            cast = plpp_loss(*arguments, top_k=70)
            cast_gradients = gradients([cast], arguments[:2])
        assert torch.equal(plain, cast)
        for a, e in zip(cast_gradients, gradients([plain], arguments[:2]), strict=True):
            assert torch.equal(a, e)

    def test_it_is_deterministic_and_writes_to_nothing(self):
        arguments = problem(70, 97, 16, torch.float32)
        copies = [x.detach().clone() for x in arguments]
        results = []
        for _ in range(2):
            loss = plpp_loss(*arguments)
            results.append((loss, *gradients([loss], arguments[:2])))
        for a, e in zip(*results, strict=True):
            assert torch.equal(a, e)
        for x, copy in zip(arguments, copies, strict=True):
            assert torch.equal(x, copy)

    def test_nothing_of_rows_times_words_is_kept(self):
        prompts, hidden, embedding = problem(200, 997, 8, torch.float32)
        kept = []

        def pack(tensor):
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            plpp_loss(prompts, hidden, embedding, top_k=10).backward()
        assert max(x.numel() for x in kept) < 200 * 997 / 10
        assert sum(x.numel() for x in kept) < 200 * 997 / 2


class TestWhatTheMethodPromises:
    def test_hard_labels_of_words_give_their_negative_log_likelihood(self):
        _, hidden, embedding = problem(4, 60)
        word_ids = torch.tensor([17, 3, 59, 3])
        perplexity, inverted = plpp_terms(
            embedding[word_ids], hidden, embedding, top_k=1, temperature=1e-4
        )
        expected = torch.nn.functional.cross_entropy(
            hidden @ embedding.T, word_ids, reduction="none"
        )
        assert_close(perplexity, expected, 1e-11)
        assert (inverted == 0).all()

    def test_one_label_is_the_limit_of_a_cold_softmax(self):
        arguments = problem()
        hard = plpp_terms(*arguments, top_k=1)[0]
        cold = plpp_terms(*arguments, top_k=5, temperature=1e-6)[0]
        assert_close(cold, hard, 1e-9)

    def test_a_row_does_not_depend_on_the_others(self):
        prompts, hidden, embedding = problem(70, 97)
        together = plpp_terms(prompts, hidden, embedding)
        for rows in (slice(0, 1), slice(60, 70), slice(None, None, 2)):
            alone = plpp_terms(prompts[rows], hidden[rows], embedding)
            for a, e in zip(alone, together, strict=True):
                assert_close(a, e[rows], 1e-12)

    def test_detached_targets_train_one_side_each(self):
        prompts, hidden, embedding = problem()
        perplexity, inverted = plpp_terms(prompts, hidden, embedding)
        inputs = (prompts, hidden)
        for_prompts, for_hidden = torch.autograd.grad(
            perplexity.sum(), inputs, retain_graph=True, materialize_grads=True
        )
        assert (for_prompts == 0).all() and (for_hidden != 0).any()
        for_prompts, for_hidden = torch.autograd.grad(
            inverted.sum(), inputs, materialize_grads=True
        )
        assert (for_prompts != 0).any() and (for_hidden == 0).all()

    def test_the_last_vector_gets_no_gradient_from_perplexity(self):
        prompts, start, embedding = problem()
        states = torch.cat([start[:1].detach(), prompts[:-1].cumsum(0)])
        perplexity, inverted = plpp_terms(prompts, states, embedding)
        (gradient,) = torch.autograd.grad(perplexity.sum(), prompts, retain_graph=True)
        assert (gradient[-1] == 0).all() and (gradient[:-1] != 0).any(1).all()
        (gradient,) = torch.autograd.grad(inverted.sum(), prompts)
        assert (gradient[-1] != 0).any()

    def test_uniform_prediction_has_the_vocabulary_as_perplexity(self):
        prompts, hidden, embedding = problem(4, 60)
        perplexity, inverted = plpp_terms(prompts, torch.zeros_like(hidden), embedding, top_k=3)
        assert_close(perplexity, torch.full((4,), math.log(60)), 1e-7)
        assert (inverted >= math.log(3) - 1e-9).all()

    @pytest.mark.parametrize("which", ["prompts", "hidden"])
    def test_nan_stays_in_its_row(self, which):
        prompts, hidden, embedding = (x.detach() for x in problem(70, 97))
        (prompts if which == "prompts" else hidden)[1, 2] = torch.nan
        prompts.requires_grad_()
        hidden.requires_grad_()
        losses = plpp_loss(prompts, hidden, embedding, reduction="none")
        assert losses.isnan().nonzero().tolist() == [[1]]
        for gradient in gradients([losses], (prompts, hidden)):
            assert set(gradient.isnan().any(1).nonzero()[:, 0].tolist()) <= {1}

    @given(
        seed=st.integers(0, 10**6),
        words=st.integers(1, 50),
        data=st.data(),
        temperature=st.floats(0.05, 5.0),
    )
    def test_properties(self, seed, words, data, temperature):
        top_k = data.draw(st.integers(1, words))
        prompts, hidden = normal(3, 5, seed=seed), normal(3, 5, seed=seed + 1)
        embedding = normal(words, 5, seed=seed + 2)
        options = dict(top_k=top_k, temperature=temperature)
        perplexity, inverted = plpp_terms(prompts, hidden, embedding, **options)
        assert (perplexity >= -1e-12).all() and (inverted >= -1e-12).all()
        longer = plpp_terms(prompts * 7.5, hidden, embedding, **options)
        torch.testing.assert_close(longer, (perplexity, inverted), rtol=1e-8, atol=1e-10)
        order = torch.randperm(words, generator=torch.Generator().manual_seed(seed))
        shuffled = plpp_terms(prompts, hidden, embedding[order], **options)
        torch.testing.assert_close(shuffled, (perplexity, inverted), rtol=1e-8, atol=1e-10)


class TestCompile:
    @pytest.mark.parametrize("rows", [7, 70])
    def test_fullgraph_parity(self, rows):
        prompts, hidden, embedding = problem(rows, 97, 8, torch.float32)
        vocabulary = embedding[:, 0] > -1

        def loss(prompts, hidden):
            return plpp_loss(prompts, hidden, embedding, vocabulary=vocabulary, reduction="none")

        eager = loss(prompts, hidden)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(prompts, hidden)
        assert_close(compiled, eager, 1e-6)
        inputs = (prompts, hidden)
        for a, e in zip(gradients([compiled], inputs), gradients([eager], inputs), strict=True):
            assert_close(a, e, 1e-5)

    def test_inductor(self):
        arguments = problem(7, 97, 8, torch.float32)
        eager = plpp_loss(*arguments)
        compiled = torch.compile(plpp_loss, fullgraph=True)(*arguments)
        assert_close(compiled, eager, 1e-6)
        inputs = arguments[:2]
        for a, e in zip(gradients([compiled], inputs), gradients([eager], inputs), strict=True):
            assert_close(a, e, 1e-5)

    def test_shapes_without_data(self):
        arguments = [x.detach().to("meta") for x in problem(70, 97)]
        vocabulary = torch.ones(97, dtype=torch.bool, device="meta")
        terms = plpp_terms(*arguments, vocabulary=vocabulary)
        assert [x.shape for x in terms] == [(70,), (70,)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nothing_waits_for_the_gpu(dtype):
    prompts, hidden, embedding = (x.detach().cuda() for x in problem(70, 997, 32, dtype))
    prompts, hidden = prompts.requires_grad_(), hidden.requires_grad_()
    vocabulary = embedding[:, 0] > -1
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = plpp_loss(prompts, hidden, embedding, vocabulary=vocabulary)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    exact = [x.detach().double() for x in (prompts, hidden, embedding)]
    expected = sum(reference.perplexity_terms(*exact, vocabulary=vocabulary)).mean()
    assert_close(loss, expected, 1e-4)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(prompts=[1.0]), TypeError, r"prompts: expected a floating tensor \[M, d\]"),
            (dict(prompts=torch.zeros(5)), ValueError, "prompts: "),
            (dict(prompts=torch.zeros(5, 6, dtype=torch.int32)), TypeError, "prompts: "),
            (dict(hidden=torch.zeros(4, 6)), ValueError, "hidden: expected M = 5"),
            (dict(hidden=torch.zeros(5, 7)), ValueError, "hidden: expected d = 6"),
            (dict(hidden=None), TypeError, "hidden: .*got NoneType"),
            (dict(embedding=torch.zeros(60, 5)), ValueError, "embedding: expected d = 6"),
            (dict(embedding=torch.zeros(0, 6)), ValueError, "embedding: expected at least one"),
            (
                dict(embedding=torch.zeros(60, 6, requires_grad=True)),
                ValueError,
                r"embedding: .*pass embedding.detach\(\)",
            ),
            (dict(embedding=torch.zeros(60, 6, device="meta")), ValueError, "embedding: .*device"),
            (
                dict(prompts=torch.zeros(0, 6), hidden=torch.zeros(0, 6)),
                ValueError,
                "prompts: expected at least one element",
            ),
            (dict(top_k=0), ValueError, "top_k: .*1 to 60"),
            (dict(top_k=61), ValueError, "top_k: .*1 to 60"),
            (dict(top_k=1.0), TypeError, "top_k: "),
            (dict(temperature=0.0), ValueError, "temperature: "),
            (dict(temperature=float("nan")), ValueError, "temperature: "),
            (dict(temperature="1"), TypeError, "temperature: "),
            (dict(temperature=torch.ones(2)), ValueError, "temperature: "),
            (
                dict(temperature=torch.tensor(1.0, requires_grad=True)),
                ValueError,
                r"temperature: .*temperature.detach\(\)",
            ),
            (dict(inverse_weight=-1.0), ValueError, "inverse_weight: "),
            (
                dict(inverse_weight=torch.tensor(1.0, requires_grad=True)),
                ValueError,
                "inverse_weight: ",
            ),
            (dict(detach_targets=None), TypeError, "detach_targets: "),
            (dict(vocabulary=torch.ones(60)), TypeError, r"vocabulary: .*torch.bool \[V\]"),
            (dict(vocabulary=torch.ones(59, dtype=torch.bool)), ValueError, "vocabulary: .*V = 60"),
            (
                dict(vocabulary=torch.arange(60) < 9),
                ValueError,
                r"top_k: .*1 to 9 \(the words that vocabulary counts\), got 10",
            ),
            (dict(inverse_norms=torch.ones(59)), ValueError, "inverse_norms: .*V = 60"),
            (dict(inverse_norms=torch.ones(60, 1)), ValueError, "inverse_norms: "),
            (dict(inverse_norms=torch.ones(60, requires_grad=True)), ValueError, "inverse_norms: "),
            (dict(reduction="batchmean"), ValueError, "reduction: .*none, mean, sum"),
        ],
    )
    def test_each_names_its_argument(self, change, error, message):
        prompts, hidden, embedding = problem()
        arguments = dict(prompts=prompts, hidden=hidden, embedding=embedding, top_k=10) | change
        with pytest.raises(error, match=f"^{message}"):
            plpp_loss(**arguments)

    def test_options_are_keyword_only(self):
        with pytest.raises(TypeError):
            plpp_loss(*problem(), 10)

    def test_a_gradient_of_the_gradient_is_refused_but_by_the_reference(self):
        prompts, hidden, embedding = problem()
        loss = plpp_loss(prompts, hidden, embedding)
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()
        with backends.reference_only():
            loss = plpp_loss(prompts, hidden, embedding)
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), hidden)
        assert second.isfinite().all() and (second != 0).any()

    def test_a_functional_gradient(self):
        prompts, hidden, embedding = (x.detach() for x in problem())
        gradient = torch.func.grad(lambda h: plpp_loss(prompts, h, embedding))(hidden)
        hidden.requires_grad_()
        (expected,) = torch.autograd.grad(plpp_loss(prompts, hidden, embedding), hidden)
        assert_close(gradient, expected, 1e-12)
