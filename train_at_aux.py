"""Adversarial training with Diffusion Representation Alignment (DRA): train_at.py plus one loss.

Reconstructed from the abstract of arXiv 2602.19931; docs/recipes.md tells what is our choice. The
classifier's pooled penultimate feature f, through an MLP head h, is aligned by cosine with g, the
feature that a frozen diffusion network has of the clean image, less its mean over training images:

    L = L_AT(x, x_adv, y) + aux_weight * mean_i [ 1 - cos( h(f(z_i)), g(x_i + sigma * n_i) ) ]

z is x_adv, x or both (--align). n_i is fresh Gaussian noise. i is each image, or every K-th
(--teacher-every K). g is the pooled output of --block, where the network's pass is stopped. The
attack ignores all this, and h is not exported. `diff train_at.py train_at_aux.py` shows DRA alone.

    python train_diffusion.py && python train_at_aux.py                # AT+DRA, digits, 5 minutes
    torchrun --nproc_per_node 8 train_at_aux.py --dataset imagenet     # JiT-B/16: teachers/jit.py

The loss L_AT is TRADES' (Zhang et al., arXiv 1901.08573, equation 5) with label smoothing in CE.
p is the softmax of the classifier's logits:

    L_AT = CE(p(x), y) + beta * KL(p(x) || p(x_adv))
    x_adv = argmax_{|x' - x| <= eps, x' in [0, 1]} KL(p(x) || p(x'))

or, with --loss pgd, that of Madry et al. (arXiv 1706.06083): L_AT = CE(p(x_adv), y), x_adv
maximising CE. The recipe is DM-AT's (Wang et al., arXiv 2302.04638): RECIPE is its CIFAR-10
command, and PRESETS say where a data set departs from it.

Writes to --out-dir: best.pt and best.safetensors, the averaged model that is most robust on
held-out training images (no test image is used); last.pt; log.jsonl; TensorBoard events. Running
the same command again resumes. The attack stands in common/attacks.py, batches in common/data.py,
and what is saved and logged, and how, in common/run.py.
"""

import argparse
import json
import math
import os

import torch
import torch.nn.functional as F

from common import UserError, attacks, cli, data, files, models
from common.run import (
    Meters,
    Run,
    autocast,
    average_batchnorm,
    check_compiler,
    end_processes,
    make_average,
    no_sync,
    once,
    rank_0_first,
    read_once,
    save_images,
    start_processes,
    sum_over_ranks,
    update_average,
    wrap,
)
from published.datasets import DATASETS, open_dataset, spec_of
from published.image_files import check_images
from published.synthetic import open_synthetic
from published.weights import load_weights, normalised_as
from teachers.load import load_diffusion

RECIPE = dict(
    model="wrn-28-10",
    loss="trades",
    attack="pgd",
    n_steps=10,
    attack_bn="batch",
    beta=5.0,
    label_smoothing=0.1,
    mixup=0.0,
    cutmix=0.0,
    optimizer="sgd",
    epochs=400,
    batch_size=512,
    lr=0.2,
    warmup_fraction=0.025,
    momentum=(0.85, 0.95),  # of sgd: the first at peak lr
    betas=(0.9, 0.95),  # of adamw
    final_lr=5e-6,  # of adamw
    weight_decay=5e-4,
    bn_momentum=0.01,  # after 1.0 at step 0
    ema_decay=0.995,
    eval_every=1,
    eval_n_steps=40,
    deterministic=False,
    aux_weight=1.0,
    head_width=2048,
)
SWITCH = argparse.BooleanOptionalAction  # --flag and --no-flag
SYNTHETIC_FRACTION = 0.7  # where there is a synthetic set; DM-AT takes 0.8 above 1 M images
PRESETS = {
    # Small and short. Clipping, because on 800 images one unlucky step at lr 0.2 costs points.
    "digits": dict(
        model="wrn-10-1",
        n_steps=5,
        epochs=100,
        batch_size=128,
        clip_norm=5.0,
        eval_every=10,
        eval_n_steps=20,
        deterministic=True,
        head_width=256,
    ),
    # DM-AT counts an epoch's steps from all training images, held-out ones included: 98 steps of
    # 512 images for CIFAR, 39,200 in all.
    "cifar10": dict(epoch_images=50_000),
    "cifar100": dict(epoch_images=50_000),
    "svhn": dict(epoch_images=73_257),
    "tiny-imagenet": dict(epoch_images=100_000),
    "fashion-mnist": dict(
        model="wrn-10-1",
        n_steps=5,
        epochs=10,
        batch_size=128,
        lr=0.1,
        warmup_fraction=0.2,
        clip_norm=5.0,
        eval_n_steps=10,
        sigma=0.3,
        head_width=256,
    ),
    # The recipe of Singh et al. (arXiv 2303.01870). They start from clean weights: add --init.
    "imagenet": dict(
        model="convnext_tiny",
        loss="pgd",
        attack="apgd",
        n_steps=2,
        attack_bn="running",
        mixup=0.8,
        cutmix=1.0,
        optimizer="adamw",
        lr=1e-3,
        warmup_fraction=0.1,
        weight_decay=0.05,
        epochs=50,
        batch_size=1024,
        ema_decay=0.9999,
        teacher="out/jit-b-16",
        teacher_every=2,
        eval_n_steps=10,
    ),
}
# By family of --model, over PRESETS where those name no optimizer. DM-AT has no such network: this
# recipe is ours.
TRANSFORMER = dict(
    optimizer="adamw",
    lr=1e-3,
    warmup_fraction=0.05,
    weight_decay=0.05,
    clip_norm=1.0,
)
MODEL_PRESETS = {"vit": TRANSFORMER, "swin": TRANSFORMER, "convnext": TRANSFORMER}


def fast(defaults):
    """What --recipe fast changes of the defaults: docs/speedrun.md."""
    epochs = math.ceil(0.75 * defaults["epochs"])
    return dict(n_steps=2, batch_size=defaults["batch_size"] // 4, epochs=epochs)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = cli.add_data_flags(parser, DATASETS).add_argument
    add("--workers", type=cli.count0, default=8, help="processes per rank that decode image files")
    add("--synthetic", type=cli.path, nargs="+", help="sets, each PATH or PATH=SHARE")
    add("--synthetic-fraction", type=cli.fraction, help="of synthetic images in a batch (0.7)")
    add = parser.add_argument_group("model").add_argument
    add("--model", help="wrn-<depth>-<width>, preact-18, resnet-18, vit-b-2, resnet50, ...")
    add("--init", type=cli.path, help="weights to start from: file, hub:OWNER/NAME, torchvision")
    add("--weights", metavar="NAME", help="the set to take where --init holds several, as model")
    add = parser.add_argument_group("threat model and attack in training").add_argument
    add("--norm", choices=["linf", "l2"], default="linf", help="norm of the perturbation")
    add("--eps", type=cli.non_negative, help="radius, of x in [0, 1] (default: the data set's)")
    add("--attack", choices=["pgd", "apgd"], help="apgd: Auto-PGD from x itself (--loss pgd)")
    add("--step-size", type=cli.positive, help="of pgd, in training and validation (eps / 4)")
    add("--n-steps", type=cli.count, help="steps of the attack")
    add("--attack-bn", choices=["batch", "running"], help="BatchNorm statistics in the attack")
    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=["trades", "pgd", "standard"], help="standard: CE(p(x), y), no attack")
    add("--beta", type=cli.non_negative, help="weight of TRADES' KL term")
    add("--label-smoothing", type=cli.fraction, help="probability spread over all classes, in CE")
    add("--mixup", type=cli.non_negative, help="alpha of MixUp; 0 is off")
    add("--cutmix", type=cli.non_negative, help="alpha of CutMix; with MixUp, one is drawn a batch")
    add = parser.add_argument_group("alignment with the diffusion model (DRA)").add_argument
    add("--teacher", type=cli.path, help="directory, .pkl, hub:NAME; else out/diffusion-<dataset>")
    add("--block", help="block of the teacher that gives the target; without it, by its family")
    add("--sigma", type=cli.positive, help="noise level of the teacher's input, images in [-1, 1]")
    add("--teacher-label", choices=["none", "true"], default="none", help="label the teacher gets")
    add("--teacher-every", type=cli.count, help="K: align every K-th image only (default: all)")
    add("--aux-weight", type=cli.non_negative, help="weight of the alignment loss")
    add("--align", choices=["adv", "clean", "both"], default="adv", help="images that are aligned")
    add("--align-loss", choices=["cosine", "contrastive"], default="cosine", help="or InfoNCE")
    add("--center-targets", action=SWITCH, default=True, help="subtract the targets' mean")
    add("--shuffle-targets", action="store_true", help="control: a batch's targets at random")
    add("--head-width", type=cli.count, help="hidden width of the MLP head")
    add = parser.add_argument_group("optimisation").add_argument
    what = "fast: other defaults: 2 attack steps of eps / 2, 1/4 of the batch, 3/4 of the epochs"
    add("--recipe", choices=["base", "fast"], default="base", help=what)
    add("--optimizer", choices=["sgd", "adamw"], help="sgd: Nesterov, one cycle; adamw: cosine")
    add("--epochs", type=cli.count, help="of ceil(--epoch-images / --batch-size) steps each")
    add("--epoch-images", type=cli.count, help="images per epoch; without it, the real ones")
    add("--batch-size", type=cli.batch, help="global batch size, images")
    add("--lr", type=cli.positive, help="peak learning rate")
    add("--warmup-fraction", type=cli.fraction, help="of training, before peak lr and averaging")
    add("--weight-decay", type=cli.non_negative, help="spares BatchNorm; adamw: all vectors")
    add("--accumulate", type=cli.count, default=1, help="micro-batches per rank, to save memory")
    add("--clip-norm", type=cli.positive, help="largest l2 norm of the classifier's gradient")
    add("--ema-decay", type=cli.fraction, help="decay per step of the averaged model")
    add = parser.add_argument_group("validation and run").add_argument
    add("--eval-every", type=cli.count, help="epochs between validations with checkpoint")
    add("--eval-n-steps", type=cli.count, help="PGD steps (margin loss) of the validation")
    add("--out-dir", type=cli.path, help="run directory (default: out/<this script>-<dataset>)")
    cli.add_check_flag(add)
    cli.add_precision_flag(add)
    add("--deterministic", action=SWITCH, help="equal runs are equal to the bit, on a GPU too")
    add("--compile", action=SWITCH, default=False, help="torch.compile networks and attack")
    add("--seed", type=cli.seed, default=0, help="seed of all randomness")

    args = parser.parse_with_presets(argv, RECIPE, PRESETS, MODEL_PRESETS, fast)
    script = os.path.basename(__file__).removesuffix(".py")
    args.out_dir = args.out_dir or f"out/{script}-{args.dataset}"
    parser.check_data_flags(argv, args)
    spec = spec_of(args)
    if args.eps is None:
        args.eps = spec.eps[args.norm]
    if args.step_size is None:
        args.step_size = args.eps / (2 if args.recipe == "fast" else 4)
    if args.synthetic is None and args.synthetic_fraction is not None:
        parser.error("argument --synthetic-fraction: there is no synthetic set, give --synthetic")
    if args.synthetic is not None and args.synthetic_fraction is None:
        args.synthetic_fraction = SYNTHETIC_FRACTION
    args.teacher = args.teacher or f"out/diffusion-{args.dataset}"
    check_flags(parser, argv, args, spec)
    del args.recipe  # the other settings tell it
    return args


def check_flags(parser, argv, args, spec):
    """End with an error where flags contradict each other, or one does nothing."""
    attacked = args.loss != "standard"
    has_batchnorm = not args.model.startswith(("vit", "convnext", "swin"))
    uses = {
        "--workers": ("image files (imagenet, a folder above 64 pixels)", spec.files),
        "--weights": ("--init", args.init),
        "--beta": ("--loss trades", args.loss == "trades"),
        "--attack": ("--loss trades or pgd", attacked),
        "--n-steps": ("--loss trades or pgd", attacked),
        "--attack-bn": ("--loss trades or pgd, and BatchNorm", attacked and has_batchnorm),
        "--recipe": ("--loss trades or pgd, and --attack pgd", attacked and args.attack == "pgd"),
    }
    parser.refuse_unused(argv, uses)
    parser.check_radius("--eps", args.eps, args.norm, spec)
    parser.check_radius("--step-size", args.step_size, args.norm, spec)
    for flag, alpha in (("--mixup", args.mixup), ("--cutmix", args.cutmix)):
        if 0 < alpha < 0.01:
            parser.error(f"argument {flag}: {alpha}, expected 0 or at least 0.01")
    if args.attack == "apgd" and args.loss == "trades":
        parser.error("argument --attack: apgd maximises CE; with --loss trades give --attack pgd")
    if args.teacher_label == "true" and (args.mixup or args.cutmix):
        parser.error("argument --teacher-label: mixed images have no true label, see --mixup")
    if args.loss == "standard" and args.align != "clean":
        parser.error(f"argument --align: '{args.align}' needs an attack, give --align clean")


# ---------------------------------------------------------------------------------- the method


class Teacher:
    """g of the module docstring: one block of a frozen diffusion network at one noise level."""

    def __init__(self, network, args):
        self.network = network
        self.block = network.default_block if args.block is None else args.block
        self.sigma = args.sigma or network.default_sigma
        self.with_label = args.teacher_label == "true"
        self.mean = 0

    def noise(self, n, seed, use, step):
        """Standard normal noise for n images, of the stream (seed, use, step)."""
        generator = data.stream(seed, use, step, self.network.device)
        shape = (n, *self.network.noise_shape)
        return torch.randn(shape, generator=generator, device=generator.device)

    @torch.no_grad()
    def targets(self, x, y, noise):
        """Features (B, C) of clean images x in [0, 1], pooled over space, less their mean."""
        label = y if self.with_label else None
        (feats,) = self.network.features(x, self.sigma, label, [self.block], noise)
        return feats - self.mean

    def center(self, images, labels, seed, rank, world_size):
        """Set the mean (C,) that targets subtracts, of 10,000 images that ranks share out."""
        total = 0
        n = min(10_000, len(labels))
        for first in range(0, n, 250):
            rows = slice(first + rank, first + 250, world_size)
            x = data.to_x(images[rows], self.network.device)
            y = torch.from_numpy(labels[rows]).to(x.device)
            noise = self.noise(min(250, n - first), seed, "teacher-mean", first)[rank::world_size]
            total = total + self.targets(x, y, noise).sum(0) if len(y) else total
        self.mean = sum_over_ranks(total) / n


def alignment_head(num_features, num_targets, args):
    """h: a three-layer SiLU MLP, as in REPA (arXiv 2410.06940)."""
    return torch.nn.Sequential(
        torch.nn.Linear(num_features, args.head_width),
        torch.nn.SiLU(),
        torch.nn.Linear(args.head_width, args.head_width),
        torch.nn.SiLU(),
        torch.nn.Linear(args.head_width, num_targets),
    )


def cosine_loss(output, targets):
    """Mean over the batch of 1 - cos(output, target), in float32; both (B, C)."""
    return 1 - F.cosine_similarity(output.float(), targets.float(), dim=1).mean()


def contrastive_loss(output, targets, temperature=0.1):
    """InfoNCE (arXiv 1807.03748): cross-entropy of finding an image's own target among all B.

    The logits are cosines / temperature, in float32. output, targets: (B, C), of a micro-batch.
    """
    with torch.autocast(output.device.type, enabled=False):
        output = F.normalize(output.float(), dim=1)
        targets = F.normalize(targets.float(), dim=1)
        logits = output @ targets.T / temperature
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def alignment_loss(head, feats, targets, args):
    """The alignment loss, averaged over a list of feats (B, D): of x_adv, x or both."""
    loss_of = cosine_loss if args.align_loss == "cosine" else contrastive_loss
    return torch.stack([loss_of(head(f), targets) for f in feats]).mean()


@torch.no_grad()
def val_alignment(model, head, x, targets, args):
    """Mean cosine on all ranks' held-out images, of model and head in training, not the average."""
    model.eval()
    feats = [model.forward(part, with_features=True)[1] for part in x.split(256)]  # uncompiled
    model.train()
    cosine = 1 - cosine_loss(head(torch.cat(feats)), targets)
    return (sum_over_ranks(cosine * len(x)) / args.val_size).item()


def at_loss(logits, logits_adv, y, args):
    """L_AT of the module docstring, and {"loss_clean", "loss_robust"}: scalars in float32.

    logits, logits_adv: (B, K), of clean and adversarial images; None where args.loss needs none.
    y: labels (B,) or label probabilities (B, K). The gradient flows through both sides of the KL
    term, as in the code of DM-AT.
    """
    loss_clean = loss_robust = torch.zeros((), device=y.device)
    if args.loss == "trades":
        loss_clean = F.cross_entropy(logits.float(), y, label_smoothing=args.label_smoothing)
        log_p = logits.float().log_softmax(1)
        log_p_adv = logits_adv.float().log_softmax(1)
        loss_robust = F.kl_div(log_p_adv, log_p, reduction="batchmean", log_target=True)
        loss = loss_clean + args.beta * loss_robust
    elif args.loss == "pgd":
        loss_robust = F.cross_entropy(logits_adv.float(), y, label_smoothing=args.label_smoothing)
        loss = loss_robust
    else:
        loss_clean = F.cross_entropy(logits.float(), y, label_smoothing=args.label_smoothing)
        loss = loss_clean
    return loss, {"loss_clean": loss_clean, "loss_robust": loss_robust}


def adversarial_loss(model, twin, x, y, start, args):
    """L_AT of images x: (loss, metrics, x_adv, list of the features (B, D) to align).

    model: what the gradient is taken through (DDP). twin: its frozen copy, to be attacked.
    start: the perturbation that the attack starts from, like x. y, metrics: as in at_loss.
    """
    logits = logits_adv = feats = feats_adv = None
    x_adv = x
    attacked = args.loss != "standard"
    # running: the attack comes first, because the clean pass updates the statistics.
    # batch: it comes second, because the clean logits are the reference of its KL.
    if attacked and args.attack_bn == "running":
        x_adv = attack_in_training(twin, x, y, start, args)
    if args.loss != "pgd":
        logits, feats = model(x, with_features=True)
    elif args.align != "adv":
        # A pass for the alignment alone: the classifier stays that of train_at.py.
        with attacks.frozen_statistics(model):
            _, feats = model(x, with_features=True)
    if attacked and args.attack_bn == "batch":
        reference = None if logits is None else logits.detach()
        x_adv = attack_in_training(twin, x, y, start, args, reference)
    if attacked:
        logits_adv, feats_adv = model(x_adv, with_features=True)
    loss, metrics = at_loss(logits, logits_adv, y, args)
    aligned = {"adv": [feats_adv], "clean": [feats], "both": [feats, feats_adv]}[args.align]
    return loss, metrics, x_adv, aligned


def attack_in_training(twin, x, y, start, args, reference=None):
    """Adversarial images for L_AT. reference: logits, of KL; None, the twin's own at x."""
    settings = dict(norm=args.norm, eps=args.eps, n_steps=args.n_steps, compiled=args.compile)
    if args.attack == "apgd":
        return attacks.apgd(twin, x, y, **settings)
    settings["step_size"] = args.step_size
    if args.loss == "pgd":
        return attacks.pgd(twin, x, y, start, loss="ce", **settings)
    return attacks.pgd(twin, x, y, start, loss="kl", reference=reference, **settings)


def attack_start(x, step, mine, args):
    """Where the attack starts: uniform in the eps-ball for pgd, at x itself (zeros) for apgd.

    It is drawn for the global batch, of which this rank's images x are the rows `mine`, so that it
    does not depend on the number of processes.
    """
    if args.attack == "apgd" or args.loss == "standard":
        return torch.zeros_like(x)
    shape = (args.batch_size, *x.shape[1:])
    generator = data.stream(args.seed, "attack", step, x.device)
    return attacks.random_start(shape, args.norm, args.eps, generator)[mine]


def one_cycle(epoch, args):
    """(learning rate, momentum) of an epoch, counted from 0: OneCycleLR stepped once an epoch.

    The rate rises from lr / 25 to lr over the warm-up and falls to lr / 250,000, both by half a
    cosine. The momentum falls and rises in turn, OneCycleLR's default, which DM-AT keeps. The last
    epoch has the lowest rate, so that a run of one epoch learns nothing.
    """
    low, high = args.momentum
    peak_epoch = args.warmup_fraction * args.epochs - 1
    if peak_epoch > 0 and epoch <= peak_epoch:
        progress = epoch / peak_epoch
        return half_cosine(args.lr / 25, args.lr, progress), half_cosine(high, low, progress)
    rest = args.epochs - 1 - peak_epoch
    progress = (epoch - peak_epoch) / rest if rest else 0.0
    return half_cosine(args.lr, args.lr / 25e4, progress), half_cosine(low, high, progress)


def warmup_cosine(step, train_steps, args):
    """Learning rate of a step: linear to lr over the warm-up, then half a cosine to final_lr."""
    warmup = max(args.warmup_fraction * train_steps, 1)
    if step < warmup:
        return args.lr * min(1.0, (step + 1) / warmup)
    progress = (step - warmup) / max(train_steps - 1 - warmup, 1)
    return half_cosine(args.lr, args.final_lr, progress)


def half_cosine(start, end, progress):
    """From start (progress 0) to end (progress 1), slowly at both."""
    weight = 0.5 * (1 - math.cos(math.pi * progress))
    return start + weight * (end - start)


def set_schedule(optimizer, step, steps_per_epoch, train_steps, args):
    """Write the step's learning rate, and sgd's momentum, into every parameter group."""
    for group in optimizer.param_groups:
        if args.optimizer == "sgd":
            group["lr"], group["momentum"] = one_cycle(step // steps_per_epoch, args)
        else:
            group["lr"] = warmup_cosine(step, train_steps, args)


def ema_decay_at(step, train_steps, args):
    """Decay of the average: a plain copy in the warm-up, then min(ema_decay, (1 + d) / (10 + d)).

    step: counted from 1, as in the code of DM-AT. d: steps since the warm-up.
    """
    since = step - args.warmup_fraction * train_steps
    if since < 0:
        return 0.0
    return min(args.ema_decay, (1 + since) / (10 + since))


def validate(model, x, y, start, batch_size, args):
    """(clean, robust) accuracy in [0, 1] under PGD with the margin loss, over all ranks' images.

    x, y, start: this rank's. batch_size: images in one pass.
    """
    n_right = torch.zeros(2, dtype=torch.float64, device=x.device)  # clean, robust
    parts = list(zip(*[images.split(batch_size) for images in (x, y, start)]))
    parts = parts[:1] if args.check else parts  # of --check the time counts, not the accuracy
    for x_part, y_part, start_part in parts:
        x_adv = attacks.pgd(
            model,
            x_part,
            y_part,
            start_part,
            norm=args.norm,
            eps=args.eps,
            step_size=args.step_size,
            n_steps=args.eval_n_steps,
            loss="margin",
        )
        for i, images in enumerate((x_part, x_adv)):
            with torch.no_grad():
                logits = model(images)
            is_right = (logits.argmax(1) == y_part) & logits.isfinite().all(1)
            n_right[i] += is_right.sum()
    return (sum_over_ranks(n_right) / args.val_size).tolist()


# ---------------------------------------------------------------------------------- the script


def check_sizes(args, spec, world_size):
    """Raises UserError where flags do not fit the data set or the number of processes."""
    if args.batch_size % (world_size * args.accumulate):
        divisor = f"{world_size} processes"
        if args.accumulate > 1:
            divisor = f"{divisor} with --accumulate {args.accumulate}"
        raise UserError(f"--batch-size {args.batch_size}: not divisible by {divisor}")
    if (args.mixup or args.cutmix) and args.batch_size == world_size:
        message = "one image per process has no other to be mixed with"
        raise UserError(f"--batch-size {args.batch_size}: {message}, see --mixup and --cutmix")
    for flag, n in (("--val-size", args.val_size), ("--n-train", args.n_train)):
        if n is not None and n < world_size:
            raise UserError(f"{flag} {n}: fewer images than processes ({world_size})")
    n_targets = 1 if args.align_loss == "cosine" and not args.shuffle_targets else 2  # at least
    if args.batch_size < n_targets * (args.teacher_every or 1) * world_size * args.accumulate:
        flags = "--teacher-every, --align-loss and --shuffle-targets"
        raise UserError(f"--batch-size {args.batch_size}: too small for {flags}")
    models.check_model(args.model, spec)


def load_teacher(args, spec, device, rank):
    """The Teacher of the command line. Raises UserError where it does not fit the data set."""
    network = load_diffusion(args.teacher, device, args.precision)
    teacher = Teacher(network, args)
    network.check_teaches(f"--teacher {args.teacher}", spec, teacher.with_label)
    network.check_places(f"--teacher {args.teacher}", [teacher.block], [teacher.sigma])
    if rank == 0 and network.val_size < args.val_size:
        print("note: the diffusion model of --teacher may have seen the validation images")
    if rank == 0 and not teacher.with_label:
        network.warn_of_null_label(args.teacher)
    return teacher


def hashes(args, train, val, synthetic):
    """What the weights depend on besides the arguments: the content of the inputs."""
    init = args.init
    if init and init != "torchvision":
        init = files.sha256(init)
    return {
        "data_sha256": data.sha256(train, val),
        "synthetic_sha256": synthetic.sha256() if synthetic else None,
        "n_synthetic": len(synthetic) if synthetic else 0,
        "init_sha256": init,
    }


def make_optimizer(modules, args):
    """The optimiser of the modules' parameters; weight decay spares BatchNorm's."""
    groups = models.parameter_groups(modules, args.weight_decay, biases=args.optimizer == "sgd")
    if args.optimizer == "sgd":
        momentum = args.momentum[1]
        return torch.optim.SGD(groups, args.lr, momentum=momentum, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, args.lr, betas=args.betas, fused=True)


def set_batchnorm_momentum(model, momentum):
    """momentum: the share of a batch in the running statistics; 1.0 copies the batch's."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum


def save_best(run, ema, about, clean_acc, robust_acc):
    """Write the averaged model as best.pt and best.safetensors, on rank 0."""
    if run.rank:
        return
    weights = {name: tensor.contiguous() for name, tensor in ema.state_dict().items()}
    checkpoint = {
        **about,
        "step": run.step,
        "val_clean_acc": clean_acc,
        "val_robust_acc": robust_acc,
        "weights": weights,
    }
    files.save(checkpoint, run.path("best.pt"))
    metadata = {"classifier": json.dumps(about)}
    files.write_safetensors(weights, run.path("best.safetensors"), metadata)


def save_examples(run, x, x_adv):
    """Write samples.png on rank 0: ten training images, and below them what the attack made."""
    if run.rank == 0:
        save_images(torch.cat([x[:10], x_adv[:10]]), run.path("samples.png"), columns=10)


def main(args):
    # Setup: one process per GPU under torchrun, else one process.
    rank, world_size, device = start_processes(args.precision, args.deterministic)
    spec = open_dataset(args)
    check_sizes(args, spec, world_size)
    if args.compile:
        check_compiler(device)
    amp = autocast(device, args.precision)

    # Data. The run directory is made later, when all that can be wrong with the inputs is found.
    train, val = read_once(
        data.load_train, spec, args.data_dir, args.val_size, args.n_train, args.imbalance
    )
    if args.check:
        test = read_once(data.load_test, spec, args.data_dir)
        check_images([train[0], val[0], test[0]], rank, world_size)
    spec = once(data.measured, spec, train)
    if args.init:
        spec = normalised_as(spec, args.init)
    synthetic = None
    if args.synthetic:
        synthetic = rank_0_first(open_synthetic, args.synthetic, spec)
        if rank == 0 and synthetic.held_out < args.val_size:
            print("note: the diffusion model of --synthetic may have seen the validation images")
    batches = data.make_batches(spec, train, args, device, rank, world_size, synthetic)
    x_val = data.to_x(val[0][batches.mine], device)
    y_val = torch.from_numpy(val[1][batches.mine]).to(device)
    generator = data.stream(args.seed, "validation", 0, device)
    shape = (args.val_size, *x_val.shape[1:])
    val_start = attacks.random_start(shape, args.norm, args.eps, generator)[batches.mine].clone()
    steps_per_epoch = math.ceil((args.epoch_images or len(train[1])) / args.batch_size)
    train_steps = args.epochs * steps_per_epoch

    # Teacher. The held-out images keep one draw of noise.
    teacher = load_teacher(args, spec, device, rank)
    if args.center_targets:
        teacher.center(*train, args.seed, rank, world_size)
    noise = teacher.noise(args.val_size, args.seed, "validation-teacher", 0)
    parts = zip(x_val.split(256), y_val.split(256), noise[batches.mine].split(256))
    val_targets = torch.cat([teacher.targets(*part) for part in parts])
    if not val_targets.isfinite().all():
        raise UserError(f"--teacher {args.teacher}: features at --sigma are not finite")

    # Model, its average, its twin for the attack, optimiser. The loss goes through model (DDP).
    torch.manual_seed(data.seed_of(args.seed, "init"))
    raw_model = models.build(args.model, spec)
    if args.init:
        fits = load_weights(raw_model, args.init, args.weights)
        if rank == 0 and not fits:
            print(f"note: {args.init} has another number of classes, the last layer starts afresh")
    raw_model.to(device)
    ema = make_average(raw_model)
    twin = attacks.make_twin(raw_model, args.attack_bn, args.precision)
    torch.manual_seed(data.seed_of(args.seed, "head"))
    raw_head = alignment_head(raw_model.num_features, val_targets.shape[1], args).to(device)
    optimizer = make_optimizer([raw_model, raw_head], args)

    # Resume.
    inputs = hashes(args, train, val, synthetic) if rank == 0 else {}
    inputs.update(teacher_sha256=teacher.network.sha256, block=teacher.block, sigma=teacher.sigma)
    run = Run(__file__, args, inputs, rank, device)
    run.track(model=raw_model, ema=ema, optimizer=optimizer)
    run.track(head=raw_head)
    run.load(train_steps)
    if run.step == train_steps:
        if rank == 0:
            print(f"{args.out_dir}: finished, nothing to do")
        return end_processes()
    model = wrap(raw_model)
    head = wrap(raw_head)
    # BatchNorm's running statistics begin with the first batch's, unless weights were loaded.
    from_scratch = run.step == 0 and not args.init
    set_batchnorm_momentum(raw_model, 1.0 if from_scratch else args.bn_momentum)
    about = {**models.describe(args.model, spec), "norm": args.norm, "eps": args.eps}

    # Training.
    run.start(train_steps)
    meters = Meters()
    first_compiled = max(run.step, 1)  # BatchNorm's momentum changes after step 0
    # As many images as the clean and the adversarial pass of a step hold together.
    val_batch_size = 2 * args.batch_size // (world_size * args.accumulate)
    # The rows that get a target. Which images these are: docs/recipes.md. Each keeps its noise.
    kth = slice(None, None, args.teacher_every)
    while run.step < train_steps:
        if args.compile and run.step == first_compiled:
            raw_model.compile()
            teacher.network.compile()
        set_schedule(optimizer, run.step, steps_per_epoch, train_steps, args)
        x, y = batches(run.step)
        if args.mixup or args.cutmix:
            seed = data.seed_of(args.seed, "mix", run.step)
            x, y = data.mix(x, y, spec.num_classes, args.mixup, args.cutmix, seed)
        start = attack_start(x, run.step, batches.mine, args)
        noise = teacher.noise(args.batch_size, args.seed, "teacher", run.step)[batches.mine]
        shuffle = data.stream(args.seed, "shuffle", run.step, device)

        attacks.update_twin(twin, raw_model)
        optimizer.zero_grad(set_to_none=True)
        for part in range(args.accumulate):
            micro = slice(part, None, args.accumulate)
            x_micro = x[micro].contiguous(memory_format=torch.channels_last)
            start_micro = start[micro].contiguous(memory_format=torch.channels_last)
            more = part < args.accumulate - 1
            # DRA: the target is the clean image's, whichever image is aligned with it.
            targets = run.timed(teacher.targets, x_micro[kth], y[micro][kth], noise[micro][kth])
            if args.shuffle_targets:
                targets = targets[torch.randperm(len(targets), generator=shuffle, device=device)]
            with no_sync(model, when=more), no_sync(head, when=more):
                with amp:
                    loss, metrics, x_adv, feats = adversarial_loss(
                        model, twin, x_micro, y[micro], start_micro, args
                    )
                    loss_aux = alignment_loss(head, [f[kth] for f in feats], targets, args)
                    loss = loss + args.aux_weight * loss_aux
                (loss / args.accumulate).backward()
            meters.update(loss=loss, **metrics)
            meters.update(loss_aux=loss_aux)
            examples = x_micro, x_adv  # for samples.png

        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in raw_model.parameters()])
        if args.clip_norm:
            parameters = raw_model.parameters()
            torch.nn.utils.clip_grads_with_norm_(parameters, args.clip_norm, grad_norm)
        meters.update(grad_norm=grad_norm)
        optimizer.step()
        run.advance()
        update_average(ema, raw_model, ema_decay_at(run.step, train_steps, args))
        if run.step == 1:
            set_batchnorm_momentum(raw_model, args.bn_momentum)

        # Validation, with a checkpoint; at SIGTERM a checkpoint alone.
        is_last = run.step == train_steps or run.check_is_done()
        validate_now = is_last or run.step % (args.eval_every * steps_per_epoch) == 0
        if validate_now or run.is_sync_step():
            average_batchnorm(raw_model, ema)
        stop = run.should_stop()
        if validate_now or stop:
            means = meters.means()  # waits for the GPU
            n_steps, seconds = run.interval()
            run.check_finite(**means)
        if validate_now:
            means["lr"] = optimizer.param_groups[0]["lr"]
            means["images_per_s"] = round(n_steps * args.batch_size / seconds, 1)
            means["data_wait"] = round(batches.waited / seconds, 4)  # share of the time
            batches.waited = 0.0
            with amp:
                clean_acc, robust_acc = validate(ema, x_val, y_val, val_start, val_batch_size, args)
                means["val_align"] = val_alignment(raw_model, raw_head, x_val, val_targets, args)
            run.log(clean_acc=clean_acc, robust_acc=robust_acc, **means)
            run.bar.set_postfix(loss=f"{means['loss']:.3f}", robust=f"{robust_acc:.1%}")
            score = [clean_acc, robust_acc]
            if args.loss != "standard":
                score = [robust_acc, clean_acc]
            if score > run.best:
                run.best = score
                save_best(run, ema, about, clean_acc, robust_acc)
            save_examples(run, *examples)
        if validate_now or stop:
            run.save(**about)
        if stop:
            break

    run.close()
    if rank == 0 and args.check:
        n_validations = math.ceil(args.epochs / args.eval_every)
        n_passes = math.ceil(len(x_val) / val_batch_size) * n_validations
        n_images = (len(train[1]), args.val_size, len(test[1]), len(synthetic or ()))
        run.print_check(spec, n_images, train_steps, n_passes)
    elif rank == 0 and run.step < train_steps:
        print(run.stopped_message(train_steps))
    elif rank == 0:
        kind = "clean" if args.loss == "standard" else "robust"
        best = f"best.pt has {run.best[0]:.1%} {kind} accuracy on {args.val_size} held-out images"
        print(f"{args.out_dir}: {train_steps} steps; {best}")
    end_processes()


if __name__ == "__main__":
    cli.run_script(main, parse_args())
