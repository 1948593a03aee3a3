"""Every kind of file that is read, damaged in thousands of ways: it is read as it is, or refused in
one line that names it.

A case is a number: its kind of file, its damage and its random choices follow from it, and a
failure names it. In all cases memory is limited to what the process has plus 1.5 GB, time to 20
seconds, and no code of a file may run (it would leave a marker).
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import traceback
import warnings
import zipfile

import numpy as np
import pytest
import scipy.io
import torch
from conftest import DIGITS
from data_helper import INTERNAL, write_cifar
from PIL import Image

import extract_features
import train_at
import train_diffusion
from common import cli, data, models, run
from evaluation import compare, image_list, verdicts
from generate_synthetic import check_generates
from published import image_files
from published.datasets import DATASETS
from published.synthetic import open_synthetic
from published.weights import load_classifier, load_weights
from teachers import edm
from teachers.load import load_diffusion

SAMPLE, FULL = 20, 300  # cases per kind
SHORT_AT = ["--batch-size", "400", "--n-steps", "1", "--eval-n-steps", "1", "--eval-every", "1"]
BIG = 1_500_000_000


# ------------------------------------------------------------------------------------------ damages


def flip(content, rng):
    """Bits at one or several places."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 10, 100])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def flip_head(content, rng):
    """Bits among the first 200 bytes, where headers are."""
    return flip(content[:200], rng) + content[200:]


def cut(content, rng):
    return content[: rng.choice([0, 1, 4, 8, 64, len(content) - 1, rng.randrange(len(content))])]


def blank(content, rng):
    """A stretch of zeros or of 0xff."""
    start = rng.randrange(len(content))
    length = min(rng.choice([1, 8, 100, 4096]), len(content) - start)
    return content[:start] + rng.choice([b"\0", b"\xff"]) * length + content[start + length :]


def swap(content, rng):
    """Two parts change places."""
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[b:] + content[a:b] + content[:a]


def grow(content, rng):
    return content + rng.choice([b"\0", b"x", content, rng.randbytes(1), b"\n{}\n"])


def garbage(content, rng):
    return rng.randbytes(rng.choice([1, 10, 1000]))


def hostile_pickle(content, rng):
    """What would run a command wherever pickles are obeyed; bare, as torch.save wraps it, or as an
    array of objects.
    """
    payload = pickle.dumps(Hostile(), protocol=rng.choice([0, 2, 4]))
    kind, file = rng.randrange(4), io.BytesIO()
    if kind == 0:
        return payload
    if kind == 1:
        torch.save({"weights": Hostile(), "model": [Hostile()]}, file)
    elif kind == 2:
        np.save(file, np.array([Hostile()], object), allow_pickle=True)
    else:
        np.savez(file, image=np.array([Hostile()], object), label=np.array([Hostile()], object))
    return file.getvalue()


class Hostile:
    marker = None  # a path, set by the test

    def __reduce__(self):
        return os.system, (f"touch {Hostile.marker}",)


def json_value(content, rng):
    """One value, at any depth, of another kind, or gone; or a text that is no JSON."""
    if rng.random() < 0.1:
        return rng.choice(
            [b"[" * 100_000, b"{", b"[1]", b"NaN", b"\xff\xfe{}", b'{"a": 1e999}', b'{"a":' * 5000]
        )
    value = json.loads(content)
    places, stack = [], [value]
    while stack:
        node = stack.pop()
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                stack.append(node[key])
    node, key = rng.choice(places)
    others = [
        None,
        -1,
        0,
        1,
        10**12,
        10**400,
        1e30,
        float("nan"),
        float("inf"),
        "x",
        "",
        "\0",
        "../x",
        [],
        {},
        [[]],
        True,
        0.5,
        [1, 2],
    ]
    if isinstance(node, dict) and rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice(others)
    with contextlib.suppress(ValueError):  # numbers too long to be written
        return json.dumps(value).encode()
    return content


def npy_array(content, rng):
    """An array of another type, shape or order, with NaN, or whose header promises more than there
    is.
    """
    array = np.load(io.BytesIO(content))
    flat = array.reshape(-1)
    kinds = (
        ["U1", "S"]
        if array.dtype.kind == "U"
        else [np.float64, np.float16, np.int8, np.uint16, ">i8", "U3", bool, complex]
    )
    wild = [
        array.astype(rng.choice(kinds)),
        np.asfortranarray(array) if array.ndim > 1 else array[::-1],
        *(
            array[:0],
            array[None],
            array[..., None],
            flat,
            np.array(3),
            array[: len(array) // 2],
            np.concatenate([array, array]),
        ),
        np.full_like(array, -1 if array.dtype.kind == "i" else 255),
        np.full(array.shape, np.nan),
        np.zeros(array.shape, [("a", "u1"), ("b", "i8")]),
    ]
    file = io.BytesIO()
    if rng.random() < 0.4:
        header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
        sizes = [
            (10**12,),
            (2**62, 4),
            (-1,),
            (0,),
            (10**6, *array.shape[1:]),
            "x",
            (1.5,),
            (True,),
            None,
        ]
        header |= rng.choice(
            [
                {"shape": rng.choice(sizes)},
                {"descr": "|O"},
                {"descr": "x9"},
                {"fortran_order": True},
                {"descr": []},
            ]
        )
        text = repr(header).encode()
        if rng.random() < 0.3:  # no dict, or what Python's tokenizer and parser stumble over
            gigantic = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1" + b"0" * 23 + b",)}"
            text = rng.choice(
                [
                    b"(" * 3000 + text,
                    b"(",
                    b"{'a'",
                    b"'''",
                    b"if 1:\n  2\n 3",
                    gigantic,
                    text[: len(text) // 2],
                ]
            )
        return (
            b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n" + array.tobytes()
        )
    np.save(file, rng.choice(wild))
    return file.getvalue()


def zip_members(content, rng):
    """Members damaged, missing, doubled, renamed, compressed, or a bomb: a gigabyte of zeros in a
    megabyte.
    """
    file, method = (
        io.BytesIO(),
        rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]),
    )
    what = rng.choice(["damage", "drop", "double", "rename", "compress", "bomb", "flags"])
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", method) as new:
        names = old.namelist()
        chosen = rng.choice(names)
        for name in names:
            member = old.read(name)
            if name == chosen and what == "damage":
                member = (
                    (npy_array if name.endswith(".npy") and rng.random() < 0.7 else any_bytes)(
                        member, rng
                    )
                    if member
                    else member
                )
            if name == chosen and what == "bomb":
                member = member[:128] + bytes(BIG // 10 if rng.random() < 0.9 else BIG)
            if name == chosen and what == "drop":
                continue
            new.writestr(f"../{name}" if name == chosen and what == "rename" else name, member)
            if name == chosen and what == "double":
                with warnings.catch_warnings(action="ignore"):
                    new.writestr(name, member[::-1])
    content = bytearray(file.getvalue())
    if what == "flags":
        # Encrypted, or of an unknown method, in the headers of members and of the directory.
        place, value = rng.choice([(6, 1), (8, 99)])
        for mark, further in ((b"PK\3\4", 0), (b"PK\1\2", 2)):
            content[content.index(mark) + place + further] = value
    return bytes(content)


def gzip_bomb(content, rng):
    """Sizes that are not those of the content; damage below the compression; or 2 GB of zeros
    behind it.
    """
    plain, kind = gzip.decompress(content), rng.randrange(3)
    if kind == 0:
        plain = plain[:4] + struct.pack(">I", rng.choice([0, 1, 2**31, 2**32 - 1])) + plain[8:]
    elif kind == 1:
        plain = any_bytes(plain, rng)
    return gzip.compress(plain, 1) + (gzip.compress(bytes(1 << 24), 1) * 128 if kind == 2 else b"")


def safetensors_header(content, rng):
    """The JSON before the tensors: values changed, or a length that is not its own."""
    (length,) = struct.unpack("<Q", content[:8])
    head, body = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.3:
        return (
            struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1]))
            + head
            + body
        )
    head = json_value(head, rng)
    return struct.pack("<Q", len(head)) + head + body


def not_finite(content, rng):
    """NaN or inf in one of the tensors."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    node = state
    while not torch.is_tensor(node):
        inner = [
            key
            for key, value in (node.items() if isinstance(node, dict) else enumerate(node))
            if isinstance(value, dict | list) or torch.is_tensor(value)
        ]
        if not inner:
            return content
        parent, key = node, rng.choice(inner)
        node = node[key]
    if node.is_floating_point() and node.numel():
        parent[key] = torch.full_like(node, rng.choice([float("nan"), float("inf"), -float("inf")]))
    else:
        parent[key] = rng.choice([node[None], node.double(), "x", None, -1])
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def text_line(content, rng):
    lines = content.splitlines() or [b""]
    lines[rng.randrange(len(lines))] = rng.choice(
        [b"", b"\0", b"\xff\xfe", b"../../etc/passwd", b"{}", b"[" * 9999, b"x" * 100_000, b"null"]
    )
    return b"\n".join(lines)


BYTES = [flip, flip_head, cut, blank, swap, grow, garbage, hostile_pickle]
BY_SUFFIX = {
    ".json": [json_value] * 12,
    ".jsonl": [text_line] * 6,
    ".txt": [text_line] * 6,
    ".npy": [npy_array] * 8,
    ".npz": [zip_members] * 10,
    ".pt": [not_finite, zip_members] * 4,
    ".gz": [gzip_bomb] * 4,
    ".safetensors": [safetensors_header] * 6,
}


def any_bytes(content, rng):
    return rng.choice(BYTES[:-1])(content, rng) if content else content


def damage(path, rng):
    """Put something else in the place of `path`; returns what was done."""
    if rng.random() < 0.05:
        path.unlink()
        what = rng.choice(["missing", "a directory", "a link to itself", "empty"])
        if what == "a directory":
            path.mkdir()
        elif what == "a link to itself":
            path.symlink_to(path)
        elif what == "empty":
            path.touch()
        return what
    whole, how = path.read_bytes(), rng.choice(BYTES + BY_SUFFIX.get(path.suffix, []))
    while (content := how(whole, rng)) == whole:
        how = rng.choice(BYTES)
    path.write_bytes(content)
    return how.__name__


# -------------------------------------------------------------------------------------------- kinds


def quiet_main(module, *argv):
    """A script's main, quietly."""
    with contextlib.redirect_stdout(io.StringIO()):
        module.main(module.parse_args(list(map(str, argv))))


def read_synthetic(folder):
    path = str(folder / "set.npz") if (folder / "set.npz").exists() else str(folder)
    found = open_synthetic([path], DIGITS)
    images, labels = found.gather(np.arange(min(len(found), 50)))
    assert (
        images.shape[1:] == (8, 8, 1)
        and images.dtype == np.uint8
        and 0 <= labels.min()
        and labels.max() < 10
    )


def read_classifier(folder):
    model, _ = load_classifier(folder / "best.pt", DIGITS, "cpu")
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def read_weights(folder):
    model = models.build("wrn-10-1", DIGITS)
    load_weights(model, str(folder / "best.safetensors"))
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def read_diffusion(folder):
    model = load_diffusion(str(folder), "cpu")
    check_generates(model, str(folder), DIGITS, with_labels=True)


def read_log(folder):
    run.open_log(str(folder / "log.jsonl"), 4).close()


def read_list(folder):
    names = (folder / "names").read_text().splitlines()
    files = image_files.ImageFiles([f"/x/{name}" for name in names], resize=None, size=8)
    image_list.select_listed(files, np.arange(len(names)), folder / "list.txt")


def read_picture(folder):
    image = image_files.ImageFiles([folder / "a.png"], resize=None, size=8).open(0)
    assert image.mode == "RGB"


def read_chunk(folder):
    verdicts.read_chunk(folder / "chunk.json", 4, ["apgd-ce", "apgd-t"])


def read_check(folder):
    verdicts.read_check(folder / "check.json", "steps", 3)


SHARED = {}  # paths that are not damaged, set by the fixture
AT_RUN = [*SHORT_AT, "--epochs", "2", "--out-dir"]
DIFFUSION_RUN = "--train-steps 3 --channels 8 16 --out-dir".split()
FEATURES = "--blocks mid_block --sigmas 0.1 --out-dir".split()


def read_run(folder):
    quiet_main(train_at, *AT_RUN, folder)


def read_diffusion_run(folder):
    quiet_main(train_diffusion, *DIFFUSION_RUN, folder)


def read_features(folder):
    quiet_main(extract_features, "--diffusion", SHARED["teacher"], *FEATURES, folder)


def read_per_image(folder):
    quietly(compare.compare, str(folder / "a.npz"), str(folder / "b.npz"))


def read_pickle(folder):
    edm.read_pickle(folder / "network.pkl")


def read_fashion(folder):
    data.load_test(DATASETS["fashion-mnist"], folder)


def read_cifar(folder):
    DATASETS["cifar10"].read(folder, False, any_checksum=True)


def read_svhn(folder):
    DATASETS["svhn"].read(folder, False, any_checksum=True)


def read_images(folder):
    images, _ = DATASETS["folder"].read(folder, False, image_size=8)
    images.sum()


KINDS = {  # what is damaged: (files, how they are read)
    "classifier": (["best.pt"], read_classifier),
    "weights": (["best.safetensors"], read_weights),
    "run": (["last.pt", "args.json", "log.jsonl"], read_run),
    "diffusion run": (["last.pt", "args.json"], read_diffusion_run),
    "diffusion model": (["config.json", "diffusion_pytorch_model.safetensors"], read_diffusion),
    "EDM pickle": (["network.pkl"], read_pickle),
    "EDM directory": (["config.json", "model.safetensors"], edm.load),
    "shards": (
        ["manifest.json", "shard-00001-images.npy", "shard-00002-labels.npy"],
        read_synthetic,
    ),
    "stored npz": (["set.npz"], read_synthetic),
    "compressed npz": (["set.npz"], read_synthetic),
    "features": (
        ["manifest.json", "val-mid_block-sigma0.1.npy", "val-labels.npy"],
        read_features,
    ),
    "verdicts": (["a.npz", "a.json"], read_per_image),
    "chunk": (["chunk.json"], read_chunk),
    "check": (["check.json"], read_check),
    "log": (["log.jsonl"], read_log),
    "Fashion-MNIST": (["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"], read_fashion),
    "image list": (["list.txt"], read_list),
    "CIFAR": (["cifar-10-batches-py/test_batch"], read_cifar),
    "SVHN": (["test_32x32.mat"], read_svhn),
    "image folder": ([f"test/{name}/0.{name}" for name in ("png", "jpg", "webp")], read_images),
    "picture": (["a.png"], read_picture),
}


def quietly(function, *args):
    with contextlib.redirect_stdout(io.StringIO()):
        function(*args)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, diffusion_dir, synthetic_dir):
    """{kind: directory with undamaged files of it}."""
    root = tmp_path_factory.mktemp("whole")
    made = {kind: root / kind.replace(" ", "-") for kind in KINDS}
    for folder in made.values():
        folder.mkdir()
    quiet_main(train_at, *AT_RUN, made["run"])
    for kind, name in (
        ("classifier", "best.pt"),
        ("weights", "best.safetensors"),
        ("log", "log.jsonl"),
    ):
        shutil.copy(made["run"] / name, made[kind])
    for kind in ("diffusion run", "diffusion model"):
        shutil.copytree(diffusion_dir, made[kind], dirs_exist_ok=True)
    shutil.copytree(synthetic_dir, made["shards"], dirs_exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.integers(0, 256, (60, 8, 8, 1), np.uint8),
        "label": rng.integers(0, 10, 60),
    }
    np.savez(made["stored npz"] / "set.npz", **arrays)
    np.savez_compressed(made["compressed npz"] / "set.npz", **arrays)
    shutil.rmtree(made["features"])
    SHARED["teacher"] = diffusion_dir
    KINDS["features"][1](made["features"])
    for name in ("a", "b"):
        fooled_by = rng.integers(-1, 3, 20).astype(np.int8)
        verdicts = {
            "index": np.arange(20),
            "label": np.arange(20) % 10,
            "clean_correct": fooled_by >= 0,
            "robust": fooled_by == 2,
        }
        np.savez(
            made["verdicts"] / f"{name}.npz",
            **verdicts,
            fooled_by=fooled_by,
            attacks=np.array(["apgd-ce", "apgd-t"]),
        )
        settings = {
            "dataset": "digits",
            "image_list_sha256": None,
            "attack": "apgd",
            "settings": {},
            "eps": 0.15,
            "warnings": ["w"],
        }
        (made["verdicts"] / f"{name}.json").write_text(json.dumps(settings))
    chunk = {
        "fooled_by": [-1, 0, 1, 2],
        "zero_gradients": 0,
        "warnings": ["w"],
        "seconds": [1.0, 2.0],
    }
    (made["chunk"] / "chunk.json").write_text(json.dumps(chunk))
    write_cifar(DATASETS["cifar10"], made["CIFAR"])
    pixels = rng.integers(0, 256, (32, 32, 3, 9), np.uint8)
    scipy.io.savemat(made["SVHN"] / "test_32x32.mat", {"X": pixels, "y": np.arange(1, 10)})
    for name in ("png", "jpg", "webp"):
        (made["image folder"] / "test" / name).mkdir(parents=True)
        image = Image.fromarray(pixels[..., 0])
        image.save(made["image folder"] / "test" / name / f"0.{name}")
    (made["check"] / "check.json").write_text(json.dumps({"fooled": [True, False, True]}))
    for name, shape in (("images-idx3", (50, 28, 28)), ("labels-idx1", (50,))):
        head = bytes([0, 0, 8, len(shape)]) + b"".join(struct.pack(">I", n) for n in shape)
        content = head + (rng.integers(0, 10, shape, np.uint8)).tobytes()
        (made["Fashion-MNIST"] / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    names = [f"n{i:04d}/{i}.JPEG" for i in range(30)]
    (made["image list"] / "names").write_text("\n".join(names))
    (made["image list"] / "list.txt").write_text("\n".join(names[::3]))
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(made["picture"] / "a.png")
    return made


# -------------------------------------------------------------------------------------------- cases


class TooLong(BaseException):
    """No reader's `except Exception` takes it for damage."""


def alarm(*_):
    raise TooLong


@contextlib.contextmanager
def limits():
    """Memory: what there is and 1.5 GB. Time: 20 seconds."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    signal.signal(signal.SIGALRM, alarm)
    signal.alarm(20)
    resource.setrlimit(resource.RLIMIT_AS, (now + BIG, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)


def attempt(kind, case, whole, tmp_path):
    """(what was done, "read" or "refused") of one case; an error where neither came of it."""
    rng = random.Random(f"{kind} {case}")
    folder = tmp_path / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole[kind], folder)
    names, read = KINDS[kind]
    path = folder / rng.choice(names)
    how = damage(path, rng)
    with limits():
        try:
            cli.run_script(lambda _: read(folder), None)
            return how, "read"
        except SystemExit as end:
            assert end.code == 2
            return how, "refused"


def attack(kind, n, whole, tmp_path, capsys):
    Hostile.marker = tmp_path / "ran"
    failed, refused = [], 0
    for case in range(n):
        capsys.readouterr()
        try:
            how, outcome = attempt(kind, case, whole, tmp_path)
            errors = capsys.readouterr().err
            lines = [line for line in errors.splitlines() if "error: " in line]
            assert "Traceback" not in errors and len(lines) == (outcome == "refused"), errors
            assert all(str(tmp_path) in line for line in lines), lines
            of_a_reader = [INTERNAL.search(line.replace("object", "")) for line in lines]
            assert not any(of_a_reader), lines
            refused += outcome == "refused"
        except BaseException as error:  # whatever it is, it is what we look for
            if isinstance(error, KeyboardInterrupt):
                raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            failed.append(
                f"case {case}: {type(error).__name__} in {where.filename}:{where.lineno}: "
                f"{str(error)[:300]}"
            )
        assert not Hostile.marker.exists(), f"case {case}: code of the file ran"
    assert not failed, f"{len(failed)} of {n} cases of {kind}:\n" + "\n".join(failed[:20])
    assert refused > 0.2 * n  # or the damages are none


@pytest.fixture
def complete(whole, nvlabs, request):
    """`whole` with the two kinds of EDM files."""
    if not (whole["EDM pickle"] / "network.pkl").exists():
        config = {
            "kind": "nvlabs-edm",
            "precond": "EDMPrecond",
            "init": {"img_resolution": 8, "img_channels": 1, "label_dim": 10},
        }
        config["init"] |= {
            "model_type": "SongUNet",
            "model_channels": 32,
            "channel_mult": [1],
            "num_blocks": 1,
            "attn_resolutions": [],
        }
        with open(whole["EDM pickle"] / "network.pkl", "wb") as file:
            pickle.dump(nvlabs.content(edm.build(config), config), file)
        with contextlib.redirect_stdout(io.StringIO()):
            edm.main(
                edm.parse_args(
                    [
                        "convert",
                        str(whole["EDM pickle"] / "network.pkl"),
                        str(whole["EDM directory"]),
                    ]
                )
            )
    return whole


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.replace(" ", "-"))
def test_some_damages(kind, complete, tmp_path, capsys):
    attack(kind, SAMPLE, complete, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.replace(" ", "-"))
def test_many_damages(kind, complete, tmp_path, capsys):
    attack(kind, FULL, complete, tmp_path, capsys)
