"""What DeepSpeed imports is what training needs: a start takes seconds as it is."""

import importlib
import sys

from harness import run_distributed

from moce_ds.common.compat import quiet_deepspeed


def imported_with_muon() -> list[str]:
    """The modules that come with Muon, which DeepSpeed imports when it is given any optimizer."""
    quiet_deepspeed()
    before = set(sys.modules)
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    return sorted(set(sys.modules) - before)


def test_an_optimizer_brings_no_compiler() -> None:
    (found,) = run_distributed(imported_with_muon, 1)
    assert "deepspeed.runtime.zero.muon.original_muon" in found
    assert not [name for name in found if name.startswith(("torch._inductor", "functorch"))], found
