"""Versions, ranges and extras, read from the metadata of packages."""

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from moce_ds import __version__
from moce_ds.doctor import packages
from moce_ds.doctor.packages import EXTRAS, Requirement

ROOT = Path(__file__).parents[3]


def install(site: Path, name: str, number: str, *needs: str) -> None:
    """Write the metadata of a package, as pip does."""
    folder = site / f"{name.replace('-', '_')}-{number}.dist-info"
    folder.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {number}", "Requires-Python: >=3.11"]
    (folder / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {need}" for need in needs), ""]))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that comes before the others."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_every_requirement_of_this_project_is_read() -> None:
    core = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    extras = [f"{text}; extra == {extra!r}" for extra, texts in declared.items() for text in texts]
    read = [Requirement.read(text) for text in core + extras]
    assert {one.extra for one in read} == {"", *declared} and set(EXTRAS) < set(declared)
    torch_range = next(one for one in read if one.name == "torch")
    assert torch_range.bounds == ((">=", "2.13"), ("<", "2.14")) and not torch_range.extra
    assert str(torch_range) == "torch>=2.13,<2.14"


@pytest.mark.parametrize("text", ["torch~=2.1", "torch==2.1; extra == 'cpu'", "torch>=2; python_version < '3'", ""])
def test_other_requirements_are_not_guessed(text: str) -> None:
    with pytest.raises(ValueError, match="is no requirement"):
        Requirement.read(text)


@pytest.mark.parametrize(
    ("needed", "installed", "fits"),
    [
        ("torch<2.14,>=2.13", "2.13.0+cpu", True),
        ("torch<2.14,>=2.13", "2.13.0a0+git1234", True),
        ("torch<2.14,>=2.13", "2.14.0", False),
        ("torch<2.14,>=2.13", "2.9.1", False),
        ("submitit<2,>=1.5.2", "1.5.10", True),
        ("submitit<2,>=1.5.2", "2", False),
        ("s3fs (>=2025.3) ; extra == 's3'", "2025.3.0", True),
        ("x>=1.0.0", "1", True),
        ("conformal-clip-data", "0.1.4", True),
    ],
)
def test_a_version_is_in_its_range(needed: str, installed: str, fits: bool) -> None:
    assert Requirement.read(needed).allows(installed) == fits


def test_the_lines_of_moce_version() -> None:
    lines = dict(line.split(" ", 1) for line in packages.version_lines())
    assert list(lines) == ["moce_ds", "Python", "torch", "DeepSpeed", "DALI", "faiss"]
    assert lines["moce_ds"] == __version__ and lines["DeepSpeed"] == version("deepspeed")
    cuda = torch.version.cuda
    assert lines["torch"].endswith(f"(built for CUDA {cuda})" if cuda else "(built for the CPU only)")
    assert packages.cuda_of_torch() == cuda


def test_what_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, "torch")
    lines = list(packages.version_lines())
    assert lines[2] == "torch not installed: pip install torch torchvision"
    assert lines[5] == "faiss not installed: pip install 'moce-ds[cpu]', or with a GPU cu13 or cu12"
    missing = packages.only_one("faiss", packages.FAISS, "cu12")
    assert missing and (missing.status, missing.cure) == ("fault", "`pip install 'moce-ds[cu12]'`.")
    assert packages.python_version().status == "warning"  # moce-ds is not installed there either


def test_packages_of_this_installation_fit() -> None:
    assert packages.required_packages().status == packages.python_version().status == "ok"


def test_packages_that_do_not_fit_are_named_with_the_command(site: Path) -> None:
    install(site, "moce-ds", "0.1.0", "torch<100,>=99", "timm>=1", "no-such-package<2,>=1.5")
    found = packages.required_packages()
    assert found.status == "fault" and found.text == f"torch {version('torch')}, no-such-package is missing"
    assert found.cure == "`pip install 'torch>=99,<100' 'no-such-package>=1.5,<2'`."


def test_an_extra_is_installed_or_says_what_it_is_for(site: Path) -> None:
    install(site, "moce-ds", "0.1.0", 'none-such; extra == "s3"', 'timm<1; extra == "hf"', 'timm; extra == "dense"')
    absent, wrong, present = (packages.optional_extra(extra) for extra in ("s3", "hf", "dense"))
    assert (absent.status, absent.text) == ("ok", "not installed; for shard sets in S3: pip install 'moce-ds[s3]'")
    assert wrong.status == "warning" and f"timm {version('timm')} does not fit" in wrong.text and "hf" in wrong.cure
    assert (present.status, present.text) == ("ok", f"installed; for {EXTRAS['dense']}")


def test_two_packages_that_overwrite_each_other_are_a_fault(site: Path) -> None:
    for name in packages.FAISS:
        install(site, name, "1.9")
    both = packages.only_one("faiss", packages.FAISS, "cu13")
    assert both and both.status == "fault" and "faiss-gpu and faiss-cpu are installed" in both.text
    assert both.cure == "`pip uninstall faiss-gpu faiss-cpu`, then `pip install 'moce-ds[cu13]'`."
