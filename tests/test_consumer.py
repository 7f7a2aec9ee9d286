"""What was pushed, in a virtual environment without timm-ghn."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hub_fixtures import Remote

CONSUMER = """
import importlib.util, json, os, sys
try:
    import timm_ghn
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("timm_ghn is here")
import huggingface_hub, timm, torch
repository, cases = sys.argv[1], json.loads(sys.argv[2])
found = []
for name, kwargs in cases:
    if name.startswith("local-dir"):
        name = f"local-dir:{huggingface_hub.snapshot_download(repository)}"
    model = timm.create_model(name, pretrained=True, **kwargs).eval()
    with torch.no_grad():
        logits = model(torch.linspace(-1, 1, 3 * 160 * 160).view(1, 3, 160, 160))
        features = model.forward_features(torch.ones(1, 3, 160, 160)).double().sum().item()
    found.append([list(logits.shape), logits.flatten()[:5].tolist(), features, model.pretrained_cfg["tag"]])
assert "timm_ghn" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def consumer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a virtual environment that has everything that is installed here but timm-ghn."""
    folder = tmp_path_factory.mktemp("consumer")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    [site] = folder.glob("lib/python3*/site-packages")
    packages = folder / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        # Neither the package nor what makes an editable installation of it importable.
        if not path.name.lower().replace("-", "_").lstrip("_").startswith("timm_ghn") and path.suffix != ".pth":
            (packages / path.name).symlink_to(path)
    (site / "packages.pth").write_text(f"{packages}\n")
    return folder / "bin" / "python"


def test_plain_timm_loads_what_was_pushed(
    remote: Remote, repository: str, consumer: Path, seeded_checkpoint: Path, tmp_path: Path
) -> None:
    expected = remote.client.run(
        "timm_ghn.push('test_resnet', repository, private=True)\n"
        "model = timm.create_model('test_resnet', init='ghn-orth').eval()\n"
        "with torch.no_grad():\n"
        "    logits = model(torch.linspace(-1, 1, 3 * 160 * 160).view(1, 3, 160, 160))\n"
        "    features = model.forward_features(torch.ones(1, 3, 160, 160)).double().sum().item()\n"
        "result = [list(logits.shape), logits.flatten()[:5].tolist(), features, 'ghn_orth']",
        {"TIMM_GHN": str(seeded_checkpoint)},
        repository=repository,
    ).result
    name = f"hf-hub:{repository}"
    cases = [[name, {}], ["local-dir", {}], [name, {"num_classes": 10}]]
    environment = {key: value for key, value in remote.environment.items() if key != "PYTHONPATH"}
    environment["HF_HOME"] = str(tmp_path / "home")
    done = subprocess.run(
        [str(consumer), "-c", CONSUMER, repository, json.dumps(cases)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    from_hub, from_folder, resized = json.loads(done.stdout)
    assert from_hub == expected
    assert from_folder == expected
    assert resized[0] == [1, 10]
    assert resized[2] == expected[2]


def test_what_is_pushed_is_taken_back(remote: Remote, repository: str) -> None:
    """The round trip of the other test files, on whatever Hub there is."""
    done = remote.client.run(
        "first = timm_ghn.push('test_vit', repository, init='orth', private=True)\n"
        "second = timm_ghn.push('test_vit', repository, init='orth', private=True)\n"
        "taken = timm.create_model('test_vit', init=f'hf-hub:{repository}').state_dict()\n"
        "made = timm.create_model('test_vit', init='orth').state_dict()\n"
        "proposed = timm_ghn.push('test_vit', repository, init={'method': 'orth', 'seed': 1}, create_pr=True)\n"
        "result = [first.outcome.value, second.outcome.value, proposed.outcome.value,\n"
        "          all(torch.equal(taken[name], made[name]) for name in made)]",
        repository=repository,
    )
    assert done.result == ["pushed", "skipped", "proposed", True]
