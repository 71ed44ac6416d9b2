"""Files of `torch.save` from strangers: no code is run, no memory is taken, and what is wrong is said in a line."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import resource
import warnings
import zipfile

import pytest
import torch
from builders import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard.cli.health import examine
from lightning_gradguard.files.torch_files import UnreadableError, load_plain, parts_of
from lightning_gradguard.forensics.bundle import Bundle, versions

ALERT = {"kind": "nonfinite", "step": 3, "action": "skip", "message": "m", "remedy": "r", "parameters": [], "culprit": None}


class Calls:
    """Is pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def saved(tmp_path, content, **settings):
    """A file of it."""
    torch.save(content, tmp_path / "a.pt", **settings)
    return tmp_path / "a.pt"


def nested(depth, *, twice=False):
    """A list in a list; twice in each."""
    tree = [1]
    for _ in range(depth):
        tree = [tree, tree] if twice else [tree]
    return tree


def endless():
    """A list that holds itself."""
    tree = []
    tree.append(tree)
    return tree


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """The archive with its pickle changed."""
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)


def all_sorts():
    """Tensors of every kind that torch reads without running code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some kinds are in beta, or on their way out
        return {
            "w": torch.ones(3),
            "half": torch.ones(2).half(),
            "parameter": nn.Parameter(torch.ones(2)),
            "sparse": torch.ones(2).to_sparse(),
            "rows": torch.eye(2).to_sparse_csr(),
            "columns": torch.eye(2).to_sparse_csc(),
            "expanded": torch.ones(1).expand(10**12),
            "meta": torch.ones(10**6, device="meta"),
            "float8": torch.ones(3).to(torch.float8_e4m3fn),
            "complex": torch.ones(2, dtype=torch.complex64),
            "quantized": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
            "bytes": bytearray(b"x"),
            "n": 1,
        }


TREE = all_sorts()


@pytest.mark.parametrize("is_archive", [True, False])
def test_tensors_of_all_sorts_are_read_and_examined(is_archive, tmp_path):
    """In both of torch's formats; an expanded one is looked at once for each number that is stored."""
    tree = dict(TREE)
    if not is_archive:
        del tree["float8"]  # torch itself can't read it in the older format
    content = load_plain(saved(tmp_path, tree, _use_new_zipfile_serialization=is_archive))
    assert content.keys() == tree.keys()
    health = examine(content)
    assert health.findings == ()
    assert health.num_elements == 3 + 2 + 2 + 2 + 2 + 2 + 1 + 3 * is_archive + 4


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: {"a": Calls(os.system, "touch pwned")}, r"holds posix\.system"),
        (lambda: nn.Linear(1, 1), r"holds torch\.nn\.modules\.linear\.Linear"),
        (endless, "is endless"),
        (lambda: nested(60, twice=True), "is endless"),
        (lambda: nested(300), "nested too deeply"),
        (lambda: Calls(torch.FloatTensor, 10**15), "more than there is memory for"),
        (lambda: Calls(bytearray, 10**10), "claims 10,000,000,000 bytes"),
    ],
)
def test_file_that_does_harm_is_refused_in_a_line(make, said, tmp_path, monkeypatch):
    """Without torch's advice to let it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnreadableError, match=said) as refused:
        load_plain(saved(tmp_path, make()))
    assert "weights_only" not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "pwned").exists()


def test_archive_that_is_compressed_is_refused(tmp_path):
    """A hundred MiB of zeros in a file of a hundred KiB."""
    path = saved(tmp_path, {"w": torch.zeros(100 * 2**18)})
    rewritten(path, lambda content: content, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**18
    with pytest.raises(UnreadableError, match="is compressed"):
        load_plain(path)


def test_tensor_that_claims_more_than_its_part_of_the_file_is_refused(tmp_path):
    """Torch itself would read beyond the end of its memory."""
    path = saved(tmp_path, {"w": torch.ones(3)})
    rewritten(path, lambda content: content.replace(b"K\x03tq", b"K\xfftq", 1))
    with pytest.raises(UnreadableError, match="claims a tensor of 1,020 bytes"):
        load_plain(path)


def test_archive_of_something_else_is_refused(tmp_path):
    """No pickle, or two; and one that only claims to be large."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(UnreadableError, match=r"none of torch\.save"):
        load_plain(path)
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02") + 24
    content[at : at + 4] = (10**9).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(UnreadableError, match="claims to hold more than its"):
        load_plain(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", pickle.dumps(Calls(os.system, "touch pwned"))])
def test_file_that_is_none_of_torch_is_said(content, tmp_path, monkeypatch):
    """Empty, cut, or a bare pickle."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UnreadableError, match=r"damaged, or no file of torch\.save"):
        load_plain(tmp_path / "a.pt")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: None])
def test_what_is_no_file_is_said(make, tmp_path):
    """A folder, a named pipe, and nothing at all."""
    make(tmp_path / "a.pt")
    with pytest.raises(UnreadableError, match=r"no regular file|No such file"):
        load_plain(tmp_path / "a.pt")


def bundle_file(folder):
    """A real one."""
    net = nn.Linear(2, 1)
    entry = {"batch": torch.ones(2, 2), "batch_idx": 0, "rng": torch.get_rng_state(), "cuda_rng": None}
    Bundle(ALERT, {}, versions(), batches=[entry], model=net.state_dict()).save(folder / "a.bundle.pt")
    return folder / "a.bundle.pt"


def test_bundle_is_for_its_owner_alone(tmp_path):
    """It holds data."""
    before = os.umask(0)
    try:
        assert bundle_file(tmp_path).stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"alert": 5}, "alert is damaged"),
        ({"alert": {}}, "alert is damaged: `kind` is missing"),
        ({"alert": None}, "alert is damaged"),
        ({"versions": {"a": 1}}, "`versions` is damaged"),
        ({"guard": []}, "`guard` is damaged"),
        ({"batches": {"a": 1}}, "`batches` is damaged"),
        ({"batches": [1]}, "`batches` is damaged"),
        ({"batches": [{"batch": 1, "batch_idx": "a", "rng": torch.ones(1)}]}, "`batches` is damaged"),
        ({"model": [1]}, "`model` is damaged"),
        ({"optimizer": 1}, "`optimizer` is damaged"),
        ({"left_out": [1]}, "`left_out` is damaged"),
        ({"motions": [{"name": "w"}]}, "`motions` is damaged"),
        ({"motions": [{"name": 1, "norm": 1.0, "before": None, "num_steps": 1, "update": 1.0}]}, "`motions` is damaged"),
        ({"gradguard_bundle": 2}, "not a bundle of format 1"),
    ],
)
def test_bundle_with_a_damaged_part_is_refused_by_its_name(changed, said, tmp_path):
    """Before anything is done with it."""
    content = torch.load(bundle_file(tmp_path), weights_only=True)
    with pytest.raises(UnreadableError, match=said):
        Bundle.load(saved(tmp_path, {**content, **changed}))


def test_bundle_with_fields_of_a_later_version_is_read(tmp_path):
    """They are passed over, also those that are named like a method."""
    content = torch.load(bundle_file(tmp_path), weights_only=True)
    assert Bundle.load(saved(tmp_path, {**content, "save": 1, "later": 2})).alert == ALERT


def mutated(content, chance):
    """Some bytes changed, cut, doubled or moved."""
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at, length = chance.randrange(len(content)), chance.choice((1, 1, 4, 64))
        kind = chance.randrange(5)
        if kind == 0:
            content[at : at + length] = chance.randbytes(length)
        elif kind == 1:
            del content[at : at + length]
        elif kind == 2:
            content[at:at] = content[at : at + length]
        elif kind == 3:
            content[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
        else:
            del content[at:]
        if not content:
            return b""
    return bytes(content)


def survives(path):
    """A file is read, and examined, or refused."""
    with contextlib.suppress(UnreadableError):
        examine(load_plain(path))
    with contextlib.suppress(UnreadableError):
        Bundle.load(path)


@examples
@given(st.binary(max_size=300))
def test_any_bytes_are_refused(tmp_path_factory, content):
    """Whatever stands in the file."""
    path = tmp_path_factory.mktemp("any") / "a.pt"
    path.write_bytes(content)
    survives(path)


@pytest.mark.parametrize("number", [200, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_mutations_of_real_files_are_read_or_refused(number, tmp_path):
    """A bundle and a checkpoint, in both formats; no crash, and no memory taken."""
    files = [bundle_file(tmp_path).read_bytes(), saved(tmp_path, TREE).read_bytes()]
    files.append(
        saved(tmp_path, {"w": torch.ones(3), "n": [1, {"a": 2.0}]}, _use_new_zipfile_serialization=False).read_bytes()
    )
    chance = random.Random(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(number):
        path = tmp_path / "mutated.pt"
        path.write_bytes(mutated(chance.choice(files), chance))
        survives(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


class Own(torch.Tensor):
    """A subclass may keep its values elsewhere."""


@pytest.mark.parametrize(
    ("make", "number"),
    [
        (lambda it: it, 1),
        (torch.nn.Parameter, 1),
        (torch.Tensor.to_sparse, 2),
        (torch.Tensor.to_sparse_csr, 3),
        (torch.Tensor.to_sparse_csc, 3),
        (torch.Tensor.to_mkldnn, 0),
        (lambda it: it.as_subclass(Own), 0),
        (lambda it: torch.quantize_per_tensor(it, 0.1, 0, torch.qint8), 0),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support", "ignore:.*quantiz")
def test_parts_of_a_tensor_are_the_strided_ones_that_it_is_made_of(make, number):
    """None where that isn't known."""
    parts = parts_of(make(torch.eye(3)))
    assert len(parts) == number
    assert all(part.layout is torch.strided for part in parts)
