"""gated_mixture_loss: values, gradients, errors, and what the method promises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlfast._extension import extension
from vlfast.ops import backends, gated_mixture_loss, reference, symmetric_kl_loss

from . import oracles
from .support import assert_as_precise, assert_close, gradients, normal

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
INPUTS = ("image_features", "gate", "hard_text_features", "student_logits")

needs_kernel = pytest.mark.skipif(extension() is None, reason="vlfast._C is not built here")


def problem(batch=5, classes=7, heads=6, width=8, dtype=torch.float64, **changes):
    """Keyword arguments of the loss; features have norm 1, as CLIP's have."""
    texts = normal(heads, classes, width, seed=2)
    images = normal(batch, width, seed=1)
    arguments = dict(
        image_features=torch.nn.functional.normalize(images, dim=-1).to(dtype),
        gate=normal(width, heads, seed=3, dtype=dtype).requires_grad_(),
        hard_text_features=torch.nn.functional.normalize(texts, dim=-1).to(dtype),
        student_logits=normal(batch, classes, seed=4, scale=5.0, dtype=dtype).requires_grad_(),
        labels=torch.arange(batch) * 3 % classes,
        logit_scale=20.0,
    )
    return arguments | changes


def in_order(arguments, temperature=1.0, top_k=2):
    """The same problem as positional fp64 arguments of the oracle."""
    tensors = [arguments[name].detach().double() for name in INPUTS]
    tensors[1].requires_grad_()
    tensors[3].requires_grad_()
    scale = float(arguments["logit_scale"])
    return (*tensors, arguments["labels"], scale, temperature, top_k)


def compare(arguments, temperature, top_k, tolerance, gradient_tolerance):
    actual = gated_mixture_loss(**arguments, temperature=temperature, top_k=top_k, reduction="none")
    exact = in_order(arguments, temperature, top_k)
    expected = oracles.gated_mixture(*exact)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, tolerance)
    actual_gradients = gradients(actual, (arguments["gate"], arguments["student_logits"]))
    for a, e in zip(actual_gradients, gradients(expected, (exact[1], exact[3])), strict=True):
        assert_close(a, e, gradient_tolerance)
    assert actual_gradients[0].dtype == arguments["gate"].dtype
    assert actual_gradients[1].dtype == arguments["student_logits"].dtype
    return actual


class TestValuesAndGradients:
    @pytest.mark.parametrize(
        ("batch", "classes", "heads", "top_k", "temperature"),
        [
            (1, 3, 2, 2, 1.0),
            (7, 3, 12, 1, 4.0),
            (16, 1000, 12, 3, 0.5),
            (65, 10, 36, 36, 2.0),
        ],
    )
    def test_the_equation(self, batch, classes, heads, top_k, temperature):
        compare(problem(batch, classes, heads), temperature, top_k, 1e-10, 1e-9)

    @pytest.mark.parametrize("dtype", [F64, F32], ids=str)
    def test_one_class_leaves_nothing_to_learn(self, dtype):
        arguments = problem(batch=4, classes=1, dtype=dtype)
        losses = gated_mixture_loss(**arguments, reduction="none")
        for loss in losses:
            assert (loss == 0).all()
        for gradient in gradients(losses, (arguments["gate"], arguments["student_logits"])):
            assert (gradient == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_low_precision_is_computed_in_fp32(self, dtype):
        losses = compare(
            problem(16, 100, 12, 32, dtype), 1.0, 3, 1e-5, max(1e-4, torch.finfo(dtype).eps)
        )
        assert all(loss.dtype == torch.float32 for loss in losses)

    def test_mixed_dtypes(self):
        arguments = problem(16, 100, 12, 32, torch.float32)
        for name in ("image_features", "hard_text_features"):
            arguments[name] = arguments[name].half()
        student = arguments["student_logits"].detach().bfloat16().requires_grad_()
        arguments["student_logits"] = student
        compare(arguments, 1.0, 3, 1e-5, torch.finfo(torch.bfloat16).eps)
        arguments["gate"] = arguments["gate"].detach().double().requires_grad_()
        assert gated_mixture_loss(**arguments)[0].dtype == torch.float64

    @pytest.mark.parametrize("dtype", [F64, F32], ids=str)
    def test_reductions(self, dtype):
        arguments = problem(dtype=dtype)
        rows = gated_mixture_loss(**arguments, reduction="none")
        for row, total in zip(rows, gated_mixture_loss(**arguments, reduction="sum"), strict=True):
            assert_close(total, row.sum(), 1e-6)
        for row, mean in zip(rows, gated_mixture_loss(**arguments), strict=True):
            assert_close(mean, row.mean(), 1e-6)

    @pytest.mark.parametrize("dtype", [F64, F32], ids=str)
    def test_scale_and_temperature_as_tensors(self, dtype):
        arguments = problem(dtype=dtype)
        plain = gated_mixture_loss(**arguments, temperature=2.0)
        arguments["logit_scale"] = torch.tensor(20.0)
        tensors = gated_mixture_loss(**arguments, temperature=torch.tensor(2.0))
        for a, e in zip(tensors, plain, strict=True):
            assert_close(a, e, 1e-12)

    def test_scale_of_a_hundred_with_offset_students(self):
        arguments = problem(16, 100, 12, 32, torch.float32, logit_scale=100.0)
        moved = arguments["student_logits"].detach() * 4 + 50
        arguments["student_logits"] = moved.requires_grad_()
        compare(arguments, 1.0, 3, 1e-5, 1e-4)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-9), (F32, 1e-5)], ids=str)
    def test_ties_in_the_gate(self, dtype, tolerance):
        arguments = problem(dtype=dtype)
        arguments["gate"] = torch.zeros_like(arguments["gate"]).requires_grad_()
        compare(arguments, 1.0, 3, tolerance, tolerance)
        first = dict(arguments, hard_text_features=arguments["hard_text_features"][:3])
        first["gate"] = torch.zeros_like(arguments["gate"][:, :3]).requires_grad_()
        for a, e in zip(
            gated_mixture_loss(**arguments, top_k=3),
            gated_mixture_loss(**first, top_k=3),
            strict=True,
        ):
            assert_close(a, e, 1e-12)

    def test_gradcheck(self):
        arguments = problem(3, 4, 5, 4)
        inputs = arguments.pop("gate"), arguments.pop("student_logits")
        assert torch.autograd.gradcheck(
            lambda gate, student: gated_mixture_loss(
                gate=gate,
                student_logits=student,
                **arguments,
                temperature=1.5,
                top_k=3,
                reduction="none",
            ),
            inputs,
        )

    @pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-9), (F32, 1e-5)], ids=str)
    def test_two_backwards_on_one_graph(self, dtype, tolerance):
        arguments = problem(dtype=dtype)
        exact = in_order(arguments)
        losses = gated_mixture_loss(**arguments, reduction="none")
        expected = oracles.gated_mixture(*exact)
        inputs = (arguments["gate"], arguments["student_logits"])
        for seed in (20, 30):
            for a, e in zip(
                gradients(losses, inputs, seed),
                gradients(expected, (exact[1], exact[3]), seed),
                strict=True,
            ):
                assert_close(a, e, tolerance)

    def test_autocast_changes_nothing(self):
        arguments = problem(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            cast = gated_mixture_loss(**arguments)
        for a, e in zip(cast, gated_mixture_loss(**arguments), strict=True):
            assert torch.equal(a, e)


class TestWhatTheMethodPromises:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (F32, 1e-5)], ids=str)
    def test_one_prompt_is_plain_distillation_and_leaves_the_gate_alone(self, dtype, tolerance):
        arguments = problem(heads=1, dtype=dtype)
        distillation, selection = gated_mixture_loss(**arguments, temperature=2.0, top_k=1)
        teacher = 20.0 * arguments["image_features"] @ arguments["hard_text_features"][0].T
        expected = 4 * torch.nn.functional.kl_div(
            (arguments["student_logits"] / 2).log_softmax(-1),
            (teacher / 2).softmax(-1),
            reduction="batchmean",
        )
        assert_close(distillation, expected, tolerance)
        assert_close(
            selection, torch.nn.functional.cross_entropy(teacher, arguments["labels"]), tolerance
        )
        (gradient,) = torch.autograd.grad(distillation + selection, arguments["gate"])
        assert (gradient == 0).all()

    def test_selection_does_not_train_the_student(self):
        arguments = problem()
        _, selection = gated_mixture_loss(**arguments)
        (gradient,) = torch.autograd.grad(
            selection, arguments["student_logits"], materialize_grads=True
        )
        assert (gradient == 0).all()

    def test_prompts_not_selected_by_any_image_get_no_gradient(self):
        arguments = problem(batch=1)
        losses = gated_mixture_loss(**arguments)
        (gradient,) = torch.autograd.grad(sum(losses), arguments["gate"])
        chosen = oracles.ranked((arguments["image_features"] @ arguments["gate"])[0])[:2]
        assert gradient.any(0).nonzero()[:, 0].tolist() == sorted(chosen)

    def test_selection_prefers_the_prompt_that_is_right(self):
        arguments = problem(batch=1, classes=3, heads=2)
        texts = torch.zeros(2, 3, 8, dtype=torch.float64)
        label = int(arguments["labels"][0])
        texts[0, label] = arguments["image_features"][0]
        texts[1, (label + 1) % 3] = arguments["image_features"][0]
        arguments["hard_text_features"] = texts
        arguments["gate"] = torch.zeros(8, 2, dtype=torch.float64, requires_grad=True)
        _, selection = gated_mixture_loss(**arguments)
        (gradient,) = torch.autograd.grad(selection, arguments["gate"])
        scores = arguments["image_features"] @ -gradient
        assert scores[0, 0] > 0 > scores[0, 1]

    def test_distillation_is_zero_where_the_student_is_the_teacher(self):
        arguments = problem(heads=1)
        teacher = 20.0 * arguments["image_features"] @ arguments["hard_text_features"][0].T
        arguments["student_logits"] = teacher.clone().requires_grad_()
        distillation, _ = gated_mixture_loss(**arguments, top_k=1)
        assert float(distillation.detach()) < 1e-20

    @pytest.mark.parametrize("dtype", [F64, F32], ids=str)
    @pytest.mark.parametrize("which", ["image_features", "student_logits"])
    def test_nan_stays_in_its_row(self, which, dtype):
        arguments = problem(dtype=dtype)
        poisoned = arguments[which].detach().clone()
        poisoned[1, 2] = torch.nan
        arguments[which] = poisoned
        student = arguments["student_logits"].detach().requires_grad_()
        arguments["student_logits"] = student
        distillation, selection = gated_mixture_loss(**arguments, reduction="none")
        assert distillation.isnan().nonzero().tolist() == [[1]]
        assert selection.isnan().nonzero().tolist() == ([[1]] if which == "image_features" else [])
        (gradient,) = torch.autograd.grad(distillation.sum(), student)
        assert gradient.isnan().any(1).nonzero().tolist() == [[1]]

    @given(
        seed=st.integers(0, 10**6),
        heads=st.integers(1, 8),
        data=st.data(),
        scale=st.floats(0.1, 100.0),
    )
    def test_properties(self, seed, heads, data, scale):
        top_k = data.draw(st.integers(1, heads))
        arguments = dict(
            image_features=normal(3, 4, seed=seed),
            hard_text_features=normal(heads, 5, 4, seed=seed + 1),
            student_logits=normal(3, 5, seed=seed + 2, scale=scale),
            labels=torch.tensor([4, 0, 2]),
            logit_scale=scale,
            top_k=top_k,
            reduction="none",
        )
        gate = normal(4, heads, seed=seed + 3)
        losses = gated_mixture_loss(gate=gate, **arguments)
        for loss in losses:
            assert (loss >= 0).all()
        arguments["student_logits"] = arguments["student_logits"] + 3.0
        moved = gated_mixture_loss(gate=gate, **arguments)
        torch.testing.assert_close(moved, losses, rtol=1e-8, atol=1e-9)
        order = torch.randperm(heads, generator=torch.Generator().manual_seed(seed))
        arguments["hard_text_features"] = arguments["hard_text_features"][order]
        shuffled = gated_mixture_loss(gate=gate[:, order], **arguments)
        torch.testing.assert_close(shuffled, moved, rtol=1e-8, atol=1e-9)


def losses_and_gradients(arguments, **options):
    """Both losses of each row, and their gradients to the gate and to the student."""
    gate = arguments["gate"].detach().requires_grad_()
    student = arguments["student_logits"].detach().requires_grad_()
    arguments = arguments | {"gate": gate, "student_logits": student} | options
    losses = gated_mixture_loss(**arguments, reduction="none")
    return [*(loss.detach() for loss in losses), *gradients(losses, (gate, student))]


def raw(arguments, temperature=1.0, top_k=2, with_gradient=True):
    """The op itself, which gives the gradients of each row."""
    inputs = [arguments[name].detach() for name in (*INPUTS, "labels")]
    scale = arguments["logit_scale"]
    return torch.ops.vlfast.gated_mixture(
        *inputs, None, None, scale, temperature, top_k, with_gradient
    )


def assert_as_precise_as_pytorch(arguments, **options):
    ours = losses_and_gradients(arguments, **options)
    wide = {name: arguments[name].detach().double() for name in INPUTS}
    with backends.reference_only():
        theirs = losses_and_gradients(arguments, **options)
        truth = losses_and_gradients(arguments | wide, **options)
    assert_as_precise(ours, theirs, truth)


def exact_products(batch=4, classes=30, heads=3, dtype=F32, **changes):
    """Images of a single 1, so that the teachers' logits are the texts times a power of 2."""
    texts = normal(heads, classes, batch, seed=2, scale=0.1, dtype=dtype)
    arguments = problem(batch, classes, heads, batch, dtype) | {
        "image_features": torch.eye(batch, dtype=dtype),
        "hard_text_features": texts,
        "logit_scale": 32.0,
    }
    return arguments | changes


@needs_kernel
class TestKernelAccuracy:
    @pytest.mark.parametrize(
        ("batch", "heads", "classes", "width", "top_k", "temperature"),
        [
            (1, 1, 1, 1, 1, 1.0),
            (1, 36, 3, 8, 36, 2.0),
            (7, 2, 1000, 1, 2, 1.0),
            (7, 12, 97, 500, 5, 0.5),
            (128, 36, 3, 65, 1, 1.0),
            (128, 12, 100, 512, 2, 1.0),
            (2, 3, 20930, 12, 2, 4.0),
        ],
    )
    @pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
    def test_same_dtypes(self, dtype, batch, heads, classes, width, top_k, temperature):
        arguments = problem(batch, classes, heads, width, dtype, logit_scale=100.0)
        assert_as_precise_as_pytorch(arguments, top_k=top_k, temperature=temperature)

    def test_the_size_of_imagenet(self):
        arguments = problem(128, 1000, 12, 512, F32, logit_scale=100.0)
        assert_as_precise_as_pytorch(arguments)

    @pytest.mark.parametrize(
        "dtypes",
        [(F32, F32, F16, F32), (F16, F32, F16, F16), (BF16, F16, F32, BF16), (F16, F64, F16, F32)],
        ids=str,
    )
    def test_mixed_dtypes(self, dtypes):
        arguments = problem(9, 101, 5, 33)
        for name, dtype in zip(INPUTS, dtypes, strict=True):
            arguments[name] = arguments[name].detach().to(dtype)
        assert_as_precise_as_pytorch(arguments, top_k=3)
        gradients = losses_and_gradients(arguments)[2:]
        assert [x.dtype for x in gradients] == [dtypes[1], dtypes[3]]

    @pytest.mark.parametrize("temperature", [0.5, 3.0])
    @pytest.mark.parametrize("offset", [50.0, -50.0])
    def test_offsets_of_the_logits(self, offset, temperature):
        arguments = problem(6, 37, 5, 16, F32)
        arguments["student_logits"] = arguments["student_logits"].detach() + offset
        assert_as_precise_as_pytorch(arguments, temperature=temperature)

    @pytest.mark.parametrize("gap", [30.0, 90.0, 1e4, 1e30, torch.finfo(F32).max])
    def test_student_classes_far_below_the_others(self, gap):
        arguments = problem(4, 40, 3, 8, F32)
        student = arguments["student_logits"].detach().clone()
        student[:, ::3] = -gap
        arguments["student_logits"] = student
        results = losses_and_gradients(arguments)
        wide = {name: arguments[name].detach().double() for name in INPUTS}
        for actual, expected in zip(results, losses_and_gradients(arguments | wide), strict=True):
            assert_close(actual, expected, 1e-5)

    @pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
    def test_student_equal_to_all_teachers(self, temperature):
        arguments = exact_products()
        texts = arguments["hard_text_features"][:1].expand(3, -1, -1)
        arguments["hard_text_features"] = texts
        arguments["student_logits"] = 32 * texts[0].T
        distillation, selection, *gradients = raw(arguments, temperature)
        assert (distillation == 0).all() and (selection > 0).all()
        assert all((x == 0).all() for x in gradients)

    def test_hardly_any_distance_is_not_lost(self):
        arguments = exact_products(heads=1)
        teacher = 32 * arguments["hard_text_features"][0].T
        student = teacher + normal(*teacher.shape, seed=7, scale=1e-4, dtype=F32)
        arguments["student_logits"] = student
        distillation, _, to_student, *_ = raw(arguments, top_k=1)
        p, q = (x.double().softmax(-1) for x in (teacher, student))
        truth = (p * (teacher.double() - student.double())).sum(-1)
        truth -= teacher.double().logsumexp(-1) - student.double().logsumexp(-1)
        assert truth.max() < 1e-7
        assert_close(distillation, truth, 1e-4)
        assert_close(to_student, q - p, 1e-2)

    @pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
    def test_ties_go_to_the_smaller_index(self, dtype):
        """Small whole numbers: every score is exact, and equal columns tie in every dtype."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(-3, 4, (40, 20), generator=generator).to(dtype)
        columns = torch.randint(-2, 3, (20, 3), generator=generator).to(dtype)
        gate = columns[:, [0, 1, 2, 2, 1, 0, 0, 2]]
        scores = (images.double() @ gate.double()).tolist()
        texts = normal(8, 5, 20, seed=2, scale=0.05, dtype=dtype)
        arguments = problem(40, 5, 8, 20, dtype) | {
            "image_features": images,
            "gate": gate,
            "hard_text_features": texts,
        }
        for top_k in (1, 2, 4, 7):
            to_scores = raw(arguments, top_k=top_k)[4]
            for row, gradient in zip(scores, to_scores, strict=True):
                chosen = sorted(range(8), key=lambda h: (-row[h], h))[:top_k]
                assert set(gradient.nonzero()[:, 0].tolist()) <= set(chosen)
            assert_as_precise_as_pytorch(arguments, top_k=top_k)

    def test_every_element_is_written(self, poisoned_memory):
        for dtype in (F32, BF16, F16):
            arguments = problem(5, 19, 6, 8, dtype)
            assert all(x.isfinite().all() for x in raw(arguments))
            assert all(x.isfinite().all() for x in losses_and_gradients(arguments))


@needs_kernel
class TestRowsAlone:
    @pytest.mark.parametrize(
        ("batch", "heads", "classes", "top_k"),
        [(37, 4, 101, 2), (300, 1, 5, 1), (7, 36, 20930, 36)],
        ids=["many to a head", "more than a chunk of images", "more than a chunk of logits"],
    )
    def test_a_row_has_the_same_bits_in_any_batch(self, batch, heads, classes, top_k):
        arguments = problem(batch, classes, heads, 9, F32)
        together = raw(arguments, top_k=top_k)
        for rows in (slice(0, 1), slice(batch // 2, batch // 2 + 2), slice(batch - 1, batch)):
            some = dict(arguments)
            for name in ("image_features", "student_logits", "labels"):
                some[name] = arguments[name][rows]
            for alone, all_rows in zip(raw(some, top_k=top_k), together, strict=True):
                assert torch.equal(alone, all_rows[rows])

    def test_the_number_of_threads_changes_no_bit(self):
        arguments = problem(37, 501, 6, 64, F32)
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                results.append(raw(arguments, 2.0, 3))
        finally:
            torch.set_num_threads(before)
        for others in results[1:]:
            assert all(map(torch.equal, results[0], others))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
    def test_bad_values_of_an_image(self, dtype, value):
        arguments = problem(6, 37, 4, 9, dtype)
        good = raw(arguments)
        arguments["image_features"][2, 8] = value
        distillation, selection, to_student, *to_scores = bad = raw(arguments)
        self.assert_others_are_the_same(good, bad, [2])
        assert all(x[2].isnan().all() for x in (distillation, selection, to_student))
        assert all(x[2].isnan().any() for x in to_scores)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("position", [0, 20, 36])
    @pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
    def test_bad_values_of_a_student(self, dtype, position, value):
        arguments = problem(6, 37, 4, 9, dtype)
        good = raw(arguments)
        arguments["student_logits"] = arguments["student_logits"].detach()
        arguments["student_logits"][2, position] = value
        bad = raw(arguments)
        self.assert_others_are_the_same(good, bad, [2])
        assert bad[0][2].isnan() and bad[2][2].isnan().all() and bad[3][2].isnan().any()
        assert torch.equal(bad[1], good[1]) and torch.equal(bad[4], good[4])

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
    def test_bad_values_of_a_text_reach_those_that_select_it(self, dtype, value):
        arguments = problem(12, 37, 4, 9, dtype)
        scores = arguments["image_features"].double() @ arguments["gate"].detach().double()
        reached = (scores.topk(2).indices == 3).any(1).nonzero()[:, 0].tolist()
        assert 0 < len(reached) < 12
        good = raw(arguments)
        arguments["hard_text_features"][3, 30, 4] = value
        bad = raw(arguments)
        self.assert_others_are_the_same(good, bad, reached)
        assert all(x[reached].isnan().all() for x in bad[:3])

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_bad_values_of_the_gate_reach_all(self, value):
        arguments = problem(6, 37, 4, 9, F32)
        arguments["gate"] = arguments["gate"].detach()
        arguments["gate"][4, 1] = value
        assert all(x.isnan().all() for x in raw(arguments)[:3])
        with backends.reference_only():
            losses = gated_mixture_loss(**arguments, reduction="none")
        assert all(x.isnan().all() for x in losses)

    @staticmethod
    def assert_others_are_the_same(before, after, rows):
        others = [row for row in range(len(before[0])) if row not in rows]
        for x, y in zip(before, after, strict=True):
            assert torch.equal(x[others], y[others])


@needs_kernel
class TestKernelGradients:
    def test_only_one_loss_is_used(self):
        arguments = problem(dtype=F32)
        exact = in_order(arguments)
        losses = gated_mixture_loss(**arguments, reduction="none")
        truth = reference.gated_mixture(*exact)
        for i, upstream in enumerate((normal(5, seed=1), normal(5, seed=2))):
            actual = torch.autograd.grad(
                losses[i],
                (arguments["gate"], arguments["student_logits"]),
                upstream.float(),
                retain_graph=True,
                allow_unused=True,
            )
            expected = torch.autograd.grad(
                truth[i], (exact[1], exact[3]), upstream, retain_graph=True, allow_unused=True
            )
            assert_close(actual[0], expected[0], 1e-5)
            if i == 0:
                assert_close(actual[1], expected[1], 1e-5)
            else:
                assert actual[1] is None or (actual[1] == 0).all()

    def test_a_loss_that_is_not_used_cannot_harm(self):
        arguments = problem(dtype=F32)
        exact = losses_and_gradients(arguments)
        student = arguments["student_logits"].detach().clone()
        student[1] = torch.nan
        _, selection = gated_mixture_loss(**arguments | {"student_logits": student})
        (gradient,) = torch.autograd.grad(selection, arguments["gate"])
        assert exact[1].isfinite().all() and gradient.isfinite().all() and gradient.any()

    @pytest.mark.parametrize("learns", ["gate", "student_logits"])
    def test_only_one_input_learns(self, learns):
        arguments = problem(dtype=F32)
        both = losses_and_gradients(arguments)
        frozen = {name: arguments[name].detach() for name in ("gate", "student_logits")}
        leaf = frozen[learns].clone().requires_grad_()
        losses = gated_mixture_loss(**arguments | frozen | {learns: leaf}, reduction="none")
        (gradient,) = gradients(losses, [leaf])
        assert torch.equal(gradient, both[2 if learns == "gate" else 3])

    def test_no_gradient_is_computed_where_none_is_wanted(self):
        arguments = problem(dtype=F32)
        wanted = gated_mixture_loss(**arguments)
        with torch.no_grad():
            switched_off = gated_mixture_loss(**arguments)
        assert all(loss.requires_grad for loss in wanted)
        assert not any(loss.requires_grad for loss in switched_off)
        assert all(map(torch.equal, wanted, switched_off))
        results = raw(arguments, with_gradient=False)
        assert [list(x.shape) for x in results] == [[5], [5], [0, 0], [0, 0], [0, 0]]

    def test_one_selected_prompt_gives_the_gate_exactly_zero(self):
        for x in raw(problem(40, 30, 6, 16, F32), top_k=1)[3:]:
            assert (x == 0).all()

    def test_equal_teachers_give_the_gate_exactly_zero(self):
        arguments = problem(9, 30, 3, 16, F32)
        arguments["hard_text_features"] = arguments["hard_text_features"][:1].repeat(3, 1, 1)
        for x in raw(arguments, top_k=3)[3:]:
            assert (x == 0).all()

    def test_second_derivatives_need_the_reference(self):
        arguments = problem(3, 4, 3, 4, F32)
        distillation, _ = gated_mixture_loss(**arguments)
        with pytest.raises(RuntimeError, match="reference_only"):
            torch.autograd.grad(distillation, arguments["gate"], create_graph=True)
        arguments = problem(3, 4, 3, 4)
        inputs = arguments.pop("gate"), arguments.pop("student_logits")
        with backends.reference_only():
            assert torch.autograd.gradgradcheck(
                lambda gate, student: gated_mixture_loss(
                    gate=gate, student_logits=student, **arguments
                ),
                inputs,
            )


@needs_kernel
class TestInPyTorch:
    @pytest.mark.parametrize(
        "dtypes",
        [(F32, F32, F32, F32), (F16, F32, F16, F16), (BF16, BF16, BF16, BF16)],
        ids=str,
    )
    @pytest.mark.parametrize("with_gradient", [True, False])
    def test_opcheck(self, dtypes, with_gradient):
        arguments = problem(4, 9, 3, 8)
        images, gate, texts, student = (
            arguments[name].detach().to(dtype) for name, dtype in zip(INPUTS, dtypes, strict=True)
        )
        labels, scale = arguments["labels"], torch.tensor(3.0)
        for inputs in (
            (images, gate, texts, student, labels, None, None),
            (images, gate, texts, student, labels, scale, scale),
            (images.T.contiguous().T, gate.T.contiguous().T, texts, student, labels, scale, None),
            (images[:0], gate, texts, student[:0], labels[:0], None, None),
        ):
            torch.library.opcheck(
                torch.ops.vlfast.gated_mixture, (*inputs, 2.0, 1.5, 2, with_gradient)
            )

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile(self, reduction, dynamic):
        torch.compiler.reset()

        def losses(arguments, gate, student):
            return gated_mixture_loss(
                **arguments | {"gate": gate.sin(), "student_logits": student.sin()},
                temperature=2.0,
                reduction=reduction,
            )

        compiled = torch.compile(losses, fullgraph=True)
        for batch in (4, 6):
            arguments = problem(batch, 30, 5, 16, F32)
            results = []
            for function in (losses, compiled):
                gate = arguments["gate"].detach().requires_grad_()
                student = arguments["student_logits"].detach().requires_grad_()
                if dynamic:
                    for tensor in (arguments["image_features"], student, arguments["labels"]):
                        torch._dynamo.mark_dynamic(tensor, 0)
                outputs = function(arguments, gate, student)
                upstream = [normal(*x.shape, seed=i, dtype=F32) for i, x in enumerate(outputs)]
                torch.autograd.backward(outputs, upstream)
                results.append([*(x.detach() for x in outputs), gate.grad, student.grad])
            for eager, traced in zip(*results, strict=True):
                torch.testing.assert_close(eager, traced, rtol=1e-5, atol=1e-6)

    def test_compile_in_the_reference(self):
        torch.compiler.reset()
        arguments = problem(4, 30, 5, 16, F32)
        compiled = torch.compile(gated_mixture_loss, fullgraph=True)
        expected = gated_mixture_loss(**arguments)
        with backends.reference_only():
            torch.testing.assert_close(compiled(**arguments), expected)
        torch.testing.assert_close(compiled(**arguments), expected)

    def test_backward_in_autocast(self):
        arguments = problem(dtype=F32)
        inputs = (arguments["gate"], arguments["student_logits"])
        outside = gradients(gated_mixture_loss(**arguments), inputs)
        with torch.autocast("cpu", BF16):
            inside = gradients(gated_mixture_loss(**arguments), inputs)
        assert all(map(torch.equal, inside, outside))

    @pytest.mark.parametrize("dtype", [F64, F32], ids=str)
    def test_function_transforms(self, dtype):
        arguments = problem(dtype=dtype)
        gate = arguments["gate"]

        def loss(gate, labels):
            losses = gated_mixture_loss(**arguments | {"gate": gate, "labels": labels})
            return losses[0] + losses[1]

        labels = arguments["labels"]
        expected = torch.autograd.grad(loss(gate, labels), gate)[0]
        transformed = torch.func.grad(loss)(gate.detach(), labels)
        torch.testing.assert_close(transformed, expected, rtol=1e-4, atol=1e-6)
        stacked = torch.vmap(loss, (None, 0))(gate.detach(), labels.expand(3, 5))
        torch.testing.assert_close(stacked, loss(gate, labels).detach().expand(3))

    def test_other_devices(self):
        arguments = {
            name: value.to("meta") if isinstance(value, torch.Tensor) else value
            for name, value in problem(dtype=F32).items()
        }
        assert [x.shape for x in gated_mixture_loss(**arguments, reduction="none")] == [(5,), (5,)]

    def test_not_contiguous(self):
        arguments = problem(8, 24, 5, 16, F32)
        strided = {
            name: torch.stack([arguments[name], arguments[name]], -1)[..., 0]
            for name in (*INPUTS, "labels")
        }
        assert not any(x.is_contiguous() for x in strided.values())
        results = losses_and_gradients(arguments | strided), losses_and_gradients(arguments)
        assert all(map(torch.equal, *results))

    def test_inputs_are_not_written(self):
        arguments = problem(8, 24, 5, 16, F32)
        copies = {name: arguments[name].clone() for name in (*INPUTS, "labels")}
        losses_and_gradients(arguments)
        assert all(torch.equal(arguments[name], copy) for name, copy in copies.items())

    def test_empty_batches_only_in_the_raw_op(self):
        results = raw(problem(0, 7, 3, 8, F32))
        assert [list(x.shape) for x in results] == [[0], [0], [0, 7], [0, 3], [0, 3]]


@needs_kernel
class TestKernelProperties:
    @given(
        seed=st.integers(0, 10**6),
        batch=st.integers(1, 9),
        classes=st.integers(1, 70),
        temperature=st.sampled_from([0.5, 1.0, 3.0]),
        scale=st.floats(0.1, 100.0),
        dtype=st.sampled_from([F32, BF16, F16]),
    )
    def test_one_prompt_is_symmetric_kl_in_one_direction(
        self, seed, batch, classes, temperature, scale, dtype
    ):
        images = normal(batch, 8, seed=seed, scale=0.3, dtype=dtype)
        texts = normal(1, classes, 8, seed=seed + 1, scale=0.3, dtype=dtype)
        student = normal(batch, classes, seed=seed + 2, scale=scale / 3, dtype=dtype)
        distillation, _ = gated_mixture_loss(
            images,
            normal(8, 1, dtype=dtype),
            texts,
            student,
            torch.zeros(batch, dtype=torch.int64),
            logit_scale=scale,
            temperature=temperature,
            top_k=1,
            reduction="none",
        )
        divergence = symmetric_kl_loss(
            student.float(),
            images.float() @ texts[0].float().T,
            teacher_scale=scale,
            temperature=temperature,
            forward_weight=1.0,
            reverse_weight=0.0,
            reduction="none",
        )
        expected = temperature**2 * divergence
        torch.testing.assert_close(distillation, expected, rtol=1e-4, atol=1e-5)

    @given(
        seed=st.integers(0, 10**6),
        heads=st.integers(1, 36),
        data=st.data(),
        scale=st.floats(0.1, 100.0),
        dtype=st.sampled_from([F32, BF16, F16]),
    )
    def test_losses_are_positive_and_heads_have_no_order(self, seed, heads, data, scale, dtype):
        top_k = data.draw(st.integers(1, heads))
        arguments = problem(3, 5, heads, 6, dtype, logit_scale=scale)
        arguments["gate"] = normal(6, heads, seed=seed, dtype=F32)
        arguments["image_features"] = normal(3, 6, seed=seed + 1, dtype=F32)
        results = raw(arguments, top_k=top_k)
        assert (results[0] >= 0).all() and (results[1] >= 0).all()
        order = torch.randperm(heads, generator=torch.Generator().manual_seed(seed))
        for name, dimension in (("gate", 1), ("hard_text_features", 0)):
            arguments[name] = arguments[name].index_select(dimension, order)
        shuffled = raw(arguments, top_k=top_k)
        for i, (x, y) in enumerate(zip(results, shuffled, strict=True)):
            x = x if i < 3 else x[:, order]
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or backends.why_no_kernel("gated_mixture", "cuda") is not None,
    reason="no CUDA device that Triton serves",
)
class TestOnGpu:
    @pytest.fixture(autouse=True)
    def launches(self, monkeypatch):
        """One for each call of the kernel."""
        from vlfast.ops.triton import gated_mixture as kernels

        kernel, launches = kernels.gated_mixture, []

        def counted(*arguments):
            launches.append(arguments)
            return kernel(*arguments)

        monkeypatch.setattr(kernels, "gated_mixture", counted)
        monkeypatch.setenv("VLFAST_CHECK", "0")
        return launches

    def on_gpu(self, arguments):
        return {
            name: value.detach().cuda().requires_grad_(value.requires_grad)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in arguments.items()
        }

    def losses_and_gradients(self, arguments, **options):
        losses = gated_mixture_loss(**arguments, reduction="none", **options)
        leaves = arguments["gate"], arguments["student_logits"]
        return [*(x.detach() for x in losses), *gradients(losses, leaves)]

    @pytest.mark.parametrize(
        ("batch", "classes", "heads", "width", "top_k", "temperature"),
        [
            (1, 1, 1, 8, 1, 1.0),
            (7, 3, 12, 64, 1, 4.0),
            (5, 100, 6, 33, 6, 0.5),
            (32, 1000, 12, 512, 3, 2.0),
            (128, 397, 36, 512, 2, 1.0),
            (3, 20930, 4, 256, 2, 1.0),
        ],
    )
    @pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
    def test_accuracy(self, launches, dtype, batch, classes, heads, width, top_k, temperature):
        arguments = problem(batch, classes, heads, width, dtype)
        options = dict(temperature=temperature, top_k=top_k)
        actual = self.losses_and_gradients(self.on_gpu(arguments), **options)
        assert len(launches) == 1

        exact = in_order(arguments, **options)
        losses = reference.gated_mixture(*exact)
        expected = [*losses, *gradients(losses, (exact[1], exact[3]))]
        assert [x.dtype for x in actual] == [F32, F32, dtype, dtype]
        tolerances = (1e-5, 1e-5, *[max(1e-4, torch.finfo(dtype).eps)] * 2)
        for result, truth, tolerance in zip(actual, expected, tolerances, strict=True):
            assert_close(result.cpu(), truth, tolerance)

    def test_numbers_on_the_gpu(self, launches):
        arguments = self.on_gpu(problem(16, 100, 12, 64, F32))
        given = self.losses_and_gradients(arguments, temperature=2.0)
        arguments["logit_scale"] = torch.tensor(20.0).cuda()
        read = self.losses_and_gradients(arguments, temperature=torch.tensor(2.0).cuda())
        for x, y in zip(read, given, strict=True):
            assert_close(x, y, 1e-6)
        assert len(launches) == 2

    def test_the_same_bits_every_time(self):
        arguments = self.on_gpu(problem(64, 397, 12, 512, BF16))
        first = self.losses_and_gradients(arguments)
        assert all(map(torch.equal, first, self.losses_and_gradients(arguments)))

    @pytest.mark.parametrize("label", [-1, 7, 2**40])
    def test_labels_out_of_range(self, label):
        arguments = self.on_gpu(problem(dtype=F32))
        good = gated_mixture_loss(**arguments, reduction="none")
        arguments["labels"][3] = label
        bad = gated_mixture_loss(**arguments, reduction="none")
        assert torch.equal(good[0], bad[0])
        others = torch.arange(5) != 3
        assert torch.equal(good[1][others], bad[1][others]) and bad[1][3].isnan()

    @pytest.mark.parametrize("name", ["image_features", "student_logits"])
    def test_bad_values_stay_in_their_row(self, name):
        arguments = self.on_gpu(problem(dtype=F32))
        good = gated_mixture_loss(**arguments, reduction="none")
        with torch.no_grad():
            arguments[name][3, 2] = float("nan")
        others = torch.arange(5) != 3
        bad = gated_mixture_loss(**arguments, reduction="none")
        assert bad[0][3].isnan()
        for before, after in zip(good, bad, strict=True):
            assert torch.equal(before[others], after[others])

    def test_no_host_synchronisation(self, launches):
        arguments = self.on_gpu(problem(16, 100, 12, 64, F16))
        numbers = dict(
            logit_scale=torch.tensor(20.0, device="cuda"),
            temperature=torch.tensor(2.0, device="cuda"),
        )
        # Triton compiles, and loads its kernels, at the first call.
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            try:
                distillation, selection = gated_mixture_loss(**arguments | numbers)
                (distillation + selection).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert arguments["gate"].grad.isfinite().all()
        assert len(launches) == 2


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(image_features=1.0), TypeError, r"image_features: .*\[B, d\], got float"),
            (dict(image_features=torch.zeros(5, 9)), ValueError, "gate: expected d = 9"),
            (
                dict(image_features=torch.zeros(5, 8, requires_grad=True)),
                ValueError,
                r"image_features: .*image_features.detach\(\)",
            ),
            (dict(gate=torch.zeros(8)), ValueError, r"gate: .*\[d, H\]"),
            (dict(gate=torch.zeros(8, 5)), ValueError, "hard_text_features: expected H = 5"),
            (
                dict(gate=torch.zeros(8, 6, device="meta")),
                ValueError,
                "gate: expected device cpu",
            ),
            (dict(hard_text_features=torch.zeros(6, 8)), ValueError, "hard_text_features: "),
            (dict(hard_text_features=torch.zeros(6, 0, 8)), ValueError, "hard_text_features: "),
            (
                dict(hard_text_features=torch.zeros(6, 7, 8, requires_grad=True)),
                ValueError,
                r"hard_text_features: .*hard_text_features.detach\(\)",
            ),
            (dict(student_logits=torch.zeros(5, 8)), ValueError, "student_logits: .*C = 7"),
            (dict(student_logits=torch.zeros(4, 7)), ValueError, "student_logits: .*B = 5"),
            (dict(labels=torch.zeros(5)), TypeError, r"labels: .*torch.int64 \[B\]"),
            (dict(labels=torch.zeros(5, dtype=torch.int32)), TypeError, "labels: "),
            (dict(labels=torch.zeros(4, dtype=torch.int64)), ValueError, "labels: .*B = 5"),
            (dict(logit_scale=0.0), ValueError, "logit_scale: "),
            (dict(logit_scale=None), TypeError, "logit_scale: "),
            (
                dict(logit_scale=torch.tensor(1.0, requires_grad=True)),
                ValueError,
                r"logit_scale: .*logit_scale.detach\(\)",
            ),
            (dict(temperature=-1.0), ValueError, "temperature: "),
            (dict(top_k=7), ValueError, "top_k: .*1 to 6"),
            (dict(top_k=0), ValueError, "top_k: .*1 to 6"),
            (dict(reduction="batchmean"), ValueError, "reduction: "),
        ],
    )
    def test_each_names_its_argument(self, change, error, message):
        with pytest.raises(error, match=f"^{message}"):
            gated_mixture_loss(**problem(**change))

    def test_an_empty_batch(self):
        with pytest.raises(ValueError, match="image_features: expected at least one element"):
            gated_mixture_loss(**problem(batch=0))

    @pytest.mark.parametrize("checked", ["0", "1"])
    @pytest.mark.parametrize("dtype", [F64, F32], ids=str)
    @pytest.mark.parametrize("label", [-1, 7])
    def test_labels_out_of_range(self, label, dtype, checked, monkeypatch):
        monkeypatch.setenv("VLFAST_CHECK", checked)
        labels = torch.full((5,), label)
        message = f"^labels: expected values from 0 to 6, got {label}"
        with pytest.raises(ValueError, match=message):
            gated_mixture_loss(**problem(dtype=dtype, labels=labels))
        with backends.reference_only(), pytest.raises(ValueError, match=message):
            gated_mixture_loss(**problem(dtype=dtype, labels=labels))

    def test_where_labels_cannot_be_read_only_their_images_suffer(self):
        arguments = in_order(problem(labels=torch.tensor([0, 7, 2, -1, 4])))
        distillation, selection = reference.gated_mixture(*arguments)
        assert distillation.isfinite().all()
        assert selection.isnan().tolist() == [False, True, False, True, False]

    def test_the_scale_is_not_optional(self):
        arguments = problem()
        del arguments["logit_scale"]
        with pytest.raises(TypeError, match="logit_scale"):
            gated_mixture_loss(**arguments)
