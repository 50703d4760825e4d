"""Reports: HTML pages of an evaluation and of a comparison of two runs, model and data cards, MLflow records."""

from pipeline.report.comparison_page import render_comparison as render_comparison
from pipeline.report.evaluation_page import Evaluation as Evaluation
from pipeline.report.evaluation_page import Origin as Origin
from pipeline.report.evaluation_page import render_report as render_report
from pipeline.report.study import Study as Study
from pipeline.report.study import study as study
