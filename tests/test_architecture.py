"""The import rules of docs/architecture.md, enforced by reading the source; and each rule caught at work."""

import ast
import re
from collections.abc import Callable, Iterator

import pytest

from tools.source_tree import (
    GROUPS,
    Sources,
    imports,
    is_in,
    last_name,
    modules,
    parse,
    part,
    product,
    reached,
    read_tree,
)

# The parts of the package in layers (`tools.source_tree.part`): a part may import itself and the parts of the lines
# before its own.
LAYERS = (
    {"common.errors", "common.text", "common.compat", "common.validation", "moved_modules", "__version__"},
    {"common.host"},
    {"common.config", "common.storage"},
    {"distributed"},
    {"data", "moe"},
    {"models"},
    {"checkpoint"},
    {"encoders"},
    {"clustering", "training", "selection"},
    {"exporting", "evaluation", "forecast"},
    {"inspection"},
    {"tuning", "report", "api"},
    {"__init__"},  # lazily: the Python API
    {"bench"},  # measures them all
    {"doctor"},  # tries the parts that need this machine
    {"cli.options", "cli.next_step"},
    {"cli.stages", "cli.launch", "cli.config_verbs"},
    {"cli.workflow"},
    {"cli.main"},
    {"__main__"},
)
LAYER = {name: number for number, parts in enumerate(LAYERS) for name in parts}
BARRED = {
    "evaluation": {"training"},  # what a person who only uses an encoder needs
    "inspection": {"moe", "models", "training"},  # reads files only
    "report": {"moe", "models", "training"},
    "cli.launch": {"data", "clustering", "moe", "models", "checkpoint", "encoders", "training", "cli.stages"},
}
"""Imports that the layers would allow and that are not wanted, not even inside a function."""


# Other people's packages, and the only modules (or packages of them) that may import them.
DOORS: dict[str, tuple[str, ...]] = {
    "deepspeed": (
        "moce_ds.moe.deepspeed_layer",
        "moce_ds.moe.deepspeed_token_layer",
        "moce_ds.training.engine",
        "moce_ds.training.cpu_optimizer",
        "moce_ds.checkpoint.deepspeed_state",
        "moce_ds.checkpoint.manager",
        "moce_ds.common.compat",
        "moce_ds.bench",
    ),
    "scipy": ("moce_ds.moe.placement", "moce_ds.data.sources.public.readers"),
    "nvidia": ("moce_ds.data.loader", "moce_ds.bench.load"),
    "pycocotools": ("moce_ds.data.sources.coco_api",),
    "faiss": ("moce_ds.clustering.kmeans", "moce_ds.evaluation.knn"),
    "submitit": ("moce_ds.cli.launch",),
    "pandas": ("moce_ds.api.run",),  # an extra
    "datasets": (),  # writes what tests read
    "pyarrow": ("moce_ds.data.sources.table_rows",),
    "wandb": ("moce_ds.training.remote_loggers",),
    "mlflow": ("moce_ds.training.remote_loggers",),
    "fsspec": ("moce_ds.data.shard_storage",),
    "safetensors.torch.save_file": ("moce_ds.common.storage.files",),  # which gives files the usual mode
    "safetensors.numpy.save_file": ("moce_ds.common.storage.files",),
    "pickle": ("moce_ds.checkpoint.weight_files",),  # for the class of the error that torch.load raises
}

# What importing any module of a package must not bring along, however indirectly.
NEVER_REACH: dict[str, tuple[str, ...]] = {
    "moce_ds.encoders": ("moce_ds.training", "deepspeed"),
    "moce_ds.selection": ("moce_ds.training", "deepspeed"),
    "moce_ds.exporting": ("moce_ds.training", "deepspeed"),
    "moce_ds.evaluation": ("moce_ds.training", "deepspeed"),
    "moce_ds.forecast": ("deepspeed", "nvidia", "faiss"),
    "moce_ds.doctor": ("torch", "deepspeed", "nvidia", "faiss"),
    "moce_ds.inspection": ("moce_ds.training", "torch", "deepspeed", "nvidia", "faiss"),
    "moce_ds.report": ("moce_ds.training", "torch", "deepspeed", "nvidia", "faiss"),
    # What `moce VERB --help` imports: an answer at once needs no torch.
    **dict.fromkeys(
        (
            "moce_ds.cli.main",
            "moce_ds.training.settings",
            "moce_ds.tuning.settings",
            "moce_ds.evaluation.settings",
            "moce_ds.clustering.settings",
            "moce_ds.models.settings",
            "moce_ds.encoders.settings",
            "moce_ds.data.sources.public.datasets",
            "moce_ds.cli.workflow.study_grid",
            "moce_ds.cli.workflow.pipeline",
            "moce_ds.cli.launch.slurm_profile",
        ),
        ("torch", "timm", "sklearn"),
    ),
}

WITHOUT_PROCESS_GROUP = (
    "moce_ds.moe.routing_plan",
    "moce_ds.data.sampler",
    "moce_ds.clustering.balanced_assignment",
    "moce_ds.exporting.write",
    "moce_ds.forecast.step_cost",
    "moce_ds.forecast.prediction",
)


def layers(sources: Sources) -> Iterator[str]:
    """Imports run one way."""
    for module, text in product(sources).items():
        if not is_in(module, "moce_ds"):
            continue
        own = part(module)
        for name in imports(module, text):
            imported = part(name) if name.startswith("moce_ds.") else own
            above = imported not in (own, *GROUPS) and LAYER[imported] >= LAYER[own]
            if is_in(name, "launchers") or above or imported in BARRED.get(own, ()):
                yield f"{module} imports {name}"


def doors(sources: Sources) -> Iterator[str]:
    """Other people's packages stay behind one door each."""
    for module, text in product(sources).items():
        for package, allowed in DOORS.items():
            through = any(is_in(module, door) for door in allowed)
            if not through and any(is_in(name, package) for name in imports(module, text)):
                yield f"{module} imports {package}"


def reach(sources: Sources) -> Iterator[str]:
    """Some packages must load without others, whatever lies in between."""
    loads = {
        module: {one for name in (module, *imports(module, text, at_import_only=True)) for one in with_packages(name)}
        for module, text in product(sources).items()
    }
    for package, forbidden in NEVER_REACH.items():
        for module in (name for name in loads if is_in(name, package)):
            for name in sorted(n for n in reached([module], loads) if any(is_in(n, bad) for bad in forbidden)):
                yield f"{module} reaches {name}"


def with_packages(name: str) -> Iterator[str]:
    """A dotted name and the packages that it is in: a module loads its packages."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def process_groups(sources: Sources) -> Iterator[str]:
    """The arithmetic of who does what needs no process group."""
    for module in WITHOUT_PROCESS_GROUP:
        text = sources[module]
        used = any(
            isinstance(node, ast.Attribute) and node.attr == "distributed" and last_name(node.value) == "torch"
            for node in ast.walk(parse(text))
        )
        if used or any(is_in(name, "torch.distributed") for name in imports(module, text)):
            yield f"{module} uses torch.distributed"


def catch_alls(sources: Sources) -> Iterator[str]:
    """Only errors that are understood are caught."""
    for module, text in product(sources).items():
        for node in ast.walk(parse(text)):
            if isinstance(node, ast.ExceptHandler):
                caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
                if any(kind is None or last_name(kind) in ("Exception", "BaseException") for kind in caught):
                    yield f"{module}:{node.lineno} catches everything"


def object_collectives(sources: Sources) -> Iterator[str]:
    """Processes send one another tensors and text: torch.distributed sends objects as pickles."""
    for module, text in product(sources).items():
        for node in ast.walk(parse(text)):
            named = last_name(node) if isinstance(node, ast.expr) else node.name if isinstance(node, ast.alias) else ""
            if re.fullmatch(r"(\w*gather|broadcast|scatter|send|recv)_object(_list)?", named):
                yield f"{module} uses {named}"


_PRINTERS = ("Console", "print", "tqdm", "StreamHandler")


def outputs(sources: Sources) -> Iterator[str]:
    """Output may hold foreign names, so one module alone prints; all others call it, or log."""
    attributes = ("click.echo", "click.secho", "stdout.write", "stderr.write")
    for module, text in product(sources).items():
        for node in ast.walk(parse(text)):
            if isinstance(node, ast.Attribute):
                prints = f"{last_name(node.value)}.{node.attr}" in attributes
            else:
                prints = isinstance(node, ast.Call) and last_name(node.func) in _PRINTERS
            if prints and module != "moce_ds.common.host.program":
                yield f"{module}:{node.lineno} prints past moce_ds.common.host.program"


def repairs(sources: Sources) -> Iterator[str]:
    """timm imports torchvision, which needs a repair beside a CPU build of torch: every module that imports it calls
    the repair, since the verb decides which of them is the first."""
    for module, text in product(sources).items():
        repaired = False
        for statement in parse(text).body:
            call = statement.value if isinstance(statement, ast.Expr) else None
            repaired |= isinstance(call, ast.Call) and last_name(call.func) in _REPAIRS
            names = imports(module, ast.unparse(statement), at_import_only=True)
            if not (repaired or isinstance(statement, ast.FunctionDef)) and any(
                is_in(name, package) for name in names for package in ("timm", "torchvision")
            ):
                yield f"{module}:{statement.lineno} imports timm before it repairs torchvision"


_REPAIRS = ("repair_torchvision", "supply_torchvision_operators")

Rule = Callable[[Sources], Iterator[str]]
RULES: tuple[Rule, ...] = (layers, doors, reach, process_groups, catch_alls, object_collectives, outputs, repairs)
REAL = modules(read_tree())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_keeps(rule: Rule) -> None:
    assert list(rule(REAL)) == []


def test_every_module_is_looked_at() -> None:
    some = {"moce_ds.cli.main", "moce_ds.moe.routing_plan", "moce_ds.training.pretrain", "moce_ds.cli.launch.local"}
    assert some <= set(REAL)
    named = {*WITHOUT_PROCESS_GROUP, *(door for allowed in DOORS.values() for door in allowed if "." in door)}
    assert named <= set(REAL), "a rule names a module that is gone"


# Rule, module of the product, lines added to it, and what the rule must say.
BREACHES: list[tuple[Rule, str, str, str]] = [
    (
        layers,
        "moce_ds.cli.stages.bench",
        "from moce_ds.cli.workflow.study import f",
        "imports moce_ds.cli.workflow.study",
    ),
    (layers, "moce_ds.distributed.runtime", "def f():\n    import moce_ds.data.shards", "imports moce_ds.data.shards"),
    (layers, "moce_ds.data.sampler", "from moce_ds import clustering", "imports moce_ds.clustering"),
    (layers, "moce_ds.moe.routing_plan", "from ..models import mae", "imports moce_ds.models"),
    (layers, "moce_ds.models.mae", "import moce_ds.training.engine", "imports moce_ds.training.engine"),
    (layers, "moce_ds.training.pretrain", "from moce_ds.cli.main import moce", "imports moce_ds.cli.main"),
    (layers, "moce_ds.training.pretrain", "import moce_ds.forecast.step_cost", "imports moce_ds.forecast.step_cost"),
    (layers, "moce_ds.forecast.step_cost", "from moce_ds.bench import layer", "imports moce_ds.bench"),
    (layers, "moce_ds.evaluation.knn", "from moce_ds.training import engine", "imports moce_ds.training"),
    (layers, "moce_ds.report.plots", "import moce_ds.models.vit", "imports moce_ds.models.vit"),
    (layers, "moce_ds", "import moce_ds.cli.main", "imports moce_ds.cli.main"),
    (doors, "moce_ds.training.trainer", "import deepspeed.comm", "imports deepspeed"),
    (doors, "moce_ds.cli.launch.local", "from deepspeed import comm", "imports deepspeed"),
    (doors, "moce_ds.data.shards", "from nvidia.dali import fn", "imports nvidia"),
    (doors, "moce_ds.clustering.balanced_assignment", "def f():\n    import faiss", "imports faiss"),
    (doors, "moce_ds.cli.main", "importlib.import_module('submitit')", "imports submitit"),
    (doors, "moce_ds.checkpoint.format", "import pickle", "imports pickle"),
    (process_groups, "moce_ds.moe.routing_plan", "import torch.distributed as d", "uses torch.distributed"),
    (process_groups, "moce_ds.data.sampler", "torch.distributed.barrier()", "uses torch.distributed"),
    (
        process_groups,
        "moce_ds.clustering.balanced_assignment",
        "from torch import distributed",
        "uses torch.distributed",
    ),
    (process_groups, "moce_ds.forecast.step_cost", "import torch.distributed", "uses torch.distributed"),
    (process_groups, "moce_ds.exporting.write", "from torch.distributed import ReduceOp", "uses torch.distributed"),
    (catch_alls, "moce_ds.common.storage.files", "try: pass\nexcept: pass", "catches everything"),
    (catch_alls, "moce_ds.common.storage.files", "try: pass\nexcept (OSError, Exception): pass", "catches everything"),
    (catch_alls, "moce_ds.cli.launch.local", "try: pass\nexcept BaseException as e: pass", "catches everything"),
    (object_collectives, "moce_ds.distributed.runtime", "dist.all_gather_object([], 1)", "uses all_gather_object"),
    (
        object_collectives,
        "moce_ds.moe.expert_layer",
        "from torch.distributed import recv_object_list",
        "recv_object_list",
    ),
    (repairs, "moce_ds.evaluation.knn", "from timm.optim import Lars", "imports timm before it repairs torchvision"),
    (outputs, "moce_ds.cli.main", "click.echo('x')", "prints past moce_ds.common.host.program"),
    (outputs, "moce_ds.cli.workflow.demo", "print('x')", "prints past moce_ds.common.host.program"),
    (outputs, "moce_ds.cli.launch.local", "sys.stderr.write('x')", "prints past moce_ds.common.host.program"),
    (outputs, "moce_ds.data.shards", "for x in tqdm(range(3)): pass", "prints past moce_ds.common.host.program"),
    (outputs, "moce_ds.cli.workflow.demo", "Console(width=100).print('x')", "prints past moce_ds.common.host.program"),
]


@pytest.mark.parametrize(("rule", "module", "added", "told"), BREACHES)
def test_a_breach_is_found(rule: Rule, module: str, added: str, told: str) -> None:
    found = list(rule({**REAL, module: f"{REAL[module]}\n{added}\n"}))
    assert any(breach.startswith(module) and breach.endswith(told) for breach in found), found


@pytest.mark.parametrize(
    ("module", "added", "told"),
    [
        (
            "moce_ds.encoders.from_checkpoint",
            "import moce_ds.moe.deepspeed_layer",
            "moce_ds.exporting.write reaches deepspeed",
        ),
        ("moce_ds.moe.reference", "import moce_ds.training", "moce_ds.exporting.write reaches moce_ds.training"),
        ("moce_ds.data.shards", "import moce_ds.data.loader", "moce_ds.report.build reaches nvidia.dali"),
        ("moce_ds.training.settings", "import deepspeed", "moce_ds.forecast.prediction reaches deepspeed"),
        ("moce_ds.data", "import faiss", "moce_ds.inspection.inspection reaches faiss"),
        (
            "moce_ds.cli.main",
            "from moce_ds.cli.workflow.study import run_study",
            "moce_ds.cli.main reaches timm",
        ),
    ],
)
def test_a_detour_is_found(module: str, added: str, told: str) -> None:
    assert told in set(reach({**REAL, module: f"{REAL[module]}\n{added}\n"}))


def test_lazy_imports_are_no_reach() -> None:
    """A function may import what its module must not load."""
    lazy = {
        **REAL,
        "moce_ds.encoders.from_checkpoint": REAL["moce_ds.encoders.from_checkpoint"]
        + "\ndef f():\n    import deepspeed\n",
    }
    assert list(reach(lazy)) == []
