"""Catalogue of the methods: an overlay file `recipes/methods/<name>.yaml` and a row of METHODS for each.

A new method is one file and one row. The overlay extends cross_entropy.yaml, which resets the terms of another method.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.shared.errors import ParamsError

if TYPE_CHECKING:
    from pipeline.params import Params

Kind = Literal["class loss", "contrast", "experts", "second stage", "own recipe"]
CONTRAST = "contrast"
WITH_CLASS_WEIGHTS = ("bcl", "concutmix", "paco", "gpaco")  # contrast terms that train the weights of the classifier
ALL = "all"
# Sections of the stages before the training, which run once.
SHARED = ("task", "seed", "data", "prior", "encoder", "text")


@dataclass(frozen=True)
class Method:
    """A method and what it costs.

    paper: where it was published. changes: what it changes in training. trained, forward: images that go through a network
    for each training image of an epoch, with and without a gradient; the training of a teacher comes on top. licence: of
    the authors' code; `none` if there is no code or no licence. predicts: the target prior of the logits as the paper uses
    them; `train` are the plain logits of a network without logit adjustment. recipe: file of the overlay; None:
    recipes/methods/<name>.yaml.
    """

    name: str
    kind: Kind
    paper: str
    changes: str
    licence: str
    trained: int = 1
    forward: int = 0
    predicts: Literal["balanced", "train"] = "balanced"
    recipe: Path | None = None

    @property
    def overlay(self) -> Path:
        """File of the overlay."""
        return self.recipe or Path("recipes/methods") / f"{self.name}.yaml"

    @property
    def step(self) -> str:
        """Cost of a step: images through a network for each image of the batch, with a gradient + without."""
        return f"{self.trained} + {self.forward}" if self.forward else str(self.trained)


METHODS = (
    Method(
        "cross_entropy", "class loss", "-", "nothing: the baseline, with its plain logits", "-", predicts="train"
    ),
    Method("post_hoc", "class loss", "Menon et al. 2021", "cross-entropy, log prior subtracted after training", "none"),
    Method("balanced_softmax", "class loss", "Ren et al. 2020; L_cls of GML", "log prior added in the loss", "BSD-3-Clause"),
    Method(
        "balanced_softmax_linear", "class loss", "Ren et al. 2020", "balanced softmax, linear classifier", "BSD-3-Clause"
    ),
    Method("focal", "class loss", "Lin et al. 2017", "less weight on easy images", "MIT", predicts="train"),
    Method("class_balanced_focal", "class loss", "Cui et al. 2019", "sigmoid focal loss, class weights", "MIT"),
    Method("ldam_drw", "class loss", "Cao et al. 2019", "margins of the classes, deferred class weights", "MIT"),
    Method("label_smoothing", "class loss", "Szegedy et al. 2016", "label smoothing 0.1", "-", predicts="train"),
    Method(
        "label_aware_smoothing", "class loss", "Zhong et al. 2021", "more label smoothing for larger classes", "MIT",
        predicts="train",
    ),
    Method("lade", "class loss", "Hong et al. 2021", "balanced softmax and a regulariser of the batch", "BSD-3-Clause"),
    Method(
        "causal", "class loss", "Tang et al. 2020", "direction of the mean feature removed after training", "GPL-3.0",
        predicts="train",
    ),
    Method("ssp", "class loss", "Yang and Xu 2020", "pretraining by rotations, then ldam_drw", "MIT", trained=5),
    Method("kd", "class loss", "Hinton et al. 2015", "balanced softmax and distillation from the teacher", "-", forward=1),
    Method(
        "supcon", "contrast", "Khosla et al. 2020", "contrast of two views in the batch", "BSD-2-Clause", trained=3,
    ),
    Method(
        "bcl", "contrast", "Zhu et al. 2022", "balanced contrast with one centre per class", "MIT", trained=3
    ),
    Method("concutmix", "contrast", "Pan et al. 2024", "BCL, CutMix with rare classes", "none", trained=3),
    Method(
        "paco", "contrast", "Cui et al. 2021", "class logits, batch and queue as candidates", "MIT", forward=1
    ),
    Method("gpaco", "contrast", "Cui et al. 2023", "PaCo without a momentum encoder", "MIT", trained=2),
    Method("kcl", "contrast", "Kang et al. 2021", "a fixed number of positive keys", "none", forward=1),
    Method("tsc", "contrast", "Li et al. 2022", "KCL with a fixed target for each class", "MIT", forward=1),
    Method(
        "hybrid_sc", "contrast", "Wang et al. 2021", "SupCon, then cross-entropy of a balanced batch", "none", trained=3,
    ),
    Method(
        "proco", "contrast", "Du et al. 2024", "classes as von Mises-Fisher distributions", "MIT", trained=3
    ),
    Method("crd", "contrast", "Tian et al. 2020", "student's feature against the teacher's", "BSD-2-Clause", forward=1),
    Method("crd_kd", "contrast", "Tian et al. 2020", "CRD and distillation, one teacher pass", "BSD-2-Clause", forward=1),
    Method(
        "gml", "contrast", "GML, ICML 2023", "contrast with class-wise queues of teacher features, distillation", "MIT",
        trained=2, forward=2,
    ),
    Method(
        "gml_without_distillation", "contrast", "GML, ICML 2023", "GML without L_KD, as on ImageNet-LT", "MIT",
        trained=2, forward=1,
    ),
    Method(
        "gml_without_teacher", "contrast", "GML, ICML 2023, Table 5", "GML with a momentum encoder, no teacher", "MIT",
        trained=2, forward=1,
    ),
    Method(
        "gml_encoder", "contrast", "GML, ICML 2023, Table 6", "encoder by GML alone, then the classifier", "MIT",
        trained=2, forward=1,
    ),
    Method(
        "supcon_encoder", "contrast", "Khosla et al. 2020", "encoder by SupCon alone, then the classifier", "BSD-2-Clause",
        trained=3,
    ),
    Method("bbn", "experts", "Zhou et al. 2020", "two last blocks, a second batch of rare classes", "MIT", trained=2),
    Method("ride", "experts", "Wang et al. 2021", "three branches, LDAM with deferred weights, diversity", "MIT"),
    Method("sade", "experts", "Zhang et al. 2022", "three branches for three priors", "MIT"),
    Method("ncl", "experts", "Li et al. 2022", "three networks that learn from each other", "BSD-2-Clause"),
    Method("reslt", "experts", "Cui et al. 2022", "three branches on the last feature map", "MIT"),
    Method("ncm", "second stage", "Kang et al. 2020", "nearest mean of the features of a class", "BSD-3-Clause"),
    Method("tau_norm", "second stage", "Kang et al. 2020", "linear classifier, rows scaled by their length", "BSD-3-Clause"),
    Method("crt", "second stage", "Kang et al. 2020", "new linear classifier, class-balanced sampling", "BSD-3-Clause"),
    Method("lws", "second stage", "Kang et al. 2020", "one factor for each class", "BSD-3-Clause"),
    Method("disalign", "second stage", "Zhang et al. 2021", "gain and offset of each class behind a gate", "Apache-2.0"),
    Method("mislas", "second stage", "Zhong et al. 2021", "label-aware smoothing of the classifier", "MIT"),
    Method("mislas_mixup", "second stage", "Zhong et al. 2021", "mixup, then label-aware smoothing", "MIT"),
    Method(
        "balanced_softmax_head", "second stage", "Ren et al. 2020", "new linear classifier, balanced softmax", "BSD-3-Clause"
    ),
    Method("balms", "second stage", "Ren et al. 2020", "learned class shares of the batches", "BSD-3-Clause"),
    Method("metasaug", "second stage", "Li et al. 2021", "learned augmentation of the features", "MIT"),
    Method("los", "second stage", "Sun et al. 2025", "classifier with label smoothing 0.98", "MIT"),
)  # fmt: skip
PROJECT = Method("project", "own recipe", "-", "params.yaml as it is", "-")


def find_methods(names: list[str]) -> list[Method]:
    """Methods by name, in the order of `names` and once each.

    `all` stands for the whole catalogue, `project` for params.yaml as it is, and a name that ends in .yaml is an overlay
    file of the caller. Raises ParamsError for an unknown name, with the nearest ones, and for two methods of one name.
    """
    known = {method.name: method for method in (*METHODS, PROJECT)}
    found: dict[str, Method] = {}
    for name in names:
        if name == ALL:
            methods = list(METHODS)
        elif name.endswith((".yaml", ".yml")):
            path = Path(name)
            methods = [Method(path.stem, "own recipe", "-", f"overlay {path}", "-", recipe=path)]
        elif name in known:
            methods = [known[name]]
        else:
            nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"expected some of {', '.join(known)}"
            raise ParamsError(f"--methods: {name!r} is no method; {hint} (`tailor methods` lists them)")
        for method in methods:
            if found.setdefault(method.name, method) != method:
                raise ParamsError(f"--methods: two methods have the name {method.name!r}; rename {method.overlay}")
    if not found:
        raise ParamsError("--methods is empty; expected names that `tailor methods` lists, or all")
    return list(found.values())


def params_of(method: Method, params: Params) -> Params:
    """Params of the project with the overlay of a method. Raises ParamsError if the method does not apply to the project."""
    from pipeline.params.recipe import existing_recipe, with_overlay

    if method.recipe:
        existing_recipe(method.recipe)  # raises if there is none
    try:
        merged = params if method == PROJECT else with_overlay(params, method.overlay)
    except ParamsError as error:
        raise ParamsError(f"{method.name} does not apply to this project: {error}") from None
    for section in (*SHARED, "image") if params.encoder else SHARED:
        if getattr(merged, section) != getattr(params, section):
            raise ParamsError(
                f"{method.overlay}: sets another {section}, but all methods of a comparison have that of the project; "
                "remove it there, or change it in params.yaml"
            )
    student = merged.student
    frozen = merged.encoder is not None and student.tune == "none" and not student.adapter
    if method.kind == CONTRAST and frozen and student.contrast.kind not in WITH_CLASS_WEIGHTS:
        raise ParamsError(
            f"{method.name} does not apply to this project: student.adapter is 0, so that on the features of a frozen encoder "
            "its contrast term has no layer to train; set student.adapter, for example 128"
        )
    return merged
