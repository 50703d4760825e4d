"""Task segmentation through the stages: training, resume, evaluation, export, on small real files."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

import pipeline.evaluate
import pipeline.export
import pipeline.prior
import pipeline.split
import pipeline.student
import pipeline.teacher
from models.networks.backbones import build_backbone
from models.preprocess import letterbox
from models.segmentation.metrics import Areas
from models.segmentation.network import SegmentationModel
from pipeline.augment import apply_crops, draw_crops
from pipeline.data.class_prior import load_prior
from pipeline.model_io.checkpoint import load_model
from pipeline.params.training import PretrainedParams
from pipeline.segmentation import objectives
from pipeline.segmentation.dataset import LabelMapSplit, load_labelled_images
from pipeline.segmentation.inference import areas_by_adjustment, cell_logits, class_maps, image_logits
from pipeline.segmentation.stream import LabelledStream, labelled_training_images
from pipeline.shared.artifacts import EVALUATION, REPOSITORY, STUDENT, TEACHER, sha256_of
from pipeline.shared.errors import ParamsError
from pipeline.training import engine
from pipeline.training.run import model_config
from pipeline.training.step import Step
from serving.golden.dry_run import run_golden
from serving.repository.release import read_release
from tests.support.gpu_checks import check_capture, check_device
from tests.support.label_maps import CLASSES, SIZE, label_map_folder, labels, segmentation_params
from tests.support.making import encode, picture, write
from tests.support.stand_in import Response, Tensor, backend, load

CPU = torch.device("cpu")
QUEUES = {
    "student__queue_total": 24,
    "student__queue_minimum": 4,
    "student__projection_dim": 16,
    "evaluate__samples": 2,
}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Params for a folder of 12 images; split and prior are finished."""
    monkeypatch.chdir(tmp_path)
    settings = segmentation_params(label_map_folder(tmp_path / "source"), **QUEUES)
    pipeline.split.run(settings)
    pipeline.prior.run(settings)
    return settings


def test_images_of_different_sizes_are_padded_and_keep_their_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = label_map_folder(tmp_path / "source")
    label_map_folder(root, 1, "small", (12, 14))
    settings = segmentation_params(root)
    pipeline.split.run(settings)
    data = load_labelled_images(settings)
    assert data.images.shape[1:] == (4, *SIZE)
    sizes = dict(zip(data.sample_ids, data.sizes.tolist(), strict=True))
    assert set(map(tuple, sizes.values())) <= {SIZE, (12, 14)}
    for index, name in enumerate(data.sample_ids):
        made = labels(int(name[-7:-4]), tuple(sizes[name]))
        stored = data.images[index, 3].numpy()
        assert (stored[: made.shape[0], : made.shape[1]] == made).all()
        assert (stored[made.shape[0] :] == 255).all() and (stored[:, made.shape[1] :] == 255).all()


def test_a_canvas_keeps_the_ratio_and_is_padded_with_the_mean_colour():
    from PIL import Image

    canvas, inside = letterbox(Image.fromarray(picture(1, (20, 40))), 32, 32, (1, 2, 3))
    assert inside == (16, 32) and canvas.shape == (3, 32, 32)
    assert (canvas[:, 16:] == np.array([1, 2, 3])[:, None, None]).all()
    exact, inside = letterbox(Image.fromarray(picture(1, (24, 32))), 24, 32, (0, 0, 0))
    assert inside == (24, 32) and (exact.transpose(1, 2, 0) == picture(1, (24, 32))).all()


def test_areas_of_a_split_are_those_of_each_image_summed(made):
    model, data = SegmentationModel("resnet20", 3), LabelMapSplit(made, "train")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    adjustments = np.array([[0.0, 0.0, 0.0], [0.0, -3.0, 4.0]])
    totals, images = areas_by_adjustment(model, data, made.image, CPU, adjustments)
    assert len(images) == len(data)
    expected = [Areas.zero(3), Areas.zero(3)]
    for index in range(len(data)):
        canvas, inside, truth = data.read(index)
        with torch.no_grad():
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (made.image.mean, made.image.std))
            logits = model.eval()((torch.from_numpy(canvas)[None] / 255 - mean) / std).logits
            full = image_logits(logits, data.canvas, inside, truth.shape)
        for areas, row in zip(expected, adjustments, strict=True):
            areas.add((full + torch.tensor(row).float()[:, None, None]).argmax(1)[0].numpy(), truth)
    for total, reference in zip(totals, expected, strict=True):
        assert total.intersection.tolist() == reference.intersection.tolist()
        assert total.predicted.tolist() == reference.predicted.tolist()


def check_served_class_maps(made) -> None:
    """Export, and compare the class maps of both served models with PyTorch, for each kind of prior."""
    exported = pipeline.export.run(made)
    assert exported.difference < 1e-4 and exported.manifest.segmentation.cells == (6, 8)
    run_golden(REPOSITORY, read_release(REPOSITORY, 1))
    prior, data = load_prior(), LabelMapSplit(made, "test")
    model, _ = load_model(STUDENT, "student")
    target = [0.2, 0.7, 0.1]
    rows = {b"balanced": np.zeros(3), b"-0.5": -0.5 * np.array(prior.log_prior)}
    rows[json.dumps(target).encode()] = np.log(target)
    segmenter = load(REPOSITORY, "segmenter", "configs/local.pbtxt", backend())
    for text, added in rows.items():
        request = MapRequest([Tensor("image", np.array([[data.encoded(0)]], dtype=np.object_))])
        request.tensors.append(Tensor("prior", np.array([[text]], dtype=np.object_)))
        [answer] = segmenter.execute([request])
        _, inside, truth = data.read(0)
        logits = next(cell_logits(model, data, [0], made.image, CPU))[0]
        expected = class_maps(logits, torch.from_numpy(added)[None].float(), data.canvas, inside, truth.shape)[0]
        assert (answer["class_map"][0] == expected).mean() > 0.999 and answer["size"].tolist() == [list(SIZE)]
        counts = np.bincount(answer["class_map"].ravel(), minlength=3)
        assert answer["probability"][0] == pytest.approx(np.sort(counts)[::-1] / counts.sum())
        assert answer["names"][0].tolist() == [name.encode() for name in CLASSES]
    torn = MapRequest([Tensor("image", np.array([[data.encoded(0)[:50]]], dtype=np.object_))])
    assert "image is damaged" in segmenter.execute([torn])[0].error.message()
    segmenter.finalize()


class MapRequest(Response):
    """A request for all outputs of a release of task segmentation."""

    def requested_output_names(self) -> list[str]:
        return ["class_map", "confidence", "class", "index", "probability", "size", "names"]


@pytest.mark.slow
def test_teacher_and_student_are_trained_evaluated_and_resume_after_an_interruption(made, monkeypatch, capsys):
    pipeline.teacher.run(made)
    record = json.loads((TEACHER / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"classification", "auxiliary", "validation_miou"} <= set(record) and "gml" not in record
    # Poly by step: the last of four steps of 0.05.
    assert record["learning_rate"] == pytest.approx((0.05 - 1e-4) * (1 - 3 / 4) ** 0.9 + 1e-4)

    whole = pipeline.student.run(made)
    assert "validation" in str(whole) and {"gml", "queue_fill"} <= set(whole.last)
    expected = load_file(STUDENT / "model.safetensors")

    descend, done = engine.Step.descend, []

    def cut_off(self, *arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return descend(self, *arguments)

    frequent = made.model_copy(update={"engine": made.engine.model_copy(update={"checkpoint_seconds": 0.0})})
    monkeypatch.setattr(engine.Step, "descend", cut_off)
    with pytest.raises(KeyboardInterrupt):
        pipeline.student.run(frequent)
    monkeypatch.setattr(engine.Step, "descend", descend)
    pipeline.student.run(frequent)
    assert "resumes at step 4 of 4" in capsys.readouterr().out
    resumed = load_file(STUDENT / "model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())

    model, config = load_model(STUDENT, "student")
    assert isinstance(model, SegmentationModel) and config.segmentation == {
        "canvas": list(SIZE),
        "classifier": "cosine",
    }
    result = pipeline.evaluate.run(made)
    assert str(result).startswith("mIoU teacher ")
    curve = (EVALUATION / "plots/strength.csv").read_text().splitlines()
    assert len(curve) == 12 and curve[0].startswith("strength,alpha,teacher_miou,")
    areas = pyarrow.parquet.read_table(EVALUATION / "predictions.parquet").to_pylist()
    summed = Areas(
        *(np.sum([row[f"{part}_balanced"] for row in areas], 0) for part in ("intersection", "predicted", "labelled"))
    )
    assert summed.metrics()["miou"] == pytest.approx(result.metrics["student"]["balanced"]["miou"])
    page = (EVALUATION / "report.html").read_text()
    assert page.count("data:image/webp") == 6 and all(name in page for name in CLASSES)

    check_served_class_maps(made)

    moved = made.model_copy(update={"segmentation": made.segmentation.model_copy(update={"canvas": [32, 32]})})
    with pytest.raises(ParamsError, match=r"segmentation is .*\[32, 32\].*, but artifacts/teacher was trained with"):
        pipeline.evaluate.run(moved)


@pytest.mark.slow
def test_a_student_with_its_own_features_as_keys_needs_no_teacher(made):
    own = made.model_copy(update={"student": made.student.model_copy(update={"contrast_encoder": "self", "epochs": 1})})
    pipeline.student.run(own)
    assert not TEACHER.exists() and (STUDENT / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_step_on_label_maps_can_be_captured_and_is_on_one_device(made, monkeypatch):
    def student():
        teacher, student = (
            model_config(section, made.image, 3, segmentation=made.segmentation)
            for section in (made.teacher, made.student)
        )
        frozen = objectives.teacher_objective(made, teacher, load_prior(), 0).model
        return objectives.student_objective(made, student, load_prior(), 0, frozen)

    section, images = made.student, load_labelled_images(made)
    plain, captured = (Step(student(), section, made.image, images, CPU) for _ in range(2))
    check_capture(monkeypatch, plain, captured, section, len(images))
    check_device(monkeypatch, student(), section, made.image, images)


def test_training_starts_from_the_weights_of_a_local_file(made, tmp_path):
    source = build_backbone("resnet20").network.state_dict()
    save_file(source, tmp_path / "resnet20.safetensors")
    weights = PretrainedParams(
        file=str(tmp_path / "resnet20.safetensors"), sha256=sha256_of(tmp_path / "resnet20.safetensors")
    )
    section = made.teacher.model_copy(update={"pretrained": weights})
    config = model_config(section, made.image, 3, segmentation=made.segmentation)
    started = objectives.teacher_objective(made.model_copy(update={"teacher": section}), config, load_prior(), 0)
    network = started.model.backbone.network
    assert torch.equal(network.conv1.weight, source["conv1.weight"])
    assert torch.equal(network.state_dict()["blocks.8.conv2.weight"], source["blocks.8.conv2.weight"])


def test_a_backbone_without_dilation_is_refused_before_training(made):
    wrong = made.model_copy(update={"student": made.student.model_copy(update={"backbone": "torchvision/vgg11"})})
    with pytest.raises(ParamsError, match=r"^student.backbone: "):
        objectives.check_dilated(wrong)


def test_queues_that_cannot_hold_every_class_are_refused_before_training(made):
    wrong = made.model_copy(update={"student": made.student.model_copy(update={"queue_minimum": 9})})
    with pytest.raises(ParamsError, match=r"student\.queue_total, student\.queue_minimum"):
        pipeline.teacher.run(wrong)


def test_a_training_split_that_does_not_fit_into_memory_is_streamed_with_the_same_crops(made, monkeypatch):
    images = load_labelled_images(made)
    monkeypatch.setattr("pipeline.segmentation.dataset.free_bytes", lambda: 1000)
    stream, notice = labelled_training_images(made, CPU)
    assert isinstance(stream, LabelledStream) and "reads images as it needs them" in notice
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(stream.order(generator), images.order(torch.Generator().manual_seed(3)))
    chosen, draws = torch.tensor([5, 0, 3]), draw_crops(3, stream.augment, generator)
    read = stream.pixels(chosen, draws)
    mean = tuple(made.image.mean)
    views, cut = apply_crops(
        images.images[chosen, :3], images.images[chosen, 3], draws, images.augment, images.sizes[chosen], mean=mean
    )
    assert torch.equal(read[:, :3], views[0]) and torch.equal(read[:, 3], cut)


def test_images_that_do_not_fit_on_the_gpu_are_streamed(made, monkeypatch):
    monkeypatch.setattr("pipeline.segmentation.dataset.free_on_gpu", lambda device: {f"on {device}": 1000})
    assert isinstance(labelled_training_images(made, CPU)[0], LabelledStream)


@pytest.mark.slow
def test_a_streamed_run_ends_as_one_in_memory(made):
    def trained(mode):
        section = made.teacher.model_copy(update={"epochs": 1})
        changes = {"teacher": section, "stream": made.stream.model_copy(update={"mode": mode})}
        result = pipeline.teacher.run(made.model_copy(update=changes))
        return result.last, load_file(TEACHER / "model.safetensors")

    (_, in_memory), (record, streamed) = trained("off"), trained("on")
    assert "data_wait" in record and all(torch.equal(streamed[name], tensor) for name, tensor in in_memory.items())


def test_a_label_map_that_changes_after_the_split_is_named(made, tmp_path):
    for path in sorted((tmp_path / "source/annotations").iterdir()):
        write(path, encode(np.full(SIZE, 77, dtype=np.uint8)))
    with pytest.raises(Exception, match=r"images/\d+.jpg: it or its label map has label 77"):
        load_labelled_images(made)
