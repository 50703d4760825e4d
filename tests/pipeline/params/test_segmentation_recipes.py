"""The recipes of segmentation against the paper's values and those of mmsegmentation's fcn_r50-d8, which it uses."""

import pytest
import torch
import yaml

from models.contrast.queues import queue_lengths
from models.segmentation.network import SegmentationModel
from pipeline.params import parse_params
from pipeline.params.recipe import apply_recipe
from tests.support.making import ROOT


def applied(name):
    path = ROOT / f"recipes/{name}.yaml"
    return parse_params(yaml.safe_load(apply_recipe([path], ROOT / "params.yaml")[0]), path)


def test_the_ade20k_recipe_has_the_values_of_the_paper_and_of_mmsegmentation():
    made = applied("ade20k-fcn-r50")
    student, labels, settings = made.student, made.data.label_map, made.segmentation
    # Sec. 4.7: k, k_m, tau_s, tau_g; one alpha in all terms.
    assert (student.queue_total, student.queue_minimum, student.tau_s, student.tau_g) == (8192, 27, 0.05, 0.07)
    assert {made.teacher.adjustment, student.adjustment, student.prior_strength} == {0.2}
    assert (len(labels.class_names), labels.reduce_zero_label, labels.ignored) == (150, True, 255)
    assert [labels.class_names[index] for index in (0, 1, 20, 149)] == ["wall", "building", "car", "flag"]
    augment = settings.augment
    assert (augment.scale, augment.ratio, augment.crop) == ([2048, 512], [0.5, 2.0], [512, 512])
    assert (augment.max_share, augment.flip, augment.photometric) == (0.75, True, True)
    assert (settings.auxiliary, settings.average, settings.classifier) == (0.4, "official", "cosine")
    for section in (made.teacher, student):
        assert (section.batch_size, section.learning_rate, section.weight_decay) == (16, 0.01, 5e-4)
        assert (section.schedule.kind, section.schedule.minimum, section.schedule.power) == ("poly", 1e-4, 0.9)
        # 160,000 steps, of 20,210 images without the last batch of an epoch.
        assert section.epochs * (20_210 // 16) == pytest.approx(160_000, rel=0.005)
        with torch.device("meta"):
            model = SegmentationModel(section.backbone, 150, section.tau_s)
        assert sum(parameter.numel() for parameter in model.parameters()) == 49_598_304


def test_half_of_the_camvid_queues_is_shared_equally_as_on_ade20k():
    student = applied("camvid-cpu").student
    counts = [
        10_682_767, 14_750_079, 623_349, 20_076_880, 2_845_085, 6_166_762, 743_859, 714_595, 3_719_877, 405_385, 184_967,
    ]  # fmt: skip
    expected = [274, 343, 103, 433, 141, 196, 105, 104, 155, 99, 95]
    assert queue_lengths(counts, student.queue_total, student.queue_minimum) == expected
