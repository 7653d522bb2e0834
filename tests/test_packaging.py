"""Importing, the kernels/ mapping, the native library's absence, and the build with and without a compiler."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import insvp_fast.kernels
from insvp_fast.runtime import native
from insvp_fast.runtime.native import library

ROOT = Path(__file__).resolve().parents[1]


def python(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in {"INSVP_FAST_NATIVE", "TRITON_INTERPRET"}}
    return subprocess.run([sys.executable, *args], cwd=cwd, env={**clean, **env}, capture_output=True, text=True)


# Imports


def test_import_is_silent_and_loads_no_kernels(tmp_path):
    """timm may import triton; the package works where triton and xformers cannot be imported at all."""
    code = (
        "import sys; sys.modules.update(triton=None, xformers=None);"
        "from insvp_fast import InsVPReference, InsVPViT, native_status; native_status();"
        "kernels = [name for name in sys.modules if name.startswith('insvp_fast.kernels.')];"
        "assert not kernels, kernels"
    )
    done = python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_kernels_are_importable_as_a_part_of_the_package():
    spec = importlib.util.find_spec("insvp_fast.kernels.gpu")
    assert spec is not None
    assert Path(spec.origin).parts[-3:] == ("kernels", "gpu", "__init__.py")


def test_kernels_refuse_to_be_imported_twice():
    done = python("-c", "import kernels.gpu", cwd=ROOT)
    assert done.returncode != 0
    assert "insvp_fast.kernels.gpu" in done.stderr


@pytest.mark.parametrize("installed", [True, False])
def test_kernels_are_looked_for_beside_the_shim_first(tmp_path, installed):
    """In site-packages a top-level ``kernels`` is somebody else's."""
    shim = tmp_path / "insvp_fast" / "kernels" / "__init__.py"
    (shim.parent / "gpu" if installed else shim.parent).mkdir(parents=True)
    (tmp_path / "kernels").mkdir()
    shutil.copy(insvp_fast.kernels.__file__, shim)
    spec = importlib.util.spec_from_file_location("shim", shim, submodule_search_locations=[str(shim.parent)])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.__path__ == [str(shim.parent)] + ([] if installed else [str(tmp_path / "kernels")])


# The native library's absence


@pytest.fixture
def reload_native():
    """A function that makes the next use load the library anew; also called after the test."""
    yield library.load.cache_clear
    library.load.cache_clear()


def test_native_can_be_switched_off(monkeypatch, reload_native):
    monkeypatch.setenv("INSVP_FAST_NATIVE", "0")
    reload_native()
    assert not native.native_status()
    assert "INSVP_FAST_NATIVE=0" in str(native.native_status())
    assert not native.available()


def test_a_missing_library_says_how_to_find_out_why(monkeypatch, reload_native, tmp_path):
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "absent.so")
    monkeypatch.delenv("INSVP_FAST_NATIVE", raising=False)
    reload_native()
    assert "not built; INSVP_FAST_NATIVE=1 pip install" in str(native.native_status())
    assert not native.available()
    monkeypatch.setenv("INSVP_FAST_NATIVE", "1")
    with pytest.raises(RuntimeError, match="INSVP_FAST_NATIVE=1, but native CPU library not in use: not built"):
        native.available()


def test_a_broken_library_is_not_used(monkeypatch, reload_native, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(library, "LIBRARY", broken)
    reload_native()
    assert "cannot load broken.so" in str(native.native_status())


@pytest.mark.skipif(not native.native_status(), reason=str(native.native_status()))
def test_a_stale_library_is_not_used(monkeypatch, reload_native):
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    reload_native()
    assert "run pip install -e . again" in str(native.native_status())


@pytest.mark.skipif(not native.native_status(), reason=str(native.native_status()))
def test_an_unknown_instruction_set_is_refused(monkeypatch, reload_native):
    monkeypatch.setenv("INSVP_FAST_CPU_ISA", "avx3")
    reload_native()
    assert "'avx3' is none of generic, avx2, avx512" in str(native.native_status())


# The build


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what the build reads, with a library from an earlier build in place."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs a source checkout")
    pytest.importorskip("setuptools.command.bdist_wheel", reason="needs setuptools 70.1")
    root = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("insvp_fast", "kernels"):
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, root)
    (root / "README.md").write_text("# insvp_fast\n")
    return root


@pytest.fixture
def stale(checkout) -> Path:
    file = checkout / "insvp_fast" / "runtime" / "native" / library.LIBRARY.name
    file.write_bytes(b"an older build")
    return file


@pytest.mark.parametrize(
    "env",
    [{"INSVP_FAST_NATIVE": "0"}, {"PATH": "", "CXX": ""}, {"CXX": "/bin/false"}],
    ids=["forbidden", "no compiler", "compiler fails"],
)
def test_without_a_library_the_editable_tree_keeps_no_older_one(checkout, stale, env):
    code = (
        "import setuptools.build_meta as backend, sys;"
        "print(backend.build_editable(sys.argv[1], metadata_directory=None))"
    )
    done = python("-c", code, str(checkout / "dist"), cwd=checkout, **env)
    assert done.returncode == 0, done.stderr
    assert not stale.exists()


def test_a_required_library_that_cannot_be_built_stops_the_build(checkout, stale):
    done = python("setup.py", "build_ext", "--inplace", cwd=checkout, INSVP_FAST_NATIVE="1", PATH="", CXX="")
    assert done.returncode != 0
    assert "no C++ compiler found" in done.stderr


def test_a_misspelled_mode_is_refused(checkout):
    done = python("setup.py", "--version", cwd=checkout, INSVP_FAST_NATIVE="yes")
    assert done.returncode != 0
    assert "INSVP_FAST_NATIVE must be 1 (require), 0 (forbid) or auto" in done.stderr


@pytest.mark.parametrize("env", [{"INSVP_FAST_NATIVE": "0"}, {"CXX": "/bin/false"}], ids=["forbidden", "not built"])
def test_wheel_without_the_library_is_pure_and_complete(checkout, env, tmp_path):
    done = python("setup.py", "-q", "bdist_wheel", "-d", str(tmp_path), cwd=checkout, **env)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.iterdir()
    assert wheel.name == "insvp_fast-0.1.0-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"insvp_fast", "insvp_fast-0.1.0.dist-info"}
    source = {str(p.relative_to(ROOT)) for p in (ROOT / "insvp_fast").rglob("*.py")}
    source |= {f"insvp_fast/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    assert source | {"insvp_fast/py.typed", "insvp_fast/assets/vit_shapes_32.safetensors"} <= set(names)


def test_the_library_is_there_where_it_is_required():
    if os.environ.get("INSVP_FAST_NATIVE") != "1":
        pytest.skip("INSVP_FAST_NATIVE=1 is not set")
    assert native.native_status().loaded, native.native_status()


@pytest.mark.skipif(not native.native_status(), reason=str(native.native_status()))
def test_available():
    assert native.available()
    assert native.available(torch.float32, torch.bfloat16)
    assert not native.available(torch.float32, torch.float16)


# Versions


def test_the_oldest_versions_checked_are_those_declared():
    constraints = ROOT / ".ci" / "oldest.txt"
    if not constraints.exists():
        pytest.skip("only a checkout has .ci")
    checked = {line.split("#")[0].strip().removesuffix(".*") for line in constraints.read_text().splitlines()}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {name.replace(">=", "==") for name in declared if ">=" in name} <= checked
