r"""Clean and robust accuracy of a classifier: PGD, APGD-CE+T, AutoAttack, with sanity checks.

The attacks of AutoAttack, sanity checks, results and comparisons stand in evaluation/.

    python evaluate.py --checkpoint out/train_at-digits/best.pt --attack autoattack
    torchrun --nproc_per_node 8 evaluate.py --checkpoint out/train_at-digits/best.pt \
        --attack apgd --eps 0.05 0.1 0.15 0.2
    python evaluate.py --dataset cifar10 --checkpoint weights-best.pt --model wrn-28-10
    python evaluate.py --model diffusion-classifier --teacher out/diffusion-digits --n-images 100
    torchrun --nproc_per_node 2 evaluate.py --checkpoint out/train_at-digits/best.pt --report
    python evaluate.py --compare out/a/results-best-apgd-linf-0.15.npz \
        out/b/results-best-apgd-linf-0.15.npz
    python evaluate.py --checkpoint out/train_at-digits/best.pt --export hub

  clean       no attack
  pgd         PGD with random restarts: a sanity check, never the number to report
  transfer    PGD-40 on the model of --transfer-from, whose adversarial images are tried on this
              one: a sanity check too
  apgd        APGD-CE, then targeted APGD-DLR, the first two of AutoAttack's four attacks: a quick
              upper bound on robust accuracy
  autoattack  AutoAttack standard (Croce & Hein, arXiv 2003.01690): APGD-CE, APGD-T, FAB-T, Square
  rand        AutoAttack rand, for randomised models: APGD-CE and APGD-DLR, whose gradients are
              averaged over 20 passes

An image is robust if no attack fools the model on it. apgd, autoattack and rand are the authors'
own package, pyautoattack, with its constants (evaluation/autoattack.py). Images are attacked in
chunks of --batch-size, and verdicts are those of the package called on each chunk with --seed: they
depend neither on the number of processes nor on where a run was interrupted.

The threat model comes from this command line only. A note says where that of the training differs.

Writes results-<checkpoint>-<attack>-<norm>-<eps>.json beside the checkpoint, or into out/<NAME> for
one of hub:OWNER/NAME (with -n<n>, -seed<seed>, ... where they are given), and an .npz file with one
entry per image: index, label, clean_correct, robust, fooled_by. Until then, every attack of every
chunk is kept in the directory <result>.parts, from which the same command goes on. A result that
exists is printed again.

--report evaluates at the radius and at half as much again, and in the two other norms. On what
withstands, APGD is tried again with other backward passes (evaluation/adaptive.py). These are
results like all others: those that exist are not computed again. They go on one page,
report-<checkpoint>.md, with the picture report-<checkpoint>.png, or report-<checkpoint>-<eps>... of
other radii.

--export hub writes a folder for the Hugging Face hub: the weights, all finished results of them and
a card (published/model_card.py). --checkpoint takes such a folder.
"""

import argparse
import hashlib
import os
import time

import torch

from common import UserError, attacks, cli, data, files, run
from evaluation import (
    adaptive,
    autoattack,
    compare,
    curve,
    duration,
    report,
    restarts,
    robustbench,
    sanity,
    verdicts,
)
from evaluation.image_list import select_listed
from evaluation.requests import (
    ATTACKS,
    check_names,
    is_randomised,
    request_after,
    request_at,
    result_path,
)
from published import model_card
from published.datasets import DATASETS, open_dataset, spec_of
from published.image_files import check_images
from published.weights import load_classifier, with_normalisation
from teachers import classifier
from teachers.load import load_diffusion

GENERATIVE = ("diffusion-classifier", "diffusion-head")  # --model: made of a diffusion model


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = cli.add_data_flags(parser, DATASETS, splits=False).add_argument
    add("--n-images", type=cli.count, help="only the first n test images (default: all)")
    add("--image-list", type=cli.path, help="only its images, one <class>/<file> a line")
    add = parser.add_argument_group("model").add_argument
    what = "best.pt, a folder of --export hub, hub:OWNER/NAME; with --model others' weights"
    add("--checkpoint", type=cli.path, help=what)
    add("--model", help=f"network of others' weights, such as wrn-28-10; {', '.join(GENERATIVE)}")
    add("--weights", metavar="NAME", help="the set to take where --checkpoint holds several")
    add("--mean", type=cli.ratio, nargs="+", help="what --model subtracts (default: the data's)")
    add("--std", type=cli.positive, nargs="+", help="what --model divides by (default: the data's)")
    add = parser.add_argument_group("classifiers made of a diffusion model").add_argument
    add("--teacher", type=cli.path, help="diffusion model: directory, .pkl, hub:OWNER/NAME")
    add("--n-noise", type=cli.count, default=8, help="draws of noise an image is seen under")
    add("--fresh-noise", action="store_true", help="new noise at every pass: a randomised model")
    add("--keep-classes", type=cli.count, help="classes kept after a quarter of the draws")
    add = parser.add_argument_group("threat model").add_argument
    add("--norm", choices=autoattack.NORMS, default="linf", help="norm of the perturbation")
    add("--eps", type=cli.positive, nargs="+", help="radii, x in [0, 1] (default: the usual one)")
    add = parser.add_argument_group("attack").add_argument
    add("--attack", choices=ATTACKS, default="apgd", help="see above")
    add("--report", action="store_true", help="all norms and other backward passes, on one page")
    add("--transfer-from", type=cli.path, help="checkpoint whose adversarial images are tried")
    add("--loss", choices=["margin", "ce"], default="margin", help="loss of pgd")
    add("--n-steps", type=cli.count, default=40, help="steps of pgd")
    add("--n-restarts", type=cli.count, default=5, help="random restarts of pgd")
    add("--step-size", type=cli.positive, help="step of pgd, x in [0, 1] (default: eps / 4)")
    add("--eot", type=cli.count, default=1, help="passes pgd averages, for randomised models")
    add = parser.add_argument_group("run").add_argument
    add("--batch-size", type=cli.batch, default=200, help="images per chunk, attacked as one batch")
    cli.add_check_flag(add)
    cli.add_precision_flag(add, on_gpu="tf32")
    add("--seed", type=cli.seed, default=0, help="seed of the attacks and of --n-noise")
    add("--sanity-images", type=cli.count0, default=100, help="first images checked, 0 for none")
    add("--compile", action="store_true", help="torch.compile; its rounding may flip a verdict")
    what = "result file, .json (default: beside --checkpoint); folder of --export hub (hub there)"
    add("--out", type=cli.path, help=what)
    add = parser.add_argument_group("instead of an evaluation").add_argument
    add(
        "--compare",
        nargs=2,
        type=cli.path,
        metavar=("A.npz", "B.npz"),
        help="compare two results by image, files or hub:OWNER/NAME/FILE.npz",
    )
    what = "RobustBench's files of one finished result; a folder for the hub, with all results"
    add("--export", choices=["robustbench", "hub"], help=what)
    args = parser.parse_args(argv)
    if args.compare:
        parser.check_alone(argv, "--compare")
    else:
        check_args(parser, argv, args)
    return args


def check_args(parser, argv, args):
    """End with an error where flags do not go together."""
    parser.check_data_flags(argv, args)
    spec = spec_of(args)
    generative = args.model in GENERATIVE
    pgd = ("--attack pgd", args.attack == "pgd")
    foreign = ("--model of others' weights", args.model is not None and not generative)
    diffusion = (" or ".join(GENERATIVE), generative)
    attack = ("an attack", args.attack != "clean")
    evaluation = ("an evaluation, not --export", not args.export)
    uses = {
        "--checkpoint": ("every other --model", args.model != "diffusion-classifier"),
        "--weights": ("every other --model", not generative),
        "--mean": foreign,
        "--std": foreign,
        "--teacher": diffusion,
        "--n-noise": diffusion,
        "--fresh-noise": diffusion,
        "--keep-classes": ("diffusion-classifier", args.model == "diffusion-classifier"),
        "--norm": attack,
        "--eps": attack,
        "--transfer-from": attack,
        "--loss": pgd,
        "--n-steps": pgd,
        "--n-restarts": pgd,
        "--step-size": pgd,
        "--eot": pgd,
    }
    parser.refuse_unused(argv, uses)
    not_exported = ("--model", "--download", "--transfer-from", "--batch-size")
    if args.dataset != "folder":  # whose classes are read
        not_exported += ("--data-dir",)
    not_exported += ("--weights", "--sanity-images", "--precision", "--compile", "--check")
    parser.refuse_unused(argv, dict.fromkeys(not_exported, evaluation))
    of_one_result = ("--n-images", "--image-list", "--norm", "--eps", "--attack", "--seed")
    not_hub = ("one result, not --export hub", args.export != "hub")
    parser.refuse_unused(argv, dict.fromkeys(of_one_result, not_hub))

    if not args.checkpoint and args.model != "diffusion-classifier":
        parser.error("argument --checkpoint: required")
    if generative and not args.teacher:
        parser.error(f"argument --teacher: --model {args.model} needs a diffusion model")
    if args.fresh_noise and args.attack in ("apgd", "autoattack"):
        parser.error("argument --fresh-noise: needs --attack rand, or pgd with --eot")
    for flag, values in (("--mean", args.mean), ("--std", args.std)):
        if values is not None and len(values) not in (1, spec.channels):
            expected = f"expected 1 or {spec.channels} numbers, one per channel of {spec.name}"
            parser.error(f"argument {flag}: {expected}")
    if spec.mean is None and foreign[1] and not (args.mean and args.std):
        parser.error(
            f"argument --mean, --std: required, what --model {args.model} was trained with"
        )
    if args.keep_classes is not None and args.n_noise < 4:
        parser.error("argument --keep-classes: needs --n-noise of at least 4")
    if spec.num_classes and (args.keep_classes or 0) >= spec.num_classes:
        parser.error(f"argument --keep-classes: expected less than {spec.num_classes}")
    if args.image_list and not spec.files:
        parser.error(f"argument --image-list: the images of {args.dataset} are not files")

    if args.attack == "transfer" and not args.transfer_from:
        parser.error("argument --transfer-from: required by --attack transfer")
    unchecked = is_randomised(args) or not args.sanity_images
    if args.transfer_from and args.attack != "transfer" and unchecked:
        others = "--sanity-images 0, --attack rand or --fresh-noise"
        parser.error(f"argument --transfer-from: does nothing with {others}")
    if args.norm == "l1" and (args.attack in ("pgd", "transfer") or args.transfer_from):
        advice = "take apgd or autoattack for l1"
        parser.error(f"argument --norm: pgd and transfer know linf and l2; {advice}")
    if args.eps is None and args.norm not in spec.eps:
        parser.error(f"argument --eps: required, {spec.name} has no usual radius in {args.norm}")
    for eps in radii(args):
        parser.check_radius("--eps", eps, args.norm, spec)
    parser.check_radius("--step-size", args.step_size, args.norm, spec)

    # A compiled model would not run the layers that the report goes straight through.
    not_report = ("a single evaluation, not --report", not args.report)
    parser.refuse_unused(argv, dict.fromkeys(("--out", "--transfer-from", "--compile"), not_report))
    parser.refuse_unused(argv, {"--report": evaluation})
    if args.report and args.attack not in ("apgd", "autoattack"):
        parser.error("argument --report: needs --attack apgd or autoattack")
    if args.report and generative:
        parser.error(f"argument --report: of a network's checkpoint, not of --model {args.model}")

    if args.out and args.export != "hub" and not args.out.endswith(".json"):
        parser.error(f"argument --out: expected a file that ends in .json, got '{args.out}'")
    if args.out and len(radii(args)) > 1:
        parser.error("argument --out: one result; several --eps are written beside the checkpoint")
    published = args.checkpoint and (
        args.checkpoint[:4] == "hub:" or os.path.isdir(args.checkpoint)
    )
    if args.export and published:
        parser.error(f"argument --export: {args.checkpoint} is published, expected a run's best.pt")
    if args.export and len(radii(args)) > 1:
        parser.error("argument --export: give one --eps")
    if len({result_path(args, eps) for eps in radii(args)}) < len(radii(args)):
        parser.error("argument --eps: two radii that round to one name of four digits")


def radii(args):
    """The radii of --norm to evaluate at: those of --eps, each once, or the data set's usual one.

    A report has a larger one besides the usual one.
    """
    if args.eps is not None:
        return list(dict.fromkeys(args.eps))
    usual = spec_of(args).eps[args.norm]
    return [usual, 1.5 * usual] if args.report else [usual]


def threats(args):
    """(norm, radius) of all evaluations; those of a report end with the two other norms."""
    found = [(args.norm, eps) for eps in radii(args)]
    if args.report:
        usual = spec_of(args).eps
        others = [norm for norm in autoattack.NORMS if norm in usual and norm != args.norm]
        found += [(norm, usual[norm]) for norm in others]
    return found


# --------------------------------------------------------------------------------- the attacks


def attack_chunk(model, source, x, y, spec, number, path, request, args, earlier=None):
    """Run all attacks on one chunk of images, each on those that none before it has fooled.

    x: (B, C, H, W) in [0, 1]. y: (B,). number: of the chunk. path: file of the chunk, to which each
    attack's outcome is written at once, and from which an interrupted chunk goes on. Its fooled_by
    is, per image: -1 misclassified without an attack, k fooled by the k-th attack, or the number of
    attacks where none has fooled it so far. earlier: fooled_by (B,) of a finished result to go on
    from. Its attacks are the first of all, and do not run again.
    """
    names = request["attacks"]
    eps = request["eps"]
    robust = len(names)
    if os.path.exists(path):
        chunk = verdicts.read_chunk(path, len(y), names)
    else:
        if earlier is None:
            n_earlier = 0
            correct = predict(model, x, args.seed, "evaluate-clean", number) == y
            fooled_by = torch.where(correct, robust, -1)
        else:
            n_earlier = len(request["earlier_attacks"])
            fooled_by = torch.where(earlier == n_earlier, robust, earlier)
        chunk = {
            "fooled_by": fooled_by.tolist(),
            "seconds": [0.0] * n_earlier,
            "zero_gradients": sanity.zero_gradients(model, x, y) if names and not n_earlier else 0,
            "warnings": [],
        }
        files.write_json(chunk, path)

    fooled_by = torch.tensor(chunk["fooled_by"], device=x.device)
    for k in range(len(chunk["seconds"]), len(names)):
        start_time = time.time()
        rows = torch.nonzero(fooled_by == robust).squeeze(1)
        with autoattack.collected_warnings() as warnings:
            if len(rows):
                # A chunk that goes on draws the same random numbers as one without interruption.
                set_seed(args.seed, f"attack-{names[k]}", number)
                x_adv = adversarial_images(
                    names[k], model, source, x, y, rows, spec, number, eps, args
                )
                x_adv = restarts.in_threat_model(x_adv, x[rows], names[k], args.norm, eps)
                predicted = predict(model, x_adv, args.seed, f"evaluate-{names[k]}", number)
                fooled_by[rows[predicted != y[rows]]] = k
        chunk["fooled_by"] = fooled_by.tolist()
        chunk["seconds"].append(round(time.time() - start_time, 3))
        chunk["warnings"] = sorted(warnings.union(chunk["warnings"]))
        files.write_json(chunk, path)


def adversarial_images(name, model, source, x, y, rows, spec, number, eps, args):
    """Adversarial images of the attack `name` for the given rows of a chunk (x, y)."""
    if name == "transfer":
        return sanity.transferred(source, x, y, args.norm, eps)[rows]
    if name == "pgd":
        generator = data.stream(args.seed, "evaluate-pgd", number, x.device)
        starts = [
            attacks.random_start(x.shape, args.norm, eps, generator) for _ in range(args.n_restarts)
        ]
        attacked = restarts.MeanLogits(model, args.eot) if args.eot > 1 else model
        settings = dict(norm=args.norm, eps=eps, n_steps=args.n_steps, loss=args.loss)
        step_size = args.step_size or eps / 4
        return restarts.pgd(attacked, x, y, starts, step_size=step_size, **settings)[rows]
    version = "rand" if args.attack == "rand" else "standard"
    settings = dict(norm=args.norm, eps=eps, seed=args.seed, version=version)
    settings["n_classes"] = spec.num_classes
    if name.startswith(adaptive.KINDS):
        return adaptive.attack(name, model, x[rows], y[rows], **settings)
    return autoattack.attack(name, model, x[rows], y[rows], **settings)


def predict(model, x, seed, use, number):
    """Predicted labels (B,) of the images x; a randomised model draws its noise from a seed."""
    set_seed(seed, use, number)
    with torch.no_grad():
        return model(x).argmax(1)


def set_seed(seed, use, number):
    """Seed PyTorch's own random numbers by the use that chunk `number` makes of them."""
    torch.manual_seed(data.seed_of(seed, use, number) % 2**32)


# ------------------------------------------------------------------------------------ plumbing


def load_model(args, spec, device):
    """(model, what it is as a dict of settings, the (norm, eps) of its training or None).

    The model is frozen and in eval mode.
    """
    name = f"--checkpoint {args.checkpoint}" if args.checkpoint else f"--teacher {args.teacher}"
    settings = {
        "weights": args.weights,
        "mean": args.mean,
        "std": args.std,
        "precision": args.precision,
        "compile": args.compile,
    }
    trained = None
    if args.model in GENERATIVE:
        network = load_diffusion(args.teacher, device, args.precision)
        draws = {
            "n_noise": args.n_noise,
            "fresh_noise": args.fresh_noise,
            "keep_classes": args.keep_classes,
        }
        settings |= draws | {"teacher_sha256": network.sha256}
        model = classifier.load(args.model, network, spec, args.checkpoint, seed=args.seed, **draws)
    else:
        spec = with_normalisation(spec, args.mean, args.std)
        flags = ("--model", "--weights")
        chosen = (args.model, args.weights, flags)
        model, state = load_classifier(args.checkpoint, spec, device, *chosen)
        if state["norm"] is not None:
            trained = (state["norm"], state["eps"])
        if trained is not None and (args.mean or args.std):
            own = "is of this project, whose classifiers hold their data set's"
            raise UserError(f"--mean, --std: {args.checkpoint} {own}")
    settings["checkpoint_sha256"] = files.sha256(args.checkpoint) if args.checkpoint else None
    if args.compile:
        model = torch.compile(model, dynamic=True)
    return restarts.Finite(model, name, args.precision).eval(), settings, trained


def load_images(args, spec):
    """(images, labels) of the test images to evaluate on."""
    images, labels = run.read_once(data.load_test, spec, args.data_dir)
    if args.image_list:
        images, labels = select_listed(images, labels, args.image_list)
    if args.n_images is not None and args.n_images > len(labels):
        raise UserError(f"--n-images {args.n_images}: {spec.name} has {len(labels)} test images")
    n = args.n_images or len(labels)
    images = images.part(slice(n)) if spec.files else images[:n]
    return images, labels[:n]


def check(model, images, labels, spec, jobs, args, rank, world_size, device):
    """--check: read all images, pass a batch through the model, and tell what it will take.

    jobs: of jobs_of. The places of their results are looked at, too.
    """
    check_images([images], rank, world_size)
    run.barrier()  # nothing is right before all ranks have looked
    if rank:
        return
    work = []
    for at, request, path in jobs:
        verdicts.check_place(path, request, device)
        if not os.path.exists(path):
            earlier = request.get("earlier_attacks", [])
            work.append((request["attacks"][len(earlier) :], check_names(at)))
    at_once = slice(max(args.batch_size, args.sanity_images))
    x = data.to_x(images[at_once], device)
    y = torch.from_numpy(labels[at_once]).to(device)
    duration.print_check(model, x, y, work, len(labels), spec, args, world_size)


def jobs_of(args, settings, n, data_sha256, layers):
    """(arguments, request, path) of every result, in their order.

    settings: those of the model. n, data_sha256: of the images. layers: see request_after.
    """
    jobs = []
    for norm, eps in threats(args):
        at = argparse.Namespace(**vars(args) | {"norm": norm})
        requests = [request_at(eps, at, settings, n, data_sha256)]
        if args.report:
            requests.append(request_after(requests[0], layers))
        for request in requests:
            at = argparse.Namespace(**vars(at) | {"attack": request["attack"]})
            jobs.append((at, request, result_path(at, eps)))
    return jobs


def evaluate_radius(
    model, source, images, labels, spec, request, path, args, rank, world_size, device, earlier=None
):
    """Evaluate as `request` says and write the result to `path`, unless it holds it already.

    earlier: per-image file of the result to go on from, where the request has earlier_attacks.
    Rank 0 prints the result. All ranks return it, as a dict.
    """
    start_time = time.time()
    if run.once(os.path.exists, path):
        result = run.once(verdicts.read_finished, path, request)
        if rank == 0:
            verdicts.remove_parts(path)
            verdicts.print_result(result, path)
        return result
    if rank == 0:
        verdicts.claim_parts(path, request, device)
    run.check_shared(verdicts.request_path(path))
    parts = verdicts.parts_of(path, request, check_names(args))
    fooled_by = compare.read_verdicts(earlier)["fooled_by"] if earlier else None
    title = f"{request['attack']} {cli.threat(args.norm, request['eps'])}"
    for part in run.progress(parts[rank::world_size], rank, desc=title, unit="chunk"):
        x = data.to_x(images[part.rows], device)
        y = torch.from_numpy(labels[part.rows]).to(device)
        if part.kind == "chunk":
            before = None
            if earlier:
                before = torch.from_numpy(fooled_by[part.rows]).to(device)
            attack_chunk(model, source, x, y, spec, part.name, part.path, request, args, before)
        elif not os.path.exists(part.path):
            threat = (args.norm, request["eps"])
            check = sanity.run_check(part.name, model, source, x, y, *threat, args.seed)
            files.write_json(check, part.path)
    run.barrier()
    if rank == 0:
        result, per_image = verdicts.merge(
            parts,
            request,
            labels,
            classes=spec.classes,
            checkpoint=args.checkpoint or args.teacher,
            randomised=is_randomised(args),
            seconds=round(time.time() - start_time, 1),
        )
        verdicts.write_result(path, result, per_image)
        verdicts.print_result(result, path)
    run.barrier()
    return files.read_json(path)


def export_robustbench(args):
    """Write RobustBench's files of the finished result at the one radius of the command line."""
    spec = open_dataset(args)
    path = result_path(args, radii(args)[0])
    result = robustbench.read_result(path, args.checkpoint, spec)
    weights = result.get("weights")
    model, about = load_classifier(args.checkpoint, spec, "cpu", weights=weights)
    robustbench.export(result, args.checkpoint, spec, model, about["model_name"])


def export_hub(args):
    """Write the folder in which the checkpoint is published, with all finished results of it."""
    spec = open_dataset(args)
    weights, about, n_parameters = model_card.weights_of(args.checkpoint, spec)
    run_dir = os.path.dirname(args.checkpoint)
    digests = (files.sha256(args.checkpoint), hashlib.sha256(weights).hexdigest())
    results, others = verdicts.results_of(run_dir, digests)
    if not any(result["attack"] in model_card.REPORTED for result in results.values()):
        found = f"no finished result of {', '.join(model_card.REPORTED)} is beside it"
        remedy = "put --attack autoattack in the place of --export hub to make one"
        raise UserError(f"--checkpoint {args.checkpoint}: {found}; {remedy}")
    out_dir = args.out or os.path.join(run_dir, "hub")
    model_card.export(out_dir, args.checkpoint, weights, about, n_parameters, results, others)


def main(args):
    if (args.compare or args.export) and cli.rank() != "0":
        return
    if args.compare:
        compare.compare(*args.compare)
        return
    if args.export == "robustbench":
        export_robustbench(args)
        return
    if args.export == "hub":
        export_hub(args)
        return

    rank, world_size, device = run.start_processes(args.precision)
    if args.compile:
        run.check_compiler(device)
    spec = open_dataset(args)
    model, settings, trained = load_model(args, spec, device)
    source = None
    if args.transfer_from:
        source, _ = load_classifier(args.transfer_from, spec, device)
        source = restarts.Finite(
            source, f"--transfer-from {args.transfer_from}", args.precision
        ).eval()
    images, labels = load_images(args, spec)

    data_sha256 = run.once(data.sha256, (images, labels))
    layers = adaptive.layers_of(model.model, data.to_x(images[:2], device)) if args.report else None
    jobs = jobs_of(args, settings, len(labels), data_sha256, layers)
    if args.check:
        check(model, images, labels, spec, jobs, args, rank, world_size, device)
        return run.end_processes()

    results = []
    paths = []
    for at, request, path in jobs:
        threat = (at.norm, request["eps"])
        if rank == 0 and not args.report and trained not in (None, threat):
            training = f"trained against {cli.threat(*trained)}"
            print(f"note: {training}, evaluated against {cli.threat(*threat)}")
        earlier = verdicts.per_image_path(paths[-1]) if "earlier_attacks" in request else None
        result = evaluate_radius(
            model,
            source,
            images,
            labels,
            spec,
            request,
            path,
            at,
            rank,
            world_size,
            device,
            earlier,
        )
        results.append(result)
        paths.append(path)

    if rank == 0 and args.report:
        stem = os.path.splitext(result_path(args, "report"))[0]
        report.write_report(model.model.name, labels, spec, results, paths, trained, stem)
    elif rank == 0 and len(results) > 1:
        picture = os.path.splitext(result_path(args, "curve"))[0] + ".png"
        curve.write_curve(results, trained, picture)
        print(picture)
    run.end_processes()


if __name__ == "__main__":
    cli.run_script(main, parse_args())
