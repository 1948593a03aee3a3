"""Synthetic sets: shards, published .npz files, several sources, digests, bad input, many images.

Alone: python -m pytest -n 0 tests/published/test_synthetic.py
-s shows the figures of 50 million images.
"""

import json
import os
import pickle
import resource
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import DIGITS, ROOT
from data_helper import in_children

import train_at
from common import UserError, data, files
from published import synthetic, synthetic_set
from published.datasets import DATASETS
from published.synthetic import open_synthetic
from published.synthetic_set import shard_paths

IMAGENET = DATASETS["imagenet"]


def made(n, seed=0, shape=(8, 8, 1), num_classes=10):
    """n random images and labels; no two images are alike."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape), dtype=np.uint8), rng.integers(0, num_classes, n)


def write_shards(directory, images, labels, shard_size, spec=DIGITS, selection=None, **changes):
    """A directory as generate_synthetic.py writes it; changes: of its manifest."""
    directory.mkdir()
    for shard, start in enumerate(range(0, len(images), shard_size)):
        images_path, labels_path = shard_paths(directory, shard)
        np.save(images_path, images[start : start + shard_size])
        np.save(labels_path, labels[start : start + shard_size].astype(np.int64))
    manifest = {
        "format": 2,
        "dataset": spec.name,
        "n": len(images),
        "num_classes": spec.num_classes,
        "held_out": 100,
        "image_shape": list(images.shape[1:]),
        "shard_size": shard_size,
        **changes,
    }
    if selection is not None:
        np.save(directory / "selection.npy", selection)
        manifest["selection"] = {}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return str(directory)


def opened(*sources, spec=DIGITS):
    return open_synthetic(sources, spec)


def assert_holds(source, images, labels, seed=1):
    """gather gives the very images and labels, in any order and more than once."""
    assert len(source) == len(images)
    order = np.random.default_rng(seed).permutation(len(images)).repeat(2)
    got_images, got_labels = source.gather(order)
    assert got_images.dtype == np.uint8 and got_labels.dtype == np.int64
    assert np.array_equal(got_images, images[order])
    assert np.array_equal(got_labels, labels[order])


def refused(sources, *words, spec=DIGITS):
    """Opening the sources ends with a UserError of one line that holds all the words."""
    with pytest.raises(UserError) as info:
        opened(*map(str, sources), spec=spec)
    message = str(info.value)
    assert "\n" not in message and len(message) < 500, message
    for word in words:
        assert word in message, message


# ----------------------------------------------------------------------------- published .npz files


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, ">i2"])
def test_a_stored_npz_is_mapped_in_place(dtype, tmp_path):
    images, labels = made(50)
    path = str(tmp_path / "set.npz")
    np.savez(path, image=images, label=labels.astype(dtype))
    opened_set = opened(path)
    source = opened_set.sources[0]
    for array, values in ((source.images[0], images), (source.labels[0], labels)):
        assert isinstance(array, np.memmap)
        assert (array.filename, array.mode) == (path, "r")
        assert np.array_equal(array, values)
    assert os.listdir(tmp_path) == ["set.npz"]  # neither unpacked nor locked
    assert opened_set.held_out == 0
    assert_holds(opened_set, images, labels)


@pytest.mark.parametrize("zip64,before", [(False, 0), (True, 0), (True, 1), (False, 3)])
def test_members_are_found_wherever_they_lie(zip64, before, tmp_path):
    """With zip64's extra fields, at odd offsets, behind others, in the other order, commented."""
    images, labels = made(30)
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.comment = b"PK\x05\x06 not the end"[4:]
        archive.writestr("extra.npy", b"x" * before)
        for name, array in (("label", labels), ("image", images)):
            with archive.open(f"{name}.npy", "w", force_zip64=zip64) as file:
                np.save(file, array)
    opened_set = opened(str(tmp_path / "set.npz"))
    assert_holds(opened_set, images, labels)
    assert opened_set.sources[0].labels[0].offset != opened_set.sources[0].images[0].offset


def unpacked_in(cache):
    """The one unpacked file in the cache."""
    (path,) = cache.glob("unpacked-*.npz")
    return path


def test_a_compressed_npz_is_unpacked_once(tmp_path, cache):
    images, labels = made(50)
    path = str(tmp_path / "set.npz")
    np.savez_compressed(path, image=images, label=labels.astype(np.int32))
    opened(path)
    assert {p.name for p in tmp_path.iterdir()} == {"set.npz", "cache"}  # nothing beside it
    unpacked = unpacked_in(cache)
    with np.load(unpacked) as content:
        assert np.array_equal(content["image"], images)
        assert np.array_equal(content["label"], labels)
    before = unpacked.stat().st_mtime_ns
    opened_set = opened(path)
    assert unpacked.stat().st_mtime_ns == before
    assert opened_set.sources[0].images[0].filename == str(unpacked)
    assert_holds(opened_set, images, labels)


def test_one_compressed_member_is_enough(tmp_path, cache):
    """Labels compressed, images not: both are unpacked."""
    images, labels = made(20)
    np.save(tmp_path / "image.npy", images)
    np.save(tmp_path / "label.npy", labels)
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.write(tmp_path / "image.npy", "image.npy", zipfile.ZIP_STORED)
        archive.write(tmp_path / "label.npy", "label.npy", zipfile.ZIP_DEFLATED)
    assert_holds(opened(str(tmp_path / "set.npz")), images, labels)
    assert unpacked_in(cache).exists()


@pytest.mark.parametrize("replaced", [False, True])
def test_unpacking_survives_a_kill(replaced, tmp_path, cache):
    """Then the same file, or another in its place, is unpacked without a trace of the first."""
    path = str(tmp_path / "set.npz")
    images, labels = made(50)
    np.savez_compressed(path, image=images, label=labels)

    def killed():
        os.fsync = lambda file: os._exit(9)  # all is written, and not yet under its name
        opened(path)

    assert in_children(1, killed) == [9]
    kept = sorted(p.suffix for p in cache.iterdir())
    assert kept == [".lock", ".writing"]
    if replaced:
        images, labels = made(30, seed=5)
        np.savez_compressed(path, image=images, label=labels)
    assert_holds(opened(path), images, labels)
    assert len(list(cache.glob("*.writing"))) == replaced  # what is left of the other file


def test_another_npz_of_the_same_name_is_unpacked_anew(tmp_path, cache):
    path = tmp_path / "set.npz"
    images, labels = made(50)
    np.savez_compressed(path, image=images, label=labels)
    opened(str(path))
    np.savez_compressed(path, image=images[::-1], label=labels)
    assert_holds(opened(str(path)), images[::-1], labels)


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    images, labels = made(5)
    np.savez_compressed(tmp_path / "set.npz", image=images, label=labels)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    refused([tmp_path / "set.npz"], f"{tmp_path}/file/dra: Not a directory; XDG_CACHE_HOME names")


def test_several_processes_unpack_an_npz_once(tmp_path, cache, monkeypatch):
    """Runs that are started together: one unpacks, the others wait for it and read the same."""
    images, labels = made(50)
    path = str(tmp_path / "set.npz")
    log = tmp_path / "log"
    np.savez_compressed(path, image=images, label=labels)
    copy_members = synthetic._copy_members

    def slow_and_logged(*args):
        with open(log, "a") as file:
            file.write("x")
        time.sleep(0.3)
        copy_members(*args)

    monkeypatch.setattr(synthetic, "_copy_members", slow_and_logged)
    assert in_children(4, lambda: assert_holds(opened(path), images, labels)) == [0, 0, 0, 0]
    assert log.read_text() == "x"


def test_an_unpacked_set_in_a_read_only_cache_opens(tmp_path, cache, monkeypatch):
    """A shared cache that its owner has filled: nothing is locked or written there.

    A mode of the folder would not stop root, hence a check of the calls.
    """
    images, labels = made(20)
    path = str(tmp_path / "set.npz")
    np.savez_compressed(path, image=images, label=labels)
    opened(path)
    lock = cache / f"{unpacked_in(cache).name}.lock"
    lock.unlink()
    monkeypatch.setattr(files.fcntl, "flock", None)
    monkeypatch.setattr(files, "atomic", None)
    assert_holds(opened(path), images, labels)
    assert not lock.exists()


# ---------------------------------------------------------------------------------- several sources


def test_sources_of_every_kind_in_one_set(tmp_path):
    parts = [made(n, seed) for n, seed in ((40, 0), (15, 1), (33, 2))]
    directory = write_shards(tmp_path / "shards", *parts[0], shard_size=16)
    np.savez(tmp_path / "stored.npz", image=parts[1][0], label=parts[1][1])
    np.savez_compressed(tmp_path / "compressed.npz", image=parts[2][0], label=parts[2][1])
    opened_set = opened(directory, str(tmp_path / "stored.npz"), str(tmp_path / "compressed.npz"))
    images, labels = (np.concatenate(kind) for kind in zip(*parts))
    assert_holds(opened_set, images, labels)
    assert opened_set.held_out == 0
    assert opened_set.starts.tolist() == [0, 40, 55, 88]


def test_held_out_is_the_least_of_the_sources(tmp_path):
    sources = []
    for held_out in (300, 200):
        path = tmp_path / f"{held_out}"
        sources.append(write_shards(path, *made(9, held_out), shard_size=4, held_out=held_out))
    assert opened(*sources).held_out == 200


def test_selected_rows_alone_are_drawn_and_gathered(tmp_path):
    images, labels = made(50)
    rows = np.array([3, 7, 17, 18, 44, 49])
    opened_set = opened(
        write_shards(tmp_path / "set", images, labels, shard_size=16, selection=rows)
    )
    assert_holds(opened_set, images[rows], labels[rows])
    assert set(opened_set.draw(500, torch.Generator().manual_seed(0)).tolist()) == set(range(6))


def test_an_array_of_indices_of_any_kind_is_gathered(tmp_path):
    images, labels = made(20)
    opened_set = opened(write_shards(tmp_path / "set", images, labels, shard_size=8))
    for indices in ([19, 0], np.array([19, 0], np.int32), np.array([], np.int64)):
        got_images, got_labels = opened_set.gather(indices)
        rows = np.array(indices, np.int64)
        assert np.array_equal(got_images, images[rows])
        assert np.array_equal(got_labels, labels[rows])


def test_shards_with_headers_of_other_lengths(tmp_path):
    """Other programs write other headers: a later version of the format, and a longer one."""
    images, labels = made(24)
    directory = write_shards(tmp_path / "set", images, labels, shard_size=8)
    with open(shard_paths(directory, 1)[0], "wb") as file:
        np.lib.format.write_array(file, images[8:16], version=(2, 0))
    header = described((8,), "<i8").rjust(500)
    content = npy(header, labels[16:].tobytes())
    (tmp_path / "set" / "shard-00002-labels.npy").write_bytes(content)
    assert_holds(opened(directory), images, labels)


def test_gather_touches_only_the_shards_of_its_rows(tmp_path):
    """A step's cost is that of its batch: no loop over all shards, however many there are."""

    class Recorded(list):
        def __getitem__(self, shard):
            touched.add(shard)
            return super().__getitem__(shard)

        def __iter__(self):
            touched.add("all")
            return super().__iter__()

    opened_set = opened(write_shards(tmp_path / "set", *made(60), shard_size=3))
    for rows in (opened_set.sources[0].image_rows, opened_set.sources[0].label_rows):
        rows.arrays = Recorded(rows.arrays)
        rows.files = Recorded(rows.files)
    for step in range(200):
        touched = set()
        drawn = opened_set.draw(5, data.stream(0, "x", step)).numpy()
        opened_set.gather(drawn)
        assert touched == {0} | set((drawn // 3).tolist())  # 0: the shape of an image


@pytest.mark.skipif(
    not os.path.exists("/proc/self/smaps"), reason="only Linux tells what a process has mapped"
)
@pytest.mark.parametrize("kind", ["shards", "npz"])
def test_no_page_of_a_set_stays_in_the_process(kind, tmp_path):
    """Else what the system caches of a set, up to all of it, would be memory of this process."""
    images, labels = made(20_000)
    if kind == "shards":
        folder = tmp_path / "set"
        rows = np.arange(20_000)
        opened_set = opened(write_shards(folder, images, labels, shard_size=10_000, selection=rows))
        expected = [str(folder / "selection.npy")]
        for shard in (0, 1):
            expected.extend(shard_paths(folder, shard))
    else:
        np.savez(tmp_path / "set.npz", image=images, label=labels)
        opened_set = opened(str(tmp_path / "set.npz"))
        expected = [str(tmp_path / "set.npz")] * 2
    assert_holds(opened_set, images, labels)
    opened_set.sha256()
    resident = {}  # path: kilobytes in memory of each of its mappings
    path = None
    with open("/proc/self/smaps") as file:
        for line in file:
            if line.split("-")[0].isalnum():  # the first line of a mapping ends in its file
                path = line.split(maxsplit=5)[-1].rstrip()
            elif line.startswith("Rss:"):
                resident.setdefault(path, []).append(int(line.split()[1]))
    mapped = [path for path in resident if path.startswith(str(tmp_path)) for _ in resident[path]]
    assert sorted(mapped) == sorted(expected)
    assert all(resident[path] == [0] * len(resident[path]) for path in mapped)
    assert max(map(max, resident.values())) > 0


def test_a_file_cut_short_while_it_is_in_use(tmp_path):
    """Read through a mapping, it would end the process with a bus error."""
    images, labels = made(2000)
    opened_set = opened(write_shards(tmp_path / "set", images, labels, shard_size=1000))
    os.truncate(shard_paths(tmp_path / "set", 1)[0], 1000)
    assert np.array_equal(opened_set.gather([999])[0], images[999:1000])
    with pytest.raises(UserError, match="shard-00001-images.npy: truncated since it was opened"):
        opened_set.gather([0, 1999])


def test_draws_without_shares_are_uniform_over_the_union(tmp_path):
    sizes = (10, 200, 790)
    n = 400_000
    opened_set = opened(
        *(write_shards(tmp_path / f"{k}", *made(k, k), shard_size=100) for k in sizes)
    )
    state = torch.get_rng_state()
    drawn = opened_set.draw(n, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn, opened_set.draw(n, torch.Generator().manual_seed(3)))
    assert drawn.dtype == torch.int64 and drawn.min() == 0 and drawn.max() == 999
    counts = np.bincount(drawn, minlength=1000)
    chi_square = ((counts - n / 1000) ** 2 / (n / 1000)).sum()
    assert abs(chi_square - 999) < 4 * (2 * 999) ** 0.5
    assert_shares(counts, sizes, [size / 1000 for size in sizes])


def assert_shares(counts, sizes, shares):
    """Counts per index fall on the sources in these shares, within four sigma."""
    n = counts.sum()
    starts = np.cumsum((0, *sizes))
    for start, stop, share in zip(starts, starts[1:], shares):
        assert abs(counts[start:stop].sum() / n - share) <= 4 * (share * (1 - share) / n) ** 0.5


def test_draws_with_shares_keep_them(tmp_path):
    """Shares count relative to their sum; within a source, every image is as likely as the next."""
    sizes = (10, 200, 790, 50)
    n = 400_000
    paths = [write_shards(tmp_path / f"{k}", *made(k, k), shard_size=100) for k in sizes]
    opened_set = opened(
        *(f"{path}={share}" for path, share in zip(paths, ("1/2", "1", "0.5", "0")))
    )
    drawn = opened_set.draw(n, torch.Generator().manual_seed(3))
    assert torch.equal(drawn, opened_set.draw(n, torch.Generator().manual_seed(3)))
    counts = np.bincount(drawn, minlength=1050)
    assert len(counts) == 1050 and counts[1000:].sum() == 0
    assert_shares(counts, sizes, [0.25, 0.5, 0.25, 0])
    for start, size, share in ((0, 10, 0.25), (10, 200, 0.5), (210, 790, 0.25)):
        mean = n * share / size
        chi_square = ((counts[start : start + size] - mean) ** 2 / mean).sum()
        assert abs(chi_square - size) < 5 * (2 * size) ** 0.5


def test_shares_reach_the_batches(tmp_path):
    paths = []
    for value in (1, 2):
        images = np.full((30, 8, 8, 1), value, np.uint8)
        labels = np.zeros(30, int)
        paths.append(write_shards(tmp_path / f"{value}", images, labels, shard_size=30))
    real = np.zeros((10, 8, 8, 1), np.uint8), np.zeros(10, np.int64)
    batches = data.Batches(
        DIGITS,
        real,
        batch_size=50,
        seed=0,
        device="cpu",
        synthetic=opened(f"{paths[0]}=1", f"{paths[1]}=3"),
        synthetic_fraction=0.8,
    )
    values = torch.cat([(batches(step)[0].amax((1, 2, 3)) * 255).round() for step in range(100)])
    assert (values == 0).sum() == 1000
    share = (values == 2).sum().item() / 4000
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 4000) ** 0.5


def test_sets_of_other_sizes_where_images_are_cropped_anyway(tmp_path):
    """ImageNet's images are cropped: sources of 64 and of 48 pixels go together, one at a time."""
    parts = [made(6, size, (size, size, 3), 1000) for size in (64, 48)]
    paths = []
    for number, (images, labels) in enumerate(parts):
        paths.append(write_shards(tmp_path / f"{number}", images, labels, 4, IMAGENET))
    opened_set = opened(*paths, spec=IMAGENET)
    for index in range(12):
        images, labels = opened_set.gather(np.array([index]))
        expected_images, expected_labels = parts[index // 6]
        assert np.array_equal(images[0], expected_images[index % 6])
        assert labels[0] == expected_labels[index % 6]


@pytest.mark.parametrize(
    "text,expected",
    [
        ("a/b", ("a/b", None)),
        ("a/b=2", ("a/b", 2.0)),
        ("a.npz=1/3", ("a.npz", 1 / 3)),
        ("cfg=2/set", ("cfg=2/set", None)),
        ("cfg=2/set=0.5", ("cfg=2/set", 0.5)),
        ("a=nan", ("a=nan", None)),
        ("a=", ("a=", None)),
        ("a=-1", ("a", -1.0)),
        ("there=2", ("there=2", None)),  # it exists
        ("there=2=3", ("there=2", 3.0)),
    ],
)
def test_shares_are_told_from_paths(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there=2").mkdir()
    assert synthetic.parse_source(text) == expected


def test_paths_with_an_equals_sign_open(tmp_path):
    parts = [made(12, seed) for seed in (1, 2)]
    paths = [
        write_shards(tmp_path / name, *part, shard_size=5)
        for name, part in zip(("w=1.5", "w=2"), parts)
    ]
    assert_holds(opened(*paths), *(np.concatenate(kind) for kind in zip(*parts)))
    opened_set = opened(f"{paths[0]}=1", f"{paths[1]}=0")
    assert set(opened_set.draw(300, torch.Generator().manual_seed(0)).tolist()) == set(range(12))


# ------------------------------------------------------------------------------------------ digests


def digest(*sources):
    return opened(*map(str, sources)).sha256()


@pytest.mark.parametrize("kind", ["shards", "selected", "stored", "compressed"])
def test_a_set_keeps_its_digest_wherever_it_lies(kind, tmp_path):
    images, labels = made(50)
    path = tmp_path / "set.npz"
    if kind == "stored":
        np.savez(path, image=images, label=labels)
    elif kind == "compressed":
        np.savez_compressed(path, image=images, label=labels)
    else:
        rows = np.array([3, 7, 44]) if kind == "selected" else None
        path = tmp_path / "set"
        write_shards(path, images, labels, shard_size=16, selection=rows)
    before = digest(path)
    assert len(before) == 64 and digest(path) == before
    link = tmp_path / f"link{path.suffix}"
    link.symlink_to(path)
    assert digest(link) == before
    moved = tmp_path / "elsewhere" / f"renamed{path.suffix}"
    moved.parent.mkdir()
    path.rename(moved)
    assert digest(moved) == before
    if kind in ("stored", "compressed"):
        other = tmp_path / "other.npz"
        save = np.savez_compressed if kind == "stored" else np.savez
        save(other, label=labels.astype(np.int32), image=images)
        assert digest(other) == before


def test_a_change_of_the_content_changes_the_digest(tmp_path):
    images, labels = made(50)
    rows = np.array([3, 7, 44])
    other_pixel = images.copy()
    other_pixel[7, 0, 0, 0] += 1
    other_label = labels.copy()
    other_label[8] = (labels[8] + 1) % 10  # of an image that is not selected
    sets = [
        (images, labels, None, {}),
        (other_pixel, labels, None, {}),
        (images, other_label, None, {}),
        (images, labels, None, {"seed": 1}),
        (images, labels, None, {"shard_size": 16}),
        (images, labels, rows, {}),
        (images, labels, rows + 1, {}),
        (other_pixel, labels, rows, {}),
        (images, other_label, rows, {}),
    ]
    digests = set()
    for number, (x, y, selection, changes) in enumerate(sets):
        shard_size = changes.pop("shard_size", 8)
        path = tmp_path / f"{number}"
        digests.add(digest(write_shards(path, x, y, shard_size, selection=selection, **changes)))
        np.savez(tmp_path / f"{number}.npz", image=x, label=y)
    assert len(digests) == len(sets)
    npz_digests = [digest(tmp_path / f"{number}.npz") for number in range(3)]
    assert len(set(npz_digests)) == 3


def test_shares_and_the_order_of_sources_change_the_digest(tmp_path):
    a, b = (write_shards(tmp_path / f"{k}", *made(9, k), shard_size=4) for k in (1, 2))
    sources = [(a,), (b,), (a, b), (b, a), (f"{a}=1", f"{b}=1"), (f"{a}=1", f"{b}=2"), (f"{a}=1",)]
    assert len({digest(*source) for source in sources}) == len(sources)


def test_of_a_large_set_images_in_even_steps_are_hashed(tmp_path, monkeypatch):
    """Five of 21 here: every fifth, the first and the last among them. Labels always all."""
    monkeypatch.setattr(synthetic_set, "N_HASHED", 5)
    images, labels = made(21)
    before = digest(write_shards(tmp_path / "set", images, labels, shard_size=8))
    changed = []
    for row in range(21):
        other = images.copy()
        other[row] += 1
        path = write_shards(tmp_path / f"{row}", other, labels, shard_size=8)
        if digest(path) != before:
            changed.append(row)
    assert changed == [0, 5, 10, 15, 20]
    for row in range(21):
        other = labels.copy()
        other[row] = (labels[row] + 1) % 10
        path = write_shards(tmp_path / f"label-{row}", images, other, shard_size=8)
        assert digest(path) != before


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("shares", [("=1", ""), ("=-1", "=2"), ("=0", "=0")])
def test_shares_that_mean_nothing(shares, tmp_path):
    paths = [write_shards(tmp_path / f"{k}", *made(9, k), shard_size=4) for k in (1, 2)]
    word = "to all sources or to none" if "" in shares else "at least 0 and not all 0"
    refused([path + share for path, share in zip(paths, shares)], *paths, word)


def test_an_empty_list_of_sources_is_refused_by_the_script(capsys):
    with pytest.raises(SystemExit) as info:
        train_at.parse_args(["--synthetic"])
    printed = capsys.readouterr().err
    assert info.value.code == 2 and printed.count("\n") == 1 and "--synthetic" in printed


class Hostile:
    """Unpickled, it makes the directory `marker`."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


IMAGES, LABELS = made(20)
LAST_LABEL_10 = np.where(np.arange(20) == 19, 10, LABELS)
FIRST_LABEL_NEGATIVE = np.where(np.arange(20) == 0, -1, LABELS)
ARRAYS = {  # name: (image, label, words of the message)
    "floats": (IMAGES / 255.0, LABELS, ["image float64 (20, 8, 8, 1)", "expected uint8"]),
    "planes": (IMAGES.transpose(0, 3, 1, 2).copy(), LABELS, ["[1, 8, 8]", "[8, 8, 1]"]),
    "another size": (IMAGES[:, :7], LABELS, ["[7, 8, 1]", "[8, 8, 1]"]),
    "flat images": (IMAGES.reshape(20, 64), LABELS, ["(20, 64)"]),
    "one image": (IMAGES[0], LABELS[:8], ["(8, 8, 1)"]),
    "a number": (np.uint8(3), LABELS, ["image uint8 ()"]),
    "nothing": (IMAGES[:0], LABELS[:0], ["(0, 8, 8, 1)"]),
    "structured images": (IMAGES.view([("v", "u1")]), LABELS, ["expected uint8"]),
    "columns first": (np.asfortranarray(IMAGES), LABELS, ["Fortran order"]),
    "fewer labels": (IMAGES, LABELS[:19], ["label int64 (19,)"]),
    "one-hot labels": (IMAGES, np.eye(10, dtype=np.int64)[LABELS], ["label int64 (20, 10)"]),
    "labels of floats": (IMAGES, LABELS.astype(float), ["label float64"]),
    "labels of truth": (IMAGES, LABELS > 4, ["label bool"]),
    "labels of text": (IMAGES, LABELS.astype(str), ["label <U"]),
    "a label of 10": (IMAGES, LAST_LABEL_10, ["labels outside 0..9"]),
    "a label of -1": (IMAGES, FIRST_LABEL_NEGATIVE, ["labels outside 0..9"]),
    "a label of 2^63 + 1": (
        IMAGES,
        LABELS.astype(np.uint64) + np.uint64(2**63 + 1),
        ["labels outside 0..9"],
    ),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_that_do_not_fit(case, save, tmp_path):
    image, label, words = ARRAYS[case]
    save(tmp_path / "set.npz", image=image, label=label)
    refused([tmp_path / "set.npz"], "set.npz", *words)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_other_names(save, tmp_path):
    save(tmp_path / "set.npz", label=LABELS)
    refused([tmp_path / "set.npz"], "set.npz: has arrays ['label.npy']", "'image'")
    save(tmp_path / "set.npz", x=IMAGES, y=LABELS)
    refused([tmp_path / "set.npz"], "set.npz: has arrays ['x.npy', 'y.npy']")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ["image", "label"])
def test_pickled_objects_are_not_unpickled(name, save, tmp_path):
    arrays = {"image": IMAGES, "label": LABELS}
    arrays[name] = np.array([Hostile(tmp_path / "marker")] * 20, dtype=object)
    save(tmp_path / "set.npz", **arrays)
    with np.load(tmp_path / "set.npz", allow_pickle=True) as content:
        content[name]
    os.rmdir(tmp_path / "marker")  # it was made: the file is hostile indeed
    refused([tmp_path / "set.npz"], "set.npz", f"'{name}'", "Python objects")
    assert not (tmp_path / "marker").exists()


def test_a_pickle_in_the_place_of_an_array_is_not_unpickled(tmp_path):
    hostile = pickle.dumps(Hostile(tmp_path / "marker"))
    directory = write_shards(tmp_path / "set", IMAGES, LABELS, shard_size=8)
    (tmp_path / "set" / "shard-00001-images.npy").write_bytes(hostile)
    refused([directory], "shard-00001-images.npy")
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("image.npy", hostile)
        archive.writestr("label.npy", hostile)
    refused([tmp_path / "set.npz"], "set.npz, array 'image': ", "not an .npy array")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_truncated_npz_is_refused_wherever_it_ends(save, tmp_path):
    save(tmp_path / "whole.npz", image=IMAGES, label=LABELS)
    content = (tmp_path / "whole.npz").read_bytes()
    opened(str(tmp_path / "whole.npz"))
    for length in [*range(0, len(content), 53), *range(len(content) - 60, len(content))]:
        (tmp_path / "cut.npz").write_bytes(content[:length])
        refused([tmp_path / "cut.npz"], "cut.npz: truncated, broken, or not an .npz file")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_byte_is_refused_or_changes_nothing(save, tmp_path):
    """In the archive's records, in NumPy's headers and, where it is compressed, anywhere.

    What is compressed is also checked: its checksum is compared as it is unpacked.
    """
    save(tmp_path / "whole.npz", image=IMAGES, label=LABELS)
    content = (tmp_path / "whole.npz").read_bytes()
    records = {b"PK\x03\x04": 60, b"PK\x01\x02": 60, b"PK\x05\x06": 22, b"\x93NUMPY": 128}
    places = set(range(len(content))) if save is np.savez_compressed else set()
    for mark, length in records.items():
        for start in range(len(content)):
            if content.startswith(mark, start):
                places.update(range(start, min(start + length, len(content))))
    places = sorted(places)
    rng = np.random.default_rng(0)
    outcomes = set()
    for number in range(300):
        broken = bytearray(content)
        place = rng.choice(places)
        broken[place] = rng.integers(256) if number % 2 else rng.choice(list(b"\0\xff(-'9\\"))
        path = tmp_path / f"{number}.npz"
        path.write_bytes(broken)
        try:
            assert_holds(opened(str(path)), IMAGES, LABELS)
            outcomes.add("same")
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error), error
            outcomes.add("refused")
    assert outcomes == {"same", "refused"}


def npy(header, content):
    """An .npy file with this very header."""
    return b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header.encode() + content


def described(shape, descr="|u1"):
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}\n"


LIES = {
    "more images": described((21, 8, 8, 1)),
    "fewer images": described((19, 8, 8, 1)),
    "more than any disk": described((2**62, 8, 8, 1)),
    "a product that wraps around to the truth": described((2**64 + 20, 8, 8, 1)),
    "negative": described((-20, -8, 8, 1)),
    "wider numbers": described((20, 8, 8, 1), "<u2"),
    "nothing": "",
    "an expression": "__import__('os').mkdir('marker')",
    "too deep": "(" * 5000,
    "unary": "-" * 5000 + "1",
    "not closed": "{'descr': '|u1', 'fortran_order': False, 'shape': (20, 8,",
    "keys of two kinds": "{1: 2, 'shape': 3, 'descr': '|u1'}",
}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(lie, compression, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("label.npy", LABELS)
    with zipfile.ZipFile("set.npz", "w", compression) as archive:
        archive.writestr("image.npy", npy(LIES[lie], IMAGES.tobytes()))
        archive.write("label.npy")
    refused(["set.npz"], "set.npz", "image")
    assert not os.path.exists("marker")
    if compression == zipfile.ZIP_STORED:  # and the truth, written in the same way, opens
        with zipfile.ZipFile("true.npz", "w") as archive:
            archive.writestr("image.npy", npy(described(IMAGES.shape), IMAGES.tobytes()))
            archive.write("label.npy")
        assert_holds(opened("true.npz"), IMAGES, LABELS)


def test_labels_that_would_be_read_as_others(tmp_path):
    """Half as wide as they are, they would be in range, and wrong."""
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("image.npy", npy(described(IMAGES.shape), IMAGES.tobytes()))
        archive.writestr("label.npy", npy(described((20,), "<i4"), LABELS.tobytes()))
    refused([tmp_path / "set.npz"], "set.npz, array 'label': int32 (20,) is not what lies in its")


def test_a_directory_of_more_than_the_file_holds(tmp_path):
    """The archive's directory and NumPy's headers agree on 2,000 images; the file ends after 20."""
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        for name, array, descr in (("image", IMAGES, "|u1"), ("label", LABELS, "<i8")):
            header = described((2000, *array.shape[1:]), descr)
            archive.writestr(f"{name}.npy", npy(header, array.tobytes()))
            archive.getinfo(f"{name}.npy").file_size += 99 * array.nbytes
    refused([tmp_path / "set.npz"], "set.npz: truncated")


def test_an_encrypted_npz(tmp_path):
    np.savez(tmp_path / "set.npz", image=IMAGES, label=LABELS)
    with zipfile.ZipFile(tmp_path / "set.npz", "a") as archive:
        archive.getinfo("label.npy").flag_bits |= 1
        archive.writestr("more.npy", b"")  # so that the directory is written again
    refused([tmp_path / "set.npz"], "set.npz, array 'label': ", "is encrypted")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_numpy_does_not_use(method, tmp_path):
    with zipfile.ZipFile(tmp_path / "set.npz", "w", method) as archive:
        for name, array in (("image", IMAGES), ("label", LABELS)):
            with archive.open(f"{name}.npy", "w") as file:
                np.save(file, array)
    refused([tmp_path / "set.npz"], "set.npz", "another method")


def test_a_checksum_that_does_not_hold(tmp_path, cache):
    """The stream is whole, its content is not: found at its end, and nothing is left to open."""
    images, labels = made(500)  # more than zipfile reads with the header
    np.savez_compressed(tmp_path / "set.npz", image=images, label=labels)
    content = (tmp_path / "set.npz").read_bytes()
    crc = zipfile.ZipFile(tmp_path / "set.npz").getinfo("image.npy").CRC.to_bytes(4, "little")
    (tmp_path / "set.npz").write_bytes(content.replace(crc, b"abcd"))
    refused([tmp_path / "set.npz"], "set.npz: truncated, broken", "CRC")
    assert not list(cache.glob("unpacked-*.npz"))


def test_what_is_no_set_at_all(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "folder.npz").mkdir()
    refused([tmp_path / "text.npz"], "text.npz: truncated, broken, or not an .npz file")
    refused([tmp_path / "folder.npz"], "folder.npz: is a directory, expected an .npz file")
    refused([tmp_path / "none.npz"], "none.npz: no such file")
    refused([tmp_path / "none"], "none/manifest.json: no such file")


NO_SHAPES = [["a", "b", 3], [40, 3], [40.5, 40, 3], [31, 40, 3], [40, 40, 1], [-40, -40, 3]]


@pytest.mark.parametrize("shape", [*NO_SHAPES, None, "40", {}])
def test_image_shapes_that_are_none(shape, tmp_path):
    images, labels = made(3, 0, (40, 40, 3))
    path = write_shards(tmp_path / "set", images, labels, 2, IMAGENET, image_shape=shape)
    refused([path], path, "[224, 224, 3]", spec=IMAGENET)
    path = write_shards(tmp_path / "fits", images, labels, 2, IMAGENET)
    assert_holds(opened(path, spec=IMAGENET), images, labels)


@pytest.mark.parametrize("rows", [[], [0, 20], [-1, 0], [0, 0, 1], [2, 1]])
def test_a_selection_is_of_ascending_rows(rows, tmp_path):
    rows = np.array(rows, np.int64)
    path = write_shards(tmp_path / "set", IMAGES, LABELS, shard_size=8, selection=rows)
    refused([path], "selection.npy: expected ascending rows out of 0..19, at least one")


def test_a_shard_too_many_or_too_few(tmp_path):
    for n, words in (
        (21, ["shard-00002-images.npy", "(4, 8, 8, 1)", "(5, 8, 8, 1)"]),
        (25, ["shard-00002-images.npy", "(8, 8, 8, 1)"]),
        (10**7, ["open files", "use larger shards"]),
        (10**30, ["open files", "use larger shards"]),
    ):
        refused([write_shards(tmp_path / f"{n}", IMAGES, LABELS, 8, n=n)], *words)


# ----------------------------------------------------------------------------------- large and many


def test_more_maps_than_a_process_may_have(tmp_path, monkeypatch):
    limit = tmp_path / "max_map_count"
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    monkeypatch.setattr(synthetic_set, "MAX_MAPS", str(limit))
    limit.write_text("65530\n")
    synthetic_set.allow_shards(28_000, "--shard-size 3500")
    refusal = "--shard-size 2500: needs 80000 maps of files, .*vm.max_map_count: 65530"
    with pytest.raises(UserError, match=refusal):
        synthetic_set.allow_shards(40_000, "--shard-size 2500")


def test_more_files_than_a_process_may_open_at_first(tmp_path):
    """1,500 shards in two sources where the limit is 256: it is raised, if the system allows it."""
    images, labels = made(1500)
    sources = []
    for k in (0, 1):
        path = tmp_path / f"{k}"
        sources.append(write_shards(path, images[k::2], labels[k::2], shard_size=1))
    images = np.concatenate([images[0::2], images[1::2]])
    labels = np.concatenate([labels[0::2], labels[1::2]])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if 0 <= hard < 7000:
        pytest.skip(f"this system lets a process open {hard} files")

    def raised():
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        assert_holds(opened(*sources), images, labels)
        # No more than it takes: some programs walk through all files that they may open.
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 7000

    def too_low():  # for both; one source alone would do
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 5000))
        opened(sources[1])
        refused(sources, sources[1], "needs 3000 open files", "5000", "larger shards")

    assert in_children(1, raised) == [0]
    assert in_children(1, too_low) == [0]


# Rows of the 50 million with known content: image r % 251 everywhere, label r % 10.
PLANTED = (0, 12_345_678, 49_999_999)
MEASURE = """
import json, os, sys, time
import numpy as np, torch
from common import data
from published.datasets import DATASETS
from published.synthetic import open_synthetic

torch.set_num_threads(1)

def status():
    with open("/proc/self/status") as file:
        lines = dict(line.split(":") for line in file)
    return [int(lines[key].split()[0]) / 1024 for key in ("VmHWM", "VmRSS")]

def measure(path, rows):
    spec = DATASETS["cifar10"]
    images = np.zeros((1000, 32, 32, 3), np.uint8)
    labels = np.zeros(1000, np.int64)
    before = status()[1]
    start = time.perf_counter()
    opened_set = open_synthetic([path], spec)
    seconds = time.perf_counter() - start
    opened = status()[1]
    for row in rows:
        got_images, got_labels = opened_set.gather(np.array([row]))
        assert (got_images == row % 251).all() and got_labels[0] == row % 10, row
    batches = data.Batches(
        spec, (images, labels), 512, 0, "cpu", synthetic=opened_set, synthetic_fraction=0.7
    )
    assert batches.n_synthetic == 358
    start = time.perf_counter()
    for step in range(200):
        batches(step)
    per_step = (time.perf_counter() - start) / 200
    start = time.perf_counter()
    digest = opened_set.sha256()
    figures = dict(
        path=path,
        n=len(opened_set),
        open_seconds=seconds,
        step_seconds=per_step,
        hash_seconds=time.perf_counter() - start,
        digest=digest,
        before=before,
        opened=opened,
        peak=status()[0],
        after=status()[1],
    )
    print(json.dumps(figures), flush=True)

for path, *rows in json.loads(sys.argv[1]):
    if os.fork() == 0:
        measure(path, rows)
        os._exit(0)
    if os.wait()[1] != 0:
        sys.exit(1)
"""


def sparse_npy(file, dtype, shape, planted):
    """Write an .npy array of zeros that takes no room, but for the planted rows.

    planted: dict of row: the value of all its entries.
    """
    dtype = np.dtype(dtype)
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    start = file.tell()
    row_size = int(np.prod(shape[1:])) * dtype.itemsize
    for row, value in planted.items():
        file.seek(start + row * row_size)
        file.write(np.full(shape[1:], value, dtype).tobytes())
    file.truncate(start + shape[0] * row_size)
    file.seek(0, os.SEEK_END)


def sparse_npz(path, n, rows):
    """A stored .npz of n CIFAR-size images.

    zipfile would write every zero, so the records of its members are made by hand.
    """
    arrays = {
        "image.npy": (np.uint8, (n, 32, 32, 3), {row: row % 251 for row in rows}),
        "label.npy": (np.int64, (n,), {row: row % 10 for row in rows}),
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, (dtype, shape, planted) in arrays.items():
            info = zipfile.ZipInfo(name)
            info.header_offset = archive.fp.tell()
            info.CRC = 0
            info.file_size = 128 + int(np.prod(shape)) * np.dtype(dtype).itemsize
            info.compress_size = info.file_size
            archive.fp.write(info.FileHeader(zip64=True))
            begin = archive.fp.tell()
            sparse_npy(archive.fp, dtype, shape, planted)
            assert archive.fp.tell() - begin == info.file_size
            archive.filelist.append(info)
            archive.NameToInfo[name] = info
            archive.start_dir = archive.fp.tell()
            archive._didModify = True


def sparse_shards(directory, n, shard_size, rows):
    write_shards(directory, *made(1, 0, (32, 32, 3)), shard_size, DATASETS["cifar10"], n=n)
    for shard in range(n // shard_size):
        first = shard * shard_size
        here = [row for row in rows if row // shard_size == shard]
        images_path, labels_path = shard_paths(directory, shard)
        with open(images_path, "wb") as file:
            planted = {row - first: row % 251 for row in here}
            sparse_npy(file, np.uint8, (shard_size, 32, 32, 3), planted)
        with open(labels_path, "wb") as file:
            planted = {row - first: row % 10 for row in here}
            sparse_npy(file, np.int64, (shard_size,), planted)


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="only Linux tells what memory a process has had"
)
def test_fifty_million_images_cost_no_more_memory_than_ten_thousand(tmp_path):
    """200 training batches with 358 of them each, and the digest.

    From one .npz file of 154 GB and from 200 shards, all of them holes.
    """
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(1 << 30)
    if (tmp_path / "hole").stat().st_blocks * 512 > 1 << 20:
        pytest.skip("this file system has no sparse files")
    small, large = 10_000, 50_000_000
    sparse_npz(tmp_path / "small.npz", small, [])
    sparse_npz(tmp_path / "large.npz", large, PLANTED)
    sparse_shards(tmp_path / "small", small, 5_000, [])
    sparse_shards(tmp_path / "large", large, 250_000, PLANTED)
    assert (tmp_path / "large.npz").stat().st_size > 153 * 10**9
    assert sum(p.stat().st_blocks * 512 for p in tmp_path.rglob("*") if p.is_file()) < 64 << 20
    jobs = []
    for name in ("small.npz", "large.npz", "small", "large"):
        rows = PLANTED if "large" in name else ()
        jobs.append([str(tmp_path / name), *rows])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(jobs)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    measured = [json.loads(line) for line in done.stdout.splitlines()]
    for row in measured:
        memory = ", ".join(f"{row[key]:.0f} {key}" for key in ("before", "opened", "after", "peak"))
        times = ", ".join(f"{key} {row[key]:.3f}" for key in row if key.endswith("_seconds"))
        print(f"\n{os.path.basename(row['path']):>9}: {times}; MB resident: {memory}", end="")
    assert [row["n"] for row in measured] == [small, large, small, large]
    assert len({row["digest"] for row in measured}) == 4
    for few, many in (measured[:2], measured[2:]):
        assert many["open_seconds"] < 30
        assert many["hash_seconds"] < 60  # 400 MB of labels and 300 MB of images, never 150 GB
        assert many["opened"] - many["before"] < 50
        assert many["after"] - few["after"] < 100 and many["peak"] - few["peak"] < 100
