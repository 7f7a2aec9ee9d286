"""Time and peak memory of writing initialized models to disk without holding them.

    python benchmarks/speed/large_models.py                                   # vit_gigantic_patch14_224 in bfloat16
    python benchmarks/speed/large_models.py --models vit_7b_patch16_dinov3 --dtype bfloat16 --out /tmp/large
    python benchmarks/speed/large_models.py --models convnext_base --dtype float32 --json out.json

Every model is made in a process of its own, and its files are deleted afterwards. The peak is that of resident memory,
over what the process has after it has imported timm, torch and this package. Weights come from the bundled GHN unless
`--ghn` names another; neither time nor memory depends on its weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODELS = ("vit_gigantic_patch14_224",)


def peak_bytes() -> int:
    """Peak resident memory of this process.

    Linux counts what the parent had before it started this one in `ru_maxrss`, but not in VmHWM.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write(model: str, dtype: str, method: str, ghn: str, directory: str) -> dict[str, Any]:
    """Write a model in this process, and say what that took."""
    import torch

    import timm_ghn

    before = peak_bytes()
    start = time.perf_counter()
    init = timm_ghn.Init(method, ghn=ghn if method.startswith("ghn") else None)
    report = timm_ghn.init_to_folder(model, directory, init, dtype=getattr(torch, dtype))
    return {
        "model": model,
        "dtype": dtype,
        "method": method,
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak_bytes() - before,
        "import_bytes": before,
        "parameters": report.num_parameters,
        "predicted_share": report.predicted_share,
        "largest_parameter": max(row.numel for row in report.parameters),
    }


def measure(model: str, dtype: str, method: str, ghn: str, out: Path | None) -> dict[str, Any]:
    """Write a model in another process, find out what was written, and delete it."""
    directory = tempfile.mkdtemp(prefix="large_models_", dir=out)
    arguments = (model, dtype, method, ghn, f"{directory}/model")
    code = f"import json, large_models; print(json.dumps(large_models.write(*{arguments!r})))"
    try:
        output = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True
        )
        size = sum(path.stat().st_size for path in Path(directory, "model").iterdir())
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return {**json.loads(output.stdout.splitlines()[-1]), "file_bytes": size}


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| model | method | dtype | parameters | predicted | on disk | time | peak memory over the import of timm "
        "| largest tensor in float32 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']} | {row['method']} | {row['dtype']} | {row['parameters'] / 1e9:.2f}e9 "
        f"| {row['predicted_share']:.1%} | {row['file_bytes'] / 1e9:.1f} GB | {row['seconds']:.0f} s "
        f"| {row['peak_bytes'] / 1e6:,.0f} MB | {4 * row['largest_parameter'] / 1e6:,.0f} MB |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--method", default="ghn-orth", help="ghn-orth, ghn, orth or rand")
    parser.add_argument("--ghn", default="bundled", help="name or path of the GHN")
    parser.add_argument("--out", type=Path, help="folder with enough room (default: that for temporary files)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    out = arguments.out and arguments.out.resolve()  # models are made in another working directory
    if out:
        out.mkdir(parents=True, exist_ok=True)
    rows = []
    for model in arguments.models:
        rows.append(measure(model, arguments.dtype, arguments.method, arguments.ghn, out))
        print(json.dumps(rows[-1]), file=sys.stderr)
    import torch

    import timm_ghn

    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"timm-ghn {timm_ghn.__version__}\n")
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
