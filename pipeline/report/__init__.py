"""HTML pages: the evaluation report, and the comparison of two runs."""

from pipeline.report.comparison_page import render_comparison as render_comparison
from pipeline.report.evaluation_page import Evaluation as Evaluation
from pipeline.report.evaluation_page import Origin as Origin
from pipeline.report.evaluation_page import render_report as render_report
from pipeline.report.study import Study as Study
from pipeline.report.study import study as study
