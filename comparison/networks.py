"""The networks that the residual connections are compared in, and the convolutional ones among them.

Every network has `stages`, each with its `branches` f and its `residuals`. All models share f: the same layers with the
same initial weights for a seed. A residual connection draws its random numbers apart, so it shifts none of f's: with
seed 1000 · seed + 100 · stage + layer, the layer counted from 1, and `deeper`'s further layer with 999."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from comparison.connections import Residual
from comparison.console import UserError
from comparison.data import seeded
from comparison.device import out_of_memory
from comparison.folder import Data
from comparison.models import LAuReL_PA, Model, Stage, residual_layers, start_at_zero
from comparison.text import Text
from comparison.transformers import GPT, ViT


def cross_entropy(logits: Tensor, labels: Tensor, **options) -> Tensor:
    """In nats, of images (N, classes) or of each byte of a text (N, length, classes)."""
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), **options)


class SmallCNN(nn.Module):
    """A residual network of three stages, 32, 64 and 128 channels wide, with 2, 2 and 3 residual layers.

    Whitened 2×2 patches (N, 16, 31, 31) → per stage a 3×3 convolution that halves the image, then residual layers
    x' = residual(x, f(x)), f = 3×3 convolution, batch norm, GELU → maximum over the image → linear classifier.

    `deeper` has one more layer in the second stage, the last but one, as the 4.37 % that the paper's naive scaling adds
    are one more bottleneck in ResNet-50's last but one. That layer's batch norm starts with gain 0 (Goyal et al. 2017),
    so that `deeper` too starts as the same function.
    """

    layers = (2, 2, 3)

    def __init__(self, model: Model, seed: int, data: Data, widths: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        with seeded(seed):
            self.whitening = nn.Conv2d(3, 16, kernel_size=2, bias=False)
            self.whitening.weight = nn.Parameter(whitening_filters(data), requires_grad=False)
            self.stages = nn.ModuleList()
            channels = 16
            for i, (width, n) in enumerate(zip(widths, self.layers)):
                down = nn.Sequential(Conv(channels, width), nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.GELU())
                branches = [self.branch(width) for _ in range(n)]
                self.stages.append(Stage(down, branches, width, model, seed=1000 * seed + 100 * i + 1))
                channels = width
            self.classifier = nn.Linear(channels, data.classes)
        if model.base == "deeper":
            with seeded(1000 * seed + 999):
                self.stages[1].deepen(self.branch(widths[1]))

    @staticmethod
    def branch(width: int) -> nn.Sequential:
        """f: the same for every model."""
        return nn.Sequential(Conv(width, width), nn.BatchNorm2d(width), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.whitening(x))
        for stage in self.stages:
            x = stage(x)
        x = F.max_pool2d(x, x.shape[2:])  # compiled in bfloat16 the gradient of amax may be NaN
        return self.classifier(x.flatten(1))


class ResNet(nn.Module):
    """The ResNet of He et al. 2016 for CIFAR-10 (§4.2) with n = 3, 5, 9 layers a stage: ResNet-20, -32, -56.

    3×3 convolution (N, 16, 32, 32) → three stages of 16, 32 and 64 channels, the later two at half the size of the one
    before, with n residual layers x' = ReLU(residual(x, f(x))), f = two 3×3 convolutions with batch norm and a ReLU
    between → mean over the image → linear classifier. Where the shape changes the shortcut takes every other pixel and
    fills the new channels with zeros (their option A); PA's history starts anew there. `deeper` as in the small CNN.
    """

    widths = (16, 32, 64)

    def __init__(self, model: Model, seed: int, data: Data, n: int = 3) -> None:
        super().__init__()
        with seeded(seed):
            self.stem = nn.Sequential(Conv(3, 16), nn.BatchNorm2d(16), nn.ReLU())
            self.stages = nn.ModuleList()
            channels = 16
            for i, width in enumerate(self.widths):
                first = BasicBlock(channels, width, stride=width // channels, downsample=Shortcut(channels, width))
                blocks = nn.Sequential(first, *(BasicBlock(width, width) for _ in range(n - 1)))
                self.stages.append(BlockStage(blocks, model, 1000 * seed + 100 * i + 1))
                channels = width
            self.classifier = nn.Linear(channels, data.classes)
        if model.base == "deeper":
            with seeded(1000 * seed + 999):
                self.stages[1].deepen(BasicBlock(self.widths[1], self.widths[1]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.classifier(x.mean(dim=(2, 3)))


class Shortcut(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.stride, self.new = width // channels, width - channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new)) if self.new else x


class Conv(nn.Conv2d):
    """A 3×3 convolution. Of a single pixel, whose neighbours are padding, only the filters' centres are multiplied.

    oneDNN computes the gradient of all nine. Its threads wait for each other so often in it, without sleeping, that it
    takes a hundred times as long where another process has one of the cores.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, width, kernel_size=3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] == (1, 1):
            return F.linear(x.flatten(1), self.weight[:, :, 1, 1])[:, :, None, None]
        return super().forward(x)


class ImageNetResNet(torchvision.models.ResNet):
    """torchvision's ResNet with another residual connection in each block, and its own names for all other weights.

    So `load_state_dict(torchvision.models.resnet50(weights=…).state_dict(), strict=False)` leaves out only the
    residual connections. They stand before the block's last ReLU, and PA's history starts anew in each stage with what
    the stage's first block adds, its down-sampled input. `deeper` has one more block in the third stage: the 4.37 % of
    the paper's table 1.
    """

    def __init__(
        self,
        model: Model,
        seed: int,
        data: Data,
        block: type[BasicBlock | Bottleneck] = Bottleneck,
        layers: tuple[int, ...] = (3, 4, 6, 3),
    ) -> None:
        with seeded(seed):
            super().__init__(block, layers, num_classes=data.classes)
        for i, name in enumerate(("layer1", "layer2", "layer3", "layer4")):
            setattr(self, name, BlockStage(getattr(self, name), model, 1000 * seed + 100 * i + 1))
        if model.base == "deeper":
            with seeded(1000 * seed + 999):
                self.layer3.deepen(block(256 * block.expansion, 256))

    @property
    def stages(self) -> list["BlockStage"]:
        return [self.layer1, self.layer2, self.layer3, self.layer4]


class BlockStage(nn.Sequential):
    """A stage of torchvision's blocks, each with its residual connection in `residual`."""

    def __init__(self, blocks: nn.Sequential, model: Model, seed: int) -> None:
        super().__init__(*blocks)
        width = blocks[0].bn1.num_features * blocks[0].expansion
        for i, block in enumerate(self):
            with seeded(seed + i):
                block.residual = model.residual(width, available=i + 1, channel_dim=1)

    def deepen(self, block: BasicBlock | Bottleneck) -> None:
        start_at_zero(block)
        block.residual = Residual()
        self.append(block)

    @property
    def residuals(self) -> list[nn.Module]:
        return [block.residual for block in self]

    @property
    def branches(self) -> list[Callable[[Tensor], Tensor]]:
        return [partial(self.branch, block) for block in self]

    @staticmethod
    def branch(block: BasicBlock | Bottleneck, x: Tensor) -> Tensor:
        x = block.conv2(block.relu(block.bn1(block.conv1(x))))
        return block.bn3(block.conv3(block.relu(block.bn2(x)))) if isinstance(block, Bottleneck) else block.bn2(x)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self[0].downsample is None else self[0].downsample(x)
        return residual_layers(x, shortcut, self.branches, self.residuals, activation=F.relu)


def build(arch: str, model: Model, seed: int, data: Data, smallest: int | None = None) -> nn.Module:
    """Returns the network of a model for the data.

    Args:
        smallest: the size of the smallest images that it will see, in pixels; the data's by default.

    Raises:
        UserError: such images vanish on their way through the network.
    """
    if isinstance(data, Text):
        return ARCHS[arch](model, seed, data)
    size = smallest or data.size
    try:
        network = ARCHS[arch](model, seed, data)
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, IndexError, ValueError) as error:
        if out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(f"images of {size}×{size} pixels are too small for --arch {arch}: {reason}") from error
    return network.train()


def whitening_filters(data: Data, axes: int = 8) -> Tensor:
    """Filters (2 · axes, 3, 2, 2): ± the main principal axes of the images' 2×2 patches, scaled to unit variance.

    All twelve were no better on the held-out images, and the convolution that follows is the most expensive one.
    """
    n_images = max(1, 5000 * 32**2 // data.size**2)
    patches = F.unfold(data.normalize(data.sample(n_images)), kernel_size=2, stride=2)  # (N, 12, patches)
    patches = patches.transpose(0, 1).flatten(1)  # (12, N · patches)
    variance, vectors = torch.linalg.eigh(patches @ patches.T / patches.shape[1])  # ascending
    filters = (vectors / (variance + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)[-axes:]
    return torch.cat([filters, -filters])


ARCHS: dict[str, Callable[..., nn.Module]] = {
    "small": SmallCNN,
    "medium": partial(SmallCNN, widths=(64, 128, 256)),
    "wide": partial(SmallCNN, widths=(64, 256, 256)),
    "resnet20": ResNet,
    "resnet32": partial(ResNet, n=5),
    "resnet56": partial(ResNet, n=9),
    "vit": ViT,
    "resnet18": partial(ImageNetResNet, block=BasicBlock, layers=(2, 2, 2, 2)),
    "resnet50": ImageNetResNet,
    "gpt6": partial(GPT, layers=6),
    "gpt": GPT,
    "gpt24": partial(GPT, layers=24, dim=96, head=48),
    "table5": partial(GPT, layers=24, dim=768),
}
TEXT_ARCHS = ("gpt6", "gpt", "gpt24", "table5")


def learned(network: nn.Module) -> dict[str, dict[str, float]]:
    """What the residual connections learned: for each of alpha, beta, gamma[0], gamma[1], …, its value by layer.

    Where α and β are vectors: their means.
    """
    values: dict[str, dict[str, float]] = {}
    for i, stage in enumerate(getattr(network, "stages", ()), 1):
        for j, residual in enumerate(stage.residuals, 1):
            found = {name: getattr(residual, name, None) for name in ("alpha", "beta")}
            if isinstance(residual, LAuReL_PA):
                found |= {f"gamma[{n}]": residual.gamma_gain * gamma for n, gamma in enumerate(residual.gamma)}
            for name, value in found.items():
                if value is not None:
                    values.setdefault(name, {})[f"{i}.{j}"] = value.mean().item()
    return values
