"""Training an image tokenizer: an autoencoder with a quantiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

from arcore.catalog import create_model, load_weights
from arcore.data import ImageDataset
from arcore.nn.critics import PatchDiscriminator, PerceptualLoss
from arcore.nn.kinds import check_kinds
from arcore.recipes._codes import Coded, Decoded, read_codes, read_images
from arcore.recipes._images import ImageOptions, ImageRecipe
from arcore.recipes._pictures import image_format
from arcore.recipes._recipe import Start, Work, ZooTask
from arcore.training.checks import number
from arcore.training.config import TrainConfig
from arcore.training.stream import derive_seed

JUDGE = "discriminator"
# VGG-16 halves a picture four times.
SMALLEST_JUDGED = 16


@check_kinds
@dataclass(frozen=True, kw_only=True)
class TokenizerOptions(ImageOptions):
    """Data and losses of an image tokenizer.

    Attributes:
        perceptual: file with weights of VGG-16 in torchvision's names (and of LPIPS, if they are in it): adds the
            distance of the reconstruction in its features.
        perceptual_weight: weight of that distance.
        adversarial_weight: weight of a patch discriminator that is trained beside the tokenizer, relative to the
            gradient of the reconstruction; 0 trains none.
        adversarial_start: step from which the discriminator's verdict counts.
    """

    perceptual: Path | None = None
    perceptual_weight: float = 1.0
    adversarial_weight: float = 0.0
    adversarial_start: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("perceptual_weight", "adversarial_weight"):
            number(name, getattr(self, name), whole=False, least=0)
        number("adversarial_start", self.adversarial_start, whole=True, least=0)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class CodeOptions:
    """Codes of pictures, or pictures of codes.

    Attributes:
        images: picture, or folder of pictures, to encode: --out .safetensors writes their codes, a picture shows them
            above their reconstructions.
        codes: file of codes, as written by --images FOLDER --out CODES.safetensors, to decode.
        out: file: .png, .jpg, .webp, or .safetensors for numbers.
        columns: pictures per row. Default: about square.
        batch: pictures at a time.
    """

    images: Path | None = None
    codes: Path | None = None
    out: Path = Path("samples.png")
    columns: int | None = field(default=None)
    batch: int = 16

    def __post_init__(self) -> None:
        if self.batch < 1 or (self.columns is not None and self.columns < 1):
            raise ValueError("--batch and --columns must be at least 1")


class TokenizerTask(ZooTask):
    """Mean squared error of the pixels plus the quantiser's own loss; on demand also those of two judges.

    The adversarial part is the hinge loss of VQGAN (arXiv:2012.09841, section 3.1): its weight is chosen so that its
    gradient at the decoder's last layer is as long as that of the reconstruction, times `adversarial_weight`. Both
    networks learn in one step, each from its own loss.

    Attributes:
        perceptual: distance in features, or None.
        judge: of the type `TokenizerOptions`.
    """

    tokenizer: Any
    judge = TokenizerOptions()
    perceptual: PerceptualLoss | None = None

    def add_judges(self, options: TokenizerOptions, source: Path | None) -> None:
        """Add the networks that the options ask for.

        Args:
            options: of the run.
            source: folder of the checkpoint from which the run goes on.
        """
        self.judge = options
        size = self.tokenizer.image_size
        if (options.perceptual is not None or options.adversarial_weight) and size < SMALLEST_JUDGED:
            raise ValueError(
                f"perceptual features and a discriminator need images of at least {SMALLEST_JUDGED} pixels per side, "
                f"and {size} x {size} ones are trained on: leave --perceptual and --adversarial-weight out"
            )
        if options.perceptual is not None:
            self.perceptual = PerceptualLoss.from_file(options.perceptual)
        if options.adversarial_weight:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(self.config.seed, "weights", JUDGE))
                judge = PatchDiscriminator(self.tokenizer.config.in_channels, channels=32, depth=2)
            if source is not None:
                from safetensors.torch import load_file

                judge.load_state_dict(load_file(source / f"{JUDGE}.safetensors"))
            self.add_module(JUDGE, judge)
            self.meta()  # describes the networks of the zoo alone
            self.saved = (*self.saved, JUDGE)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.tokenizer(images)
        drawn = out.reconstruction.float()
        pixels = mse_loss(drawn, images)
        figures = {"mse": pixels.detach(), "vq": out.vq_loss.detach()}
        likeness = pixels
        if self.perceptual is not None:
            distance = self.perceptual(drawn, images)
            figures["perceptual"] = distance.detach()
            likeness = likeness + self.judge.perceptual_weight * distance
        total = likeness + out.vq_loss
        if self.judge.adversarial_weight and torch.is_grad_enabled():
            judge = getattr(self, JUDGE)
            real, fake = judge(images).float(), judge(drawn.detach()).float()
            lesson = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
            figures["judge"] = lesson.detach()
            total = total + lesson
            if self.step >= self.judge.adversarial_start:
                still = {name: value.detach() for name, value in judge.named_parameters()}
                verdict = -functional_call(judge, still, (drawn,)).float().mean()
                figures["adversarial"] = verdict.detach()
                total = total + self._balance(likeness, verdict) * verdict
        return total, figures

    def _balance(self, likeness: Tensor, verdict: Tensor) -> Tensor:
        """The verdict's weight."""
        last = [module for module in self.tokenizer.decoder.modules() if isinstance(module, nn.Conv2d)][-1]
        one, two = (
            torch.autograd.grad(part, last.weight, retain_graph=True)[0].float().norm()
            for part in (likeness, verdict)
        )
        return (one / (two + 1e-4)).clamp(max=1e4).detach() * self.judge.adversarial_weight


class Tokenizer(ImageRecipe):
    """Images to codes and back."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=1000, batch_size=64, lr=3e-3)
    options: ClassVar[type] = TokenizerOptions
    sampling: ClassVar[type | None] = CodeOptions
    task: ClassVar[type[ZooTask]] = TokenizerTask
    trained: ClassVar[str] = "tokenizer"
    movable: ClassVar[tuple[str, ...]] = ("data", "held_out", "perceptual")

    def overrides(self, data: ImageDataset) -> dict[str, Any]:
        return {}

    def prepare(self, start: Start, options: Any) -> Work:
        work = super().prepare(start, options)
        assert isinstance(work.task, TokenizerTask)
        work.task.add_judges(options, start.source)
        return work

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        return [f"look at it: arcore sample {out} --images FOLDER --out {out / 'reconstructions.png'}"]

    def published(self, preset: str, weights: Path, options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        model = create_model(preset)
        load_weights(model, weights)
        return {self.trained: model}, {}

    def check_sampling(self, options: Any) -> None:
        if (options.images is None) == (options.codes is None):
            raise ValueError("this is a tokenizer: give pictures with --images or codes with --codes")
        image_format(options.out)

    @torch.no_grad()
    def sample(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        options: Any,
        show: Callable[[str], None],
    ) -> Coded | Decoded:
        tokenizer = networks[self.trained]
        place = next(tokenizer.parameters()).device
        if options.codes is not None:
            codes = [part.to(place) for part in read_codes(options.codes)]
            drawn = [
                _decoded(tokenizer, [part[at : at + options.batch] for part in codes]).cpu()
                for at in range(0, len(codes[0]), options.batch)
            ]
            return Decoded(torch.cat(drawn), options.columns)
        files, images = read_images(options.images, tokenizer.image_size, tokenizer.in_channels)
        read: list[list[Tensor]] = []
        drawn = []
        for at in range(0, len(images), options.batch):
            found = tokenizer.encode(images[at : at + options.batch].to(place))
            maps = [found] if isinstance(found, Tensor) else found
            read.append([part.cpu() for part in maps])
            drawn.append(tokenizer.decode(found).cpu())
        whole = [torch.cat(parts) for parts in zip(*read, strict=True)]
        return Coded(files, images, torch.cat(drawn), whole, options.columns)


def _decoded(tokenizer: Any, maps: list[Tensor]) -> Tensor:
    """Images of the codes of all scales, or of a single map."""
    if not hasattr(tokenizer, "side"):
        images: Tensor = tokenizer.decode(maps)
    elif len(maps) == 1:
        images = tokenizer.decode(maps[0])
    else:
        raise ValueError(f"the file has codes of {len(maps)} scales but this tokenizer reads a single map")
    return images


RECIPE = Tokenizer()
