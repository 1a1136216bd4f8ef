"""How images are drawn from captions: their embeddings from a file, or by a T5 of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from arcore._optional import require
from arcore.nn.kinds import check_kinds
from arcore.recipes import Start, Work
from arcore.recipes._pictures import Pictures, image_format
from arcore.recipes.raster import Raster, RasterSampling, draw_codes
from arcore.zoo.raster.controlar.recipe import read_control


@check_kinds
@dataclass(frozen=True, kw_only=True)
class CaptionSampling(RasterSampling):
    """Pictures of captions, drawn code by code.

    Attributes:
        label: not for captions.
        captions: .safetensors file with the embeddings of captions, "captions" [N, T, E], and where some are padded
            "mask" [N, T], 0 at padding on the left; or .pt with the same.
        caption: a caption in words, for which --t5 makes the embeddings.
        t5: folder of Flan-T5-XL in the layout of transformers.
    """

    cfg: float = 7.5
    captions: Path | None = None
    caption: str | None = None
    t5: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label is not None:
            raise ValueError("--class is for models of classes; give --captions FILE, or --caption with --t5")
        if (self.captions is None) == (self.caption is None):
            raise ValueError(
                "say what to draw: --captions FILE with embeddings, or --caption TEXT with --t5 FOLDER"
            )
        if (self.caption is None) != (self.t5 is None):
            raise ValueError("--caption and --t5 go together: the encoder makes embeddings of the words")


def read_captions(path: Path, places: int, width: int) -> tuple[Tensor, Tensor]:
    """Embeddings `[N, T, E]` and the mask of their tokens, bool `[N, T]`, from a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, has no captions, or those of another width or length.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--captions {path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            table = require("safetensors.torch", extra="zoo").load_file(path)
        else:
            table = torch.load(path, map_location="cpu", weights_only=True)
        captions = table["captions"]
    except Exception as error:
        raise ValueError(
            f'--captions {path}: expected a .safetensors or .pt file with "captions" of shape [N, {places}, {width}] '
            f"({type(error).__name__}: {error})"
        ) from error
    if captions.dim() != 3 or captions.shape[1:] != (places, width):
        raise ValueError(
            f"--captions {path}: expected shape [N, {places}, {width}] but got {list(captions.shape)}; pad short "
            "captions on the left, cut long ones"
        )
    mask = table.get("mask")
    mask = torch.ones(captions.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    return captions.float(), mask


@torch.no_grad()
def encode_caption(text: str, folder: Path, places: int, width: int) -> tuple[Tensor, Tensor]:
    """Embeddings `[1, T, E]` of a caption, padded on the left, and their mask, by an encoder of transformers.

    Raises:
        ImportError: transformers is missing.
        ValueError: the folder holds no T5, or one of another width.
    """
    transformers = require("transformers", extra="transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        encoder = transformers.T5EncoderModel.from_pretrained(folder).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"--t5 {folder}: expected a T5 in the layout of transformers ({error})") from error
    if encoder.config.d_model != width:
        raise ValueError(
            f"--t5 {folder}: expected an encoder of width {width} (Flan-T5-XL) but this one has "
            f"{encoder.config.d_model}"
        )
    ids = tokenizer(text, truncation=True, max_length=places, return_tensors="pt").input_ids
    found = encoder(input_ids=ids).last_hidden_state.float()
    empty = places - found.shape[1]
    return padded(found, empty), (torch.arange(places) >= empty).unsqueeze(0)


def padded(x: Tensor, count: int) -> Tensor:
    """So many rows of zeros in front, `[1, N, E]` to `[1, count + N, E]`."""
    return torch.cat([x.new_zeros(len(x), count, x.shape[2]), x], dim=1)


class Captions(Raster):
    """Codes row by row behind a caption; published weights only."""

    sampling: ClassVar[type | None] = CaptionSampling

    def prepare(self, start: Start, options: Any) -> Work:
        raise ValueError(
            f"{start.preset} draws with published weights and is not trained here: no data of captions come with a "
            "package; `arcore train llamagen_tiny` trains on classes"
        )

    def check_sampling(self, options: Any) -> None:
        """Captions take the place of a class; the options check that there are some."""
        image_format(options.out)

    def sample(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        options: Any,
        show: Callable[[str], None],
    ) -> Pictures:
        model, tokenizer = networks[self.trained], networks["tokenizer"]
        places, width = model.config.caption_tokens, model.config.caption_dim
        if options.captions is not None:
            captions, mask = read_captions(options.captions, places, width)
            what = f"{len(captions)} captions of {options.captions}"
        else:
            captions, mask = encode_caption(options.caption, options.t5, places, width)
            what = options.caption
        rows = torch.arange(options.num) % len(captions)
        device = model.no_caption.device
        captions, mask = captions[rows].to(device), mask[rows].to(device)
        bound = self.bound(model.captioned(captions, mask), options)
        guided = bound if options.cfg == 1 else bound.guided(options.cfg)
        codes, calls = draw_codes(guided, bound.prompt(rows.to(device)), tokenizer, options, mask)
        images = tokenizer.decode(codes).cpu()
        return Pictures(
            images, f"{what}, {calls:.1f} calls of the model for {codes.shape[1]} codes", options.columns
        )

    def bound(self, model: Any, options: Any) -> Any:
        """The model that draws, from one that knows its captions."""
        return model


@check_kinds
@dataclass(frozen=True, kw_only=True)
class ControlledCaptionSampling(CaptionSampling):
    """Pictures of captions that follow a control image.

    Attributes:
        control: picture of edges, depth or the like, of the size of the model's images.
        strength: of the control; 0 is none.
    """

    cfg: float = 4.0
    control: Path | None = None
    strength: float = 1.0


class ControlledCaptions(Captions):
    """Codes row by row behind a caption, with a control image."""

    sampling: ClassVar[type | None] = ControlledCaptionSampling

    def check_sampling(self, options: Any) -> None:
        super().check_sampling(options)
        if options.control is None:
            raise ValueError("this model follows a control image: give one with --control FILE")
        if not options.control.is_file():
            raise FileNotFoundError(f"the control image {options.control} does not exist")

    def bound(self, model: Any, options: Any) -> Any:
        control = read_control(options.control, model.image_size).to(model.no_caption.device)
        with torch.no_grad():
            return model.controlled(control.expand(options.num, 3, -1, -1), options.strength)


RECIPE, CONTROLLED = Captions(), ControlledCaptions()
