"""What a training step costs, as ratios measured in one run: alternating, median of --repeats.

    python benchmarks/train_step.py

Rows, against the first: the step as train_at.py does it; without channels-last; with a clean pass of its own for the
attack's reference; with weight gradients in the attack (loss.backward()); with the diffusion network run whole for DRA's
targets; with it left at the block. Prints a table and writes benchmarks/results.json.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import attacks, checkpoint, cli, data, diffusion, models, runlog  # noqa: E402


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", default="wrn-10-1", help="wrn-<depth>-<width>, on digits")
    parser.add_argument("--batch-size", type=cli.count, default=128, help="images")
    parser.add_argument("--n-steps", type=cli.count, default=5, help="steps of PGD")
    parser.add_argument("--repeats", type=cli.count, default=9, help="measurements of each row")
    return parser.parse_args(argv)


def step(model, x, y, start, args, separate_clean_pass=False, weight_gradients=False, extra=None):
    """Forward, attack and backward of one TRADES step (no optimiser); `extra` is called with x where DRA takes its targets."""
    logits = model(x)
    reference = None if separate_clean_pass else logits.detach()
    if weight_gradients:
        x_adv = backward_attack(model, x, y, start, args, logits.detach())
    else:
        attack = dict(norm="linf", eps=0.15, step_size=0.0375, n_steps=args.n_steps, loss="kl", bn="batch")
        x_adv = attacks.pgd(model, x, y, [start], reference=reference, **attack)
    loss = F.cross_entropy(logits, y) + 5 * F.kl_div(
        model(x_adv).log_softmax(1), logits.log_softmax(1), reduction="batchmean", log_target=True
    )
    if extra:
        extra(x)
    model.zero_grad(set_to_none=True)
    loss.backward()


def backward_attack(model, x, y, start, args, reference):
    """The attack by loss.backward(), as much public code has it: gradients of all weights are computed and thrown away."""
    x_adv = attacks.project(x + start, x, "linf", 0.15)
    for _ in range(args.n_steps):
        x_adv.requires_grad_(True)
        attacks.attack_losses(model(x_adv), y, "kl", reference).sum().backward()
        x_adv = attacks.project(attacks.ascend(x_adv.detach(), x_adv.grad, "linf", 0.0375), x, "linf", 0.15)
    return x_adv


def main(args):
    spec = data.DATASETS["digits"]
    torch.manual_seed(0)
    model = models.build(args.model, spec)
    contiguous = models.build(args.model, spec).to(memory_format=torch.contiguous_format)
    x = torch.rand(args.batch_size, 8, 8, 1).permute(0, 3, 1, 2)
    y = torch.randint(0, 10, (args.batch_size,))
    start = attacks.random_start(x.shape, "linf", 0.15, torch.Generator().manual_seed(0))
    teacher = tiny_teacher(spec)
    noise = torch.randn(x.shape)

    def whole(x):
        with torch.no_grad():
            teacher.denoise(2 * x - 1 + 0.1 * noise, 0.1)

    def cut(x):
        with torch.no_grad():
            teacher.features(x, 0.1, None, ["up_blocks.0.resnets.0"], noise)

    rows = {
        "train_at.py's step": lambda: step(model, x, y, start, args),
        "NCHW instead of channels-last": lambda: step(contiguous, x.contiguous(), y, start.contiguous(), args),
        "a separate clean pass for the attack": lambda: step(model, x, y, start, args, separate_clean_pass=True),
        "weight gradients in the attack": lambda: step(model, x, y, start, args, weight_gradients=True),
        "DRA targets, network run whole": lambda: step(model, x, y, start, args, extra=whole),
        "DRA targets, left at the block": lambda: step(model, x, y, start, args, extra=cut),
    }
    seconds = {name: [] for name in rows}
    for repeat in range(args.repeats + 1):
        for name, run in rows.items():
            begun = time.perf_counter()
            run()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - begun)
    first = next(iter(rows))
    results = []
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds[first])]
        results.append({"name": name, "ms": 1000 * statistics.median(values), "ratio": statistics.median(ratios)})
        print(f"{name:<38}{results[-1]['ms']:8.1f} ms   x {results[-1]['ratio']:.2f}")
    settings = vars(args) | {"environment": runlog.environment()}
    checkpoint.write_json({"settings": settings, "rows": results}, ROOT / "benchmarks" / "results.json")


def tiny_teacher(spec):
    """The diffusion network of train_diffusion.py's digits default, with random weights."""
    import diffusers

    levels = dict(block_out_channels=[24, 48], down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2, layers_per_block=1)
    size = dict(sample_size=spec.image_size, in_channels=spec.channels, out_channels=spec.channels, num_class_embeds=spec.num_classes + 1)
    net = diffusers.UNet2DModel(**size, **levels, norm_num_groups=8)
    net.register_to_config(sigma_data=0.5, label_dropout=0.1)
    return diffusion.Diffusion(net.to(memory_format=torch.channels_last).eval().requires_grad_(False))


if __name__ == "__main__":
    cli.run(main, parse_args())
