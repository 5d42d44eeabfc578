import subprocess
import sys


def test_accounting_imports_neither_jax_nor_dpgemma():
    code = (
        "import pkgutil, importlib, sys, accounting\n"
        "for module in pkgutil.walk_packages(accounting.__path__, 'accounting.'):"
        " importlib.import_module(module.name)\n"
        "assert not {'jax', 'dpgemma', 'flax'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
