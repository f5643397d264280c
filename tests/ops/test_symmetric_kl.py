"""The fused symmetric KL against its definition, and as a citizen of PyTorch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.support import assert_as_precise, assert_close, gradients, normal
from vlfast._extension import extension
from vlfast.ops import backends, reference, symmetric_kl_loss

pytestmark = pytest.mark.skipif(extension() is None, reason="vlfast._C is not built here")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
REDUCTIONS = {"none": 1, "sum": 1, "batchmean": 5, "mean": 5 * 12}


def loss_and_gradients(student, teacher, scale, **options):
    """Losses of each row, and the gradients to the student and to its scale."""
    student = student.detach().requires_grad_()
    scale = scale.detach().requires_grad_()
    losses = symmetric_kl_loss(student, teacher, student_scale=scale, reduction="none", **options)
    return [losses.detach(), *gradients([losses], [student, scale])]


def exact(student, teacher, scale, **options):
    with backends.reference_only():
        return loss_and_gradients(student.double(), teacher.double(), scale.double(), **options)


def in_plain_pytorch(student, teacher, scale, **options):
    with backends.reference_only():
        return loss_and_gradients(student, teacher, scale, **options)


def assert_as_precise_as_pytorch(student, teacher, scale, **options):
    ours = loss_and_gradients(student, teacher, scale, **options)
    theirs = in_plain_pytorch(student, teacher, scale, **options)
    truth = exact(student, teacher, scale, **options)
    assert_as_precise(ours, theirs, truth)


def pair(rows, classes, distance=0.1, dtype=F64, teacher_dtype=None):
    """Cosine-like scores, the teacher's ``distance`` away from the student's."""
    student = normal(rows, classes, scale=0.1)
    teacher = student + normal(rows, classes, seed=1, scale=distance)
    return student.to(dtype), teacher.to(teacher_dtype or dtype)


class TestAccuracy:
    @pytest.mark.parametrize("distance", [0.1, 1e-3, 0.0], ids=["apart", "near", "equal"])
    @pytest.mark.parametrize(
        "shape", [(1, 1), (3, 1), (64, 3), (64, 7), (1, 513), (32, 1000), (3, 20930)], ids=str
    )
    @pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
    def test_same_dtypes(self, dtype, shape, distance):
        student, teacher = pair(*shape, distance, dtype)
        scale = torch.tensor(100.0, dtype=F64 if dtype == F64 else F32)
        assert_as_precise_as_pytorch(student, teacher, scale, teacher_scale=100.0)

    @pytest.mark.parametrize(
        "dtypes",
        [(F32, F16), (F16, F32), (BF16, F32), (F32, BF16), (BF16, F16), (F32, F64), (BF16, F64)],
        ids=str,
    )
    def test_mixed_dtypes(self, dtypes):
        student, teacher = pair(6, 101, dtype=dtypes[0], teacher_dtype=dtypes[1])
        scale = torch.tensor(50.0, dtype=F32)
        assert_as_precise_as_pytorch(student, teacher, scale, teacher_scale=20.0)

    @pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.3, 2.0), (0.0, 0.0)], ids=str)
    def test_weights_and_temperature(self, weights):
        student, teacher = pair(6, 37, dtype=F32)
        assert_as_precise_as_pytorch(
            student,
            teacher,
            torch.tensor(30.0),
            teacher_scale=torch.tensor(40.0),
            temperature=2.5,
            forward_weight=weights[0],
            reverse_weight=weights[1],
        )

    def test_offsets_of_the_logits(self):
        student, teacher = pair(6, 37)
        student, teacher = student * 100 + 50, teacher * 100 - 50
        assert_as_precise_as_pytorch(student.float(), teacher.float(), torch.tensor(1.0))

    @pytest.mark.parametrize("gap", [30.0, 90.0, 1e4, 1e30])
    def test_classes_far_below_the_others(self, gap):
        student, teacher = (x.float() for x in pair(4, 40, 1.0))
        student[:, ::3] -= gap
        teacher[:, ::2] -= gap
        results = loss_and_gradients(student, teacher, torch.tensor(1.0))
        for actual, expected in zip(
            results, exact(student, teacher, torch.tensor(1.0)), strict=True
        ):
            assert actual.isfinite().all()
            assert_close(actual, expected, 1e-6)

    @pytest.mark.parametrize("shape", [(1, 3), (3, 10), (8, 100)], ids=str)
    def test_sides_that_are_sure_of_different_classes(self, shape):
        for seed in range(20):
            student, teacher = (
                normal(*shape, seed=seed + i, dtype=F32).clamp(-1, 1) for i in (0, 1)
            )
            scale = torch.tensor(100.0)
            ours = loss_and_gradients(student, teacher, scale, teacher_scale=100.0)
            truth = exact(student, teacher, scale, teacher_scale=100.0)
            for actual, expected in zip(ours[:2], truth[:2], strict=True):
                torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)

    def test_a_sure_student_gets_no_noise_for_a_gradient(self):
        student = torch.tensor([[1e4, 0.0, 0.0]])
        teacher = torch.tensor([[0.0, 7e3, 3.0]])
        weights = {"forward_weight": 0.0, "reverse_weight": 1.0}
        _, gradient, _ = loss_and_gradients(student, teacher, torch.tensor(1.0), **weights)
        assert (gradient == 0).all()
        leaf = (student * 1e26).requires_grad_()
        (gradient,) = torch.autograd.grad(symmetric_kl_loss(leaf, teacher * 1e26), leaf)
        torch.testing.assert_close(gradient, torch.tensor([[0.5, -0.5, 0.0]]))

    def test_masked_with_the_lowest_number(self):
        student, teacher = (x.float() for x in pair(4, 40, 1.0))
        lowest = torch.finfo(F32).min
        student[:, 7] = teacher[:, 7] = teacher[:, 9] = lowest
        loss, gradient, _ = loss_and_gradients(student, teacher, torch.tensor(1.0))
        truth = exact(student, teacher, torch.tensor(1.0))
        assert gradient.isfinite().all()
        assert_close(loss, truth[0], 1e-6)
        assert_close(gradient, truth[1], 1e-6)

    def test_a_student_sure_of_what_the_teacher_masks(self):
        lowest = torch.finfo(F32).min
        student = torch.tensor([[2.0, 1.0, lowest, 0.0, 0.5, -0.5]])
        teacher = torch.tensor([[lowest, 0.5, 1.0, 0.0, 0.3, 0.1]])
        results = loss_and_gradients(student, teacher, torch.tensor(1.0))
        truth = exact(student, teacher, torch.tensor(1.0))
        for actual, expected in zip(results, truth, strict=True):
            assert_close(actual, expected, 1e-5)

    def test_hardly_any_distance_is_not_lost(self):
        """The short form E_t[t - s] - E_s[t - s] has no correct digit here."""
        student, teacher = (x.float() for x in pair(4, 100, 1e-6))
        loss = symmetric_kl_loss(student, teacher, student_scale=10.0, teacher_scale=10.0)
        truth = exact(student, teacher, torch.tensor(10.0), teacher_scale=10.0)[0].mean()
        assert truth < 1e-9
        assert_close(loss, truth, 1e-3)

    def test_every_element_is_written(self, poisoned_memory):
        for dtype in (F32, F64, BF16, F16):
            student, teacher = pair(5, 19, dtype=dtype)
            for result in loss_and_gradients(student, teacher, torch.tensor(10.0)):
                assert result.isfinite().all()


class TestBadValues:
    @pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
    @pytest.mark.parametrize("position", [0, 20, 36])
    @pytest.mark.parametrize("side", ["student", "teacher"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_they_stay_in_their_row(self, value, side, position, dtype):
        inputs = dict(zip(("student", "teacher"), pair(4, 37, dtype=dtype), strict=True))
        good = loss_and_gradients(inputs["student"], inputs["teacher"], torch.tensor(9.0))
        inputs[side][2, position] = value
        bad = loss_and_gradients(inputs["student"], inputs["teacher"], torch.tensor(9.0))
        others = [0, 1, 3]
        for before, after in zip(good[:2], bad[:2], strict=True):
            assert torch.equal(before[others], after[others])
            assert after[2].isnan().all()


class TestAutograd:
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_reductions(self, reduction):
        student, teacher = pair(5, 12)
        student.requires_grad_()
        loss = symmetric_kl_loss(student, teacher, reduction=reduction)
        rows = reference.symmetric_kl(student, teacher)
        expected = rows if reduction == "none" else rows.sum() / REDUCTIONS[reduction]
        torch.testing.assert_close(loss, expected)
        upstream = normal(*loss.shape, seed=3)
        torch.testing.assert_close(
            torch.autograd.grad(loss, student, upstream),
            torch.autograd.grad(expected, student, upstream),
        )

    @pytest.mark.parametrize("reduction", ["none", "batchmean"])
    def test_gradcheck(self, reduction):
        student, teacher = pair(3, 6, 0.5)
        scale = torch.tensor(3.0, dtype=F64)
        index = torch.tensor([5, 0, 0, 2, 1, 3])
        assert torch.autograd.gradcheck(
            lambda s, a: symmetric_kl_loss(
                s,
                teacher,
                student_scale=a,
                teacher_scale=2.0,
                temperature=1.5,
                forward_weight=0.4,
                reverse_weight=0.7,
                index=index,
                reduction=reduction,
            ),
            (student.requires_grad_(), scale.requires_grad_()),
        )

    def test_two_backwards_through_one_graph(self):
        student, teacher = pair(5, 12, dtype=F32)
        student.requires_grad_()
        loss = symmetric_kl_loss(student, teacher)
        loss.backward(retain_graph=True)
        first = student.grad.clone()
        loss.backward(torch.tensor(3.0), retain_graph=True)
        torch.testing.assert_close(student.grad, 4 * first)
        (again,) = torch.autograd.grad(loss, student)
        assert torch.equal(again, first)

    def test_what_is_done_to_a_gradient_changes_no_later_one(self):
        student, teacher = pair(5, 12, dtype=F32)
        student.requires_grad_()
        loss = symmetric_kl_loss(student, teacher)
        (first,) = torch.autograd.grad(loss, student, retain_graph=True)
        expected = first.clone()
        first.mul_(2)
        assert torch.equal(torch.autograd.grad(loss, student)[0], expected)

    def test_many_upstreams_at_once(self):
        student, teacher = pair(5, 12, dtype=F32)
        student.requires_grad_()
        upstreams = torch.tensor([1.0, 2.0, -3.0])
        loss = symmetric_kl_loss(student, teacher)
        (batched,) = torch.autograd.grad(
            loss, student, upstreams, is_grads_batched=True, retain_graph=True
        )
        (alone,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(batched, upstreams[:, None, None] * alone)

    def test_forward_mode(self):
        student, teacher = pair(5, 12)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(student, torch.ones_like(student).tril())
            loss = symmetric_kl_loss(dual, teacher)
            tangent = torch.autograd.forward_ad.unpack_dual(loss).tangent
        leaf = student.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(symmetric_kl_loss(leaf, teacher), leaf)
        torch.testing.assert_close(tangent, gradient.tril().sum())

    def test_the_raw_op_is_differentiable(self):
        student, teacher = pair(5, 12, dtype=F32)
        student.requires_grad_()
        scale = torch.tensor(3.0, requires_grad=True)
        arguments = (student, teacher, scale, None, None, 2.0, 1.0, 0.5, 0.5, True)
        losses = torch.ops.vlfast.symmetric_kl(*arguments)[0]
        expected = symmetric_kl_loss(student, teacher, student_scale=scale * 2, reduction="none")
        for actual, its in zip(
            gradients([losses], [student, scale]),
            gradients([expected], [student, scale]),
            strict=True,
        ):
            torch.testing.assert_close(actual, its)

    def test_no_gradient_is_computed_where_none_is_wanted(self):
        student, teacher = pair(5, 12, dtype=F32)
        wanted = symmetric_kl_loss(student.clone().requires_grad_(), teacher)
        assert wanted.grad_fn is not None
        unwanted = symmetric_kl_loss(student, teacher)
        with torch.no_grad():
            switched_off = symmetric_kl_loss(student.clone().requires_grad_(), teacher)
        assert not unwanted.requires_grad and not switched_off.requires_grad
        assert wanted.item() == unwanted.item() == switched_off.item()

    def test_only_the_scale_learns(self):
        student, teacher = pair(5, 12)
        scale = torch.tensor(7.0, dtype=F16, requires_grad=True)
        symmetric_kl_loss(student, teacher, student_scale=scale).backward()
        exactly = scale.detach().double().requires_grad_()
        reference.symmetric_kl(student, teacher, exactly).mean().backward()
        assert scale.grad.dtype == F16
        assert_close(scale.grad, exactly.grad, 1e-3)

    def test_second_derivatives_need_the_reference(self):
        student, teacher = pair(3, 4)
        student.requires_grad_()
        with pytest.raises(RuntimeError, match="reference_only"):
            torch.autograd.grad(symmetric_kl_loss(student, teacher), student, create_graph=True)
        with backends.reference_only():
            assert torch.autograd.gradgradcheck(lambda s: symmetric_kl_loss(s, teacher), student)


class TestInputs:
    def test_index_takes_columns_of_the_teacher(self):
        student, teacher = pair(4, 9, dtype=F32)[0], pair(4, 30, dtype=F32)[1]
        index = torch.tensor([29, 0, 3, 3, 17, 8, 1, 2, 11])
        taken = loss_and_gradients(student, teacher, torch.tensor(5.0), index=index)
        given_columns = loss_and_gradients(student, teacher[:, index], torch.tensor(5.0))
        assert all(map(torch.equal, taken, given_columns))

    @pytest.mark.parametrize("value", [-1, 30])
    def test_index_out_of_range(self, value):
        student, teacher, index = normal(2, 1), normal(2, 30), torch.tensor([value])
        with pytest.raises(ValueError, match=f"index: expected values from 0 to 29, got {value}"):
            symmetric_kl_loss(student, teacher, index=index)
        raw = (student, teacher, None, None, index, 1.0, 1.0, 0.5, 0.5, True)
        with pytest.raises(ValueError, match=f"index: expected values from 0 to 29, got {value}"):
            torch.ops.vlfast.symmetric_kl(*raw)
        assert reference.symmetric_kl(student, teacher, index=index).isnan().all()

    def test_not_contiguous(self):
        student, teacher = pair(8, 24, dtype=F32)
        strided = [
            torch.stack([student, student], 2)[..., 0],
            teacher.T.contiguous().T,
        ]
        assert not any(x.is_contiguous() for x in strided)
        scale = torch.tensor(5.0)
        results = loss_and_gradients(*strided, scale), loss_and_gradients(student, teacher, scale)
        assert all(map(torch.equal, *results))

    def test_lazily_negated_and_zero_tensors(self):
        student, teacher = pair(4, 9, dtype=F32)
        expected = symmetric_kl_loss(-student, teacher)
        torch.testing.assert_close(symmetric_kl_loss(torch._neg_view(student), teacher), expected)
        zeros = torch._efficientzerotensor((4, 9))
        expected = symmetric_kl_loss(torch.zeros(4, 9), teacher)
        torch.testing.assert_close(symmetric_kl_loss(zeros, teacher), expected)

    def test_inputs_are_not_written(self):
        student, teacher = pair(8, 24, dtype=F32)
        copies = student.clone(), teacher.clone()
        loss_and_gradients(student, teacher, torch.tensor(5.0))
        assert torch.equal(student, copies[0]) and torch.equal(teacher, copies[1])

    def test_the_number_of_threads_changes_no_bit(self):
        student, teacher = pair(37, 501, dtype=F32)
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                results.append(loss_and_gradients(student, teacher, torch.tensor(80.0)))
        finally:
            torch.set_num_threads(before)
        for others in results[1:]:
            assert all(map(torch.equal, results[0][:2], others[:2]))

    def test_empty_batches_only_in_the_raw_op(self):
        none = torch.empty(0, 7)
        with pytest.raises(ValueError, match="student: expected at least one element"):
            symmetric_kl_loss(none, none)
        raw = torch.ops.vlfast.symmetric_kl(none, none, None, None, None, 1.0, 1.0, 0.5, 0.5, True)
        assert [list(x.shape) for x in raw] == [[0], [0, 7], [0]]

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"student": [1.0]}, TypeError, "student: expected a floating tensor"),
            ({"student": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "student: expected a fl"),
            ({"student": torch.ones(4)}, ValueError, "student: expected a floating tensor"),
            ({"teacher": torch.ones(2, 4)}, ValueError, "teacher: expected B = 3"),
            ({"teacher": torch.ones(3, 5)}, ValueError, "teacher: expected K = 4"),
            ({"teacher": torch.ones(3, 4, requires_grad=True)}, ValueError, "teacher.detach()"),
            ({"teacher": torch.ones(3, 4, device="meta")}, ValueError, "teacher: expected device"),
            ({"index": torch.ones(4)}, TypeError, "index: expected a tensor torch.int64"),
            ({"index": torch.zeros(5, dtype=torch.int64)}, ValueError, "index: expected K = 4"),
            ({"student_scale": 0.0}, ValueError, "student_scale: expected a finite number > 0"),
            ({"student_scale": torch.ones(1)}, ValueError, "student_scale: expected a finite"),
            ({"student_scale": "100"}, TypeError, "student_scale: expected a finite"),
            (
                {"teacher_scale": torch.tensor(1.0, requires_grad=True)},
                ValueError,
                "teacher_scale.detach()",
            ),
            ({"temperature": -1.0}, ValueError, "temperature: expected a finite number > 0"),
            ({"temperature": 1e-40}, ValueError, "temperature: expected a finite number > 0"),
            (
                {"temperature": torch.tensor(1.0, device="meta")},
                ValueError,
                "temperature: expected device cpu",
            ),
            ({"student_scale": 10**400}, ValueError, "student_scale: expected a finite number"),
            ({"student": torch.ones(3, 4).to_sparse()}, TypeError, "student: expected a floating"),
            ({"reduction": ["mean"]}, ValueError, "reduction: expected one of none"),
            ({"forward_weight": -1.0}, ValueError, "forward_weight: expected a finite number >= 0"),
            ({"reverse_weight": None}, TypeError, "reverse_weight: expected a finite number >= 0"),
            ({"reduction": "average"}, ValueError, "reduction: expected one of none, sum"),
        ],
        ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
    )
    def test_errors(self, changes, error, message):
        arguments = {"student": torch.ones(3, 4), "teacher": torch.ones(3, 4)} | changes
        with pytest.raises(error) as raised:
            symmetric_kl_loss(**arguments)
        assert message in str(raised.value)

    def test_values_are_checked_where_asked_for(self, monkeypatch):
        monkeypatch.setenv("VLFAST_CHECK", "1")
        student, teacher = pair(3, 4)
        with pytest.raises(ValueError, match="student_scale: expected a finite number > 0"):
            symmetric_kl_loss(student, teacher, student_scale=torch.tensor(-1.0))


class TestProperties:
    @given(
        seed=st.integers(0, 2**16),
        rows=st.integers(1, 4),
        classes=st.integers(1, 70),
        size=st.sampled_from([1e-4, 1.0, 30.0]),
        dtype=st.sampled_from([F32, F64, BF16, F16]),
    )
    def test_divergence(self, seed, rows, classes, size, dtype):
        a = normal(rows, classes, seed=seed, scale=size, dtype=dtype)
        b = normal(rows, classes, seed=seed + 1, scale=size, dtype=dtype)

        def losses(a, b, forward=1.0, reverse=1.0):
            options = {"forward_weight": forward, "reverse_weight": reverse, "reduction": "none"}
            return symmetric_kl_loss(a, b, **options)

        assert (losses(a, b, 1.0, 0.0) >= 0).all() and (losses(a, b, 0.0, 1.0) >= 0).all()
        assert (losses(a, a) == 0).all()
        torch.testing.assert_close(losses(a, b), losses(b, a), rtol=1e-4, atol=1e-10)
        torch.testing.assert_close(
            losses(a, b, 1.0, 0.0), losses(b, a, 0.0, 1.0), rtol=1e-4, atol=1e-10
        )
        wide_a, wide_b = a.double(), b.double()
        torch.testing.assert_close(
            losses(wide_a + 9, wide_b - 50), losses(wide_a, wide_b), rtol=1e-6, atol=1e-12
        )


class TestInPyTorch:
    @pytest.mark.parametrize("dtypes", [(F32, F32), (F64, F32), (BF16, BF16), (F16, BF16)], ids=str)
    @pytest.mark.parametrize("with_gradient", [True, False])
    def test_opcheck(self, dtypes, with_gradient):
        student, teacher = pair(4, 9, dtype=dtypes[0], teacher_dtype=dtypes[1])
        index = torch.arange(9).flip(0)
        scale = torch.tensor(3.0)
        for arguments in (
            (student, teacher, None, None, None),
            (student, teacher, scale, scale, index),
            (student.T.contiguous().T, teacher, None, None, None),
            (student[:0], teacher[:0], None, None, None),
        ):
            torch.library.opcheck(
                torch.ops.vlfast.symmetric_kl, (*arguments, 2.0, 1.0, 0.5, 0.5, with_gradient)
            )

    @pytest.mark.parametrize("reduction", ["none", "batchmean"])
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile(self, reduction, dynamic):
        torch.compiler.reset()

        def loss(student, teacher, scale):
            return symmetric_kl_loss(
                student.sin(),
                teacher.sin(),
                student_scale=scale,
                teacher_scale=20.0,
                temperature=2.0,
                reduction=reduction,
            )

        compiled = torch.compile(loss, fullgraph=True)
        for rows in (4, 6):
            student, teacher = pair(rows, 30, dtype=F32)
            results = []
            for function in (loss, compiled):
                leaf = student.clone().requires_grad_()
                if dynamic:
                    torch._dynamo.mark_dynamic(leaf, 0)
                    torch._dynamo.mark_dynamic(teacher, 0)
                scale = torch.tensor(20.0, requires_grad=True)
                output = function(leaf, teacher, scale)
                upstream = normal(*output.shape, seed=3, dtype=F32)
                output.backward(upstream)
                results.append([output.detach(), leaf.grad, scale.grad])
            for eager, traced in zip(*results, strict=True):
                torch.testing.assert_close(eager, traced, rtol=1e-5, atol=1e-7)

    def test_compile_in_the_reference(self):
        torch.compiler.reset()
        student, teacher = pair(4, 30, dtype=F32)
        compiled = torch.compile(symmetric_kl_loss, fullgraph=True)
        expected = symmetric_kl_loss(student, teacher)
        with backends.reference_only():
            torch.testing.assert_close(compiled(student, teacher), expected)
        torch.testing.assert_close(compiled(student, teacher), expected)

    def test_autocast(self):
        features, text = normal(6, 32, dtype=F32), normal(11, 32, seed=1, dtype=F32)
        teacher = normal(6, 11, seed=2, dtype=F32)
        text.requires_grad_()
        results = []
        for context in (backends.reference_only(), torch.no_grad()):
            with context, torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
                student = features @ text.T
                assert student.dtype == BF16
                loss = symmetric_kl_loss(student, teacher, student_scale=0.5)
            results.append([loss, *torch.autograd.grad(loss, text)])
        assert results[1][0].dtype == F32
        assert_close(results[1][0], results[0][0], 1e-5)
        assert_close(results[1][1], results[0][1], 1e-2)

    def test_function_transforms(self):
        student, teacher = pair(5, 12)

        def loss(student):
            return symmetric_kl_loss(student, teacher)

        leaf = student.clone().requires_grad_()
        expected = torch.autograd.grad(loss(leaf), leaf)[0]
        torch.testing.assert_close(torch.func.grad(loss)(student), expected)
        stacked = torch.vmap(loss)(student.expand(3, 5, 12))
        torch.testing.assert_close(stacked, loss(student).expand(3))

    def test_tensors_as_numbers(self):
        student, teacher = pair(5, 12)
        temperature = torch.tensor(2.0, dtype=F64, requires_grad=True)
        loss = symmetric_kl_loss(student, teacher, temperature=temperature)
        torch.testing.assert_close(loss, symmetric_kl_loss(student, teacher, temperature=2.0))
        assert torch.autograd.grad(loss, temperature)[0].isfinite()

    def test_other_devices(self):
        student = torch.ones(3, 4, device="meta", requires_grad=True)
        assert symmetric_kl_loss(student, student.detach(), reduction="none").shape == (3,)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or backends.why_no_kernel("symmetric_kl", "cuda") is not None,
    reason="no CUDA device that vlfast._C was built for",
)
class TestOnGpu:
    @pytest.mark.parametrize("distance", [0.1, 1e-3], ids=["apart", "near"])
    @pytest.mark.parametrize(
        "shape", [(3, 1), (5, 7), (9, 33), (7, 398), (8, 397), (32, 1000), (64, 20930)], ids=str
    )
    @pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
    def test_accuracy(self, dtype, shape, distance):
        student, teacher = (x.cuda() for x in pair(*shape, distance, dtype))
        scale = torch.tensor(100.0, dtype=F64 if dtype == F64 else F32, device="cuda")
        results = [
            function(student, teacher, scale, teacher_scale=100.0)
            for function in (loss_and_gradients, in_plain_pytorch, exact)
        ]
        assert_as_precise(*(x[:1] for x in results))
        # A difference of probabilities times the scale, and they are rounded.
        assert_as_precise(*(x[1:] for x in results), smallest=1.0)

    def test_index_and_misaligned_rows(self):
        student = normal(4 * 9 + 1, dtype=F32).cuda()[1:].view(4, 9)
        teacher, index = normal(4, 30, seed=1, dtype=F32).cuda(), torch.randperm(30)[:9].cuda()
        assert_as_precise_as_pytorch(student, teacher, torch.tensor(5.0).cuda(), index=index)

    @pytest.mark.parametrize("column", [-1, 30, 2**40])
    def test_index_outside_the_teacher(self, column, monkeypatch):
        monkeypatch.setenv("VLFAST_CHECK", "0")
        student, teacher = normal(4, 9, dtype=F32).cuda(), normal(4, 30, seed=1, dtype=F32).cuda()
        index = torch.arange(9)
        index[5] = column
        results = loss_and_gradients(
            student, teacher, torch.tensor(5.0).cuda(), index=index.cuda(), teacher_scale=5.0
        )
        assert all(result.isnan().all() for result in results)

    def test_scales_on_the_gpu(self):
        student, teacher = (x.cuda() for x in pair(6, 1001, dtype=F32))
        scale, teacher_scale = torch.tensor(50.0).cuda(), torch.tensor(40.0).cuda()
        assert_as_precise_as_pytorch(
            student, teacher, scale, teacher_scale=teacher_scale, temperature=2.0
        )
        read = symmetric_kl_loss(student, teacher, student_scale=scale, teacher_scale=teacher_scale)
        given = symmetric_kl_loss(student, teacher, student_scale=50.0, teacher_scale=40.0)
        assert torch.equal(read, given)

    def test_the_same_bits_every_time(self):
        student, teacher = (x.cuda() for x in pair(64, 1000, dtype=BF16))
        results = [
            loss_and_gradients(student, teacher, torch.tensor(80.0).cuda()) for _ in range(3)
        ]
        for others in results[1:]:
            assert all(map(torch.equal, results[0], others))

    def test_bad_values_stay_in_their_row(self):
        student, teacher = (x.cuda() for x in pair(4, 1000, dtype=F32))
        for value in (float("nan"), float("inf"), -float("inf")):
            teacher[2, 999] = value
            loss, gradient, _ = loss_and_gradients(student, teacher, torch.tensor(9.0).cuda())
            assert loss[2].isnan() and gradient[2].isnan().all()
            assert loss[[0, 1, 3]].isfinite().all() and gradient[[0, 1, 3]].isfinite().all()

    def test_no_host_synchronisation(self):
        student, teacher = (x.cuda() for x in pair(32, 1000, dtype=F32))
        student.requires_grad_()
        scale = torch.tensor(9.0, device="cuda", requires_grad=True)
        torch.cuda.set_sync_debug_mode("error")
        try:
            symmetric_kl_loss(student, teacher, student_scale=scale).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_cuda_graph(self):
        student, teacher = (x.cuda() for x in pair(32, 1000, dtype=F32))
        symmetric_kl_loss(student, teacher)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = symmetric_kl_loss(student, teacher)
        student.copy_(teacher)
        graph.replay()
        assert loss.item() == 0
