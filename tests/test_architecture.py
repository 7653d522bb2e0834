"""The rules of docs/architecture.md: who imports whom, where imports stand, and how long files and functions are."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "insvp_fast"
SHIPPED = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
OURS = [*SHIPPED, *(path for name in ("benchmarks", "tools", "examples") for path in (ROOT / name).rglob("*.py"))]

# Each may import what stands before it; those of one line are not to import each other.
LAYERS = [
    ["errors", "config", "method_names", "atomic_files"],
    ["json_files"],
    ["reference", "timm_models"],
    ["kernels"],
    ["runtime"],
    ["ops"],
    ["coverage"],
    ["backbones", "prompters"],
    ["backbone_settings", "checkpoints", "timm_interface"],
    ["prompted"],
    ["model", "probabilities"],
    ["bank", "methods"],
    ["data"],
    ["figures", "huggingface"],
    ["training"],
    ["serving", "report", "demo"],
    ["recipes"],
    ["testing"],
    ["bench"],
    ["studies"],
    ["export"],
    ["commands"],
    ["__main__", "timm_script"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# and of these, nothing else
ONLY: dict[str, set[str]] = {"data": {"errors", "config", "atomic_files"}, "kernels": set()}
# what an import of the package, or the command line, must not wait for or need
LATE = ("insvp_fast.kernels.gpu", "insvp_fast.figures", "triton", "torch._inductor", "xformers", "accelerate", "rich")
LATE += (
    "matplotlib",
    "scipy",
    "sklearn",
    "onnxruntime",
    "openvino",
    "nncf",
    "tensorflow_datasets",
    "pyarrow",
    "gradio",
)

# where else than in `commands/` they may be imported
PLACES = {
    "accelerate": ("training/",),
    "rich": ("training/terminal.py", "data/cache.py"),
    "matplotlib": ("figures/", "training/lr_finder.py"),
    "starlette": ("serving/",),
    "uvicorn": (),
    "gradio": ("demo.py",),
    "jinja2": ("report/",),
    "onnxruntime": ("export/",),
    "openvino": ("export/",),
    "nncf": ("export/",),
    "pyarrow": ("data/timm_formats.py", "training/prediction_file.py"),
}


def layer(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def imported(node: ast.AST) -> list[str]:
    """The full names of what an import statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    return [(node.lineno, name) for node in ast.walk(tree) for name in imported(node)]


def wrong_directions(name: str, tree: ast.AST) -> list[str]:
    wrong = []
    for line, module in imports(tree):
        package, _, rest = module.partition(".")
        other = rest.partition(".")[0]
        if package != "insvp_fast" or other not in RANK or other == name:
            continue
        if RANK[other] >= RANK[name] or other not in ONLY.get(name, RANK):
            wrong.append(f"line {line}: {name} imports {module}")
    return wrong


@pytest.mark.parametrize("path", [path for path in SHIPPED if layer(path) != "__init__"], ids=lambda p: p.stem)
def test_imports_run_one_way(path):
    assert layer(path) in RANK, "expected a layer of its own in LAYERS"
    assert not wrong_directions(layer(path), ast.parse(path.read_text()))


def test_a_wrong_direction_is_seen():
    assert wrong_directions("ops", ast.parse("from insvp_fast import model")) == [
        "line 1: ops imports insvp_fast.model"
    ]
    assert wrong_directions("prompters", ast.parse("def f():\n    import insvp_fast.backbones.swin"))
    assert wrong_directions("data", ast.parse("from insvp_fast.model import InsVPViT"))
    assert wrong_directions("kernels", ast.parse("from insvp_fast.reference import unfold"))
    assert not wrong_directions("model", ast.parse("from insvp_fast import ops, __version__"))


@pytest.mark.parametrize("library", PLACES)
def test_a_library_is_imported_in_its_places_alone(library):
    files = [path for path in PACKAGE.rglob("*.py") if layer(path) != "commands"]
    users = [
        str(path.relative_to(PACKAGE))
        for path in files
        for _, name in imports(ast.parse(path.read_text()))
        if name.partition(".")[0] == library
    ]
    assert [name for name in users if not name.startswith(PLACES[library])] == []


def late_imports(tree: ast.AST) -> list[str]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [name for function in functions for _, name in imports(function) if not name.startswith(LATE)]


@pytest.mark.parametrize("path", [path for path in SHIPPED if layer(path) != "commands"], ids=lambda p: p.stem)
def test_imports_inside_functions_are_for_what_is_heavy_or_optional(path):
    assert not late_imports(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", OURS, ids=lambda p: p.stem)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


@pytest.mark.parametrize("path", OURS, ids=lambda p: p.stem)
def test_nobody_edits_the_path_or_draws_rules(path):
    text = path.read_text()
    assert "sys.path" not in text
    assert "# -----" not in text


@pytest.mark.parametrize(
    "path", [p for end in ("h", "cpp") for p in (ROOT / "kernels" / "cpu").rglob(f"*.{end}")], ids=lambda p: p.name
)
def test_native_sources_and_their_lines_are_short(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 400 and max(map(len, lines)) <= 120


def names_in(paths, pattern):
    return sorted({name for path in paths for name in re.findall(pattern, path.read_text(), re.MULTILINE)})


def test_what_programs_call_shares_its_work_with_their_team():
    """A region of OpenMP's inside a program would have one thread."""
    files = [path for path in (ROOT / "kernels" / "cpu").glob("*/*.cpp") if "INSVP_FAST_STEP(" in path.read_text()]
    assert len(files) > 5
    assert [path.name for path in files if "#pragma omp" in path.read_text()] == []


def test_programs_can_call_what_is_launched_and_nothing_else():
    launched = names_in((PACKAGE / "runtime" / "native").glob("*.py"), r'launch\(\s*"(\w+)"')
    steps = names_in((ROOT / "kernels" / "cpu").glob("*/*.cpp"), r"^INSVP_FAST_STEP\((\w+)\)")
    assert launched and launched == steps
