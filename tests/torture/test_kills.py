"""SIGKILL at random moments, in the middle of writes too: the same command goes on and ends with
the bits of a run without a break.

And disks that are full: one line, status 2, and when there is room again the same command goes on
to the same bits.
"""

import collections
import itertools
import random
import subprocess

import pytest
from short_runs import SCRIPTS, TINY, assert_same, command, kept, zygote

import train_at


@pytest.fixture(scope="module")
def run():
    with zygote() as function:
        yield function


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A trained best.pt."""
    out = tmp_path_factory.mktemp("made") / "at"
    train_at.main(train_at.parse_args([*TINY, "--out-dir", str(out)]))
    return out / "best.pt"


def killed_and_resumed(script, n, seed, run, folder, *made):
    """Runs that are killed once or several times, n times in all, at moments drawn from `seed`;
    returns where the kills fell.
    """
    rng, fell = random.Random(f"{script} {seed}"), collections.Counter()
    straight = run(script, command(script, folder / "straight", *made))
    assert straight["status"] == 0
    expected = kept(folder / "straight")
    assert any(name.endswith((".pt", ".npy", ".npz")) for name in expected)
    for case in itertools.count():
        if sum(fell.values()) - fell["after the end"] >= n:
            break
        argv, deaths = command(script, folder / str(case), *made), []
        while len(deaths) < 5 and (not deaths or rng.random() < 0.3):
            where = rng.choice(["at any time", *straight["said"]])
            last = straight["said"].get(where)
            deaths.append(
                [where, rng.randint(1, last)] if last else rng.uniform(0, straight["seconds"])
            )
            fell[where if run(script, argv, deaths[-1])["status"] == -9 else "after the end"] += 1
        assert run(script, argv)["status"] == 0, (script, seed, case, deaths)
        assert_same(folder / str(case), expected, (script, seed, case, deaths))
    return fell


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_once(script, run, tmp_path, diffusion_dir, classifier):
    killed_and_resumed(script, 1, 0, run, tmp_path, diffusion_dir, classifier)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_fifty_times(script, run, tmp_path, diffusion_dir, classifier):
    fell = killed_and_resumed(script, 50, 1, run, tmp_path, diffusion_dir, classifier)
    print(f"\n{script}: {dict(fell)}")
    assert all(
        fell[where] >= 3
        for where in (
            "at any time",
            "in a write",
            "before an fsync",
            "before a rename",
            "after a rename",
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_file_may_grow(script, run, tmp_path, diffusion_dir, classifier):
    """RLIMIT_FSIZE: writes fail (EFBIG) at the first file beyond the limit, whichever it is."""
    assert (
        run(script, command(script, tmp_path / "straight", diffusion_dir, classifier))["status"]
        == 0
    )
    expected, statuses = kept(tmp_path / "straight"), []
    for largest in (10, 300, 1000, 3000, 10_000, 100_000, 500_000):
        argv = command(script, tmp_path / str(largest), diffusion_dir, classifier)
        statuses.append(run(script, argv, largest=largest)["status"])
        assert run(script, argv)["status"] == 0, largest
        assert_same(tmp_path / str(largest), expected, largest)
    assert 2 in statuses and set(statuses) <= {0, 2}, statuses


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_space_left(script, run, tmp_path, diffusion_dir, classifier):
    """A real file system that is too small (ENOSPC); then, with more room, the same command goes
    on.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("no right to mount")
    taken = (
        -(-classifier.stat().st_size // 4096) * 4 if script == "evaluate" else 0
    )  # kB, by the checkpoint that it evaluates
    try:
        assert (
            run(script, command(script, tmp_path / "straight", diffusion_dir, classifier))["status"]
            == 0
        )
        statuses = []
        for room in (8, 64, 96, 256, 1000, 100_000):
            subprocess.run(["mount", "-o", f"remount,size={taken + room}k", disk], check=True)
            statuses.append(
                run(script, command(script, disk / "run", diffusion_dir, classifier))["status"]
            )
        assert statuses[0] == 2 and statuses[-1] == 0 and set(statuses) == {0, 2}, statuses
        assert_same(disk / "run", kept(tmp_path / "straight"), statuses)
    finally:
        subprocess.run(["umount", disk], check=True)
