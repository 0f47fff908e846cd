"""Data loaders, metrics, backtests, reports and plots for any GluonTS forecaster."""

from .backtest import BacktestResult, backtest, gift_eval_windows, long_horizon, season_length
from .comparison import RelativeScore, relative_score
from .datasets import (
    frame_categories,
    from_long_frame,
    from_wide_frame,
    load_jsonl,
    load_long_csv,
    load_m4,
    load_monash,
    load_wide,
)
from .diagnostics import Diagnostics
from .errors import DataWarning, EvaluationError
from .frames import as_pandas, forecasts_to_frame, stamp_of
from .gift_eval import write_gift_eval
from .html_report import html_report, write_html_report
from .long_horizon_data import Borders, LongHorizonDataset, StandardScaler, load_long_horizon
from .metrics import (
    CRPS,
    DECILES,
    DEFAULT_METRICS,
    GIFT_EVAL_METRICS,
    MASE,
    MSIS,
    IntervalCoverage,
    LongHorizonMetrics,
    UnscaledSeriesWarning,
    long_horizon_metrics,
)
from .plots import plot_forecasts
from .report import results_frame, results_markdown, results_table, write_results

__all__ = [
    "CRPS",
    "DECILES",
    "DEFAULT_METRICS",
    "GIFT_EVAL_METRICS",
    "MASE",
    "MSIS",
    "BacktestResult",
    "Borders",
    "DataWarning",
    "Diagnostics",
    "EvaluationError",
    "IntervalCoverage",
    "LongHorizonDataset",
    "LongHorizonMetrics",
    "RelativeScore",
    "StandardScaler",
    "UnscaledSeriesWarning",
    "as_pandas",
    "backtest",
    "forecasts_to_frame",
    "frame_categories",
    "from_long_frame",
    "from_wide_frame",
    "gift_eval_windows",
    "html_report",
    "load_jsonl",
    "load_long_csv",
    "load_long_horizon",
    "load_m4",
    "load_monash",
    "load_wide",
    "long_horizon",
    "long_horizon_metrics",
    "plot_forecasts",
    "relative_score",
    "results_frame",
    "results_markdown",
    "results_table",
    "season_length",
    "stamp_of",
    "write_gift_eval",
    "write_html_report",
    "write_results",
]
