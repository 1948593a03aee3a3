"""Adversarial training (AT), on real images alone or with diffusion-generated images (DM-AT).

The loss L_AT is TRADES' (Zhang et al., arXiv 1901.08573, equation 5) with label smoothing in CE.
p is the softmax of the classifier's logits:

    L_AT = CE(p(x), y) + beta * KL(p(x) || p(x_adv))
    x_adv = argmax_{|x' - x| <= eps, x' in [0, 1]} KL(p(x) || p(x'))

or, with --loss pgd, that of Madry et al. (arXiv 1706.06083): L_AT = CE(p(x_adv), y), x_adv
maximising CE. The recipe is DM-AT's (Wang et al., arXiv 2302.04638): RECIPE is its CIFAR-10
command, and PRESETS say where a data set departs from it.

    python train_at.py                                                    # AT, digits, a minute
    python train_at.py --synthetic out/synthetic-digits --out-dir out/dm_at               # DM-AT
    torchrun --nproc_per_node 8 train_at.py --dataset cifar10 --download    # DM-AT's recipe

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


# ---------------------------------------------------------------------------------- the method


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
    """L_AT of images x: (loss, metrics, x_adv).

    model: what the gradient is taken through (DDP). twin: its frozen copy, to be attacked.
    start: the perturbation that the attack starts from, like x. y, metrics: as in at_loss.
    """
    logits = logits_adv = None
    x_adv = x
    attacked = args.loss != "standard"
    # running: the attack comes first, because the clean pass updates the statistics.
    # batch: it comes second, because the clean logits are the reference of its KL.
    if attacked and args.attack_bn == "running":
        x_adv = attack_in_training(twin, x, y, start, args)
    if args.loss != "pgd":
        logits = model(x)
    if attacked and args.attack_bn == "batch":
        reference = None if logits is None else logits.detach()
        x_adv = attack_in_training(twin, x, y, start, args, reference)
    if attacked:
        logits_adv = model(x_adv)
    loss, metrics = at_loss(logits, logits_adv, y, args)
    return loss, metrics, x_adv


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
    models.check_model(args.model, spec)


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
    optimizer = make_optimizer([raw_model], args)

    # Resume.
    inputs = hashes(args, train, val, synthetic) if rank == 0 else {}
    run = Run(__file__, args, inputs, rank, device)
    run.track(model=raw_model, ema=ema, optimizer=optimizer)
    run.load(train_steps)
    if run.step == train_steps:
        if rank == 0:
            print(f"{args.out_dir}: finished, nothing to do")
        return end_processes()
    model = wrap(raw_model)
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
    while run.step < train_steps:
        if args.compile and run.step == first_compiled:
            raw_model.compile()
        set_schedule(optimizer, run.step, steps_per_epoch, train_steps, args)
        x, y = batches(run.step)
        if args.mixup or args.cutmix:
            seed = data.seed_of(args.seed, "mix", run.step)
            x, y = data.mix(x, y, spec.num_classes, args.mixup, args.cutmix, seed)
        start = attack_start(x, run.step, batches.mine, args)

        attacks.update_twin(twin, raw_model)
        optimizer.zero_grad(set_to_none=True)
        for part in range(args.accumulate):
            micro = slice(part, None, args.accumulate)
            x_micro = x[micro].contiguous(memory_format=torch.channels_last)
            start_micro = start[micro].contiguous(memory_format=torch.channels_last)
            more = part < args.accumulate - 1
            with no_sync(model, when=more):
                with amp:
                    loss, metrics, x_adv = adversarial_loss(
                        model, twin, x_micro, y[micro], start_micro, args
                    )
                (loss / args.accumulate).backward()
            meters.update(loss=loss, **metrics)
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
