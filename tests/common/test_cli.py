"""What is written for people to read."""

from common import cli


def test_a_radius_is_written_as_in_papers():
    assert cli.threat("linf", 8 / 255) == "linf 8/255"
    assert cli.threat("l2", 128 / 255) == "l2 128/255"
    for eps in (0.15, 0.2, 0.5, 1.0, 12.0):  # 0.2 is 51/255
        assert cli.threat("l2", eps) == f"l2 {eps:g}"
    assert cli.threat("linf", 0.0123456) == "linf 0.01235"
