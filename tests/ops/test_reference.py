"""The references against their equations, and the properties that the equations have."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlfast.ops import reference

from . import oracles
from .support import assert_close, gradients, normal


class TestTopK:
    @pytest.mark.parametrize("columns", [1, 2, 36, 997])
    def test_ties_go_to_the_smaller_index(self, columns):
        scores = (normal(7, columns, scale=2.0)).round()
        for top_k in sorted({1, min(2, columns), (columns + 1) // 2, columns}):
            words = reference.smallest_index_topk(scores, top_k)
            assert words.tolist() == [oracles.ranked(row)[:top_k] for row in scores]

    def test_all_equal(self):
        words = reference.smallest_index_topk(torch.zeros(3, 12), 4)
        assert words.tolist() == [[0, 1, 2, 3]] * 3

    def test_infinite_scores_tie_too(self):
        scores = torch.full((1, 6), -torch.inf)
        scores[0, 4] = 1.0
        assert reference.smallest_index_topk(scores, 3).tolist() == [[4, 0, 1]]

    def test_a_vocabulary(self):
        scores = normal(3, 49408, dtype=torch.float16).float()
        assert len(scores[0].unique()) < 49408 / 2
        words = reference.smallest_index_topk(scores, 100)
        assert words.tolist() == [oracles.ranked(row)[:100] for row in scores]

    def test_nan_stays_in_its_row_and_in_range(self):
        scores = normal(3, 20)
        scores[1] = torch.nan
        words = reference.smallest_index_topk(scores, 5)
        assert words.min() >= 0 and words.max() < 20
        assert words[0].tolist() == oracles.ranked(scores[0])[:5]
        assert words[2].tolist() == oracles.ranked(scores[2])[:5]


class TestSymmetricKL:
    @pytest.mark.parametrize("shape", [(1, 1), (1, 3), (7, 3), (16, 37), (3, 1000)])
    def test_the_equation(self, shape):
        student, teacher = normal(*shape, seed=1).requires_grad_(), normal(*shape, seed=2)
        student_scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
        actual = reference.symmetric_kl(student, teacher, student_scale, 5.0, 2.0, 0.3, 0.9)
        expected = oracles.symmetric_kl(student * student_scale / 2, teacher * 5 / 2, 0.3, 0.9)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
        inputs = (student, student_scale)
        pairs = zip(gradients([actual], inputs), gradients([expected], inputs), strict=True)
        for a, e in pairs:
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_low_precision_is_computed_in_fp32(self, dtype):
        student = normal(16, 100, seed=1, scale=0.2, dtype=dtype).requires_grad_()
        teacher = normal(16, 100, seed=2, scale=0.2, dtype=dtype)
        actual = reference.symmetric_kl(student, teacher, 100.0, 100.0)
        assert actual.dtype == torch.float32
        exact = student.detach().double().requires_grad_()
        expected = oracles.symmetric_kl(exact * 100, teacher.double() * 100, 0.5, 0.5)
        assert_close(actual, expected, 1e-5)
        (gradient,) = gradients([actual], student)
        assert gradient.dtype == dtype
        (of_exact,) = gradients([expected.float()], exact)
        assert_close(gradient, of_exact, max(1e-5, torch.finfo(dtype).eps))

    def test_index_takes_columns_of_the_teacher(self):
        student, teacher = normal(4, 5), normal(4, 30, seed=1)
        index = torch.tensor([7, 29, 0, 7, 3])
        torch.testing.assert_close(
            reference.symmetric_kl(student, teacher, index=index),
            reference.symmetric_kl(student, teacher[:, index]),
        )

    @pytest.mark.parametrize("distance", [1e-2, 1e-5, 1e-8])
    def test_nothing_cancels_when_both_agree(self, distance):
        teacher = normal(1, 50, scale=3.0)
        student = teacher + normal(1, 50, seed=1, scale=distance)
        rows = student[0].tolist(), teacher[0].tolist()
        forward = reference.symmetric_kl(student, teacher, 1.0, 1.0, 1.0, 1.0, 0.0)
        reverse = reference.symmetric_kl(student, teacher, 1.0, 1.0, 1.0, 0.0, 1.0)
        assert float(forward) == pytest.approx(oracles.exact_kl(rows[1], rows[0]), rel=1e-7)
        assert float(reverse) == pytest.approx(oracles.exact_kl(rows[0], rows[1]), rel=1e-7)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("gap", [15.0, 25.0, 90.0, 200.0, 10_000.0])
    def test_wide_gaps(self, gap, dtype):
        student = torch.tensor([[gap, 0.0, 1.0, -gap / 2]], dtype=dtype).requires_grad_()
        teacher = torch.tensor([[0.5, gap, -gap, 2.0]], dtype=dtype)
        rows = student[0].tolist(), teacher[0].tolist()
        loss = reference.symmetric_kl(student, teacher, 1.0, 1.0, 1.0, 1.0, 1.0)
        exact = oracles.exact_kl(rows[0], rows[1]) + oracles.exact_kl(rows[1], rows[0])
        assert float(loss.detach()) == pytest.approx(exact, rel=1e-6)
        p_s, p_t = student.detach().double().softmax(1), teacher.double().softmax(1)
        d = student.detach().double() - teacher.double()
        expected = p_s - p_t + p_s * (d - (p_s * d).sum())
        (gradient,) = torch.autograd.grad(loss, student)
        assert_close(gradient, expected, 1e-6)

    def test_a_common_offset_changes_nothing(self):
        student, teacher = normal(4, 9), normal(4, 9, seed=1)
        torch.testing.assert_close(
            reference.symmetric_kl(student + 50, teacher - 50),
            reference.symmetric_kl(student, teacher),
        )

    def test_gradcheck(self):
        student = normal(3, 6).requires_grad_()
        scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        teacher = normal(3, 6, seed=1)
        assert torch.autograd.gradcheck(
            lambda s, a: reference.symmetric_kl(s, teacher, a, 2.0, 1.5, 0.4, 0.7), (student, scale)
        )

    def test_nan_stays_in_its_row(self):
        student = normal(3, 6)
        student[1, 2] = torch.nan
        student.requires_grad_()
        loss = reference.symmetric_kl(student, normal(3, 6, seed=1))
        assert loss.isnan().tolist() == [False, True, False]
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert gradient.isnan().any(1).tolist() == [False, True, False]

    @given(
        seed=st.integers(0, 10**6),
        rows=st.integers(1, 5),
        columns=st.integers(1, 40),
        size=st.floats(1e-3, 100),
    )
    def test_properties(self, seed, rows, columns, size):
        a = normal(rows, columns, seed=seed, scale=size)
        b = normal(rows, columns, seed=seed + 1, scale=size)
        one_way = reference.symmetric_kl(a, b)
        assert (one_way >= 0).all()
        torch.testing.assert_close(one_way, reference.symmetric_kl(b, a))
        assert (reference.symmetric_kl(a, a) == 0).all()
        torch.testing.assert_close(
            one_way, reference.symmetric_kl(a + 3.0, b - 5.0), rtol=1e-9, atol=1e-12
        )
        torch.testing.assert_close(one_way, reference.symmetric_kl(a / 4, b / 2, 4.0, 2.0))


class TestPerplexityTerms:
    @pytest.mark.parametrize("detach_targets", [True, False])
    @pytest.mark.parametrize(
        ("rows", "words", "top_k", "temperature"),
        [
            (1, 5, 1, 1.0),
            (1, 997, 10, 1.0),
            (7, 997, 64, 0.1),
            (16, 997, 100, 0.01),
            (3, 50, 50, 2.0),
            (65, 211, 3, 0.5),
        ],
    )
    def test_the_equation(self, rows, words, top_k, temperature, detach_targets):
        prompts = normal(rows, 8, seed=1).requires_grad_()
        hidden = normal(rows, 8, seed=2).requires_grad_()
        embedding = normal(words, 8, seed=3)
        arguments = (prompts, hidden, embedding, top_k, temperature, detach_targets)
        actual = reference.perplexity_terms(*arguments)
        expected = oracles.perplexity_terms(*arguments)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)
        inputs = (prompts, hidden)
        for a, e in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)

    def test_clip_vocabulary(self):
        prompts = normal(2, 32, seed=1).requires_grad_()
        hidden = normal(2, 32, seed=2).requires_grad_()
        embedding = normal(49408, 32, seed=3)
        arguments = (prompts, hidden, embedding, 10, 0.1, True)
        actual = reference.perplexity_terms(*arguments)
        expected = oracles.perplexity_terms(*arguments)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)
        inputs = (prompts, hidden)
        for a, e in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)

    def test_ties_in_the_labels(self):
        embedding = normal(40, 6, seed=1).repeat(3, 1)
        prompts, hidden = normal(5, 6, seed=2), normal(5, 6, seed=3)
        for top_k in (1, 2, 4, 100):
            arguments = (prompts, hidden, embedding, top_k, 0.3, True)
            for a, e in zip(
                reference.perplexity_terms(*arguments),
                oracles.perplexity_terms(*arguments),
                strict=True,
            ):
                torch.testing.assert_close(a, e)

    def test_a_zero_embedding_has_cosine_zero(self):
        embedding = normal(30, 6, seed=1)
        embedding[[0, 7, 8]] = 0
        arguments = (normal(5, 6, seed=2), normal(5, 6, seed=3), embedding, 30, 0.3, True)
        for a, e in zip(
            reference.perplexity_terms(*arguments),
            oracles.perplexity_terms(*arguments),
            strict=True,
        ):
            torch.testing.assert_close(a, e)

    def test_a_zero_prompt_is_labelled_evenly_and_gets_no_gradient(self):
        prompts = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
        hidden, embedding = normal(2, 6), normal(30, 6, seed=1)
        perplexity, inverted = reference.perplexity_terms(prompts, hidden, embedding, 4)
        log_p = (hidden @ embedding.T).log_softmax(1)
        torch.testing.assert_close(perplexity.detach(), -log_p[:, :4].mean(1))
        torch.testing.assert_close(inverted.detach(), torch.full((2,), 4.0).double().log())
        (gradient,) = torch.autograd.grad(inverted.sum(), prompts)
        assert (gradient == 0).all()

    @pytest.mark.parametrize("detach_targets", [True, False])
    def test_vocabulary_is_the_same_as_a_smaller_embedding(self, detach_targets):
        vocabulary = normal(60, seed=4) > 0.2
        counted = vocabulary.nonzero()[:, 0].tolist()
        prompts = normal(5, 6, seed=2).requires_grad_()
        hidden = normal(5, 6, seed=3).requires_grad_()
        embedding = normal(60, 6, seed=1)
        for top_k in (1, 7, len(counted)):
            arguments = (prompts, hidden, embedding, top_k, 0.3, detach_targets)
            actual = reference.perplexity_terms(*arguments, vocabulary)
            expected = oracles.perplexity_terms(*arguments, counted)
            inputs = (prompts, hidden)
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e)
            for a, e in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
                torch.testing.assert_close(a, e)

    @pytest.mark.parametrize("detach_targets", [True, False])
    def test_more_labels_than_counted_words(self, detach_targets):
        vocabulary = torch.zeros(30, dtype=torch.bool)
        vocabulary[[3, 11, 12]] = True
        prompts = normal(5, 6, seed=2).requires_grad_()
        hidden = normal(5, 6, seed=3).requires_grad_()
        embedding = normal(30, 6, seed=1)
        results = []
        for top_k in (3, 9):
            terms = reference.perplexity_terms(
                prompts, hidden, embedding, top_k, 0.3, detach_targets, vocabulary
            )
            results.append((*terms, *gradients(terms, (prompts, hidden))))
        for a, e in zip(*results, strict=True):
            assert a.isfinite().all()
            torch.testing.assert_close(a, e)

    def test_given_norms_are_used(self):
        arguments = (normal(5, 6, seed=2), normal(5, 6, seed=3), normal(30, 6, seed=1), 4, 0.3)
        plain = reference.perplexity_terms(*arguments)
        given_norms = reference.perplexity_terms(
            *arguments, inverse_norms=reference.inverse_norm(arguments[2])
        )
        for a, e in zip(given_norms, plain, strict=True):
            torch.testing.assert_close(a, e)

    def test_gradcheck(self):
        prompts = normal(2, 4, seed=2).requires_grad_()
        hidden = normal(2, 4, seed=3).requires_grad_()
        embedding = normal(20, 4, seed=1)
        assert torch.autograd.gradcheck(
            lambda c, h: reference.perplexity_terms(c, h, embedding, 3, 0.5, False),
            (prompts, hidden),
        )


class TestGatedMixture:
    @pytest.mark.parametrize(
        ("batch", "classes", "heads", "top_k", "temperature"),
        [
            (1, 1, 1, 1, 1.0),
            (7, 3, 12, 1, 1.0),
            (16, 3, 12, 2, 4.0),
            (5, 1000, 12, 3, 0.5),
            (65, 10, 36, 36, 1.0),
        ],
    )
    def test_the_equation(self, batch, classes, heads, top_k, temperature):
        images = torch.nn.functional.normalize(normal(batch, 8, seed=1), dim=-1)
        texts = torch.nn.functional.normalize(normal(heads, classes, 8, seed=2), dim=-1)
        gate = normal(8, heads, seed=3).requires_grad_()
        student = normal(batch, classes, seed=4, scale=5.0).requires_grad_()
        labels = torch.arange(batch) * 7 % classes
        arguments = (images, gate, texts, student, labels, 20.0, temperature, top_k)
        actual = reference.gated_mixture(*arguments)
        expected = oracles.gated_mixture(*arguments)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
        inputs = (gate, student)
        for a, e in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)

    def test_gradcheck(self):
        images, texts = normal(3, 4, seed=1), normal(5, 6, 4, seed=2)
        labels = torch.tensor([0, 5, 2])
        assert torch.autograd.gradcheck(
            lambda gate, student: reference.gated_mixture(
                images, gate, texts, student, labels, 2.0, 1.5, 3
            ),
            (normal(4, 5, seed=3).requires_grad_(), normal(3, 6, seed=4).requires_grad_()),
        )
