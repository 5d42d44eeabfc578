"""What docs/architecture.md says of the code's form: who may import whom, and which words stand in one place."""

import ast
import functools
import pathlib
import re
import subprocess
import sys

import pytest

import dpgemma
from accounting import run_files
from tests import breaches

ROOT = pathlib.Path(dpgemma.__file__).parents[1]
PATHS = [path for folder in ("accounting", "dpgemma", "experiments") for path in sorted((ROOT / folder).rglob("*.py"))]


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text())


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PATHS}


def imported(path, *, everywhere):
    """Modules of ours that a module imports: where it is loaded, or `everywhere`, in its functions too."""
    found, nodes = set(), [tree_of(path)]
    while nodes:
        node = nodes.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if not everywhere and isinstance(child, (ast.FunctionDef, ast.Lambda)):
                continue
            nodes.append(child)
            if isinstance(child, ast.Import):
                found |= {alias.name for alias in child.names}
            elif isinstance(child, ast.ImportFrom) and child.module:
                inner = {f"{child.module}.{alias.name}" for alias in child.names}
                found |= {name if name in MODULES else child.module for name in inner}
    return found & set(MODULES)


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: imported(path, everywhere=False) - {name} for name, path in MODULES.items()}
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, f"a circle: {open_[open_.index(name) :]}"
        if name not in done:
            open_.append(name)
            for other in sorted(graph[name]):
                visit(other)
            open_.pop()
            done.add(name)

    for name in graph:
        visit(name)


# Who may know of whom. What a folder's line does not name, none of its modules may import, not even in a function.
ARROWS = {
    "accounting": set(),
    "dpgemma.choices": set(),
    "dpgemma.user_cache": set(),
    "dpgemma.storage": {"accounting"},
    "dpgemma.sharding": {"accounting", "dpgemma.choices"},
    "dpgemma.data": {"accounting", "dpgemma.choices", "dpgemma.privacy.keystream", "dpgemma.storage"},
    "dpgemma.privacy": {"accounting", "dpgemma.choices", "dpgemma.data.batch", "dpgemma.sharding"},
    "dpgemma.gemma": {
        "accounting", "dpgemma.choices", "dpgemma.data.text", "dpgemma.privacy.operations", "dpgemma.sharding",
    },
    "dpgemma.objectives": {"dpgemma.data", "dpgemma.gemma", "dpgemma.privacy.operations"},
    "dpgemma.training": {
        "accounting", "dpgemma.choices", "dpgemma.data", "dpgemma.gemma", "dpgemma.inference", "dpgemma.objectives",
        "dpgemma.privacy", "dpgemma.sharding", "dpgemma.storage", "dpgemma.user_cache",
    },
    "dpgemma.inference": {
        "accounting", "dpgemma.data", "dpgemma.gemma", "dpgemma.objectives", "dpgemma.storage", "dpgemma.training",
    },
    "dpgemma.commands": {"accounting", "dpgemma"},
    "dpgemma.cli": {"accounting", "dpgemma.commands"},
    "experiments": {"accounting", "dpgemma"},
}  # fmt: skip


def belongs(name, folder):
    return name == folder or name.startswith(folder + ".")


@pytest.mark.parametrize("folder", ARROWS)
def test_arrows_point_one_way(folder):
    for name, path in MODULES.items():
        if belongs(name, folder):
            others = {other for other in imported(path, everywhere=True) if not belongs(other, folder)}
            strangers = {other for other in others if not any(belongs(other, known) for known in ARROWS[folder])}
            # The version stands at the top of the package.
            assert not strangers - {"dpgemma"}, f"{name} must not know of {sorted(strangers)}"


def texts(path):
    """The string constants of a module, docstrings left out."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    constants = (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Constant))
    return [c.value for c in constants if isinstance(c.value, str) and id(c) not in docstrings]


def test_only_objectives_models_and_text_know_of_tokens():
    allowed = ("dpgemma.objectives", "dpgemma.gemma", "dpgemma.data.text")
    for name, path in MODULES.items():
        if belongs(name, "dpgemma") and not any(belongs(name, home) for home in allowed):
            # A kind of canary is called so by a flag.
            assert "tokens" not in re.sub(r"random_tokens|RANDOM_TOKENS|new_tokens", "", path.read_text()), name


def test_only_sharding_names_axes_of_the_mesh():
    for name, path in MODULES.items():
        if belongs(name, "dpgemma") and not belongs(name, "dpgemma.sharding"):
            source = path.read_text()
            assert "PartitionSpec" not in source and "axis_name=" not in source, name


def test_no_branch_asks_for_a_model_type():
    for name, path in MODULES.items():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Compare) and any(isinstance(op, (ast.Eq, ast.NotEq)) for op in node.ops):
                assert "model_type" not in ast.unparse(node.left), name


def test_the_files_of_a_run_are_named_in_one_module():
    names = {
        value for value in vars(run_files).values() if isinstance(value, str) and value.endswith((".json", ".jsonl"))
    }
    names |= {run_files.PAGE, "keys.json", "data.json", "held_out.jsonl"}
    assert len(names) >= 8
    for name, path in MODULES.items():
        # A Hugging Face directory has a config.json as well.
        own = {run_files.CONFIG} if name == "dpgemma.gemma.files.config_json" else set()
        assert name == "accounting.run_files" or not (names - own) & set(texts(path)), name


def test_only_the_command_line_changes_its_process():
    changes = re.compile(r"sys\.(except|unraisable)hook =|signal\.signal\(|setLevel\(|rcParams|os\.environ\[[^]]*\] =")
    for name, path in MODULES.items():
        found = changes.search(path.read_text())
        assert not found or name == "dpgemma.commands.process", (name, found)


def proofs(source):
    """The references behind each "Tested by" of a module, up to the end of the sentence or of the docstring."""
    joined = re.sub(r"\s*\n\s*", " ", source).replace(":: ", "::")
    for rest in joined.split("Tested by ")[1:]:
        yield re.split(r'\.\s|\."""|"""', rest)[0]


def test_named_tests_exist():
    """Every test that a docstring names as its proof."""
    count = 0
    for path in PATHS:
        for proof in proofs(path.read_text()):
            file, found = None, []
            for part in re.findall(r"tests/[\w/]+\.py|test_\w+", proof):
                if part.startswith("tests/"):
                    file = ROOT / part
                    assert file.is_file(), (path, part)
                else:
                    assert file is not None and f"def {part}(" in file.read_text(), (path, file, part)
                    found.append(part)
            assert found or file is not None, (path, proof)
            count += 1
    assert count >= 25


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_the_package_and_help_bring_nothing_heavy():
    heavy = "{'jax', 'numpy', 'scipy', 'flax', 'matplotlib', 'tensorflow_datasets', 'orbax'}"
    for code in (
        "import dpgemma",
        *(f"from dpgemma.cli import main; main(['{c}', '--help'])" for c in ("train", "account")),
    ):
        done = run_python(f"import sys; {code}; found = {heavy} & set(sys.modules); assert not found, found")
        assert done.returncode == 0, done.stderr


MISSING = """
import sys

class Missing:
    names = %r

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
from dpgemma.cli import main
sys.exit(main(%r))
"""


def test_account_needs_none_of_the_trainers_libraries():
    """It runs where they cannot be imported at all."""
    missing = {
        "jax", "flax", "optax", "orbax", "matplotlib", "pyarrow", "tensorflow_datasets", "tokenizers", "sentencepiece",
        "safetensors", "cryptography",
    }  # fmt: skip
    flags = ["--num_units=1000", "--batch_size=10", "--steps=5", "--noise_multiplier=1", "--tables", "--json"]
    done = run_python(MISSING % (missing, ["account", *flags]))
    assert done.returncode == 0 and '"epsilon"' in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["clipping", "forward_backward"])
def test_a_benchmark_without_its_peers_is_one_sentence(name):
    code = MISSING.partition("from dpgemma.cli")[0] % ({"jax_privacy", "torch", "transformers", "opacus"},)
    code += f"import runpy; runpy.run_module('experiments.benchmarks.{name}', run_name='__main__')"
    done = run_python(code)
    assert done.returncode == 2 and "pip install -e '.[dev]'" in done.stderr and len(done.stderr.splitlines()) == 1


def test_few_tests_replace_what_is_ours():
    sources = [path.read_text() for path in (ROOT / "tests").rglob("*.py") if path != pathlib.Path(__file__)]
    assert sum(source.count("monkeypatch.setattr(") for source in sources) <= 10


def test_every_breach_that_can_be_planted_still_applies():
    """tests.mutations replaces text of the source, which changes."""
    for mutation in breaches.MUTATIONS:
        assert (ROOT / mutation.file).read_text().count(mutation.old) == 1, mutation.what
        assert (ROOT / mutation.tests[0]).is_file(), mutation.what
