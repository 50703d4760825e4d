"""Typed and validated params.yaml, the recipe of a run; one module per group of sections."""

from pipeline.params.data import DataParams as DataParams
from pipeline.params.data import ImageParams as ImageParams
from pipeline.params.data import ListParams as ListParams
from pipeline.params.data import PriorParams as PriorParams
from pipeline.params.data import StreamParams as StreamParams
from pipeline.params.data import TableParams as TableParams
from pipeline.params.file import PARAMS_FILE as PARAMS_FILE
from pipeline.params.file import Params as Params
from pipeline.params.file import load_params as load_params
from pipeline.params.file import parse_params as parse_params
from pipeline.params.file import read_yaml as read_yaml
from pipeline.params.operation import IngestParams as IngestParams
from pipeline.params.operation import RetrainParams as RetrainParams
from pipeline.params.operation import TrackingParams as TrackingParams
from pipeline.params.release import EvaluateParams as EvaluateParams
from pipeline.params.release import ExportParams as ExportParams
from pipeline.params.release import GateParams as GateParams
from pipeline.params.release import GateRule as GateRule
from pipeline.params.release import ServingParams as ServingParams
from pipeline.params.training import AugmentParams as AugmentParams
from pipeline.params.training import EngineParams as EngineParams
from pipeline.params.training import LearningRateParams as LearningRateParams
from pipeline.params.training import PretrainedParams as PretrainedParams
from pipeline.params.training import StudentParams as StudentParams
from pipeline.params.training import TrainingParams as TrainingParams
