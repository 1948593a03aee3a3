"""Other forms of DRA that were tried, each a change to train_at_aux.py from outside: what they gave stands in docs/log.md.

python -m runs.dra_variants whiten --synthetic out/evidence/synthetic-100 --teacher out/evidence/diffusion-100 --out-dir out/variant

  whiten      targets whitened by the training images' covariance (with 1 % of its mean eigenvalue added), not only centred
  levels      targets at four noise levels side by side: 0.03, 0.1, 0.3, 1
  rise, fall  the weight rises linearly from 0 over the first half of training, or is 0 after it
  stage2      aligned is the pooled output of the classifier's second stage (4 x 4 pixels on digits) instead of its last feature
  spatial     that output and the diffusion network's, position by position instead of pooled (both 4 x 4)

Further arguments are those of train_at_aux.py. For digits and one process; not resumed, the directory must be new.
"""

import os
import sys

import torch
import torch.nn.functional as F

import train_at_aux as dra
from common import cli, models

LEVELS = (0.03, 0.1, 0.3, 1.0)
alignment, alignment_head, teacher_targets, teacher_mean, one_cycle = (
    getattr(dra, name) for name in ("alignment", "alignment_head", "teacher_targets", "teacher_mean", "one_cycle")
)


def whiten():
    found = {}

    def mean_and_whitening(teacher, images, labels, args):
        mean = teacher_mean(teacher, images, labels, args)
        x = dra.data.to_x(images[:10_000])
        noise = torch.randn(len(x), *teacher.noise_shape, generator=dra.data.stream(args.seed, "teacher-covariance"))
        centred = teacher_targets(teacher, x, torch.from_numpy(labels[:10_000]), noise, mean, args).double()
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(x))
        found["whitening"] = (directions / (variances.clamp(0) + 0.01 * variances.mean()).sqrt()).float()
        return mean

    def whitened(teacher, x, y, noise, mean, args):
        centred = teacher_targets(teacher, x, y, noise, mean, args)
        return centred @ found["whitening"] if found else centred

    dra.teacher_mean, dra.teacher_targets = mean_and_whitening, whitened


def levels():
    def targets(teacher, x, y, noise, mean, args):
        label = y if args.teacher_label == "true" else None
        return torch.cat([teacher.features(x, sigma, label, [args.block], noise)[0] for sigma in LEVELS], 1) - mean

    dra.teacher_targets = targets


def weighted(weight):
    """The weight times a function of the share of training that is done, counted by the epochs of the schedule."""
    now = {}

    def schedule(epoch, args):
        now["done"] = epoch / args.epochs
        return one_cycle(epoch, args)

    def scaled(head, features, targets):
        cosine = alignment(head, features, targets)
        return 1 - weight(now["done"]) * (1 - cosine) if torch.is_grad_enabled() else cosine

    dra.one_cycle, dra.alignment = schedule, scaled


def earlier_stage(spatial):
    def forward(self, x, with_features=False):
        stem, second = self.init_conv((x - self.mean) / self.std), None
        second = self.layer[1](self.layer[0](stem))
        logits = self.logits(F.silu(self.batchnorm(self.layer[2](second))).mean((2, 3)))
        return (logits, second.flatten(2).mT if spatial else second.mean((2, 3))) if with_features else logits

    def head(num_features, width, num_targets):
        return alignment_head(num_features // 2, width, dra.alignment_width if spatial else num_targets)

    def targets(teacher, x, y, noise, mean, args):
        kept = []
        hook = teacher.hooked.get_submodule(args.block).register_forward_hook(lambda module, inputs, output: kept.append(output))
        teacher_targets(teacher, x, y, noise, 0, args)
        hook.remove()
        dra.alignment_width = kept[0].shape[1]
        return kept[0].flatten(2).mT - mean

    def by_position(head, features, targets):
        return sum(F.cosine_similarity(head(f).float(), targets.float(), dim=-1).mean() for f in features) / len(features)

    models.WideResNet.forward, dra.alignment_head = forward, head
    if spatial:
        dra.teacher_targets, dra.alignment = targets, by_position


VARIANTS = {
    "whiten": whiten,
    "levels": levels,
    "rise": lambda: weighted(lambda done: min(2 * done, 1.0)),
    "fall": lambda: weighted(lambda done: float(done < 0.5)),
    "stage2": lambda: earlier_stage(spatial=False),
    "spatial": lambda: earlier_stage(spatial=True),
}


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = cli.Parser(__doc__)
    parser.add_argument("variant", choices=VARIANTS, help="see above")
    variant = parser.parse_args(argv[:1]).variant
    args = dra.parse_args(argv[1:])
    args.variant = variant
    return args


def main(args):
    if os.path.exists(os.path.join(args.out_dir, "last.pt")):
        raise cli.UserError(f"--out-dir {args.out_dir}: holds a run, and variants are not resumed; choose another directory")
    VARIANTS[args.variant]()
    dra.main(args)


if __name__ == "__main__":
    cli.run(main, parse_args())
