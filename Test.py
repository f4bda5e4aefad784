"""Compares the plain residual connection with LAuReL, LAuReL-LR and LAuReL-PA, by default in small CNNs on CIFAR-10.

`python Test.py` trains four models on all of CIFAR-10 and leaves a table and pictures; `--help` has the rest. The way
through this file: options, data, models, training, table and pictures.
"""

import argparse
import importlib
import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from inspect import getdoc
from pathlib import Path

# OpenMP's threads wait for each other without sleeping, 300,000 times by default: that leaves no core to what they wait
# for where other processes work. Before torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from torchvision.datasets import CIFAR10, CIFAR100

import TrainUtil
from comparison.console import UserError, print_table, say, set_up_output
from comparison.data import synthetic
from comparison.device import compiler_errors, cores, default_precision, keep_memory, memory_errors
from comparison.distributed import agent_store, broadcast, first_process, launched, leave, process_group
from comparison.files import describe, write_json
from comparison.folder import Data, Folder, load_folder
from comparison.models import LARGEST, MODELS, Model
from comparison.monitor import Monitor
from comparison.networks import ARCHS, TEXT_ARCHS, build
from comparison.parallel import end_with_parent, helpers, helping
from comparison.pictures import draw
from comparison.profile import made_up, measure, profile_table
from comparison.report import table
from comparison.sources import load_cifar, load_enwik8
from comparison.study import Study, check_against, configuration
from comparison.text import Text, synthetic_text
from LAuReL import LAuReL

LAuReL_LR = importlib.import_module("LAuReL-LR").LAuReL_LR
LAuReL_PA = importlib.import_module("LAuReL-PA").LAuReL_PA

EXAMPLES = f"""\
models: {", ".join(MODELS)}
  rw  {getdoc(LAuReL).partition(chr(10))[0]}
  lr  {getdoc(LAuReL_LR).partition(chr(10))[0]}
  pa  {getdoc(LAuReL_PA).partition(chr(10))[0]}
  deeper  the plain residual with one more layer; rezero, layerscale, x0, denseformer: see comparison/connections.py
  lr@8 sets the rank, pa/5 sets k, rw+lr+pa@16/3 both; the defaults are 16 and 3
  rw:dim=D has α and β for each channel; bound=, scale=, init=, shared= and rank=none set a block's other arguments
  in the same way, decay=0.1 weight decay on its parameters, rate=3 a factor on their learning rate: rw+lr@8:rate=3;
  w and gamma learn at 0.01 (text: 0.003), with --optimizer at its --lr: rw:rate=10 makes that 0.01 for adamw
  in a GPT the default rank is 32; pa:rank=none has h(x) = x, as the PA of the paper's table 5

examples:
  python Test.py                                        residual, rw, lr and pa, three seeds
  python Test.py --models residual rw+lr deeper --seeds 10 --out runs/study    again: resumes it where it was stopped
  python Test.py --draw runs/study                      its table and pictures, only from its files
  python Test.py --models residual --epochs 15          longer training, higher accuracy (results/README.md)
  python Test.py --dataset enwik8                       a GPT on bytes of Wikipedia
  python Test.py --dataset synthetic --epochs 2         no download, done in a minute
  python Test.py --profile --arch gpt                   time and memory of every residual connection
"""

REQUIRED = {"lr": "optimizer", "seconds": "profile"}
# What goes with the options that do something else than train
ALLOWED = {"draw": ("against",), "profile": ("models", "arch", "batch_size", "image_size", "device", "precision")}
ALLOWED["profile"] += ("compile", "threads", "out", "seconds")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        said = launched() and os.environ["LOCAL_RANK"] != "0"  # by another process of the same machine
        self.exit(2, None if said else f"{self.prog}: {message}\n")


def count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 999999999, got {text!r}")
    return int(text)


def seeds(text: str) -> list[int]:
    if re.fullmatch(r"(\d{1,4}-)?\d{1,4}", text):
        first, last = map(int, text.split("-")) if "-" in text else (0, int(text) - 1)
        if first <= last < 4096:  # epoch_generator does not tell seeds apart that differ by 4096
            return list(range(first, last + 1))
    raise argparse.ArgumentTypeError(f"must be a number of seeds or FIRST-LAST, from 0 to 4095, got {text!r}")


def rate(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) <= LARGEST:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a positive number up to {LARGEST:g}, got {text!r}")


def path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~ of an unknown user
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def device(text: str) -> torch.device:
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if text == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if there[name]))
    try:
        chosen = torch.device(text)
    except RuntimeError:
        chosen = None
    if chosen is None or not there.get(chosen.type) or (chosen.index or 0) >= max(1, torch.cuda.device_count()):
        allowed = ", ".join(["auto", *(name for name in there if there[name])])
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here; allowed are {allowed}")
    return chosen


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the options, with defaults that depend on others filled in."""
    image, text = TrainUtil.IMAGES, TrainUtil.TEXT
    parser = Parser(
        prog="Test.py",
        description="Trains networks that differ only in the residual connection, and compares them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", type=Model.parse, metavar="MODEL", help="(default: residual rw lr pa; --profile: all)")
    add("--arch", choices=ARCHS, help="medium trains longer, wide is for a GPU (default: small, or gpt for text)")
    add("--epochs", type=count, default=image.epochs, metavar="N", help=f"(default: {image.epochs})")
    add("--batch-size", type=count, metavar="N", help=f"(default: {image.batch_size}, or {text.batch_size} for text)")
    one = "everything in one optimiser with --lr, in place of the recipe's Muon and AdamW; see rate= below"
    add("--optimizer", choices=("adamw", "sgd"), help=one)
    add("--lr", type=rate, metavar="X", help="its learning rate (default: 0.001 for adamw, 0.1 for sgd)")
    add("--seeds", type=seeds, default=[0, 1, 2], metavar="N", help="0 to N-1, or FIRST-LAST (default: 3)")
    add("--parallel", type=count, default=1, metavar="N", help="N processes, a seed each at a time (default: 1)")
    add("--threads", type=count, metavar="N", help="CPU threads of each (default: the cores divided by --parallel)")
    add("--accumulate", type=count, default=1, metavar="N", help="train on a batch in N parts, for less memory")
    add("--device", type=device, default=device("auto"), help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="(default: the device's fastest)")
    add("--compile", action="store_true", help="compile the model with torch.compile; its time is reported apart")
    add("--data-dir", type=path, default=Path("data"), metavar="DIR", help="where the data are kept (default: data)")
    add(
        "--dataset",
        choices=("cifar10", "cifar100", "imagefolder", "enwik8", "synthetic"),
        help="imagefolder: --data-dir's train/ and val/; synthetic: made up (default: cifar10, or enwik8 for a gpt)",
    )
    add("--image-size", type=count, metavar="N", help="imagefolder: crops of N pixels (default: 224); --profile")
    add("--workers", type=count, metavar="N", help="imagefolder: processes that read images (default: a core each)")
    add("--limit", type=count, metavar="N", help="the first N training images or sequences only, for a quick try")
    hold_out = "to choose a recipe by: test on the last N training images, or N sequences of enwik8's validation part"
    add("--hold-out", type=count, metavar="N", help=hold_out)
    add("--profile", action="store_true", help="measure what each residual connection costs instead of training")
    add("--seconds", type=count, default=60, metavar="N", help="--profile: at least so long on steps (default: 60)")
    add("--out", type=path, metavar="DIR", help="where results go; resumes a study (default: runs/DATE-TIME)")
    add("--against", metavar="MODEL", help="what the others are compared with (default: the study's, or residual)")
    again = "show the tables and draw the pictures of earlier studies, only from their files, and end"
    add("--draw", type=path, nargs="+", metavar="DIR", help=again)
    options = parser.parse_args(argv)
    given = [name for name, value in vars(options).items() if value != parser.get_default(name)]
    for name in given:
        for mode, allowed in ALLOWED.items():
            if mode in given and name not in (mode, *allowed):
                parser.error(f"--{name.replace('_', '-')} does not go with --{mode}")
        if name in REQUIRED and REQUIRED[name] not in given:
            parser.error(f"--{name} goes with --{REQUIRED[name]}")
    if options.draw:
        return options
    models = options.models or [Model.parse(name) for name in (MODELS if options.profile else MODELS[:4])]
    if options.profile:
        models.insert(0, Model.parse("residual"))  # what the others are compared with
    options.models = list({model.name: model for model in models}.values())
    here = 1  # processes of this machine
    if launched():
        here, world, restarts = (
            int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS")
        )
        if options.parallel > 1 or options.profile:
            parser.error("torchrun trains one seed at a time with all its processes: no --parallel, no --profile")
        if restarts and options.out is None:
            parser.error("with torchrun --max-restarts name the folder with --out, so that a restart finds it")
        if restarts and world > here and agent_store():  # each counts its restarts apart
            parser.error(
                "over several machines torchrun --max-restarts needs --rdzv-backend=c10d and the environment variable "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (pytorch issue 135712)"
            )
        if options.device.type == "mps":
            parser.error("torchrun works with --device cpu and cuda, not with mps")
        if options.device.type == "cuda":
            if here > (there := torch.cuda.device_count()):
                parser.error(f"torchrun started {here} processes on this machine, which has {there} GPUs")
            options.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    options.arch = options.arch or ("gpt" if options.dataset == "enwik8" else "small")
    text_arch = options.arch in TEXT_ARCHS
    options.dataset = options.dataset or ("synthetic" if options.profile else "enwik8" if text_arch else "cifar10")
    if options.dataset != "synthetic" and text_arch != (options.dataset == "enwik8"):
        allowed = [arch for arch in ARCHS if (arch in TEXT_ARCHS) != text_arch]
        parser.error(f"--dataset {options.dataset} goes with --arch {', '.join(allowed)}, not with {options.arch}")
    if options.optimizer:
        options.lr = options.lr or {"adamw": 0.001, "sgd": 0.1}[options.optimizer]
    recipe = text if text_arch else image
    options.batch_size = options.batch_size or recipe.batch_size
    options.out = options.out or Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")
    # Another number of threads adds up in another order: numbers are the same to the bit only for the same --threads.
    threads = cores() // here if here > 1 else torch.get_num_threads()  # torchrun would have one thread in each
    options.threads = options.threads or max(1, threads // options.parallel)
    if options.precision == "auto":
        options.precision = default_precision(options.device)
    if options.dataset == "imagefolder":
        options.image_size = options.image_size or 224
        options.workers = options.workers or max(1, cores() // (here * options.parallel))
    elif options.workers or (options.image_size and (text_arch or not options.profile)):
        name, others = ("--workers", "") if options.workers else ("--image-size", ", or --profile and --arch of images")
        parser.error(f"{name} goes with --dataset imagefolder{others}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where a run failed, 2 where the options or the data are wrong, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    set_up_output(quiet=not first_process())
    options = parse(argv)
    try:
        if options.draw:
            return max(draw_again(out, options.against) for out in options.draw) if first_process() else 0
        torch.set_num_threads(options.threads)
        keep_memory()
        torch.backends.cudnn.deterministic = True
        if options.device.type == "cuda" and options.device.index is not None:
            torch.cuda.set_device(options.device)
        with process_group(options.device):
            if not first_process():
                return run_follower(options)
            return profile(options) if options.profile else compare(options, argv)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    except BrokenPipeError:
        print("Nobody reads the output any more.", file=sys.stderr)
        return 1
    except OSError as error:
        print(describe(error, options.out), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if first_process():
            print("Interrupted.", file=sys.stderr)
        return 130


def load_data(options: argparse.Namespace) -> Data:
    match options.dataset:
        case "synthetic":
            data = synthetic_text() if options.arch in TEXT_ARCHS else synthetic()
        case "enwik8":
            data = load_enwik8(options.data_dir)
        case "imagefolder":
            data = load_folder(options.data_dir, options.image_size, options.workers)
        case cifar:
            data = load_cifar(CIFAR100 if cifar == "cifar100" else CIFAR10, options.data_dir)
    if options.hold_out and options.hold_out >= data.hold_out_size:
        part = "validation" if isinstance(data, Text) else "training"
        n = f"{data.hold_out_size} {part} {data.examples}"
        raise UserError(f"--hold-out must be below the {n}, got {options.hold_out}")
    data = data.hold_out(options.hold_out) if options.hold_out else data
    return data.limit(options.limit) if options.limit else data


def recipe_for(options: argparse.Namespace, data: Data) -> TrainUtil.Recipe:
    recipe = TrainUtil.TEXT if isinstance(data, Text) else TrainUtil.IMAGES
    recipe = replace(recipe, epochs=options.epochs, batch_size=options.batch_size)
    if isinstance(data, Folder):  # the workers crop
        recipe = replace(recipe, sizes=((data.size, 1.0),))
    if options.arch == "vit":  # it bears a tenth of what the batch norms of the others bear
        recipe = replace(recipe, lr=0.001, pair_lr=0.001)
    return recipe.with_one(options.optimizer, options.lr) if options.optimizer else recipe


def check_sizes(options: argparse.Namespace, data: Data, recipe: TrainUtil.Recipe) -> None:
    """Raises a UserError, before anything is written, where images or batches are too small for the network."""
    smallest = min(size for size, _ in recipe.sizes)
    network = build(options.arch, Model.parse("residual"), 0, data, smallest)
    TrainUtil.check_batch(network, min(recipe.batch_size, data.train_size), options.accumulate)


def train_seed(
    seed: int, names: list[str], options: argparse.Namespace, data: Data, recipe: TrainUtil.Recipe, **how
) -> list[dict]:
    """Returns the entries in results.json of some models with one seed; `how` are checkpoint and report."""
    models = [Model.parse(name) for name in names]
    how |= {"precision": options.precision, "compile": options.compile, "accumulate": options.accumulate}
    advice = f"try a smaller --batch-size than {recipe.batch_size}, a larger --accumulate than {options.accumulate}, a "
    advice += "smaller rank, fewer models at a time or a smaller --parallel, with another --out"
    with memory_errors(f"{', '.join(names)}, seed {seed}: {advice}"):
        networks = {model.name: ARCHS[options.arch](model, seed, data) for model in models}
        own = {model.name: model.own for model in models}
        measured = TrainUtil.train(networks, data.to(options.device), recipe, seed, own=own, **how)
    return [
        {
            "model": name,
            "seed": seed,
            "parameters": sum(p.numel() for p in network.parameters()),
            **measured[name],
            "learned": measured[name]["history"][-1]["learned"],
            "weights_sha256": TrainUtil.digest(network),
        }
        for name, network in networks.items()
    ]


def compare(options: argparse.Namespace, argv: list[str]) -> int:
    """Trains what the study lacks and, whatever happens, shows what it has."""
    names = [model.name for model in options.models]
    try:
        data = load_data(options)
        recipe = recipe_for(options, data)
        with memory_errors("try a smaller --image-size" if options.image_size else "try another --arch"):
            check_sizes(options, data, recipe)
        config = configuration(vars(options)) | {"data": data.name, "recipe": asdict(recipe)}
        sizes = {"training": data.train_size, "test": data.test_size}
        config |= {f"{part}_{data.unit}": data.units * size for part, size in sizes.items()}
        study = Study.open(options.out, config, options.against)
    except BaseException:
        broadcast(None)  # to run_follower: there is nothing to do
        raise
    runs = len(options.seeds) * len(names)
    lacking = [group for seed in options.seeds if (group := study.lacking(seed, names))]  # of each seed that lacks some
    if there := runs - sum(map(len, lacking)):
        say(f"{there} of {runs} runs are in {options.out} already.")
    monitor = Monitor(study, options.seeds, names, recipe.epochs, data.unit)
    kept = f"What has finished is kept. The same command with --out {options.out} resumes the study."
    theirs = [*argv, "--out", str(options.out), "--threads", str(options.threads)]

    def wait() -> None:
        time.sleep(0.3)
        monitor.refresh()

    try:
        with helpers(min(options.parallel, len(lacking)) - 1, theirs), monitor.bar:
            for seed, models in study.take(options.seeds, names, None if helping() else wait):
                broadcast((common_settings(options, data, recipe), seed, models))

                def report(*so_far: object, seed: int = seed) -> None:
                    end_with_parent()
                    monitor.report(seed, *so_far)

                how = {"checkpoint": study.checkpoint(seed), "report": report}
                study.add(seed, train_seed(seed, models, options, data, recipe, **how))
                if any(study.lacking(each, names) for each in options.seeds):
                    print_table(**table(study.config, study.in_order()))
            broadcast(None)
    except UserError as error:  # an image may turn out to be broken after hours
        raise UserError(f"{error}. {kept}", error.code) from None
    except OSError as error:
        raise UserError(f"{describe(error, options.out)}. {kept}", code=1) from None
    except KeyboardInterrupt:
        study.refresh()  # what other processes have added
        raise UserError(f"Interrupted: {len(study.runs)} runs have finished. {kept}", code=130) from None
    finally:
        study.refresh()
        status = 0
        if study.runs and not helping():
            with study.lock("study"):  # whoever opens the study removes files that are half written
                status = show(study)
    return status


def common_settings(options: argparse.Namespace, data: Data, recipe: TrainUtil.Recipe) -> dict:
    """What all processes must have in common."""
    sizes = {f"training {data.examples}": data.train_size, f"test {data.examples}": data.test_size}
    names = ("arch", "accumulate", "compile", "precision")
    chosen = {name: getattr(options, name) for name in names} | asdict(recipe)
    return {**sizes, "classes": data.classes, "torch": torch.__version__, **chosen}


def run_follower(options: argparse.Namespace) -> int:
    """Trains, in torchrun's other processes, what the first one trains, which keeps the results."""
    data = None
    while task := broadcast(None):  # otherwise nothing is left, or the first process has said what is wrong
        first, seed, models = task
        data = data or load_data(options)
        recipe = recipe_for(options, data)
        for name, mine in common_settings(options, data, recipe).items():
            if mine != first.get(name):
                raise UserError(f"{name}: this process has {mine}, the first one {first.get(name)}", code=1)
        train_seed(seed, models, options, data, recipe)
    return 0


def draw_again(out: Path, against: str | None) -> int:
    try:
        study = Study.read(out)
        if not study.runs:
            raise UserError(f"--draw {out}: no run has finished yet")
        check_against(against, dict.fromkeys(model for model, _ in study.runs))
    except UserError as error:  # the other studies are shown all the same
        print(error, file=sys.stderr)
        return error.code
    study.config["against"] = against or study.config["against"]
    return show(study)


def show(study: Study) -> int:
    """Draws the pictures and prints the table."""
    runs, failed = study.in_order(), None
    try:
        drawn = draw(study.out, study.config, runs)
    except OSError as error:
        drawn, failed = [], error
    print_table(**table(study.config, runs))
    for path in (study.out / "results.json", study.out / "results.csv", *drawn):
        if path.exists():
            say(path)
    if failed:
        print(f"The pictures could not be written: {describe(failed, study.out)}", file=sys.stderr)
    return 1 if failed else 0


def profile(options: argparse.Namespace) -> int:
    """Measures what each residual connection costs."""
    path = options.out / "profile.json"
    if path.exists():
        raise UserError(f"--out {options.out} holds another profile; name a new folder")
    options.out.mkdir(parents=True, exist_ok=True)
    config = configuration(vars(options))
    with compiler_errors(), memory_errors("try a smaller --batch-size, --image-size or rank, or fewer --models"):
        data = made_up(load_data(options), options.batch_size, options.image_size)
        models = {model.name: build(options.arch, model, 0, data) for model in options.models}
        TrainUtil.check_batch(next(iter(models.values())), options.batch_size, accumulate=1)
        how = {"precision": options.precision, "compile": options.compile, "seconds": options.seconds}
        costs = measure(models, data, options.device, **how)
    write_json(path, {"config": config, "costs": costs})
    print_table(**profile_table(config, costs))
    say(path)
    return 0


if __name__ == "__main__":
    status = main()
    if launched():
        leave(status)
    sys.exit(status)
