"""Fine-tuning of timm models from different initializations: the experiments of arXiv 2207.10049."""

from timm_ghn.finetune.config import FineTuneConfig
from timm_ghn.finetune.data import Benchmark, load_benchmark
from timm_ghn.finetune.experiment import Job, run_jobs, tune
from timm_ghn.finetune.results import ResultStore, RunResult, Summary, differences, spread, summarize
from timm_ghn.finetune.run import Execution

__all__ = [
    "Benchmark",
    "Execution",
    "FineTuneConfig",
    "Job",
    "ResultStore",
    "RunResult",
    "Summary",
    "differences",
    "load_benchmark",
    "run_jobs",
    "spread",
    "summarize",
    "tune",
]
