"""Compares the plain residual connection with LAuReL, LAuReL-LR and LAuReL-PA: by default in small CNNs on CIFAR-10.

`python Test.py` trains four models on all of CIFAR-10 and leaves a table and two pictures; `--help` has the rest.
"""

import argparse
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import filelock
import rich
import rich.box
import torch
from torchvision.datasets import CIFAR10, CIFAR100

import TrainUtil
from comparison.console import DataError, Monitor, RefusedError, RunError
from comparison.data import synthetic
from comparison.device import cores, default_precision, keep_memory, out_of_memory
from comparison.distributed import agent_store, agree, first_process, launched, process_group, processes
from comparison.folder import Data, Folder, load_folder
from comparison.models import MODELS, Model
from comparison.networks import ARCHS, learned
from comparison.pictures import draw
from comparison.profile import profile
from comparison.report import table
from comparison.sources import load_cifar
from comparison.study import check_against, checkpoint, configuration, earlier_runs, read_results, tidy, write_results

EXAMPLES = f"""\
models: {", ".join(MODELS)}
  lr@8 sets the rank, pa/5 sets k, rw+lr+pa@16/3 both; the defaults are 16 and 3
  rw:dim=D has α and β for each channel; bound=, scale=, init=, shared= and rank=none set a block's other arguments
  in the same way, and decay=0.1 weight decay on its parameters: rw+lr@8:scale=1,init=orthogonal
  in --profile's GPT the default rank is 32, and pa and rw+pa without a rank have h(x) = x, as in the paper's table 5

longer training, residual, mean of three seeds on 2 CPU cores with bfloat16: 87.65 % in 49 s with the default 5 epochs,
  90.22 % in 141 s with 15, 92.31 % in 324 s with --arch medium --epochs 12 (results/README.md has commands and machine)

examples:
  python Test.py                                        residual, rw, lr and pa, one seed
  python Test.py --models residual rw+lr deeper --seeds 10 --out runs/study    again: goes on where it was stopped
  python Test.py --draw runs/study                      its table and pictures, from its files alone
  python Test.py --models residual --epochs 15          longer training, higher accuracy
  python Test.py --dataset synthetic --epochs 2         no download, done in a minute
  python Test.py --profile                              time and memory of every residual connection
"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        told = launched() and os.environ["LOCAL_RANK"] != "0"  # by another process of the same machine
        self.exit(2, None if told else f"{self.prog}: {message}\n")


def count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


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
    default = TrainUtil.Recipe()
    parser = Parser(
        prog="Test.py",
        description="Trains small CNNs that differ in the residual connection alone, and compares them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", type=Model.parse, metavar="MODEL", help="(default: residual rw lr pa; --profile: all)")
    add("--arch", choices=ARCHS, default="small", help="medium trains longer, wide is for a GPU (default: small)")
    add("--epochs", type=count, default=default.epochs, metavar="N", help="(default: %(default)s)")
    add("--batch-size", type=count, default=default.batch_size, metavar="N", help="(default: %(default)s)")
    add("--seeds", type=count, default=1, metavar="N", help="train every model with seeds 0 to N-1 (default: 1)")
    add("--parallel", type=count, default=1, metavar="N", help="train N at a time, side by side (default: 1)")
    add("--threads", type=count, metavar="N", help="CPU threads of each run (default: the cores divided by --parallel)")
    add("--accumulate", type=count, default=1, metavar="N", help="train on a batch in N parts, for less memory")
    add("--device", type=device, default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="(default: the device's fastest)")
    add("--compile", action="store_true", help="compile the model with torch.compile; its time is reported apart")
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where the data are kept (default: data)")
    kinds = ("cifar10", "cifar100", "imagefolder", "synthetic")
    add(
        "--dataset",
        choices=kinds,
        default="cifar10",
        help="imagefolder: --data-dir's train/ and val/; synthetic: made up",
    )
    add("--image-size", type=count, metavar="N", help="imagefolder: crops of N pixels (default: 224); --profile")
    add("--workers", type=count, metavar="N", help="imagefolder: processes that read images (default: a core each)")
    add("--limit", type=count, metavar="N", help="the first N training images only, for a quick try")
    add("--hold-out", type=count, metavar="N", help="test on the last N training images, to choose a recipe by")
    add("--profile", action="store_true", help="measure what each residual connection costs, in place of training")
    add("--seconds", type=count, default=60, metavar="N", help="--profile: at least so long on training (default: 60)")
    add("--network", choices=("both", "cnn", "gpt"), default="both", help="--profile: (default: both)")
    shape = ("DIM", "LAYERS", "LENGTH", "BATCH")
    add("--gpt", type=count, nargs=4, default=[768, 4, 256, 4], metavar=shape, help="--profile: (default: 768 4 256 4)")
    add("--out", type=Path, metavar="DIR", help="where results go; goes on with a study (default: runs/ and time)")
    add("--against", metavar="MODEL", help="what the others are compared with (default: residual)")
    add("--draw", type=Path, metavar="DIR", help="show the table and draw the pictures of an earlier --out, and end")
    options = parser.parse_args(argv)
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
            parser.error("torchrun trains one model at a time with all its processes: no --parallel, no --profile")
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
            options.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if options.device.type == "cuda" and options.device.index is not None:
        torch.cuda.set_device(options.device)
    options.out = options.out or Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")
    # Another number of threads adds up in another order: numbers are the same to the bit for the same --threads alone.
    threads = cores() // here if here > 1 else torch.get_num_threads()  # torchrun would have one thread in each
    options.threads = options.threads or max(1, threads // options.parallel)
    if options.precision == "auto":
        options.precision = default_precision(options.device)
    if options.dataset == "imagefolder":
        options.image_size = options.image_size or 224
        options.workers = options.workers or max(1, cores() // (here * options.parallel))
    elif options.workers or (options.image_size and not options.profile):
        name = "--workers" if options.workers else "--image-size"
        parser.error(f"{name} goes with --dataset imagefolder")
    if options.gpt[0] % 64:
        parser.error(f"--gpt {options.gpt[0]} …: the width must be a multiple of 64, the channels of a head")
    if options.profile and (options.out / "profile.json").exists():
        parser.error(f"--out {options.out} holds another profile; name a new folder")
    try:
        if first_process():
            options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror or error}")
    return options


def train_one(
    model: Model,
    seed: int,
    data: Data,
    recipe: TrainUtil.Recipe,
    options: argparse.Namespace,
    report: Callable = lambda *so_far: None,
) -> dict:
    """The entry in results.json of one model with one seed."""
    keep_memory()
    torch.backends.cudnn.deterministic = True
    net = ARCHS[options.arch](model, seed, data)
    settings = {"precision": options.precision, "compile": options.compile, "accumulate": options.accumulate}
    settings |= {"report": report, "checkpoint": checkpoint(options.out, model.name, seed)}
    try:
        recipe = replace(recipe, block_decay=model.decay)
        measured = TrainUtil.train(net, data.to(options.device), recipe, seed, **settings)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        fewer = f", or --parallel below {options.parallel} with --threads {options.threads}" * (options.parallel > 1)
        raise RunError(
            f"{model.name}, seed {seed}: out of memory with --batch-size {recipe.batch_size}. Try --accumulate "
            f"{2 * options.accumulate} or a smaller batch, with another --out{fewer}"
        ) from None
    parameters = sum(p.numel() for p in net.parameters())
    weights = {"learned": {} if measured["diverged"] else learned(net), "weights_sha256": TrainUtil.digest(net)}
    return {"model": model.name, "seed": seed, "parameters": parameters, **measured, **weights}


def train_all(
    pairs: dict[int, tuple[Model, int]],
    data: Data,
    recipe: TrainUtil.Recipe,
    options: argparse.Namespace,
    monitor: Monitor,
) -> Iterator[dict]:
    """The entry of each pair, by its number, as they finish; `--parallel` at a time, each in a process of its own."""
    if options.parallel == 1:
        for i, pair in pairs.items():
            yield train_one(*pair, data, recipe, options, partial(monitor.report, i))
        return
    context = multiprocessing.get_context("spawn")
    reports = context.SimpleQueue()

    def listen() -> None:
        while True:
            message = reports.get()
            with suppress(OSError):  # where nobody reads the output any more, the processes must not wait for that
                monitor.report(*message)

    threading.Thread(target=listen, daemon=True).start()
    start = {"initializer": start_worker, "initargs": (options.threads, reports)}
    with ProcessPoolExecutor(options.parallel, mp_context=context, **start) as pool:
        try:
            heed = signal.signal(
                signal.SIGINT, signal.SIG_IGN
            )  # Ctrl-C is this process's: those that start now ignore it
            try:
                futures = [pool.submit(work, i, *pair, data, recipe, options) for i, pair in pairs.items()]
            finally:
                signal.signal(signal.SIGINT, heed)
            for future in as_completed(futures):
                yield future.result()
        except BaseException as error:  # the pool would wait for what it has begun
            for process in multiprocessing.active_children():
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise RunError(
                    "a training process was killed, perhaps for lack of memory. Try --parallel below "
                    f"{options.parallel} with --threads {options.threads}"
                ) from None
            raise


def start_worker(threads: int, reports: "multiprocessing.SimpleQueue") -> None:
    """Sets up a process of --parallel."""
    global worker_reports
    worker_reports = reports
    torch.set_num_threads(threads)

    def die_with_parent() -> None:  # a pool's processes outlive a parent that was killed (CPython issue 111873)
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()


def work(i: int, *pair_and_settings) -> dict:
    """train_one in a process of --parallel, which reports to the other one once a second and once an epoch."""
    sent = {"epochs": -1, "at": 0.0}

    def report(part: float, images: int, seconds: float, history: list[dict]) -> None:
        if len(history) > sent["epochs"] or time.monotonic() > sent["at"] + 1:
            sent.update(epochs=len(history), at=time.monotonic())
            worker_reports.put((i, part, images, seconds, history))

    return train_one(*pair_and_settings, report)


def load(options: argparse.Namespace) -> Data:
    match options.dataset:
        case "synthetic":
            data = synthetic()
        case "imagefolder":
            data = load_folder(options.data_dir, options.image_size, options.workers)
        case cifar:
            data = load_cifar(CIFAR100 if cifar == "cifar100" else CIFAR10, options.data_dir)
    if options.hold_out and options.hold_out >= data.train_size:
        raise RefusedError(f"--hold-out must be below the {data.train_size} training images, got {options.hold_out}")
    data = data.hold_out(options.hold_out) if options.hold_out else data
    data = data.limit(options.limit) if options.limit else data
    least = processes()[1] * options.accumulate
    if min(options.batch_size, data.train_size) < least:
        raise RefusedError(f"a batch must have {least} images, one for each process and each part of --accumulate")
    return data


TRANSFORMER_LR = 0.001  # for the ViT: a tenth of what the batch norms of the others bear


def recipe_for(options: argparse.Namespace, data: Data) -> TrainUtil.Recipe:
    recipe = TrainUtil.Recipe(epochs=options.epochs, batch_size=options.batch_size)
    if isinstance(data, Folder):  # the workers crop
        recipe = replace(recipe, sizes=((data.size, 1.0),))
    return replace(recipe, lr=TRANSFORMER_LR) if options.arch == "vit" else recipe


def compare(options: argparse.Namespace) -> int:
    runs: dict[tuple[str, int], dict] = {}
    left: dict[int, tuple[Model, int]] | None = None
    code, again = 0, f"The same command with --out {options.out} goes on."

    def in_order() -> list[dict]:
        return sorted(runs.values(), key=lambda run: (run["seed"], config["models"].index(run["model"])))

    try:
        try:
            data = load(options)
            recipe = recipe_for(options, data)
            config = {
                **configuration(options),
                "against": options.against or "residual",
                "data": data.name,
                "training_images": data.train_size,
                "test_images": data.test_size,
                "recipe": asdict(recipe),
            }
            commit = config["git_commit"]
            runs = {(run["model"], run["seed"]): run for run in earlier_runs(options, config)}
            check_against(options.against, config["models"])
            tidy(options.out, in_order())
            write_results(options.out, config, in_order())  # no checkpoint without the options that it belongs to
            (options.out / "checkpoints").mkdir(exist_ok=True)
            pairs = [(model, seed) for seed in range(options.seeds) for model in options.models]
            finished = [(model.name, seed) in runs for model, seed in pairs]
            left = {i: pair for i, (pair, there) in enumerate(zip(pairs, finished)) if not there}
        finally:
            agree(left and (left, facts(options, data)))  # see follow
        if any(finished):
            print(f"{sum(finished)} of {len(pairs)} runs are in {options.out} already.")
        monitor = Monitor([f"{model.name}, seed {seed}" for model, seed in pairs], finished, recipe.epochs)
        with monitor.bar:
            for run in train_all(left, data, recipe, options, monitor):
                runs[run["model"], run["seed"]] = {**run, "git_commit": commit}
                write_results(options.out, config, in_order())
                checkpoint(options.out, run["model"], run["seed"]).unlink()
        with suppress(OSError):  # not empty: damaged checkpoints are kept
            (options.out / "checkpoints").rmdir()
    except RefusedError as error:
        print(error, file=sys.stderr)
        return 2
    except DataError as error:  # a file may turn out to be broken after hours
        code = 2
        print(error, file=sys.stderr)
    except RunError as error:
        code = 1
        print(f"{error}. What has finished is kept. {again}", file=sys.stderr)
    except OSError as error:
        code = 1
        where, what = error.filename or options.out, error.strerror or error
        print(f"{where}: {what}. {again}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
        print(f"Interrupted: {len(runs)} runs have finished. {again}", file=sys.stderr)
    return show(options.out, config, in_order()) or code if runs else code


def facts(options: argparse.Namespace, data: Data) -> dict:
    """What all processes must have alike."""
    sizes = {"training images": data.train_size, "test images": data.test_size, "classes": data.classes}
    return {**sizes, "precision": options.precision, "torch": torch.__version__}


def follow(options: argparse.Namespace) -> int:
    """What torchrun's other processes do: the runs of the first one, which keeps the results."""
    agreed = agree(None)
    if not agreed:  # nothing is left to do, or the first process has said why it can't be done
        return 0
    try:
        left, first = agreed
        data = load(options)
        if facts(options, data) != first:
            raise RefusedError(f"this process has {facts(options, data)}, the first one {first}")
        for pair in left.values():
            train_one(*pair, data, recipe_for(options, data), options)
    except (DataError, RefusedError, RunError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def redraw(options: argparse.Namespace) -> int:
    try:
        config, runs = read_results(options.draw)
        if not runs:
            raise RefusedError(f"--draw {options.draw}: no run has finished yet")
        check_against(options.against, dict.fromkeys(run["model"] for run in runs))
    except RefusedError as error:
        print(error, file=sys.stderr)
        return 2
    return show(options.draw, {**config, "against": options.against or config["against"]}, runs)


def show(out: Path, config: dict, runs: list[dict]) -> int:
    """The table and the pictures."""
    rich.get_console().print(table(config, runs))
    try:
        drawn = draw(out, config, runs)
    except OSError as error:
        print(f"The pictures could not be written: {error.filename or out}: {error.strerror or error}", file=sys.stderr)
        return 1
    for path in (out / "results.json", out / "results.csv", *drawn):
        if path.exists():
            print(path)
    return 0


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if not rich.get_console().is_terminal:
        rich.reconfigure(width=220)  # a file has no width of its own to fold the tables to
    if options.draw:
        return redraw(options) if first_process() else 0
    torch.set_num_threads(options.threads)
    if launched():
        rich.get_console().quiet = not first_process()
        with process_group(options.device):
            code = begin(options) if first_process() else follow(options)
            if code:  # leaving the group could wait for the others
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        return code
    return begin(options)


def begin(options: argparse.Namespace) -> int:
    try:
        with filelock.FileLock(options.out / ".lock", timeout=0):
            return profile(options) if options.profile else compare(options)
    except filelock.Timeout:
        print(f"--out {options.out} is in use by another process; name another folder", file=sys.stderr)
    except OSError as error:
        print(f"{error.filename or options.out}: {error.strerror or error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
