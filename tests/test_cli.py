from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import timm_ghn
from timm_ghn.cli import ghns, main
from timm_ghn.initialize import to_folder

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _default_ghn(seeded_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMM_GHN", str(seeded_checkpoint))


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that fails."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("timm-ghn: error: ")
    return lines[0]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True, timeout=300)


# --- the command itself ---------------------------------------------------------------------------------------------


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"timm-ghn {timm_ghn.__version__}\n"


@pytest.mark.parametrize("command", [[], ["init"], ["graph"], ["ghns"], ["train"], ["run"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "timm-ghn" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["init", "resnet18"], ["graph"], ["ghns", "--nonsense"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: timm-ghn" in capsys.readouterr().err


def test_module_and_exit_status() -> None:
    done = python("-m", "timm_ghn", "cache", "rm")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "timm-ghn: error: rm takes keys, or --all\n")


def test_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ghns, "table", interrupt)
    assert main(["ghns"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("--help",), ("--version",), ("ghns",), ("cache", "ls")])
def test_quick_commands_import_neither_torch_nor_timm(command: tuple[str, ...]) -> None:
    program = (
        "import sys\nfrom timm_ghn.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'timm', 'numpy', 'torchvision'} & sys.modules.keys()))"
    )
    done = python("-c", program, *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_goes_away() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "timm_ghn", "ghns"]
    done = subprocess.run(command, env=variables, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_request_to_end_leaves_nothing(name: str, tmp_path: Path) -> None:
    """The weights of 350 MB are being written when it comes."""
    start = f"import signal, sys; signal.signal(signal.{name}, signal.SIG_DFL)  # nohup ignores it for its children"
    program = f"{start}\nfrom timm_ghn.cli import main\nsys.exit(main(sys.argv[1:]))"
    arguments = ("-c", program, "init", "vit_base_patch16_224", "--method", "orth", "--out", str(tmp_path / "new"))
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, *arguments], env=variables, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob("new/.model*.tmp")) and process.poll() is None:
            os.sched_yield()
        number = getattr(signal, name)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left, other = tmp_path / ".model.safetensors.123.00000000.tmp", tmp_path / ".notes.tmp"
    for path in (left, other):
        path.write_bytes(b"half of it")
    assert main(["init", "test_resnet", "--method", "orth", "--out", str(tmp_path)]) == 0
    assert not left.exists()
    assert other.exists()


def test_logging_is_left_as_it_was() -> None:
    logger = logging.getLogger("timm_ghn")
    before = logger.level, list(logger.handlers)
    main(["-vv", "ghns"])
    assert (logger.level, logger.handlers) == before


def test_verbose_says_more_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-v", "init", "test_resnet", "--out", str(tmp_path / "a")]) == 0
    assert "timm-ghn: INFO: test_resnet: ghn-orth" in capsys.readouterr().err
    assert main(["init", "test_resnet", "--out", str(tmp_path / "b")]) == 0
    assert "INFO" not in capsys.readouterr().err


# --- init -----------------------------------------------------------------------------------------------------------

PLAIN_TIMM = """
import json, sys
import timm, torch
outputs = {}
for name, shape in json.loads(sys.argv[1]).items():
    model = timm.create_model(f"local-dir:{name}", pretrained=True).eval()
    with torch.no_grad():
        outputs[name] = model(torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape))
assert "timm_ghn" not in sys.modules
torch.save(outputs, sys.argv[2])
"""


def test_plain_timm_loads_what_init_writes(tmp_path: Path) -> None:
    """Equal logits in a process that knows nothing of timm-ghn."""
    small = [2, 3, 64, 64]
    cases: dict[str, tuple[str, dict[str, Any], list[int]]] = {
        "resnet": ("test_resnet --num-classes 7 --in-chans 1", {"num_classes": 7, "in_chans": 1}, [2, 1, 64, 64]),
        "vit": ("test_vit --img-size 96 --start-layer 0.5", {"img_size": 96}, [2, 3, 96, 96]),
        "tag": ("resnet18.a1_in1k --method ghn --model-kwargs global_pool=max", {"global_pool": "max"}, small),
        "half": ("test_convnext.ghn-orth --dtype bfloat16", {"dtype": torch.bfloat16}, small),
    }
    inits = {
        "resnet": "ghn-orth",
        "vit": timm_ghn.Init(start_layer=0.5),
        "tag": "ghn",
        "half": "ghn-orth",
    }
    shapes = {}
    for name, (arguments, _, shape) in cases.items():
        assert main(["init", *arguments.split(), "--out", str(tmp_path / name)]) == 0
        shapes[str(tmp_path / name)] = shape
    done = python("-c", PLAIN_TIMM, json.dumps(shapes), str(tmp_path / "outputs.pt"))
    assert done.returncode == 0, done.stderr
    outputs = torch.load(tmp_path / "outputs.pt")
    for name, (arguments, kwargs, shape) in cases.items():
        architecture = arguments.split()[0].partition(".")[0]
        model = timm.create_model(architecture, init=inits[name], **kwargs).float().eval()
        with torch.no_grad():
            expected = model(torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape))
        torch.testing.assert_close(outputs[str(tmp_path / name)], expected, msg=lambda text, at=name: f"{at}: {text}")


def test_init_prints_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "model")
    assert main(["init", "test_resnet", "--out", out, "--seed", "5", "--noise", "0", "--parameters"]) == 0
    printed = capsys.readouterr().out
    assert "predicted and orthogonalized" in printed
    assert "fc.weight" in printed
    assert f"timm.create_model('local-dir:{out}', pretrained=True)" in printed
    facts = timm_ghn.provenance(timm.create_model(f"local-dir:{out}", pretrained=True))
    assert facts is not None
    assert (facts["seed"], facts["noise"]) == (5, 0.0)


def test_init_without_ghn(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIMM_GHN")
    state = torch.get_rng_state()
    for number, method in enumerate(("orth", "rand", "rand")):
        assert main(["init", "test_resnet", "--method", method, "--out", str(tmp_path / f"{method}{number}")]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert "orthogonalized" in (printed := capsys.readouterr().out)
    assert "not changed by rand" in printed
    a, b = (tmp_path / name / "model.safetensors" for name in ("rand1", "rand2"))
    assert a.read_bytes() == b.read_bytes()


def test_init_in_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["init", "test_resnet", "--method", "orth", "--out", str(tmp_path), "--dtype", "bfloat16"]
    assert main([*arguments, "--max-shard-size", "200KB"]) == 0
    assert "huggingface_hub.load_torch_model(model" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert "max_shard_size='huge'" in error_of(capsys, *arguments, "--force", "--max-shard-size", "huge")
    assert (tmp_path / "model.safetensors.index.json").is_file()


def test_init_replaces_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["init", "test_resnet", "--method", "orth", "--out", str(tmp_path)]
    assert main(arguments) == 0
    before = (tmp_path / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert "already" in error_of(capsys, *arguments, "--seed", "1")
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert main([*arguments, "--seed", "1", "--force"]) == 0
    assert (tmp_path / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet5"], r"unknown model 'resnet5'; did you mean 'resnet50'"),
        (["resnet50.a1_in1"], r"no tag 'a1_in1'; did you mean 'a1_in1k'"),
        (["qqqqqqqqq"], "unknown model 'qqqqqqqqq'"),
        (["nowhere:model"], "Unknown model source 'nowhere'"),
        (["local-dir:/does/not/exist"], "Config file not found"),
        (["test_resnet", "--method", "ghnorth"], "did you mean 'ghn-orth'"),
        (["test_resnet.ghn", "--method", "orth"], "ask for different weights"),
        (["test_resnet", "--ghn", "ghn2-imagenett"], "did you mean 'ghn2-imagenet'"),
        (["test_resnet", "--ghn", "ghn2-imagenet"], "could not be fetched"),
        (["test_resnet", "--noise", "-1"], "noise"),
        (["test_resnet", "--start-layer", "1000"], "layer number from 1 to 16"),
        (["test_resnet", "--start-layer", "layer9"], "did you mean"),
        (["test_resnet", "--img-size", "64"], "img_size"),
        (["test_resnet", "--img-size", "1", "2", "3"], "height and width"),
        (["test_resnet", "--model-kwargs", "nonsense=1"], "nonsense"),
        (["test_resnet", "--model-kwargs", "pretrained=True"], "the weights are what `init` makes"),
        (["test_resnet", "--num-classes", "2", "--model-kwargs", "num_classes=3"], "give --num-classes only"),
        (["test_resnet", "--model-kwargs", "features_only=True"], "cannot describe"),
    ],
)
def test_bad_input_leaves_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(capsys, "init", *arguments, "--out", str(tmp_path / "new"))
    assert not list(tmp_path.iterdir())


def test_damaged_ghn(tmp_path: Path, capsys: pytest.CaptureFixture[str], seeded_checkpoint: Path) -> None:
    (tmp_path / "ghn.pt").write_bytes(seeded_checkpoint.read_bytes()[:1000])
    error_of(capsys, "init", "test_resnet", "--ghn", str(tmp_path / "ghn.pt"), "--out", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_tags_of_all_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "test_resnet.lsuv", "--out", str(tmp_path / "new")]) == 0
    assert "computed" in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{tmp_path / 'new'}", pretrained=True)
    assert timm_ghn.provenance(model)["method"] == "lsuv"  # type: ignore[index]


def test_a_model_is_no_ghn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "test_resnet", "--method", "orth", "--out", str(tmp_path / "model")]) == 0
    capsys.readouterr()
    path = str(tmp_path / "model" / "model.safetensors")
    message = error_of(capsys, "init", "test_resnet", "--ghn", path, "--out", str(tmp_path / "new"))
    assert message.endswith("model.safetensors holds the weights of a model, and not a GHN")


def test_destination_is_checked_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_folder, "Request", lambda *_: pytest.fail("built before the folder was checked"))
    (tmp_path / "file").write_text("")
    assert "not a folder" in error_of(capsys, "init", "test_resnet", "--out", str(tmp_path / "file"))


@pytest.mark.parametrize("text", ["novalue", "=1"])
def test_malformed_model_kwargs(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["init", "test_resnet", "--out", str(tmp_path), "--model-kwargs", text])
    assert stop.value.code == 2
    assert "KEY=VALUE" in capsys.readouterr().err


# --- graph ----------------------------------------------------------------------------------------------------------


def test_graph(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "resnet50"]) == 0
    out = capsys.readouterr().out
    assert "127 nodes, 142 edges" in out
    assert "25,557,032 parameters, 100.00% can be predicted" in out
    assert "max_pool" in out


def test_graph_says_what_is_not_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "test_convnext", "--nodes"]) == 0
    out = capsys.readouterr().out
    assert "multiplied elementwise" in out
    assert "stages.0.blocks.0.conv_dw.weight" in out


def test_graph_json(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        graph = timm_ghn.to_graph(timm.create_model("test_vit"))
    assert main(["graph", "test_vit", "--json", "--nodes"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["graph"] == graph.to_dict()
    assert data["operators"] == dict(graph.operators)
    assert data["distance_sum"] == graph.distances[:, 2].sum()
    assert 0 < data["predicted_parameters"] < data["parameters"]


def test_graph_of_torchvision_in_ppuda_reading(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "torchvision:resnet18", "--reading", "ppuda", "--input-size", "3", "128", "128"]) == 0
    assert "100.00% can be predicted" in capsys.readouterr().out


def test_graph_of_torchvision_downloads_no_backbone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "torchvision:lraspp_mobilenet_v3_large"]) == 0
    assert "can be predicted" in capsys.readouterr().out


def test_graph_of_a_model_that_does_not_fit_in_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "vit_giant_patch14_dinov2.ghn-orth", "--model-kwargs", "depth=2", "embed_dim=1536"]) == 0
    assert "can be predicted" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf", ".json", ".txt"])
def test_graph_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"graph{suffix}"
    assert main(["graph", "test_resnet", "--out", str(path)]) == 0
    content = path.read_bytes()
    if suffix == ".json":
        assert "conv" in {node["op"] for node in json.loads(content)["nodes"]}
    else:
        assert {".svg": b"<svg", ".png": b"PNG", ".pdf": b"%PDF", ".txt": b"max_pool"}[suffix] in content
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet5"], "did you mean"),
        (["torchvision:resnet19"], "torchvision has no model 'resnet19'; did you mean 'resnet"),
        (["test_resnet", "--out", "graph.gif"], "the suffix has to be one of"),
        (["test_resnet", "--model-kwargs", "nonsense=1"], "nonsense"),
        (["test_resnet", "--input-size", "4", "64", "64"], "input_size=(channels, height, width)"),
    ],
)
def test_bad_input_of_graph(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_of(capsys, "graph", *arguments)


def test_graph_file_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["graph", "test_resnet", "--out", str(tmp_path / "file" / "graph.svg")]) == 2
    assert "cannot be written" in capsys.readouterr().err


# --- ghns, train ----------------------------------------------------------------------------------------------------


def test_ghns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ghns"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["name", "on", "disk"]
    row = next(line for line in lines if line.startswith("ghn2-imagenet"))
    assert "no" in row
    assert "ImageNet" in row
    assert lines[-1] == f"Files are kept in {Path(os.environ['TIMM_GHN_CACHE']) / 'ghns'}."


def test_train_gets_its_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--images" in error_of(capsys, "train", "--out", str(tmp_path))


# --- run ------------------------------------------------------------------------------------------------------------

SCRIPT = """
import argparse, sys
from timm.models import create_model
from timm.utils import ParseKwargs
import beside
parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
parser.add_argument("--status", type=int, default=0)
args = parser.parse_args()
model = create_model(args.model, **args.model_kwargs)
print(__name__, sys.argv[0], model.pretrained_cfg["tag"], beside.NAME)
sys.exit(args.status)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "scripts" / "train.py"
    path.parent.mkdir()
    path.write_text(SCRIPT)
    (path.parent / "beside.py").write_text("NAME = 'neighbour'")
    return path


def test_run_a_script(script: Path) -> None:
    done = python(
        "-m", "timm_ghn", "-v", "run", str(script), "test_resnet", "--model-kwargs", "init=ghn-orth", "--status", "3"
    )
    assert (done.returncode, done.stdout) == (3, f"__main__ {script} ghn_orth neighbour\n")
    assert "timm-ghn: INFO: test_resnet: ghn-orth" in done.stderr


SPAWNING = """
import multiprocessing, sys

def work(queue):
    from timm import create_model
    queue.put(create_model("test_resnet", init="orth").pretrained_cfg["tag"])

if __name__ == "__main__":
    for method in sys.argv[1:]:
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=work, args=(queue,))
        process.start()
        process.join()
        print(method, process.exitcode or queue.get())
    sys.exit(7)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forkserver")
def test_processes_that_a_script_starts_know_init(tmp_path: Path) -> None:
    (tmp_path / "spawning.py").write_text(SPAWNING)
    (tmp_path / "sitecustomize.py").write_text("print('customized')")
    command = [sys.executable, "-m", "timm_ghn", "run", str(tmp_path / "spawning.py"), "spawn", "forkserver"]
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    lines = done.stdout.splitlines()
    assert "spawn orth" in lines
    assert "forkserver orth" in lines
    assert lines.count("customized") >= 2  # the user's own module of that name still runs


def test_run_a_module(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(script.parent)
    (script.parent / "tool.py").write_text("import sys\nprint(sys.argv[1:], __name__)")
    done = python("-m", "timm_ghn", "run", "-m", "tool", "-m", "--help", "x")
    assert (done.returncode, done.stdout) == (0, "['-m', '--help', 'x'] __main__\n")


_INTERRUPTED = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize(
    ("program", "status", "out", "error"),
    [
        ("raise ValueError('what is wrong')", 1, "", "ValueError: what is wrong"),
        (_INTERRUPTED, -2, "", "KeyboardInterrupt"),
        ("print(__file__)", 0, "script.py\n", ""),
    ],
)
def test_a_script_runs_and_fails_as_python_would_have_it(
    program: str, status: int, out: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "script.py").write_text(program)
    monkeypatch.chdir(tmp_path)
    done = python("-m", "timm_ghn", "run", "script.py")
    assert done.returncode == status
    assert done.stdout.endswith(out)
    assert error in done.stderr
    assert done.stderr.startswith("Traceback") is bool(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/does/not/exist.py", "--flag"], "can't open file '/does/not/exist.py'"),
        (["/"], "can't find '__main__' module in '/'"),
        (["-m", "no_such_module"], "No module named no_such_module"),
        (["-m"], "timm-ghn: error: run needs a script, or -m and a module"),
        ([], "timm-ghn: error: run needs a script, or -m and a module"),
    ],
)
def test_nothing_to_run(arguments: list[str], message: str) -> None:
    done = python("-m", "timm_ghn", "run", *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
