"""Sections `encoder` and `text` of params.yaml: the pretrained networks that compute features of images and of texts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.params.data import ImageParams
from pipeline.params.section import Count, PositiveInt, Section
from pipeline.params.training import AugmentParams, StudentParams, TrainingParams

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class EncoderParams(Section):
    """Frozen pretrained encoder.

    name: a name that `tailor encoders` lists, or timm/<model>. weights: a .safetensors or .pth file, or
    hf://owner/name@revision; null for the source that `tailor encoders` lists. sha256: hash of that file; null for the
    listed one. download: whether an hf:// address may be downloaded. licence: accepts a licence with conditions; the value
    is in `tailor encoders`. views: number of stored augmented views of each training image, besides the image itself.
    crop_padding, flip: augmentation of these views.
    """

    name: str
    weights: Annotated[str, Field(min_length=1)] | None = None
    sha256: Sha256 | None = None
    download: bool = False
    licence: str | None = None
    views: Annotated[int, Field(ge=0, le=64)] = 0
    crop_padding: Count = 16
    flip: bool = True


class ClassWordsParams(Section):
    """A CSV file (UTF-8) with the words of each class.

    class_column: column with the class name, as in data/split/classes.json. text_column: column with its words. separator:
    text between several words of one cell; null: the cell is one. description_column: column with sentences about the class,
    used as its description; null: none.
    """

    file: str
    class_column: str = "name"
    text_column: str = "text"
    separator: Annotated[str, Field(min_length=1)] | None = None
    description_column: str | None = None


class TextParams(Section):
    """Features of texts, the Gaussian centres of the classes (docs/text-centres.md).

    encoder: onnx, open_clip, transformers, or features: rows of the user's own. file: the ONNX graph; of open_clip the
    weights; of transformers the model's folder; of features a safetensors file with a tensor [n,D] for each class name.
    Also package:<package>/<file>, and hf://owner/name@revision/<file> (of transformers without the file). sha256: of that
    file, of transformers of its model.safetensors; null: not checked. download: whether an hf:// address may be
    downloaded. tokenizer: tokenizer.json, of onnx. model: architecture, of open_clip. pooling: of a graph or model that
    outputs a vector for each token: their mean, or the first. max_tokens: longest sentence; null: the tokenizer's.
    names: words of the classes; null: the class names, with spaces instead of underscores. templates: sentences with one
    {} for the words. descriptions: a folder with <class>.txt, besides names.description_column. max_sentences: of a class;
    templates and descriptions alternate.
    """

    encoder: Literal["onnx", "open_clip", "transformers", "features"]
    file: str
    sha256: Sha256 | None = None
    download: bool = False
    tokenizer: str | None = None
    model: str | None = None
    pooling: Literal["mean", "first"] = "mean"
    max_tokens: Annotated[int, Field(ge=4, le=8192)] | None = None
    batch_size: PositiveInt = 32
    names: ClassWordsParams | None = None
    templates: list[str] = ["a photo of a {}."]
    descriptions: str | None = None
    max_sentences: Annotated[int, Field(ge=1, le=1024)] = 16

    @model_validator(mode="after")
    def _keys_belong_to_the_encoder(self) -> TextParams:
        for key, encoder in (("tokenizer", "onnx"), ("model", "open_clip")):
            value = getattr(self, key)
            if (value is None) == (self.encoder == encoder):
                state, cure = ("null", "set it") if value is None else (value, "set it to null")
                raise ValueError(f"{key} is {state}, but encoder is {self.encoder}; {encoder} alone needs it: {cure}")
        if self.encoder == "features" and (self.names or self.descriptions):
            raise ValueError("encoder is features, which takes no sentences; set names and descriptions to null")
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(
                    f"templates has {template!r}; expected a sentence with one {{}} for the words of a class"
                )
        described = self.descriptions or (self.names and self.names.description_column)
        if not (self.templates or described or self.encoder == "features"):
            raise ValueError(
                "templates is empty and descriptions is null; set one of them, or names.description_column"
            )
        return self


# Features are computed once, so a training step cannot augment an image. encoder.views stores augmented views instead.
NO_AUGMENT = AugmentParams(crop_padding=0, flip=False, cutout=0)
FIXED = ("crop", "crop_padding", "flip", "policy", "cutout", "mix")


def check_encoder_sections(
    encoder: EncoderParams | None, image: ImageParams, sections: dict[str, TrainingParams]
) -> None:
    """Raise ValueError unless teacher and student have backbone `encoder` if, and only if, there is an encoder."""
    if encoder is None and image.interpolation != "bilinear":
        raise ValueError(f"image.interpolation is {image.interpolation!r}; without an encoder, expected bilinear")
    for name, section in sections.items():
        tune = section.tune if isinstance(section, StudentParams) else "none"
        if (section.backbone == "encoder") != (encoder is not None):
            raise ValueError(
                f"{name}.backbone is {section.backbone!r}, but section encoder is {'null' if encoder is None else 'set'}; "
                "expected backbone: encoder in teacher and student if, and only if, there is an encoder"
            )
        if encoder is None:
            if section.adapter:
                raise ValueError(f"{name}.adapter is {section.adapter}, but there is no encoder; set adapter: 0")
            if tune != "none":
                raise ValueError(f"{name}.tune is {tune}, but there is no encoder; set tune: none")
            continue
        if section.pretrained is not None:
            raise ValueError(f"{name}.pretrained is set; the weights of an encoder are encoder.weights")
        if tune != "none":
            if encoder.views:
                raise ValueError(
                    f"encoder.views is {encoder.views}, but {name}.tune is {tune}, which draws views of the images; set "
                    "encoder.views: 0"
                )
            continue
        for key in FIXED:
            value, allowed = getattr(section.augment, key), getattr(NO_AUGMENT, key)
            if value != allowed:
                raise ValueError(
                    f"{name}.augment.{key} is {value!r}; the features of an encoder are not augmented in training: set "
                    f"{str(allowed).lower()}, and encoder.views for stored views"
                )
