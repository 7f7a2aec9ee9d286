"""Fine-tuning of timm models from different initializations: the experiments of arXiv 2207.10049."""

from timm_ghn.finetune.config import FineTuneConfig
from timm_ghn.finetune.data import Benchmark, find_benchmark, load_benchmark
from timm_ghn.finetune.experiment import Grid, Job, run_jobs, tune
from timm_ghn.finetune.results import Comparison, ResultStore, RunResult, Summary, compare, spread, summarize
from timm_ghn.finetune.run import Execution
from timm_ghn.finetune.stem import adjust_stem

__all__ = [
    "Benchmark",
    "Comparison",
    "Execution",
    "FineTuneConfig",
    "Grid",
    "Job",
    "ResultStore",
    "RunResult",
    "Summary",
    "adjust_stem",
    "compare",
    "find_benchmark",
    "load_benchmark",
    "run_jobs",
    "spread",
    "summarize",
    "tune",
]
