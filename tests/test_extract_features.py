"""extract_features.py: what it stores, and that it goes on where it was interrupted.

Alone: python -m pytest tests/test_extract_features.py
"""

import numpy as np
import pytest

import extract_features
from common import UserError, data
from published.datasets import DATASETS
from teachers.load import load_diffusion


def extract(diffusion_dir, out, *argv):
    argv = ["--diffusion", diffusion_dir, "--sigmas", "0.3", "--batch-size", "100", *argv]
    extract_features.main(extract_features.parse_args([*argv, "--out-dir", str(out)]))


def test_stored_features_are_those_of_a_direct_call(diffusion_dir, tmp_path):
    out = tmp_path / "features"
    extract(diffusion_dir, out, "--blocks", "mid_block", "--n-draws", "2")
    stored = np.load(out / "test-mid_block-sigma0.3.npy")
    assert stored.shape == (797, 2, 16)
    model = load_diffusion(diffusion_dir, "cpu")
    images, labels = data.load_test(DATASETS["digits"], None)
    ids = [0, 99, 100, 796]
    x = data.to_x(images[ids])
    streams = data.id_streams(0, "features-test", ids)
    for draw in (0, 1):
        noise = data.normal_of(streams, (1, 8, 8))
        (direct,) = model.features(x, 0.3, None, ["mid_block"], noise)
        assert stored[ids, draw] == pytest.approx(direct.numpy(), abs=1e-5)
    assert np.abs(stored[:, 0] - stored[:, 1]).max() > 1e-3
    assert np.array_equal(np.load(out / "test-labels.npy"), labels)


class Interrupted(Exception):
    pass


@pytest.fixture
def run(diffusion_dir, tmp_path, monkeypatch):
    """A function that extracts to a directory, and gives the number of calls for training images.

    stop: the call that raises Interrupted instead.
    """
    features_of = extract_features.features_of

    def run(name, *blocks, stop=None):
        calls = []

        def counted(model, images, ids, split, *args):
            calls.append(split)
            if len(calls) == stop:
                raise Interrupted
            return features_of(model, images, ids, split, *args)

        monkeypatch.setattr(extract_features, "features_of", counted)
        extract(diffusion_dir, tmp_path / name, "--blocks", *blocks)
        return calls.count("train")

    return run


def contents(folder):
    """{name: bytes} of the arrays of a directory."""
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


def test_extraction_goes_on_batch_by_batch(run, tmp_path):
    """Interrupted in the fifth batch, then under another set of blocks: what is written is not
    computed again, and the bytes are the same.
    """
    both = ("mid_block", "up_blocks.0.resnets.0")
    assert run("whole", *both) == 1 + 8  # one image for the width
    with pytest.raises(Interrupted):
        run("cut", "mid_block", stop=6)
    assert run("cut", *both) == 1 + 8  # for the other block
    with pytest.raises(Interrupted):
        run("again", *both, stop=6)
    assert run("again", *both) == 1 + 4
    expected = contents(tmp_path / "whole")
    assert contents(tmp_path / "cut") == contents(tmp_path / "again") == expected
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == names


def test_flags_without_their_map_are_of_no_use(run, tmp_path):
    run("whole", "mid_block")
    with pytest.raises(Interrupted):
        run("lost", "mid_block", stop=6)
    for path in (tmp_path / "lost").glob("train-*0.3.npy.writing"):
        path.unlink()
    run("lost", "mid_block")
    assert contents(tmp_path / "lost") == contents(tmp_path / "whole")


def test_a_map_of_another_kind_is_refused(run, tmp_path):
    run("features", "mid_block")
    path = tmp_path / "features" / "test-mid_block-sigma0.3.npy"
    np.save(path, np.zeros(3))
    path.rename(f"{path}.writing")
    match = r"sigma0.3.npy.writing: found float64 \(3,\), expected float32"
    with pytest.raises(UserError, match=match):
        run("features", "mid_block")
