"""Runs `dalikd COMMAND …`, or a script, in a process forked from one that has its imports already (see conftest.py).

Not a test: `runpy` runs this file, with the three names that it does not define.
"""
# ruff: noqa: F821

import faulthandler
import os
import runpy
import sys

import torch

from dalikd.tools.main import main
from dalikd.trainers.signals import prepare_process

os.environ.update(environment)
torch.set_num_threads(1)
for number, file in enumerate(streams, start=1):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
faulthandler.enable()  # a native crash says where it was
if words[0].endswith(".py"):
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
else:
    sys.argv = ["dalikd", *words]
    prepare_process()
    main()
