"""analysis/probes.py: what is printed and written.

Alone: python -m pytest tests/analysis/test_probes.py
"""

import json

import numpy as np

from analysis import probes


def test_rows_are_blocks_and_columns_noise_levels(tmp_path, capsys):
    results = {}
    for block, n_correct in (("late", 3), ("early", 1)):
        for sigma in (1.0, 0.1):
            correct = np.arange(4) < n_correct + (sigma == 1.0)
            attacked = correct[:2] & (block == "early")
            share = correct.mean()
            results[block, sigma] = {"correct": correct, "accuracy": share, "attacked": attacked}
    settings = {"split": "val", "precision": "fp32", "out_dir": str(tmp_path)}
    probes.report(results, ["early", "late"], [0.1, 1.0], eps=0.03, **settings)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "linear probe, accuracy on 4 val images (rows: block, columns: sigma)",
        "          0.1       1",
        "early   25.0%   50.0%",
        "late    75.0%  100.0%",
    ]
    assert lines[4].startswith("the same under attack, linf 0.03, first 2 images")
    written = json.loads((tmp_path / "probe.json").read_text())
    assert written["accuracy"] == [[0.25, 0.5], [0.75, 1.0]]
    assert written["attacked"] == [[0.5, 1.0], [0.0, 0.0]]
    assert (tmp_path / "probe.png").read_bytes()[:4] == b"\x89PNG"
