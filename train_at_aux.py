"""Adversarial training with Diffusion Representation Alignment (DRA): train_at.py plus one loss term.

Reconstruction of arXiv 2602.19931, whose exact form is not public to us. The classifier's pooled penultimate feature f,
through an MLP head h, is aligned by cosine with a frozen diffusion network's feature g of the clean image at one noise level:

    L = L_AT(x, x_adv, y) + aux_weight * mean_i [ 1 - cos( h(f(z_i)), g(x_i + sigma * n_i) ) ],   z = x_adv, x or both,

n_i fresh Gaussian noise, g pooled over space at --block (the network is left there). The attack maximises L_AT's own
objective only. The head is no part of the exported classifier. --shuffle-targets deals the batch's targets out at random: the
control that has the head, its cost and its gradients, but no information. Weight 0 gives train_at.py's very weights.
--align-loss contrastive, not the paper's, has instead of 1 - cos the cross-entropy of telling i's target from all those of the
process's (micro-)batch, with cosines / 0.1 as logits; an image drawn twice, under other crops and noise, is its own negative.

    python train_diffusion.py && python train_at_aux.py                               # AT+DRA on digits, five minutes on two CPU cores
    python train_at_aux.py --synthetic out/synthetic-digits --out-dir out/dm_at_dra   # DM-AT+DRA
    torchrun --nproc_per_node 8 train_at_aux.py --dataset imagenet --data-dir data/imagenet --teacher hub:facebook/DiT-XL-2-256

`diff train_at.py train_at_aux.py` shows DRA and nothing else; see train_at.py for L_AT, the recipe and the files written.
"""

import argparse
import functools
import math
import os
import time

import safetensors.torch
import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from common import attacks, checkpoint, cli, data, diffusion, dist, models, runlog
from common import synthetic as synthetic_sets
from common.ema import EMA

# fmt: off
RECIPE = dict(
    model="wrn-28-10", n_steps=10, beta=5.0, label_smoothing=0.1, epochs=400, batch_size=512,
    loss="trades", attack="pgd", attack_bn="batch", mixup=0.0, cutmix=0.0, optimizer="sgd", lr=0.2, warmup_fraction=0.025,
    momentum=(0.85, 0.95), betas=(0.9, 0.95), final_lr=5e-6, weight_decay=5e-4, bn_momentum=0.01, ema_decay=0.995,
    eval_every=1, eval_n_steps=40, aux_weight=1.0, head_width=2048,
)
TEMPERATURE = 0.1  # of --align-loss contrastive
SYNTHETIC_FRACTION = 0.7  # of each batch, where there is a synthetic set; the base uses 0.8 above 1 M images
PRESETS = {
    # A small network, a short schedule, and clipping: on 800 images one unlucky step at lr 0.2 costs several points.
    "digits": dict(
        model="wrn-10-1", n_steps=5, epochs=100, batch_size=128, clip_norm=5.0, eval_every=10, eval_n_steps=20,
        block="up_blocks.0.resnets.0", sigma=0.1, head_width=256,
    ),
    # The base counts an epoch's steps from all training images, the held-out ones too: 98 at batch 512 for CIFAR, 39,200 in all.
    "cifar10": dict(epoch_images=50_000),
    "cifar100": dict(epoch_images=50_000),
    "svhn": dict(epoch_images=73_257),
    "tiny-imagenet": dict(epoch_images=100_000),
    "fashion-mnist": dict(
        model="wrn-10-1", n_steps=5, epochs=10, batch_size=128, lr=0.1, warmup_fraction=0.2, clip_norm=5.0, eval_n_steps=10,
        sigma=0.3, head_width=256,
    ),
    # That of Singh et al. (arXiv 2303.01870); start from clean weights (--init). No color jitter: timm has none beside RandAugment.
    "imagenet": dict(
        model="convnext_tiny", loss="pgd", attack="apgd", n_steps=2, attack_bn="running", mixup=0.8, cutmix=1.0, optimizer="adamw",
        lr=1e-3, warmup_fraction=0.1, weight_decay=0.05, epochs=50, batch_size=1024, ema_decay=0.9999, eval_n_steps=10,
    ),
}
# Small ViTs: ours, there is no base. AdamW, warm-up and cosine, clipping.
MODEL_PRESETS = {"vit": dict(optimizer="adamw", lr=1e-3, warmup_fraction=0.05, weight_decay=0.05, clip_norm=1.0)}
# fmt: on


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=data.DATASETS, default="digits", help="data set; decides the defaults below")
    group.add_argument("--data-dir", default="data", help="where data sets lie (digits needs none)")
    group.add_argument("--download", action="store_true", help="fetch the data set into --data-dir first")
    group.add_argument("--workers", type=cli.count0, default=8, help="processes per rank that decode images (imagenet)")
    group.add_argument("--synthetic", nargs="+", help="directories of generate_synthetic.py or .npz files, each PATH or PATH=SHARE: DM-AT")
    group.add_argument("--synthetic-fraction", type=cli.fraction, help=f"its share of each batch (default: {SYNTHETIC_FRACTION})")
    group.add_argument("--val-size", type=cli.count, help="first training images, held out (default: 200 for digits, else 1024)")
    group.add_argument("--n-train", type=cli.count, help="train on the next so many images only (default: all others)")
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="wrn-<depth>-<width>, preact-18, vit-s-2, vit-b-2; imagenet: resnet50, convnext_tiny, ...")
    group.add_argument("--init", help="file of weights to start from, of this project or others, or `torchvision`")
    group = parser.add_argument_group("threat model and attack in training")
    group.add_argument("--norm", choices=["linf", "l2"], default="linf", help="norm of the perturbation")
    group.add_argument("--eps", type=cli.non_negative, help="radius, of x in [0, 1] (default: the data set's usual one)")
    group.add_argument("--attack", choices=["pgd", "apgd"], help="apgd: Auto-PGD from x itself (--loss pgd)")
    group.add_argument("--step-size", type=cli.positive, help="step of pgd, of x in [0, 1] (default: eps / 4)")
    group.add_argument("--n-steps", type=cli.count, help="steps of the attack")
    group.add_argument("--attack-bn", choices=["batch", "running"], help="BatchNorm statistics that the attack uses (running: eval mode)")
    group = parser.add_argument_group("loss")
    group.add_argument("--loss", choices=["trades", "pgd", "standard"], help="standard: no attack, CE(f(x), y)")
    group.add_argument("--beta", type=cli.non_negative, help="weight of TRADES' KL term")
    group.add_argument("--label-smoothing", type=cli.fraction, help="probability spread over all classes, in CE")
    group.add_argument("--mixup", type=cli.non_negative, help="alpha of MixUp; 0 is off")
    group.add_argument("--cutmix", type=cli.non_negative, help="alpha of CutMix; with MixUp on too, either one is drawn for a batch")
    group = parser.add_argument_group("alignment with the diffusion model (DRA)")
    group.add_argument("--teacher", help="directory, NVlabs .pkl or hub:OWNER/NAME (default: out/diffusion-<dataset>)")
    group.add_argument("--block", help="block of the diffusion network whose output is the target; without it, by kind of network")
    group.add_argument("--sigma", type=cli.positive, help="noise level of its input, in units of [-1, 1]; without it, by kind of network")
    group.add_argument("--aux-weight", type=cli.non_negative, help="weight of the alignment term")
    group.add_argument("--align", choices=["adv", "clean", "both"], default="adv", help="images whose features are aligned")
    group.add_argument("--align-loss", choices=["cosine", "contrastive"], default="cosine", help="contrastive: see above")
    group.add_argument("--teacher-label", choices=["none", "true"], default="none", help="label given to the diffusion network")
    group.add_argument("--center-targets", action=argparse.BooleanOptionalAction, default=True, help="subtract the targets' mean")
    group.add_argument("--head-width", type=cli.count, help="hidden width of the MLP head")
    group.add_argument("--shuffle-targets", action=argparse.BooleanOptionalAction, default=False, help="control: permute the targets")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--optimizer", choices=["sgd", "adamw"], help="sgd: Nesterov, one cycle per epoch; adamw: warm-up, cosine per step")
    group.add_argument("--epochs", type=cli.count, help="one epoch is ceil(--epoch-images / batch size) steps, synthetic images or not")
    group.add_argument("--epoch-images", type=cli.count, help="images that count as an epoch; without it, the real ones trained on")
    group.add_argument("--batch-size", type=cli.count, help="global batch size, images")
    group.add_argument("--lr", type=cli.positive, help="peak learning rate")
    group.add_argument("--warmup-fraction", type=cli.fraction, help="share of training before the peak, and before averaging starts")
    group.add_argument("--momentum", type=cli.fraction, nargs=2, metavar=("LOW", "HIGH"), help="of sgd, at the peak and at the ends")
    group.add_argument("--betas", type=cli.fraction, nargs=2, metavar=("BETA1", "BETA2"), help="of adamw")
    group.add_argument("--final-lr", type=cli.non_negative, help="learning rate at the end, of adamw")
    group.add_argument("--weight-decay", type=cli.non_negative, help="not on BatchNorm parameters; adamw: nor on any bias or scale")
    group.add_argument("--accumulate", type=cli.count, default=1, help="parts that a rank splits its batch into, to save memory")
    group.add_argument("--clip-norm", type=cli.positive, help="largest l2 norm of the gradient, where there is a limit")
    group.add_argument("--bn-momentum", type=cli.fraction, help="BatchNorm's momentum, after 1.0 at the first step")
    group.add_argument("--ema-decay", type=cli.fraction, help="decay per step of the averaged model")
    group = parser.add_argument_group("validation and run")
    group.add_argument("--eval-every", type=cli.count, help="epochs between validation with checkpoint")
    group.add_argument("--eval-n-steps", type=cli.count, help="PGD steps (margin loss) of the validation")
    group.add_argument("--out-dir", help="run directory (default: out/train_at_aux-<dataset>)")
    group.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the networks' passes; losses and updates are fp32")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the classifier")
    group.add_argument("--seed", type=cli.seed, default=0, help="seed of all randomness")

    args = parser.parse_with_presets(argv, RECIPE, PRESETS, MODEL_PRESETS)
    args.out_dir = args.out_dir or f"out/train_at_aux-{args.dataset}"
    args.val_size = data.DATASETS[args.dataset].val_size if args.val_size is None else args.val_size
    args.eps = data.DATASETS[args.dataset].eps[args.norm] if args.eps is None else args.eps
    args.step_size = args.eps / 4 if args.step_size is None else args.step_size
    if args.synthetic_fraction is not None and args.synthetic is None:
        parser.error("argument --synthetic-fraction: there is no synthetic set, give --synthetic DIR")
    if args.synthetic is not None and args.synthetic_fraction is None:
        args.synthetic_fraction = SYNTHETIC_FRACTION
    args.teacher = args.teacher or f"out/diffusion-{args.dataset}"
    if args.teacher_label == "true" and (args.mixup or args.cutmix):
        parser.error("argument --teacher-label: mixed images have no true label, give --mixup 0 --cutmix 0")
    if args.loss == "standard" and args.align != "clean":
        parser.error(f"argument --align: '{args.align}' needs an attack, with --loss standard give --align clean")
    parser.refuse_unused(argv, {
        "--beta": ("--loss trades", args.loss == "trades"),
        "--step-size": ("--attack pgd", args.attack == "pgd" and args.loss != "standard"),
        "--momentum": ("--optimizer sgd", args.optimizer == "sgd"),
        "--betas": ("--optimizer adamw", args.optimizer == "adamw"),
        "--final-lr": ("--optimizer adamw", args.optimizer == "adamw"),
        "--workers": ("image files (imagenet)", data.DATASETS[args.dataset].files),
    })  # fmt: skip
    for name in ("mixup", "cutmix"):
        if 0 < getattr(args, name) < 0.01:
            parser.error(f"argument --{name}: {getattr(args, name)}, expected 0 or at least 0.01")
    if max(args.betas) == 1 or args.momentum[1] == 0:
        parser.error("argument --betas: expected below 1" if max(args.betas) == 1 else "argument --momentum: HIGH must be above 0")
    if args.attack == "apgd" and args.loss == "trades":
        parser.error("argument --attack: apgd maximises cross-entropy, it goes with --loss pgd")
    if args.momentum[0] > args.momentum[1]:
        parser.error(f"argument --momentum: {args.momentum[0]} above {args.momentum[1]}, expected LOW HIGH")
    return args


# ----------------------------------------------------------------------------------------------------- the method


def at_loss(logits, logits_adv, y, args):
    """The loss of the module docstring and its parts {"loss_clean", "loss_robust"}; scalars in float32.

    logits, logits_adv: (B, K) of the clean and the adversarial images; None where args.loss does not need them. The
    gradient flows through both sides of the KL term, as in the base code.
    """
    zero = torch.zeros((), device=y.device)
    if args.loss == "trades":
        loss_clean = F.cross_entropy(logits.float(), y, label_smoothing=args.label_smoothing)
        log_p, log_q = logits.float().log_softmax(1), logits_adv.float().log_softmax(1)
        loss_robust = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return loss_clean + args.beta * loss_robust, {"loss_clean": loss_clean, "loss_robust": loss_robust}
    if args.loss == "pgd":
        loss_robust = F.cross_entropy(logits_adv.float(), y, label_smoothing=args.label_smoothing)
        return loss_robust, {"loss_clean": zero, "loss_robust": loss_robust}
    loss_clean = F.cross_entropy(logits.float(), y, label_smoothing=args.label_smoothing)
    return loss_clean, {"loss_clean": loss_clean, "loss_robust": zero}


def adversarial_loss(model, raw_model, x, y, start, args):
    """(L_AT, its parts, x_adv, list of features to align (B, D)) for x, y (labels or their probabilities) and the attack's `start`.

    model: what the gradient is taken through (DDP); raw_model: the same network, to attack.
    """
    # The clean pass comes first: with batch statistics, its logits are the very reference of the KL attack.
    logits = features = None
    if args.loss != "pgd":
        logits, features = model(x, with_features=True)
    elif args.align != "adv":  # a pass for the alignment alone leaves the running statistics as they are
        with attacks.frozen_statistics(raw_model):
            features = model(x, with_features=True)[1]
    x_adv, logits_adv, features_adv = x, None, None
    if args.loss != "standard":
        x_adv = attack_in_training(raw_model, x, y, start, logits, args)
        logits_adv, features_adv = model(x_adv, with_features=True)
    loss, parts = at_loss(logits, logits_adv, y, args)
    return loss, parts, x_adv, {"adv": [features_adv], "clean": [features], "both": [features, features_adv]}[args.align]


def attack_in_training(raw_model, x, y, start, logits, args):
    """Adversarial images for L_AT; `logits` of the clean pass, in train mode, where there was one."""
    attack = dict(norm=args.norm, eps=args.eps, n_steps=args.n_steps, bn=args.attack_bn)
    if args.attack == "apgd":
        return attacks.apgd(raw_model, x, y, **attack)
    reference = logits.detach() if args.loss == "trades" and args.attack_bn == "batch" else None
    kind = "kl" if args.loss == "trades" else "ce"
    return attacks.pgd(raw_model, x, y, [start], step_size=args.step_size, loss=kind, reference=reference, **attack)


def alignment_head(num_features, width, num_targets):
    """h: a three-layer SiLU MLP from the classifier's to the diffusion network's feature, as in REPA (arXiv 2410.06940)."""
    layers = torch.nn.Linear(num_features, width), torch.nn.Linear(width, width), torch.nn.Linear(width, num_targets)
    return torch.nn.Sequential(layers[0], torch.nn.SiLU(), layers[1], torch.nn.SiLU(), layers[2])


def alignment(head, features, targets):
    """Mean over the batch of cos(h(f), g), in float32. features: list of (B, D), one per kind of z. targets: (B, C)."""
    return sum(F.cosine_similarity(head(f).float(), targets.float(), dim=1).mean() for f in features) / len(features)


def contrast(head, features, targets):
    """As `alignment`; instead of the cosine, 1 - InfoNCE (arXiv 1807.03748), in float32. Negatives: the other targets given."""
    outputs, places = [head(f).float() for f in features], torch.arange(len(targets), device=targets.device)
    with torch.autocast(targets.device.type, enabled=False):
        cosines = [F.normalize(output, dim=1) @ F.normalize(targets.float(), dim=1).T for output in outputs]
        return 1 - sum(F.cross_entropy(c / TEMPERATURE, places) for c in cosines) / len(features)


@torch.no_grad()
def teacher_targets(teacher, x, y, noise, mean, args):
    """g of the docstring, (B, C): the frozen network's pooled features of the clean, augmented images, less their `mean` (C,)."""
    label = y if args.teacher_label == "true" else None
    return teacher.features(x, args.sigma, label, [args.block], noise)[0] - mean


def teacher_mean(teacher, images, labels, args):
    """The targets' mean (C,) over the first 10,000 training images, one noise draw each; zero with --no-center-targets."""
    total = n = 0
    for start in range(0, min(10_000, len(labels)), 250):
        x, y = data.to_x(images[start : start + 250], teacher.device), torch.from_numpy(labels[start : start + 250]).to(teacher.device)
        shape = (len(y), *teacher.noise_shape)
        noise = torch.randn(shape, generator=data.stream(args.seed, "teacher-mean", start, x.device), device=x.device)
        total, n = total + teacher_targets(teacher, x, y, noise, 0, args).sum(0), n + len(y)
    if not total.isfinite().all():
        raise cli.UserError(f"--teacher {args.teacher}: features at --sigma {args.sigma:g} are not finite")
    return total / n if args.center_targets else torch.zeros_like(total)


@torch.no_grad()
def validation_alignment(model, head, x, targets):
    """Mean cosine on the clean held-out images, by the model and head in training (not the average), in eval mode."""
    with attacks.attack_mode(model, "running"):
        features = torch.cat([model(part, with_features=True)[1] for part in x.split(256)])
    return alignment(head, [features], targets).item()


def one_cycle(epoch, args):
    """(learning rate, momentum) of an epoch, counted from 0: torch's OneCycleLR stepped once per epoch, as a pure function.

    The rate rises from lr / 25 to lr over the warm-up and falls to lr / 250,000, both by half a cosine; the momentum
    goes the other way. The base recipe cycles it because that is OneCycleLR's default.
    """
    low, high = args.momentum
    peak = args.warmup_fraction * args.epochs - 1
    if epoch < peak:
        weight = 0.5 * (1 - math.cos(math.pi * epoch / peak))
        return args.lr / 25 + weight * (args.lr - args.lr / 25), high + weight * (low - high)
    peak = max(peak, 0)
    weight = 0.5 * (1 - math.cos(math.pi * (epoch - peak) / max(args.epochs - 1 - peak, 1)))
    return args.lr + weight * (args.lr / 25e4 - args.lr), low + weight * (high - low)


def warmup_cosine(step, train_steps, args):
    """Learning rate of a step: linear from 0 to lr over the warm-up, half a cosine to final_lr at the last step."""
    warm = max(args.warmup_fraction * train_steps, 1)
    if step < warm:
        return args.lr * (step + 1) / warm if step + 1 < warm else args.lr
    progress = (step - warm) / max(train_steps - 1 - warm, 1)
    return args.final_lr + (args.lr - args.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def ema_decay_at(step, train_steps, args):
    """A plain copy during the warm-up, then min(ema_decay, (1 + d) / (10 + d)) with d the steps since."""
    since = step - args.warmup_fraction * train_steps
    return 0.0 if since < 0 else min(args.ema_decay, (1 + since) / (10 + since))


def evaluate(model, x, y, starts, args, rank, world_size):
    """(clean, robust) accuracy, fractions, of an averaged model under PGD with the margin loss; sharded over ranks.

    NaN where a logit is not finite: argmax would call it class 0.
    """
    correct = torch.zeros(2, dtype=torch.float64, device=x.device)
    rows = torch.arange(len(y), device=x.device)[rank::world_size]
    for part in rows.split(256 if x.shape[-1] < 32 else 64):  # large networks' activations
        attack = dict(norm=args.norm, eps=args.eps, step_size=args.step_size, n_steps=args.eval_n_steps, loss="margin")
        x_adv = attacks.pgd(model, x[part], y[part], [starts[part]], **attack)
        with torch.no_grad():
            for i, inputs in enumerate((x[part], x_adv)):
                logits = model(inputs)
                correct[i] += (logits.argmax(1) == y[part]).sum() + 0 * logits.sum()
    return (dist.sum_over_ranks(correct) / len(y)).tolist()


# ------------------------------------------------------------------------------------------------------- plumbing


def main(args):
    rank, world_size, device = dist.setup()
    if args.batch_size % (world_size * args.accumulate):
        parts = f" with --accumulate {args.accumulate}" if args.accumulate > 1 else ""
        raise cli.UserError(f"--batch-size {args.batch_size}: not divisible by {world_size} processes{parts}")
    if (args.mixup or args.cutmix) and args.batch_size == world_size:
        raise cli.UserError(f"--batch-size {args.batch_size}: an image per process has no other to be mixed with, see --mixup and --cutmix")
    if args.align_loss == "contrastive" and args.batch_size == world_size * args.accumulate:
        raise cli.UserError(f"--batch-size {args.batch_size}: an image per process and part has no other to be told from, see --align-loss")
    spec = data.DATASETS[args.dataset]
    models.check_model(args.model, spec)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.precision == "bf16")

    # Data: everything that can be wrong is found before the run directory is made.
    if rank == 0:
        data.prepare(spec, args.data_dir, args.download)
        synthetic_sets.prepare(args.synthetic or [], spec)
    dist.barrier()
    (images, labels), (val_images, val_labels) = data.load_train(spec, args.data_dir, args.val_size, args.n_train)
    synthetic = synthetic_sets.SyntheticSet(args.synthetic, spec) if args.synthetic else None
    if rank == 0 and synthetic and synthetic.held_out < args.val_size:
        print("note: the diffusion model of --synthetic is not known to have held out the validation images")
    Batches = functools.partial(data.FileBatches, workers=args.workers) if spec.files else data.Batches
    batches = Batches(images, labels, synthetic, args.synthetic_fraction, args.batch_size, spec, args.seed, device, rank, world_size)
    x_val, y_val = data.to_x(val_images[:], device), torch.from_numpy(val_labels).to(device)
    val_starts = attacks.random_start(x_val.shape, args.norm, args.eps, data.stream(args.seed, "validation", 0, device))
    teacher = diffusion.load_diffusion(args.teacher, device)
    teacher.check_teaches(f"--teacher {args.teacher}", spec, args.teacher_label == "true")
    args.block, args.sigma = args.block or teacher.default_block, args.sigma or teacher.default_sigma
    teacher.check_blocks([args.block])
    teacher.check_sigmas([args.sigma])
    if rank == 0 and teacher.val_size < args.val_size:
        print("note: the diffusion model of --teacher is not known to have held out the validation images")
    if rank == 0 and args.teacher_label == "none" and teacher.num_classes and teacher.label_dropout == 0:
        print(f"warning: {args.teacher} was trained without label dropout: it has never seen the null label")
    shape = (len(y_val), *teacher.noise_shape)
    val_noise = torch.randn(shape, generator=data.stream(args.seed, "validation-teacher", 0, device), device=device)
    with autocast():
        target_mean = teacher_mean(teacher, images, labels, args)
        parts = zip(x_val.split(256), y_val.split(256), val_noise.split(256))
        val_targets = torch.cat([teacher_targets(teacher, *part, target_mean, args) for part in parts])
    steps_per_epoch = math.ceil((args.epoch_images or len(labels)) / args.batch_size)
    train_steps = args.epochs * steps_per_epoch

    # Model, average, optimiser. The attack uses raw_model, the loss goes through model (DDP).
    torch.manual_seed(data.seed_of(args.seed, "init"))
    raw_model = models.build(args.model, spec)
    if args.init and not models.load_weights(raw_model, args.init) and rank == 0:
        print(f"note: {args.init} is of another number of classes, the last layer starts afresh")
    raw_model.to(device)
    if world_size > 1 and device.type == "cuda":
        raw_model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(raw_model)
    norms = [m for m in raw_model.modules() if isinstance(m, _BatchNorm)]
    if rank == 0 and norms and args.accumulate > 1:
        print("note: --accumulate: BatchNorm's statistics are those of each part, not of a rank's whole batch")
    ema = EMA(raw_model)
    torch.manual_seed(data.seed_of(args.seed, "head"))
    raw_head = alignment_head(raw_model.num_features, args.head_width, val_targets.shape[1]).to(device)
    groups = models.parameter_groups([raw_model, raw_head], args.weight_decay, biases=args.optimizer == "sgd")
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, args.lr, momentum=args.momentum[1], nesterov=True, fused=device.type == "cuda")
    else:
        optimizer = torch.optim.AdamW(groups, args.lr, args.betas, fused=device.type == "cuda")

    # Resume.
    if rank == 0:
        init_sha256 = checkpoint.sha256(args.init) if args.init and os.path.exists(args.init) else None
        inputs = dict(synthetic_sha256=synthetic and synthetic.identity, init_sha256=init_sha256, teacher_sha256=teacher.sha256)
        runlog.claim_directory(args.out_dir, runlog.identity_of("train_at_aux.py", args, **inputs))
    dist.barrier()
    last_path, start_step, best, seconds = os.path.join(args.out_dir, "last.pt"), 0, [-1.0, -1.0], 0.0
    sums, n_summed = {}, 0  # of what is logged, since the last validation
    if os.path.exists(last_path):
        entries = {"step": int, "best": list, "seconds": float, "n_summed": int}
        entries |= dict.fromkeys(("sums", "model", "weights", "optimizer"), dict)
        state = checkpoint.load(last_path, entries | {"head": dict}, device)
        checkpoint.load_state(raw_model, state["model"], last_path)
        checkpoint.load_state(ema.model, state["weights"], last_path)
        checkpoint.load_state(raw_head, state["head"], last_path)
        checkpoint.load_state(optimizer, state["optimizer"], last_path)
        start_step, best, seconds = state["step"], state["best"], state["seconds"]
        sums, n_summed = {name: value if rank == 0 else 0 * value for name, value in state["sums"].items()}, state["n_summed"]
    if start_step == train_steps:
        if rank == 0:
            print(f"{args.out_dir}: finished, nothing to do")
        return dist.teardown()
    if args.compile:
        raw_model.compile()
    model, head = dist.wrap(raw_model), dist.wrap(raw_head)
    agree = {"cosine": alignment, "contrastive": contrast}[args.align_loss]

    log = runlog.RunLog(args.out_dir, start_step) if rank == 0 else runlog.NullLog()
    bar = runlog.progress(range(start_step, train_steps), rank, desc=os.path.basename(args.out_dir), initial=start_step, total=train_steps)
    stopping, begun, clock = dist.catch_sigterm(device), start_step, time.time()
    for step in bar:
        if args.optimizer == "sgd":
            rates = dict(zip(("lr", "momentum"), one_cycle(step // steps_per_epoch, args)))
        else:
            rates = {"lr": warmup_cosine(step, train_steps, args)}
        for param_group in optimizer.param_groups:
            param_group.update(rates)
        for norm in norms:
            norm.momentum = 1.0 if step == 0 and not args.init else args.bn_momentum

        x, y = batches(step)
        if args.mixup or args.cutmix:
            x, y = data.mix(x, y, spec.num_classes, args.mixup, args.cutmix, data.seed_of(args.seed, "mix", step))
        start = x  # not read by an attack that has no random start
        if args.attack == "pgd" and args.loss != "standard":
            shape = (args.batch_size, *x.shape[1:])
            start = attacks.random_start(shape, args.norm, args.eps, data.stream(args.seed, "attack", step, device))[batches.mine]

        # DRA: the target is the clean image's, whichever image is aligned with it.
        shape = (args.batch_size, *teacher.noise_shape)
        noise = torch.randn(shape, generator=data.stream(args.seed, "teacher", step, device), device=device)[batches.mine]
        with autocast():
            parts = zip(x.chunk(args.accumulate), y.chunk(args.accumulate), noise.chunk(args.accumulate))
            targets = torch.cat([teacher_targets(teacher, *part, target_mean, args) for part in parts])
        if args.shuffle_targets:
            targets = targets[torch.randperm(len(y), generator=data.stream(args.seed, "shuffle", step)).to(device)]

        optimizer.zero_grad(set_to_none=True)
        for part in range(args.accumulate):
            mine = slice(part, None, args.accumulate)
            with dist.no_sync([model, head], when=part < args.accumulate - 1):
                with autocast():
                    loss, parts, x_adv, aligned = adversarial_loss(model, raw_model, x[mine], y[mine], start[mine], args)
                    agreement = agree(head, aligned, targets[mine])
                    loss = loss + args.aux_weight * (1 - agreement)
                (loss / args.accumulate).backward()
            for name, value in ({"loss": loss, "align": agreement} | parts).items():
                sums[name] = sums.get(name, 0) + value.detach() / args.accumulate
        grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), args.clip_norm or math.inf)
        if not torch.isfinite(grad_norm):
            raise cli.not_finite(step, last_path)
        optimizer.step()
        if world_size > 1 and device.type == "cpu":
            dist.average_bn_statistics(raw_model)
        ema.update(raw_model, ema_decay_at(step, train_steps, args))
        sums["grad_norm"] = sums.get("grad_norm", 0) + grad_norm
        n_summed += 1

        # Validation and checkpoint; at SIGTERM a checkpoint alone.
        done, stop = step + 1, stopping()
        validated = done % (args.eval_every * steps_per_epoch) == 0 or done == train_steps
        if validated:
            images_per_s = round((done - begun) * args.batch_size / (time.time() - clock), 1)
            means = {k: (dist.sum_over_ranks(v) / (n_summed * world_size)).item() for k, v in sums.items()}
            clean_acc, robust_acc = evaluate(ema.model, x_val, y_val, val_starts, args, rank, world_size)
            weights = [*raw_model.state_dict().values(), *raw_head.state_dict().values()]
            if math.isnan(clean_acc + robust_acc) or not all(t.isfinite().all() for t in weights):
                raise cli.not_finite(step, last_path)
            if rank == 0:
                means["val_align"] = validation_alignment(raw_model, raw_head, x_val, val_targets)
                speed = {"images_per_s": images_per_s, "seconds": round(seconds + time.time() - clock, 1)}
                log.write(done, **means, lr=optimizer.param_groups[0]["lr"], clean_acc=clean_acc, robust_acc=robust_acc, **speed)
                bar.set_postfix(loss=f"{means['loss']:.3f}", clean=f"{clean_acc:.1%}", robust=f"{robust_acc:.1%}")
                runlog.save_images(torch.cat([x[mine][:10], x_adv[:10]]), os.path.join(args.out_dir, "samples.png"), columns=10)
                classifier = models.portable(ema.model, args.model, spec) | {"norm": args.norm, "eps": args.eps, "step": done}
                classifier |= {"val_clean_acc": clean_acc, "val_robust_acc": robust_acc}
                score = [clean_acc, robust_acc] if args.loss == "standard" else [robust_acc, clean_acc]
                if score > best:
                    best = score
                    checkpoint.save(classifier, os.path.join(args.out_dir, "best.pt"))
                    with checkpoint.atomic(os.path.join(args.out_dir, "best.safetensors")) as file:
                        file.write(safetensors.torch.save(classifier["weights"], {"classifier": f"{args.model}, {spec.name}"}))
            sums, n_summed = {}, 0
        if validated or stop:
            sums, seconds = {name: dist.sum_over_ranks(value) for name, value in sums.items()}, seconds + time.time() - clock
            if rank == 0:
                state = models.portable(ema.model, args.model, spec) | {"norm": args.norm, "eps": args.eps, "step": done, "best": best}
                state |= {"seconds": seconds, "sums": sums, "n_summed": n_summed}
                state |= {"model": raw_model.state_dict(), "optimizer": optimizer.state_dict()}
                checkpoint.save(state | {"head": raw_head.state_dict()}, last_path)
            dist.barrier()
            begun, clock = done, time.time()
        if stop:
            break

    log.close()
    if rank == 0 and done < train_steps:
        print(f"{args.out_dir}: stopped by SIGTERM after step {done} of {train_steps}; the same command goes on")
    elif rank == 0:
        kind = "clean" if args.loss == "standard" else "robust"
        print(f"{args.out_dir}: {train_steps} steps; best.pt has {best[0]:.1%} {kind} accuracy on {len(y_val)} held-out images")
    dist.teardown()


if __name__ == "__main__":
    cli.run(main, parse_args())
