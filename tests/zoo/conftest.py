"""How the contract test drives each family of systems. A new family brings one adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import arcore
from arcore.data import adaptive_rotation
from arcore.decoding import (
    generate,
    generate_blocks,
    generate_frames,
    generate_masked,
    generate_next_scale,
)
from arcore.objectives import diffusion_head_loss, next_cluster_loss, next_scale_loss
from arcore.schedules import add_noise, target


def shaken(module: nn.Module) -> nn.Module:
    """Away from the special point of initialisation, where gates and logits are almost zero and hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


class NextScale:
    """Models that predict token maps scale by scale."""

    batch_size = 3

    def __init__(self, preset: str) -> None:
        [info] = [info for info in arcore.model_info(preset).presets if info.name == preset]
        self.tokenizer: Any = shaken(arcore.create_model(info.tokenizer)).eval()
        self.config = info.config
        self.indices = [torch.randint(self.config.vocab_size, (3, p * p)) for p in self.config.patch_nums]
        with torch.no_grad():
            self.inputs = self.tokenizer.scale_inputs(self.indices)
        self.labels = torch.tensor([0, self.config.num_classes - 1, self.config.num_classes])

    def forward(self, model: Any) -> Tensor:
        return model(self.inputs, self.labels)

    def expected_shape(self) -> tuple[int, ...]:
        return (3, sum(p * p for p in self.config.patch_nums), self.config.vocab_size)

    def loss(self, model: Any) -> Tensor:
        return next_scale_loss(self.forward(model), self.indices)

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        """The result of one pass and the same from steps."""
        cache, latent, parts = model.make_cache(3), self.tokenizer.empty_latent(3), []
        for k, codes in enumerate(self.indices):
            inputs = None if k == 0 else self.tokenizer.next_input(k - 1, latent)
            parts.append(model.scale_logits(k, inputs, self.labels, cache))
            latent = self.tokenizer.add_scale(k, codes, latent)
        return self.forward(model), torch.cat(parts, dim=1)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        """Codes and images of some rows; row i always has the same label and seed."""
        out = generate_next_scale(
            model,
            self.tokenizer,
            self.labels[rows],
            cfg_scale=1.0,
            top_k=50,
            top_p=0.95,
            seed=[7 + r for r in rows],
        )
        return out.indices, out.images


class Tokenizer:
    """Images to codes and back."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        size = self.config.image_size
        self.images = torch.rand(3, self.config.in_channels, size, size) * 2 - 1

    def forward(self, model: Any) -> Tensor:
        return model(self.images).reconstruction

    def expected_shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape)

    def loss(self, model: Any) -> Tensor:
        out = model(self.images)
        return (out.reconstruction - self.images).square().mean() + out.vq_loss

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        indices = model.encode(self.images)
        latent, inputs = model.empty_latent(3), []
        for k, codes in enumerate(indices):
            latent = model.add_scale(k, codes, latent)
            if k + 1 < len(indices):
                inputs.append(model.next_input(k, latent))
        whole = [model.decode(indices).flatten(), model.scale_inputs(indices).flatten()]
        steps = [model.decode_latent(latent).flatten(), torch.cat(inputs, dim=1).flatten()]
        return torch.cat(whole), torch.cat(steps)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        with torch.no_grad():
            indices = model.encode(self.images[rows])
            return indices, model.decode(indices)


class Language:
    """Models that predict one token after the other."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        self.ids = torch.randint(self.config.vocab_size, (3, 24))

    def forward(self, model: Any) -> Tensor:
        return model(self.ids)

    def expected_shape(self) -> tuple[int, ...]:
        return (3, 24, self.config.vocab_size)

    def loss(self, model: Any) -> Tensor:
        return F.cross_entropy(self.forward(model)[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten())

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        cache = model.make_cache(3, 24)
        steps = [model.prefill(self.ids[:, :6], cache)]
        steps += [model.step(self.ids[:, i], cache) for i in range(6, 24)]
        return self.forward(model)[:, 5:], torch.stack(steps, dim=1)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        """New tokens of prompts of different lengths, and what the model expects after each row."""
        prompts = [self.ids[r, : 3 + 4 * r].tolist() for r in rows]
        out = generate(model, prompts, max_new_tokens=9, top_k=50, top_p=0.95, seed=[7 + r for r in rows])
        whole = [model(torch.tensor([[*p, *new]])) for p, new in zip(prompts, out.rows(), strict=True)]
        return [out.ids], torch.stack([logits[0, -1].softmax(-1) for logits in whole])


class NextCluster:
    """Encoders that are pretrained by predicting the next cluster of patches."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        size = self.config.image_size
        self.images = torch.rand(3, self.config.in_channels, size, size) * 2 - 1
        self.angles = torch.tensor([-40.0, 10.0, 25.0])
        self.seen, self.windows = self.rotated([0, 1, 2])

    def rotated(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return adaptive_rotation(self.images[rows], self.config.patch_size, angles=self.angles[rows])

    def forward(self, model: Any) -> Tensor:
        return model(self.seen, self.windows)

    def expected_shape(self) -> tuple[int, ...]:
        return (3, self.config.side**2 - self.config.cluster**2, self.config.patch_values)

    def loss(self, model: Any) -> Tensor:
        predictions = self.forward(model)
        return next_cluster_loss(predictions, self.images, patch_size=self.config.patch_size).loss

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        """Clusters are squares of the image in raster order; the last one is not read."""
        side = self.config.cluster * self.config.patch_size
        squares = self.seen.unfold(2, side, side).unfold(3, side, side).flatten(2, 3).unbind(2)
        cache = model.make_cache(3)
        parts = [model.predict_next(square, cache, self.windows) for square in squares[:-1]]
        return self.forward(model), torch.cat(parts, dim=1)

    @torch.no_grad()
    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        """The windows that are rotated, and the predictions as pictures; row i always has the same angle."""
        seen, windows = self.rotated(rows)
        return [windows], model.reconstruct(self.images[rows], model(seen, windows)).clamp(-1, 1)


class Classifier:
    """Images to classes. Nothing is generated step by step: `stepwise` classifies from features."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        size = self.config.image_size
        self.images = torch.rand(3, self.config.in_channels, size, size) * 2 - 1
        self.labels = torch.tensor([0, self.config.num_classes - 1, 1])

    def forward(self, model: Any) -> Tensor:
        return model(self.images)

    def expected_shape(self) -> tuple[int, ...]:
        return (3, self.config.num_classes)

    def loss(self, model: Any) -> Tensor:
        return F.cross_entropy(self.forward(model), self.labels)

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        return self.forward(model), model.head(torch.cat([model.features(row[None]) for row in self.images]))

    @torch.no_grad()
    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        """Classes and their probabilities."""
        logits = model(self.images[rows])
        return [logits.argmax(-1)], logits.softmax(-1)


class Diffusion:
    """Models that denoise everything at once."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        model: Any = arcore.create_model(preset)
        self.data = torch.randn(3, *model.block_shape)
        self.eps = torch.randn_like(self.data)
        self.t = torch.tensor([20, 500, 900])
        self.noisy = add_noise(model.schedule, self.data, self.eps, self.t)
        self.labels = torch.tensor([0, self.config.num_classes - 1, self.config.num_classes])

    def forward(self, model: Any) -> Tensor:
        return model(self.noisy, self.t, self.labels)

    def expected_shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def loss(self, model: Any) -> Tensor:
        return F.mse_loss(self.forward(model), self.eps)

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        cache = model.make_cache(3)
        parts, _ = model.denoise(self.noisy[:, None], self.t[:, None], self.labels[:, None], cache)
        return self.forward(model), parts[:, 0]

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        """Labels and samples; row i always has the same label and seed."""
        labels = self.labels[rows]
        times = model.schedule.grid(3, "linspace")
        out = generate_blocks(model, labels, times=times, seed=[7 + r for r in rows])
        return [labels], (model.to_pixels(out) / 10).clamp(-1, 1)


class BlockDiffusion(Diffusion):
    """Models that denoise block after block."""

    def __init__(self, preset: str) -> None:
        super().__init__(preset)
        model: Any = arcore.create_model(preset)
        self.data = torch.randn(3, model.num_blocks, *model.block_shape)
        self.eps = torch.randn_like(self.data)
        self.t = torch.randint(1000, (3, model.num_blocks))
        self.noisy = add_noise(model.schedule, self.data, self.eps, self.t)

    def forward(self, model: Any) -> Tensor:
        return model(self.data, self.noisy, self.t, self.labels)

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        cache, parts = model.make_cache(3), []
        for block in range(model.num_blocks):
            out, _ = model.denoise(
                self.noisy[:, block, None], self.t[:, block, None], self.labels[:, None], cache
            )
            parts.append(out)
            model.commit(self.data[:, block], cache)
        return self.forward(model), torch.cat(parts, dim=1)


class FrameDiffusion(Diffusion):
    """Models that denoise each frame of a video at a time of its own."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        model: Any = arcore.create_model(preset)
        self.data = torch.randn(3, model.num_frames, *model.frame_shape)
        self.eps = torch.randn_like(self.data)
        self.t = torch.randint(1000, (3, model.num_frames)).sort(dim=1).values
        self.noisy = add_noise(model.schedule, self.data, self.eps, self.t)
        self.labels = torch.tensor([0, self.config.num_classes - 1, self.config.num_classes])

    def loss(self, model: Any) -> Tensor:
        wanted = target(model.prediction, self.data, self.eps, self.t, model.schedule)
        return F.mse_loss(self.forward(model), wanted)

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        """One frame, then pairs of frames that stay, behind a cache."""
        cache, parts, done = model.make_cache(3), [], 0
        model.start(self.labels, cache)
        for size in (1, *[2] * (model.num_frames // 2)):
            step = slice(done, min(done + size, model.num_frames))
            part = model.denoise(self.noisy[:, step], self.t[:, step], cache, keep=step.stop - done)
            parts.append(part)
            done = step.stop
        return self.forward(model), torch.cat(parts, dim=1)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        """Labels and samples; row i always has the same label and seed."""
        labels = self.labels[rows]
        times = model.schedule.grid(3, "linspace")
        out = generate_frames(model, labels, times=times, lag=1, cfg_scale=1.5, seed=[7 + r for r in rows])
        return [labels], (model.to_pixels(out) / 10).clamp(-1, 1)


class MaskedAutoregressive:
    """Models that draw continuous tokens in random order."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        model: Any = arcore.create_model(preset)
        self.tokens = torch.randn(3, *model.token_shape)
        order = torch.rand(3, self.config.tokens).argsort(1)
        self.visible, self.masked = order[:, :5].sort(1).values, order[:, 5:].sort(1).values
        self.labels = torch.tensor([0, self.config.num_classes - 1, self.config.num_classes])

    def forward(self, model: Any) -> Tensor:
        return model(self.tokens, self.visible, self.labels)

    def expected_shape(self) -> tuple[int, ...]:
        return (3, self.config.tokens, self.config.embed_dim)

    def loss(self, model: Any) -> Tensor:
        rows = torch.arange(3)[:, None]
        targets, z = self.tokens[rows, self.masked], self.forward(model)[rows, self.masked]
        loss, bound = diffusion_head_loss(model.head, targets.flatten(0, 1), z.flatten(0, 1))
        return loss if bound is None else loss + bound

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        """Rows alone, the visible tokens in another order."""
        parts = [
            model(self.tokens[row, None], self.visible[row, None].flip(1), self.labels[row, None])
            for row in range(3)
        ]
        return self.forward(model), torch.cat(parts)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        """Labels and samples; row i always has the same label and seed."""
        labels = self.labels[rows]
        times = model.head.schedule.grid(3, "linspace")
        tokens = generate_masked(model, labels, iterations=4, times=times, seed=[7 + r for r in rows])
        return [labels], (model.to_pixels(tokens) / 1000).clamp(-1, 1)


ADAPTERS = {
    "block_diffusion": BlockDiffusion,
    "classifier": Classifier,
    "diffusion": Diffusion,
    "frame_diffusion": FrameDiffusion,
    "language": Language,
    "masked_autoregressive": MaskedAutoregressive,
    "next_cluster": NextCluster,
    "next_scale": NextScale,
    "tokenizer": Tokenizer,
}


@pytest.fixture(params=arcore.list_models("*_tiny"))
def preset(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def adapter(preset: str) -> Any:
    return ADAPTERS[arcore.model_info(preset).recipe](preset)


@pytest.fixture
def model(preset: str) -> nn.Module:
    """The preset with random weights, away from initialisation, in evaluation mode."""
    return shaken(arcore.create_model(preset)).eval()
