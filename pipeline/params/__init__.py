"""Typed and validated params.yaml, the recipe of a run; one module per group of sections."""

from pipeline.params.data import (
    DataParams,
    ImageParams,
    LabelMapParams,
    ListParams,
    PriorParams,
    StreamParams,
    TableParams,
)
from pipeline.params.encoder import ClassWordsParams, EncoderParams, TextParams
from pipeline.params.file import PARAMS_FILE, Params, load_params, parse_params, read_yaml
from pipeline.params.operation import IngestParams, RetrainParams, TrackingParams
from pipeline.params.release import EvaluateParams, ExplainParams, ExportParams, GateParams, GateRule, ServingParams
from pipeline.params.second_stage import ClassifierParams
from pipeline.params.tasks import SegmentationAugmentParams, SegmentationParams
from pipeline.params.training import (
    AugmentParams,
    EngineParams,
    LearningRateParams,
    MemoryParams,
    PretrainedParams,
    StudentParams,
    TrainingParams,
)

__all__ = [
    "PARAMS_FILE", "AugmentParams", "ClassWordsParams", "ClassifierParams", "DataParams", "EncoderParams",
    "EngineParams", "EvaluateParams", "ExplainParams", "ExportParams", "GateParams", "GateRule", "ImageParams",
    "IngestParams", "LabelMapParams", "LearningRateParams", "ListParams", "MemoryParams", "Params", "PretrainedParams",
    "PriorParams", "RetrainParams", "SegmentationAugmentParams", "SegmentationParams", "ServingParams", "StreamParams",
    "StudentParams", "TableParams", "TextParams", "TrackingParams", "TrainingParams", "load_params", "parse_params",
    "read_yaml",
]  # fmt: skip
