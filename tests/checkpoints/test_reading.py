"""Files of torch.save are read, and nothing in them is run."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import sys
import tarfile
import warnings
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from torch import nn

from tests.checkpoints.lookalikes import ConstantWarmupScheduler, dassl_is_there, training_state
from vlfast.checkpoints.reading import checkpoint_file, read_checkpoint
from vlfast.errors import VlfastError

BOTH = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def write(file, legacy=False, **besides):
    held = {"state_dict": OrderedDict(ctx=torch.arange(6.0).reshape(2, 3)), "epoch": 3, **besides}
    with dassl_is_there(ConstantWarmupScheduler):
        torch.save(held, file, _use_new_zipfile_serialization=not legacy)
    return file


@BOTH
def test_what_dassl_saves(legacy, tmp_path):
    optimizer, scheduler = training_state(nn.Linear(3, 2))
    state = OrderedDict(
        [
            ("module.ctx", nn.Parameter(torch.arange(6.0).reshape(2, 3))),
            ("half", torch.tensor([0.5, -2.0]).half()),
            ("view", torch.arange(12.0).reshape(3, 4).T[1:3]),
            ("count", torch.tensor(7)),
            ("empty", torch.zeros(0, 3)),
            ("bf16", torch.tensor([1.5]).bfloat16()),
        ]
    )
    file = write(
        tmp_path / "model.pth.tar-3",
        legacy,
        state_dict=state,
        epoch=np.int64(3),
        optimizer=optimizer.state_dict(),
        scheduler={"successor": scheduler, "whole": optimizer, **vars(scheduler)},
        val_result=np.float32(81.5),
        more=[np.float64(2.5), np.bool_(True), defaultdict(list), torch.Size([2]), {1, 2}],
    )
    assert "dassl" not in sys.modules
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_checkpoint(file)
    assert found.epoch == 3 and next(iter(found.tensors)) == "ctx"
    for name, tensor in state.items():
        assert torch.equal(found.tensors[name.removeprefix("module.")], tensor)
        assert found.tensors[name.removeprefix("module.")].dtype == tensor.dtype


@BOTH
def test_numpy_scalars_keep_their_value(legacy, tmp_path):
    for value in (np.int64(-5), np.uint8(5), np.float64(5.0)):
        found = read_checkpoint(write(tmp_path / "x", legacy, epoch=value))
        assert found.epoch == (5 if value.dtype == np.uint8 else None)


class Calls:
    """Pickles as a call of what ``name`` names."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def stream(module, name, argument="'touched'"):
    """A pickle, in protocol 0, that calls module.name with one argument."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


def as_zip(file, pickled):
    """A zip file of torch.save whose pickle is replaced."""
    write(file)
    reader = torch._C.PyTorchFileReader(str(file))
    names = [name for name in reader.get_all_records() if not name.startswith(".data/")]
    records = {name: reader.get_record(name) for name in names}
    del reader
    records["data.pkl"] = pickled
    writer = torch._C.PyTorchFileWriter(str(file))
    for name in names:
        if name not in ("version", ".format_version", ".storage_alignment"):
            writer.write_record(name, records[name], len(records[name]))
    writer.write_end_of_file()
    return file


def as_legacy(file, pickled):
    """A file of the format before torch 1.6 with this pickle behind its header."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(1)}, buffer, _use_new_zipfile_serialization=False)
    buffer.seek(0)
    for _ in range(3):
        pickle.load(buffer)
    file.write_bytes(buffer.getvalue()[: buffer.tell()] + pickled)
    return file


@pytest.mark.parametrize("place", [as_zip, as_legacy])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("subprocess", "Popen"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("builtins", "getattr"),
        ("__builtin__", "eval"),
        ("builtins", "__import__"),
        ("builtins", "open"),
        ("torch.hub", "load"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch.jit", "load"),
        ("torch._utils", "sys.modules"),
        ("torch._utils", "torch.load"),
        ("torch._utils", "_rebuild_wrapper_subclass"),
        ("torch._tensor", "_rebuild_from_type_v2"),
        ("torch.utils", "collect_env.run"),
        ("collections", "OrderedDict.fromkeys"),
        ("collections", "_sys.modules"),
        ("collections", "namedtuple"),
        ("numpy", "load"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "frombuffer"),
        ("functools", "partial"),
        ("operator", "attrgetter"),
        ("codecs", "decode"),
        ("pickle", "loads"),
        ("copyreg", "_reconstructor"),
        ("torch.optimist", "run"),
        ("dassl.optimal", "run"),
        ("dassl", "optim.os.system"),
        ("Storage.os", "system"),
        ("os", "systemStorage"),
    ],
)
def test_anything_else_is_refused_by_its_name(place, module, name, tmp_path):
    file = place(tmp_path / "model.pth.tar-1", stream(module, name))
    with pytest.raises(VlfastError) as refused:
        read_checkpoint(file)
    assert f"{name}, which has no place in such a file; nothing of it was run" in str(refused.value)


@BOTH
def test_commands_are_not_run(legacy, tmp_path):
    trace = tmp_path / "trace"
    for evil in (
        Calls(os.system, f"touch {trace}"),
        Calls(eval, f"open({str(trace)!r}, 'w').close()"),
        Calls(getattr, "text", "upper"),
    ):
        for place in ("scheduler", "epoch"):
            file = write(tmp_path / "x", legacy, **{place: evil})
            with pytest.raises(VlfastError, match="asks for .*; nothing of it was run"):
                read_checkpoint(file)
    assert not trace.exists()


@pytest.mark.parametrize("place", [as_zip, as_legacy])
def test_admitted_rooms_stay_inert(place, tmp_path):
    """Names below torch.optim import nothing and do nothing, whatever they are."""
    trace = tmp_path / "trace"
    evil = stream("torch.optim", "sys.modules.get", f"touch {trace}")
    for pickled in (evil, stream("dassl.optim.os", "system", f"touch {trace}")):
        with pytest.raises(VlfastError, match="has no state_dict|truncated or damaged|no pickle"):
            read_checkpoint(place(tmp_path / "x", pickled))
    assert not trace.exists() and "dassl" not in sys.modules


def test_what_a_pickle_sets_on_what_it_is_given_is_gone(tmp_path):
    """BUILD sets attributes of functions and classes; the next file gets new ones."""
    sets = b"ctorch._utils\n_rebuild_tensor_v2\n(N}V__defaults__\n(I1\ntstb."
    with pytest.raises(VlfastError):
        read_checkpoint(as_zip(tmp_path / "evil", sets))
    on_class = b"ccollections\nOrderedDict\n(N}Vget\nI1\nstb."
    with pytest.raises(VlfastError):
        read_checkpoint(as_zip(tmp_path / "evil", on_class))
    assert OrderedDict(a=1).get("a") == 1
    assert read_checkpoint(write(tmp_path / "good")).epoch == 3


@pytest.mark.parametrize("code", ["O8", "O", "V8", "U4", "M8", "f1", "i16", "<f8,<f8"])
def test_numpy_scalars_are_numbers(code, tmp_path):
    pickled = (
        f"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(V{code}\nI0\nI1\ntR"
        "c_codecs\nencode\n(Vabcdefgh\nVlatin1\ntRtR."
    )
    with pytest.raises(VlfastError, match="NumPy scalar of type .*, expected a number"):
        read_checkpoint(as_zip(tmp_path / "x", pickled.encode()))


def test_dtypes_are_never_numpys_own(tmp_path):
    """A made-up state of a real dtype could read any memory."""
    pickled = (
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(Vf8\nI0\nI1\ntR"
        b"(I3\nV<\nNNNI100\nI-1\nI63\ntb"
        b"c_codecs\nencode\n(Vab\nVlatin1\ntRtR."
    )
    with pytest.raises(VlfastError, match="damaged or is no pickle"):
        read_checkpoint(as_zip(tmp_path / "x", pickled))


@pytest.mark.parametrize("size", [7, 10**6, -1])
def test_tensors_beyond_their_storage(size, tmp_path):
    pickled = (
        f"ctorch._utils\n_rebuild_tensor_v2\n((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI6\nt"
        f"QI0\n(I{size}\nt(I1\ntI00\nccollections\nOrderedDict\n(tRtR."
    )
    with pytest.raises(VlfastError, match="a tensor reaches beyond what is stored of it"):
        read_checkpoint(as_zip(tmp_path / "x", pickled.encode()))


def test_programs_and_archives_are_refused(tmp_path):
    program = tmp_path / "program"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(program))
    with pytest.raises(VlfastError, match="is a TorchScript program"):
        read_checkpoint(program)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(__file__, arcname="\x80storages")
    with pytest.raises(VlfastError):
        read_checkpoint(tmp_path / "x.tar")


@BOTH
def test_truncated_files(legacy, tmp_path):
    whole = write(tmp_path / "whole", legacy).read_bytes()
    cut = tmp_path / "cut"
    for length in (*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(VlfastError) as refused:
            read_checkpoint(cut)
        assert str(cut) in str(refused.value) and "\n" not in str(refused.value)


def test_foreign_files(tmp_path):
    for content in (b"", b"\x89PNG\r\n", b"PK\x05\x06" + bytes(18), b"\x80", b"PK\x03\x04abc"):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(VlfastError, match="no file of torch.save|truncated|damaged"):
            read_checkpoint(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_checkpoint(tmp_path / "gone")
    for held in ([1], {"ctx": torch.ones(1)}, {"state_dict": {}}, {"state_dict": [1]}):
        torch.save(held, tmp_path / "x")
        with pytest.raises(VlfastError, match="has no state_dict; expected a file that Dassl"):
            read_checkpoint(tmp_path / "x")
    for state in ({"ctx": 3}, {1: torch.ones(1)}):
        with pytest.raises(VlfastError, match="expected tensors by name"):
            read_checkpoint(write(tmp_path / "x", state_dict=state))


def test_which_file_of_a_folder(tmp_path):
    folder = tmp_path / "out" / "prompt_learner"
    folder.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"holds no model\.pth\.tar-EPOCH"):
        checkpoint_file(tmp_path / "out")
    ten = write(folder / "model.pth.tar-10")
    assert checkpoint_file(tmp_path / "out") == checkpoint_file(folder) == ten
    fifty = write(folder / "model.pth.tar-50")
    with pytest.raises(VlfastError, match="say which, with --epoch"):
        checkpoint_file(folder)
    (folder / "checkpoint").write_text("model.pth.tar-50\n")
    assert checkpoint_file(tmp_path / "out") == fifty
    assert checkpoint_file(folder, 10) == checkpoint_file(folder, "10") == ten
    with pytest.raises(FileNotFoundError, match=r"there are model\.pth\.tar-10, model\.pth\."):
        checkpoint_file(folder, 20)
    best = write(folder / "model-best.pth.tar")
    assert checkpoint_file(folder, "best") == best
    (folder / "checkpoint").write_text("../../elsewhere\n")
    with pytest.raises(VlfastError, match="say which"):
        checkpoint_file(folder)
    with pytest.raises(VlfastError, match="is one file, so there is no epoch"):
        checkpoint_file(ten, 10)
    shutil.copytree(folder, tmp_path / "out" / "VLPromptLearner")
    with pytest.raises(VlfastError, match=r"several models \(VLPromptLearner, prompt_learner\)"):
        checkpoint_file(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        checkpoint_file(tmp_path / "gone")
