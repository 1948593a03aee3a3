"""extract_features.py: what it stores, that it goes on where it was interrupted, its verdict.

Alone: python -m pytest tests/test_extract_features.py
"""

import json

import numpy as np
import pytest
import torch

import extract_features
import train_at
from analysis import metrics
from common import UserError, data
from published.datasets import DATASETS
from published.weights import load_classifier
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


# ------------------------------------------------------------------------------------ the verdict


def test_shuffled_weights_are_the_same_numbers_elsewhere(diffusion_dir):
    model, shuffled = (load_diffusion(diffusion_dir, "cpu") for _ in range(2))
    extract_features.shuffle_weights(shuffled.net, seed=0)
    for before, after in zip(model.net.parameters(), shuffled.net.parameters()):
        assert torch.equal(before.flatten().sort()[0], after.flatten().sort()[0])
    weight, changed = model.net.conv_in.weight, shuffled.net.conv_in.weight
    assert not torch.equal(weight, changed)


def test_verdict(diffusion_dir, tmp_path, capsys):
    """A teacher of three steps knows nothing, and the page says so. Finished, it is as before."""
    train_at.main(
        train_at.parse_args(
            [
                "--epochs",
                "1",
                "--n-steps",
                "1",
                "--eval-n-steps",
                "1",
                "--out-dir",
                f"{tmp_path}/at",
            ]
        )
    )
    out = tmp_path / "features"
    argv = ["--verdict", "--pupil", f"{tmp_path}/at/best.pt", "--eps", "0.1", "--n-attacked", "20"]
    argv += ["--blocks", "mid_block", "up_blocks.0.resnets.0", "--n-train", "300"]
    extract(diffusion_dir, out, *argv)
    assert "# Will this teacher help?" in capsys.readouterr().out
    assert not list(out.glob("test-*"))
    judged = json.loads((out / "verdict.json").read_text())
    assert judged["n"] == 200
    assert 0 <= judged["attacked"] <= judged["probe"][0]

    # The numbers are those of the stored features and of the pupil itself.
    place = f"{judged['block']}-sigma{judged['sigma']}.npy"
    features = {split: np.load(out / f"{split}-{place}")[:, 0] for split in ("train", "val")}
    labels = {split: np.load(out / f"{split}-labels.npy") for split in features}
    weight, bias = metrics.fit_linear(features["train"], labels["train"], 10)
    correct = (features["val"] @ weight.numpy().T + bias.numpy()).argmax(1) == labels["val"]
    assert judged["probe"][0] == pytest.approx(correct.mean())
    pupil, _ = load_classifier(f"{tmp_path}/at/best.pt", DATASETS["digits"], "cpu")
    _, (images, _) = data.load_train(DATASETS["digits"], None, 200, 300)
    with torch.no_grad():
        right = pupil.eval()(data.to_x(images)).argmax(1).numpy() == labels["val"]
    assert judged["pupil"][0] == pytest.approx(right.mean())
    assert judged["probe_alone"][0] == pytest.approx((correct & ~right).mean())
    assert judged["control"][0] != judged["probe"][0]

    before = contents(out)
    extract(diffusion_dir, out, *argv)
    assert contents(out) == before
    assert json.loads((out / "verdict.json").read_text()) == judged
