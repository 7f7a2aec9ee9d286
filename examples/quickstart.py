"""One call: ConvNeXt-Base with GHN-orth weights, and a report of what every parameter got.

    python examples/quickstart.py [MODEL]

Shows `init=` of `timm.create_model`, the report of what every parameter got, and where a model says what it was
initialized with. Without network and cache, the small GHN that comes with timm-ghn is used.
"""

import sys
import time

import timm
import torch

import timm_ghn


def main() -> None:
    """Create, report, run once."""
    name = sys.argv[1] if len(sys.argv) > 1 else "convnext_base"
    start = time.perf_counter()
    model = timm.create_model(name, init="ghn-orth")
    print(f"timm.create_model({name!r}, init='ghn-orth') took {time.perf_counter() - start:.1f} s")
    print("GHN:", timm_ghn.provenance(model)["ghn"])

    print(timm_ghn.report_of(model).table())

    size = model.pretrained_cfg["input_size"]
    with torch.no_grad():
        logits = model.eval()(torch.randn(1, *size))
    print("logits:", tuple(logits.shape), "finite" if logits.isfinite().all() else "not finite")


if __name__ == "__main__":
    main()
