"""extract_features.py: what it stores, that it goes on where it was interrupted, its verdict.

Alone: python -m pytest tests/test_extract_features.py
"""

import json
import shutil

import numpy as np
import pytest
import torch

import extract_features
import generate_synthetic
import train_at
from analysis import metrics, verdict
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


@pytest.fixture(scope="module")
def pupil(tmp_path_factory):
    """The path of a classifier's best.pt. It had 300 digits; 200 were held out."""
    out = tmp_path_factory.mktemp("pupil")
    argv = "--n-train 300 --epochs 1 --n-steps 1 --eval-n-steps 1 --out-dir".split()
    train_at.main(train_at.parse_args([*argv, str(out)]))
    return str(out / "best.pt")


def test_verdict(diffusion_dir, pupil, tmp_path, capsys):
    """A teacher of three steps knows nothing, and the page says so. Finished, it is as before."""
    out = tmp_path / "features"
    blocks = ["mid_block", "up_blocks.0.resnets.0"]
    argv = ["--verdict", "--pupil", pupil, "--eps", "0.1", "--n-attacked", "20", "--n-train", "300"]
    argv += ["--blocks", *blocks]
    extract(diffusion_dir, out, *argv)
    printed = capsys.readouterr().out
    assert "# Will this teacher help?" in printed and "note" not in printed
    assert not list(out.glob("test-*"))
    judged = json.loads((out / "verdict.json").read_text())
    assert judged["n"] == 200 and judged["n_attacked"] == 20
    assert 0 <= judged["attacked"][0] <= judged["probe"][0]

    # The numbers are those of the stored features and of the pupil itself.
    labels = {split: np.load(out / f"{split}-labels.npy") for split in ("train", "val")}

    def probes_of(folder):
        probes = {}
        for block in blocks:
            features = {}
            for split in labels:
                features[split] = np.load(folder / f"{split}-{block}-sigma0.3.npy")[:, 0]
            weight, bias = metrics.fit_linear(features["train"], labels["train"], 10)
            predicted = (features["val"] @ weight.numpy().T + bias.numpy()).argmax(1)
            probes[block, 0.3] = {"correct": predicted == labels["val"]}
        return probes

    probes = probes_of(out)
    correct = verdict.correct_at_best(probes)
    control = verdict.correct_at_best(probes_of(out / "shuffled"))
    assert judged["control"][0] == pytest.approx(control.mean()) != correct.mean()
    assert judged["above_control"] == pytest.approx(verdict.difference(correct, control))
    assert (judged["block"], judged["sigma"]) == verdict.best_place(probes)
    assert judged["probe"][0] == pytest.approx(correct.mean())
    network, _ = load_classifier(pupil, DATASETS["digits"], "cpu")
    _, (images, _) = data.load_train(DATASETS["digits"], None, 200, 300)
    with torch.no_grad():
        logits, of_pupil = network(data.to_x(images), with_features=True)
    right = logits.argmax(1).numpy() == labels["val"]
    assert judged["pupil"][0] == pytest.approx(right.mean())
    assert judged["right_where_pupil_errs"][0] == pytest.approx(correct[~right].mean())
    of_teacher = np.load(out / f"val-{judged['block']}-sigma0.3.npy")[:, 0]
    expected = metrics.cka_interval(of_teacher, of_pupil.numpy())
    assert judged["cka"] == pytest.approx(expected, abs=1e-4)

    # The control is the same network with shuffled weights.
    model = load_diffusion(diffusion_dir, "cpu")
    verdict.shuffle_weights(model.net, 0)
    noise = data.normal_of(data.id_streams(0, "features-val", [7]), (1, 8, 8))
    (direct,) = model.features(data.to_x(images[7:8]), 0.3, None, ["mid_block"], noise)
    stored = np.load(out / "shuffled" / "val-mid_block-sigma0.3.npy")[7]
    assert stored == pytest.approx(direct.detach().numpy(), abs=1e-5)

    before = contents(out)
    extract(diffusion_dir, out, *argv)
    assert contents(out) == before
    assert json.loads((out / "verdict.json").read_text()) == judged

    # A verdict of other settings does not take its place.
    argv[argv.index("0.1")] = "0.2"
    with pytest.raises(UserError, match="verdict.json: differs in eps; take another --out-dir"):
        extract(diffusion_dir, out, *argv)
    assert contents(out) == before


def test_a_pupil_of_other_images_is_refused_before_anything_is_written(
    diffusion_dir, pupil, tmp_path, capsys
):
    out = tmp_path / "features"
    argv = ["--verdict", "--blocks", "mid_block", "--pupil", pupil]
    for others in ([], ["--n-train", "300", "--val-size", "201"]):
        with pytest.raises(UserError, match="--pupil .*args.json has val_size 200, n_train 300"):
            extract(diffusion_dir, out, *argv, *others)
    with pytest.raises(UserError, match="--val-size 63: --verdict needs 64 or more"):
        extract(diffusion_dir, out, *argv, "--val-size", "63")
    with pytest.raises(UserError, match="nowhere.pt: no such file"):
        extract(diffusion_dir, out, *argv[:-1], "nowhere.pt")
    assert not out.exists()
    alone = tmp_path / "best.pt"
    shutil.copy(pupil, alone)
    capsys.readouterr()
    extract(diffusion_dir, out, *argv[:-1], str(alone), "--n-train", "100")
    assert "note: nothing beside --pupil tells" in capsys.readouterr().out


def test_a_network_without_a_null_label_is_warned_of(diffusion_dir, pupil, tmp_path, capsys):
    """Features are taken, and with --relabel images made, as if it had one."""
    network = tmp_path / "network"
    shutil.copytree(diffusion_dir, network)
    config = json.loads((network / "config.json").read_text()) | {"label_dropout": 0}
    (network / "config.json").write_text(json.dumps(config))
    warning = f"warning: {network} was trained without label dropout"
    extract(str(network), tmp_path / "features", "--blocks", "mid_block")
    assert capsys.readouterr().out.startswith(warning)
    argv = f"--diffusion {network} --relabel --classifier {pupil} --n-images 20 --n-steps 2".split()
    argv += ["--out-dir", str(tmp_path / "set")]
    generate_synthetic.main(generate_synthetic.parse_args(argv))
    assert warning in capsys.readouterr().out
