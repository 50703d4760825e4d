"""Training facts in the cards: loss terms with a weight, the teacher, the uses of the validation split."""

import pytest

from pipeline.data.class_prior import Prior
from pipeline.report.data_card import SplitSizes, data_card, data_facts
from pipeline.report.model_card import model_facts
from tests.support.making import params

PRIOR = Prior(["a", "b", "c"], [200, 50, 5], [0.7, 0.2, 0.1], [-0.3, -1.6, -2.3], ["many", "medium", "few"])
GML = "the GML loss (ICML 2023, Mutual Information Maximization between Latent Features and Ground-Truth Labels)"


@pytest.mark.parametrize(
    ("student", "encoder", "training"),
    [
        ({}, None, f"logit-adjusted cross-entropy + {GML} + distillation; teacher: resnet32, 7 epochs"),
        ({"beta": 0.0, "alpha": 0.0}, "lite", "logit-adjusted cross-entropy"),
        ({"beta": 0.0, "alpha": 0.0, "adjustment": 0.0}, None, "cross-entropy"),
        (
            {"beta": 0.0},
            "lite",
            "logit-adjusted cross-entropy + distillation; teacher: classifier on frozen lite, 7 epochs",
        ),
        ({"alpha": 0.0, "contrast_encoder": "momentum"}, None, f"logit-adjusted cross-entropy + {GML}"),
        (
            {"alpha": 0.0, "contrast_encoder": "text"},
            None,
            f"logit-adjusted cross-entropy + {GML} with text features as centres",
        ),
        ({"gamma": 0.0, "beta": 0.0}, None, "distillation; teacher: resnet32, 7 epochs"),
    ],
)
def test_the_model_card_names_the_loss_terms_that_trained_the_student_and_the_teacher_that_they_need(
    student, encoder, training
):
    text = {"encoder": "features", "file": "own.safetensors"}
    values = {"epochs": 3, "gamma": 1.0, "beta": 1.0, "alpha": 1.0, **student}
    recipe = params(
        {
            "teacher.backbone": "resnet32",
            "teacher.epochs": 7,
            "text": text,
            **{f"student.{key}": v for key, v in values.items()},
        }
    )
    record = encoder and {"name": encoder, "licence": "MIT", "source": "here", "sha256": "0" * 64}
    facts = model_facts(recipe.teacher, recipe.student, recipe.image.size, 0.0, PRIOR, record)
    assert dict(facts)["Training"] == f"3 epochs with {training}"


@pytest.mark.parametrize(("images", "fitted"), [(None, False), (29, False), (30, True)])
def test_the_data_card_names_the_fit_of_the_memory_as_a_use_of_the_validation_split(images, fitted):
    recipe, sizes = params(), SplitSizes(10, 40, 5)
    memory = None if images is None else {"validation_images": images}
    card = data_card(recipe.data, data_facts(recipe.data, recipe.image, PRIOR, sizes), PRIOR, sizes, memory)
    use = "selection of an epoch, the temperature of the calibration"
    assert f"| validation | 40 | {use}{', tau and weight of the memory' if fitted else ''} |" in card
