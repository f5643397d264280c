"""plpp_loss and plpp_terms: values, gradients, memory, errors, and what the method promises."""

import math
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlfast._extension import extension
from vlfast.ops import backends, plpp_loss, plpp_terms, reference
from vlfast.ops import perplexity as op

from . import oracles
from .support import assert_as_precise, assert_close, gradients, normal

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# The kernel serves fp32 and plain PyTorch fp64, so that most tests are of both.
TOLERANCE = {F64: 1e-9, F32: 1e-5}
both = pytest.mark.parametrize("dtype", [F64, F32], ids=str)
needs_kernel = pytest.mark.skipif(extension() is None, reason="vlfast._C is not built here")


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


def terms_and_gradients(prompts, hidden, embedding, **options):
    prompts, hidden = (x.detach().requires_grad_() for x in (prompts, hidden))
    terms = plpp_terms(prompts, hidden, embedding, **options)
    return [*(x.detach() for x in terms), *gradients(terms, (prompts, hidden))]


def in_doubles(arguments):
    return [x.detach().double() for x in arguments]


def assert_as_precise_as_pytorch(arguments, **options):
    ours = terms_and_gradients(*arguments, **options)
    with backends.reference_only():
        theirs = terms_and_gradients(*arguments, **options)
        truth = terms_and_gradients(*in_doubles(arguments), **options)
    assert_as_precise(ours, theirs, truth, smallest=1e-3)


class TestAccuracy:
    @pytest.mark.parametrize("detach_targets", [True, False])
    @pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
    @pytest.mark.parametrize(
        ("rows", "words", "width", "top_k"),
        [
            (1, 1, 1, 1),
            (1, 63, 6, 1),
            (7, 63, 12, 63),
            (7, 997, 64, 64),
            (8, 191, 17, 13),
            (9, 193, 500, 2),
            (16, 997, 512, 10),
            (65, 997, 64, 10),
            (65, 997, 500, 100),
            (130, 2500, 30, 20),
            (3, 997, 513, 600),
            (2, 40, 1300, 40),
        ],
    )
    def test_same_dtypes(self, rows, words, width, top_k, dtype, detach_targets):
        arguments = problem(rows, words, width, dtype, hidden=width**-0.5)
        assert_as_precise_as_pytorch(
            arguments, top_k=top_k, temperature=0.1, detach_targets=detach_targets
        )

    @pytest.mark.parametrize("embedding", [F32, BF16, F16], ids=str)
    @pytest.mark.parametrize("rows", [4, 16])
    def test_clip_vocabulary(self, rows, embedding):
        prompts, hidden, table = problem(rows, 49408, 512, F32, hidden=0.2, embedding=0.1)
        assert_as_precise_as_pytorch(
            (prompts, hidden, table.to(embedding)), top_k=64, temperature=0.05
        )

    def test_every_top_k(self):
        arguments = problem(3, 97, 12, F32)
        for top_k in range(1, 98):
            assert_as_precise_as_pytorch(arguments, top_k=top_k)

    def test_one_dimension(self):
        """Where every cosine is 1 or -1, K is all words: rounding may not choose."""
        arguments = problem(5, 63, 1, F32)
        assert_as_precise_as_pytorch(arguments, top_k=63)

    @pytest.mark.parametrize("size", [1e-6, 1.0, 100.0])
    def test_sizes_of_the_logits(self, size):
        arguments = problem(6, 997, 64, F32, hidden=size / 8)
        assert_as_precise_as_pytorch(arguments, top_k=20, temperature=0.05)

    def test_lengths_of_the_prompts(self):
        prompts, hidden, embedding = problem(6, 97, 12, F32)
        lengths = torch.tensor([1e-9, 1e-3, 1.0, 30.0, 1e4, 1e15])[:, None]
        assert_as_precise_as_pytorch((prompts.detach() * lengths, hidden, embedding), top_k=7)
        ours = terms_and_gradients(prompts.detach() * 1e25, hidden, embedding)
        for a, e in zip(ours[:2], terms_and_gradients(prompts, hidden, embedding), strict=False):
            assert_close(a, e, 1e-6)

    def test_a_rising_maximum(self):
        """The largest logit comes last, so that every block of words rescales those before."""
        prompts, hidden, embedding = problem(20, 2000, 8, F32)
        embedding[:, 0] = torch.linspace(-1, 60, 2000)
        hidden = hidden.detach()
        hidden[:, 0] = torch.linspace(0.5, 1.5, 20)
        assert_as_precise_as_pytorch((prompts, hidden, embedding), top_k=10)

    @needs_kernel
    def test_the_kernel_serves(self, monkeypatch):
        monkeypatch.setattr(op, "perplexity_in_pytorch", None)
        for dtype in (F32, BF16, F16):
            arguments = problem(5, 600, dtype=dtype)
            for top_k in (1, op.KERNEL_TOP_K):
                plpp_loss(*arguments, top_k=top_k).backward()
        with pytest.raises(TypeError):
            plpp_loss(*problem(dtype=F64))
        with pytest.raises(TypeError):
            plpp_loss(*problem(words=600, dtype=F32), top_k=op.KERNEL_TOP_K + 1)

    @pytest.mark.parametrize("detach_targets", [True, False])
    def test_every_element_is_written(self, detach_targets, poisoned_memory):
        for dtype in (F32, F64, BF16, F16):
            for top_k in (3, 600):
                arguments = problem(21, 700, 7, dtype)
                options = dict(top_k=top_k, detach_targets=detach_targets)
                for result in terms_and_gradients(*arguments, **options):
                    assert result.isfinite().all()

    @pytest.mark.parametrize("rows", [3, 16, 300])
    def test_the_number_of_threads_changes_no_bit(self, rows):
        arguments = problem(rows, 5003, 24, F32)
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                results.append(terms_and_gradients(*arguments, top_k=30, detach_targets=False))
        finally:
            torch.set_num_threads(before)
        for others in results[1:]:
            assert all(map(torch.equal, results[0], others))


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

    @both
    def test_the_equation(self, dtype):
        prompts, hidden, embedding = problem(7, 97, dtype=dtype)
        losses = plpp_loss(
            prompts,
            hidden,
            embedding,
            top_k=5,
            temperature=0.2,
            inverse_weight=0.3,
            reduction="none",
        )
        exact = [x.requires_grad_() for x in in_doubles((prompts, hidden))]
        terms = oracles.perplexity_terms(*exact, embedding.double(), 5, 0.2, True)
        expected = terms[0] + 0.3 * terms[1]
        assert_close(losses, expected, TOLERANCE[dtype])
        for a, e in zip(
            gradients([losses], (prompts, hidden)), gradients([expected], exact), strict=True
        ):
            assert_close(a, e, TOLERANCE[dtype])

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

    @both
    def test_reductions(self, dtype):
        arguments = problem(dtype=dtype)
        tolerance = 1e-12 if dtype == F64 else 1e-6
        rows = plpp_loss(*arguments, reduction="none")
        terms = plpp_terms(*arguments)
        assert_close(rows, terms[0] + terms[1], tolerance)
        assert_close(plpp_loss(*arguments, reduction="sum"), rows.sum(), tolerance)
        assert_close(plpp_loss(*arguments, reduction="mean"), rows.mean(), tolerance)
        assert_close(plpp_loss(*arguments), rows.mean(), tolerance)
        assert_close(
            plpp_loss(*arguments, inverse_weight=torch.tensor(0.0), reduction="none"),
            terms[0],
            tolerance,
        )

    @both
    def test_tensor_temperature(self, dtype):
        arguments = problem(dtype=dtype)
        for a, e in zip(
            plpp_terms(*arguments, temperature=torch.tensor(0.25)),
            plpp_terms(*arguments, temperature=0.25),
            strict=True,
        ):
            assert_close(a, e, 1e-12)

    @both
    @pytest.mark.parametrize("norms_dtype", [F64, F32], ids=str)
    def test_given_norms(self, dtype, norms_dtype):
        prompts, hidden, embedding = problem(dtype=dtype)
        norms = reference.inverse_norm(embedding).to(norms_dtype)
        given_norms = terms_and_gradients(prompts, hidden, embedding, inverse_norms=norms)
        tolerance = 1e-12 if dtype == norms_dtype == F64 else 1e-6
        for a, e in zip(given_norms, terms_and_gradients(prompts, hidden, embedding), strict=True):
            assert a.dtype == dtype
            assert_close(a, e, tolerance)

    @both
    @pytest.mark.parametrize("top_k", [1, 8, 30, 70])
    def test_vocabulary(self, top_k, dtype):
        arguments = problem(70, 600, dtype=dtype)
        vocabulary = normal(600, seed=4) > -0.3
        vocabulary[200:400] = False
        assert_as_precise_as_pytorch(arguments, top_k=top_k, vocabulary=vocabulary)
        smaller = (*arguments[:2], arguments[2][vocabulary])
        for a, e in zip(
            terms_and_gradients(*arguments, top_k=top_k, vocabulary=vocabulary),
            terms_and_gradients(*smaller, top_k=top_k),
            strict=True,
        ):
            assert_close(a, e, TOLERANCE[dtype])

    @pytest.mark.parametrize("detach_targets", [True, False])
    @both
    def test_fewer_words_count_than_top_k(self, dtype, detach_targets):
        """Which only the raw op is asked for where counting them stalls nothing."""
        prompts, hidden, embedding = problem(5, 40, dtype=dtype)
        vocabulary = torch.arange(40) % 7 == 3
        tail = (None, None, 0.5)
        fewer = torch.ops.vlfast.perplexity(
            prompts, hidden, embedding, vocabulary, *tail, 20, detach_targets, True, True
        )
        all_of_them = torch.ops.vlfast.perplexity(
            prompts, hidden, embedding[vocabulary], None, *tail, 6, detach_targets, True, True
        )
        for a, e in zip(fewer, all_of_them, strict=True):
            assert a.shape == e.shape
            if e.numel():
                assert_close(a, e, TOLERANCE[dtype])

    @both
    def test_ties(self, dtype):
        prompts, hidden, embedding = problem(5, 40, dtype=dtype)
        embedding = embedding.repeat(3, 1)
        for top_k in (1, 2, 4, 100):
            assert_as_precise_as_pytorch((prompts, hidden, embedding), top_k=top_k)
            exact = in_doubles((prompts, hidden, embedding))
            terms = oracles.perplexity_terms(*exact, top_k, 1.0, True)
            for a, e in zip(
                plpp_terms(prompts, hidden, embedding, top_k=top_k), terms, strict=True
            ):
                assert_close(a, e, TOLERANCE[dtype])

    @both
    def test_of_equal_cosines_the_first_words_are_chosen(self, dtype):
        """Their logits differ, so that the choice shows: by the length of the embeddings."""
        embedding = torch.zeros(700, 4, dtype=dtype)
        embedding[:, 0] = 2.0 ** (torch.arange(700) % 5)
        embedding[100, 0] = -1.0
        prompts = torch.tensor([[3.0, 0.0, 0.0, 0.0]], dtype=dtype)
        hidden = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=dtype)
        for top_k in (1, 3, 4, 64, 150):
            perplexity = plpp_terms(prompts, hidden, embedding, top_k=top_k)[0]
            logits = embedding @ hidden[0]
            words = [w for w in range(700) if w != 100][:top_k]
            assert_close(perplexity[0], logits.logsumexp(0) - logits[words].mean(), 1e-5)

    @both
    @pytest.mark.parametrize("detach_targets", [True, False])
    def test_zero_rows(self, dtype, detach_targets):
        prompts, hidden, embedding = problem(4, 30, dtype=dtype)
        embedding[[0, 5, 6]] = 0
        prompts = prompts.detach()
        prompts[2] = 0
        options = dict(detach_targets=detach_targets)
        assert_as_precise_as_pytorch((prompts, hidden, embedding), top_k=12, **options)
        assert_as_precise_as_pytorch(
            (prompts, torch.zeros_like(hidden), embedding), top_k=12, **options
        )
        prompts.requires_grad_()
        loss = plpp_loss(prompts, hidden, embedding, top_k=30, **options)
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

    @both
    def test_a_logit_offset_of_every_word_changes_nothing(self, dtype):
        prompts, hidden, embedding = (x.detach() for x in problem(dtype=dtype))
        embedding[:, 0] = 1.0
        moved = hidden.clone()
        moved[:, 0] += 50.0
        for a, e in zip(
            plpp_terms(prompts, moved, embedding),
            plpp_terms(prompts, hidden, embedding),
            strict=True,
        ):
            assert_close(a, e, TOLERANCE[dtype])

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

    @both
    @pytest.mark.parametrize("detach_targets", [True, False])
    def test_two_backwards_on_one_graph(self, dtype, detach_targets):
        prompts, hidden, embedding = problem(dtype=dtype)
        options = dict(detach_targets=detach_targets)
        terms = plpp_terms(prompts, hidden, embedding, **options)
        for seed in (20, 30):
            expected = reference.perplexity_terms(prompts, hidden, embedding, **options)
            for a, e in zip(
                gradients(terms, (prompts, hidden), seed),
                gradients(expected, (prompts, hidden), seed),
                strict=True,
            ):
                assert_close(a, e, TOLERANCE[dtype])

    @both
    @pytest.mark.parametrize("detach_targets", [True, False])
    def test_gradient_of_one_input_alone(self, dtype, detach_targets):
        prompts, hidden, embedding = problem(dtype=dtype)
        options = dict(detach_targets=detach_targets)
        loss = plpp_loss(prompts, hidden, embedding, **options)
        expected = gradients([loss], (prompts, hidden))
        for position in (0, 1):
            inputs = [prompts.detach(), hidden.detach()]
            inputs[position].requires_grad_()
            alone = gradients([plpp_loss(*inputs, embedding, **options)], [inputs[position]])
            assert torch.equal(alone[0], expected[position])
        with torch.no_grad():
            unwanted = plpp_loss(prompts, hidden, embedding, **options)
        assert not unwanted.requires_grad and torch.equal(unwanted, loss)

    @both
    def test_non_contiguous_inputs(self, dtype):
        arguments = problem(dtype=dtype)
        transposed = [x.detach().T.contiguous().T for x in arguments]
        assert not transposed[0].is_contiguous()
        vocabulary = torch.arange(120) % 3 > 0
        norms = reference.inverse_norm(arguments[2])
        strided = dict(
            vocabulary=vocabulary[::2], inverse_norms=torch.stack([norms, norms], 1)[:, 0]
        )
        plain = dict(vocabulary=vocabulary[::2].clone(), inverse_norms=norms)
        for a, e in zip(
            terms_and_gradients(*transposed, **strided),
            terms_and_gradients(*arguments, **plain),
            strict=True,
        ):
            assert_close(a, e, 1e-12 if dtype == F64 else 1e-6)

    @pytest.mark.parametrize("top_k", [70, 600])
    def test_autocast_changes_nothing(self, top_k):
        arguments = problem(9, 700, 16, torch.float32)
        plain = plpp_loss(*arguments, top_k=top_k)
        with torch.autocast("cpu", torch.bfloat16):
            cast = plpp_loss(*arguments, top_k=top_k)
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

    @needs_kernel
    def test_no_scores_of_rows_times_words_are_held(self):
        """512 rows of 200,000 would be 410 MB. In a process of its own, for a peak of its own."""
        script = """
            import resource, torch
            from vlfast.ops import plpp_loss
            def loss_of(rows, words):
                prompts = torch.randn(rows, 4).requires_grad_()
                loss = plpp_loss(prompts, torch.ones(rows, 4), torch.randn(words, 4), top_k=5)
                loss.backward()
                return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            before = loss_of(2, 200)
            print(loss_of(512, 200000) - before)
        """
        script = textwrap.dedent(script)
        run = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        rise = int(run.stdout) * 1024
        assert 0 <= rise < 60e6


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

    @both
    def test_a_row_does_not_depend_on_the_others(self, dtype):
        prompts, hidden, embedding = problem(70, 997, dtype=dtype)
        together = plpp_terms(prompts, hidden, embedding)
        for rows in (slice(0, 1), slice(60, 70), slice(None, None, 2)):
            alone = plpp_terms(prompts[rows], hidden[rows], embedding)
            for a, e in zip(alone, together, strict=True):
                assert_close(a, e[rows], 1e-12 if dtype == F64 else 1e-6)

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

    @pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("which", ["prompts", "hidden"])
    def test_a_bad_value_stays_in_its_row(self, which, value, dtype):
        prompts, hidden, embedding = (x.detach() for x in problem(70, 97, dtype=dtype))
        good = terms_and_gradients(prompts, hidden, embedding)
        (prompts if which == "prompts" else hidden)[1, 2] = value
        bad = terms_and_gradients(prompts, hidden, embedding)
        others = torch.arange(70) != 1
        for before, after in zip(good, bad, strict=True):
            assert torch.equal(before[others], after[others])
        assert (bad[0] + bad[1])[1].isnan()
        if dtype != F64:
            assert all(after[1].isnan().all() for after in bad)

    @both
    @pytest.mark.parametrize("top_k", [3, 70])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("where", ["embedding", "inverse_norms"])
    def test_bad_values_of_a_word_reach_all_rows(self, where, value, top_k, dtype):
        prompts, hidden, embedding = problem(20, 97, 8, dtype)
        norms = reference.inverse_norm(embedding)
        if where == "embedding":
            embedding[11, 3] = value
        else:
            norms[11] = value
        options = dict(top_k=top_k, inverse_norms=norms)
        for terms in (plpp_terms, reference.perplexity_terms):
            assert all(x.isnan().all() for x in terms(prompts, hidden, embedding, **options))
            counted = torch.arange(97) != 11
            results = terms(prompts, hidden, embedding, vocabulary=counted, **options)
            assert all(x.isfinite().all() for x in results)

    def test_bad_words_end_nothing(self):
        prompts, hidden, embedding = problem(20, 500, dtype=F32)
        for value in (float("nan"), float("inf"), -float("inf"), 1e38):
            embedding[77] = value
            for result in terms_and_gradients(prompts, hidden, embedding, top_k=20):
                assert not result.isfinite().all()

    @given(
        seed=st.integers(0, 10**6),
        words=st.integers(1, 50),
        data=st.data(),
        temperature=st.floats(0.05, 5.0),
        dtype=st.sampled_from([F64, F32]),
    )
    def test_properties(self, seed, words, data, temperature, dtype):
        top_k = data.draw(st.integers(1, words))
        prompts, hidden = (normal(3, 5, seed=seed + i, dtype=dtype) for i in range(2))
        embedding = normal(words, 5, seed=seed + 2, dtype=dtype)
        options = dict(top_k=top_k, temperature=temperature)
        tolerance = dict(rtol=1e-8, atol=1e-10) if dtype == F64 else dict(rtol=1e-4, atol=1e-5)
        perplexity, inverted = plpp_terms(prompts, hidden, embedding, **options)
        assert min(perplexity.min(), inverted.min()) >= (-1e-12 if dtype == F64 else -1e-5)
        longer = plpp_terms(prompts * 7.5, hidden, embedding, **options)
        torch.testing.assert_close(longer, (perplexity, inverted), **tolerance)
        order = torch.randperm(words, generator=torch.Generator().manual_seed(seed))
        shuffled = plpp_terms(prompts, hidden, embedding[order], **options)
        torch.testing.assert_close(shuffled, (perplexity, inverted), **tolerance)


class TestInPyTorch:
    @pytest.mark.parametrize(
        "dtypes", [(F32, F32, F32), (F32, F16, F16), (F64, F32, BF16)], ids=str
    )
    @pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, False)], ids=str)
    @pytest.mark.parametrize("detach_targets", [True, False])
    def test_opcheck(self, detach_targets, wanted, dtypes):
        arguments = [x.detach().to(dtype) for x, dtype in zip(problem(4, 30), dtypes, strict=True)]
        none = [x[:0] for x in arguments[:2]]
        vocabulary = torch.arange(30) > 3
        norms = reference.inverse_norm(arguments[2].float())
        tail = (0.5, 7, detach_targets, *wanted)
        for inputs in (
            (*arguments, None, None, None),
            (*arguments, vocabulary, norms, torch.tensor(2.0)),
            (arguments[0], arguments[1].T.contiguous().T, arguments[2], None, None, None),
            (*none, arguments[2], None, norms, None),
        ):
            torch.library.opcheck(torch.ops.vlfast.perplexity, (*inputs, *tail))

    def test_empty_batches_only_in_the_raw_op(self):
        none, embedding = torch.empty(0, 6), torch.ones(9, 6)
        raw = torch.ops.vlfast.perplexity(
            none, none, embedding, None, None, None, 1.0, 3, False, True, True
        )
        assert [list(x.shape) for x in raw] == [[0], [0], [0, 6], [0, 6], [0, 6], [0, 6]]

    @pytest.mark.parametrize("top_k", [10, 600])
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile(self, dynamic, top_k):
        torch.compiler.reset()
        embedding = problem(1, 700, 8, F32)[2]

        def loss(prompts, hidden):
            return plpp_loss(
                prompts.sin(),
                hidden.sin(),
                embedding,
                top_k=top_k,
                detach_targets=False,
                reduction="none",
            )

        compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic or None)
        for rows in (4, 6):
            results = []
            for function in (loss, compiled):
                inputs = problem(rows, 1, 8, F32)[:2]
                output = function(*inputs)
                upstream = normal(rows, seed=3, dtype=F32)
                results.append([output, *torch.autograd.grad(output, inputs, upstream)])
            for eager, traced in zip(*results, strict=True):
                torch.testing.assert_close(eager, traced, rtol=1e-5, atol=1e-6)

    def test_compile_in_the_reference(self):
        torch.compiler.reset()
        arguments = problem(4, 97, 8, F32)
        compiled = torch.compile(plpp_loss, fullgraph=True)
        expected = plpp_loss(*arguments)
        with backends.reference_only():
            assert_close(compiled(*arguments), expected, 1e-6)
        assert_close(compiled(*arguments), expected, 1e-6)

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
        traced = gradients([compiled], inputs, keep_graph=False)
        for a, e in zip(traced, gradients([eager], inputs), strict=True):
            assert_close(a, e, 1e-5)

    def test_inductor(self):
        arguments = problem(7, 97, 8, torch.float32)
        eager = plpp_loss(*arguments)
        compiled = torch.compile(plpp_loss, fullgraph=True)(*arguments)
        assert_close(compiled, eager, 1e-6)
        inputs = arguments[:2]
        traced = gradients([compiled], inputs, keep_graph=False)
        for a, e in zip(traced, gradients([eager], inputs), strict=True):
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


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or backends.why_no_kernel("perplexity", "cuda") is not None,
    reason="no CUDA device that vlfast._C was built for",
)
class TestOnGpu:
    @pytest.fixture
    def launches(self, monkeypatch):
        """One for each call of the kernel."""
        kernel, launches = extension().perplexity_cuda, []

        def counted(*arguments):
            launches.append(arguments)
            return kernel(*arguments)

        monkeypatch.setattr(extension(), "perplexity_cuda", counted)
        monkeypatch.setenv("VLFAST_CHECK", "0")
        return launches

    def arguments(self, rows=16, words=3001, width=512, dtype=F32):
        """fp32 rows and words of any dtype: the logits have a deviation of about 2.5."""
        arguments = problem(rows, words, width, F32, embedding=2.5 * width**-0.5)
        prompts, hidden, embedding = (x.detach().cuda() for x in arguments)
        return prompts, hidden, embedding.to(dtype)

    @pytest.mark.parametrize("detach_targets", [True, False], ids=["detached", "attached"])
    @pytest.mark.parametrize("words", [3001, 49408])
    @pytest.mark.parametrize(
        ("rows", "width", "dtype", "top_k", "vocabulary", "inverse_norms"),
        [
            (1, 64, F32, 1, False, False),
            (1, 512, BF16, 10, True, True),
            (1, 768, F16, 64, False, True),
            (1, 1024, F32, 33, True, False),
            (16, 64, BF16, 33, False, False),
            (16, 512, F32, 10, False, True),
            (16, 512, F16, 10, True, False),
            (16, 512, BF16, 64, True, True),
            (16, 768, F32, 1, True, True),
            (16, 1024, F16, 10, False, False),
            (17, 64, F16, 64, True, False),
            (17, 512, F32, 64, False, False),
            (17, 768, BF16, 10, False, True),
            (17, 1024, BF16, 1, True, True),
            (17, 1024, F32, 10, True, False),
            (64, 64, F32, 64, False, True),
            (64, 512, F16, 33, False, False),
            (64, 512, BF16, 1, False, False),
            (64, 768, F16, 10, True, True),
            (64, 1024, F32, 10, False, True),
            (64, 1024, BF16, 33, True, False),
        ],
    )
    def test_accuracy(
        self, launches, rows, words, width, dtype, top_k, vocabulary, inverse_norms, detach_targets
    ):
        # In all of these, the last word that is chosen is 1e-6 above the next in cosine.
        arguments = self.arguments(rows, words, width, dtype)
        prompts, hidden, embedding = in_doubles(arguments)
        options = dict(top_k=top_k, temperature=0.05, detach_targets=detach_targets)
        if vocabulary:
            options["vocabulary"] = torch.arange(words, device="cuda") % 5 != 2
        if inverse_norms:
            options["inverse_norms"] = reference.inverse_norm(embedding).float()
        actual = terms_and_gradients(*arguments, **options)
        assert len(launches) == 1
        again = terms_and_gradients(*arguments, **options)
        assert all(map(torch.equal, actual, again))

        with backends.reference_only():
            expected = terms_and_gradients(prompts, hidden, embedding, **options)
        # What is small because large numbers cancel has their error. bf16 takes the rows in two
        # terms of 8 bits.
        tolerance = 2e-5 if dtype == BF16 else 8e-6
        logits, of_words = (hidden @ embedding.T).abs().max(), embedding.abs().max()
        floors = (logits, 0, 0 if detach_targets else of_words, of_words)
        for result, truth, floor in zip(actual, expected, floors, strict=True):
            assert result.dtype == F32
            error = (result.double() - truth).abs().max()
            assert error <= tolerance * truth.abs().max().clamp_min(floor)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("side", [0, 1], ids=["prompts", "hidden"])
    def test_bad_values_stay_in_their_row(self, launches, side, value):
        arguments = self.arguments(rows=18, dtype=F16)
        good = terms_and_gradients(*arguments, detach_targets=False)
        arguments[side][2, 511] = value
        others = torch.arange(18) != 2
        bad = terms_and_gradients(*arguments, detach_targets=False)
        for before, after in zip(good, bad, strict=True):
            assert torch.equal(before[others], after[others])
            assert after[2].isnan().all()
        assert len(launches) == 2

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("where", ["embedding", "inverse_norms"])
    def test_bad_words_may_be_in_every_row(self, launches, where, value):
        prompts, hidden, embedding = self.arguments(rows=18, dtype=BF16)
        inverse_norms = reference.inverse_norm(embedding.float())
        if where == "embedding":
            embedding[2999, 3] = value
        else:
            inverse_norms[2999] = value
        for result in terms_and_gradients(prompts, hidden, embedding, inverse_norms=inverse_norms):
            assert result.isnan().all()
        assert len(launches) == 1

    def test_no_host_synchronisation(self, launches):
        prompts, hidden, embedding = self.arguments(dtype=F16)
        leaves = prompts.requires_grad_(), hidden.half().requires_grad_()
        options = dict(
            temperature=torch.tensor(0.05, device="cuda"),
            inverse_weight=torch.tensor(0.5, device="cuda"),
            vocabulary=embedding[:, 0] > -1,
            detach_targets=False,
        )
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            plpp_loss(*leaves, embedding, **options).backward()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        assert all(leaf.grad.isfinite().all() for leaf in leaves)
        assert len(launches) == 1

    def test_cuda_graph(self, launches):
        prompts, hidden, embedding = self.arguments(dtype=BF16)
        leaves = prompts.requires_grad_(), hidden.requires_grad_()

        def step():
            loss = plpp_loss(*leaves, embedding, temperature=0.05)
            return [loss.detach(), *torch.autograd.grad(loss, leaves)]

        # What a first call sets up may not be captured.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            prompts.copy_(prompts.flip(0) * 2)
            hidden.copy_(hidden.flip(1))
        graph.replay()
        assert len(launches) == 2
        assert all(map(torch.equal, captured, step()))


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
        with pytest.raises(RuntimeError, match="reference_only"):
            torch.autograd.grad(loss, hidden, create_graph=True)
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
