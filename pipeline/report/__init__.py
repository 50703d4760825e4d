"""Reports: HTML pages of an evaluation and of a comparison of two runs, model and data cards, MLflow records."""

from pipeline.report.analysis import analyse_predictions as analyse_predictions
from pipeline.report.comparison_page import render_comparison as render_comparison
from pipeline.report.evaluation_page import Evaluation as Evaluation
from pipeline.report.evaluation_page import Provenance as Provenance
from pipeline.report.evaluation_page import render_report as render_report
from pipeline.report.evaluation_page import render_segmentation_report as render_segmentation_report
