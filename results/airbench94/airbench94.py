"""airbench94's network and recipe on the script's data, augmentation and evaluation, to set times side by side.

    python results/airbench94/airbench94.py [EPOCHS [DATA_DIR]]

After Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU" (arXiv 2404.00498), without test-time
augmentation, in batches of 500 for the CPU. Prints accuracy and training seconds, and leaves them in results.json.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import CIFAR10

ROOT, BATCH = Path(__file__).resolve().parents[2], 500
sys.path.insert(0, str(ROOT))

from comparison.data import Dataset  # noqa: E402
from comparison.device import autocast, default_precision, device_name, keep_memory  # noqa: E402
from comparison.networks import whitening_filters  # noqa: E402
from comparison.sources import load_cifar  # noqa: E402
from TrainUtil import evaluate  # noqa: E402


def convolution(channels: int, width: int) -> nn.Conv2d:
    """3×3; its first filters start as the identity."""
    layer = nn.Conv2d(channels, width, 3, padding="same", bias=False)
    nn.init.dirac_(layer.weight.data[: min(channels, width)])
    return layer


def norm(width: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
    layer.weight.requires_grad = False
    return layer


def group(channels: int, width: int) -> list[nn.Module]:
    first, second = convolution(channels, width), convolution(width, width)
    return [first, nn.MaxPool2d(2), norm(width), nn.GELU(), second, norm(width), nn.GELU()]


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 9


def network(data: Dataset) -> nn.Sequential:
    whitening = nn.Conv2d(3, 24, 2)
    whitening.weight = nn.Parameter(whitening_filters(data, axes=12), requires_grad=False)
    nn.init.zeros_(whitening.bias)
    groups = [layer for sizes in ((24, 64), (64, 256), (256, 256)) for layer in group(*sizes)]
    head = [nn.MaxPool2d(3), nn.Flatten(), nn.Linear(256, 10, bias=False), Scale()]
    return nn.Sequential(whitening, nn.GELU(), *groups, *head)


def optimizer(model: nn.Module, batch_size: int) -> torch.optim.SGD:
    """Nesterov momentum of 0.85; rates are for a loss that is summed over a batch, decay is decoupled from them."""
    scale = 1024 * (1 + 1 / (1 - 0.85))
    lr, decay = 11.5 / scale, 0.0153 * batch_size / scale
    biases = [p for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")]
    others = [p for name, p in model.named_parameters() if p.requires_grad and not name.endswith("bias")]
    groups = [
        {"params": biases, "lr": 64 * lr, "weight_decay": decay / (64 * lr)},
        {"params": others, "lr": lr, "weight_decay": decay / lr},
    ]
    return torch.optim.SGD(groups, momentum=0.85, nesterov=True)


def main(epochs: int, data_dir: Path) -> None:
    keep_memory()
    torch.manual_seed(0)
    data = load_cifar(CIFAR10, data_dir)
    device = torch.device("cpu")
    precision = default_precision(device)
    model = network(data).to(memory_format=torch.channels_last)
    opt = optimizer(model, BATCH)
    total, done, seconds, history = epochs * (data.train_size // BATCH), 0, 0.0, []
    # From 0.2 up to 1 at 23 % of the steps, then down to 0.07; the averages of Lookahead, every five steps.
    points = torch.tensor([0.0, 0.23 * total, total])

    def schedule(step: int) -> float:
        if step < points[1]:
            return 0.2 + 0.8 * step / float(points[1])
        return 1 - 0.93 * (step - float(points[1])) / float(points[2] - points[1])

    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, schedule)
    averages = {name: value.clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def look_ahead(decay: float) -> None:
        for name, value in model.state_dict().items():
            if value.dtype.is_floating_point:
                averages[name].lerp_(value, 1 - decay)
                value.copy_(averages[name])

    for epoch in range(epochs):
        model.train()
        model[0].bias.requires_grad = epoch < 3
        start = time.perf_counter()
        for x, y in data.batches(0, epoch, BATCH, max_shift=2):
            with autocast(device, precision):
                logits = model(x)
            F.cross_entropy(logits.float(), y, label_smoothing=0.2, reduction="sum").backward()
            opt.step()
            scheduler.step()
            opt.zero_grad()
            done += 1
            if done % 5 == 0:
                look_ahead(0.95**5 * (done / total) ** 3)
        if epoch == epochs - 1:
            look_ahead(1.0)
        seconds += time.perf_counter() - start
        history.append({"epoch": epoch + 1, **evaluate({"": model}, data, precision)[""], "seconds": seconds})
        print(f"epoch {epoch + 1}: {100 * history[-1]['test_accuracy']:.2f} % after {seconds:.1f} s", flush=True)
    config = {"epochs": epochs, "precision": precision, "device_name": device_name(device)}
    results = {"config": {**config, "torch": torch.__version__}, "history": history}
    (Path(__file__).parent / f"{epochs}-epochs.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2, Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "data")
