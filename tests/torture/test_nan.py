"""NaN and overflow in the middle of training: it stops at the next validation, names the steps
since the last one, and keeps the checkpoint of that one.
"""

import pytest
from short_runs import TINY

import train_at
import train_at_aux
import train_diffusion
from common import UserError, attacks

DIFFUSION = "--train-steps 9 --eval-every 2 --channels 8 16 --batch-size 16".split()
CASES = {  # (script, flags, whose function returns what is wrong, its name, the factor)
    "data": (train_at, TINY, attacks, "pgd", float("nan")),
    "overflow in bf16": (train_at, [*TINY, "--precision", "bf16"], attacks, "pgd", 1e38),
    "teacher": (train_at_aux, TINY, train_at_aux.Teacher, "targets", float("nan")),
    "teacher, inf in bf16": (
        train_at_aux,
        [*TINY, "--precision", "bf16"],
        train_at_aux.Teacher,
        "targets",
        float("inf"),
    ),
    "gradient": (train_at_aux, TINY, train_at_aux, "alignment_loss", float("nan")),
    "diffusion loss": (train_diffusion, DIFFUSION, train_diffusion, "edm_loss", float("inf")),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "-"))
def test_a_step_that_is_not_finite_ends_the_run(case, tmp_path, diffusion_dir, monkeypatch):
    script, flags, module, name, factor = CASES[case]
    argv = [*flags, "--out-dir", str(tmp_path / "run")] + (
        ["--teacher", diffusion_dir] if script is train_at_aux else []
    )
    real, last, kept = getattr(module, name), tmp_path / "run" / "last.pt", []

    def wrong(*args, **kwargs):
        """Right until the first checkpoint is there."""
        if not last.exists():
            return real(*args, **kwargs)
        kept.append(last.read_bytes())
        return factor * real(*args, **kwargs)

    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(
        UserError, match="steps 3 to 4: loss, gradient or weights not finite.*last.pt"
    ):
        script.main(script.parse_args(argv))
    monkeypatch.undo()
    assert last.read_bytes() == kept[0]
    script.main(script.parse_args(argv))  # without the disturbance it goes on
