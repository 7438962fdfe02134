import runpy
import sys
import warnings

import pytest
import torch


@pytest.fixture
def python(monkeypatch, capsys, tmp_path):
    """Runs ``python -W error FILE ...`` or ``python -W error -m MODULE ...`` in this process, which saves each the
    seconds that it takes to import torch. Gives what it printed.
    """
    threads = torch.get_num_threads()

    def run(*arguments):
        what, *rest = map(str, arguments)
        as_module = what == "-m"
        what, rest = (rest[0], rest[1:]) if as_module else (what, rest)
        monkeypatch.setattr(sys, "argv", [what, *rest])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # of tensors as images
            if as_module:
                runpy.run_module(what, run_name="__main__", alter_sys=True)
            else:
                monkeypatch.chdir(tmp_path)  # a file runs from anywhere
                runpy.run_path(what, run_name="__main__")
        return capsys.readouterr()

    yield run
    torch.set_num_threads(threads)  # scripts choose how many
